"""Seeded scenes: one or two actors with a pose, in a place, in a style, before a camera; stills and moving clips.

Places and sizes are fractions of the picture's side, so that a scene looks the same at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from .places import LEFT, PLACES, layers
from .sprites import CELL, COLOURS, FIGURES, LOOKS, PERSON, VERBS, extent, sprite
from .styles import STYLES, as_bytes, styled

Array = np.ndarray

SIDE = 128  # pixels of the pictures that the model is trained on
RIGHT = 0.85  # share of actors that face right, as in clips; were it half, a small model would draw both ways at once
MOTIONS = ("line", "jump", "near", "turn", "cross")  # cross: a second actor comes the other way, behind
CAMERAS = ("still", "pan", "zoom", "follow")


class Pose(NamedTuple):
    """How a sprite is held, about its foot.

    Attributes:
        flip: facing right; the sprites face left.
        angle: leaning forwards, degrees.
        squash: its height, as a factor; its width changes by the inverse.
        shear: how far its head lies before its foot, as a part of its height.
        lift: above the ground.
    """

    flip: bool = False
    angle: float = 0.0
    squash: float = 1.0
    shear: float = 0.0
    lift: float = 0.0


class Camera(NamedTuple):
    """Where the nearest layer's middle lies, x, and how much larger it is, zoom, than in a still picture."""

    x: float = 0.0
    zoom: float = 1.0


UPRIGHT, STILL = Pose(), Camera()


@dataclass(frozen=True)
class Actor:
    """A thing, or a person doing something.

    Attributes:
        figure: one of FIGURES.
        look: one of LOOKS.
        colour: one of COLOURS, of cars only.
        x, y: centre on the ground, in the nearest layer's coordinates, before its pose.
        size: its square's side.
        tells: what the caption says of it: "look", "colour".
    """

    figure: str
    look: str = "soft"
    colour: str | None = None
    x: float = 0.5
    y: float = 0.6
    size: float = 0.6
    pose: Pose = UPRIGHT
    tells: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """What a caption calls it: "a glossy red car", "a man is running"."""
        words = [getattr(self, what) for what in ("look", "colour") if what in self.tells and getattr(self, what)]
        words.append(PERSON if self.figure in VERBS else self.figure)
        article = "an" if words[0][0] in "aeiou" else "a"
        doing = f" is {self.figure}" if self.figure in VERBS else ""
        return f"{article} {' '.join(words)}{doing}"


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows.

    Attributes:
        actors: one, or two, the nearer first.
        seed: of the place's details.
    """

    actors: tuple[Actor, ...]
    place: str
    style: str = "plain"
    camera: Camera = STILL
    seed: int = 0

    @property
    def caption(self) -> str:
        who = " in front of ".join(actor.phrase for actor in self.actors)
        return f"{who} {PLACES[self.place]}{STYLES[self.style]}"


class Shown(NamedTuple):
    """A picture and the truth about it.

    Attributes:
        picture: uint8 [side, side, 3].
        masks: the pixels that each actor covers and no other hides, bool [actors, side, side].
        positions: each actor's centre as it is posed, x and y in pixels, float32 [actors, 2].
    """

    picture: Array
    masks: Array
    positions: Array


class Clip(NamedTuple):
    """A moving scene and the truth about it, as `Shown` with a first dimension of frames; poses and cameras: scenes."""

    frames: Array
    masks: Array
    positions: Array
    scenes: list[Scene]
    caption: str


def draw(scene: Scene, side: int = SIDE) -> Shown:
    """The picture of a scene, with its truth."""
    picture = Image.new("RGB", (side, side))
    for layer, depth in layers(scene.place, scene.seed, side):
        seen = _through(layer, scene.camera, depth, side)
        picture.paste(seen, mask=seen)
    light = np.asarray(picture, np.float32) / 255
    for actor in scene.actors:
        light = light * _shadow(actor, scene.camera, side)
    picture = Image.fromarray(as_bytes(light))
    masks, positions = [], []
    for actor in reversed(scene.actors):  # the nearer one last
        matrix, position = _placed(actor, scene.camera, side)
        seen = sprite(actor.figure, actor.look, actor.colour).transform(
            (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
        picture.paste(seen, mask=seen)
        cover = np.asarray(seen)[..., 3] > 127
        masks = [cover, *(mask & ~cover for mask in masks)]
        positions.insert(0, position)
    return Shown(styled(picture, scene.style), np.stack(masks), np.array(positions, np.float32))


def render(scene: Scene, side: int = SIDE) -> Array:
    """The picture of a scene, uint8 [side, side, 3]."""
    return draw(scene, side).picture


def plate(scene: Scene, side: int = SIDE) -> Array:
    """The picture of a scene without its actors and their shadows."""
    picture = Image.new("RGB", (side, side))
    for layer, depth in layers(scene.place, scene.seed, side):
        seen = _through(layer, scene.camera, depth, side)
        picture.paste(seen, mask=seen)
    return styled(picture, scene.style)


def _through(layer: Image.Image, camera: Camera, depth: float, side: int) -> Image.Image:
    """What the camera sees of a layer, RGBA [side, side]."""
    density = layer.height / side
    scale = density / (1 + (camera.zoom - 1) * depth)
    left = (0.5 + camera.x * depth - LEFT) * side * density - scale * side / 2
    top = 0.5 * side * density - scale * side / 2
    affine = (scale, 0, left, 0, scale, top)
    return layer.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def _projected(x: float, y: float, camera: Camera) -> tuple[float, float]:
    """A point of the nearest layer as fractions of the picture's sides."""
    return 0.5 + camera.zoom * (x - 0.5 - camera.x), 0.5 + camera.zoom * (y - 0.5)


