"""Checkpoints that the host takes for Stable Diffusion 1.5 or XL, of random weights, in a few MB."""

import math

import comfy.sd1_clip
import torch
from baseline import SD15
from comfy.taesd.taesd import TAESD
from small import FULL_XL, meta_unet
from tune_a_video.tav_core.store import published

# One level of the UNet's four: a tune of all takes gigabytes, which a machine may not have free.
ONE_LEVEL = {
    **SD15,
    "block_out_channels": [320],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock3D"],
    "up_block_types": ["CrossAttnUpBlock3D"],
}
STRIDE = 7  # from row to row: rows overlap, but none repeats another


def write_checkpoint(path):
    """Write one of Stable Diffusion 1.5 to `path`, a `.ckpt`."""
    clip = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float32).transformer.state_dict()
    clip.pop("text_projection.weight")  # SD 1.x has none
    parts = {
        "model.diffusion_model.": meta_unet(published.to_unet_config(ONE_LEVEL)).state_dict(),
        "cond_stage_model.transformer.": clip,
        "first_stage_model.": TAESD().state_dict(),
    }
    _write(parts, path)


def write_xl_checkpoint(path):
    """Write one of Stable Diffusion XL, in full size, to `path`, a `.ckpt`."""
    clip_l = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float32).transformer.state_dict()
    clip_l.pop("text_projection.weight")
    parts = {
        "model.diffusion_model.": meta_unet(FULL_XL).state_dict(),
        "conditioner.embedders.0.transformer.": clip_l,
        "conditioner.embedders.1.model.": _open_clip(width=1280, layers=32),
        "first_stage_model.": TAESD().state_dict(),
    }
    _write(parts, path)


def _open_clip(width, layers):
    """The text tower of a CLIP in OpenCLIP's names, as SDXL checkpoints have it."""
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"ln_{number}.{kind}": (width,) for number in (1, 2) for kind in ("weight", "bias")},
    }
    shapes = {f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    shapes |= {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
    shapes |= {"text_projection": (width, width), "ln_final.weight": (width,), "ln_final.bias": (width,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _write(parts, path):
    """Torch stores memory that tensors share once, and here all are views of a pool."""
    generator = torch.Generator().manual_seed(0)
    pools: dict[int, torch.Tensor] = {}
    ones, zeros = torch.ones(1 << 14), torch.zeros(1 << 14)
    state = {}
    for prefix, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.ndim == 0:
                state[prefix + name] = tensor.clone()
            elif tensor.ndim == 1:
                norm = name.endswith("weight")
                state[prefix + name] = (ones if norm else zeros)[: tensor.numel()]
            else:
                state[prefix + name] = view(pools, generator, tensor.shape)
    torch.save({"state_dict": state}, path)


def view(pools, generator, shape):
    """A matrix or kernel of the usual scale, 1 / sqrt(inputs), from the pool of that scale."""
    rows, columns = shape[0], math.prod(shape[1:])
    scale = round(math.log2(columns))
    size = 49408 * STRIDE + columns if rows == 49408 else 1 << 17
    if len(pools.setdefault(scale, torch.empty(0))) < size:
        pools[scale] = torch.randn(size, generator=generator) / 2 ** (scale / 2)
    return pools[scale].as_strided((rows, columns), (STRIDE, 1)).unflatten(1, shape[1:])
