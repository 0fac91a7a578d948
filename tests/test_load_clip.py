"""Load Clip: the right pictures of every kind of file, in little memory; or one line that says why not."""

import io
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from pack import PROJECT
from tune_a_video.nodes import LoadClip, PrepareClip
from tune_a_video.tav_core import host
from videos import BLUE, picture, turn, write_video

RAMPS = [picture(number) for number in range(30)]
SHARP = {"crf": "1"}


def load(source, start=0.0, unit="seconds", stride=1, count=4, width=64, height=48, fit="crop", fps=0.0):
    video = InputImpl.VideoFromFile(source) if isinstance(source, (str, io.BytesIO)) else source
    return LoadClip.execute(video, start, unit, stride, count, width, height, fit, fps).result


def numbers(clip):
    """Which frames of the ramps a clip shows."""
    return [round(float(blue) * 255 / BLUE) for blue in clip[..., 2].mean((1, 2))]


def shown(source, **inputs):
    return numbers(load(source, **inputs)[0])


KINDS = {
    "mp4": {"options": {"g": "8", "bf": "2"}},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0"}},
    "mkv": {"options": {"g": "8", "bf": "2"}},
    "ts": {"options": {"g": "8", "bf": "2"}},
    "open_gop.ts": {"codec": "mpeg2video", "options": {"g": "8", "bf": "2", "qscale": "2"}},
    "webm": {"codec": "libvpx-vp9", "options": {"g": "8"}},
    "vp8.webm": {"codec": "libvpx"},
    "avi": {"options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "qscale": "2"}},
    "h264": {"options": {"r": "10"}},
    "prores.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
    "ten_bits.mp4": {"codec": "libx264", "pixels": "yuv420p10le"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_every_kind_of_file(kind, tmp_path):
    file = write_video(tmp_path / f"a.{kind}", RAMPS, **KINDS[kind])
    step = 1 / 25 if kind == "h264" else 0.1  # a bare stream has no times
    whole = load(file, count=30)[0]
    assert max(abs(number - i) for i, number in enumerate(numbers(whole))) <= 2
    for number in range(1, 27, 2):
        pair = whole[[number, number + 2]]
        assert torch.equal(load(file, number, "frames", count=2, stride=2)[0], pair)
        assert torch.equal(load(file, number * step, count=2, stride=2)[0], pair)
        assert torch.equal(load(file, (number + 0.9) * step, count=1)[0], pair[:1])


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(64, 48), (67, 45)])
def test_pictures_are_those_of_get_video_components_and_prepare_clip(size, fit, core, tmp_path):
    noise = [np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8) for i in range(12)]
    file = write_video(tmp_path / "a.mp4", noise, pixels="yuv444p", rate=Fraction(30000, 1001))
    images, _audio, fps = core["GetVideoComponents"].execute(InputImpl.VideoFromFile(file)).result
    wanted = PrepareClip.execute(images, 1, 3, 4, 40, 24, fit, fps).result
    clip, rate, _info = load(file, 1, "frames", 3, 4, 40, 24, fit)
    torch.testing.assert_close(clip, wanted[0], atol=1e-5, rtol=0)
    assert rate == wanted[1]


def test_a_video_made_of_frames_is_not_encoded(core):
    images = torch.rand(9, 48, 64, 3)
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(10)))
    before = images.clone()
    clip, fps, _info = load(video, start=0.2, stride=3, count=3)
    assert torch.equal(clip, images[2::3]) and fps == pytest.approx(10 / 3)
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="need 5 frames, the video has 1 from there"):
        load(video, start=0.8, count=5)


def test_varying_frame_rates_go_by_time(tmp_path):
    stamps = [0, 40, 100, 300, 340, 500, 520, 900]
    file = write_video(tmp_path / "a.mkv", RAMPS[:8], stamps=stamps)
    assert shown(file, start=0.299, count=2) == [2, 3] and shown(file, start=0.3, count=2) == [3, 4]
    assert shown(file, fps=10.0, count=9) == [0, 2, 2, 3, 4, 5, 6, 6, 6]
    assert shown(file, fps=10.0, stride=2, count=4) == [0, 2, 4, 6]
    _clip, fps, info = load(file, count=8)
    assert fps == pytest.approx(7 / 0.9) and "0.02 to 0.38 s apart" in info
    assert load(file, fps=10.0, stride=2, count=4)[1] == 5


def test_resampling_bears_with_jitter(tmp_path):
    jitter = np.random.default_rng(0).integers(-3, 4, 30)
    file = write_video(tmp_path / "a.mkv", RAMPS, stamps=[0, *(33 * i + int(jitter[i]) for i in range(1, 30))])
    assert shown(file, fps=15.0, count=10) == list(range(0, 20, 2))


