"""The loss curve, and the edit beside it, drawn while a tune runs; and what was measured on each frame of an edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from PIL import Image, ImageDraw

from . import lettering

PAPER, INK, GRID, RAW, SMOOTH = "#1e1e1e", "#d0d0d0", "#3a3a3a", "#46607a", "#ffb454"
SOURCE, WORST = "#7fb2e5", "#ff6b6b"  # of a clip's curve, and its worst frame
MARGIN_LEFT, MARGIN = 64, 28
WIDTH, HEIGHT = 512, 320
EDIT = 216  # pixels of the width, for an edit beside the curve
NOTE_LINES = 12  # more would leave the curve no room where the page shows the picture small
FONT = 14  # readable where the page draws the picture at two thirds of its size
PANEL = 132  # pixels of the height, for one measure over the frames


def loss_curve(losses: Sequence[float], steps: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture of the loss of each step so far, raw and as an exponential mean, on an axis of `steps`.

    A single step's loss mostly shows which timestep was drawn; the mean shows the training.
    """
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    top = max(losses, default=1.0) * 1.05 or 1.0
    right, bottom = width - MARGIN, height - MARGIN

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN_LEFT + (right - MARGIN_LEFT) * step / max(steps, 1)
        return x, bottom - (bottom - MARGIN) * loss / top

    for part in (0, 0.25, 0.5, 0.75, 1):
        y = at(0, top * part)[1]
        draw.line([(MARGIN_LEFT, y), (right, y)], fill=GRID)
        draw.text((MARGIN_LEFT - 6, y), f"{top * part:.3g}", fill=INK, anchor="rm", font_size=FONT)
        x = at(steps * part, 0)[0]
        draw.text((x, bottom + 6), f"{steps * part:g}", fill=INK, anchor="ma", font_size=FONT)
    if losses:
        means, mean = [], losses[0]
        for loss in losses:
            mean += (loss - mean) * max(0.05, 1 / (len(means) + 1))
            means.append(mean)
        for values, colour, thickness in ((losses, RAW, 1), (means, SMOOTH, 2)):
            draw.line([at(i + 1, value) for i, value in enumerate(values)], fill=colour, width=thickness)
        text = f"step {len(losses)} of {steps}   loss {means[-1]:.4f}"
        draw.text((right, 6), text, fill=INK, anchor="ra", font_size=FONT)
    return picture


def curve_with_edit(losses: Sequence[float], steps: int, frame: Image.Image, label: str) -> Image.Image:
    """The curve, narrower, with a frame of a preview on its right: together as large as the curve alone.

    The page gives a node's picture little room, and makes it as small as its longer side asks for.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.paste(loss_curve(losses, steps, WIDTH - EDIT), (0, 0))
    scale = min(EDIT / frame.width, HEIGHT / frame.height)
    size = max(round(frame.width * scale), 1), max(round(frame.height * scale), 1)
    left, top = WIDTH - EDIT + (EDIT - size[0]) // 2, (HEIGHT - size[1]) // 2
    picture.paste(frame.resize(size, Image.Resampling.BICUBIC), (left, top))
    ImageDraw.Draw(picture).text((WIDTH - EDIT + 6, 6), label, fill=INK, font_size=FONT)
    return picture


def with_note(picture: Image.Image, text: str) -> Image.Image:
    """A picture with text below it, at most `NOTE_LINES`; as it is where there is no text."""
    if not text:
        return picture
    lines = lettering.wrap(text, picture.width - 2 * MARGIN, FONT, NOTE_LINES)
    height = picture.height + len(lines) * lettering.line_height(FONT) + MARGIN // 2
    noted = Image.new("RGB", (picture.width, height), PAPER)
    noted.paste(picture, (0, 0))
    lettering.write(noted, (MARGIN, picture.height), lines, FONT, INK)
    return noted


class Curve(NamedTuple):
    """One measure of a clip's frames: of the edit and, where it has it, of the source; NaN where a frame has none."""

    title: str
    edit: Sequence[float]
    source: Sequence[float] | None
    worst: int | None  # the edit's worst frame, from 0


def frame_curves(curves: Sequence[Curve], width: int = WIDTH) -> Image.Image:
    """A picture of measures over the frames, one below the other, each with its worst frame marked."""
    picture = Image.new("RGB", (width, PANEL * max(len(curves), 1)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, curve in enumerate(curves):
        _frame_curve(draw, curve, PANEL * i, width)
    return picture


def _frame_curve(draw: ImageDraw.ImageDraw, curve: Curve, top: int, width: int) -> None:
    lines = [(curve.source or (), SOURCE, 1), (curve.edit, SMOOTH, 2)]
    known = [value for values, _colour, _thickness in lines for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low < 1e-6 * max(abs(high), 1):
        low, high = low - 0.5, high + 0.5
    last = max(len(curve.edit) - 1, 1)
    right, upper, lower = width - MARGIN, top + MARGIN, top + PANEL - MARGIN

    def at(frame: int, value: float) -> tuple[float, float]:
        x = MARGIN_LEFT + (right - MARGIN_LEFT) * frame / last
        return x, lower - (lower - upper) * (value - low) / (high - low)

    for value in (low, high):
        y = at(0, value)[1]
        draw.line([(MARGIN_LEFT, y), (right, y)], fill=GRID)
        draw.text((MARGIN_LEFT - 6, y), f"{value:.3g}", fill=INK, anchor="rm", font_size=FONT)
    for frame in sorted({0, last // 2, last}):
        draw.text((at(frame, 0)[0], lower + 6), str(frame), fill=INK, anchor="ma", font_size=FONT)
    for values, colour, thickness in lines:
        points = [at(i, value) if math.isfinite(value) else None for i, value in enumerate(values)]
        for drawn, run in groupby(points, key=bool):
            if drawn:
                draw.line([point for point in run if point], fill=colour, width=thickness)
    draw.text((MARGIN_LEFT, top + 6), curve.title, fill=INK, font_size=FONT)
    if curve.worst is not None:
        x, y = at(curve.worst, curve.edit[curve.worst])
        draw.ellipse([(x - 4, y - 4), (x + 4, y + 4)], outline=WORST, width=2)
        draw.text((right, top + 6), f"worst: {curve.worst}", fill=WORST, anchor="ra", font_size=FONT)
