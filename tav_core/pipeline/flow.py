"""Optical flow by OpenCV's DIS, where the user has OpenCV: it needs no weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method.metrics import luma

SIDE = 512  # pixels of the shorter side; the size of published figures
MISSING = "needs OpenCV: install opencv-python-headless into ComfyUI's Python"


def dis() -> Any:
    """OpenCV's Dense Inverse Search (Kroeger et al., arXiv 1603.03590), preset medium; None without OpenCV."""
    try:
        cv2: Any = importlib.import_module("cv2")  # its types leave out a part of it
    except ImportError:
        return None
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def at_size(pictures: Tensor) -> Tensor:
    """IMAGE frames with their shorter side at SIDE pixels, [f, h, w, 3]."""
    scale = SIDE / min(pictures.shape[1:3])
    size = [round(side * scale) for side in pictures.shape[1:3]]
    resized = F.interpolate(pictures.movedim(-1, 1), size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.movedim(1, -1)


def flow(method: Any, here: Tensor, there: Tensor) -> Tensor:
    """Where each pixel of one frame is found in another: two of [1, h, w, 3] to [1, h, w, 2] in pixels, x first."""
    grey = ((255 * luma(frame[0])).round().clamp(0, 255).byte().numpy() for frame in (here, there))
    return torch.from_numpy(method.calc(*grey, None))[None]
