"""Tuned weights on a MODEL: its clone carries the temporal layers, and the queries' change as the host's patches."""

from __future__ import annotations

import logging

from .. import host
from ..method import low_rank
from ..method.inflation import PAPER, TemporalLayers
from ..method.tuning import trains
from ..method.windows import Windows
from ..store.weights import TunedWeights

log = logging.getLogger(__name__)


def apply_weights(
    model: host.ModelPatcher,
    weights: TunedWeights,
    motion: float = 1.0,
    content: float = 1.0,
    windows: Windows | None = None,
) -> host.ModelPatcher:
    """A clone of a model, inflated or not, with tuned weights; the host patches its own, and only while it is loaded.

    Args:
        motion: strength of the temporal attention.
        content: strength of the change in the queries.
        windows: None cuts the clip as a `model` that is inflated cuts it, or, where that does not, as it was cut for
            tuning. All else of its inflation gives way to the weights'.

    Raises ValueError when the weights belong to another UNet, or lack a part of what was tuned.
    """
    temporal = TemporalLayers(host.parts_of(host.unet_of(model)), layers=weights.layers)
    temporal.assign(weights.temporal)
    shapes = host.shapes_of(model)
    wanted = {name for name in shapes if trains(name)}
    if weights.layers == PAPER:
        changes = {name: delta.shape for name, delta in weights.queries.items()}
    else:
        halves = low_rank.pairs(weights.queries)
        changes = {f"{name}.weight": (up.shape[0], down.shape[1]) for name, (up, down) in halves.items()}
    if missing := wanted - changes.keys():
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} tuned queries of this MODEL are not in these weights, the first is "
            f"{min(missing)}: save them again, or use weights that were tuned on this model's family."
        )
    if wrong := [name for name, shape in changes.items() if shapes.get(name) != shape]:
        raise ValueError(
            f"{len(wrong)} of {len(changes)} tuned queries do not fit this MODEL, the first is {min(wrong)}. "
            "Use weights that were tuned on this model's family."
        )
    for layer in temporal.layers:
        for parameter in layer.attn_temp.to_out.parameters():
            parameter.data *= motion
    before = model.attachments.get(host.KEY)
    if before is not None:
        _tell_what_gives_way(before, weights)
        windows = windows or (before.windows if before.windows.frames else None)
    cut = weights.windows if windows is None else windows
    inflation = host.Inflation(temporal, weights.group_norm, weights.frames, cut, weights.attends, weights.layers, True)
    tuned = host.with_inflation(model, inflation)
    add = host.add_tune if weights.layers == PAPER else host.add_low_rank_tune
    add(tuned, weights.queries, content)
    return tuned


def _tell_what_gives_way(inflation: host.Inflation, weights: TunedWeights) -> None:
    for name in ("group_norm", "attends", "layers"):
        wanted, own = getattr(inflation, name), getattr(weights, name)
        if wanted != own:
            log.warning("Tune-A-Video: %s is %s, as these weights were tuned, not %s as set before", name, own, wanted)


def check_base(model: host.ModelPatcher, weights: TunedWeights) -> None:
    """Whether weights may be applied to a model; another base of the same family is only noted in the log.

    Raises ValueError for another family, naming both, for a model that carries other tuned weights, and for any other
    model where the weights were tuned on a tuned one.
    """
    family = host.family_of(model)
    if weights.base_family not in ("", family):
        raise ValueError(
            f"these weights were tuned on {weights.base_family}, this MODEL is {family}: use a checkpoint of their "
            "family."
        )
    inflation = model.attachments.get(host.KEY)
    tuned = inflation is not None and inflation.tuned
    if weights.base_fingerprint == host.fingerprint(model):
        if tuned:  # a tune of this very MODEL, or, where the other's content is 0, one of the MODEL before it
            log.warning("Tune-A-Video: these weights replace the motion of the tuned weights that this MODEL had")
        return
    if weights.base_tuned:
        raise ValueError(
            "these weights were tuned on a MODEL that was tuned already, and this is another one: what its image "
            "layers had learned would be missing. Apply the weights of that first tune to this MODEL first, at the "
            "strengths that they had, and these after them."
        )
    if tuned:
        raise ValueError(
            "this MODEL has other tuned weights already: connect the MODEL from before One-Shot Tune or Apply Weights."
        )
    log.info("Tune-A-Video: the weights were tuned on another base of this family (%s)", family)
