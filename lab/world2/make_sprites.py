"""Make sprites.png and sprites.json from four openly licensed sets of emoji. Run once; the result is committed.

  pip install resvg-py
  python -m lab.world2.make_sprites [FOLDER]

FOLDER keeps the npm packages of `sprites.LOOKS`, which `npm pack` brings there.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageOps

from .sprites import CELL, FIGURES, LOOKS, SHEET, SOURCES

# What a set may call a figure, in the order of choice.
NAMES = {
    "car": ("automobile",),
    "truck": ("delivery-truck",),
    "running": ("man-running", "person-running"),
    "walking": ("man-walking", "person-walking"),
    "dancing": ("man-dancing",),
    "skiing": ("skier",),
}
RIGHT = {("flat", "penguin")}  # look and figure of those that face right in their set: mirrored
SCENERY = {("flat", "skiing"): 1}  # first shapes of an emoji that are scenery: left out
DRAWN = 4 * CELL  # pixels at which an emoji is drawn before it is made smaller


def icons(package: str, folder: Path) -> dict:
    """A set as Iconify keeps it: names, SVG bodies, sizes."""
    file = folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
    if not file.exists():
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(file) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def svg(found: dict, name: str, left_out: int = 0) -> str:
    """An emoji of a set as an SVG document, without its first `left_out` shapes."""
    body = found["icons"][name]["body"]
    for _ in range(left_out):
        body = body[body.index("/>") + 2 :]
    size = f'width="{found["width"]}" height="{found["height"]}"'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} {size} viewBox="0 0 {found["width"]} {found["height"]}">{body}</svg>'


def fitted(document: str) -> Image.Image:
    """An SVG cropped to what is visible and fitted into a square of CELL pixels, centred."""
    import resvg_py  # needed once, to make the sprites: no requirement

    drawn = resvg_py.svg_to_bytes(svg_string=document, width=DRAWN, height=DRAWN)
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
    scale = CELL / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "emoji")
    folder.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGBA", (CELL * len(FIGURES), CELL * len(LOOKS)))
    sources = []
    for row, (look, (package, licence, credit)) in enumerate(LOOKS.items()):
        found = icons(package, folder)
        for column, figure in enumerate(FIGURES):
            name = next(name for name in NAMES.get(figure, (figure,)) if name in found["icons"])
            picture = fitted(svg(found, name, SCENERY.get((look, figure), 0)))
            if (look, figure) in RIGHT:
                picture = ImageOps.mirror(picture)
            sheet.paste(picture, (column * CELL, row * CELL))
            sources.append(
                {"look": look, "figure": figure, "icon": name, "package": package, "licence": licence, "credit": credit}
            )
            print(f"{look} {figure}: {name} of {package} ({licence})")
    sheet.save(SHEET, optimize=True)
    SOURCES.write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
