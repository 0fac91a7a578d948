"""The strict judge of an object edit: the drawn edit is whole, what is put together from two pictures is not."""

from dataclasses import replace

import pytest
import torch
from tune_a_video.demo import world
from tune_a_video.lab import chimeras, strict
from tune_a_video.lab.chimeras import Pair


@pytest.fixture(scope="module", params=[("elephant", "truck", "beach"), ("dog", "chick", "snow")])
def edit(request):
    old, new, place = request.param
    clip = world.make_clip("arc", old, place, frames=2, seed=3)
    truth = strict.truth(clip, new)
    return clip, truth, Pair(truth.source, truth.drawn, truth.plate, truth.old, truth.new)


def test_the_drawn_edit_is_whole(edit):
    _, truth, _ = edit
    figures = strict.judge(truth, truth.drawn)
    assert figures["whole"] == figures["iou"] == 1 and figures["old_left"] == 0
    assert figures["fit"] == pytest.approx(float(truth.fit.mean())) and figures["background"] > 60


def test_a_prompt_cannot_tell_a_direction_or_a_size_to_the_pixel(edit):
    clip, truth, _ = edit
    scenes = [replace(s, object=truth.object, flip=not s.flip, size=0.95 * s.size) for s in clip.scenes]
    assert strict.judge(truth, strict.rendered(scenes))["whole"] == 1


@pytest.mark.parametrize("chimera", chimeras.OF_OBJECTS)
def test_a_chimera_is_not_whole(edit, chimera):
    _, truth, pair = edit
    assert strict.judge(truth, chimeras.OF_OBJECTS[chimera](pair))["whole"] == 0


def test_what_is_left_of_the_old_object(edit):
    _, truth, pair = edit
    half = strict.old_left(truth, chimeras.left_half(pair))
    assert (half > 0.15).all() and (half < 0.85).all()
    assert strict.old_left(truth, pair.old).min() > 0.9 and strict.old_left(truth, pair.plate).max() < 0.1


def test_a_changed_background_is_measured_outside_of_the_objects(edit):
    _, truth, pair = edit
    assert strict.judge(truth, (pair.new + 0.1))["background"] == pytest.approx(20, abs=0.1)
    assert strict.judge(truth, chimeras.halo(pair))["background"] > 40


def test_a_sprite_is_found_where_it_is():
    scene = world.Scene("penguin", "road", x=0.45, y=0.6, size=0.6, flip=True)
    place = torch.tensor([[0.4, 0.55]]) * world.SIDE
    found = strict.fit(strict.rendered([scene]), "penguin", place)
    assert found.psnr > 23 and found.flips and found.sizes == pytest.approx(0.6)
    assert (found.places - torch.tensor([[0.45, 0.6]]) * world.SIDE).abs().max() <= 1
    assert strict.fit(strict.rendered([scene]), "chick", place).psnr < 15


def test_an_object_is_looked_for_near_its_place():
    scene = world.Scene("penguin", "road", x=0.3, y=0.6, size=0.6)
    assert strict.fit(strict.rendered([scene]), "penguin", torch.tensor([[90.0, 77.0]])).psnr < 15


def test_a_shadow_is_no_object():
    plate = strict.rendered([world.Scene("balloon", "snow", x=9)])
    assert not strict.seen(0.6 * plate, plate).any() and strict.seen(0.6 * plate, plate, 0).all()


@pytest.mark.parametrize(
    "style, object, message", [("sunset", "cat", "plain style"), ("plain", "car", "object is 'car'; expected one of")]
)
def test_what_cannot_be_judged_is_named(style, object, message):
    clip = world.make_clip("line", "dog", "road", style, frames=1)
    with pytest.raises(ValueError, match=message):
        strict.truth(clip, object)


def test_a_misplaced_object_keeps_its_pixels():
    clip = world.make_clip("line", "dog", "road", frames=2)
    truth = strict.truth(clip, "cat")
    pair = Pair(truth.source, truth.drawn, truth.plate, truth.old, truth.new)
    found = strict.fit(chimeras.misplaced(pair), "cat", truth.places, reach=45)
    moved = (found.places - truth.places)[:, 0].abs()
    assert found.psnr.min() > 18 and (moved - 0.3 * world.SIDE).abs().max() < 2


def test_a_patch_of_the_old_place_stays_around_the_object():
    old, new = (strict.rendered([world.Scene("dog", place)]) for place in ("grass", "snow"))
    mask = strict.masks([world.Scene("dog", "grass")])
    picture = chimeras.patch(old, new, mask)
    assert torch.equal(picture[0, 5, 5], new[0, 5, 5]) and torch.equal(picture[mask], new[mask])
    beside = strict.grown(mask, 5) & ~mask
    assert torch.equal(picture[beside], old[beside])
