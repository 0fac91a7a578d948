"""Pictures of other kinds as IMAGE, the host's: float32, 0 to 1, channels last."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Frames of a clip that are converted at a time: what that takes beside the clip and its result is no more than this.
AT_ONCE = 16


def from_bytes(pixels: np.ndarray) -> Tensor:
    """Pixels of 0 to 255, uint8 of any shape, as IMAGE of that shape."""
    return torch.from_numpy(pixels).float() / 255


def from_picture(picture: Image.Image) -> Tensor:
    """A PIL picture as IMAGE, [1, h, w, 3]."""
    return from_bytes(np.array(picture.convert("RGB")))[None]
