"""World 2's judge: what it says of pictures seen without a fault, and the training that makes its segmenter see."""

import numpy as np
import pytest
import torch
from tune_a_video.demo import model
from tune_a_video.lab import chimeras, networks
from tune_a_video.lab.world2 import judge, segmenter, train, world
from tune_a_video.lab.world2.judge import Seen
from tune_a_video.lab.world2.world import Actor, Scene

DOG = Scene((Actor("dog", "flat", size=0.6, tells=("look",)),), "road", "sunset")
CAT = Scene((Actor("cat", "soft", size=0.6),), "road", "sunset")


def seen(*scenes):
    """As a segmenter without a fault sees them."""
    truths = [segmenter.truth_of(scene, world.draw(scene)) for scene in scenes]
    return Seen(*(torch.from_numpy(np.stack(part)).long() for part in zip(*truths, strict=True)))


def masks(*scenes):
    return torch.from_numpy(np.stack([world.draw(scene).masks[0] for scene in scenes]))


def cut(a, b, at=64):
    """The left of one picture and the right of another."""
    return Seen(*(torch.cat([x[..., :at], y[..., at:]], -1) for x, y in zip(a[:2], b[:2], strict=True)), a.style)


def test_a_whole_object():
    dog = masks(DOG)
    assert judge.whole_object(seen(DOG), "dog", dog, dog).all()
    assert judge.whole_object(seen(DOG), "dog", masks(CAT), dog).all()  # facing the other way, say
    assert not judge.whole_object(seen(CAT), "dog", dog, dog).any()


@pytest.mark.parametrize("at", [56, 64, 72])
def test_half_a_thing_is_not_whole(at):
    dog = masks(DOG)
    for half in (cut(seen(DOG), seen(CAT), at), cut(seen(CAT), seen(DOG), at)):
        assert not judge.whole_object(half, "dog", dog, dog).any()


def test_an_object_elsewhere_is_not_whole():
    away = masks(DOG).roll(40, 2)
    assert not judge.whole_object(seen(DOG), "dog", away, away).any()


def test_what_is_left_of_the_old_object():
    only_dog = masks(DOG) & ~masks(CAT)
    assert judge.object_left(seen(DOG), "dog", only_dog) == 1
    assert judge.object_left(seen(CAT), "dog", only_dog) == 0
    assert 0.1 < judge.object_left(cut(seen(DOG), seen(CAT)), "dog", only_dog) < 0.9


def test_a_patch_of_another_place_is_not_the_place():
    dog = seen(DOG)
    assert judge.whole_place(dog, "road").all() and not judge.whole_place(dog, "city").any()
    city = torch.full_like(dog.shows, segmenter.CLASSES.index("city"))
    patched = chimeras.patch(city[..., None], dog.shows[..., None], masks(DOG))[..., 0]
    assert not judge.whole_place(dog._replace(shows=patched), "road").any()


def test_the_verb():
    run, walk = (Scene((Actor(verb, "soft"),), "beach") for verb in ("running", "walking"))
    assert judge.figure_right(seen(run, run, walk, run), "running") == 0.75


def test_where_a_figure_is():
    shown = world.draw(DOG)
    place = judge.places(seen(DOG, CAT), "dog")
    assert abs(place[0] - shown.positions[0]).max() < 5 and np.isnan(place[1]).all()
    assert np.array_equal(place[:1], judge.middles(masks(DOG)))


def test_looks_that_agree():
    looks = [Scene((Actor("car", look, "red"),), "beach") for look in ("soft", "flat", "flat", "glossy")]
    assert judge.looks(seen(*looks)) == [0, 1, 1, 2] and judge.look_agreement(seen(*looks)) == 0.5
    nothing = seen(looks[0])._replace(shows=torch.full((1, 128, 128), segmenter.PLACE))
    assert judge.looks(nothing) == [-1] and judge.look_agreement(nothing) == 0


def test_a_still_picture():
    assert judge.picture_right(seen(DOG), DOG) == [{"object": True, "look": True, "place": True, "style": True}]
    other = Scene((Actor("dog", "soft", size=0.6),), "city", "plain")
    assert judge.picture_right(seen(other), DOG) == [{"object": True, "look": False, "place": False, "style": False}]
    assert not judge.picture_right(cut(seen(DOG), seen(CAT)), DOG)[0]["object"]