def test_times_count_from_the_first_picture(tmp_path):
    late = write_video(tmp_path / "late.mkv", RAMPS[:8], stamps=[5000 + 40 * i for i in range(8)])
    assert shown(late) == [0, 1, 2, 3] and shown(late, start=0.08, count=2) == [2, 3]
    early = write_video(tmp_path / "early.mp4", RAMPS[:8], stamps=[-80 + 40 * i for i in range(8)])
    with av.open(early) as video:  # its edit list hides the first ones
        visible = sum(1 for _ in video.decode(video=0))
    assert shown(early, count=visible) == list(range(8 - visible, 8))
    assert shown(early, start=1, unit="frames", count=1) == [8 - visible + 1]


TURNS = {  # display matrices, and what is done to a picture
    "quarter right": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "quarter left": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upright": ((1, 0, 0, 1), lambda p: p),
}


@pytest.mark.parametrize(("matrix", "wanted"), TURNS.values(), ids=TURNS)
def test_phone_clips_stand_upright(matrix, wanted, tmp_path):
    file = write_video(tmp_path / "a.mp4", RAMPS[:4], pixels="yuv444p", options=SHARP)
    turn(tmp_path / "a.mp4", *matrix)
    expected = torch.from_numpy(wanted(RAMPS[0]).copy()).float() / 255
    height, width = expected.shape[:2]
    clip, _fps, info = load(file, width=width, height=height)
    torch.testing.assert_close(clip[0], expected, atol=0.04, rtol=0)
    assert ("turned upright" in info) == (matrix != (1, 0, 0, 1))


def test_wide_pixels_become_square(tmp_path):
    file = write_video(tmp_path / "a.mp4", RAMPS[:4], pixels="yuv444p", aspect=Fraction(2), options=SHARP)
    clip, _fps, info = load(file, width=128, height=48)
    ramp = clip[0, 24, :, 0]
    assert abs(ramp[0]) < 0.03 and abs(ramp[-1] - 250 / 255) < 0.03 and "2 times as wide" in info
    padded = load(file, width=128, height=128, fit="pad")[0][0, :, 64, 0]
    assert padded[:39].max() < 0.02 < padded[42:86].min() and padded[89:].max() < 0.02
    assert load(file, width=64, height=48)[0][0, 24, 0, 0] > 0.2, "crop cuts the sides"


ALPHA = {
    "a.mov": {"codec": "qtrle", "pixels": "argb"},
    "deep.mov": {"codec": "prores_ks", "pixels": "yuva444p10le"},
    "a.webm": {"codec": "libvpx-vp9", "pixels": "yuva420p", "options": {"crf": "4", "b": "0"}},
    "a.mkv": {"codec": "ffv1", "pixels": "bgra"},
}


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_is_put_on_black(name, tmp_path):
    opacity = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    grey = np.dstack([np.full((48, 64, 3), 200, np.uint8), opacity])
    file = write_video(tmp_path / name, [grey] * 4, **ALPHA[name])
    clip, _fps, info = load(file)
    expected = torch.from_numpy(opacity).float()[..., None].expand(48, 64, 3) / 255 * 200 / 255
    torch.testing.assert_close(clip[2], expected, atol=0.03, rtol=0)
    assert "on black" in info


