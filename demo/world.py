"""A small seeded world: an object on a background, in a style, with its caption; still pictures and moving clips.

Places and sizes are fractions of the picture's side, so that a scene looks the same at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .styles import STYLES, as_bytes, ramp, styled

Array = np.ndarray

SIDE = 128  # pixels of the pictures that the model is trained on
CELL = 96  # pixels of a sprite
SHEET = Path(__file__).with_name("sprites.png")

# What each sprite shows, in the order of the sheet, and the emoji that it is made from.
SPRITES = {
    "car": "🚗",
    "balloon": "🎈",
    "truck": "🚚",
    "boat": "⛵",
    "dog": "🐕",
    "cat": "🐈",
    "elephant": "🐘",
    "penguin": "🐧",
    "turtle": "🐢",
    "chick": "🐤",
    "frog": "🐸",
    "pumpkin": "🎃",
}
COLOURS = {"blue": (0.05, 0.35, 1.0), "yellow": (1.0, 0.8, 0.0)}  # what replaces the sprite's own red
OBJECTS = (
    *("red car", "blue car", "yellow car", "red balloon", "blue balloon", "truck", "boat", "dog", "cat", "elephant"),
    *("penguin", "turtle", "chick", "frog", "pumpkin"),
)


def colourless(object: str) -> str:
    """An object's name without its colour."""
    return object.split()[-1]


# What a caption may call an object, and the objects that it may mean: "car" leaves the colour open.
LOOKS = {
    name: tuple(object for object in OBJECTS if name in (object, colourless(object)))
    for name in (*OBJECTS, *map(colourless, OBJECTS))
}
BACKGROUNDS = {
    "beach": "on the beach",
    "grass": "on the grass",
    "snow": "in the snow",
    "desert": "in the desert",
    "road": "on the road",
    "city": "in the city",
    "water": "on the water",
    "forest": "in the forest",
}
MOTIONS = ("line", "arc", "bounce", "zoom", "turn")


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows.

    Attributes:
        object: its name in `LOOKS`; where that means several objects, the seed chooses one.
        x, y: centre of the object.
        size: the object's longer side.
        flip: facing right; the sprites face left.
        seed: of the background's details.
    """

    object: str
    background: str
    style: str = "plain"
    x: float = 0.5
    y: float = 0.6
    size: float = 0.6
    flip: bool = False
    seed: int = 0

    @property
    def caption(self) -> str:
        return caption(self.object, self.background, self.style)

    @property
    def look(self) -> str:
        """The one of OBJECTS that is drawn."""
        looks = LOOKS[self.object]
        return looks[self.seed % len(looks)]


class Clip(NamedTuple):
    """A moving scene and the truth about it: pictures uint8 [f, h, w, 3]; centres of the object in pixels [f, 2]."""

    frames: Array
    positions: Array
    scenes: list[Scene]
    caption: str


def caption(object: str, background: str, style: str = "plain") -> str:
    """What a scene is called: "a red car on the beach, pencil sketch"."""
    article = "an" if object[0] in "aeiou" else "a"
    return f"{article} {object} {BACKGROUNDS[background]}{STYLES[style]}"


def scenes() -> Iterator[Scene]:
    """One scene of every caption of the world."""
    return (Scene(o, b, s) for o in LOOKS for b in BACKGROUNDS for s in STYLES)


def captions() -> Iterator[str]:
    """Every caption of the world."""
    return (scene.caption for scene in scenes())


def random_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the stream `seed`."""
    rng = np.random.default_rng((seed, index))
    return Scene(
        object=OBJECTS[rng.integers(len(OBJECTS))],
        background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        style=list(STYLES)[rng.integers(len(STYLES))],
        x=rng.uniform(0.3, 0.7),
        y=rng.uniform(0.42, 0.68),
        size=rng.uniform(0.5, 0.72),
        flip=bool(rng.integers(2)),
        seed=int(rng.integers(2**31)),
    )


def render(scene: Scene, side: int = SIDE) -> Array:
    """The picture of a scene, uint8 [side, side, 3]."""
    picture = _BACKGROUNDS[scene.background](np.random.default_rng(scene.seed), side)
    if not scene.object.endswith("balloon"):
        picture *= _shadow(scene, side)
    picture = Image.fromarray(as_bytes(picture))
    object = placed(scene, side)
    picture.paste(object, mask=object)
    return styled(picture, scene.style)


