"""Videos as a run of pictures, each with the time for which it is shown; files are decoded only as far as is asked."""

from __future__ import annotations

import heapq
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

THREADS = 2  # each holds pictures at full size, 12 MiB at 4K
ONE_PACKET_A_PICTURE = {"h264", "hevc", "vp9", "av1"}  # so that they can be counted without being decoded
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these drop it
LAYOUTS = {  # of pixels, by whether they have alpha and more than 8 bits
    (False, False): "rgb24",
    (False, True): "rgb48le",
    (True, False): "rgba",
    (True, True): "rgba64le",
}
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics, as ITU-T H.273 numbers them


class Shown(NamedTuple):
    """A picture, as its video has it, and from when until when it is shown, in ticks."""

    picture: Any
    begin: int
    end: int


@dataclass
class Pictures:
    """A video whose frames are in memory already.

    Attributes:
        images: IMAGE, [b, h, w, 3 or 4], 0 to 1.
        rate: frames per second.
        tick: seconds of the unit in which its times are counted.
    """

    images: Tensor
    rate: Fraction

    def __post_init__(self) -> None:
        self.tick = 1 / self.rate

    def shown(self, at: int = 0) -> Iterator[Shown]:
        """Its pictures from `at` on, and at least the last."""
        at = min(at, len(self.images) - 1)
        for number, image in enumerate(self.images[at:], at):
            yield Shown(image, number, number + 1)

    def begins(self) -> Iterable[int]:
        """When each picture begins."""
        return range(len(self.images))

    def planes(self, picture: Any) -> tuple[Iterator[Tensor], float]:
        """A picture's red, green and blue, [h, w] in 0 to 1, on black; and the width of its pixels to their height."""
        return _planes(picture, 1), 1.0

    def about(self, picture: Any) -> str:
        height, width = picture.shape[:2]
        return f"Frames in memory: {len(self.images)} of {width} x {height} pixels, {float(self.rate):.6g} fps."

    def end_note(self, _seconds: float) -> str:
        return ""


