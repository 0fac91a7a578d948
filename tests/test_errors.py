"""Bad input: one message that says what is wrong and what to do, before any long work."""

import comfy.hooks
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_base
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from host_node import outputs_of
from small import TINY
from tune_a_video.nodes import DDIMInvert, InflateUNet, OneShotTune, PrepareClip, SampleVideo
from tune_a_video.tav_core import host
from tune_a_video.tav_core.pipeline import one_shot
from tune_a_video.tav_core.store import published

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Fails a test in which any work begins."""

    def work(*_args, **_kwargs):
        raise AssertionError("work began before the input was checked")

    monkeypatch.setattr(one_shot, "TrainingUNet", work)
    monkeypatch.setattr(host, "run_sampler", work)


@pytest.fixture
def tune(inflated, clip, prompts):
    def run(**inputs):
        defaults = {"model": inflated, "latents": clip, "caption": prompts[1], "steps": 1, "learning_rate": 1e-5}
        defaults |= {"seed": 0, "precision": "fp32"}
        return OneShotTune.execute(**{**defaults, "weight_decay": 0.01, "max_grad_norm": 1.0, **inputs})

    return run


@pytest.fixture
def invert(inflated, clip, prompts):
    defaults = {"model": inflated, "latents": clip, "prompt": prompts[0], "steps": 5}
    return lambda **inputs: DDIMInvert.execute(**{**defaults, **inputs})


@pytest.fixture
def sample(inflated, clip, prompts):
    latents = {**clip, host.KEY: {"steps": 5}}
    defaults = {"model": inflated, "latents": latents, "positive": prompts[1], "negative": prompts[0]}
    return lambda **inputs: SampleVideo.execute(**{**defaults, "steps": 5, "cfg": 5.0, **inputs})


@pytest.fixture(params=["tune", "invert", "sample"])
def node(request):
    """Each of the nodes that do long work."""
    return request.getfixturevalue(request.param)


def test_a_good_input_gets_as_far_as_the_work(node):
    with pytest.raises(AssertionError, match="work began"):
        node()


def test_frames_for_the_clip():
    def prepare(frames, **inputs):
        defaults = {"start": 0, "stride": 1, "count": 4, "width": 64, "height": 64, "fit": "crop", "source_fps": 24.0}
        return PrepareClip.execute(frames, **{**defaults, **inputs})

    with pytest.raises(ValueError, match="there are no frames"):
        prepare(torch.zeros(0, 64, 64, 3))
    with pytest.raises(ValueError, match="the largest count is 3"):
        prepare(torch.zeros(8, 64, 64, 3), stride=3)
    with pytest.raises(ValueError, match="width is 60; it must be a multiple of 8, such as 56 or 64"):
        prepare(torch.zeros(8, 64, 64, 3), width=60)


def test_one_frame_cannot_be_tuned_on(tune, clip):
    with pytest.raises(ValueError, match="has 1 frame; at least 2 are needed"):
        tune(latents={"samples": clip["samples"][:1]})


def test_no_frames(node, clip):
    with pytest.raises(ValueError, match="has 0 frames; at least"):
        node(latents={"samples": clip["samples"][:0]})


def base_model(kind, config, network=None):
    with torch.device("meta"):
        supported = comfy.supported_models.SD15(dict(config))
        supported.unet_config = {**config, "dtype": torch.float32}
        model = kind(supported, **({"unet_model": network} if network else {}))
    return ModelPatcher(model, CPU, CPU)


def test_other_architectures_are_named():
    diffusion_transformer = {"input_size": 16, "depth": 1, "adm_in_channels": 16, "context_size": 16}
    other = base_model(comfy.model_base.BaseModel, {**diffusion_transformer}, mmdit.OpenAISignatureMMDITWrapper)
    with pytest.raises(ValueError, match=r"is a BaseModel \(OpenAISignatureMMDITWrapper\), not a Stable Diffusion"):
        InflateUNet.execute(other, "video")
    conditioned = {**published.to_unet_config(TINY), "num_classes": "sequential", "adm_in_channels": 8}
    with pytest.raises(ValueError, match="is a BaseModel with extra conditioning"):
        InflateUNet.execute(base_model(comfy.model_base.BaseModel, conditioned), "video")
    inpainting = published.to_unet_config({**TINY, "in_channels": 9})
    with pytest.raises(ValueError, match="takes 9 channels instead of 4: it is an inpainting"):
        InflateUNet.execute(base_model(comfy.model_base.BaseModel, inpainting), "video")


def test_model_inflated_twice_or_with_other_sampling(core, model, inflated):
    with pytest.raises(ValueError, match="inflated already"):
        InflateUNet.execute(inflated, "video")
    for kind in ("lcm", "x0"):
        changed = core["ModelSamplingDiscrete"]().patch(model, kind, False)[0]
        with pytest.raises(ValueError, match="Remove the LCM or other model sampling node"):
            InflateUNet.execute(changed, "video")


def test_model_that_is_not_inflated(node, model):
    with pytest.raises(ValueError, match="not inflated: connect it through the Inflate UNet node"):
        node(model=model)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: torch.cat([x, x], 1), "latents have 8 channels, this MODEL's have 4"),
        (lambda x: x[None], r"latents have shape \(1, 5, 4, 8, 8\); expected \[frames, channels"),
        (lambda x: x / 0, "latents hold NaN or infinite values"),
        (
            lambda x: x * torch.nan,
            "latents hold NaN or infinite values: .* with --bf16-vae or --fp32-vae, or load a VAE",
        ),
    ],
)
def test_latents(node, clip, spoil, message):
    with pytest.raises(ValueError, match=message):
        node(latents={"samples": spoil(clip["samples"])})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.repeat(3, 1, 1), "has a batch of 3 prompts; expected 1 for the whole clip, or 5, one a frame"),
        (lambda c: c.repeat(1, 1, 2), "is 32 wide, this MODEL reads 16: encode it with the CLIP of the same"),
    ],
)
def test_conditioning(tune, invert, sample, prompts, spoil, message):
    wrong = [[spoil(prompts[0][0][0]), {}]]
    for run in (lambda: tune(caption=wrong), lambda: invert(prompt=wrong), lambda: sample(positive=wrong)):
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(ValueError, match=f"negative {message}"):
        sample(negative=wrong)
    with pytest.raises(ValueError, match="prompt is empty: connect a CLIP Text Encode"):
        invert(prompt=[])
    with pytest.raises(ValueError, match="caption combines 2 prompts"):
        tune(caption=[*prompts[0], *prompts[1]])


def test_prompts_that_are_not_active_at_all_noise_levels(core, invert, sample, prompts):
    """The host predicts zeros there: an inversion or edit of garbage, without a word."""

    def part(prompt, start, end):
        return core["ConditioningSetTimestepRange"]().set_range(prompt, start, end)[0]

    both = part(prompts[0], 0, 0.6) + part(prompts[1], 0.6, 1)
    for start, end in ((0, 0.5), (0.5, 1), (0.2, 0.8)):
        gap = part(prompts[0], start, end)
        refused = pytest.raises(ValueError, match=r"is active at [1-4] of the 5 noise levels .*ConditioningSetTimestep")
        for run in (lambda gap=gap: invert(prompt=gap), lambda gap=gap: sample(positive=gap)):
            with refused:
                run()
        with pytest.raises(ValueError, match="negative is active at"):
            sample(negative=gap)
    late = part(prompts[0], 0.5, 1)
    early = part(prompts[0], 0, 0.5)
    goes_on = pytest.raises(AssertionError, match="work began")
    for run in (
        lambda: invert(prompt=both),
        lambda: invert(prompt=prompts[0] + late),
        lambda: sample(positive=both, negative=part(prompts[0], 0, 1)),
        lambda: sample(negative=late, cfg=1.0),  # the host does not ask for it
        lambda: sample(negative=early, cfg_until=0.4),
    ):
        with goes_on:
            run()


def test_hooks_that_change_on_the_way_are_refused_in_an_inversion(invert, sample, prompts):
    """The host goes through keyframes as noise falls: as it rises, all levels have the last one's strength."""

    def hooked(*strengths):
        up, down = torch.ones(2, 32, 2)
        name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
        lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down.T}
        group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
        for i, strength in enumerate(strengths):
            keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=i / len(strengths)))
        group.set_keyframes_on_hooks(keyframes)
        return comfy.hooks.set_conds_props([prompts[0]], 1.0, "default", hooks=group)[0]

    with pytest.raises(ValueError, match="prompt has a hook whose strength changes .*Create Hook Keyframe"):
        invert(prompt=hooked(1.0, 0.0))
    for run in (
        lambda: invert(prompt=hooked()),
        lambda: invert(prompt=hooked(0.5)),
        lambda: sample(positive=hooked(1.0, 0.0)),
    ):
        with pytest.raises(AssertionError, match="work began"):
            run()


