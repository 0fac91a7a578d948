"""The form in which tuned models are published: a diffusers `unet/` folder of the reference implementation.

Its tensors are those of the image UNet in diffusers' names, plus `attn_temp.*` and `norm_temp.*` in every
transformer block. (Reference: UNet3DConditionModel in models/unet.py.) `to_…` makes something of this form, `from_…`
makes this form of something.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..method.tuning import trains
from . import files
from .weights import TunedWeights, difference

TEMPORAL = (".attn_temp.", ".norm_temp.")
# FateZero, and the unofficial Tune-A-Video from which it comes, name the same layers so, and have convolutions besides.
OTHER_NAMES = (".attn_temporal.", ".norm_temporal.")
OTHER_LAYER = ".conv_temporal."
OTHER_OPTIONS = ("SparseCausalAttention_index", "least_sc_channel", "temporal_downsample")  # of its config.json
STEM = "diffusion_pytorch_model"
WHOLE = f"{STEM}.safetensors"
# With a variant (fp16, non_ema), or the index of a model in parts, to which diffusers gave variants in three ways.
IN_FOLDER = re.compile(rf"{STEM}(\.\w+)*\.(safetensors|bin)(\.(\w+\.)?index(\.\w+)?\.json)?")
SINGLE = (".safetensors", ".bin", ".pt")
STORED = (torch.float32, torch.float16, torch.bfloat16)  # in which weights are stored


# --- names and configuration ------------------------------------------------------------------------------------


def to_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The host's `UNetModel` configuration for a diffusers `config.json`.

    The host's UNet has one number of heads; `heads_per_block` gives every block's own.

    Raises ValueError for what the host's UNet cannot be.
    """
    if config.get("norm_num_groups", 32) != 32:
        raise ValueError(f"norm_num_groups is {config['norm_num_groups']}; the host's UNet has 32 groups.")
    channels = list(config["block_out_channels"])
    base = channels[0]
    if any(width % base for width in channels):
        raise ValueError(f"block_out_channels {channels} are no multiples of the first, as the host's UNet needs.")
    layers = config["layers_per_block"]
    down = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    up = [int("CrossAttn" in kind) for kind in reversed(config["up_block_types"])]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": base,
        "num_res_blocks": [layers] * len(channels),
        "channel_mult": [width // base for width in channels],
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "context_dim": config["cross_attention_dim"],
        "num_heads": heads_per_level(config)[0],
        "num_head_channels": -1,
        "legacy": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
    }


def heads_per_level(config: Mapping[str, Any]) -> list[int]:
    """Attention heads of each level, from the finest. What the file calls `attention_head_dim` is their number."""
    heads = config["attention_head_dim"]
    return [heads] * len(config["block_out_channels"]) if isinstance(heads, int) else list(heads)


def heads_per_block(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """Attention heads of every transformer block, by the host's name; `names` as in `to_unet`."""
    down = heads_per_level(config)
    levels = {"down_blocks": down, "up_blocks": down[::-1]}

    def heads(published: str) -> int:
        kind, level = published.split(".")[:2]
        return down[-1] if kind == "mid_block" else levels[kind][int(level)]

    return {own: heads(published) for published, own in _blocks(names).items()}


def _blocks(names: Mapping[str, str]) -> dict[str, str]:
    """Published name → host's name of every transformer block."""
    return {
        published.removesuffix(".norm1.weight"): own.removesuffix(".norm1.weight")
        for published, own in names.items()
        if ".transformer_blocks." in published and published.endswith(".norm1.weight")
    }


def all_names(names: Mapping[str, str]) -> dict[str, str]:
    """Published name → host's name of every tensor, temporal layers included; `names` as in `to_unet`."""
    parts = [f"attn_temp.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"]
    temporal = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in _blocks(names).items() for part in parts}
    return {**names, **temporal}