@pytest.mark.parametrize("figure", judge.FIGURES)
def test_two_of_a_figure_beside_each_other_are_not_one(figure):
    one = Scene((Actor(figure, "flat", size=0.45, x=0.26),), "grass")
    right = seen(one)
    assert judge.picture_right(right, one)[0]["object"]
    columns = (right.shows < segmenter.PLACE)[0].any(0).nonzero()[:, 0]
    beside = right.shows.roll(int(columns[-1] - columns[0]) + 1, 2)
    two = right._replace(shows=torch.where(right.shows < segmenter.PLACE, right.shows, beside))
    assert not judge.picture_right(two, one)[0]["object"]


def test_an_outline_is_compared_without_its_place_size_and_specks():
    small, large = (
        masks(Scene((Actor("cat", "soft", x=x, size=size),), "road"))[0] for x, size in ((0.4, 0.4), (0.6, 0.7))
    )
    speckled = small.clone()
    speckled[:2, :2] = True
    a, b, c = (judge.fitted(mask) for mask in (small, large, speckled))
    assert judge.iou(a[None], b[None]) > 0.9 and torch.equal(a, c)
    assert not judge.fitted(torch.zeros(8, 8, dtype=torch.bool)).any()


def test_the_nearer_actor_is_the_truth_where_two_overlap():
    shown = world.draw(both := Scene((DOG.actors[0], CAT.actors[0]), "road"))
    truth = segmenter.truth_of(both, shown)
    assert (truth.shows[shown.masks[0]] == segmenter.CLASSES.index("dog")).all()
    assert ((truth.look == segmenter.NO_LOOK) == (truth.shows == segmenter.CLASSES.index("road"))).all()


def test_a_segmenter_is_kept(tmp_path):
    network = segmenter.Segmenter()
    segmenter.save(network, tmp_path / "s.safetensors", {})
    pictures = torch.rand(2, 128, 128, 3)
    with torch.no_grad():
        scores = segmenter.load(tmp_path / "s.safetensors")(pictures.movedim(-1, 1))
    assert scores.shows.shape == (2, len(segmenter.CLASSES), 128, 128) and scores.style.shape == (2, 3)
    assert judge.look_at(network, pictures).look.shape == (2, 128, 128)


def test_labelled_pictures_carry_their_truth():
    scene = world.random_scene(0, 7)
    labelled, shown = train.labelled(7, 0), world.draw(scene)
    assert np.array_equal(labelled[..., :3], shown.picture)
    assert np.array_equal(labelled[..., 3] < segmenter.PLACE, shown.masks.any(0))


def test_the_segmenter_sees_what_the_autoencoder_loses(tmp_path):
    """Each picture twice, as drawn and as an autoencoder passes it, with one truth; the folder's own is preferred."""
    (drawn, passed), styles = train.judged(3, 0, tmp_path / "judged.pt")
    assert torch.equal(drawn[:, 3:], passed[:, 3:]) and not torch.equal(drawn[:, :3], passed[:, :3])
    assert (drawn[:, :3].float() - passed[:, :3].float()).abs().mean() < 12 and len(styles) == 3
    torch.save(networks.new_vae().state_dict(), tmp_path / "vae.pt")
    (_, by_own), _ = train.judged(3, 0, tmp_path / "again.pt")
    assert not torch.equal(by_own, passed)
    assert torch.equal(train.judged(3, 0, tmp_path / "judged.pt")[0][1], passed)  # kept


def test_halves_are_halves():
    torch.manual_seed(0)
    halves = train.half_planes(50, 32)
    assert halves.shape == (50, 1, 32, 32) and 0.4 < halves.float().mean() < 0.6
    assert halves.float().mean((1, 2, 3)).min() > 0.2


def test_a_model_starts_from_one_with_fewer_words(tmp_path):
    vocabulary = networks.Vocabulary(["a car is dancing"])
    network = torch.nn.ModuleDict({"text": networks.new_text_encoder(len(vocabulary)), "unet": networks.new_unet()})
    own = network["text"].get_input_embeddings().weight.clone()
    train.start_from(model.WEIGHTS, network, vocabulary)
    weights = train.load_file(model.WEIGHTS)
    rows = network["text"].get_input_embeddings().weight
    car, dancing = (vocabulary.rows([word])[0, 1] for word in ("car", "dancing"))
    old = weights[model.ROWS].float()
    known = vocabulary.ids[car] == weights[model.IDS]
    assert torch.equal(rows[car], old[:-1][known][0]) and torch.equal(rows[-1], old[-1])
    assert torch.equal(rows[dancing], own[dancing])


def test_what_was_begun_fits_the_networks():
    weights = train.load_file(train.BEGUN)
    networks.new_unet().load_state_dict(model.part(weights, model.UNET_PREFIX))
    networks.new_vae().load_state_dict(model.part(weights, model.VAE_PREFIX))
    assert len(weights[model.ROWS]) == len(weights[model.IDS]) + 1
