"""Which pictures of a video make the clip that is tuned on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .clip import check_clip, resize, too_short
from .video import File, Pictures, Shown

Unit = Literal["seconds", "frames"]
UNITS: tuple[str, ...] = get_args(Unit)
MAX_FPS = 1000.0
HALF_MS = Fraction(1, 2000)  # starts are given in milliseconds, and pictures seldom begin at one
JITTER = Fraction(4, 1000)  # seconds by which a picture may come too late and still be the one that is meant


class Wanted(NamedTuple):
    """What a clip is to hold.

    Attributes:
        start: in `unit`: seconds from the video's first picture, or the number of a frame, from 0.
        stride, count, width, height, fit: see `clip.prepare_clip`.
        resample_fps: brings the video to so many frames per second, by its time stamps, before the stride counts; with
            0 it keeps its own frames.
    """

    start: float
    unit: str
    stride: int
    count: int
    width: int
    height: int
    fit: str
    resample_fps: float = 0.0


class Clip(NamedTuple):
    """Frames [f, h, w, 3] in 0 to 1, float32; frames per second at its own speed; what was taken, in words."""

    frames: Tensor
    fps: float
    info: str


def load_clip(video: File | Pictures, wanted: Wanted) -> Clip:
    """The wanted frames of a video. Only these are converted, resized and kept.

    Raises ValueError when an input is out of its range, the video cannot be read, or it is too short (the message says
    what fits).
    """
    _check(wanted)
    try:
        frames = torch.empty(wanted.count, wanted.height, wanted.width, 3)
    except RuntimeError as error:  # torch's, where there is not so much memory
        raise ValueError(
            f"{wanted.count} frames of this size cannot be kept: lower count or the size ({error})."
        ) from None
    origin = next((each.begin for each in video.shown()), None)
    if origin is None:
        raise ValueError(f"the video has no pictures that can be read: choose one that plays.{video.end_note(0)}")
    begin = _begin(video, wanted, origin)
    shown = (each for each in video.shown(begin) if each.end > begin or each.begin >= begin)
    if wanted.resample_fps:
        shown = _resampled(shown, begin, Fraction(wanted.resample_fps), video)
    begins: list[int] = []
    number, last, picture = -1, None, None
    for number, last in enumerate(shown):
        if number % wanted.stride:
            continue
        if last.picture is picture:  # it is shown for more than one frame's time
            frames[len(begins)] = frames[len(begins) - 1]
        else:
            picture = last.picture
            frames[len(begins)] = _fitted(video, picture, wanted)
        begins.append(last.begin)
        if len(begins) == wanted.count:
            fps, words = _described(begins, origin, wanted, video)
            return Clip(frames, fps, f"{words} {video.about(picture)}")
    raise _short(video, wanted, origin, begin, number + 1, last)


def _check(wanted: Wanted) -> None:
    if wanted.unit not in UNITS:
        raise ValueError(f"start_unit is {wanted.unit[:20]!r}; it must be one of {', '.join(UNITS)}.")
    if not (math.isfinite(wanted.start) and wanted.start >= 0):
        raise ValueError(f"start is {wanted.start:g}; it is from 0.")
    if wanted.unit == "frames" and wanted.start % 1:
        raise ValueError(f"start is {wanted.start:g}, and there is no such frame: round it, or count in seconds.")
    if not 0 <= wanted.resample_fps <= MAX_FPS:
        raise ValueError(f"resample_fps is {wanted.resample_fps:g}; it is from 0 (the video's own) to {MAX_FPS:g}.")
    check_clip(0, *wanted[2:7])


def _fitted(video: File | Pictures, picture: Any, wanted: Wanted) -> Tensor:
    """One picture at the clip's size, [h, w, 3]."""
    planes, aspect = video.planes(picture)
    fitted = [resize(plane[None, ..., None], wanted.width, wanted.height, wanted.fit, aspect) for plane in planes]
    return torch.cat(fitted, -1)[0]


def _begin(video: File | Pictures, wanted: Wanted, origin: int) -> int:
    """When the clip begins, in ticks."""
    if wanted.unit == "seconds":
        return origin + int((Fraction(wanted.start) + HALF_MS) / video.tick)
    seen = 0
    for seen, begin in enumerate(video.begins(), 1):
        if seen > wanted.start:
            return begin
    raise too_short(seen, int(wanted.start), wanted.stride, wanted.count)


def _resampled(shown: Iterator[Shown], begin: int, fps: Fraction, video: File | Pictures) -> Iterator[Shown]:
    """What is shown at `begin` and every 1 / `fps` seconds after it."""
    due, late = Fraction(begin), 0
    for each in shown:
        while due + late < each.end:
            yield each
            due += 1 / fps / video.tick
            late = JITTER / video.tick


def _described(begins: list[int], origin: int, wanted: Wanted, video: File | Pictures) -> tuple[float, str]:
    """The frames per second of a clip whose pictures begin then, and what it is in words."""
    span, steps = begins[-1] - begins[0], [later - earlier for earlier, later in pairwise(begins)]
    from_s, to_s = (f"{float((begin - origin) * video.tick):.3f} s" for begin in (begins[0], begins[-1]))
    own = "" if not wanted.resample_fps else f" at {wanted.resample_fps:g} fps"
    at = from_s if wanted.unit == "seconds" else f"frame {wanted.start:.0f} ({from_s})"
    words = f"{wanted.count} frames at stride {wanted.stride}{own}, from {at} to {to_s}"
    if own:
        return wanted.resample_fps / wanted.stride, f"{words}."
    fps = video.rate / wanted.stride
    if span and abs(span * video.tick * fps - len(steps)) > 2 * video.tick * fps:
        fps = len(steps) / (span * video.tick)  # not the mean of the whole video
    if steps and max(steps) - min(steps) > max(2, span / len(steps) / 10):
        low, high = (float(step * video.tick) for step in (min(steps), max(steps)))
        words += f" (they are {low:.3g} to {high:.3g} s apart: set resample_fps to keep the time)"
    return float(fps), f"{words}."


def _short(
    video: File | Pictures, wanted: Wanted, origin: int, begin: int, seen: int, last: Shown | None
) -> ValueError:
    """Of a video that ends too early: after `seen` pictures from the clip's begin, the last of them `last`."""
    [end] = deque([last] if last else video.shown(begin), maxlen=1)
    note = video.end_note(float((end.end - origin) * video.tick))
    if last is None:
        start = math.floor(float((end.begin - origin) * video.tick) * 1000) / 1000
        return ValueError(f"start is {wanted.start:g} s, after the video's end. The last start is {start:g}.{note}")
    if wanted.unit == "frames" and not wanted.resample_fps:
        start = int(wanted.start)
        return too_short(start + seen, start, wanted.stride, wanted.count, note=note)
    where = f"{wanted.start:g} s" if wanted.unit == "seconds" else f"frame {wanted.start:.0f}"
    if wanted.resample_fps:
        where += f" at {wanted.resample_fps:g} fps"
    return too_short(seen, 0, wanted.stride, wanted.count, where, note)