def _foot(actor: Actor) -> float:
    """y of the actor's lowest point, before its pose."""
    return actor.y + 0.5 * actor.size * extent(actor.figure, actor.look)[1]


def _placed(actor: Actor, camera: Camera, side: int) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Where each pixel of the picture lies in the sprite, as PIL's affine, and where the sprite's centre is shown."""
    pose, height = actor.pose, extent(actor.figure, actor.look)[1]
    size = actor.size * camera.zoom * side / CELL
    lean = math.radians(pose.angle) * (1 if pose.flip else -1)
    turn = np.array([(math.cos(lean), -math.sin(lean)), (math.sin(lean), math.cos(lean))])
    shear = np.array([(1, -pose.shear * (1 if pose.flip else -1)), (0, 1)])
    scale = np.diag([(-1 if pose.flip else 1) * size / pose.squash, size * pose.squash])
    forth = turn @ shear @ scale  # from the sprite to the picture
    foot = np.array([CELL / 2, CELL / 2 + CELL * height / 2])
    shown = np.array(_projected(actor.x, _foot(actor) - pose.lift, camera)) * side
    back = np.linalg.inv(forth)
    origin = foot - back @ shown
    centre = shown + forth @ (np.full(2, CELL / 2) - foot)
    return (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1]), (centre[0], centre[1])


def _shadow(actor: Actor, camera: Camera, side: int) -> Array:
    """What the actor's shadow on the ground leaves of the light, [side, side, 1]; weaker under one that is lifted."""
    steps = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = _projected(actor.x, _foot(actor) - 0.01, camera)
    size = actor.size * camera.zoom
    width = 0.42 * size * max(extent(actor.figure, actor.look)[0], 0.6)
    distance = ((steps[None] - x) / width) ** 2 + ((steps[:, None] - y) / (0.075 * size)) ** 2
    strength = 0.45 * max(1 - 2.5 * actor.pose.lift, 0.4)
    return 1 - strength * np.clip(1.4 - distance, 0, 1)[..., None]


# --- how figures move ---------------------------------------------------------------------------------------------


def gait(figure: str, phase: float, flip: bool = False) -> Pose:
    """How a figure is held at a phase of its gait, which repeats with 1."""
    swing, bound = math.sin(2 * math.pi * phase), abs(math.sin(2 * math.pi * phase))
    if figure == "dancing":  # one side, then the other
        return Pose(phase % 1 < 0.5, 4 + 8 * bound, 1 - 0.06 * bound, 0.0, 0.02 * bound)
    lean, squash, shear, lift = {
        "running": (4 * swing, 0.94 + 0.1 * bound, 0.06 * swing, 0.05 * bound),
        "walking": (3 * swing, 0.98 + 0.03 * bound, 0.03 * swing, 0.012 * bound),
        "skiing": (8 * swing, 1 - 0.06 * bound, 0.05 * swing, 0.0),
        "car": (0.0, 0.98 + 0.04 * bound, 0.0, 0.0),
        "truck": (0.0, 0.97 + 0.05 * bound, 0.0, 0.0),
        "dog": (5 * swing, 0.93 + 0.1 * bound, 0.0, 0.05 * bound),
        "cat": (4 * swing, 0.92 + 0.12 * bound, 0.0, 0.04 * bound),
        "elephant": (2 * swing, 0.97 + 0.04 * bound, 0.03 * swing, 0.0),
        "penguin": (8 * swing, 1.0, 0.0, 0.01 * bound),
        "turtle": (2 * swing, 0.95 + 0.07 * bound, 0.0, 0.0),
    }[figure]
    return Pose(flip, lean, squash, shear, lift)


