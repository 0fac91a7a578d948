"""A strict judgement of an edit to another object in the demo's world: the pictures against the drawn edit.

The classifier calls half a truck on half a car right. Here every frame is measured against what the world would draw,
as the autoencoder passes it: the new object's outline, its pixels, and what is left of the old one. Pictures are float
[f, h, w, 3] in 0 … 1, masks bool [f, h, w]; clips are of the plain style.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from ..demo import world
from ..demo.world import Clip, Scene
from ..tav_core.pictures import image

VISIBLE = 0.12  # difference in a channel from which on two pixels are not alike
OLD = 0.4  # part of the way from the drawn pixel to the source's at which the old object is seen through
SIZES = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)  # of the sprites that are tried where none are given
REACH = 20  # pixels around its place within which an object is looked for
LEAST_IOU, MOST_OLD, FIT_BELOW = 0.6, 0.08, 6.0  # what a whole object must reach; dB below the drawn one's fit


class Fit(NamedTuple):
    """The sprite that fits each frame best: PSNR inside it, dB [f]; centre in pixels [f, 2]; flip and size [f]."""

    psnr: Tensor
    places: Tensor
    flips: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Truth:
    """An edit of a clip's object as the world draws it.

    Attributes:
        object: one of `world.OBJECTS`.
        source, drawn, mirrored, plate: the clip; the edit; the edit facing the other way, which no prompt can tell; the
            place without an object. All as the autoencoder passes them.
        old, new: masks of the two objects.
        places: the object's centres in pixels, [f, 2].
        sizes: of the sprites that are tried.
        fit: how well the drawn edit's pixels fit the object's sprite, dB [f].
    """

    object: str
    source: Tensor
    drawn: Tensor
    mirrored: Tensor
    plate: Tensor
    old: Tensor
    new: Tensor
    places: Tensor
    sizes: tuple[float, ...]
    fit: Tensor


def truth(clip: Clip, object: str, through: Callable[[Tensor], Tensor] = lambda pictures: pictures) -> Truth:
    """What the edit of a clip's object to another should show.

    Args:
        through: the autoencoder there and back, so that its faults are not counted as the edit's.

    Raises ValueError when the clip is not of the plain style, or the world has no such object.
    """
    if any(scene.style != "plain" for scene in clip.scenes):
        raise ValueError("Only clips of the plain style can be judged strictly.")
    if object not in world.OBJECTS:
        raise ValueError(f"object is {object!r}; expected one of: {', '.join(world.OBJECTS)}.")
    new = [replace(scene, object=object) for scene in clip.scenes]
    mirrored = [replace(scene, flip=not scene.flip) for scene in new]
    away = [replace(scene, x=9, y=9) for scene in clip.scenes]
    source, drawn, turned, plate = (through(rendered(scenes)) for scenes in (clip.scenes, new, mirrored, away))
    places = torch.from_numpy(clip.positions)
    drawn_sizes = [scene.size for scene in clip.scenes]
    sizes = tuple(np.linspace(0.88 * min(drawn_sizes), 1.12 * max(drawn_sizes), 7).tolist())
    best = fit(drawn, object, places, sizes).psnr
    return Truth(object, source, drawn, turned, plate, masks(clip.scenes), masks(new), places, sizes, best)


def rendered(scenes: list[Scene]) -> Tensor:
    return image.from_bytes(np.stack([world.render(scene) for scene in scenes]))


def masks(scenes: list[Scene]) -> Tensor:
    """Where each scene's object is."""
    return torch.from_numpy(np.stack([np.asarray(world.placed(scene))[..., 3] > 127 for scene in scenes]))


def judge(truth: Truth, pictures: Tensor) -> dict[str, float]:
    """The figures of one edit.

    Returns:
        whole: share of frames with a whole new object (see `whole`).
        iou, old_left, fit: means over the frames.
        background: PSNR in dB to the source, outside of both objects and their shadows.
    """
    outside = ~grown(seen(truth.source, truth.plate, 0) | seen(truth.drawn, truth.plate, 0), 3)
    shape = iou(truth, pictures), old_left(truth, pictures), fit(pictures, truth.object, truth.places, truth.sizes).psnr
    return {
        "whole": float(whole(truth, *shape).float().mean()),
        **{name: float(values.mean()) for name, values in zip(("iou", "old_left", "fit"), shape, strict=True)},
        "background": psnr_within(pictures, truth.source, outside),
    }


def psnr_within(a: Tensor, b: Tensor, where: Tensor) -> float:
    """In dB, of the pixels `where`, bool [f, h, w], of all frames at once."""
    return float(-10 * (a - b).square().mean(-1)[where].mean().log10())


def whole(truth: Truth, iou: Tensor, old_left: Tensor, fit: Tensor) -> Tensor:
    """Whether each frame shows the whole new object and nothing of the old one, by its figures [f]; bool [f].

    Its outline overlaps the drawn one's by LEAST_IOU, at most MOST_OLD of the old object is left, and its pixels fit
    the new one's sprite at most FIT_BELOW dB worse than the drawn edit's do. Chosen on 24 drawn edits, two frames each,
    through the autoencoder. Called right: the edit with grain and mirrored 100 %, 7 % smaller and beside its place 98 %
    (it fits at most 2.9 dB worse); halves, ghosts, the old object, none, or the new one elsewhere 0 % (4.2 to 19 dB
    worse); the new object before the old one 23 %, where at most 12 % of the old one stick out.
    """
    return (iou >= LEAST_IOU) & (old_left <= MOST_OLD) & (fit >= truth.fit - FIT_BELOW)


