"""Make quickstart.mp4, the clip of the quickstart workflow as a video file. Run once; the result is committed.

python tools/pack.py lab.make_quickstart
"""

from fractions import Fraction
from pathlib import Path

import av

from ..demo.world import Clip, make_clip

FILE = Path(__file__).with_name("quickstart.mp4")
FPS = 8


def quickstart() -> Clip:
    """The clip itself, with the truth about it."""
    return make_clip("arc", "red car", "beach", frames=8, seed=0)


def main() -> None:
    with av.open(str(FILE), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "8", "preset": "veryslow"})
        frames = quickstart().frames
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
