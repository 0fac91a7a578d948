"""What can be measured on a clip of the demo's world and its edits, by the classifier and the clip's known truth.

Pictures are [f, h, w, 3] in 0 … 1; places are pixels [f, 2].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..demo.world import LOOKS, Array, Scene
from ..tav_core.method import metrics
from .classifier import HEADS, Classifier

MOVES = 2.0  # pixels of standard deviation from which on an axis counts as moving


def labels(judge: Classifier, pictures: Tensor) -> list[dict[str, str]]:
    """What each frame shows: its object, background and style."""
    return [dict(zip(HEADS, seen, strict=True)) for seen in judge(channels_first(pictures)).labels()]


def right(judge: Classifier, pictures: Tensor, wanted: Scene) -> dict[str, float]:
    """Share of the frames that show the wanted object (any that its name may mean), background and style."""
    seen = labels(judge, pictures)
    allowed = {"object": LOOKS[wanted.object], "background": (wanted.background,), "style": (wanted.style,)}
    return {head: sum(frame[head] in allowed[head] for frame in seen) / len(seen) for head in HEADS}


def places(judge: Classifier, pictures: Tensor) -> Array:
    """Where the object is, as the classifier sees it."""
    size = torch.tensor([pictures.shape[2], pictures.shape[1]])
    return (judge(channels_first(pictures)).place * size).numpy()


def motion_correlation(places: Array, truth: Array) -> float:
    """Mean Pearson correlation over the axes along which the object moves; NaN when it stays in its place."""
    moving = [axis for axis in range(2) if truth[:, axis].std() > MOVES]
    if not moving:
        return float("nan")
    with np.errstate(invalid="ignore"):
        values = [np.corrcoef(places[:, axis], truth[:, axis])[0, 1] for axis in moving]
    return float(np.nan_to_num(values).mean())


def position_error(places: Array, truth: Array) -> float:
    """Mean distance between where the object is and where it should be, in pixels."""
    return float(np.linalg.norm(places - truth, axis=1).mean())


def frame_consistency(judge: Classifier, pictures: Tensor) -> float:
    """Mean cosine of the classifier's features of neighbouring frames.

    The field uses CLIP's image features in the same way; the demo has no CLIP.
    """
    return float(metrics.cosine_to_previous(judge.features(channels_first(pictures))).mean())


def flicker(pictures: Tensor, truth: Array, half: int = 24) -> float:
    """Mean of `path_changes`.

    The classifier's features tell where the object is, so that they count motion as a change; this does not, and sees
    an object that changes its look or leaves its path.
    """
    return float(path_changes(pictures, truth, half).mean())


def path_changes(pictures: Tensor, truth: Array, half: int = 24) -> Tensor:
    """Change, in 0 … 255, from frame to frame of a square of 2 * `half` pixels that goes with the object's path."""
    padded = pad(channels_first(pictures), (half, half, half, half), mode="replicate")
    corners = np.rint(truth).astype(int)
    squares = torch.stack([p[:, y : y + 2 * half, x : x + 2 * half] for p, (x, y) in zip(padded, corners, strict=True)])
    return metrics.flicker(squares)


def channels_first(pictures: Tensor) -> Tensor:
    return pictures.float().movedim(-1, 1)