def iou(truth: Truth, pictures: Tensor) -> Tensor:
    """How well the outline of what stands in the picture overlaps the drawn edit's, or its mirror image's, [f]."""
    area = grown(truth.old | truth.new, 12)

    def overlap(wanted: Tensor) -> Tensor:
        a, b = (seen(x, truth.plate) & area for x in (pictures, wanted))
        return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)

    return torch.maximum(overlap(truth.drawn), overlap(truth.mirrored))


def old_left(truth: Truth, pictures: Tensor) -> Tensor:
    """Share of the old object that is still there, [f]: of its pixels that the edit should change visibly.

    A pixel shows the old object where it is not the place's and lies between the drawn edit's and the source's, at
    least OLD of the way. The smaller share of two: compared with the drawn edit, and with its mirror image.
    """
    stands = distance(pictures, truth.plate) > VISIBLE

    def share(drawn: Tensor) -> Tensor:
        changes = truth.old & (distance(truth.source, drawn) > VISIBLE)
        way = truth.source - drawn
        part = ((pictures - drawn) * way).sum(-1, keepdim=True) / way.square().sum(-1, keepdim=True).clamp(min=1e-6)
        part = part.clamp(0, 1)
        stayed = changes & stands & (part[..., 0] >= OLD) & (distance(pictures, drawn + part * way) < VISIBLE)
        return stayed.sum((1, 2)) / changes.sum((1, 2)).clamp(min=1)

    return torch.minimum(share(truth.drawn), share(truth.mirrored))


def fit(pictures: Tensor, object: str, places: Tensor, sizes: tuple[float, ...] = SIZES, reach: int = REACH) -> Fit:
    """The size, direction and place of an object's sprite that fit each frame best, by the error inside the sprite.

    Args:
        object: one of `world.OBJECTS`.
        places: where to look, in pixels [f, 2], and `reach` pixels around.
    """
    half = reach + int(max(sizes) * world.SIDE / 2) + 1  # of a window that holds the sprite wherever it may be
    corners = places.round().long()
    padded = pad(pictures.movedim(-1, 1), (half, half, half, half))
    inside = pad(torch.ones(1, *pictures.shape[1:3]), (half, half, half, half)).expand(len(pictures), -1, -1)
    window, known = (
        torch.stack(
            [x[..., b : b + 2 * half, a : a + 2 * half] for x, (a, b) in zip(whole, corners.tolist(), strict=True)]
        )
        for whole in (padded, inside)
    )
    light, square, known = (torch.fft.rfft2(x) for x in (window, window**2, known))
    steps = torch.cat([torch.arange(reach + 1), torch.arange(-reach, 0)])  # as the transform orders them
    tries, psnrs, moves = list(product(sizes, (False, True))), [], []
    for size, flip in tries:
        mask, colours, squares, area = _template(object, size, flip, half)
        error = (square * mask).sum(1) - 2 * (light * colours).sum(1) + known * squares
        error, covered = (
            torch.fft.irfft2(x, s=(2 * half, 2 * half))[:, steps][..., steps] for x in (error, known * mask)
        )
        error = (error / (3 * covered.clamp(min=1))).masked_fill(covered < 0.7 * area, torch.inf)
        value, at = error.flatten(1).min(1)
        psnrs.append(-10 * value.clamp(min=1e-9).log10())
        moves.append(steps[torch.stack([at % len(steps), at // len(steps)], 1)])
    psnr, best = torch.stack(psnrs).max(0)
    best_sizes, flips = (torch.tensor(values)[best] for values in zip(*tries, strict=True))
    return Fit(psnr, corners + torch.stack(moves)[best, torch.arange(len(pictures))], flips, best_sizes)


@lru_cache(maxsize=256)
def _template(object: str, size: float, flip: bool, half: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """A sprite in the middle of a window, to correlate: spectra of its mask, colours, summed squares; its area."""
    side = world.SIDE
    scene = Scene(object, "beach", x=half / side, y=half / side, size=size, flip=flip)
    placed = np.asarray(world.placed(scene, side, 2 * half)).astype(np.float32) / 255
    mask = torch.from_numpy((placed[..., 3] > 0.8).astype(np.float32))
    colours = mask * torch.from_numpy(placed[..., :3].copy()).movedim(-1, 0)
    spectra = (torch.fft.rfft2(x).conj() for x in (mask, colours, (colours**2).sum(0)))
    return (*spectra, float(mask.sum()))


def seen(pictures: Tensor, plate: Tensor, darkest: float = 0.5) -> Tensor:
    """Where something stands before the place, not only a shadow that leaves `darkest` of the light; bool [f, h, w]."""
    light = (pictures * plate).sum(-1, keepdim=True) / plate.square().sum(-1, keepdim=True).clamp(min=1e-6)
    shadow = light.clamp(darkest, 1) if darkest else 1
    return distance(pictures, shadow * plate) > VISIBLE


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of a channel, of the means of 3 x 3 pixels, [f, h, w]."""
    return avg_pool2d((a - b).movedim(-1, 1), 3, 1, 1, count_include_pad=False).abs().amax(1)


def grown(mask: Tensor, pixels: int) -> Tensor:
    return max_pool2d(mask[:, None].float(), 2 * pixels + 1, 1, pixels)[:, 0] > 0