def placed(scene: Scene, side: int = SIDE, window: int | None = None) -> Image.Image:
    """The scene's object alone, in no style, where a picture of `side` pixels shows it; RGBA.

    Args:
        window: pixels of the part that is returned, from the upper left corner; None: the whole picture.
    """
    sprite, _ = _sprite(scene.look)
    # Where each pixel of the picture lies in the sprite.
    scale = CELL / (scene.size * side)
    mirrored = -scale if scene.flip else scale
    left, top = CELL / 2 - mirrored * scene.x * side, CELL / 2 - scale * scene.y * side
    affine = (mirrored, 0, left, 0, scale, top)
    size = window or side
    return sprite.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


# --- objects ----------------------------------------------------------------------------------------------------


@cache
def _sprite(object: str) -> tuple[Image.Image, float]:
    """An object's sprite, RGBA in a square, and its height as a part of the square's."""
    *colour, name = object.split()
    sheet = Image.open(SHEET).convert("RGBA")
    cell = list(SPRITES).index(name) * CELL
    sprite = sheet.crop((cell, 0, cell + CELL, CELL))
    if colour and colour[0] in COLOURS:
        pixels = np.asarray(sprite).astype(np.float32)
        red = np.clip(pixels[..., :1] - pixels[..., 1:3].max(-1, keepdims=True), 0, None)
        pixels[..., :3] += red * (np.array(COLOURS[colour[0]], np.float32) - (1, 0, 0))
        sprite = Image.fromarray(as_bytes(pixels / 255), "RGBA")
    rows = np.asarray(sprite)[..., 3].any(1).nonzero()[0]
    return sprite, (rows[-1] + 1 - rows[0]) / CELL


def _shadow(scene: Scene, side: int) -> Array:
    """What the object's shadow on the ground leaves of the light, [side, side, 1]."""
    x, y = _grid(side)
    foot = scene.y + 0.5 * scene.size * _sprite(scene.look)[1] - 0.01
    distance = ((x - scene.x) / (0.42 * scene.size)) ** 2 + ((y - foot) / 0.045) ** 2
    return 1 - 0.45 * np.clip(1.4 - distance, 0, 1)[..., None]


# --- backgrounds: (rng, side) -> float [side, side, 3] ------------------------------------------------------------


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[Array, Array]:
    """x [1, side] and y [side, 1] of the pixels' centres."""
    steps = (np.arange(side, dtype=np.float32) + 0.5) / side
    return steps[None], steps[:, None]


def _rough(rng: np.random.Generator, side: int, colour: Array | tuple, depth: float, across: int, down: int) -> Array:
    """A colour with smooth noise of the given depth and number of cells, [side, side, 3]."""
    cells = rng.uniform(-depth, depth, (down, across)).astype(np.float32)
    noise = np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC))
    return np.asarray(colour, np.float32) + noise[..., None]


def _edge(distance: Array, side: int) -> Array:
    """0 to 1 over about a pixel and a half where `distance` crosses zero upwards, [side, side, 1]."""
    return np.clip(distance * side / 1.5 + 0.5, 0, 1)[..., None]


def _mix(picture: Array, colour: Array | tuple, amount: Array) -> Array:
    return picture + (np.asarray(colour, np.float32) - picture) * amount


def _sky(rng: np.random.Generator, side: int, top=(0.35, 0.66, 0.95), bottom=(0.85, 0.95, 1.0)) -> Array:
    """A clear sky with one or two clouds, [side, side, 3]."""
    x, y = _grid(side)
    sky = np.broadcast_to(ramp(top, bottom, side), (side, side, 3))
    for _ in range(rng.integers(1, 3)):
        cx, cy, width = rng.uniform(0, 1), rng.uniform(0.05, 0.22), rng.uniform(0.1, 0.2)
        distance = ((x - cx) / width) ** 2 + ((y - cy) / (0.35 * width)) ** 2
        sky = _mix(sky, (1, 1, 1), np.clip(1.3 - distance, 0, 0.85)[..., None])
    return sky


def _hills(rng: np.random.Generator, side: int, height: float) -> Array:
    """How deep each pixel lies below a wavy horizon, [side, side]."""
    x, y = _grid(side)
    return y - height - 0.025 * np.sin(2 * math.pi * (x * rng.uniform(0.6, 1.4) + rng.uniform()))


