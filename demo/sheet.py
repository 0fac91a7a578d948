"""Pictures of clips: side by side with their names, as one still or frame by frame."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK = "#ffffff", "#202020"
LABEL = 132  # pixels for the names on the left of a sheet
LINE = 15


def contact_sheet(strips: Mapping[str, Tensor], every: int = 2) -> Image.Image:
    """A row a clip: its name, then every n-th frame. Clips are [f, h, w, 3] in 0 … 1, all of one size."""
    _, height, width, _ = next(iter(strips.values())).shape
    columns = max(len(range(0, len(clip), every)) for clip in strips.values())
    sheet = Image.new("RGB", (LABEL + columns * (width + 2), len(strips) * (height + 2)), PAPER)
    for row, (name, clip) in enumerate(strips.items()):
        write(sheet, (6, row * (height + 2) + 6), name, LABEL - 12)
        for column, frame in enumerate(clip[::every]):
            sheet.paste(picture(frame), (LABEL + column * (width + 2), row * (height + 2)))
    return sheet


def side_by_side(clips: Mapping[str, Tensor]) -> np.ndarray:
    """Frames of all clips next to each other, each under its name; uint8 [f, h, w, 3] with even sides."""
    frames, height, width, _ = next(iter(clips.values())).shape
    title = 2 + 3 * LINE + (height + 3 * LINE) % 2
    out = []
    for i in range(frames):
        canvas = Image.new("RGB", (len(clips) * width + len(clips) * width % 2, height + title), PAPER)
        for column, (name, clip) in enumerate(clips.items()):
            write(canvas, (column * width + 4, 2), name, width - 8)
            canvas.paste(picture(clip[min(i, len(clip) - 1)]), (column * width, title))
        out.append(np.asarray(canvas))
    return np.stack(out)


def picture(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1).cpu().float().numpy() * 255 + 0.5).astype(np.uint8))


def write(canvas: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    """Text broken into lines that fit `width`."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    x, y = at
    for paragraph in text.split("\n"):
        line = ""
        for word in [*paragraph.split(), None]:
            longer = f"{line} {word}".strip()
            if word is not None and draw.textlength(longer, font=font) <= width:
                line = longer
                continue
            draw.text((x, y), line, fill=INK, font=font)
            y, line = y + LINE, word or ""
