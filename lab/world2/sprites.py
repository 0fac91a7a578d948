"""The sprites of world 2: every thing and every verb in four looks, all facing left; from `make_sprites.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CELL = 96  # pixels of a sprite's side
SHEET = Path(__file__).with_name("sprites.png")  # a row a look, a column a figure
SOURCES = Path(__file__).with_name("sprites.json")  # where each comes from


class Look(NamedTuple):
    """A set of emoji: the npm package that it is taken from, with its licence."""

    package: str
    licence: str
    credit: str


# The words by which captions call the looks.
LOOKS = {
    "soft": Look("@iconify-json/noto@1.2.9", "Apache-2.0", "Noto Emoji, Google"),
    "flat": Look("@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twemoji, Twitter and contributors"),
    "glossy": Look("@iconify-json/fluent-emoji@1.2.7", "MIT", "Fluent Emoji, Microsoft"),
    "cartoon": Look("@iconify-json/emojione@1.2.3", "CC-BY-4.0", "EmojiOne 2 / EmojiTwo and contributors"),
}
THINGS = ("car", "truck", "dog", "cat", "elephant", "penguin", "turtle")
PERSON = "man"
VERBS = ("running", "walking", "dancing", "skiing")  # of the person
FIGURES = (*THINGS, *VERBS)  # the columns of the sheet
COLOURS = {"red": None, "blue": (0.05, 0.35, 1.0), "yellow": (1.0, 0.8, 0.0)}  # of cars: what replaces their own red


@cache
def sprite(figure: str, look: str, colour: str | None = None) -> Image.Image:
    """A figure in a look, RGBA in a square; a car may have one of COLOURS."""
    left, top = FIGURES.index(figure) * CELL, list(LOOKS).index(look) * CELL
    picture = _sheet().crop((left, top, left + CELL, top + CELL))
    new = COLOURS[colour] if colour else None
    if new is None:
        return picture
    pixels = np.asarray(picture).astype(np.float32)
    red = np.clip(pixels[..., :1] - pixels[..., 1:3].max(-1, keepdims=True), 0, None)
    pixels[..., :3] += red * (np.array(new, np.float32) - (1, 0, 0))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), "RGBA")


@cache
def extent(figure: str, look: str) -> tuple[float, float]:
    """Width and height of a sprite as parts of its square."""
    box = sprite(figure, look).getchannel("A").getbbox()
    return (box[2] - box[0]) / CELL, (box[3] - box[1]) / CELL


@cache
def _sheet() -> Image.Image:
    return Image.open(SHEET).convert("RGBA")
