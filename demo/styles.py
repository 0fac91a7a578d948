"""Styles of whole pictures, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

Array = np.ndarray

STYLES = {"plain": "", "sketch": ", pencil sketch", "sunset": ", at sunset"}  # and what a caption adds


def styled(picture: Image.Image, style: str) -> Array:
    """A picture in one of STYLES, uint8 [side, side, 3]."""
    return as_bytes(_STYLES[style](picture))


def as_bytes(picture: Array) -> Array:
    """Values of 0 … 1 as uint8."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def ramp(top: tuple, bottom: tuple, side: int) -> Array:
    """Colours from the top to the bottom, [side, 1, 3]."""
    y = (np.arange(side, dtype=np.float32)[:, None, None] + 0.5) / side
    return np.array(top, np.float32) * (1 - y) + np.array(bottom, np.float32) * y


def _plain(picture: Image.Image) -> Array:
    return np.asarray(picture, np.float32) / 255


def _sketch(picture: Image.Image) -> Array:
    """Soft pencil lines over a faint wash of the colours, on paper."""
    side = picture.width
    soft = _plain(picture.filter(ImageFilter.GaussianBlur(side / 128)))
    slope = np.abs(np.roll(soft, 1, 0) - np.roll(soft, -1, 0)) + np.abs(np.roll(soft, 1, 1) - np.roll(soft, -1, 1))
    slope[[0, -1]] = slope[:, [0, -1]] = 0
    lines = np.clip(slope.max(-1, keepdims=True) * (side / 128) * 1.6 - 0.08, 0, 1)
    return (np.array((0.97, 0.96, 0.93), np.float32) - 0.3 * (1 - soft)) * (1 - 0.7 * lines)


def _sunset(picture: Image.Image) -> Array:
    """Orange light from a low sun under a violet sky."""
    light = ramp((0.85, 0.5, 0.6), (1.0, 0.72, 0.5), picture.width)
    return _plain(picture) * light + np.array((0.12, 0.04, 0.06), np.float32)


_STYLES: dict[str, Callable[[Image.Image], Array]] = {"plain": _plain, "sketch": _sketch, "sunset": _sunset}
