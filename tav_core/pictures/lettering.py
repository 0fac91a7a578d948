"""Words in pictures: broken into lines, cut to a width, in a font that has their letters."""

from __future__ import annotations

from bisect import bisect
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

PAPER, INK = "#ffffff", "#202020"
LONGEST = 1000  # characters; more than any line holds, and laying out a whole book would take minutes
# Fonts of Windows, macOS and Linux, for the letters that Pillow's own font lacks: it has little beyond ASCII.
SYSTEM_FONTS = ("msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc",
                "arial.ttf", "Arial Unicode.ttf", "DejaVuSans.ttf")  # fmt: skip


def write(canvas: Image.Image, at: tuple[int, int], lines: list[str], size: int = 12, ink: str = INK) -> None:
    """Draw lines below each other, from the upper left corner `at`; what the canvas does not hold is cut off."""
    draw, (x, y) = ImageDraw.Draw(canvas), at
    for i, line in enumerate(lines):
        draw.text((x, y + i * line_height(size)), line, fill=ink, font=_font(line, size))


def line_height(size: int) -> int:
    return round(size * 1.25)


def wrap(text: str, width: int, size: int = 12, most: int = 100) -> list[str]:
    """Text in lines of at most `width` pixels; what `most` lines do not hold becomes an ellipsis.

    Lines are broken at spaces, and inside a word that is longer than a line. A line holds one character at least.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in text[:LONGEST].split("\n")]
    # Control characters and lone surrogates, which JSON can carry, make the font's layout fail.
    paragraphs = ["".join(filter(str.isprintable, paragraph)) for paragraph in paragraphs]
    font = _font("".join(paragraphs), size)
    lines: list[str] = []
    for rest in paragraphs:
        while rest:
            fits = max(bisect(range(1, len(rest) + 1), width, key=lambda end: font.getlength(rest[:end])), 1)
            if fits < len(rest) and (space := rest.rfind(" ", 0, fits + 1)) > 0:
                fits = space
            lines.append(rest[:fits].rstrip())
            rest = rest[fits:].lstrip()
    if len(lines) > most:
        lines = lines[:most]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _font(text: str, size: int) -> FreeTypeFont:
    """Pillow's own font, or where that lacks letters of the text, the font of the system that lacks the fewest."""
    fonts: list = [ImageFont.load_default(size)]
    if _lacking(fonts[0], text):
        for name in SYSTEM_FONTS:
            try:
                fonts.append(ImageFont.truetype(name, size))
            except OSError:
                continue  # this system has it not
    return min(fonts, key=lambda font: _lacking(font, text))


def _lacking(font: FreeTypeFont, text: str) -> int:
    """How many different characters the font draws as the box that stands for a missing one."""

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask: Any = font.getmask(character)
        return mask.size, bytes(mask)

    box = drawn("\uffff")  # no character, so in no font
    return sum(drawn(character) == box for character in set(text))
