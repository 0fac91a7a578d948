"""The procedural world: seeded, captioned, and its clips tell the truth."""

import av
import numpy as np
import pytest
from tune_a_video.demo import world
from tune_a_video.demo.world import Scene
from tune_a_video.lab import make_quickstart


def test_a_stream_of_scenes_is_seeded():
    assert world.random_scene(3, 5) == world.random_scene(3, 5)
    assert world.random_scene(3, 5) != world.random_scene(3, 6)
    scene = world.random_scene(3, 5)
    assert np.array_equal(world.render(scene), world.render(scene))


def test_captions():
    assert world.caption("red car", "beach") == "a red car on the beach"
    assert world.caption("elephant", "city", "sketch") == "an elephant in the city, pencil sketch"
    assert len(set(world.captions())) == len(world.LOOKS) * len(world.BACKGROUNDS) * len(world.STYLES)


def test_a_caption_without_a_colour_leaves_it_open():
    assert world.LOOKS["balloon"] == ("red balloon", "blue balloon") and world.LOOKS["dog"] == ("dog",)
    scenes = [Scene("car", "snow", seed=seed) for seed in range(6)]
    assert {scene.caption for scene in scenes} == {"a car in the snow"}
    assert {scene.look for scene in scenes} == {"red car", "blue car", "yellow car"}
    for scene in scenes:
        assert np.array_equal(world.render(scene), world.render(Scene(scene.look, "snow", seed=scene.seed)))


@pytest.mark.parametrize("object", world.OBJECTS)
def test_an_object_is_where_the_scene_says(object):
    scene = Scene(object, "snow", x=0.4, y=0.6, size=0.5)
    away = world.render(Scene(object, "snow", x=3, y=3))
    drawn = np.abs(world.render(scene).astype(int) - away).sum(-1) > 60
    rows, columns = np.nonzero(drawn)
    assert abs((columns.min() + columns.max() + 1) / 2 / world.SIDE - scene.x) < 0.05
    assert rows.min() / world.SIDE > scene.y - scene.size / 2 - 0.03
    assert rows.max() / world.SIDE < scene.y + scene.size / 2 + 0.06  # the shadow lies below


def test_flip_mirrors_the_object():
    left, right = (world.render(Scene("truck", "water", x=0.5, flip=flip)).astype(int) for flip in (False, True))
    assert np.abs(left[60:, ::-1] - right[60:]).mean() < np.abs(left[60:] - right[60:]).mean() / 2


@pytest.mark.parametrize("background", world.BACKGROUNDS)
@pytest.mark.parametrize("style", world.STYLES)
def test_a_scene_looks_the_same_at_any_resolution(background, style):
    scene = Scene("frog", background, style, seed=4)
    small, large = world.render(scene, 64).astype(float), world.render(scene, 192).astype(float)
    assert small.shape == (64, 64, 3)
    assert np.abs(large.reshape(64, 3, 64, 3, 3).mean((1, 3)) - small).mean() < 12


def test_colours_differ():
    red, blue, yellow = (world.render(Scene(f"{c} car", "snow")).astype(int) for c in ("red", "blue", "yellow"))
    assert np.abs(red - blue).max() > 150 and np.abs(red - yellow).max() > 150


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_clips(motion):
    clip = world.make_clip(motion, "red car", "beach", frames=6, side=64, seed=1)
    assert clip.frames.shape == (6, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.positions.shape == (6, 2)
    assert clip.caption == "a red car on the beach"
    assert np.abs(np.diff(clip.frames.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 0  # it moves all the time
    assert np.array_equal(clip.frames, world.make_clip(motion, "red car", "beach", frames=6, side=64, seed=1).frames)


def test_an_unknown_motion_is_named():
    with pytest.raises(ValueError, match="'spiral'.*line"):
        world.make_clip("spiral", "dog", "beach")


def test_the_quickstart_is_the_clip_that_it_is_made_from():
    with av.open(str(make_quickstart.FILE)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    truth = make_quickstart.quickstart().frames
    assert frames.shape == truth.shape
    assert np.abs(frames.astype(int) - truth).mean() < 4
