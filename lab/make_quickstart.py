"""Make quickstart.mp4, the clip of the quickstart workflow as a video file. Run once; the result is committed.

python tools/pack.py lab.make_quickstart
"""

from fractions import Fraction
from pathlib import Path

from ..demo.world import Clip, make_clip
from .job import write_video

FILE = Path(__file__).with_name("quickstart.mp4")
FPS = 8


def quickstart() -> Clip:
    """The clip itself, with the truth about it."""
    return make_clip("arc", "red car", "beach", frames=8, seed=0)


def main() -> None:
    write_video(FILE, quickstart().frames, Fraction(FPS), crf="8", preset="veryslow")


if __name__ == "__main__":
    main()
