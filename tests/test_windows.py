"""Long clips in windows: each frame is computed in good company, and the video is one."""

from itertools import count, pairwise

import comfy.controlnet
import comfy.gligen
import comfy.model_base
import comfy.model_management
import pytest
import torch
from host_node import outputs_of
from hypothesis import given
from hypothesis import strategies as st
from tune_a_video.nodes import ApplyWeights, InflateUNet
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.guidance import Steering
from tune_a_video.tav_core.method.inflation import TemporalLayers, inflated
from tune_a_video.tav_core.method.tuning import Draws, Recipe
from tune_a_video.tav_core.method.windows import SPREAD_FROM, WHOLE, Windows, blended
from tune_a_video.tav_core.pipeline import editing, finding, network, one_shot
from tune_a_video.tav_core.pipeline.one_shot import Saving, one_shot_tune
from tune_a_video.tav_core.store import weights as store

LENGTH = 11
CUT = Windows(5, 2)


@pytest.fixture
def long():
    """LATENT of eleven frames."""
    return {"samples": torch.randn(LENGTH, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 5}


@pytest.fixture
def temporal(model):
    layers = TemporalLayers(host.parts_of(host.unet_of(model)))
    generator = torch.Generator().manual_seed(3)
    layers.assign({name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in layers.named().items()})
    return layers


@pytest.fixture
def in_windows(model, temporal):
    def make(windows, group_norm="video"):
        return host.with_inflation(model, host.Inflation(temporal, group_norm, windows=windows))

    return make


def call(model, x, timesteps, context, control=None, **options):
    """One call of the UNet, as a sampling run makes it."""
    options = {"cond_or_uncond": [0, 1], "wrappers": model.wrappers, **options}
    with torch.inference_mode():
        host.load(model)
        return model.model.diffusion_model(x, timesteps, context, control=control, transformer_options=options)


def inputs(videos=2, frames=LENGTH):
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(videos * frames, *shape, generator=generator)

    return noise(4, 8, 8), noise().abs() * 100, noise(7, 16)


# --- which frames -----------------------------------------------------------------------------------------------


@given(st.data())
def test_windows_cover_a_clip(data):
    frames = data.draw(st.integers(4, 40))
    overlap = data.draw(st.integers(0, (frames - 1) // 2))
    clip = data.draw(st.integers(2, 300))
    cut = Windows(frames, overlap)
    windows = cut.of(clip)
    assert {len(window) for window in windows} == {cut.at_once(clip)} == {min(frames, clip)}
    assert all(window[0] == 0 for window in windows)
    assert {frame for window in windows for frame in window} == set(range(clip))
    runs = [window[1:] for window in windows]
    assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
    assert all(len({*a} & {*b}) >= overlap for a, b in pairwise(runs))
    assert runs[0][:1] in ([1], []) and runs[-1][-1:] in ([clip - 1], [])
    shorter = len(windows) - 1  # so many would not do
    assert not shorter or shorter * (frames - 1) - (shorter - 1) * overlap < clip - 1


@given(st.integers(4, 40), st.integers(2, 300))
def test_windows_at_much_noise_are_spread_over_the_clip(frames, clip):
    windows = Windows(frames).of(clip, SPREAD_FROM)
    assert all(window[0] == 0 and 2 <= len(window) <= frames for window in windows)
    assert sorted(frame for window in windows for frame in window[1:]) == [*range(1, clip)]
    assert (len(windows) - 1) * (frames - 1) < clip - 1  # so many would not do
    assert all(window[1] <= len(windows) and window[-1] >= clip - len(windows) for window in windows)


@given(st.integers(4, 40), st.integers(2, 300))
def test_windows_of_a_tune_leave_no_frame_out(frames, clip):
    windows = Windows(frames).for_tuning(clip)
    assert {len(window) for window in windows} == {min(frames, clip)} and all(window[0] == 0 for window in windows)
    assert {frame for window in windows for frame in window} == set(range(clip))
    strides = {after - before for _first, *run in windows for before, after in pairwise(run)}
    assert strides <= {max((clip - 1) // (frames - 1), 1)}


def test_the_windows_of_a_clip():
    assert Windows(5, 2).of(11, SPREAD_FROM - 1) == Windows(5, 2).of(11)
    assert Windows(5, 2).of(11, SPREAD_FROM) == [[0, 1, 4, 7, 10], [0, 2, 5, 8], [0, 3, 6, 9]]
    assert Windows(16, 4).of(16, 999) == [[*range(16)]]
    assert Windows(5, 2).of(11) == [[0, 1, 2, 3, 4], [0, 3, 4, 5, 6], [0, 5, 6, 7, 8], [0, 7, 8, 9, 10]]
    assert Windows(16, 4).of(16) == [[*range(16)]] == WHOLE.of(16) == Windows(20, 4).of(16)


@pytest.mark.parametrize(
    ("frames", "overlap", "problem"),
    [
        (3, 0, "window is 3; it needs 4 frames or more, 0 takes the whole clip"),
        (-1, 0, "window is -1"),
        (8, 4, "overlap is 4; it must be from 0 to below half of the window, which is 8"),
        (8, -1, "overlap is -1"),
    ],
)
def test_windows_that_cannot_be(frames, overlap, problem, model):
    with pytest.raises(ValueError, match=problem):
        InflateUNet.execute(model, "video", frames, overlap)


@given(st.integers(4, 12), st.integers(2, 60), st.sampled_from([0, 999]), st.data())
def test_a_frame_is_the_mean_of_its_windows(frames, clip, timestep, data):
    windows = Windows(frames, data.draw(st.integers(0, (frames - 1) // 2))).of(clip, timestep)
    video = torch.randn(2, clip, 3, dtype=torch.float64)
    same = blended(windows, clip, lambda numbers: video[:, numbers].flatten(0, 1))
    torch.testing.assert_close(same, video.flatten(0, 1))
    # Ones from one window and zeros from the others: its weights.
    turns = iter(range(len(windows)))
    weights = blended(windows, clip, lambda numbers: torch.eye(len(windows))[next(turns)].expand(len(numbers), -1))
    torch.testing.assert_close(weights.sum(1), torch.ones(clip))
    for number, window in enumerate(windows):
        seen = weights[window[1:], number]
        assert (seen > 0).all() and weights[:, number].count_nonzero() == len(window) - (number > 0)


# --- what is computed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("group_norm", ["video", "per_frame"])
def test_a_call_is_its_windows_blended(in_windows, model, temporal, group_norm, noisy):
    x, timesteps, context = inputs()
    timesteps = timesteps.clamp(max=499) + (500 if noisy else 0)
    seen = call(in_windows(CUT, group_norm), x, timesteps, context, **{host.KEY: (LENGTH, "")})

    def alone(numbers):
        """The plain way: the frames of a window as a clip of their own."""
        rows = [*numbers, *(LENGTH + number for number in numbers)]
        parts = host.parts_of(host.unet_of(model))
        with inflated(parts, temporal, 2, len(numbers), group_norm) as attention:
            options = {host.OVERRIDE: attention.attend}
            unet = model.model.diffusion_model
            return unet(x[rows], timesteps[rows], context[rows], transformer_options=options)

    with torch.inference_mode():
        torch.testing.assert_close(
            seen, blended(CUT.of(LENGTH, float(timesteps.max())), LENGTH, alone), rtol=1e-4, atol=1e-4
        )
    whole = call(in_windows(WHOLE, group_norm), x, timesteps, context, **{host.KEY: (LENGTH, "")})
    assert not torch.allclose(seen, whole, rtol=0.1)


@pytest.mark.parametrize("windows", [Windows(LENGTH, 2), Windows(40, 4)])
def test_a_clip_within_a_window_is_computed_whole(core, in_windows, prompts, long, windows):
    def sample(model):
        with torch.inference_mode():
            return core["KSampler"]().sample(model, 7, 3, 3.0, "euler", "normal", *prompts, long)[0]["samples"]

    assert torch.equal(sample(in_windows(windows)), sample(in_windows(WHOLE)))


def test_all_that_comes_per_frame_is_cut_alike(in_windows):
    """Frame by frame reversed in, reversed out: where windows lie alike from both ends, and no frame is the first."""
    x, timesteps, context = inputs(videos=1)
    control = {"middle": [torch.randn(LENGTH, 64, 1, 1)], "output": [None], "input": []}
    model = in_windows(CUT)
    seen = []

    def watch(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        numbers = transformer_options["ad_params"]["sub_idxs"]
        seen.append(numbers)
        assert transformer_options["ad_params"]["full_length"] == LENGTH
        assert torch.equal(x, inputs(1)[0][numbers]) and torch.equal(timesteps, inputs(1)[1][numbers])
        assert torch.equal(context, inputs(1)[2][numbers])
        assert torch.equal(transformer_options["sigmas"], steps[numbers])
        assert torch.equal(control["middle"].pop(), middle[numbers])  # as the UNet does
        return x

    middle, steps = control["middle"][0], torch.arange(LENGTH)
    model.add_wrapper_with_key("diffusion_model", "after ours", watch)
    options = {"cond_or_uncond": [0], "sigmas": steps, host.KEY: (LENGTH, "")}
    out = call(model, x, timesteps, context, control, **options)
    assert seen == CUT.of(LENGTH)
    torch.testing.assert_close(out, x)
    assert len(control["middle"]) == 1 and "ad_params" not in options


@pytest.fixture
def round_trip(prompts, long):
    """How far sampling leads from the clip whose inversion it begins at, as a part of the clip."""

    def error(model):
        with torch.inference_mode():
            latent, _noise, _sigmas = editing.invert(model, long, prompts[0], 8, method="exact")
            back = editing.sample_video(model, latent, prompts[0], prompts[0], 8, 1.0)["samples"]
        return float((back - long["samples"]).norm() / long["samples"].norm())

    return error


def test_inversion_and_sampling_are_inverse(in_windows, round_trip, monkeypatch):
    """Each step is solved, as far as this model of random weights lets it be: the rest is of windows that differ."""
    assert round_trip(in_windows(CUT)) < 0.3
    turns = count()
    monkeypatch.setattr(Windows, "of", lambda *_at: [[0, *range(1 + next(turns) % 2, LENGTH)]])
    assert round_trip(in_windows(CUT)) > 0.6


def test_guided_sampling_with_a_mask(in_windows, prompts, long):
    model = in_windows(CUT)
    mask = torch.zeros(LENGTH, 64, 64)
    mask[:, :32] = 1
    with torch.inference_mode():
        latent, _noise, _sigmas = editing.invert(model, {**long, "noise_mask": mask}, prompts[0], 4)
        out = editing.sample_video(model, latent, prompts[1], prompts[0], 4, 5.0)["samples"]
    assert torch.equal(out[:, :, 4:], long["samples"][:, :, 4:])
    assert torch.isfinite(out).all() and not torch.allclose(out[:, :, :4], long["samples"][:, :, :4], rtol=0.1)


def test_the_host_makes_room_for_a_window(core, in_windows, prompts, long, monkeypatch):
    shapes = []
    own = comfy.model_base.BaseModel.memory_required

    def required(self, input_shape, *args, **kwargs):
        shapes.append(input_shape[0])
        return own(self, input_shape, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", required)
    asked = []
    for windows in (WHOLE, CUT):
        with torch.inference_mode():
            core["KSampler"]().sample(in_windows(windows), 7, 1, 1.0, "euler", "normal", *prompts, long)
        asked.append(shapes[0])
        shapes.clear()
    assert asked[0] >= LENGTH and asked[1] * LENGTH == asked[0] * CUT.frames


def test_replaced_self_attention_is_refused(core, in_windows, prompts, long):
    guided = core["PerturbedAttentionGuidance"].execute(in_windows(CUT), 3.0)
    guided = getattr(guided, "args", guided)[0]
    with pytest.raises(ValueError, match="replaces this MODEL's self-attention .* set window to 0.*nodes_pag"):
        core["KSampler"]().sample(guided, 7, 1, 3.0, "euler", "normal", *prompts, long)


def test_text_boxes_are_refused(core, in_windows, model, prompts, long):
    """GLIGEN's, which the host makes for as many frames as the clip has."""
    blocks = host.parts_of(host.unet_of(model)).blocks.values()
    widths = [block.norm1.normalized_shape[0] for block in blocks]
    layers = [comfy.gligen.GatedSelfAttentionDense(width, 16, 2, width // 2) for width in widths]
    with torch.inference_mode():
        network = comfy.gligen.Gligen(layers, comfy.gligen.PositionNet(16, 16), 16)
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        boxes = host.ModelPatcher(network, model.load_device, model.offload_device)
        boxed = [[prompts[1][0][0], {"gligen": ("position", boxes, [(torch.randn(1, 16), 4, 4, 1, 1)])}]]
        for run in (
            lambda model: core["KSampler"]().sample(model, 7, 2, 3.0, "euler", "normal", boxed, prompts[0], long),
            lambda model: editing.invert(model, long, boxed, 2),
        ):
            run(in_windows(WHOLE))
            with pytest.raises(ValueError, match="has GLIGEN's text boxes, .* set window to 0"):
                run(in_windows(CUT))


# --- the host's own windows -------------------------------------------------------------------------------------

KEPT = {"latent_retain_index_list": "0", "cond_retain_index_list": "0", "causal_window_fix": True, "freenoise": False}


@pytest.fixture
def host_windows(core):
    """The host's context windows of four frames on a MODEL, which keep the first frame; skips where it has no such."""
    node = core["ContextWindowsManual"]
    if "latent_retain_index_list" not in {entry.id for entry in node.define_schema().inputs}:
        pytest.skip("this ComfyUI's context windows cannot keep the first frame")

    def add(model, **options):
        options = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", **KEPT, **options}
        return outputs_of(node, model=model, **options)[0]

    return add


@pytest.mark.parametrize("group_norm", ["video", "per_frame"])
def test_the_hosts_windows_are_honoured_where_they_keep_the_first_frame(host_windows, in_windows, long, group_norm):
    model = in_windows(WHOLE, group_norm)
    prompt = [[torch.randn(LENGTH, 7, 16, generator=torch.Generator().manual_seed(2)), {}]]  # one for each frame

    def denoised(model, numbers):
        """What the model sees in these frames, as a clip of their own, at one noise level."""
        guider, sigmas = host.unguided(model, [[prompt[0][0][numbers], {}]]), torch.tensor([2.0, 0.0])
        with torch.inference_mode():
            return host.run_sampler(guider, long["samples"][numbers], sigmas, lambda *_step: None, sampler=look)

    def look(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        return denoise(x, sigmas[:1].expand(len(x)), **extra_args)

    seen = denoised(host_windows(model), [*range(LENGTH)])
    out, total = torch.zeros_like(seen), torch.zeros(LENGTH, 1, 1, 1)
    weight = torch.tensor([1.0, 2, 2, 1]).view(-1, 1, 1, 1)  # the host's pyramid
    for first in (0, 3, 6, 7):
        window = [*range(first, first + 4)]
        part = denoised(model, [0, *window])[1:] if first else denoised(model, window)
        out[window] += weight * part
        total[window] += weight
    torch.testing.assert_close(seen, out / total, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen, denoised(model, [*range(LENGTH)]), rtol=0.1)


def test_inversion_and_sampling_are_inverse_in_the_hosts_windows(host_windows, in_windows, round_trip):
    assert round_trip(host_windows(in_windows(WHOLE))) < 0.3


@pytest.mark.parametrize(
    "spoilt",
    [
        {"latent_retain_index_list": ""},
        {"latent_retain_index_list": "0, 1"},
        {"cond_retain_index_list": ""},
        {"causal_window_fix": False},
        {"freenoise": True},
        {"context_schedule": "standard_uniform"},
    ],
)
def test_the_hosts_windows_are_refused_otherwise(host_windows, in_windows, prompts, long, core, spoilt):
    model = host_windows(in_windows(WHOLE), **spoilt)
    for run in (
        lambda: editing.invert(model, long, prompts[0], 3),
        lambda: core["KSampler"]().sample(model, 7, 3, 3.0, "euler", "normal", *prompts, long),
    ):
        with pytest.raises(ValueError, match=r"context windows would cut .* latent_retain_index_list and cond_"):
            run()


def test_what_the_hosts_windows_would_spoil_is_refused(host_windows, in_windows, prompts, long, monkeypatch):
    model = host_windows(in_windows(WHOLE))
    with pytest.raises(ValueError, match="both cut the clip: set window to 0"):
        editing.invert(host_windows(in_windows(CUT)), long, prompts[0], 3)
    with torch.inference_mode():
        latent, _noise, _sigmas = editing.invert(model, long, prompts[0], 3)
    with pytest.raises(ValueError, match="structure needs all frames in one call"):
        editing.sample_video(model, latent, *prompts, 3, 1.0, steering=Steering(structure=0.4))
    monkeypatch.setattr(host, "positions", lambda *_words: [2])  # of a CLIP that the small model has none of
    monkeypatch.setattr(host, "encoded", lambda *_caption: prompts[0])
    with pytest.raises(ValueError, match="Find Mask needs all frames in one call"):
        finding.find_mask(model, latent, None, "a car", "car")
    hint = [[prompts[0][0][0], {"control": comfy.controlnet.ControlBase()}]]
    with pytest.raises(ValueError, match="a ControlNet gives every context window the pictures of the first one"):
        editing.sample_video(model, latent, hint, prompts[1], 3, 1.0)


# --- tuning -----------------------------------------------------------------------------------------------------


def test_draws_of_windows():
    draws = [next(own) for own in [Draws(torch.Size([9, 4, 2, 2]), 1000, 3, Windows(4, 1))] for _ in range(300)]
    assert {draw.noise.shape for draw in draws} == {(4, 4, 2, 2)}
    assert {tuple(draw.frames) for draw in draws} == {(0, start, start + 2, start + 4) for start in range(1, 5)}
    whole, plain = (next(Draws(torch.Size([9, 4, 2, 2]), 1000, 3, cut)) for cut in (Windows(9, 1), WHOLE))
    assert torch.equal(whole.noise, plain.noise) and whole[1:] == plain[1:] and plain.frames == slice(None)


@pytest.fixture
def tune(in_windows, prompts, long):
    def run(windows=CUT, steps=4, saving=None, on_step=lambda _step: None, told=None, latents=long, caption=None):
        caption = caption or prompts[1]
        tell = (told if told is not None else []).append
        with torch.inference_mode():
            model, recipe = in_windows(windows), Recipe(steps)
            return one_shot_tune(model, latents, caption, recipe, "fp32", "all", on_step, saving=saving, tell=tell)

    return run


def test_a_step_is_a_window(tune, monkeypatch):
    shapes = []
    own = network.TrainingUNet.__call__

    def watched(self, latents, timestep):
        shapes.append(latents.shape[0])
        return own(self, latents, timestep)

    monkeypatch.setattr(network.TrainingUNet, "__call__", watched)
    weights = tune()
    assert shapes == [CUT.frames] * 4 and weights.windows == CUT and weights.frames == LENGTH


def test_a_tune_in_windows_is_resumed_to_the_bit(tune, tmp_path):
    def cancel(step):
        if step.number == 2:
            comfy.model_management.interrupt_current_processing()

    saving, told = Saving(tmp_path / "runs", 1), []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune(saving=saving, on_step=cancel)
    resumed = tune(saving=saving, told=told)
    assert told == ["resumed after step 2"]
    plain = tune()
    assert resumed.losses == plain.losses
    assert all(torch.equal(resumed.temporal[name], plain.temporal[name]) for name in plain.temporal)
    told.clear()
    tune(Windows(6, 2), saving=saving, told=told)
    tune(WHOLE, saving=saving, told=told)
    assert told == [], "other windows are other tunes"
    again = tune(Windows(CUT.frames, CUT.overlap - 1), saving=saving, told=told)
    assert told == ["reused: all 4 steps were saved"], "a tune does not use the overlap"
    assert again.windows == Windows(CUT.frames, CUT.overlap - 1)
    other = tune(again.windows)
    assert all(torch.equal(other.temporal[name], plain.temporal[name]) for name in plain.temporal)


def test_a_window_longer_than_the_clip_is_said(tune):
    told = []
    whole, cut = tune(WHOLE), tune(Windows(20, 4), told=told)
    assert told == ["the window of 20 frames is not used: the clip has 11"]
    assert whole.losses == cut.losses


def test_a_caption_for_each_frame_is_refused(tune, prompts):
    caption = [[prompts[1][0][0].expand(LENGTH, -1, -1).clone(), {}]]
    with pytest.raises(ValueError, match="one prompt for each frame, which a tune in windows cannot use"):
        tune(caption=caption)
    assert len(tune(WHOLE, caption=caption).losses) == 4


def test_a_long_clip_needs_no_more_memory_than_a_window(in_windows):
    needs = {}
    for windows in (Windows(16, 4), WHOLE):
        video = host.video_of(in_windows(windows))
        for length in (16, 64):
            needs[windows, length] = []

            def plan(_mode, estimate, *_args, into=needs[windows, length]):
                into.append(estimate("all").total)
                return "all"

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one_shot, "plan", plan)
                one_shot._plan(video, torch.Size([length, 4, 8, 8]), 7, "fp32", "low")
    assert needs[Windows(16, 4), 64] == needs[Windows(16, 4), 16] == needs[WHOLE, 16]
    assert needs[WHOLE, 64] > needs[WHOLE, 16]


# --- what is kept -----------------------------------------------------------------------------------------------


def test_saved_weights_remember_their_windows(make_weights, model, tmp_path):
    for windows in (CUT, WHOLE):
        store.save_file(make_weights(model, windows=windows), tmp_path / "a.safetensors", "fp32")
        loaded = store.load_file(tmp_path / "a.safetensors")
        assert loaded.windows == windows
        assert host.inflation_of(ApplyWeights.execute(model, loaded, 1.0, 1.0)[0]).windows == windows
        for window, wanted in ((0, Windows(0, 1)), (4, Windows(4, 1))):
            applied = ApplyWeights.execute(model, loaded, 1.0, 1.0, window, 1)[0]
            assert host.inflation_of(applied).windows == wanted


@pytest.mark.parametrize("window", ["3", "-5", "x", "9" * 50])
def test_odd_windows_in_a_file_are_unknown(make_weights, model, window):
    metadata = store.to_metadata(make_weights(model, windows=CUT))
    assert store.from_metadata({**metadata, "window": window})["windows"] == WHOLE