def test_frames_of_model_and_latents_disagree(tune, invert, sample, inflated, clip):
    on_three = host.with_inflation(inflated, host.Inflation(host.inflation_of(inflated).temporal, "video", 3))
    for run in (tune, invert, sample):
        with pytest.raises(ValueError, match="tuned on 3 frames, but the latents have 5"):
            run(model=on_three)


def test_latents_that_are_not_noise_or_of_other_steps(sample, clip):
    with pytest.raises(ValueError, match=r"not noise .* connect the inverted latents of DDIM Invert"):
        sample(latents={"samples": clip["samples"]}, steps=50)
    with pytest.raises(ValueError, match="inverted in 5 steps, but steps is 6 here"):
        sample(steps=6)


def test_inverted_latents_are_no_clip(tune, invert, clip):
    inverted = clip | {host.KEY: {"steps": 5, "clip": clip["samples"], "inverted": clip["samples"]}}
    sampled = inverted | {"samples": clip["samples"] * 0.5}  # the host's samplers hand on how their latents were made
    for run in (tune, invert):
        with pytest.raises(ValueError, match="the noise that DDIM Invert made of a clip.*connect VAE Encode"):
            run(latents=inverted)
        with pytest.raises(AssertionError, match="work began"):
            run(latents=sampled)


@pytest.mark.parametrize("steps", [0, 501])
def test_steps_out_of_range(invert, sample, clip, steps):
    for run in (invert, sample):
        with pytest.raises(ValueError, match=f"steps is {steps}; DDIM takes 1 to 500"):
            run(steps=steps)


def test_recipe_out_of_range(tune):
    with pytest.raises(ValueError, match="steps is 0; tuning needs at least 1"):
        tune(steps=0)
    with pytest.raises(ValueError, match="learning_rate is 2; it must be above 0 and at most 1"):
        tune(learning_rate=2)


@pytest.mark.parametrize("before", [False, True])  # in front of Inflate UNet, where it stays on the MODEL
@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
def test_context_windows(node, core, model, before, schedule):
    def windowed(model):
        options = {"context_length": 3, "context_overlap": 1, "context_schedule": schedule}
        return outputs_of(core["ContextWindowsManual"], model=model, **options)[0]

    video = host.inflate(windowed(model), "video") if before else windowed(host.inflate(model, "video"))
    with pytest.raises(
        ValueError, match="context windows would cut .* Remove the context windows node .* set window in Inflate UNet"
    ):
        node(model=video)
