"""Make sprites.png from Noto Color Emoji (Debian: fonts-noto-color-emoji). Run once; the result is committed.

python -m lab.make_sprites [FONT.ttf]
"""

import sys

from PIL import Image, ImageDraw, ImageFont

from ..demo.world import CELL, SHEET, SPRITES

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
BITMAP = 109  # the only size that the font has


def sprite(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One emoji, cropped to what is visible and fitted into a square of CELL pixels, centred."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    canvas = canvas.crop(canvas.getchannel("A").point([0] * 33 + [255] * 223).getbbox())
    scale = CELL / max(canvas.size)
    canvas = canvas.resize((round(canvas.width * scale), round(canvas.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(canvas, ((CELL - canvas.width) // 2, (CELL - canvas.height) // 2))
    return cell


def main() -> None:
    font = ImageFont.truetype(sys.argv[1] if len(sys.argv) > 1 else FONT, BITMAP)
    sheet = Image.new("RGBA", (CELL * len(SPRITES), CELL))
    for i, character in enumerate(SPRITES.values()):
        sheet.paste(sprite(font, character), (i * CELL, 0))
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
