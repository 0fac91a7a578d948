"""Where the thing that a word names is in a clip, by the cross-attention to the word (arXiv 2208.01626, 2303.09535)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .inflation import UNetParts


def attention_to(q: Tensor, k: Tensor, heads: int, tokens: Sequence[int]) -> Tensor:
    """How much of its attention each place gives to some tokens of the text, mean of the heads.

    Args:
        q: projected queries, `f n (h d)`.
        k: projected keys of the text, `f m (h d)`.
        tokens: positions in m, which are taken together.
    Returns:
        `f n`, float32, 0 … 1.
    """
    q, k = (rearrange(t.float(), "f n (h d) -> f h n d", h=heads) for t in (q, k))
    scale = q.shape[-1] ** -0.5
    # One frame after the other: the scores of all would be as large as a layer's features.
    shares = [(scale * a @ b.mT).softmax(-1)[..., list(tokens)].sum(-1).mean(0) for a, b in zip(q, k, strict=True)]
    return torch.stack(shares)


@contextmanager
def watching(parts: UNetParts, tokens: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect `attention_to` tokens of every transformer block, on the CPU, of each UNet call inside this block."""
    maps: list[Tensor] = []
    queries: dict[int, Tensor] = {}

    def keys(attn2: Any, k: Tensor) -> None:
        maps.append(attention_to(queries.pop(id(attn2)), k, attn2.heads, tokens).cpu())

    with ExitStack() as undo:
        for block in parts.blocks.values():
            attn2 = block.attn2
            for layer, take in (
                (attn2.to_q, lambda q, attn2=attn2: queries.update({id(attn2): q})),
                (attn2.to_k, lambda k, attn2=attn2: keys(attn2, k)),
            ):
                undo.callback(layer.register_forward_hook(lambda _m, _a, out, take=take: take(out)).remove)
        yield maps


def of_whole_clips(
    maps: Sequence[Tensor], blocks: int, levels: Sequence[Sequence[Sequence[int]]], clip: int
) -> list[Tensor]:
    """Maps of a clip's windows as maps of all its frames, `f n`; where windows overlap, their mean.

    Args:
        maps: `w n` of every block in turn, for one window after the other, for one noise level after the other.
        levels: numbers of the frames in each window, of every noise level.
    """
    whole, start = [], 0
    for windows in levels:
        end = start + blocks * len(windows)
        for block in range(start, start + blocks):
            total, count = torch.zeros(clip, maps[block].shape[1]), torch.zeros(clip, 1)
            for part, frames in zip(maps[block:end:blocks], windows, strict=True):
                total[list(frames)] += part
                count[list(frames)] += 1
            whole.append(total / count)
        start = end
    return whole


def combined(maps: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Maps of several blocks and noise levels as one, `f h w`, 0 … 1 over the clip.

    Args:
        maps: `f n`, of the latents' size or of one that the UNet has halved it to.
    Raises ValueError for a map of any other size.
    """
    total = torch.zeros(())
    for attention in maps:
        h, w = height, width
        while h * w > attention.shape[1]:
            h, w = (h + 1) // 2, (w + 1) // 2
        if h * w != attention.shape[1]:
            raise ValueError(
                f"another node changes the size inside the UNet ({attention.shape[1]} places where {w} x {h} are "
                "expected; PatchModelAddDownscale does), and Find Mask cannot tell where they are. Remove it before "
                "Find Mask."
            )
        picture = rearrange(attention, "f (h w) -> f 1 h w", h=h, w=w)
        total = total + _spread(F.interpolate(picture, (height, width), mode="bilinear")[:, 0])
    return _spread(total)


def _spread(maps: Tensor) -> Tensor:
    least, most = maps.aminmax()
    return (maps - least) / (most - least).clamp(min=1e-12)


def otsu(values: Tensor, bins: int = 256) -> float:
    """The threshold between two classes of values in 0 … 1 at which these differ most (Otsu 1979)."""
    share = torch.histc(values.double(), bins, 0, 1) / values.numel()
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below, mean = share.cumsum(0), (share * centres).cumsum(0)
    between = (mean[-1] * below - mean).square() / (below * (1 - below)).clamp(min=1e-12)
    return (float(between.argmax()) + 1) / bins


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask `f h w` whose white parts reach `pixels` further in every direction."""
    return F.max_pool2d(mask[:, None], 2 * pixels + 1, 1, pixels)[:, 0]


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask `f h w` whose edges rise over 2 * `pixels` + 1."""
    return F.avg_pool2d(mask[:, None], 2 * pixels + 1, 1, pixels, count_include_pad=False)[:, 0]
