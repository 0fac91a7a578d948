"""Styles of world 2: the demo's, but for a sketch in bolder lines, which an autoencoder this small can keep."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from ...demo import styles
from ...demo.styles import STYLES, as_bytes

__all__ = ["STYLES", "as_bytes", "styled"]

Array = np.ndarray


def styled(picture: Image.Image, style: str) -> Array:
    """A picture in one of STYLES, uint8 [side, side, 3]."""
    return as_bytes(_sketch(picture)) if style == "sketch" else styles.styled(picture, style)


def _sketch(picture: Image.Image) -> Array:
    """Broad pencil lines over a wash of the colours, on paper."""
    side = picture.width
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(side / 80)), np.float32) / 255
    slope = np.abs(np.roll(soft, 1, 0) - np.roll(soft, -1, 0)) + np.abs(np.roll(soft, 1, 1) - np.roll(soft, -1, 1))
    slope[[0, -1]] = slope[:, [0, -1]] = 0
    lines = np.clip(slope.max(-1, keepdims=True) * (side / 128) * 2.6 - 0.1, 0, 1)
    return (np.array((0.97, 0.96, 0.93), np.float32) - 0.5 * (1 - soft)) * (1 - 0.8 * lines)
