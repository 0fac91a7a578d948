"""The evaluation of clips in windows: its figures see a cut and a drift that are planted, and it runs as a whole."""

from dataclasses import replace

import pytest
import torch
from tune_a_video.demo import model
from tune_a_video.lab import classifier, long
from tune_a_video.lab.clips import drawn, made
from tune_a_video.lab.judged import Judge
from tune_a_video.lab.subject import Studio
from tune_a_video.tav_core.method.windows import WHOLE, Windows


@pytest.fixture(scope="module")
def studio():
    return Studio(*model.load(), classifier.load())


def test_joins_are_the_overlaps_of_windows_and_what_is_beside_them():
    # 16 frames: the first one and 15 of a run. Of 27 frames two windows, from 1 and from 12 on, share 12 to 15.
    assert long.joins(Windows(16, 4), 27).nonzero().flatten().tolist() == [11, 12, 13, 14, 15]
    assert not long.joins(Windows(16, 4), 16).any() and not long.joins(WHOLE, 64).any()


def test_a_cut_at_a_join_and_a_place_that_drifts_are_seen(studio):
    clip, wanted = made(0, 27)
    judged, at = Judge(studio, clip), long.joins(Windows(16, 4), 27)
    grain = 0.01 * torch.randn(27, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    pictures = drawn(clip, "background", wanted["background"]) + grain

    def figures(shown):
        return long.steadiness(judged, "background", wanted["background"], shown, at)

    calm = figures(pictures)
    assert 0.9 < calm["joins"] < 1.1 and calm["largest"] < 1.1 and calm["drift"] < 1.5
    cut = pictures.clone()
    cut[13:] += 0.1  # between frames 12 and 13
    cut = figures(cut)
    assert cut["joins"] > 1.5 and cut["largest"] > 5 and cut["object_joins"] > calm["object_joins"] + 0.1
    drifting = figures(pictures + torch.linspace(0, 0.1, 27)[:, None, None, None])
    # From the middle of the first eight frames to the middle of the last eight.
    assert drifting["drift"] == pytest.approx(255 * 0.1 * 19 / 26, abs=0.5) and drifting["joins"] < 1.1


def test_an_evaluation_of_long_clips_runs_and_is_kept(studio, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long, "FRAMES", 9)
    monkeypatch.setattr(long, "ENDS", 2)
    monkeypatch.setattr(long, "CLIPS", (0,))
    monkeypatch.setattr(long, "CUT", Windows(4, 1))
    monkeypatch.setattr(long, "WAYS", {"at once": WHOLE, "cut": Windows(4, 1)})
    monkeypatch.setattr(long, "SHORT", replace(long.SHORT, steps=1))
    monkeypatch.setattr(long, "STEPS", 2)
    verdict = long.evaluate(studio, tmp_path)
    said = capsys.readouterr().out
    table = said[said.index("9 frames, 2 edits") :]  # after the seconds that each took
    assert table.count("\n| ") == 3
    assert verdict == "" or verdict.startswith("out of its bounds: ")
    assert {file.name for file in tmp_path.iterdir()} == {
        f"long_00_{way}.{kind}" for way in (0, 1) for kind in ("json", "png")
    }
    monkeypatch.setattr(long, "run", None)  # what is kept is not computed again
    assert long.evaluate(studio, tmp_path) == verdict and capsys.readouterr().out == table
    monkeypatch.setattr(long, "BOUNDS", {"joins": 0.0, "largest": 100.0, "drift_background": 100.0})
    assert long.evaluate(studio, tmp_path).startswith("out of its bounds: joins ")
