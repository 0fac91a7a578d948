import measure
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tune_a_video.tav_core.pictures.clip import FITS, prepare_clip
from tune_a_video.tav_core.pictures.image import AT_ONCE

VIDEO = torch.rand(12, 20, 30, 3, generator=torch.Generator().manual_seed(0))


SIZES = st.tuples(st.sampled_from([8, 16, 40]), st.sampled_from([8, 16, 40]))


@given(
    start=st.integers(0, 11), stride=st.integers(1, 6), count=st.integers(1, 12), fit=st.sampled_from(FITS), size=SIZES
)
def test_takes_the_frames_it_says(start, stride, count, fit, size):
    wanted = range(start, len(VIDEO), stride)[:count]
    clip = prepare_clip(VIDEO, start, stride, len(wanted), *size, fit)
    assert clip.shape == (len(wanted), size[1], size[0], 3)
    assert clip.min() >= 0 and clip.max() <= 1
    for i, frame in enumerate(wanted):
        torch.testing.assert_close(clip[i : i + 1], prepare_clip(VIDEO[frame : frame + 1], 0, 1, 1, *size, fit))


@given(start=st.integers(0, 15), stride=st.integers(1, 6), more=st.integers(1, 9), fit=st.sampled_from(FITS))
def test_more_frames_than_there_are_says_what_fits(start, stride, more, fit):
    largest = len(range(start, len(VIDEO), stride))
    with pytest.raises(ValueError, match=f"largest count is {largest}[.;]" if largest else "The last start is 11"):
        prepare_clip(VIDEO, start, stride, largest + more, 16, 16, fit)


def test_error_names_the_largest_count_and_stride_that_fit():
    with pytest.raises(ValueError, match=r"need 21 frames, the video has 12\. .* count is 3; for 5 .* stride is 2\."):
        prepare_clip(VIDEO, 0, 5, 5, 8, 8, "crop")
    prepare_clip(VIDEO, 0, 5, 3, 8, 8, "crop")
    prepare_clip(VIDEO, 0, 2, 5, 8, 8, "crop")


def test_fits():
    wide = torch.ones(1, 8, 16, 3)
    pad = prepare_clip(wide, 0, 1, 1, 16, 16, "pad")[0, :, :, 0]
    assert torch.equal(pad[:4], torch.zeros(4, 16)) and torch.equal(pad[4:12], torch.ones(8, 16))
    ramp = torch.linspace(0, 1, 16).expand(1, 8, 16)[..., None].expand(1, 8, 16, 3)
    crop = prepare_clip(ramp, 0, 1, 1, 8, 8, "crop")
    torch.testing.assert_close(crop, ramp[:, :, 4:12])
    stretch = prepare_clip(ramp, 0, 1, 1, 8, 8, "stretch")[0, 0, :, 0]
    assert stretch[0] < 0.1 and stretch[-1] > 0.9


@pytest.mark.parametrize(("width", "advice"), [(500, "496 or 504"), (4, "8 or 16"), (0, "8 or 16")])
def test_sizes_must_be_multiples_of_eight(width, advice):
    with pytest.raises(ValueError, match=advice):
        prepare_clip(VIDEO, 0, 1, 1, width, 8, "crop")


def test_no_frames():
    with pytest.raises(ValueError, match="there are no frames"):
        prepare_clip(VIDEO[:0], 0, 1, 1, 8, 8, "crop")


@pytest.mark.parametrize("fit", FITS)
def test_a_long_clip_takes_no_more_than_itself_and_a_few_frames(fit):
    video = torch.rand(240, 40, 30, 3)
    clip = []
    taken = measure.peak(torch.device("cpu"), lambda: clip.append(prepare_clip(video, 0, 1, 240, 32, 32, fit)))
    assert clip[0].nbytes <= taken < clip[0].nbytes + 6 * clip[0][:AT_ONCE].nbytes  # whole: as much again
