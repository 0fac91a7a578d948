"""Figures of an edit of a clip of world 2, by the segmenter and the clip's known truth.

Pictures are float [f, h, w, 3] in 0 … 1; masks bool [f, h, w].
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..strict import grown
from .segmenter import CLASSES, PLACE, Segmenter
from .sprites import FIGURES, LOOKS
from .styles import STYLES
from .world import Actor, Scene, draw, gait

LEAST_IOU = 0.6  # of a whole object's outline with the drawn one's
MOST_OTHERS = 0.04  # pixels of other figures, as a part of the object's
LARGEST_ISLAND = 0.02  # pixels of another place, connected, as a part of the picture's
SPECK = 0.04  # pixels of a figure, connected, as a part of all of its, that count for its outline
# IoU of a still object's outline with the nearest that the figure may have: what 98 of 100 drawn pictures of it reach,
# as the autoencoder passes them. Slender figures lose the most. It tells two turtles from one, not one with two heads.
LEAST_SHAPE = {
    **{"car": 0.88, "truck": 0.88, "dog": 0.7, "cat": 0.65, "elephant": 0.72, "penguin": 0.85, "turtle": 0.72},
    **{"running": 0.48, "walking": 0.62, "dancing": 0.58, "skiing": 0.47},
}
FITTED = 48  # pixels of the square in which outlines are compared


class Seen(NamedTuple):
    """What the segmenter sees: class numbers of pixels, one of CLASSES and one of LOOKS, [f, h, w]; of styles [f]."""

    shows: Tensor
    look: Tensor
    style: Tensor


@torch.inference_mode()
def look_at(segmenter: Segmenter, pictures: Tensor) -> Seen:
    parts = [segmenter(part) for part in pictures.float().movedim(-1, 1).split(32)]
    return Seen(*(torch.cat(scores).argmax(1) for scores in zip(*parts, strict=True)))


def whole_object(seen: Seen, figure: str, drawn: Tensor, mirrored: Tensor) -> Tensor:
    """Whether each frame shows a whole figure and nothing of another, bool [f].

    Outlines are compared a pixel wider than they are: the segmenter answers at half of the picture's resolution, where
    a bicycle is thinner than its pixels.

    Args:
        drawn, mirrored: masks of the drawn edit's object, and of it facing the other way, which no prompt can tell.
    """
    found = seen.shows == FIGURES.index(figure)
    outline, *wanted = (grown(mask, 1) for mask in (found, drawn, mirrored))
    overlap = torch.maximum(*(iou(outline, mask) for mask in wanted))
    others = ((seen.shows < PLACE) & ~found).sum((1, 2)) / drawn.sum((1, 2)).clamp(min=1)
    return (overlap >= LEAST_IOU) & (others <= MOST_OTHERS)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks, [f]."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def largest_island(mask: Tensor) -> int:
    """Pixels of the largest connected part of a mask [h, w]."""
    numbers, _ = label(mask.cpu().numpy())
    return int(np.bincount(numbers.ravel())[1:].max(initial=0))


def object_left(seen: Seen, figure: str, drawn: Tensor) -> Tensor:
    """Share of an edited-away object's pixels, outside the new one's, that still show it, [f].

    Args:
        drawn: masks of the old object's pixels that the drawn edit does not cover.
    """
    return ((seen.shows == FIGURES.index(figure)) & drawn).sum((1, 2)) / drawn.sum((1, 2)).clamp(min=1)


def figure_right(seen: Seen, figure: str) -> float:
    """Share of frames in which most of what is not the place is this figure: a person's verb, or a thing."""
    return float(np.mean([most(frame[frame < PLACE]) == FIGURES.index(figure) for frame in seen.shows]))


