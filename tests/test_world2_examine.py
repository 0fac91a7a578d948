"""The examination of world 2's judge: edits that differ in one figure, figures for each kind of picture."""

from dataclasses import replace

import numpy as np
import torch
from tune_a_video.lab import chimeras
from tune_a_video.lab.world2 import examine, segmenter, world


def test_an_edit_changes_the_actor_and_not_the_scene():
    for old, new in examine.scenes(8):
        (before,), (after,) = old.actors, new.actors
        assert before.figure != after.figure and (before.x, before.y, before.size) == (after.x, after.y, after.size)
        assert replace(new, actors=old.actors) == old


def test_the_other_way_is_the_mirror_image():
    scene = examine.scenes(1)[0][1]
    scene = replace(scene, camera=world.STILL, actors=(replace(scene.actors[0], x=0.5),))
    (_, mask), (_, turned) = examine.drawn([scene]), examine.drawn([examine.other_way(scene)])
    assert (mask.flip(2) != turned).float().mean() < 0.01


def test_the_examination_names_every_kind():
    torch.manual_seed(0)
    with torch.inference_mode():
        report = examine.examine(segmenter.Segmenter().eval(), lambda pictures: pictures, 3)
    assert set(chimeras.OF_OBJECTS) < set(report["chimeras"]) and len(report["true"]) == 5
    assert all(0 <= share <= 1 for part in report.values() for share in part.values())


def test_a_judge_without_a_fault_passes(monkeypatch):
    """Answers looked up by the picture: the drawn edits, and the old pictures that "unchanged" shows."""
    known = {}

    def look_up(_network, pictures):
        truths = [known[picture.numpy().tobytes()] for picture in pictures]
        return examine.judge.Seen(*(torch.from_numpy(np.stack(part)).long() for part in zip(*truths, strict=True)))

    draw = world.draw

    def remember(scene):
        shown = draw(scene)
        picture = torch.from_numpy(shown.picture).float() / 255
        known[picture.numpy().tobytes()] = segmenter.truth_of(scene, shown)
        return shown

    monkeypatch.setattr(examine.judge, "look_at", look_up)
    monkeypatch.setattr(examine.world, "draw", remember)
    monkeypatch.setattr(examine.chimeras, "OF_OBJECTS", {"unchanged": chimeras.unchanged})
    monkeypatch.setattr(examine.chimeras, "patch", lambda _old, new, _masks: new)
    report = examine.examine(None, lambda pictures: pictures, 4)
    assert set(report["true"].values()) == {1.0} and report["chimeras"]["unchanged"] == 0
