"""Compare Videos: what lies where, pixel by pixel."""

import measure
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tune_a_video.nodes.compare import CompareVideos
from tune_a_video.tav_core.pictures import lettering
from tune_a_video.tav_core.pictures.compare import GAP, LARGEST, side_by_side
from tune_a_video.tav_core.pictures.image import AT_ONCE


def clip(frames=3, height=16, width=24, channels=3, seed=0):
    return torch.rand(frames, height, width, channels, generator=torch.Generator().manual_seed(seed))


def compare(*clips, labels=()):
    return side_by_side({f"video_{i}": clip for i, clip in enumerate(clips, 1)}, labels)


@pytest.mark.parametrize(
    ("number", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 2, 3), (6, 2, 3)]
)
def test_clips_of_one_size_are_there_unchanged(number, rows, columns):
    clips = [clip(seed=i) for i in range(number)]
    out = compare(*clips)
    assert out.shape == (3, rows * 16 + (rows - 1) * GAP, columns * 24 + (columns - 1) * GAP, 3)
    left = torch.ones(out.shape[1:3], dtype=torch.bool)
    for i, expected in enumerate(clips):
        y, x = i // columns * (16 + GAP), i % columns * (24 + GAP)
        assert torch.equal(out[:, y : y + 16, x : x + 24], expected)
        left[y : y + 16, x : x + 24] = False
    assert (out[:, left] == 1).all(), "the rest is white"


def test_shorter_clips_hold_their_last_frame_and_odd_sides_become_even():
    long, picture = clip(5, 15, 21), clip(1, 15, 22, seed=1)
    out = compare(long, picture)
    assert out.shape == (5, 16, 46, 3)
    assert torch.equal(out[:, :15, :21], long)
    assert torch.equal(out[:, :15, 23:45], picture.expand(5, -1, -1, -1))
    assert (out[:, 15] == 1).all() and (out[:, :, 45] == 1).all()


def test_heights_become_the_first_ones_and_aspects_stay():
    out = compare(clip(height=16, width=16), clip(height=32, width=64), torch.full((2, 8, 4, 3), 0.25))
    assert out.shape == (3, 16, 16 + GAP + 32 + GAP + 8, 3)
    assert torch.allclose(out[:, :, -8:], torch.tensor(0.25))


def test_transparent_grey_and_half_precision_clips():
    red = torch.zeros(1, 16, 24, 4)
    red[..., 0], red[:, :, :12, 3] = 1, 1  # its right half is transparent
    grey = clip(channels=1)
    out = compare(red, grey, clip(seed=2).half(), clip(seed=3).double() * 3 - 1)
    assert torch.equal(out[0, 0, 0], torch.tensor([1.0, 0, 0])) and torch.equal(out[0, 0, 23], torch.ones(3))
    assert torch.equal(out[:, :16, 24 + GAP :], grey.expand(-1, -1, -1, 3))
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1


def test_labels_stand_above_their_clips():
    clips = [clip(width=96, seed=i) for i in range(4)]
    out = compare(*clips, labels=["", "a dog", "", "", "one too many"])
    title = out.shape[1] - 2 * 16 - GAP
    assert title > lettering.line_height(12) and torch.equal(out[:, title : title + 16, :96], clips[0])
    assert (out[:, :title, : 96 + GAP] == 1).all(), "the first has none"
    assert (out[:, :title, 96 + GAP :] < 0.5).any()
    assert torch.equal(out[:, -16:, :96], clips[2]), "the second row has none, and no room for them"


TEXTS = [
    "",
    " ",
    "a dog",
    "a" * 99,
    "狗在沙滩上",
    "عربي ↔ עברית",
    "e\u0301 🐕\u200d🦺",
    "\ud800",
    "\0\t\x1b\x1e",
    "a b\nc\r\n",
    "x" * 10**6,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [1, 60])
def test_any_text_keeps_to_its_width(text, width):
    lines = lettering.wrap(text, width, most=3)
    assert len(lines) <= 3
    assert any(lines) == any(map(str.isprintable, "".join(text.split()))), "what can be seen is not left out"
    for line in lines:
        canvas = Image.new("RGB", (1000, 40), lettering.PAPER)
        lettering.write(canvas, (0, 0), [line])
        box = Image.eval(canvas, lambda value: 255 - value).getbbox()
        assert box is None or box[2] <= width + 2 or len(line) <= 2


def test_long_texts_break_at_spaces_and_end_in_an_ellipsis():
    assert lettering.wrap("a red car on the beach", 70) == ["a red car on", "the beach"]
    first, second = lettering.wrap("a red car on the beach", 60, most=2)
    assert first in "a red car" and second.endswith("…")


def test_letters_that_pillows_font_lacks_are_drawn_where_the_system_has_them():
    from PIL import ImageFont

    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("this system has no DejaVu Sans")
    font = lettering._font("Жё", 12)
    assert lettering._lacking(font, "Жё") == 0 < lettering._lacking(ImageFont.load_default(12), "Жё")


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), sizes, sizes, st.sampled_from([1, 3, 4])), min_size=1, max_size=7),
    labels=st.lists(st.text(max_size=40), max_size=8),
)
def test_the_first_clip_is_whole_and_the_sides_are_even_whatever_comes(shapes, labels):
    clips = [torch.rand(*shape) for shape in shapes]
    out = compare(*clips, labels=labels)
    assert len(out) == max(shape[0] for shape in shapes)
    assert not out.shape[1] % 2 and not out.shape[2] % 2 and out.shape[3] == 3
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    if shapes[0][3] == 3:
        frames, height, width, _ = shapes[0]
        windows = out[:frames, :, :width].unfold(1, height, 1).permute(1, 0, 4, 2, 3)
        assert any(torch.equal(window, clips[0]) for window in windows)


def test_bad_clips_are_named():
    for bad in (clip()[0], clip()[:0], clip(channels=2), clip().mul(255).byte()):
        with pytest.raises(ValueError, match="video_2 has no frames: connect images"):
            compare(clip(), bad)
    with pytest.raises(
        ValueError, match="video_2 holds NaN or infinite pixels: a VAE .* with --bf16-vae or --fp32-vae"
    ):
        side_by_side({"video_1": torch.zeros(2, 8, 8, 3), "video_2": torch.full((2, 8, 8, 3), torch.nan)})
    with pytest.raises(ValueError, match=f"pixels wide side by side, and a video holds {LARGEST} at most"):
        compare(clip(1, 1024, 1), clip(1, 1, 17))


@pytest.mark.parametrize("height", [32, 48])  # as it is, and brought to the first clip's height
@pytest.mark.parametrize("channels", [3, 4])
def test_long_clips_take_no_more_than_their_comparison_and_a_few_frames(height, channels):
    clips = [clip(240, 32, 32), clip(240, height, height, channels)]
    taken = measure.peak(torch.device("cpu"), lambda: compare(*clips))
    out = compare(*clips).nbytes
    assert out <= taken < out + 4 * clips[1][:AT_ONCE].nbytes  # whole: two or three times all frames


def test_the_node_takes_videos_with_gaps():
    clips = {f"video_{i}": clip(width=64, seed=i) for i in (1, 2, 5)}
    (out,) = CompareVideos.execute("one\ntwo\nfive", video_3=None, **clips).result
    assert torch.equal(out, side_by_side(clips, ["one", "two", "five"]))
    assert torch.equal(out[:, -16:, -64:], clips["video_5"])
