"""The evaluation on world 2: what it says of drawn edits, of none, and of spoilt ones; and that it runs."""

import json

import pytest
import torch
from tune_a_video.lab.subject import Studio
from tune_a_video.lab.world2 import clips, evaluate, segmenter, train
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pictures import image


@pytest.fixture(scope="module")
def network():
    return segmenter.load()


@pytest.fixture
def judged(network, monkeypatch):
    """Of a clip's edit: what is said of pictures; the clip's; the drawn edit's. The autoencoder is left out."""
    monkeypatch.setattr(Studio, "through", lambda _self, pictures: pictures)

    def of(number, kind, frames=8):
        plan, edit = clips.plan(number), clips.edits(number)[kind]
        clip, drawn = plan.make(frames), edit.make(frames)
        judge = evaluate.Judge(Studio(None, None, None, None), clip, plan.other and plan.other.figure, network)
        source, wanted = (image.from_bytes(part.frames) for part in (clip, drawn))
        return lambda pictures: judge.figures(kind, drawn, pictures), source, wanted

    return of


def grained(pictures):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + 0.01 * noise).clamp(0, 1)


# A thing and a person; the actor alone, and one that another crosses.
@pytest.mark.parametrize("number", [0, 1, 8, 9])
def test_a_drawn_edit_is_right_and_no_edit_is_not(judged, number):
    figures, source, wanted = judged(number, "figure")
    right, none = figures(grained(wanted)), figures(grained(source))
    what = "verb" if number % 2 else "thing"
    assert right[what] >= 0.8 and none[what] <= 0.2
    assert right["whole"] >= 0.6 and none["whole"] == 0
    assert right["iou"] > 0.7 and right["old_left"] < 0.05 and none["old_left"] > 0.6
    assert right["motion"] > 0.95 and right["cells"] < 0.6 and right["agreement"] >= 0.8
    assert right["background"] == pytest.approx(40, abs=1.5) and none["background"] == pytest.approx(40, abs=1.5)
    figures, source, wanted = judged(number, "place")
    right, none = figures(grained(wanted)), figures(grained(source))
    assert right["place"] >= 0.8 and none["place"] <= 0.2 and right["object_kept"] > 27
    figures, source, wanted = judged(number, "style")
    assert figures(wanted)["style"] >= 0.9 and figures(source)["style"] == 0


def test_what_is_spoilt_is_seen(judged):
    figures, _source, wanted = judged(0, "figure")
    right = figures(wanted)
    backwards = figures(wanted.flip(0))
    assert backwards["motion"] < 0 and backwards["cells"] > right["cells"] + 1
    nothing = figures(torch.full_like(wanted, 0.5))
    assert nothing["whole"] == nothing["motion"] == 0
    jumping = wanted.clone()
    jumping[::2] = 1 - jumping[::2]
    assert figures(jumping)["flicker"] > 2 * right["flicker"]
    figures, _source, wanted = judged(0, "place")
    darker = figures(0.8 * wanted)
    assert darker["object_kept"] < figures(wanted)["object_kept"] - 3


def test_looks_that_change_do_not_agree(judged):
    figures, _source, _wanted = judged(0, "figure")
    drawn = [clips.edits(0)["figure"] for _look in range(2)]
    looks = [image.from_bytes(part.make(8).frames) for part in drawn]
    other = clips.replace(drawn[0], actor=clips.replace(drawn[0].actor, look="flat"))
    mixed = torch.cat([looks[0][:4], image.from_bytes(other.make(8).frames)[4:]])
    assert figures(looks[0])["agreement"] >= 0.9 and figures(mixed)["agreement"] <= 0.7


def test_a_clip_is_edited_and_kept(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "RECIPE", Recipe(steps=1, learning_rate=5e-4))
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate, "FRAMES", 3)
    monkeypatch.setattr(evaluate.quality, "STEPS", 2)
    methods = ["Tune-A-Video", "mask of the object", "every frame by itself"]
    arguments = ["--model", str(train.BEGUN), "--clips", "9", "--methods", *methods, "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    evaluate.main()
    said = capsys.readouterr().out
    table, beside = said[said.index("## development, 3 edits") :].split("| beside Tune-A-Video")
    rows = json.loads((tmp_path / "clip_09.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows if row["edit"] == "figure"] == [*methods, evaluate.ALONE, evaluate.DRAWN]
    assert table.count("\n| ") == 2 + len(methods) + 1 and beside.count("\n| ") == len(methods) - 1
    drawn = {key: row[key] for row in rows if row["method"] == evaluate.DRAWN for key in row}
    assert drawn.keys() >= {"verb", "place", "style", "whole", "background", "object_kept"}
    assert all(key in evaluate.OF_PICTURES for row in rows if row["method"] == evaluate.ALONE for key in [*row][3:])
    assert {file.name for file in tmp_path.glob("*.png")} == {f"clip_09_{kind}.png" for kind in clips.EDITS}
    monkeypatch.setattr(evaluate, "run", None)  # what is kept is not computed again
    evaluate.main()
    assert capsys.readouterr().out == said[said.index("## development") :]
