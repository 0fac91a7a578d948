"""A still picture of clips, a row each, with their names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from ..tav_core.pictures.lettering import PAPER, wrap, write

LABEL = 132  # pixels for the names on the left of a sheet


def contact_sheet(strips: Mapping[str, Tensor], every: int = 2) -> Image.Image:
    """A row a clip: its name, then every n-th frame. Clips are [f, h, w, 3] in 0 … 1, all of one size."""
    _, height, width, _ = next(iter(strips.values())).shape
    columns = max(len(range(0, len(clip), every)) for clip in strips.values())
    sheet = Image.new("RGB", (LABEL + columns * (width + 2), len(strips) * (height + 2)), PAPER)
    for row, (name, clip) in enumerate(strips.items()):
        write(sheet, (6, row * (height + 2) + 6), wrap(name, LABEL - 12))
        for column, frame in enumerate(clip[::every]):
            sheet.paste(picture(frame), (LABEL + column * (width + 2), row * (height + 2)))
    return sheet


def picture(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1).cpu().float().numpy() * 255 + 0.5).astype(np.uint8))
