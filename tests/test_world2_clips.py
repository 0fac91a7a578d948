"""The clips of world 2's evaluation: every kind in both halves, edits that change one thing."""

from dataclasses import fields

import numpy as np
import pytest
from tune_a_video.lab.world2 import clips, sprites, world

HALVES = [clips.DEVELOPMENT, clips.HELD_OUT]


def test_no_clip_is_in_both_halves():
    plans = [clips.plan(number) for number in range(clips.COUNT)]
    assert len({(p.motion, p.camera, p.actor, p.place) for p in plans}) == clips.COUNT
    assert sorted([*HALVES[0], *HALVES[1]]) == list(range(clips.COUNT))


@pytest.mark.parametrize("half", HALVES)
def test_each_half_has_every_kind(half):
    plans = [clips.plan(number) for number in half]
    assert {p.motion for p in plans} == set(world.MOTIONS) and {p.camera for p in plans} == set(world.CAMERAS)
    assert {p.place for p in plans} == set(world.PLACES) and {p.actor.look for p in plans} == set(sprites.LOOKS)
    assert {p.actor.figure for p in plans} >= set(sprites.VERBS)


@pytest.mark.parametrize("number", range(clips.COUNT))
def test_an_edit_changes_one_thing(number):
    source = clips.plan(number)
    assert clips.edits(number).keys() == set(clips.EDITS)
    for kind, edit in clips.edits(number).items():
        changed = [f.name for f in fields(source) if getattr(source, f.name) != getattr(edit, f.name)]
        assert changed == ["actor" if kind == "figure" else kind]
        assert (edit.actor.figure in sprites.VERBS) == (source.actor.figure in sprites.VERBS)
        assert edit.actor.look == source.actor.look


def test_a_planned_clip_is_made():
    source, edit = clips.plan(9).make(frames=3), clips.edits(9)["place"].make(frames=3)
    assert source.caption == "a man is running in front of a car on the grass"
    assert np.array_equal(source.positions, edit.positions) and np.array_equal(source.masks, edit.masks)