def to_unet(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published state dict as (image UNet, temporal layers), both in the host's names.

    Args:
        names: published name → host's name, of the image UNet.
    """
    every = all_names(names)
    own = {every[name]: tensor for name, tensor in tensors.items()}
    temporal = {name: tensor for name, tensor in own.items() if any(part in name for part in TEMPORAL)}
    return {name: tensor for name, tensor in own.items() if name not in temporal}, temporal


def from_unet_config(
    unet_config: Mapping[str, Any], heads: Mapping[str, int], names: Mapping[str, str]
) -> dict[str, Any]:
    """The reference's `config.json` for a host's `UNetModel` configuration: the inverse of `to_unet_config`.

    A UNet that the reference's class cannot be (see `regular`) gets the host's own configuration, which this pack
    alone reads.

    Args:
        heads: attention heads of every transformer block, by the host's name.
        names: as in `to_unet`.
    """
    channels = [unet_config["model_channels"] * factor for factor in unet_config["channel_mult"]]
    per_level: dict[int, int] = {}
    for published, own in _blocks(names).items():
        kind, level = published.split(".")[:2]
        if kind != "up_blocks":
            per_level[len(channels) - 1 if kind == "mid_block" else int(level)] = heads[own]
    # A level without attention has no heads; any number will do there.
    levels = [per_level.get(level, min(per_level.values())) for level in range(len(channels))]
    shared = {
        "in_channels": unet_config["in_channels"],
        "out_channels": unet_config["out_channels"],
        "block_out_channels": channels,
        "attention_head_dim": levels[0] if len(set(levels)) == 1 else levels,
    }
    if not regular(unet_config):
        plain = {name: value for name, value in unet_config.items() if isinstance(value, int | str | list | None)}
        return {"_class_name": "UNetModel", **plain, **shared}
    layers = unet_config["num_res_blocks"][0]
    depth_down = unet_config["transformer_depth"][::layers]
    depth_up = unet_config["transformer_depth_output"][:: layers + 1][::-1]
    return {
        "_class_name": "UNet3DConditionModel",
        "_diffusers_version": "0.11.1",
        "sample_size": 64,
        **shared,
        "layers_per_block": layers,
        "cross_attention_dim": unet_config["context_dim"],
        "use_linear_projection": bool(unet_config.get("use_linear_in_transformer", False)),
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock3DCrossAttn",
        "down_block_types": ["CrossAttnDownBlock3D" if depth else "DownBlock3D" for depth in depth_down],
        "up_block_types": ["CrossAttnUpBlock3D" if depth else "UpBlock3D" for depth in depth_up],
    }


def regular(unet_config: Mapping[str, Any]) -> bool:
    """Whether the reference's UNet can be this: all levels equally deep, each with attention throughout or without."""
    layers, *others = unet_config["num_res_blocks"]
    down, up = list(unet_config["transformer_depth"]), list(unet_config["transformer_depth_output"])
    levels = [down[i : i + layers] for i in range(0, len(down), layers)]
    levels += [up[i : i + layers + 1] for i in range(0, len(up), layers + 1)]
    return (
        all(other == layers for other in others)
        and all(set(level) in ({0}, {1}) for level in levels)
        and unet_config.get("transformer_depth_middle", 1) == 1
    )


def check_config(config: Mapping[str, Any], heads: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Compare a `config.json` with a model where the tensors cannot tell.

    Raises ValueError when the attention heads or the frames attended to differ; arguments as in `from_unet_config`.
    """
    try:
        theirs = heads_per_block(config, names)
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(
            "config.json does not describe a UNet of this MODEL's form (attention_head_dim, block_out_channels): it "
            "belongs to another model."
        ) from None
    if other := [name for name in OTHER_OPTIONS if config.get(name) not in (None, False, [-1, "first"])]:
        raise ValueError(
            f"config.json asks for {other[0]}, an option of FateZero's code that Tune-A-Video has not. Tune the clip "
            "with One-Shot Tune instead."
        )
    if wrong := sorted(name for name, count in heads.items() if theirs[name] != count):
        raise ValueError(
            f"config.json gives {theirs[wrong[0]]!r} attention heads where this MODEL has {heads[wrong[0]]}: it was "
            "tuned on another family of checkpoints."
        )


# --- what is in the tensors -------------------------------------------------------------------------------------


def to_weights(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    base: Iterable[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """A published state dict as (change of the queries, temporal layers, report of what else differs from the base).

    Args:
        names: as in `to_unet`.
        shapes: of every tensor, temporal layers included, by the host's names.
        base: (host's name, float32) of every tensor of the image UNet; one at a time is enough.

    Raises ValueError when tensors are missing or do not fit.
    """
    every = all_names(names)
    tensors = _in_the_papers_names(tensors, names)
    _check_names(tensors.keys(), names, every)
    own = {ours: tensors[theirs] for theirs, ours in every.items() if theirs in tensors}
    for name, tensor in own.items():
        # Before anything is computed: a tensor of a few bytes may claim any shape.
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the published model, {tuple(shapes[name])} in this MODEL: "
                "load a checkpoint of the family that it was tuned on."
            )
    temporal = {name: _float32(name, tensor) for name, tensor in own.items() if any(part in name for part in TEMPORAL)}
    queries, others = {}, {}
    for name, weight in base:
        if name in own and trains(name):
            queries[name] = difference(_float32(name, own[name]), weight)
        elif name in own:
            others[name] = _distance(own[name].float(), weight)
    different = {name: distance for name, distance in others.items() if distance != 0}
    lines = [f"{len(queries)} queries and {len(temporal)} temporal tensors were read."]
    if different:
        worst = max(different, key=lambda name: different[name])
        lines.append(
            f"{len(different)} of {len(others)} other tensors differ from this base, most by "
            f"{different[worst]:.1%} in {worst}, and are left as in the base: it was tuned on another checkpoint."
        )
    if absent := len(names) - len(queries) - len(others):
        lines.append(f"{absent} tensors of the image UNet are not in it and are left as in the base.")
    if unknown := sorted(tensors.keys() - every.keys()):
        lines.append(f"{len(unknown)} tensors have no place here and were ignored, the first is {unknown[0][:100]!r}.")
    return queries, temporal, " ".join(lines)


def _distance(published: Tensor, base: Tensor) -> float:
    """Relative L2 distance of two float32 tensors; 0 when one may be the other, rounded to be stored."""
    distance, norm = (published - base).norm(), base.norm()
    for kind in STORED:
        about = torch.finfo(kind)
        # Twice what rounding can make: both may be rounded. Numbers near zero are rounded to multiples of the smallest.
        limit = about.eps * (norm + about.tiny * base.numel() ** 0.5)
        if distance <= limit and any(torch.equal(tensor.to(kind).float(), tensor) for tensor in (published, base)):
            return 0.0
    return float(distance / norm.clamp(min=1e-12))


def _in_the_papers_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """A state dict of FateZero's layout in the paper's names; any other as it is. `names` as in `to_unet`.

    Raises ValueError when its temporal convolutions do something: Tune-A-Video has none.
    """
    if not tensors.keys() & names.keys() or not any(name in key for name in OTHER_NAMES for key in tensors):
        return tensors
    layers = {name: tensor for name, tensor in tensors.items() if OTHER_LAYER in name}
    if not layers:
        raise ValueError(
            f"it has FateZero's names (attn_temporal) without its temporal convolutions ({OTHER_LAYER.strip('.')}): it "
            "is incomplete, fetch it again."
        )
    if active := sorted(name for name, tensor in layers.items() if not _does_nothing(name, tensor)):
        raise ValueError(
            f"it was tuned with FateZero's code and temporal convolutions, which Tune-A-Video has not: {len(active)} "
            f"tensors, the first is {active[0][:100]!r}. Tune the clip with One-Shot Tune instead."
        )
    return {
        re.sub(r"\.(attn|norm)_temporal\.", r".\1_temp.", name): tensor
        for name, tensor in tensors.items()
        if name not in layers
    }


def _does_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a temporal convolution is as it was before training, so that the layer is an identity."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return False  # a few bytes that claim any shape: not to be computed with
    if name.endswith(".conv_temporal.weight") and tensor.ndim == 3:
        return torch.equal(tensor, torch.nn.init.dirac_(torch.empty_like(tensor)))
    # A low-rank one adds up(down(x)) to x.
    return name.endswith(".conv_temporal.down.weight") or not tensor.any()


def _check_names(present: Iterable[str], names: Mapping[str, str], every: Mapping[str, str]) -> None:
    present = set(present)
    if not present & names.keys():
        raise ValueError(
            "none of its tensors has a name of a diffusers Stable Diffusion UNet: this is no published Tune-A-Video "
            "model. Weights of this pack are read with Load Weights."
        )
    temporal = every.keys() - names.keys()
    if not present & temporal:
        if other := sorted(name for name in present - names.keys() if "temp" in name or "motion" in name):
            raise ValueError(
                f"it has no temporal attention (attn_temp), but {len(other)} tensors that Tune-A-Video has not, the "
                f"first is {other[0][:100]!r}: it is another kind of video model."
            )
        raise ValueError(
            "it has no temporal attention (attn_temp): this is a plain image UNet, not a tuned video model. Load it as "
            "a checkpoint."
        )
    queries = {theirs for theirs, ours in names.items() if trains(ours)}
    for kind, wanted in (("temporal", temporal), ("query", queries)):
        if missing := sorted(wanted - present):
            raise ValueError(
                f"{len(missing)} of {len(wanted)} {kind} tensors are missing, the first is {missing[0]}: it is "
                "incomplete, or was tuned on another family of checkpoints."
            )


def _float32(name: str, tensor: Tensor) -> Tensor:
    # A copy: it may be a view of a file that is replaced later.
    own = tensor.to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(own).all():
        raise ValueError(f"the published model holds NaN or infinite values in {name}: it is of no use.")
    return own


def from_weights(
    weights: TunedWeights, names: Mapping[str, str], base: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The published state dict, float32, of a base with its weights; arguments as in `to_weights`."""
    published = {own: theirs for theirs, own in all_names(names).items()}
    tensors = {published[name]: tensor for name, tensor in weights.temporal.items()}
    for name, weight in base:
        change = weights.queries.get(name)
        tensors[published[name]] = weight if change is None else weight + change
    return tensors


# --- files ------------------------------------------------------------------------------------------------------


def sources(paths: Iterable[str]) -> list[str]:
    """What among the files of a folder may be a published model: folders with a UNet, and single files elsewhere.

    Args:
        paths: relative to the folder.
    """
    every = {PurePosixPath(path.replace("\\", "/")) for path in paths}
    configs = {path.parent for path in every if path.name == "config.json"}
    pipelines = {folder.parent for folder in configs if folder.name == "unet" and folder.parent.name}
    alone = {folder for folder in configs if folder.name and not pipelines & {folder, *folder.parents}}
    folders = pipelines | alone
    single = {path for path in every if path.suffix.lower() in SINGLE and not folders & set(path.parents)}
    return sorted(map(str, folders | single))


def from_disk(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors by published name, config.json where there is one) of a folder or a single file.

    Raises ValueError for what cannot be read, or not safely.
    """
    if path.is_file():
        return _tensors(path), None
    unet = path / "unet" if (path / "unet").is_dir() else path
    config = files.inside(unet, "config.json")
    if not config.is_file():
        raise ValueError(f"{path.name} has no unet/config.json: it is not a diffusers folder.")
    every = os.listdir(unet)
    found = [name for name in every if IN_FOLDER.fullmatch(name) and files.inside(unet, name).is_file()]
    if not found:
        there = sorted(name for name in every if name.endswith(SINGLE))
        todo = (
            f"but {there[0][:80]!r}: fetch all files of the model, or rename this one if it is the whole"
            if there
            else "fetch the weights as well"
        )
        raise ValueError(f"{path.name} has no {WHOLE} or {STEM}.bin in {unet.name}: {todo}.")
    found = min(found, key=_preference)
    if not found.endswith(".json"):
        return _tensors(unet / found), files.read_json(config)
    shards = files.read_json(unet / found, max_bytes=files.MAX_HEADER).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{found} has no weight_map of file names: fetch it again.")
    tensors = {}
    for name in sorted(set(shards.values())):
        shard = files.inside(unet, name)
        if not shard.is_file():
            raise ValueError(f"{name[:100]!r}, which {found} names, is not there: fetch all files of the model.")
        tensors |= _tensors(shard)
    return tensors, files.read_json(config)


def _preference(name: str) -> tuple[Any, ...]:
    """Sorts the weights of a folder: the first is read."""
    parts = set(name.split("."))
    variant = parts - {STEM, "safetensors", "bin", "index", "json"}
    return "non_ema" in variant, "bin" in parts, bool(variant), "index" in parts, name


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() not in SINGLE:
        raise ValueError(f"{path.name} is of no kind that holds a published model: {', '.join(SINGLE)}.")
    if path.suffix.lower() == ".safetensors":
        return files.read_safetensors(path)[0]
    state = files.read_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type, tensor.is_floating_point()) == (torch.strided, "cpu", True)
        for name, tensor in state.items()
    ):
        raise ValueError(f"{path.name} is not a state dict of floating-point tensors: it is not a published model.")
    return state


def to_disk(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `unet/config.json` and `unet/diffusion_pytorch_model.safetensors` into a folder that may not exist yet.

    The configuration is written last: a folder without it is not listed.

    Raises ValueError when the disk does not take them.
    """
    unet = folder / "unet"
    try:
        unet.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder.name} could not be made: {error.strerror}. Use another name.") from None
    # The reference's loader refuses files that do not say which framework wrote them.
    files.write_safetensors(unet / WHOLE, tensors, {"format": "pt"})
    files.write_json(unet / "config.json", config)
