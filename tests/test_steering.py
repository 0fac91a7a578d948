"""What steers an edit away from the plain method; and the exact inversion."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import guidance, inversion
from tune_a_video.tav_core.method.guidance import Steering
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing

STEPS, CFG = 6, 5.0


def silent(*_args):
    """In place of the host's previews."""


@pytest.fixture
def start(inflated, clip, prompts):
    with torch.inference_mode():
        return editing.invert(inflated, clip, prompts[0], STEPS, silent)[0]


@pytest.fixture
def edit(inflated, start, prompts):
    """Sample with some steering: `edit(cfg_until=0.5)`."""

    def sample(model=inflated, latent=start, cfg=CFG, positive=prompts[1], **steering):
        with torch.inference_mode():
            how = Steering(**steering)
            return editing.sample_video(model, latent, positive, prompts[0], STEPS, cfg, silent, how)["samples"]

    return sample


def counting(model):
    """A MODEL that notes how many frames each call of its UNet has."""
    calls, counted = [], model.clone()

    def call(apply_model, args):
        calls.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    counted.set_model_unet_function_wrapper(call)
    return counted, calls


# --- guidance that changes ---


def test_the_same_guidance_at_both_ends_is_the_plain_edit(edit):
    assert torch.equal(edit(cfg_until=0.5, cfg_end=CFG), edit())


def test_guidance_changes_once_a_share_of_the_steps_is_done(inflated, edit):
    seen, noting = [], inflated.clone()

    def combine(args):
        seen.append(args["cond_scale"])
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])

    noting.set_model_sampler_cfg_function(combine)
    for share, first in ((0.5, 3), (0.0, 0), (0.9, 5), (0.7, 4)):
        seen.clear()
        edit(noting, cfg_until=share, cfg_end=2.0)
        assert seen == [CFG] * first + [2.0] * (STEPS - first)
    assert torch.equal(edit(cfg_until=0.0, cfg_end=2.0), edit(cfg=2.0))


def test_no_guidance_saves_half_of_a_steps_work(inflated, edit):
    model, calls = counting(inflated)
    edit(model, cfg_until=0.5, cfg_end=1.0)
    assert calls == [10] * 3 + [5] * 3


# --- fresh noise ---


def test_freedom_keeps_the_variance():
    inverted = 10 * torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(7))
    for freedom in (0.3, 1.0):
        freed = guidance.freed(inverted, 99**0.5, freedom, seed=1)
        assert abs(float(freed.std()) - 10) < 0.3
        correlation = torch.corrcoef(torch.stack([freed.flatten(), inverted.flatten()]))[0, 1]
        assert abs(float(correlation) - (1 - freedom) ** 0.5) < 0.05
    assert torch.equal(guidance.freed(inverted, 3.0, 0.0, seed=1), inverted)


def test_freedom_and_its_seed_change_the_edit(edit, start):
    some, same, other = (edit(freedom=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(some, same) and not torch.allclose(some, other, rtol=0.1)
    mask = torch.zeros(5, 64, 64)
    mask[..., 32:] = 1
    masked = edit(latent=start | {"noise_mask": mask}, freedom=0.5)
    clip = start[host.KEY]["clip"]
    assert torch.equal(masked[..., :4], clip[..., :4]), "what a mask keeps is not freed"


# --- structure of the source ---


def test_structure_of_the_clip_itself_changes_nothing(inflated, clip, prompts):
    """The first step of a reconstruction: the edit is where the source is."""
    with torch.inference_mode():
        start = editing.invert(inflated, clip, prompts[0], 1, silent)[0]
        ways = Steering(), Steering(structure=1.0)
        same, other = (
            [editing.sample_video(inflated, start, text, prompts[0], 1, 1.0, silent, way)["samples"] for way in ways]
            for text in prompts
        )
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*other, rtol=1e-2)


def test_structure_of_a_source_prompt_that_has_a_gap_is_refused(core, edit, start, prompts):
    """That no features were found is no cache's doing then."""
    late = core["ConditioningSetTimestepRange"]().set_range(prompts[0], 0.5, 1)[0]
    changed = start | {host.KEY: {**start[host.KEY], "prompt": late}}
    with pytest.raises(ValueError, match="DDIM Invert's prompt is active at 0 of the 2 noise levels"):
        edit(latent=changed, structure=0.4)


def test_structure_shares_no_areas_and_no_combined_source(core, edit, start, prompts):
    def area(prompt, *place):
        return core["ConditioningSetArea"]().append(prompt, *place, 1.0)[0]

    def masked(bounds):
        return core["ConditioningSetMask"]().append(prompts[1], torch.ones(64, 64), bounds, 1.0)[0]

    def of(source, **steering):
        return edit(latent=start | {host.KEY: {**start[host.KEY], "prompt": source}}, **steering)

    half, late = area(prompts[0], 32, 64, 0, 0), core["ConditioningSetTimestepRange"]().set_range(prompts[1], 0.7, 1)[0]
    combined = pytest.raises(
        ValueError, match="DDIM Invert's prompt combines 2 prompts, and structure shares .* of one"
    )
    for source in (prompts[0] + half, prompts[0] + prompts[1]):
        with combined:
            of(source, structure=0.4)
    areas = pytest.raises(ValueError, match="has an area .*, and structure shares features of whole pictures")
    with areas:
        of(half, structure=0.4)
    for positive in (prompts[1] + half, area(prompts[1], 64, 64, 0, 0), masked("mask bounds")):
        with areas:
            edit(positive=positive, structure=0.4)
        assert torch.isfinite(edit(positive=positive)).all()
    for run in (
        lambda: edit(positive=prompts[0] + prompts[1], structure=0.4),
        lambda: edit(positive=masked("default"), structure=0.4),
        lambda: edit(positive=prompts[1] + area(late, 32, 64, 0, 0), structure=0.4),  # when no more is shared
        lambda: of(prompts[0] + late, structure=0.4),
    ):
        assert torch.isfinite(run()).all()


def test_structure_of_the_clip_itself_changes_nothing_in_windows(model, prompts):
    clip = {"samples": torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 5}
    video = host.inflate(model, "video", Windows(4, 1))
    with torch.inference_mode():
        start = editing.invert(video, clip, prompts[0], 1, silent)[0]
        same = [
            editing.sample_video(video, start, prompts[0], prompts[0], 1, 1.0, silent, way)["samples"]
            for way in (Steering(), Steering(structure=1.0))
        ]
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-4)


