"""The form in which tuned models are published: a diffusers `unet/` folder of the reference implementation.

Its tensors are those of the image UNet in diffusers' names, plus `attn_temp.*` and `norm_temp.*` in every
transformer block. (Reference: UNet3DConditionModel in models/unet.py.)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TEMPORAL = (".attn_temp.", ".norm_temp.")


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
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
    """Attention heads of every transformer block, by the host's name; `names` as in `split`."""
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
    """Published name → host's name of every tensor, temporal layers included; `names` as in `split`."""
    parts = [f"attn_temp.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"]
    temporal = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in _blocks(names).items() for part in parts}
    return {**names, **temporal}


def split(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published state dict as (image UNet, temporal layers), both in the host's names.

    Args:
        names: published name → host's name, of the image UNet.
    """
    every = all_names(names)
    own = {every[name]: tensor for name, tensor in tensors.items()}
    temporal = {name: tensor for name, tensor in own.items() if any(part in name for part in TEMPORAL)}
    return {name: tensor for name, tensor in own.items() if name not in temporal}, temporal
