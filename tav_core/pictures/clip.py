"""From the frames that a video loader gives to the clip that is tuned on."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .image import AT_ONCE

Fit = Literal["crop", "stretch", "pad"]
FITS: tuple[str, ...] = get_args(Fit)
MAX_SIZE = 8192  # pixels


def prepare_clip(frames: Tensor, start: int, stride: int, count: int, width: int, height: int, fit: str) -> Tensor:
    """Every `stride`-th frame from `start`, `count` of them, at `width` by `height` pixels.

    Args:
        frames: IMAGE, [b, h, w, c], 0 to 1.
        fit: `crop` fills the size and cuts what hangs over, `pad` fits inside on black, `stretch` distorts.
    Returns:
        [count, height, width, c], 0 to 1, float32.

    Raises ValueError when the clip is too short (the message says what fits), the size is no multiple of 8, or the
    frames are no pictures that could be brought to it.
    """
    if frames.ndim != 4 or 0 in frames.shape or not frames.is_floating_point():
        raise ValueError("there are no frames: connect the images of a video (Get Video Components).")
    check_clip(start, stride, count, width, height, fit)
    available = frames.shape[0]
    if start + (count - 1) * stride >= available:
        raise too_short(available, start, stride, count)
    picked = frames[start : start + (count - 1) * stride + 1 : min(stride, available)]
    out = picked.new_empty(count, height, width, picked.shape[3], dtype=torch.float32)
    for part, place in zip(picked.split(AT_ONCE), out.split(AT_ONCE), strict=True):
        place[:] = resize(part.float(), width, height, fit)
    return out


def check_clip(start: int, stride: int, count: int, width: int, height: int, fit: str) -> None:
    """Raises ValueError for what no video could give; see `prepare_clip`."""
    if start < 0 or stride < 1 or count < 1:
        raise ValueError(f"start {start}, stride {stride}, count {count}: start is from 0, the others from 1.")
    for name, size in (("width", width), ("height", height)):
        if size < 8 or size % 8:
            lower = max(size // 8 * 8, 8)
            raise ValueError(f"{name} is {size}; it must be a multiple of 8, such as {lower} or {lower + 8}.")
        if size > MAX_SIZE:
            raise ValueError(f"{name} is {size}; the largest is {MAX_SIZE} pixels.")
    if fit not in FITS:
        raise ValueError(f"fit is {fit[:20]!r}; it must be one of {', '.join(FITS)}.")


def too_short(available: int, start: int, stride: int, count: int, where: str = "", note: str = "") -> ValueError:
    """What is wrong and what fits, of a video that has `available` frames.

    Args:
        where: what they are counted from, if not from the video's first.
        note: what else there is to say of it.
    """
    wanted = f"{count} frames at stride {stride} from {where or f'frame {start}'}"
    need = f"need {start + (count - 1) * stride + 1} frames, the video has {available}{' from there' if where else ''}"
    return ValueError(f"{wanted} {need}. {_what_fits(available, start, stride, count)}{note}")


def _what_fits(available: int, start: int, stride: int, count: int) -> str:
    if start >= available:
        return f"The last start is {available - 1}."
    advice = f"At this start and stride the largest count is {(available - 1 - start) // stride + 1}"
    largest_stride = (available - 1 - start) // max(count - 1, 1)
    return advice + (f"; for {count} frames the largest stride is {largest_stride}." if largest_stride else ".")


def resize(frames: Tensor, width: int, height: int, fit: str, pixel_aspect: float = 1.0) -> Tensor:
    """[b, h, w, c] to [b, height, width, c]; `pixel_aspect` is the width of the frames' pixels to their height.

    Raises ValueError when `crop` would make them gigantic first.
    """
    if (*frames.shape[1:3], pixel_aspect) == (height, width, 1):
        return frames.clone()
    old_height, old_width = frames.shape[1], frames.shape[2] * pixel_aspect
    scale_x, scale_y = width / old_width, height / old_height
    if fit == "crop":
        scale_x = scale_y = max(scale_x, scale_y)
    elif fit == "pad":
        scale_x = scale_y = min(scale_x, scale_y)
    scaled = (max(round(old_height * scale_y), 1), max(round(old_width * scale_x), 1))
    if max(scaled) > 16 * MAX_SIZE:
        raise ValueError(
            f"pictures of {old_width:.0f} x {old_height} pixels cannot fill {width} x {height} without becoming "
            "gigantic: set fit to stretch or pad."
        )
    pictures = rearrange(frames, "b h w c -> b c h w")
    pictures = F.interpolate(pictures, size=scaled, mode="bicubic", antialias=True).clamp(0, 1)
    # Negative padding crops: both fits centre the picture in the wanted size.
    top, left = (height - scaled[0]) // 2, (width - scaled[1]) // 2
    pictures = F.pad(pictures, (left, width - scaled[1] - left, top, height - scaled[0] - top))
    return rearrange(pictures, "b c h w -> b h w c").contiguous()
