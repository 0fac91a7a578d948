"""Masks: found by a word's cross-attention, and put on latents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tune_a_video.demo import model as demo_model
from tune_a_video.demo import world
from tune_a_video.nodes.mask import FindMask
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import masks
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing, finding

CAPTION = "a red car on the beach"


def silent(*_args):
    """In place of the host's previews."""


@pytest.fixture(scope="module")
def demo():
    """The demo's MODEL, CLIP and VAE, and a clip of its world."""
    with torch.inference_mode():
        return *demo_model.load(), world.make_clip("arc", "red car", "beach", frames=3, seed=100)


@pytest.fixture(scope="module")
def inverted(demo):
    """The demo's image model as a video model, and its clip inverted with empty text."""
    base, clip, vae, drawn = demo
    with torch.inference_mode():
        model = host.inflate(base, "per_frame")
        latent = {"samples": vae.encode(torch.from_numpy(drawn.frames).float() / 255)}
        return model, editing.invert(model, latent, host.encoded(clip, ""), 4, silent)[0]


# --- from attention to a mask ---


def test_attention_to_tokens_is_the_softmaxs_share_of_them():
    q, k = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = torch.zeros(2, 6)
    for frame in range(2):
        for place in range(6):
            for head in (slice(0, 4), slice(4, 8)):
                scores = torch.stack([q[frame, place, head] @ key[head] / 2 for key in k[frame]]).softmax(0)
                expected[frame, place] += (scores[1] + scores[4]) / 2
    torch.testing.assert_close(masks.attention_to(q, k, 2, [1, 4]), expected)


def test_maps_of_all_sizes_are_laid_over_each_other():
    square = torch.zeros(1, 6, 10)
    square[:, 2:4, 4:8] = 1
    halved = torch.zeros(1, 3, 5)
    halved[:, 1, 2:4] = 1
    combined = masks.combined([square.flatten(1), halved.flatten(1)], 6, 10)
    assert combined.shape == (1, 6, 10) and combined.min() == 0 and combined.max() == 1
    assert combined[square == 1].min() > 0.7 > combined[square == 0].max()
    odd = masks.combined([torch.arange(6.0)[None]], 3, 5)  # halved to 2 x 3, as the UNet rounds
    assert odd.shape == (1, 3, 5) and odd[0, 0, 0] == 0 and odd[0, -1, -1] == 1


def test_otsu_parts_two_classes():
    values = torch.cat([0.2 + 0.02 * torch.randn(900), 0.7 + 0.05 * torch.randn(100)]).clamp(0, 1)
    assert 0.25 < masks.otsu(values) < 0.6


def test_grown_and_feathered():
    mask = torch.zeros(2, 9, 9)
    mask[0, 4, 4] = 1
    assert masks.grown(mask, 2)[0].sum() == 25 and not masks.grown(mask, 2)[1].any()
    assert torch.equal(masks.grown(mask, 0), mask) and torch.equal(masks.feathered(mask, 0), mask)
    half = torch.zeros(1, 1, 8)
    half[..., 4:] = 1
    torch.testing.assert_close(masks.feathered(half, 1)[0, 0], torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1]))


def test_watching_changes_nothing_and_leaves_nothing(inflated, clip, prompts, unchanged):
    def noise():
        return editing.invert(inflated, clip, prompts[0], 2, silent)[0]["samples"]

    parts = host.parts_of(host.unet_of(inflated))
    with unchanged(inflated), torch.inference_mode():
        plain = noise()
        with masks.watching(parts, [2]) as maps:
            assert torch.equal(noise(), plain)
    assert len(maps) == 2 * len(parts.blocks)
    assert all(a.shape[0] == 5 and a.min() >= 0 and a.max() <= 1 for a in maps)


def test_maps_of_windows_become_the_clips():
    levels = [[[0, 1, 2], [0, 2, 3]], [[0, 1], [0, 2], [0, 3]], [[0, 1, 2], [0, 2, 3]]]
    of_block = {0: torch.arange(8.0).view(4, 2), 1: -torch.arange(4.0)[:, None].expand(4, 6)}
    maps = [of_block[block][window] for windows in levels for window in windows for block in (0, 1)]
    whole = masks.of_whole_clips(maps, 2, levels, 4)
    assert len(whole) == 6 and all(torch.equal(a, of_block[i % 2]) for i, a in enumerate(whole))
    differs = masks.of_whole_clips([torch.zeros(3, 2), torch.ones(3, 2)], 1, levels[:1], 4)[0]
    assert differs[:, 0].tolist() == [0.5, 0, 0.5, 1]


# --- words ---


@pytest.mark.parametrize(
    "text, word, expected",
    [
        (CAPTION, "car", [3]),
        (CAPTION, "Red Car", [2, 3]),
        ("a (red:1.3) car", "red", [2]),
        ("a car beside a car", "(car:1.2)", [2, 5]),
        ("a tokenization", "tokenization", [2, 3]),
    ],
)
def test_positions_of_words(demo, text, word, expected):
    assert host.positions(demo[1], text, word) == expected


def test_a_long_captions_words_are_found_in_their_part(demo):
    text = " ".join(["sand"] * 90 + ["car"])
    (position,) = host.positions(demo[1], text, "car")
    assert 77 < position < 2 * 77
    assert host.encoded(demo[1], text)[0][0].shape[1] == 2 * 77


