"""Where things are: drawn places in layers, for a camera to move before.

A layer spans the world from x = LEFT to x = RIGHT and y = 0 to 1, in units of the picture's side. Far layers follow the
camera less: their depth is the share of its motion that they show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...demo.styles import as_bytes

Array = np.ndarray

LEFT, RIGHT = -0.5, 1.5
DENSITY = 1.25  # a layer's pixels for one of the picture: room to zoom in
PLACES = {
    "beach": "on the beach",
    "grass": "on the grass",
    "snow": "in the snow",
    "desert": "in the desert",
    "road": "on the road",
    "city": "in the city",
}


class Layer(NamedTuple):
    """Part of a place: RGBA, and the share of the camera's motion that it shows."""

    picture: Image.Image
    depth: float


class Canvas:
    """Grids and brushes of one layer; all arrays are float [h, w] or [h, w, 3]."""

    def __init__(self, rng: np.random.Generator, side: int):
        self.rng = rng
        self.pixel = 1 / (DENSITY * side)
        self.x, self.y = _grid(side)
        self.shape = (self.y.shape[0], self.x.shape[1])

    def rough(self, colour: Array | tuple, depth: float, across: int, down: int) -> Array:
        """A colour with smooth noise; so many cells to a unit of x and of y."""
        cells = self.rng.uniform(-depth, depth, (down, int(across * (RIGHT - LEFT)))).astype(np.float32)
        noise = np.asarray(Image.fromarray(cells).resize(self.shape[::-1], Image.Resampling.BICUBIC))
        return np.asarray(colour, np.float32) + noise[..., None]

    def ramp(self, top: tuple, bottom: tuple) -> Array:
        """Colours from the top to the bottom."""
        y = self.y[..., None]
        return np.broadcast_to(np.array(top, np.float32) * (1 - y) + np.array(bottom, np.float32) * y, (*self.shape, 3))

    def edge(self, distance: Array) -> Array:
        """0 to 1 over about a pixel and a half where `distance` crosses zero upwards, [h, w]."""
        return np.broadcast_to(np.clip(distance / (1.5 * self.pixel) + 0.5, 0, 1), self.shape)

    def hills(self, height: float) -> Array:
        """How deep each pixel lies below a wavy horizon."""
        wave = np.sin(2 * math.pi * (self.x * self.rng.uniform(0.6, 1.4) + self.rng.uniform()))
        return self.y - height - 0.025 * wave

    def sky(self, top=(0.35, 0.66, 0.95), bottom=(0.85, 0.95, 1.0)) -> Layer:
        """A clear sky with a few clouds."""
        sky = self.ramp(top, bottom)
        for _ in range(self.rng.integers(2, 5)):
            cx, cy, width = self.rng.uniform(LEFT, RIGHT), self.rng.uniform(0.05, 0.22), self.rng.uniform(0.1, 0.2)
            distance = ((self.x - cx) / width) ** 2 + ((self.y - cy) / (0.35 * width)) ** 2
            sky = mix(sky, (1, 1, 1), np.clip(1.3 - distance, 0, 0.85))
        return layer(sky, 1, 0.1)


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[Array, Array]:
    """x [1, w] and y [h, 1] of a layer's pixels' centres."""
    across, down = round((RIGHT - LEFT) * DENSITY * side), round(DENSITY * side)
    x = LEFT + (np.arange(across, dtype=np.float32) + 0.5) * (RIGHT - LEFT) / across
    return x[None], (np.arange(down, dtype=np.float32)[:, None] + 0.5) / down


def mix(picture: Array, colour: Array | tuple, amount: Array) -> Array:
    return picture + (np.asarray(colour, np.float32) - picture) * amount[..., None]


def layer(colours: Array, shown: Array | float, depth: float) -> Layer:
    """A layer of colours [h, w, 3] that covers what is behind it by `shown`, 0 to 1 [h, w]."""
    alpha = np.broadcast_to(np.asarray(shown, np.float32), colours.shape[:2])[..., None]
    return Layer(Image.fromarray(as_bytes(np.concatenate([colours, alpha], -1)), "RGBA"), depth)


# --- places: canvas -> layers from the farthest to the nearest -----------------------------------------------------


def _beach(c: Canvas) -> list[Layer]:
    horizon = c.rng.uniform(0.36, 0.42)
    sea = c.rough(c.ramp((0.05, 0.35, 0.6), (0.15, 0.7, 0.8)), 0.05, 3, 24)
    shore = c.hills(horizon + 0.14)
    sand = mix(np.broadcast_to(np.float32(1), (*c.shape, 3)), c.rough((0.95, 0.83, 0.58), 0.06, 8, 12), c.edge(shore))
    return [c.sky(), layer(sea, c.edge(c.y - horizon), 0.4), layer(sand, c.edge(shore + 0.02), 1)]