def test_structure_is_shared_in_the_first_steps_and_leaves_nothing(inflated, edit, unchanged):
    model, calls = counting(inflated)
    with unchanged(inflated):
        edit(model, structure=0.5)
        assert calls == [5, 10] * 3 + [10] * 3
        assert not torch.allclose(edit(structure=0.5), edit(), rtol=1e-2)


def test_shared_features_are_the_sources(inflated, edit):
    parts = host.parts_of(host.unet_of(inflated))
    source = guidance.Source(parts)
    seen = {layer: [] for layer in source.layers}
    with ExitStack() as undo:
        for layer in source.layers:
            hook = layer.register_forward_hook(lambda layer, _args, out: seen[layer].append(out))
            undo.callback(hook.remove)
        edit(structure=0.2)  # one step: the source's call, then the edit's
    names = {name for name in parts.blocks if name.startswith("output_blocks.")}
    assert parts.decoder == names and len(source.layers) == 2 * len(names) + 1
    resnet = seen[parts.layout]
    # One half is of the source's prompt, and so the same.
    assert not all(torch.equal(half, resnet[0]) for half in resnet[1].split(5)), "before it is replaced, the edit's own"


def test_structure_needs_the_inversion(start, edit):
    with pytest.raises(ValueError, match="the clip behind these latents is not known"):
        edit(latent={"samples": start["samples"]}, structure=0.5)


def test_tiles_cannot_share_structure(inflated, edit):
    def tiles(apply_model, args):
        if len(args["input"]) == 5:  # the source's call
            return apply_model(args["input"], args["timestep"], **args["c"])
        parts = [apply_model(part, args["timestep"], **args["c"]) for part in args["input"].chunk(2, dim=-1)]
        return torch.cat(parts, dim=-1)

    tiled = inflated.clone()
    tiled.set_model_unet_function_wrapper(tiles)
    with pytest.raises(ValueError, match="structure shares features of shape .* set structure to 0"):
        edit(tiled, structure=0.5)


def test_the_layout_is_in_stable_diffusions_output_block_4(make_model):
    unet = host.unet_of(make_model(layers_per_block=2, block_out_channels=[32, 32, 64, 64],
                                   down_block_types=["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
                                   up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3))  # fmt: skip
    assert host.parts_of(unet).layout is unet.output_blocks[4][0]


# --- exact inversion ---


def test_exact_inversion_is_taken_back(inflated, clip, prompts):
    model, calls = counting(inflated)
    with torch.inference_mode():
        inflated.model.diffusion_model.out[2].weight *= 0.1  # a smooth path, which random weights alone have not
        errors, counts = {}, {}
        for method in editing.METHODS:
            calls.clear()
            start, _, _ = editing.invert(model, clip, prompts[0], 50, silent, method)
            counts[method] = len(calls)
            back = editing.sample_video(inflated, start, prompts[0], prompts[0], 50, 1.0, silent)["samples"]
            errors[method] = float((back - clip["samples"]).norm() / clip["samples"].norm())
    assert counts["plain"] == 50 and counts["exact"] <= 75
    assert errors["exact"] < errors["plain"] / 10, "20 dB"


def test_anderson_solves_what_plain_iteration_does_not():
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * torch.linspace(-1.3, 0.9, 6)
    offset = torch.randn(6, dtype=torch.float64)
    calls = []

    def function(y):
        calls.append(y)
        return matrix @ y + offset

    solved = inversion._solved(partial(function), offset)
    assert len(calls) <= inversion.MAX_CALLS
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, offset)
    assert (solved - exact).norm() / exact.norm() < 0.05