@pytest.mark.parametrize("word", ["dog", "", " ", "ca", "car red"])
def test_a_word_that_the_caption_lacks(demo, inverted, word):
    with pytest.raises(ValueError, match=f"the word '{word}' is not in the caption '{CAPTION}'"):
        finding.find_mask(*inverted, demo[1], CAPTION, word)


# --- on a clip ---


def outline(drawn):
    """Latent cells with the object in them: where each frame is other than without it."""
    empty = [world.render(replace(scene, x=9.0)) for scene in drawn.scenes]  # it is far outside of the picture
    differs = (torch.from_numpy(drawn.frames).float() - torch.from_numpy(np.stack(empty)).float()).abs().amax(-1) > 30
    return masks.F.avg_pool2d(differs[:, None].float(), 8)[:, 0] > 0.25


def test_it_finds_the_object_that_the_word_names(demo, inverted, unchanged):
    model, latent = inverted
    with unchanged(model), torch.inference_mode():
        masked, mask = finding.find_mask(model, latent, demo[1], CAPTION, "car", callback=silent)
    assert mask.shape == (3, 128, 128) and set(mask.unique().tolist()) == {0.0, 1.0}
    found, expected = mask[:, 4::8, 4::8] > 0, outline(demo[3])
    assert (found & expected).sum() / (found | expected).sum() > 0.5
    assert torch.equal(masked["noise_mask"][:, 0], mask) and masked["samples"] is latent["samples"]


def test_it_finds_the_object_in_windows(demo, inverted):
    base, clip, vae, _short = demo
    drawn = world.make_clip("arc", "red car", "beach", frames=6, seed=100)
    with torch.inference_mode():
        model = host.inflate(base, "per_frame", Windows(4, 1))
        latent = {"samples": vae.encode(torch.from_numpy(drawn.frames).float() / 255)}
        start = editing.invert(model, latent, host.encoded(clip, ""), 2, silent)[0]
        mask = finding.find_mask(model, start, clip, CAPTION, "car", callback=silent)[1]
    found, expected = mask[:, 4::8, 4::8] > 0, outline(drawn)
    assert (found & expected).sum() / (found | expected).sum() > 0.5


def test_a_background_edit_keeps_what_an_object_edit_changes(demo, inverted):
    model, latent = inverted
    with torch.inference_mode():
        ways = [
            finding.find_mask(model, latent, demo[1], CAPTION, "car", *way, callback=silent)[1]
            for way in (("object", 0), ("background", 0), ("object", 16), ("object", 0, 4))
        ]
    mask, rest, larger, soft = ways
    assert torch.equal(rest, 1 - mask)
    assert torch.equal(larger, masks.grown(mask, 16)) and larger.sum() > mask.sum()
    assert torch.equal(soft, masks.feathered(mask, 4)) and ((soft > 0) & (soft < 1)).any()


def test_an_edit_keeps_the_rest_to_the_bit(demo, inverted):
    model, latent = inverted
    clip = demo[1]
    with torch.inference_mode():
        masked, mask = FindMask.execute(model, latent, clip, CAPTION, "car", "object", 8, 0).result
        edit = editing.sample_video(
            model, masked, host.encoded(clip, "a dog on the beach"), host.encoded(clip, ""), 4, 3.0, silent
        )["samples"]
    kept = mask[:, None, 4::8, 4::8].expand_as(edit) == 0
    source = latent[host.KEY]["clip"]
    assert torch.equal(edit[kept], source[kept]) and not torch.allclose(edit[~kept], source[~kept], rtol=0.1)


def test_latents_that_are_no_inversion_are_refused(demo, inverted):
    model, latent = inverted
    changed = latent | {"samples": latent["samples"].flip(-1)}
    for other in ({"samples": latent["samples"]}, changed):
        with pytest.raises(ValueError, match="the clip behind these latents is not known.*Connect inverted"):
            finding.find_mask(model, other, demo[1], CAPTION, "car")


def test_another_size_inside_the_unet_is_named(core, demo, inverted):
    model, latent = inverted
    shrunk = core["PatchModelAddDownscale"].execute(model, 3, 1.5, 0.0, 0.35, True, "bicubic", "bicubic").result[0]
    with pytest.raises(ValueError, match="another node changes the size inside the UNet"), torch.inference_mode():
        finding.find_mask(shrunk, latent, demo[1], CAPTION, "car", callback=silent)


@pytest.mark.parametrize("shape", [(5, 64, 96), (1, 480, 640), (480, 640)])
def test_a_mask_of_another_shape_is_refused(inflated, clip, prompts, shape):
    with pytest.raises(ValueError, match="mask is (96 x 64|640 x 480), another shape than the clip's 64 x 64"):
        editing.invert(inflated, clip | {"noise_mask": torch.ones(shape)}, prompts[0], 2)


@pytest.mark.parametrize("shape", [(5, 64, 64), (1, 512, 512), (8, 8), (5, 1, 64, 63)])
def test_a_mask_of_another_scale_is_taken(inflated, clip, prompts, shape):
    with torch.inference_mode():
        editing.invert(inflated, clip | {"noise_mask": torch.ones(shape)}, prompts[0], 1)
