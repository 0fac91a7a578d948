"""Clips side by side, each under its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from . import image, lettering

IN_A_ROW = 3
GAP = 2  # pixels between two clips
MARGIN = 4  # pixels around a label
LABEL_LINES = 3
LARGEST = 16384  # pixels, the most that H.264 holds


def side_by_side(videos: Mapping[str, Tensor], labels: Sequence[str] = ()) -> Tensor:
    """The clips in rows of three at most, as even as they can be: 3, 2 + 2, 3 + 2, 3 + 3.

    All get the height of the first and keep their aspect; shorter ones hold their last frame. A clip that has this
    height stays as it is, pixel by pixel. The sides of the whole are even, as H.264 wants them; what lies between the
    clips is white, and so is what a transparent one shows.

    Args:
        videos: IMAGE by name, [f, h, w, 1, 3 or 4], 0 to 1. The names are for errors.
        labels: what is written above them, in the same order; an empty or missing one is left out.
    Returns:
        [f, h, w, 3], 0 to 1, float32.

    Raises ValueError when one of them is no clip, or the whole would be too large for a video file.
    """
    for name, video in videos.items():
        if video.ndim != 4 or 0 in video.shape or video.shape[3] not in (1, 3, 4) or not video.is_floating_point():
            raise ValueError(f"{name} has no frames: connect images, such as those of VAE Decode or Prepare Clip.")
        if not all(part.isfinite().all() for part in video.split(image.AT_ONCE)):
            raise ValueError(
                f"{name} holds NaN or infinite pixels: a VAE makes them in fp16. Start ComfyUI with --bf16-vae or "
                "--fp32-vae."
            )
    clips = list(videos.values())
    height = clips[0].shape[1]
    own_widths = [max(round(clip.shape[2] * height / clip.shape[1]), 1) for clip in clips]
    columns = -(-len(clips) // -(-len(clips) // IN_A_ROW))  # divisions that round up
    widths = [max(own_widths[column::columns]) for column in range(columns)]
    lefts = list(accumulate((width + GAP for width in widths), initial=0))
    if max(lefts[-1], len(clips) // columns * height) > LARGEST:
        raise ValueError(
            f"{len(clips)} clips of {height} pixels' height would be {lefts[-1]} pixels wide side by side, and a video "
            f"holds {LARGEST} at most: make them smaller, or compare fewer."
        )
    titles = [_row_of_labels(labels[i : i + columns], lefts, widths, height) for i in range(0, len(clips), columns)]
    tops = list(accumulate((title.shape[1] + height + GAP for title in titles), initial=0))

    out = torch.ones(max(map(len, clips)), _even(tops[-1] - GAP), _even(lefts[-1] - GAP), 3)
    for i, clip in enumerate(clips):
        row, column = divmod(i, columns)
        bottom, left = tops[row + 1] - GAP, lefts[column]
        at = out[:, bottom - height : bottom, left : left + own_widths[i]]
        for part, place in zip(clip.split(image.AT_ONCE), at[: len(clip)].split(image.AT_ONCE), strict=True):
            place[:] = _fit(_opaque(part), height, own_widths[i])
        at[len(clip) :] = at[len(clip) - 1]
    for title, top in zip(titles, tops, strict=False):
        out[:, top : top + title.shape[1], : title.shape[2]] = title
    return out


def _even(size: int) -> int:
    return size + size % 2


def _opaque(clip: Tensor) -> Tensor:
    """Any clip as [f, h, w, 3], 0 to 1, float32, on the CPU; a transparent one on white."""
    clip = clip.to("cpu", torch.float32).clamp(0, 1)
    if clip.shape[3] == 4:
        alpha = clip[..., 3:]
        return clip[..., :3] * alpha + 1 - alpha
    return clip.expand(-1, -1, -1, 3)


def _fit(clip: Tensor, height: int, width: int) -> Tensor:
    if clip.shape[1] == height:
        return clip
    pictures = rearrange(clip, "f h w c -> f c h w")
    pictures = F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(pictures, "f c h w -> f h w c")


def _row_of_labels(labels: Sequence[str], lefts: Sequence[int], widths: Sequence[int], height: int) -> Tensor:
    """The labels of a row, [1, h, w, 3]; h is 0 where there is none. Their size goes with the clips' height."""
    size = min(max(height // 24, 12), 48)
    texts = [
        lettering.wrap(label, width - 2 * MARGIN, size, LABEL_LINES)
        for label, width in zip(labels, widths, strict=False)
    ]
    lines = max(map(len, texts), default=0)
    if not lines:
        return torch.ones(1, 0, 1, 3)
    title_height = _even(lines * lettering.line_height(size) + 2 * MARGIN)
    canvas = Image.new("RGB", (lefts[-1] - GAP, title_height), lettering.PAPER)
    for text, left in zip(texts, lefts, strict=False):
        lettering.write(canvas, (left + MARGIN, MARGIN), text, size)
    return image.from_picture(canvas)
