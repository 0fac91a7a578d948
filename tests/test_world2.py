"""World 2: seeded, captioned, credited, and its clips tell the truth of every pixel."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tune_a_video.lab.world2 import make_sprites, places, sprites, world
from tune_a_video.lab.world2.world import Actor, Camera, Pose, Scene

DOG, CAR = Actor("dog", "flat", size=0.5), Actor("car", "cartoon", "blue", size=0.5)


def test_every_sprite_is_drawn_and_credited():
    sources = json.loads(sprites.SOURCES.read_text(encoding="utf-8"))
    assert [(s["look"], s["figure"]) for s in sources] == [(k, f) for k in sprites.LOOKS for f in sprites.FIGURES]
    for source in sources:
        assert (source["package"], source["licence"], source["credit"]) == sprites.LOOKS[source["look"]]
        assert max(sprites.extent(source["figure"], source["look"])) > 0.97


def test_no_two_sprites_are_alike():
    pictures = {sprites.sprite(figure, look).tobytes() for figure in sprites.FIGURES for look in sprites.LOOKS}
    assert len(pictures) == len(sprites.FIGURES) * len(sprites.LOOKS)


def test_scenery_is_left_out_of_an_emoji():
    found = {"icons": {"x": {"body": "<path d='a'/><path d='b'/>"}}, "width": 8, "height": 8}
    assert "'a'" in make_sprites.svg(found, "x") and "'a'" not in make_sprites.svg(found, "x", 1)


def test_a_stream_of_scenes_is_seeded():
    assert world.random_scene(3, 5) == world.random_scene(3, 5) != world.random_scene(3, 6)
    scene = world.random_scene(3, 5)
    picture = world.render(scene)
    places.layers.cache_clear()
    assert np.array_equal(picture, world.render(scene))


@pytest.mark.parametrize(
    "actors, caption",
    [
        ((DOG,), "a dog on the beach"),
        ((replace(CAR, tells=("look", "colour")),), "a cartoon blue car on the beach"),
        ((Actor("running", "soft"),), "a man is running on the beach"),
        ((Actor("skiing", "soft", tells=("look",)), DOG), "a soft man is skiing in front of a dog on the beach"),
        ((Actor("elephant"),), "an elephant on the beach"),
    ],
)
def test_captions(actors, caption):
    assert Scene(actors, "beach").caption == caption
    assert Scene(actors, "beach", "sketch").caption == f"{caption}, pencil sketch"


def test_all_words_of_random_scenes_are_known():
    known = {word for caption in world.captions() for word in caption.replace(",", "").split()}
    random = {word for i in range(300) for word in world.random_scene(0, i).caption.replace(",", "").split()}
    assert random <= known


@pytest.mark.parametrize("figure", sprites.FIGURES)
def test_a_mask_is_where_the_picture_differs(figure):
    scene = Scene((Actor(figure, "soft", pose=world.gait(figure, 0.2), size=0.5),), "snow", "plain", Camera(0.1, 1.2))
    shown = world.draw(scene)
    changed = np.abs(shown.picture.astype(int) - world.plate(scene)).max(-1) > 12
    upper = np.arange(world.SIDE)[:, None] < shown.positions[0, 1]  # the shadow lies below
    both, either = (changed & shown.masks[0] & upper).sum(), ((changed | shown.masks[0]) & upper).sum()
    assert both / either > 0.85


@pytest.mark.parametrize("camera", [Camera(), Camera(0.2), Camera(-0.1, 1.3)])
@pytest.mark.parametrize("pose", [Pose(), Pose(True, 20), Pose(False, -10, 0.9, 0.1, 0.1)])
def test_a_position_is_the_middle_of_the_sprite(camera, pose):
    shown = world.draw(Scene((Actor("penguin", "flat", pose=pose, size=0.4),), "beach", camera=camera))
    rows, columns = shown.masks[0].nonzero()
    assert abs(np.array([columns.mean(), rows.mean()]) - shown.positions[0]).max() < 4


def test_a_nearer_actor_hides_the_other():
    near, far = replace(DOG, y=0.62), replace(CAR, y=0.56)
    shown, alone = world.draw(Scene((near, far), "road")), world.draw(Scene((far,), "road"))
    assert not (shown.masks[0] & shown.masks[1]).any()
    assert 0 < shown.masks[1].sum() < alone.masks[0].sum()
    assert np.array_equal(shown.masks[0], world.draw(Scene((near,), "road")).masks[0])


def test_the_far_follows_a_pan_less_than_the_near():
    canvas = places.Canvas(np.random.default_rng(0), 64)
    block = places.layer(np.zeros((*canvas.shape, 3), np.float32), canvas.edge(0.3 - abs(canvas.x - 0.5)), 1)

    def shift(depth):
        before, after = (
            np.asarray(world._through(block.picture, Camera(x), depth, 64))[32, :, 3] > 127 for x in (0, 0.2)
        )
        return before.argmax() - after.argmax()

    assert shift(1) == 13 and shift(0.5) in (6, 7) and shift(0.1) == 1


@pytest.mark.parametrize("motion", world.MOTIONS)
@pytest.mark.parametrize("camera", world.CAMERAS)
def test_clips(motion, camera):
    other = CAR if motion == "cross" else None
    clip = world.make_clip(motion, camera, DOG, "city", frames=5, side=64, other=other)
    assert clip.frames.shape == (5, 64, 64, 3) and clip.masks.shape == (5, 2 if other else 1, 64, 64)
    assert clip.masks[:, 0].any((1, 2)).all()
    places = clip.positions[:, 0]
    rows = [np.array([m.nonzero()[1].mean(), m.nonzero()[0].mean()]) for m in clip.masks[:, 0]]
    assert abs(np.array(rows) - places).max() < 4
    stays = camera == "follow" or (motion == "near" and camera != "pan")
    assert (np.ptp(places[:, 0]) < 4) == stays


def test_actors_that_cross_change_sides():
    clip = world.make_clip("cross", "still", DOG, "grass", other=CAR)
    apart = clip.positions[:, 0, 0] - clip.positions[:, 1, 0]
    assert apart[0] < -40 and apart[-1] > 40 and clip.caption == "a dog in front of a car on the grass"


def test_a_dancer_takes_two_poses_in_turn():
    clip = world.make_clip("line", "still", Actor("dancing"), "road")
    assert {scene.actors[0].pose.flip for scene in clip.scenes} == {False, True}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"motion": "fly"}, "motion is 'fly'; expected one of: line"),
        ({"camera": "drone"}, "camera is 'drone'"),
        ({"place": "moon"}, "place is 'moon'"),
        ({"style": "oil"}, "style is 'oil'"),
        ({"frames": 0}, "frames is 0"),
        ({"motion": "cross"}, "needs another actor"),
        ({"other": CAR}, "no other motion takes one"),
    ],
)
def test_what_the_world_does_not_have_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        world.make_clip(**{"motion": "line", "camera": "still", "actor": DOG, "place": "road", **changed})
