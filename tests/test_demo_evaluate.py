"""The evaluation of the method, short: every way to edit is judged, and the judge knows the truth when it sees it."""

import json
from itertools import combinations

import numpy as np
import pytest
from tune_a_video.demo import model, world
from tune_a_video.lab import classifier, clips, evaluate, tables
from tune_a_video.tav_core.method.tuning import Recipe


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(evaluate, "RECIPE", Recipe(steps=2, learning_rate=5e-4))
    monkeypatch.setattr(evaluate, "STEPS", 2)


def test_a_clip_is_edited_in_every_way_and_kept(short, tmp_path, monkeypatch):
    methods = list(evaluate.METHODS)
    rows = evaluate.evaluated(evaluate.Studio(*model.load(), classifier.load()), 0, methods, tmp_path)
    assert [(row["method"], row["edit"]) for row in rows[:3]] == [(methods[0], head) for head in evaluate.HEADS]
    assert len(rows) == 3 * (len(methods) + 1)
    truth = evaluate.summary(rows, evaluate.TRUTH)
    assert truth["right"] == truth["kept"] == 1 and truth["motion"] > 0.98 and truth["cells"] < 0.5
    assert {file.name for file in tmp_path.iterdir()} == {
        *("clip_00.json", "clip_00.png"),
        *(f"clip_00_{head}.png" for head in evaluate.HEADS),
    }
    table = evaluate.table(rows, [*methods, evaluate.TRUTH]).splitlines()
    assert len(table) == 2 + len(methods) + 1 and len({line.count("|") for line in table}) == 1
    strict = evaluate.strict_table(rows, [*methods, evaluate.TRUTH]).splitlines()
    assert len(strict) == len(table) and len({line.count("|") for line in strict}) == 1
    drawn = {row["edit"]: row for row in rows if row["method"] == evaluate.TRUTH}
    assert drawn["object"]["whole"] == 1 and drawn["object"]["iou"] > 0.9 and drawn["object"]["old_left"] < 0.02
    assert drawn["object"]["background"] > 25 and drawn["background"]["object_kept"] > 20
    # Two steps of tuning and of sampling leave next to no object.
    assert all(row["whole"] < 1 for row in rows if row["edit"] == "object" and row["method"] == "without inversion")
    beside = evaluate.beside(rows, methods).splitlines()
    assert len(beside) == 2 + len(methods) - 1 and len({line.count("|") for line in beside}) == 1
    assert all("of 3" in line and "of 1" in line for line in beside[2:])

    monkeypatch.setattr(evaluate, "run", None)  # what is kept is not computed again
    assert evaluate.evaluated(None, 0, methods, tmp_path) == json.loads(json.dumps(rows))


def test_the_clips_that_are_held_out_are_others():
    for motion, thing, place, new_thing, new_place, style in clips.ALL:
        assert motion in world.MOTIONS and thing in world.OBJECTS
        assert {place, new_place} <= world.BACKGROUNDS.keys() and place != new_place
        assert new_thing in world.LOOKS and new_thing != thing and style in ("sketch", "sunset")
    assert not {clip[1:4] for clip in clips.CLIPS} & {clip[1:4] for clip in clips.HELD_OUT}
    assert [len(numbers) for numbers in clips.SETS.values()] == [12, 12]


def test_a_method_edits_as_it_is_named(short):
    """Each leaves something else out, so no two edit alike."""
    studio = evaluate.Studio(*model.load(), classifier.load())
    clip, _wanted = clips.made(0, frames=3)
    subject = evaluate.Subject(studio, clip, studio.latents(clip.frames), evaluate.RECIPE, evaluate.STEPS)
    edited = {
        name: way(subject)("a dog on the beach")["samples"]
        for name, way in (evaluate.METHODS | evaluate.LEVERS).items()
    }
    assert all(samples.shape == (3, 4, 16, 16) for samples in edited.values())
    assert not any(one.equal(other) for one, other in combinations(edited.values(), 2))


def test_a_difference_is_told_with_its_interval():
    figures = {"motion": 0.9, "whole": 1.0, "background": 20.0, "object_kept": 20.0, "cells": 1.0}
    first = [{"method": "first", "consistency": 0.9, "flicker": 10.0 + i, **figures} for i in range(6)]
    other = [
        {**row, "method": "other", "consistency": 0.92, "flicker": row["flicker"] + i - 2}
        for i, row in enumerate(first)
    ]
    cells = evaluate.beside([*first, *other], ["first", "other"]).splitlines()[-1].split(" | ")
    assert cells[1] == "+0.0200 (+0.0200 … +0.0200), 6 of 6"
    assert cells[3].startswith("+0.5 (-0.") and cells[3].endswith("), 2 of 6")  # less flicker is better
    low, high = tables.interval(np.random.default_rng(1).normal(1, 2, 10_000))
    assert low == pytest.approx(1 - 1.96 * 0.02, abs=0.03) and high == pytest.approx(1 + 1.96 * 0.02, abs=0.03)
