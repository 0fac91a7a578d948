"""Configurations in diffusers' form, and random weights for them."""

import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.pipeline.network import PlainOps

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
}


def meta_unet(unet_config):
    """The host's UNet of a `UNetModel` configuration, without weights."""
    return host.UNetModel(**unet_config, device="meta", operations=PlainOps)


def random_weights(unet_config, generator):
    """A state dict by which every path contributes."""
    return {
        name: torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5
        if p.ndim > 1
        else 0.1 * torch.randn(p.shape, generator=generator) + ("norm" in name or name.endswith("0.weight"))
        for name, p in meta_unet(unet_config).state_dict().items()
    }
