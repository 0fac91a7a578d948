"""What each pixel of a picture of world 2 shows, a figure in a look or a place; and the picture's style.

Trained on rendered pictures only, never on the text-to-image model's output, which it is there to judge. Many of them
are put together from two, each pixel with its own truth, so that half an object is seen as half an object, and what is
left of one around another as that.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .places import PLACES
from .sprites import FIGURES, LOOKS
from .styles import STYLES
from .world import Scene, Shown

WEIGHTS = Path(__file__).with_name("segmenter.safetensors")
CLASSES = (*FIGURES, *PLACES)  # of pixels
PLACE = len(FIGURES)  # the first class that is a place
NO_LOOK = 255  # in truths: pixels without a look


class Scores(NamedTuple):
    """Scores: of what a pixel shows, one of CLASSES, and of its look, [n, c, h, w]; of the style [n, c]."""

    shows: Tensor
    look: Tensor
    style: Tensor


class Truth(NamedTuple):
    """Class numbers: of pixels, uint8 [h, w] each; of the picture."""

    shows: np.ndarray
    look: np.ndarray
    style: int


def truth_of(scene: Scene, shown: Shown) -> Truth:
    """The right answer for a scene's picture."""
    shows = np.full(shown.masks.shape[1:], CLASSES.index(scene.place), np.uint8)
    look = np.full(shown.masks.shape[1:], NO_LOOK, np.uint8)
    for actor, mask in zip(scene.actors, shown.masks, strict=True):
        shows[mask], look[mask] = FIGURES.index(actor.figure), list(LOOKS).index(actor.look)
    return Truth(shows, look, list(STYLES).index(scene.style))


def _block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False), nn.GroupNorm(8, n_out), nn.SiLU()
    )


class Segmenter(nn.Module):
    """A small U-Net that answers at half the picture's resolution; about 0.8 M parameters."""

    def __init__(self, width: int = 24):
        super().__init__()
        sizes = (width, 2 * width, 4 * width, 6 * width)
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b, stride=2), _block(b, b)) if i else _block(a, b, stride=2)
            for i, (a, b) in enumerate(zip((3, *sizes), sizes, strict=False))
        )
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.pixels = nn.Conv2d(width, len(CLASSES) + len(LOOKS), 3, padding=1)
        self.picture = nn.Linear(2 * sizes[-1], len(STYLES))

    def forward(self, pictures: Tensor) -> Scores:
        """Look at pictures [n, 3, h, w] in 0 … 1."""
        x, kept = pictures * 2 - 1, []
        for stage in self.down:
            kept.append(x := stage(x))
        whole = self.picture(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        for stage, fine in zip(self.up, kept[-2::-1], strict=True):
            x = stage(torch.cat([interpolate(x, scale_factor=2.0, mode="nearest"), fine], 1))
        pixels = interpolate(self.pixels(x), scale_factor=2.0, mode="bilinear")
        return Scores(*pixels.split((len(CLASSES), len(LOOKS)), 1), whole)


def save(segmenter: Segmenter, file: Path, metadata: dict[str, str]) -> None:
    """Write the weights in float16."""
    save_file(
        {name: t.detach().cpu().half().contiguous() for name, t in segmenter.state_dict().items()}, file, metadata
    )


def load(file: Path = WEIGHTS) -> Segmenter:
    """The trained segmenter, in float32."""
    segmenter = Segmenter()
    segmenter.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return segmenter.eval().requires_grad_(False)