def _beach(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    horizon = rng.uniform(0.36, 0.42)
    sea = _rough(rng, side, ramp((0.05, 0.35, 0.6), (0.15, 0.7, 0.8), side), 0.05, 3, 24)
    sand = _rough(rng, side, (0.95, 0.83, 0.58), 0.06, 8, 12)
    picture = _mix(_sky(rng, side), sea, _edge(y - horizon + 0 * x, side))
    shore = _hills(rng, side, horizon + 0.14)
    picture = _mix(picture, (1, 1, 1), _edge(shore + 0.02, side) * 0.8)
    return _mix(picture, sand, _edge(shore, side))


def _grass(rng: np.random.Generator, side: int) -> Array:
    far, near = _hills(rng, side, rng.uniform(0.34, 0.4)), _hills(rng, side, rng.uniform(0.46, 0.52))
    picture = _mix(_sky(rng, side), (0.5, 0.75, 0.35), _edge(far, side))
    meadow = _rough(rng, side, ramp((0.35, 0.68, 0.2), (0.2, 0.55, 0.12), side), 0.08, 14, 14)
    return _mix(picture, meadow, _edge(near, side))


def _snow(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    picture = _sky(rng, side, (0.62, 0.7, 0.8), (0.85, 0.88, 0.92))
    ground = _hills(rng, side, rng.uniform(0.42, 0.48))
    for _ in range(5):  # fir trees
        cx, height = rng.uniform(0, 1), rng.uniform(0.14, 0.22)
        tree = np.minimum(0.35 * (y - 0.48 + height) - np.abs(x - cx), 0.5 - y)
        picture = _mix(picture, (0.16, 0.38, 0.34), _edge(tree, side))
    drifts = _rough(rng, side, (0.93, 0.95, 0.99), 0.05, 4, 9)
    return _mix(picture, drifts, _edge(ground, side))


def _desert(rng: np.random.Generator, side: int) -> Array:
    picture = np.broadcast_to(ramp((0.98, 0.78, 0.42), (1.0, 0.95, 0.75), side), (side, side, 3))
    for height, colour in ((0.36, (0.87, 0.6, 0.33)), (0.5, (0.93, 0.68, 0.38)), (0.72, (0.85, 0.56, 0.28))):
        dune = _hills(rng, side, height + rng.uniform(-0.03, 0.03))
        lit = 1.08 - 0.15 * np.clip(dune * 4, 0, 1)[..., None]
        picture = _mix(picture, _rough(rng, side, colour, 0.03, 5, 16) * lit, _edge(dune, side))
    return picture


def _road(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    horizon = rng.uniform(0.36, 0.42)
    picture = _mix(
        _sky(rng, side), _rough(rng, side, (0.42, 0.66, 0.3), 0.06, 12, 12), _edge(y - horizon + 0 * x, side)
    )
    asphalt = _rough(rng, side, (0.32, 0.32, 0.36), 0.04, 12, 12)
    picture = _mix(picture, asphalt, _edge(y - horizon - 0.1 + 0 * x, side))
    for line, dashes in ((horizon + 0.13, 0), (0.8, 4)):
        stripe = 0.014 - np.abs(y - line)
        if dashes:
            stripe = np.minimum(stripe * 1.4, 0.3 - np.abs((x * dashes + rng.uniform()) % 1 - 0.5))
        picture = _mix(picture, (0.96, 0.94, 0.85), _edge(stripe + 0 * x, side))
    return picture


def _city(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    picture = _sky(rng, side, (0.7, 0.78, 0.85), (0.95, 0.93, 0.88))
    left = -rng.uniform(0, 0.15)
    while left < 1:
        width, top = rng.uniform(0.18, 0.28), rng.uniform(0.06, 0.34)
        wall = np.array(((0.72, 0.45, 0.38), (0.55, 0.5, 0.62), (0.78, 0.68, 0.52))[rng.integers(3)], np.float32)
        inside = np.minimum(np.minimum(x - left, left + width - 0.012 - x), y - top)
        windows = np.minimum(0.25 - np.abs((x - left) / width * 3 % 1 - 0.5), 0.28 - np.abs((y - top) * 9 % 1 - 0.5))
        picture = _mix(picture, _mix(wall, (0.98, 0.88, 0.55), _edge(0.06 * windows, side)), _edge(inside, side))
        left += width
    pavement = _rough(rng, side, (0.62, 0.6, 0.6), 0.03, 10, 10)
    picture = _mix(picture, pavement, _edge(y - 0.56 + 0 * x, side))
    return _mix(picture, (0.8, 0.79, 0.78), _edge(0.02 - np.abs(y - 0.58) + 0 * x, side))


def _water(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    horizon = rng.uniform(0.3, 0.38)
    phase = 2 * math.pi * rng.uniform()
    waves = np.sin(2 * math.pi * (9 * y**0.7 + 0.12 * np.sin(2 * math.pi * 2 * x + phase)) + phase)[..., None]
    sea = _rough(rng, side, ramp((0.05, 0.3, 0.62), (0.03, 0.2, 0.5), side), 0.04, 6, 20) + 0.06 * waves
    return _mix(_sky(rng, side), sea, _edge(y - horizon + 0 * x, side))


def _forest(rng: np.random.Generator, side: int) -> Array:
    x, y = _grid(side)
    picture = _rough(rng, side, ramp((0.1, 0.32, 0.16), (0.32, 0.5, 0.2), side), 0.1, 9, 9)
    for i in range(5):  # trunks
        cx, width = (i + rng.uniform(0.2, 0.8)) / 5, rng.uniform(0.025, 0.04)
        picture = _mix(picture, (0.3, 0.2, 0.14), _edge(width - np.abs(x - cx) + 0 * y, side))
    crowns = _rough(rng, side, (0.12, 0.42, 0.18), 0.12, 8, 8)
    picture = _mix(picture, crowns, _edge(-_hills(rng, side, 0.16), side))
    ground = _rough(rng, side, (0.36, 0.3, 0.16), 0.08, 12, 12)
    return _mix(picture, ground, _edge(_hills(rng, side, 0.56), side))


_BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "beach": _beach,
    "grass": _grass,
    "snow": _snow,
    "desert": _desert,
    "road": _road,
    "city": _city,
    "water": _water,
    "forest": _forest,
}


# --- clips --------------------------------------------------------------------------------------------------------


def path(motion: str, time: float) -> dict[str, float | bool]:
    """Where the object is at `time` between 0 and 1: the fields of a Scene that change."""
    across = 0.3 + 0.4 * time
    if motion == "line":
        return {"x": across, "flip": True}
    if motion == "arc":
        return {"x": across, "y": 0.66 - 0.24 * math.sin(math.pi * time), "flip": True}
    if motion == "bounce":
        return {"x": across, "y": 0.66 - 0.22 * abs(math.sin(2 * math.pi * time)), "flip": True}
    if motion == "zoom":
        return {"size": 0.5 + 0.2 * time}
    # A turn: there and back, facing where it goes.
    return {"x": 0.7 - 0.4 * abs(2 * time - 1), "flip": time < 0.5}


def make_clip(
    motion: str, object: str, background: str, style: str = "plain", frames: int = 8, side: int = SIDE, seed: int = 0
) -> Clip:
    """A clip of one object moving over a background that stays; the seed chooses the object's size and the details.

    Raises ValueError when the world has no such object, background, style or motion, or a number is out of range.
    """
    for what, number, least in (("frames", frames, 1), ("side", side, 8), ("seed", seed, 0)):
        if number < least:
            raise ValueError(f"{what} is {number}; a clip of the demo's world needs at least {least}.")
    for what, name, names in (
        ("motion", motion, MOTIONS),
        ("object", object, LOOKS),
        ("background", background, BACKGROUNDS),
        ("style", style, STYLES),
    ):
        if name not in names:
            raise ValueError(f"{what} is {name!r}; expected one of: {', '.join(names)}.")
    size = np.random.default_rng(seed).uniform(0.52, 0.6)
    start = Scene(object, background, style, size=size, seed=seed)
    scenes = [replace(start, **path(motion, i / max(frames - 1, 1))) for i in range(frames)]
    positions = np.array([(scene.x * side, scene.y * side) for scene in scenes], np.float32)
    return Clip(np.stack([render(scene, side) for scene in scenes]), positions, scenes, start.caption)