def whole_place(seen: Seen, place: str) -> Tensor:
    """Whether each frame is of this place, without an island of another one, bool [f]."""
    number = CLASSES.index(place)
    other = (seen.shows >= PLACE) & (seen.shows != number)
    island = torch.tensor([largest_island(frame) for frame in other])
    return (seen.shows == number).any(2).any(1) & (island <= LARGEST_ISLAND * other[0].numel())


def places(seen: Seen, figure: str) -> np.ndarray:
    """The middle of a figure's pixels in each frame, x and y in pixels, [f, 2]; NaN where there are none.

    For `measure.motion_correlation` and `position_error`; compare with `middles` of the truth's masks.
    """
    return middles(seen.shows == FIGURES.index(figure))


def middles(masks: Tensor) -> np.ndarray:
    """The middle of each mask, x and y in pixels, [f, 2]; NaN of an empty one."""
    with np.errstate(invalid="ignore"):
        weight = masks.sum((1, 2)).numpy()
        down, across = (masks.sum(axis).numpy() @ np.arange(masks.shape[3 - axis]) / weight for axis in (2, 1))
    return np.stack([across, down], 1)


def looks(seen: Seen) -> list[int]:
    """The look of most of the figures' pixels, in each frame; -1 where there is none."""
    return [most(look[shows < PLACE]) for shows, look in zip(seen.shows, seen.look, strict=True)]


def look_agreement(seen: Seen) -> float:
    """Share of frames with the look that most frames have."""
    found = np.array(looks(seen))
    return max(float(np.mean(found == look)) for look in range(len(LOOKS)))


def most(classes: Tensor) -> int:
    """The most frequent class; -1 of none."""
    return int(classes.bincount().argmax()) if len(classes) else -1


@cache
def outlines(figure: str) -> Tensor:
    """What a figure may look like: in every look, either way, four times of its gait, bool [n, FITTED, FITTED]."""
    scenes = [
        Scene((Actor(figure, look, size=0.8, pose=gait(figure, phase / 4, flip)),), "snow")
        for look, flip, phase in product(LOOKS, (False, True), range(4))
    ]
    return torch.stack([fitted(torch.from_numpy(draw(scene).masks[0])) for scene in scenes])


def fitted(mask: Tensor) -> Tensor:
    """A mask [h, w], moved and scaled so that it just fills a square, bool [FITTED, FITTED]; islands are left out."""
    numbers, count = label(mask.numpy())
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    kept = torch.from_numpy((sizes[numbers] > SPECK * mask.sum().item()) & mask.numpy())
    rows, columns = (kept.any(axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        return torch.zeros(FITTED, FITTED, dtype=torch.bool)
    shown = kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = shown.shape
    more = max(height, width) - torch.tensor([width, height])
    left, top = (more // 2).tolist()
    square = pad(shown[None, None].float(), (left, int(more[0]) - left, top, int(more[1]) - top))
    return interpolate(square, (FITTED, FITTED), mode="bilinear", antialias=True)[0, 0] >= 0.5


def picture_right(seen: Seen, wanted: Scene) -> list[dict[str, bool]]:
    """What of each still picture is as its prompt says: object, look (where it is told), place, style.

    An object is right if it is not tiny, other figures' pixels are at most MOST_OTHERS of its own, and its outline is
    like one that the figure may have.
    """
    actor = wanted.actors[0]
    number, may = FIGURES.index(actor.figure), outlines(actor.figure)
    rows = []
    for shows, look, style, place in zip(*seen, whole_place(seen, wanted.place), strict=True):
        found = shows == number
        size = int(found.sum())
        others = int((shows < PLACE).sum()) - size
        shapely = bool(iou(fitted(found).expand_as(may), may).max() >= LEAST_SHAPE[actor.figure])
        rows.append(
            {
                "object": size > 0.02 * shows.numel() and others <= MOST_OTHERS * size and shapely,
                "look": "look" not in actor.tells or most(look[found]) == list(LOOKS).index(actor.look),
                "place": bool(place),
                "style": int(style) == list(STYLES).index(wanted.style),
            }
        )
    return rows
