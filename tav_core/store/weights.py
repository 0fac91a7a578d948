"""What one-shot tuning yields: a value that can be applied to a model, kept and compared; and its file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.attention import ATTENDS, PAPERS
from ..method.inflation import GROUP_NORM_MODES, LAYERS, PAPER
from ..method.low_rank import DOWN, UP, pairs
from ..method.tuning import Recipe
from ..method.windows import WHOLE, Windows
from .files import read_safetensors, write_safetensors

PACK_VERSION = "0.1.0"
FORMAT, FORMAT_VERSION = "tune-a-video weights", 1
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
PARTS = ("queries", "temporal")
# Bounds of what is kept of a file's metadata: a stranger may have written it.
MAX_CAPTION, MAX_WORDS, MAX_LOSSES, MAX_COUNT = 4096, 128, 2000, 1_000_000


@dataclass(frozen=True)
class TunedWeights:
    """Float32 tensors on the CPU, by the host's names of the UNet's modules, and where they come from.

    Attributes:
        queries: change of `attn1.to_q` and `attn2.to_q`, to be added to the base model's weights, whole or at low rank.
        temporal: the temporal layers, as they are (`TemporalLayers.named`).
        frames: length of the clip; None when unknown.
        group_norm: the group norm mode that it was tuned with.
        windows: how the clip was cut.
        losses: one a step.
        base_family: what kind of model it was tuned on; nothing else fits (`host.family_of`).
        base_fingerprint: exactly which one (`host.fingerprint`).
        base_tuned: whether that one was tuned already. Its queries are then no checkpoint's: nothing else fits. Files
            of before this was noted do not say, and count as not.
        caption: of the clip; "" when unknown.
        stride: of the clip's frames in their video; None when unknown.
        size: width and height of the clip in pixels; None when unknown.
        recipe: None when unknown.
        date: when the tune ended, UTC, ISO 8601.
        attends: the frames that each frame attended to (`attention.ATTENDS`).
        layers: what was tuned (`inflation.LAYERS`).
    """

    queries: dict[str, Tensor]
    temporal: dict[str, Tensor]
    frames: int | None
    group_norm: str
    losses: list[float] = field(default_factory=list)
    base_family: str = ""
    base_fingerprint: str = ""
    caption: str = ""
    stride: int | None = None
    size: tuple[int, int] | None = None
    recipe: Recipe | None = None
    date: str = ""
    windows: Windows = WHOLE
    attends: str = PAPERS
    layers: str = PAPER
    base_tuned: bool = False


def difference(target: Tensor, base: Tensor) -> Tensor:
    """The float32 change with `base + change == target` to the last bit, wherever there is one.

    The plain difference is rounded, and where it is larger than `base`, adding it can end one bit beside `target`.
    What was tuned would then not be what is sampled, nor survive `published` both ways.
    """
    change = target - base
    for limit in (math.inf, -math.inf):
        beside = torch.nextafter(change, torch.full_like(change, limit))
        change = torch.where((base + change != target) & (base + beside == target), beside, change)
    return change


def save_file(weights: TunedWeights, path: Path, precision: str) -> None:
    """Write a safetensors file in "fp32" (exact) or "fp16", whose metadata a person can read.

    Raises ValueError when fp16 cannot hold a value, OSError when the disk cannot hold the file.
    """
    tensors = {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(weights, part).items()}
    write_safetensors(path, _stored(tensors, precision), to_metadata(weights))


def save_lora(weights: TunedWeights, path: Path, precision: str) -> None:
    """Write the queries' low-rank changes as an ordinary LoRA file, in the names of SDXL's (of its UNet's modules).

    Raises ValueError as `save_file`.
    """
    tensors = {}
    for layer, (up, down) in pairs(weights.queries).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        alpha = torch.tensor(float(len(down)))  # of as much as the rank, up @ down is added as it is
        tensors |= {f"{name}{UP}": up, f"{name}{DOWN}": down, f"{name}.alpha": alpha}
    about = {"ss_network_module": "networks.lora", "ss_training_comment": weights.caption}
    write_safetensors(path, _stored(tensors, precision), about)


def _stored(tensors: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    rounded = {name: tensor.to(PRECISIONS[precision]) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that {precision} cannot: save as fp32, or tune with a lower rate.")
    return rounded


def load_file(path: Path) -> TunedWeights:
    """Read a file of `save_file`.

    Raises ValueError when it is none, one of a newer pack, damaged, not finite, or only a half of what was tuned.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        if any(".attn_temp" in name for name in tensors):
            raise ValueError(f"{path.name} is a published model: read it with Load Published Model.")
        raise ValueError(f"{path.name} was not written by Save Weights: choose another file.")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path.name} has format {metadata.get('format_version', '')[:20]!r}, this pack reads "
            f"{FORMAT_VERSION}: update the Tune-A-Video pack."
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, own_name = name.partition(".")
        if part not in parts:
            raise ValueError(f"{path.name} holds a tensor {name[:100]!r} that no weights have: choose another file.")
        # A copy: the file may be replaced while this value lives.
        parts[part][own_name] = tensor.to(torch.float32, copy=True)
        if not torch.isfinite(parts[part][own_name]).all():
            raise ValueError(f"{path.name} holds NaN or infinite values in {name[:100]!r}: it is of no use.")
    for part in PARTS:
        if not parts[part]:
            raise ValueError(f"{path.name} is incomplete: it holds no {part} tensors. Save the weights again.")
    if (mode := metadata.get("group_norm")) not in GROUP_NORM_MODES:
        raise ValueError(f"{path.name} has an unknown group norm {str(mode)[:20]!r}: update the Tune-A-Video pack.")
    if (mode := metadata.get("attends", PAPERS)) not in ATTENDS:
        raise ValueError(f"{path.name} attends to unknown frames {str(mode)[:20]!r}: update the Tune-A-Video pack.")
    if (kind := metadata.get("layers", PAPER)) not in LAYERS:
        raise ValueError(f"{path.name} holds unknown layers {str(kind)[:20]!r}: update the Tune-A-Video pack.")
    return TunedWeights(**parts, **from_metadata(metadata))


