"""Pictures that a judge must call wrong: made from rendered ones, a clip and its drawn edit, as a bad edit would be.

Pictures are float [f, h, w, 3]; masks of the old and the new object, bool [f, h, w].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """A clip, its drawn edit, the place without an object, and where either object is."""

    old: Tensor
    new: Tensor
    plate: Tensor
    old_mask: Tensor
    new_mask: Tensor


def chosen(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Pixels of `yes` where the mask, [f, h, w], is set, else of `no`."""
    return torch.where(mask[..., None], yes, no)


def middle(mask: Tensor) -> Tensor:
    """The centre of mass of each mask, y and x in pixels, [f, 2]."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in mask.shape[1:]), indexing="ij"))
    weight = mask.float().flatten(1)
    return weight @ grid.flatten(1).T / weight.sum(1, keepdim=True).clamp(min=1)


def _beyond(pair: Pair, axis: int) -> Tensor:
    """Pixels below (axis 0) or right of (1) the middle of both objects."""
    at = middle(pair.old_mask | pair.new_mask)[:, axis].view(-1, 1, 1)
    line = torch.arange(pair.old.shape[1 + axis], dtype=torch.float32)
    return (line[:, None] if axis == 0 else line[None]) > at


def left_half(pair: Pair) -> Tensor:
    """The new object's left half and the old one's right half."""
    return chosen(_beyond(pair, 1), pair.old, pair.new)


def right_half(pair: Pair) -> Tensor:
    return chosen(_beyond(pair, 1), pair.new, pair.old)


def upper_half(pair: Pair) -> Tensor:
    return chosen(_beyond(pair, 0), pair.old, pair.new)


def lower_half(pair: Pair) -> Tensor:
    return chosen(_beyond(pair, 0), pair.new, pair.old)


def halo(pair: Pair) -> Tensor:
    """The new object before the old one, which is seen around it."""
    return chosen(pair.new_mask, pair.new, pair.old)


def unchanged(pair: Pair) -> Tensor:
    return pair.old


def nothing(pair: Pair) -> Tensor:
    return pair.plate


def ghost(pair: Pair) -> Tensor:
    """Both at once, each half seen through."""
    return (pair.old + pair.new) / 2


def misplaced(pair: Pair, share: float = 0.3) -> Tensor:
    """The new object, shadow and all, that share of the side beside its place, to the side with more room."""
    side = pair.new.shape[2]
    moves = [round(share * side * (1 if x < side / 2 else -1)) for x in middle(pair.new_mask)[:, 1].tolist()]
    difference = pair.new - pair.plate
    return pair.plate + torch.stack([d.roll(move, 1) for d, move in zip(difference, moves, strict=True)])


OF_OBJECTS: dict[str, Callable[[Pair], Tensor]] = {
    "left half": left_half,
    "right half": right_half,
    "upper half": upper_half,
    "lower half": lower_half,
    "halo": halo,
    "unchanged": unchanged,
    "no object": nothing,
    "ghost": ghost,
    "misplaced": misplaced,
}


def patch(old: Tensor, new: Tensor, object_mask: Tensor, margin: int = 12) -> Tensor:
    """A new place in which the old one stayed around the object: in the object's box, `margin` pixels wider."""
    kept = torch.zeros_like(object_mask)
    for mask, kept_mask in zip(object_mask, kept, strict=True):
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
        kept_mask[top : int(rows[-1]) + 1 + margin, left : int(columns[-1]) + 1 + margin] = True
    return chosen(kept & ~object_mask, old, new)