def test_ten_bits_are_kept(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as video:
        stream = video.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray10le"
        frame = av.VideoFrame(64, 48, "gray10le")
        line = frame.planes[0].line_size // 2
        levels = np.zeros((48, line), np.uint16)
        levels[:, :64] = np.arange(500, 564)
        frame.planes[0].update(levels.tobytes())
        video.mux(stream.encode(frame))
        video.mux(stream.encode())
    assert len(load(str(tmp_path / "a.mkv"), count=1)[0][0, 0, :, 0].unique()) == 64


def test_gif_and_bytes(tmp_path):
    grey = [np.full((48, 64, 3), 80 * (i % 4), np.uint8) for i in range(8)]
    file = write_video(tmp_path / "a.gif", grey, codec="gif", pixels="rgb8")
    clip, fps, _info = load(io.BytesIO((tmp_path / "a.gif").read_bytes()), start=0.1, count=3)
    assert (clip.mean((1, 2, 3)) * 255 / 80).round().tolist() == [1, 2, 3] and fps == 10
    assert torch.equal(clip, load(file, start=0.1, count=3)[0])


# --- what a host has done to a VIDEO ----------------------------------------------------------------------------


class Trimmed(InputImpl.VideoFromFile):
    """As newer hosts trim: the stream stays whole."""

    def get_active_trim_window(self):
        return 0.5, 0.8


def test_a_trim_holds(tmp_path):
    file = write_video(tmp_path / "a.mp4", RAMPS)
    trimmed = Trimmed(file)
    assert shown(trimmed, count=8) == list(range(5, 13))
    assert shown(trimmed, start=0.3, count=2) == shown(trimmed, start=3, unit="frames", count=2) == [8, 9]
    with pytest.raises(ValueError, match="need 9 frames, the video has 8"):
        load(trimmed, count=9)
    silent = InputImpl.VideoFromFile(file)  # as hosts that do not tell of it
    silent._VideoFromFile__start_time, silent._VideoFromFile__duration = -1.0, 0.0
    assert shown(silent, count=10) == list(range(20, 30))


def test_cancel_stops_the_reading(tmp_path, monkeypatch):
    def cancelled():
        raise InterruptedError

    monkeypatch.setattr(host, "stop_if_interrupted", cancelled)
    with pytest.raises(InterruptedError):
        load(write_video(tmp_path / "a.mp4", RAMPS))


# --- what cannot be read ----------------------------------------------------------------------------------------


def test_what_is_no_whole_video_is_said_in_a_line(tmp_path):
    whole = (tmp_path / "whole.mp4", tmp_path / "front.mp4")
    noise = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(30)]
    for path, flags in zip(whole, ("", "faststart"), strict=True):
        with av.open(str(path), "w", options={"movflags": flags} if flags else {}) as video:
            stream = video.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for array in noise:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
            video.mux(stream.encode())
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as audio:
        stream = audio.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        audio.mux(stream.encode(frame))
        audio.mux(stream.encode())
    av.VideoFrame.from_ndarray(RAMPS[0]).to_image().save(tmp_path / "picture.png")
    (tmp_path / "cut.mp4").write_bytes(whole[0].read_bytes()[:9000])
    (tmp_path / "half.mp4").write_bytes(whole[1].read_bytes()[: whole[1].stat().st_size // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 99, encoding="utf-8")
    said = {
        "sound.mp4": "sound.mp4 holds sound or text, but no moving pictures",
        "picture.png": "picture.png is a picture, not a video: use Load Image",
        "cut.mp4": "cut.mp4 is cut off: .* Copy or download it again",
        "empty.mp4": r"empty.mp4 is empty \(0 bytes\)",
        "text.mp4": r"text.mp4 is no video that can be read \(Invalid data .*\): choose an mp4",
        "gone.mp4": "gone.mp4 cannot be found",
    }
    for name, message in said.items():
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"at most|largest count is \d+\. half.mp4 is damaged or cut off at \d"):
        load(str(tmp_path / "half.mp4"), count=30)
    torch.testing.assert_close(load(str(tmp_path / "half.mp4"))[0], load(str(whole[1]))[0])
    with pytest.raises(ValueError, match="this VIDEO is a dict"):
        load({"frames": []})


def test_a_video_that_is_too_short_says_what_fits(tmp_path):
    file = write_video(tmp_path / "a.mp4", RAMPS)
    for inputs, message in {
        (
            0.0,
            "seconds",
            2,
            24,
        ): r"stride 2 from 0 s need 47 frames, .* 30 from there\. .* count is 15; .* stride is 1\.",
        (2.0, "seconds", 1, 24): r"from 2 s need 24 frames, the video has 10 from there",
        (5, "frames", 2, 24): r"from frame 5 need 52 frames, the video has 30\. .* largest count is 13",
        (40, "frames", 1, 2): r"the video has 30\. The last start is 29\.",
        (3.0, "seconds", 1, 1): r"start is 3 s, after the video's end\. The last start is 2\.9",
        (0.5, "frames", 1, 1): r"start is 0\.5, and there is no such frame",
        (float("nan"), "seconds", 1, 1): r"start is nan; it is from 0",
        (0.0, "hours", 1, 1): r"start_unit is 'hours'; it must be one of seconds, frames",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(file, *inputs)
    with pytest.raises(ValueError, match=r"from 2 s at 5 fps need 6 frames, the video has 5 from there"):
        load(file, start=2.0, fps=5.0, count=6)
    assert shown(file, start=29, unit="frames", count=1) == shown(file, start=2.95, count=1) == [29]
    one = write_video(tmp_path / "one.mp4", RAMPS[:1])
    assert shown(one, count=1) == [0]


MEASURE = """
import sys
sys.path[:0] = [sys.argv[1], *sys.argv[2].split(":")]
from pack import load_pack
load_pack()
from tune_a_video.tav_core.pictures.load_clip import Wanted, load_clip
from tune_a_video.tav_core.pictures.video import File

def peak():
    return int(next(line for line in open("/proc/self/status", encoding="utf-8") if "VmHWM" in line).split()[1])

def load(file, count, size):
    load_clip(File(file), Wanted(0.5, "seconds", 2, count, size, size, "crop"))

load(sys.argv[4], 2, 64)
before = peak()
load(sys.argv[3], 24, 512)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_24_frames_of_a_4k_video_take_half_a_gibibyte(tmp_path):
    base = np.random.default_rng(0).integers(0, 255, (54, 96, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    pictures = [np.roll(base, 40 * i, 1) for i in range(3)] * 22
    large = write_video(tmp_path / "4k.mp4", pictures, rate=30, options={"preset": "ultrafast", "g": "30"})
    small = write_video(tmp_path / "small.mp4", RAMPS)
    folders = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", MEASURE, str(PROJECT / "tools"), folders, large, small]
    taken = int(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()[-1])
    assert 0 < taken < 2**29