def to_metadata(weights: TunedWeights) -> dict[str, str]:
    """Everything but the tensors, as text; "" stands for what is unknown."""
    recipe = weights.recipe
    known = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pack_version": PACK_VERSION,
        "base_family": weights.base_family,
        "base_fingerprint": weights.base_fingerprint,
        "caption": weights.caption,
        "frames": weights.frames,
        "stride": weights.stride,
        "size": "x".join(map(str, weights.size)) if weights.size else None,
        "group_norm": weights.group_norm,
        "recipe": json.dumps(asdict(recipe)) if recipe else None,
        "seed": recipe.seed if recipe else None,
        "final_loss": weights.losses[-1] if weights.losses else None,
        "losses": json.dumps(shortened(weights.losses)),
        "date": weights.date,
    }
    if weights.base_tuned:
        known |= {"base_tuned": True}
    if weights.attends != PAPERS:
        known |= {"attends": weights.attends}
    if weights.layers != PAPER:
        known |= {"layers": weights.layers}
    if weights.windows.frames:
        known |= {"window": weights.windows.frames, "overlap": weights.windows.overlap}
    return {key: "" if value is None else str(value) for key, value in known.items()}


def from_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """What `to_metadata` wrote, as arguments of TunedWeights. What cannot be understood is unknown, never an error."""
    text = {key: "".join(c if c.isprintable() else " " for c in value[:MAX_WORDS]) for key, value in metadata.items()}
    width, _, height = text.get("size", "").partition("x")
    size = _count(width), _count(height)
    losses = _json(metadata.get("losses", ""))
    recipe = _json(metadata.get("recipe", ""))
    try:
        window = _count(text.get("window", ""))
        windows = Windows(window, _count(text.get("overlap", "")) or 0) if window else WHOLE
    except ValueError:
        windows = WHOLE
    try:
        recipe = Recipe(**recipe) if isinstance(recipe, dict) and all(map(_is_number, recipe.values())) else None
    except (TypeError, ValueError):
        recipe = None
    return {
        "frames": _count(text.get("frames", "")),
        "group_norm": metadata["group_norm"],
        # Files of before there was a choice do not say.
        "attends": metadata.get("attends", PAPERS),
        "layers": metadata.get("layers", PAPER),
        "losses": losses if isinstance(losses, list) and all(map(_is_number, losses)) else [],
        "base_family": text.get("base_family", ""),
        "base_fingerprint": text.get("base_fingerprint", ""),
        "base_tuned": text.get("base_tuned") == str(True),
        # The only text with line breaks of its own; shown to people through `repr` alone.
        "caption": metadata.get("caption", "")[:MAX_CAPTION],
        "stride": _count(text.get("stride", "")),
        "size": size if all(size) else None,
        "recipe": recipe,
        "date": text.get("date", ""),
        "windows": windows,
    }


def shortened(losses: list[float]) -> list[float]:
    """Losses for the metadata: as they are, or as means of equal stretches when there are very many."""
    group = math.ceil(len(losses) / MAX_LOSSES)
    if group <= 1:
        return losses
    return [sum(part) / len(part) for part in (losses[i : i + group] for i in range(0, len(losses), group))]


def _count(text: str) -> int | None:
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 7 else 0
    return value if 0 < value <= MAX_COUNT else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN; math.isfinite fails on huge integers


def _json(text: str) -> Any:
    try:
        return json.loads(text) if len(text) <= MAX_LOSSES * 32 else None
    except (ValueError, RecursionError):
        return None
