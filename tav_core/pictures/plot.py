"""The loss curve, and the edit beside it, drawn while a tune runs."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from . import lettering

PAPER, INK, GRID, RAW, SMOOTH = "#1e1e1e", "#d0d0d0", "#3a3a3a", "#46607a", "#ffb454"
MARGIN_LEFT, MARGIN = 64, 28
WIDTH, HEIGHT = 512, 320
EDIT = 216  # pixels of the width, for an edit beside the curve
NOTE_LINES = 12  # more would leave the curve no room where the page shows the picture small
FONT = 14  # readable where the page draws the picture at two thirds of its size


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