def _grass(c: Canvas) -> list[Layer]:
    far, near = c.hills(c.rng.uniform(0.34, 0.4)), c.hills(c.rng.uniform(0.46, 0.52))
    hill = np.broadcast_to(np.array((0.5, 0.75, 0.35), np.float32), (*c.shape, 3))
    meadow = c.rough(c.ramp((0.35, 0.68, 0.2), (0.2, 0.55, 0.12)), 0.08, 14, 14)
    return [c.sky(), layer(hill, c.edge(far), 0.4), layer(meadow, c.edge(near), 1)]


def _snow(c: Canvas) -> list[Layer]:
    sky = c.sky((0.62, 0.7, 0.8), (0.85, 0.88, 0.92))
    ground = c.hills(c.rng.uniform(0.42, 0.48))
    trees = np.full(c.shape, -1.0)
    for _ in range(10):  # firs
        cx, height = c.rng.uniform(LEFT, RIGHT), c.rng.uniform(0.14, 0.22)
        trees = np.maximum(trees, 0.35 * (c.y - 0.48 + height) - np.abs(c.x - cx))
    firs = np.broadcast_to(np.array((0.16, 0.38, 0.34), np.float32), (*c.shape, 3))
    drifts = c.rough((0.93, 0.95, 0.99), 0.05, 4, 9)
    return [sky, layer(firs, c.edge(trees), 0.6), layer(drifts, c.edge(ground), 1)]


def _desert(c: Canvas) -> list[Layer]:
    layers = [layer(c.ramp((0.98, 0.78, 0.42), (1.0, 0.95, 0.75)), 1, 0.1)]
    for height, colour, depth in (
        (0.36, (0.87, 0.6, 0.33), 0.3),
        (0.5, (0.93, 0.68, 0.38), 0.6),
        (0.72, (0.85, 0.56, 0.28), 1),
    ):
        dune = c.hills(height + c.rng.uniform(-0.03, 0.03))
        lit = 1.08 - 0.15 * np.clip(dune * 4, 0, 1)[..., None]
        layers.append(layer(c.rough(colour, 0.03, 5, 16) * lit, c.edge(dune), depth))
    return layers


def _road(c: Canvas) -> list[Layer]:
    horizon = c.rng.uniform(0.36, 0.42)
    fields = c.rough((0.42, 0.66, 0.3), 0.06, 12, 12)
    asphalt = c.rough((0.32, 0.32, 0.36), 0.04, 12, 12)
    shift = c.rng.uniform()
    for line, dashes in ((horizon + 0.13, 0), (0.8, 4)):
        stripe = 0.014 - np.abs(c.y - line)
        if dashes:
            stripe = np.minimum(stripe * 1.4, 0.3 - np.abs((c.x * dashes + shift) % 1 - 0.5))
        asphalt = mix(asphalt, (0.96, 0.94, 0.85), c.edge(stripe))
    return [c.sky(), layer(fields, c.edge(c.y - horizon), 0.5), layer(asphalt, c.edge(c.y - horizon - 0.1), 1)]


def _city(c: Canvas) -> list[Layer]:
    walls, shown = np.zeros((*c.shape, 3), np.float32), np.zeros(c.shape, np.float32)
    left = LEFT - c.rng.uniform(0, 0.15)
    while left < RIGHT:
        width, top = c.rng.uniform(0.18, 0.28), c.rng.uniform(0.06, 0.34)
        wall = ((0.72, 0.45, 0.38), (0.55, 0.5, 0.62), (0.78, 0.68, 0.52))[c.rng.integers(3)]
        inside = np.minimum(np.minimum(c.x - left, left + width - 0.012 - c.x), c.y - top)
        across = 0.25 - np.abs((c.x - left) / width * 3 % 1 - 0.5)
        windows = c.edge(0.06 * np.minimum(across, 0.28 - np.abs((c.y - top) * 9 % 1 - 0.5)))
        house = mix(np.broadcast_to(np.array(wall, np.float32), (*c.shape, 3)), (0.98, 0.88, 0.55), windows)
        walls, shown = mix(walls, house, c.edge(inside)), np.maximum(shown, c.edge(inside))
        left += width
    pavement = mix(c.rough((0.62, 0.6, 0.6), 0.03, 10, 10), (0.8, 0.79, 0.78), c.edge(0.02 - np.abs(c.y - 0.58)))
    sky = c.sky((0.7, 0.78, 0.85), (0.95, 0.93, 0.88))
    return [sky, layer(walls, shown, 0.6), layer(pavement, c.edge(c.y - 0.56), 1)]


_PLACES: dict[str, Callable[[Canvas], list[Layer]]] = {
    "beach": _beach,
    "grass": _grass,
    "snow": _snow,
    "desert": _desert,
    "road": _road,
    "city": _city,
}


@lru_cache(maxsize=2)
def layers(place: str, seed: int, side: int) -> list[Layer]:
    """A place's layers, from the farthest to the nearest; the seed chooses its details."""
    return _PLACES[place](Canvas(np.random.default_rng(seed), side))
