"""Write small videos of every kind with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np

BLUE = 8  # from picture to picture: more than a codec loses


def picture(number, width=64, height=48):
    """A ramp to the right, another one downwards, and a blue that tells the number of the frame, up to 31."""
    across = np.tile(np.linspace(0, 250, width, dtype=np.uint8), (height, 1))
    down = np.tile(np.linspace(0, 250, height, dtype=np.uint8)[:, None], (1, width))
    return np.dstack([across, down, np.full((height, width), BLUE * number, np.uint8)])


def write_video(path, pictures, codec="libx264", pixels="yuv420p", rate=10, stamps=None, aspect=None, options=None):
    """`stamps`: the time of each picture in milliseconds; `aspect`: the width of pixels to their height.

    Little is lost, as how much differs from machine to machine.
    """
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=rate, options={"crf": "4", **(options or {})})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if stamps:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, array in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[2] == 4 else "rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[number], stream.time_base
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    return str(path)


def turn(path, a, b, c, d):
    """Write a display matrix into an mp4's header, as a phone does."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path.write_bytes(data[:at] + struct.pack(">9i", *values) + data[at + 36 :])