@dataclass
class File:
    """A video file. Each method opens it anew, and has closed it when it is through.

    Attributes:
        source: its path, or its bytes.
        trim: seconds on its own clock of its start (negative: from its end) and length (0: all the rest), as the host
            trims a VIDEO.
        stop: called for each packet that is read; what it raises ends the reading.
        rate: mean frames per second.
        tick: seconds of the unit in which its times are counted.

    Raises ValueError when it is no video that can be read.
    """

    source: str | BytesIO
    trim: tuple[float, float] = (0.0, 0.0)
    stop: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.name = "the video" if isinstance(self.source, BytesIO) else os.path.basename(self.source)
        self.broken = False
        self.damaged = 0  # pictures that were returned, but not decoded whole
        self.orientation = (False, False, False)
        with self._open() as container:
            stream = self._stream(container)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 24)
            self.tick = Fraction(stream.time_base or Fraction(1, 1000))
            self.step = max(round(1 / self.rate / self.tick), 1)
            self.aspect = float(stream.sample_aspect_ratio or 1)
            self.hdr = HDR.get(int(stream.codec_context.color_trc or 0))
            whole = (container.duration or 0) / av.time_base
            self.length = float(stream.duration * self.tick) if stream.duration else whole
            # Bare streams have no time stamps, and AVI has them in the order of coding.
            self.stamped = stream.start_time is not None and container.format.name != "avi"
            start, length = self.trim
            start = max(whole + start, 0) if start < 0 else start
            self.trim_begin = int(start / self.tick) if any(self.trim) else None
            self.trim_end = int((start + length) / self.tick) if length else None

    def shown(self, at: int | None = None) -> Iterator[Shown]:
        """Its pictures in the order of showing, from the one shown at `at` or one before it, or from the first."""
        at = self.trim_begin if at is None else at
        for (frame, begin), (_, end) in pairwise(self._stamps(self._frames(at))):
            if self.trim_end is not None and begin >= self.trim_end:
                return
            if self.trim_begin is None or begin >= self.trim_begin:
                yield Shown(frame, begin, end if self.trim_end is None else min(end, self.trim_end))

    def begins(self) -> Iterable[int]:
        """When each picture begins, in the order of showing."""
        with self._open() as container:
            counted = self.stamped and self._stream(container).codec_context.name in ONE_PACKET_A_PICTURE
        return self._begins_of_packets() if counted else (each.begin for each in self.shown())

    def planes(self, picture: Any) -> tuple[Iterator[Tensor], float]:
        """A picture's red, green and blue, [h, w] in 0 to 1, upright and on black; and the aspect of its pixels.

        They come one after the other, since as float32 each takes more than the picture.
        """
        self.damaged += picture.is_corrupt
        deep = max(part.bits for part in picture.format.components) > 8
        # Not to_ndarray, which makes a copy: a picture of 4K and 16 bits is 50 MiB.
        plane = picture.reformat(format=LAYOUTS[_has_alpha(picture), deep]).planes[0]
        rows = np.frombuffer(plane, np.uint16 if deep else np.uint8).reshape(picture.height, -1)
        channels = 4 if _has_alpha(picture) else 3
        pixels = torch.from_numpy(rows[:, : channels * picture.width]).unflatten(1, (picture.width, channels))
        turned, *mirrored = self.orientation
        if turned:
            pixels = pixels.transpose(0, 1)
        if any(mirrored):
            pixels = pixels.flip([axis for axis, mirror in zip((1, 0), mirrored, strict=True) if mirror])
        return _planes(pixels, 65535 if deep else 255), 1 / self.aspect if turned else self.aspect

    def about(self, picture: Any) -> str:
        """What it is, and what was done to its pictures, of which this is one."""
        size = f"{picture.width} x {picture.height} pixels"
        length = f", {self.length:.6g} s" if self.length else ""
        notes = [f"{self.name}: {size}, {float(self.rate):.6g} fps{length}."]
        if any(self.trim):
            notes.append(f"It is trimmed: start {self.trim[0]:g} s, length {self.trim[1]:g} s.")
        if any(self.orientation):
            notes.append("It was turned upright, as its header says.")
        if self.aspect != 1:
            notes.append(f"Its pixels, {self.aspect:.4g} times as wide as high, were made square.")
        if _has_alpha(picture):
            notes.append("What is transparent was put on black.")
        if self.hdr:
            notes.append(f"It is HDR ({self.hdr}); its colours were taken as they are and may look pale.")
        if self.damaged:
            notes.append(f"Damaged frames among them: {self.damaged}.")
        return " ".join(notes)

    def end_note(self, seconds: float) -> str:
        """What may be wrong with it, if its pictures end after so many seconds."""
        if self.broken:
            return f" {self.name} is damaged or cut off at {seconds:.3f} s: copy it again, or take an earlier part."
        if self.trim_end is None and self.length > seconds + 0.5:
            return f" {self.name} should last {self.length:.6g} s, its pictures end at {seconds:.3f} s: is it cut off?"
        return ""

    # --- reading ---

    def _open(self) -> Any:
        if isinstance(self.source, BytesIO):
            self.source.seek(0)
        try:
            return av.open(self.source)
        except (FFmpegError, OSError) as error:
            raise ValueError(self._unreadable(error.strerror or str(error))) from None

    def _unreadable(self, reason: str) -> str:
        if isinstance(self.source, BytesIO):
            head = self.source.getvalue()[:8]
        elif os.path.isfile(self.source):
            with open(self.source, "rb") as file:
                head = file.read(8)
        else:
            return f"{self.name} cannot be found: choose it again in Load Video."
        if not head:
            return f"{self.name} is empty (0 bytes): copy or download it again."
        if head[4:] == b"ftyp":
            return (
                f"{self.name} is cut off: the list of its pictures, at its end, is missing. Copy or download it again."
            )
        return f"{self.name} is no video that can be read ({reason}): choose an mp4, mov, mkv, webm or gif file."

    def _stream(self, container: Any) -> av.VideoStream:
        kind = container.format.name
        if kind in ("image2", "tty") or kind.endswith("_pipe"):
            raise ValueError(f"{self.name} is a picture, not a video: use Load Image and Prepare Clip.")
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{self.name} holds sound or text, but no moving pictures: choose a video.")
        if streams[0].codec_context is None:
            raise ValueError(f"{self.name} is in a format that cannot be decoded: convert it to an mp4 with H.264.")
        return streams[0]

    def _frames(self, at: int | None) -> Iterator[av.VideoFrame]:
        """Its frames in the order of showing, from a keyframe that is shown at `at` or before; None for all."""
        position = None if at is None or not self.stamped else self._seekable(at)
        self.broken, seen = False, False
        with self._open() as container:
            stream = self._stream(container)
            decoder: Any = stream.codec_context
            if decoder.name in WITH_ALPHA and stream.metadata.get("alpha_mode") == "1":
                decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
            decoder.thread_type, decoder.thread_count = "AUTO", THREADS
            if position is not None:
                container.seek(position, stream=stream)
            try:
                for packet in container.demux(stream):
                    self.stop()
                    self.broken = packet.is_corrupt
                    if self.broken and seen:
                        # Of what is shown from now on some is missing: pictures are coded in another order.
                        yield from (frame for frame in decoder.decode(None) if (frame.pts or 0) < (packet.dts or 0))
                        return
                    if self.broken:  # the rest of a picture before the first whole one
                        continue
                    for frame in decoder.decode(packet):
                        if not seen:
                            self.orientation = _orientation(frame)
                        seen = True
                        yield frame
            except FFmpegError:
                self.broken = True

    def _seekable(self, at: int) -> int | None:
        """Where to seek for a keyframe that is shown at `at` or before; None for the file's start.

        Pictures that are shown before their keyframe, but coded after it, need the one before as well (open GOP), and
        some formats go to the next picture of any kind.
        """
        back = 0
        with self._open() as container:
            stream = self._stream(container)
            while at - back > (stream.start_time or 0):
                try:
                    container.seek(at - back, stream=stream)
                    keys = (packet.pts for packet in container.demux(stream) if packet.is_keyframe)
                    key = next(keys, None)
                except FFmpegError:  # such as a bare stream, which has no times
                    return None
                if key is not None and key <= at:
                    return at - back
                back = 2 * back or round(1 / self.tick)
        return None

    def _stamps(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[Any, int]]:
        """(frame, when it begins), and at last (None, when the last one ends)."""
        begin: int | None = None
        length = 0
        for frame in frames:
            pts = frame.pts if self.stamped else None
            if begin is None:
                begin = pts or 0
            elif pts is None or pts < begin:
                begin += self.step
            else:
                begin = pts
            length = getattr(frame, "duration", 0) or self.step  # older PyAV has none
            yield frame, begin
        if begin is not None:
            yield None, begin + length

    def _begins_of_packets(self) -> Iterator[int]:
        first = next(iter(self.shown())).begin
        waiting: list[int] = []  # packets come in the order of coding
        with self._open() as container:
            for packet in container.demux(self._stream(container)):
                self.stop()
                while waiting and packet.dts is not None and waiting[0] <= packet.dts:
                    yield heapq.heappop(waiting)
                if packet.pts is not None and not packet.is_discard and packet.pts >= first:
                    heapq.heappush(waiting, packet.pts)
        yield from (heapq.heappop(waiting) for _ in range(len(waiting)))


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def _planes(pixels: Tensor, white: int) -> Iterator[Tensor]:
    """[h, w, 3 or 4] of 0 to `white` to three of [h, w]; what is transparent is put on black."""
    for channel in range(3):
        plane = pixels[..., channel].to(torch.float32, copy=True).div_(white)
        yield plane.mul_(pixels[..., 3].float().div_(white)) if pixels.shape[-1] == 4 else plane


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to bring a frame upright: swap its axes, then mirror it left to right, then top to bottom.

    From the display matrix [a b u; c d v; x y w] of its header, which takes (x, y) to (a x + c y, b x + d y); turns
    that are no quarter are rounded to one. To ask makes a frame and its side data refer to each other, so that they
    stay in memory for a while.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    return turned, (c if turned else a) < 0, (b if turned else d) < 0
