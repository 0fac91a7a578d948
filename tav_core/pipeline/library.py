"""The folder of tuned weights, `models/tune_a_video`: lists, names, files in and out, published models."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from .. import host
from ..method import low_rank
from ..method.attention import PAPERS
from ..method.inflation import LIGHT, PAPER, TemporalLayers
from ..store import files, published
from ..store.weights import TunedWeights, load_file, save_file, save_lora
from .apply import apply_weights, check_base

log = logging.getLogger(__name__)


def weights_folder() -> Path:
    """Where new files go."""
    return host.folders()[0]


def weights_list() -> list[str]:
    """Names of the weights files that can be loaded, in all folders."""
    return [name for name in host.file_names() if not problem_with(name)]


def published_list() -> list[str]:
    """Names of the folders and single files that may hold a published model, in all folders."""
    names = set()
    for folder in host.folders():
        names |= set(published.sources(host.names_inside(folder)))
    return sorted(name for name in names if not problem_with(name))


def find(name: str) -> Path:
    """The file or folder of a name from a list. Raises ValueError when it is not there, or not inside our folders."""
    for folder in host.folders():
        path = files.inside(folder, name)
        if path.is_file() or path.is_dir():
            return path
    raise ValueError(
        f"there is no {name[:80]!r} in models/{host.FOLDER}: put it there, or in a folder that extra_model_paths.yaml "
        f"names as {host.FOLDER}."
    )


def problem_with(name: str | None) -> str | None:
    """Why a name cannot be found, or None; of a name that another node will make (None) no problem is known."""
    try:
        if name is not None:
            find(name)
    except ValueError as error:
        return str(error)
    return None


def stamp(name: str | None) -> str:
    """Changes when the file, or any file of the folder, is another or was written to. Raises ValueError as `find`.

    Of a name that another node will make (None) nothing is known: an error would count as a change, at every run.
    """
    if name is None:
        return ""
    path = find(name)
    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    stats = [file.stat() for file in inside if file.is_file()]
    return str([(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats])


def save_weights(weights: TunedWeights, prefix: str, precision: str, lora: bool = False) -> str:
    """Write a new weights file; its name, as `load_weights` takes it.

    Args:
        lora: write the queries of light weights as a LoRA file of the same name as well, as Load LoRA lists it.

    Raises ValueError for a LoRA of other weights, ValueError and OSError as `save_file` and `files.write_new` do.
    """
    if lora and weights.layers != LIGHT:
        raise ValueError(
            "only weights of light layers have a LoRA in them, these hold whole queries: set lora off, or tune with "
            "layers light in Inflate UNet."
        )
    prefix = _filled(prefix, weights)
    loras = host.lora_folder() if lora else None

    def write(file: Path) -> None:
        save_file(weights, file, precision)
        if loras is not None:
            save_lora(weights, files.inside(loras, prefix).with_name(file.name), precision)
            log.info("Tune-A-Video: the queries are saved as a LoRA of the same name, %s", file.name)

    return _name(files.write_new(weights_folder(), prefix, ".safetensors", write, loras))


def _name(path: Path) -> str:
    return path.relative_to(weights_folder()).as_posix()


def _filled(prefix: str, weights: TunedWeights) -> str:
    size = dict(zip(("width", "height"), weights.size, strict=True)) if weights.size else {}
    return files.filled(prefix, **size)


def load_weights(name: str) -> TunedWeights:
    """Read a weights file. Raises ValueError when it is none."""
    path = find(name)
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name} is not a .safetensors file: choose a file that Save Weights wrote.")
    return load_file(path)


def load_published(model: host.ModelPatcher, name: str) -> tuple[TunedWeights, str]:
    """A published model as weights for this base, and a report of what else differs from the base.

    Raises ValueError as `find` and `read_published` do.
    """
    weights, report = read_published(model, find(name))
    log.info("Tune-A-Video: %s: %s", name, report)
    return weights, report


def read_published(model: host.ModelPatcher, path: Path) -> tuple[TunedWeights, str]:
    """`load_published` of a folder or file anywhere.

    Raises ValueError when it is no published Tune-A-Video model, or of another shape.
    """
    parts = host.parts_of(host.unet_of(model))
    family = host.family_of(model)
    names = host.own_names(model)
    tensors, config = published.from_disk(path)
    if config is not None:
        published.check_config(config, host.heads_of(parts), names)
    layers = TemporalLayers(parts, device="meta").named()
    shapes = host.shapes_of(model) | {name: parameter.shape for name, parameter in layers.items()}
    base = host.effective_weights(model, torch.device("cpu"))
    queries, temporal, report = published.to_weights(tensors, names, shapes, base)
    # Taken to the weights without them, the change would be wrong of a model that was made with them.
    if changed := [name for name in host.changed_on_the_way(model) if name in queries]:
        report += (
            f" A LoRA or the like changes {len(changed)} of these queries in this MODEL, and the weights take that "
            "back: connect the checkpoint's own MODEL here, and the LoRA before Apply Weights."
        )
        log.warning("Tune-A-Video: %s: %s", path.name, report)
    weights = TunedWeights(
        queries, temporal, frames=None, group_norm="video", base_family=family, base_fingerprint=host.fingerprint(model)
    )
    return weights, report


def save_published(model: host.ModelPatcher, weights: TunedWeights, prefix: str) -> str:
    """Write a base with its weights as a published model into a new folder; its name.

    Raises ValueError when they do not fit each other, ValueError and OSError as `files.write_new` does.
    """

    def write(folder: Path) -> None:
        check_base(model, weights)
        write_published(model, weights, folder)

    name = _name(files.write_new(weights_folder(), _filled(prefix, weights), "", write))
    if not published.regular(host.config_of(model)):
        log.warning("Tune-A-Video: this UNet has another form than the paper's code builds: only this pack reads it")
    if weights.attends != PAPERS:
        log.warning("Tune-A-Video: these weights attend to %s, which the paper's code does not", weights.attends)
    if weights.group_norm != "video":
        log.warning("Tune-A-Video: these weights were tuned with group norm per frame, which the paper's code has not")
    return name


def write_published(model: host.ModelPatcher, weights: TunedWeights, folder: Path) -> None:
    """Write a base with its weights, in float32, into a folder anywhere. Raises ValueError as `save_published`."""
    apply_weights(model, weights)  # for its checks of names and shapes
    parts = host.parts_of(host.unet_of(model))
    if weights.layers == LIGHT:
        if parts.last != parts.blocks.keys():
            raise ValueError(
                "these weights have one temporal attention a transformer, published models one a block: tune with "
                "layers paper in Inflate UNet."
            )
        weights = replace(weights, queries=low_rank.whole(weights.queries), layers=PAPER)
    names = host.own_names(model)
    heads = host.heads_of(parts)
    config = published.from_unet_config(host.config_of(model), heads, names)
    tensors = published.from_weights(weights, names, host.effective_weights(model, torch.device("cpu")))
    published.to_disk(folder, config, tensors)
