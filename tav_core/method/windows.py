"""Long clips in bounded memory: which frames are computed together, and how their outputs become one video's.

A window holds the clip's first frame, which every frame's sparse-causal attention looks at, and others; the temporal
attention stays inside it. At much noise, where places and outlines come about, the others are spread over the whole
clip, so that its end knows of its middle; at little noise they are neighbours. The noise alone decides, so an inversion
stays the inverse of its sampling. In a tune they are always spread, for it to see the motion of the whole clip. Outputs
are blended as in MultiDiffusion (arXiv 2302.08113).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 4
SPREAD_FROM = 500  # timestep, of 1,000; measured beside other shares and anchor frames (docs/evaluation.md)


@dataclass(frozen=True)
class Windows:
    """How a clip is cut.

    Attributes:
        frames: computed at once, the clip's first among them; 0 takes the whole clip.
        overlap: frames that neighbours share, at least; without a meaning where `frames` is 0.

    Raises ValueError when a window is too short, or overlaps by half of itself or more.
    """

    frames: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.frames and not self.frames >= LEAST:
            raise ValueError(f"window is {self.frames}; it needs {LEAST} frames or more, 0 takes the whole clip.")
        if self.frames and not 0 <= self.overlap < self.frames / 2:
            raise ValueError(
                f"overlap is {self.overlap}; it must be from 0 to below half of the window, which is {self.frames}."
            )

    def at_once(self, clip: int) -> int:
        """How many frames of a clip are computed at once."""
        return min(self.frames or clip, clip)

    def cuts(self, clip: int) -> bool:
        """Whether a clip is longer than a window."""
        return 0 < self.frames < clip

    def for_tuning(self, clip: int) -> list[list[int]]:
        """The windows that a step of a tune may be: the clip's first frame, and others as far apart as leaves none out.

        Of runs of neighbours, a tune learned less of the clip's motion (docs/evaluation.md).
        """
        run = self.at_once(clip) - 1
        stride = (clip - 1) // run
        return [[0, *range(start, start + stride * run, stride)] for start in range(1, clip - stride * (run - 1))]

    def of(self, clip: int, timestep: float = 0) -> list[list[int]]:
        """The fewest windows that cover a clip of so many frames: runs of neighbours, or all spread over the clip."""
        run = self.at_once(clip) - 1
        last = clip - 1 - run
        if last and timestep >= SPREAD_FROM:
            count = -(-(clip - 1) // (self.frames - 1))
            return [[0, *range(1 + i, clip, count)] for i in range(count)]
        step = self.frames - 1 - self.overlap  # the first frame is everywhere, and no overlap
        gaps = -(-last // step) if last else 0
        starts = [1 + round(i * last / max(gaps, 1)) for i in range(gaps + 1)]
        return [[0, *range(start, start + run)] for start in starts]


WHOLE = Windows()


def blended(windows: list[list[int]], clip: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
    """The output for a whole clip of each window's: `(b f) …` from `(b w) …`.

    Weights fall from a window's middle to its ends (triangular), and sum to one for each frame. The clip's first frame
    is taken from the first window, where the second one is.

    Args:
        compute: the output of a window, for the numbers of its frames in the clip.
    """
    weights = torch.zeros(len(windows), clip, dtype=torch.float64)
    weights[0, 0] = 1
    for row, (_first, *frames) in zip(weights, windows, strict=True):
        run = len(frames)
        row[frames] = torch.minimum(torch.arange(1, run + 1), torch.arange(run, 0, -1)).double()
    weights /= weights.sum(0)
    out: Tensor | None = None
    for row, frames in zip(weights, windows, strict=True):
        part = compute(frames).unflatten(0, (-1, len(frames)))  # b w …
        if out is None:
            out = part.new_zeros(part.shape[0], clip, *part.shape[2:])
        weighted = part * row[frames].to(part).view(-1, *[1] * (part.ndim - 2))
        out.index_add_(1, torch.tensor(frames).to(out.device), weighted)
    assert out is not None
    return out.flatten(0, 1)