def random_actor(rng: np.random.Generator, camera: Camera, x: float, y: float, size: float) -> Actor:
    """An actor that is shown at x, y in a size, with a caption that tells its look and colour at times."""
    figure = FIGURES[rng.integers(len(FIGURES))]
    return Actor(
        figure=figure,
        look=list(LOOKS)[rng.integers(len(LOOKS))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))] if figure == "car" else None,
        x=0.5 + camera.x + (x - 0.5) / camera.zoom,
        y=0.5 + (y - 0.5) / camera.zoom,
        size=size / camera.zoom,
        pose=gait(figure, rng.uniform(), bool(rng.random() < RIGHT)),
        tells=tuple(what for what in ("look", "colour") if rng.random() < 0.5),
    )


def random_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the stream `seed`: one in eight has two actors, one in two a camera that has moved."""
    rng = np.random.default_rng((seed, index))
    camera = Camera(rng.uniform(-0.3, 0.3), rng.uniform(1, 1.25)) if rng.random() < 0.5 else STILL
    y = rng.uniform(0.46, 0.6)
    if rng.random() < 0.125:
        left = rng.uniform(0.25, 0.38)
        x = [left, left + rng.uniform(0.22, 0.4)]
        rng.shuffle(x)
        actors = [random_actor(rng, camera, x[0], 0.62, 0.58), random_actor(rng, camera, x[1], 0.54, 0.54)]
    else:
        actors = [random_actor(rng, camera, rng.uniform(0.35, 0.65), y, rng.uniform(0.58, 0.8))]
    place = list(PLACES)[rng.integers(len(PLACES))]
    style = list(STYLES)[rng.integers(len(STYLES))]
    return Scene(tuple(actors), place, style, camera, int(rng.integers(2**31)))


def captions() -> Iterator[str]:
    """Every caption of one actor, and one of two: all words of the world."""
    colours = {figure: (list(COLOURS) if figure == "car" else [None]) for figure in FIGURES}
    tellings = ((), ("look",), ("colour",), ("look", "colour"))
    actors = [Actor(f, look, c, tells=t) for f in FIGURES for look in LOOKS for c in colours[f] for t in tellings]
    yield from dict.fromkeys(Scene((a,), p, s).caption for a in actors for p in PLACES for s in STYLES)
    yield Scene((actors[0], actors[-1]), "beach").caption


# --- clips --------------------------------------------------------------------------------------------------------


def make_clip(
    motion: str,
    camera: str,
    actor: Actor,
    place: str,
    style: str = "plain",
    frames: int = 8,
    side: int = SIDE,
    seed: int = 0,
    other: Actor | None = None,
) -> Clip:
    """A clip of an actor moving in its gait; `other` is the one that crosses its way, in motion "cross" only.

    Raises ValueError when the world has no such motion, camera, place or style, or a number is out of range.
    """
    for what, number, least in (("frames", frames, 1), ("side", side, 8), ("seed", seed, 0)):
        if number < least:
            raise ValueError(f"{what} is {number}; a clip of the world needs at least {least}.")
    for what, name, names in (
        ("motion", motion, MOTIONS),
        ("camera", camera, CAMERAS),
        ("place", place, PLACES),
        ("style", style, STYLES),
    ):
        if name not in names:
            raise ValueError(f"{what} is {name!r}; expected one of: {', '.join(names)}.")
    if (motion == "cross") != (other is not None):
        raise ValueError('motion "cross" needs another actor, and no other motion takes one.')
    scenes = []
    for i in range(frames):
        time = i / max(frames - 1, 1)
        actors = [moved(actor, motion, time)]
        if other:
            back = moved(other, "line", time)
            actors.append(replace(back, x=1 - back.x, y=actor.y - 0.06, pose=gait(other.figure, 2 * time)))
        scenes.append(Scene(tuple(actors), place, style, _camera(camera, time, actors[0].x), seed))
    shown = [draw(scene, side) for scene in scenes]
    frames_, masks, positions = (np.stack(part) for part in zip(*shown, strict=True))
    return Clip(frames_, masks, positions, scenes, scenes[0].caption)


def moved(actor: Actor, motion: str, time: float) -> Actor:
    """The actor at `time` between 0 and 1 of a motion, two rounds of its gait in all."""
    across = {"line": 0.28 + 0.44 * time, "jump": 0.3 + 0.4 * time, "near": 0.5, "cross": 0.28 + 0.44 * time}
    x = across.get(motion, 0.7 - 0.4 * abs(2 * time - 1))
    pose = gait(actor.figure, 2 * time, flip=motion != "turn" or time < 0.5)
    if motion == "jump":
        pose = pose._replace(lift=0.2 * math.sin(math.pi * time))
    size = actor.size * (0.8 + 0.4 * time) if motion == "near" else actor.size
    return replace(actor, x=x, size=size, pose=pose)


def _camera(kind: str, time: float, x: float) -> Camera:
    if kind == "pan":
        return Camera(0.16 * time - 0.08)
    if kind == "zoom":
        return Camera(0.0, 1 + 0.25 * time)
    return Camera(x - 0.5) if kind == "follow" else STILL
