"""Configurations in diffusers' form, and random weights for them."""

import comfy.model_base
import comfy.model_management
import comfy.supported_models
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

# Stable Diffusion XL's topology: three levels, deep transformers on two of them, linear projections, and a vector
# beside the text, of the pooled text (16) and six sizes (256 each).
XL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 16,
    "num_heads": -1,
    "num_head_channels": 16,
    "num_classes": "sequential",
    "adm_in_channels": 16 + 6 * 256,
    "use_temporal_attention": False,
    "legacy": False,
}
# Of fewer blocks, for what takes long.
SHALLOW_XL = {**XL, "transformer_depth": [0, 0, 1, 1, 3, 3], "transformer_depth_middle": 3}
SHALLOW_XL |= {"transformer_depth_output": [0, 0, 0, 1, 1, 1, 3, 3, 3]}
FULL_XL = {**XL, "model_channels": 320, "context_dim": 2048, "num_head_channels": 64, "adm_in_channels": 2816}


def build_xl(config=XL, seed=0, kind=comfy.model_base.SDXL):
    """A MODEL of the host's SDXL class, of random weights."""
    supported = comfy.supported_models.SDXL({**config})
    supported.unet_config = {**config, "dtype": torch.float32}
    base = kind(supported)
    base.diffusion_model.load_state_dict(random_weights(config, torch.Generator().manual_seed(seed)))
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return host.ModelPatcher(base, *devices)


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
