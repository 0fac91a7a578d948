"""A checkpoint that the host takes for Stable Diffusion 1.5, of random weights, in a few MB."""

import math

import comfy.sd1_clip
import torch
from baseline import SD15
from comfy.taesd.taesd import TAESD
from small import meta_unet
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
    """Write it to `path`, a `.ckpt`: torch stores memory that tensors share once, and here all are views of a pool."""
    clip = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float32).transformer.state_dict()
    clip.pop("text_projection.weight")  # SD 1.x has none
    parts = {
        "model.diffusion_model.": meta_unet(published.to_unet_config(ONE_LEVEL)).state_dict(),
        "cond_stage_model.transformer.": clip,
        "first_stage_model.": TAESD().state_dict(),
    }
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
