"""Make docs/icon.png and docs/banner.png, which the ComfyUI registry shows, from docs/demo.png, which is
`clip_02.png` of `python run.py evaluate`. Run again when that picture changes; the results are committed.

python tools/pack.py lab.make_banner
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..demo.world import SIDE
from .sheet import LABEL

DOCS = Path(__file__).resolve().parents[1] / "docs"
FRAMES = 4  # in a row of the contact sheet
SOURCE, PLACE, STYLE = 0, 2, 3  # its rows

NIGHT, INK, QUIET = "#16181d", "#ffffff", "#a9b2c3"
FILM, HOLE = "#000000", "#e8e4da"
BANNER = (1260, 540)  # 21:9
ICON = 400
SMOOTH = 4  # shapes are drawn this many times larger, and then reduced: PIL draws without anti-aliasing


def frame(sheet: Image.Image, row: int, column: int, side: int) -> Image.Image:
    """One picture of the contact sheet."""
    x, y = LABEL + column * (SIDE + 2), row * (SIDE + 2)
    return sheet.crop((x, y, x + SIDE, y + SIDE)).resize((side, side), Image.Resampling.LANCZOS)


def rounded(picture: Image.Image, radius: int) -> Image.Image:
    mask = Image.new("L", (picture.width * SMOOTH, picture.height * SMOOTH))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * SMOOTH, fill=255)
    picture = picture.convert("RGBA")
    picture.putalpha(mask.resize(picture.size, Image.Resampling.LANCZOS))
    return picture


def perforated(width: int, height: int, band: int, count: int, inset: int = 0) -> Image.Image:
    """A strip of film, `count` holes in a band along the upper edge and one along the lower, `inset` from its ends."""
    film = Image.new("RGB", (width * SMOOTH, height * SMOOTH), FILM)
    draw = ImageDraw.Draw(film)
    hole, step = band * SMOOTH / 2, (width - 2 * inset) * SMOOTH / count
    for i in range(count):
        x = inset * SMOOTH + (i + 0.5) * step
        for y in (hole, film.height - hole):
            box = (x - 0.65 * hole, y - 0.5 * hole, x + 0.65 * hole, y + 0.5 * hole)
            draw.rounded_rectangle(box, 0.2 * hole, fill=HOLE)
    return film.resize((width, height), Image.Resampling.LANCZOS)


def strip(sheet: Image.Image, row: int, side: int, band: int, gap: int) -> Image.Image:
    """A clip as a strip of film."""
    film = perforated(FRAMES * (side + gap) + gap, side + 2 * band, band, FRAMES * 5)
    for column in range(FRAMES):
        film.paste(frame(sheet, row, column, side), (gap + column * (side + gap), band))
    return rounded(film, 6)


def banner(sheet: Image.Image) -> Image.Image:
    """The clip and two edits, one moment below the other."""
    canvas = Image.new("RGB", BANNER, NIGHT)
    for i, row in enumerate((SOURCE, PLACE, STYLE)):
        film = strip(sheet, row, side=130, band=16, gap=8)
        canvas.paste(film, (BANNER[0] - film.width - 36, 12 + i * (film.height + 15)), film)
    draw = ImageDraw.Draw(canvas)
    draw.text((44, 122), "Tune-A-Video", INK, ImageFont.load_default(88))
    draw.text((48, 234), "for ComfyUI", QUIET, ImageFont.load_default(42))
    tagline = "Tune on one clip. Edit it by prompt.\nKeep the motion."
    draw.text((48, 328), tagline, QUIET, ImageFont.load_default(28), spacing=12)
    return canvas


def icon(sheet: Image.Image) -> Image.Image:
    """One frame of the clip, half as it was and half edited, on a piece of film."""
    band = 44
    side = ICON - 2 * band
    film = perforated(ICON, ICON, band, 6, inset=32).rotate(90)
    before, after = (frame(sheet, row, 1, side) for row in (SOURCE, STYLE))
    half = Image.new("L", (side * SMOOTH, side * SMOOTH))
    corners = [(0.62 * half.width, 0), (half.width, 0), half.size, (0.38 * half.width, half.height)]
    ImageDraw.Draw(half).polygon(corners, fill=255)
    before.paste(after, mask=half.resize(before.size, Image.Resampling.LANCZOS))
    film.paste(before, (band, band))
    return rounded(film, 56)


def main() -> None:
    with Image.open(DOCS / "demo.png") as picture:
        sheet = picture.convert("RGB")
    icon(sheet).save(DOCS / "icon.png", optimize=True)
    banner(sheet).save(DOCS / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
