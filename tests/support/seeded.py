"""Clips and weights by arithmetic alone, so that another program, too, makes the same ones to the bit."""

import math

import torch

# A CLIP in transformers' form: the layers of ViT-H and its text tower, by which the host knows such a file, and narrow.
TEXT = {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {"hidden_size": 64, "num_hidden_layers": 32, "num_attention_heads": 2, "intermediate_size": 128}
VISION |= {"image_size": 224, "patch_size": 32}


def uniform(*shape, seed):
    """Numbers in -1 … 1, float64: their places, scrambled by the last step of MurmurHash3."""
    bits = torch.arange(math.prod(shape)) + 1_000_003 * seed
    for factor, shift in ((0x9E3779B1, 16), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        bits = bits * factor & 0xFFFFFFFF
        bits = bits ^ bits >> shift
    return (bits.double() / 2**31 - 1).reshape(shape)


def moving(frames, side, step, seed, noise=0):
    """Waves that go (x, y) pixels a frame, and noise of so many levels: bytes, [f, side, side, 3]."""
    y, x = torch.meshgrid(*2 * [torch.arange(side).double()], indexing="ij")
    over, down, phase, *colours = uniform(6, 12, 1, 1, seed=seed)
    clip = []
    for i in range(frames):
        waves = torch.sin(0.3 * (over * (x - step[0] * i) + down * (y - step[1] * i)) + 3 * phase)
        clip.append(torch.stack([127.5 + 30 * (colour * waves).sum(0) for colour in colours], -1))
    clip = torch.stack(clip)
    return (clip + noise * uniform(*clip.shape, seed=seed)).round().clamp(0, 255).byte()


def fill(state):
    """Weights of the usual scale, as half precision holds them (as the host does), into a CLIP's tensors."""
    for seed, (name, weight) in enumerate(sorted(state.items())):
        if weight.is_floating_point() and weight.ndim:
            spread = 2.6 / math.prod(weight.shape[1:]) ** 0.5 if weight.ndim > 1 else 0.2
            one = float(name.endswith("weight") and weight.ndim == 1)
            weight.copy_((one + spread * uniform(*weight.shape, seed=seed)).half())
