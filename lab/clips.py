"""Clips of the demo's world that the method is measured on, and what each is edited to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from ..demo import world
from ..demo.world import Clip, Scene
from ..tav_core.pictures import image

# motion, object, background, and the object, the background and the style that each clip is edited to; "car" leaves the
# colour open, for the frames to agree about
CLIPS = [
    ("arc", "red car", "beach", "truck", "snow", "sunset"),
    ("line", "dog", "grass", "cat", "desert", "sketch"),
    ("turn", "penguin", "snow", "chick", "road", "sunset"),
    ("bounce", "frog", "grass", "pumpkin", "beach", "sunset"),
    ("line", "boat", "water", "car", "beach", "sketch"),
    ("arc", "red balloon", "city", "blue balloon", "desert", "sunset"),
    ("zoom", "elephant", "desert", "car", "grass", "sketch"),
    ("bounce", "pumpkin", "road", "frog", "snow", "sketch"),
    ("turn", "yellow car", "city", "red car", "road", "sketch"),
    ("line", "turtle", "beach", "car", "grass", "sunset"),
    ("zoom", "cat", "forest", "penguin", "city", "sunset"),
    ("arc", "chick", "desert", "turtle", "water", "sketch"),
]
# Never looked at while anything was chosen: with their numbers going on from these.
HELD_OUT = [
    ("arc", "boat", "water", "turtle", "desert", "sunset"),
    ("line", "cat", "city", "dog", "beach", "sketch"),
    ("turn", "truck", "road", "car", "grass", "sunset"),
    ("bounce", "chick", "grass", "balloon", "snow", "sketch"),
    ("zoom", "pumpkin", "forest", "turtle", "city", "sunset"),
    ("line", "elephant", "grass", "truck", "road", "sketch"),
    ("arc", "frog", "water", "boat", "snow", "sunset"),
    ("turn", "blue car", "desert", "yellow car", "forest", "sketch"),
    ("bounce", "dog", "snow", "car", "city", "sunset"),
    ("zoom", "penguin", "beach", "chick", "water", "sketch"),
    ("line", "red balloon", "forest", "pumpkin", "grass", "sunset"),
    ("turn", "turtle", "desert", "elephant", "beach", "sketch"),
]
ALL = (*CLIPS, *HELD_OUT)
SETS = {"development": range(len(CLIPS)), "held out": range(len(CLIPS), len(ALL))}
HEADS = ("object", "background", "style")


def made(number: int, frames: int) -> tuple[Clip, dict[str, Scene]]:
    """Clip `number` of ALL, and its first scene with one thing changed, by what is changed."""
    motion, thing, place, *new = ALL[number]
    clip = world.make_clip(motion, thing, place, frames=frames, seed=100 + number)
    wanted = {head: replace(clip.scenes[0], **{head: value}) for head, value in zip(HEADS, new, strict=True)}
    return clip, wanted


def drawn(clip: Clip, head: str, wanted: Scene) -> Tensor:
    """The edit as it should be, pictures [f, h, w, 3] in 0 … 1: the world drawn again with one thing changed."""
    scenes = [replace(scene, **{head: getattr(wanted, head)}) for scene in clip.scenes]
    return image.from_bytes(np.stack([world.render(scene) for scene in scenes]))
