"""The estimate of memory, the plan made of it, and running out in spite of it."""

import gc

import comfy.model_base
import comfy.supported_models
import pytest
import torch
from baseline import SD15
from torch.profiler import ProfilerActivity, profile
from tune_a_video.tav_core import editing, host, memory, one_shot, published
from tune_a_video.tav_core.network import TrainingUNet, estimate_step
from tune_a_video.tav_core.one_shot import Saving, one_shot_tune
from tune_a_video.tav_core.tuning import Recipe

GIB = 2**30
MID = {
    "block_out_channels": [64, 128, 128, 128],
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}


def measured_peak(model, shape, caption, precision, checkpointing):
    """Bytes at the peak of a real tune, from torch's record of every allocation."""
    gc.collect()  # what earlier tests left would be counted as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        latents = {"samples": torch.randn(shape)}
        one_shot_tune(model, latents, caption, Recipe(2), precision, checkpointing, lambda _step: None)
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "shape", "precision"),
    [
        ({}, (5, 4, 8, 8), "fp32"),
        ({}, (8, 4, 32, 32), "fp32"),
        ({"use_linear_projection": True, "layers_per_block": 2}, (4, 4, 16, 24), "fp32"),
        (MID, (4, 4, 32, 32), "fp32"),
        (MID, (6, 4, 24, 40), "bf16"),
    ],
)
def test_the_estimate_is_what_a_tune_takes(make_model, prompts, config, shape, precision, checkpointing):
    model = host.inflate(make_model(**config), "video")
    estimate = estimate_step(model, torch.Size(shape), 7, precision, checkpointing)
    peak = measured_peak(model, shape, prompts[0], precision, checkpointing)
    assert estimate.total == pytest.approx(peak, rel=0.15)


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion 1.5's UNet, inflated; its weights are never written, so they take no memory."""
    config = published.unet_config(SD15)
    base = comfy.supported_models.SD15({**config})
    base.unet_config = {**config, "dtype": torch.float32}
    cpu = torch.device("cpu")
    return host.inflate(host.ModelPatcher(comfy.model_base.BaseModel(base), cpu, cpu), "video")


def test_stable_diffusion_1_on_an_8_gib_card(full_size, monkeypatch):
    """By the estimate only: 24 frames of 512x512 in low, as on a GPU."""
    monkeypatch.setattr(full_size, "load_device", torch.device("cuda"))
    low, fast = (estimate_step(full_size, torch.Size((24, 4, 64, 64)), 77, "bf16", on) for on in (True, False))
    assert low.total * memory.HEADROOM < 8 * GIB
    assert 20 * GIB < fast.total < 40 * GIB
    assert round(low.states / GIB, 2) == round(2 * 4 * 74.35e6 / GIB, 2)


LOW, FAST = (memory.Estimate(GIB, GIB, kept, GIB) for kept in (2 * GIB, 9 * GIB))


@pytest.mark.parametrize(
    ("mode", "free", "checkpointing"),
    [("auto", 20, False), ("auto", 6, True), ("low", 20, True), ("fast", 20, False)],
)
def test_the_fastest_plan_that_fits(mode, free, checkpointing):
    assert memory.plan(mode, lambda on: LOW if on else FAST, free * GIB, 24, 512, 512) == checkpointing


@pytest.mark.parametrize(
    ("mode", "free", "message"),
    [
        ("fast", 6, r"needs 13\.20 GiB, 6\.00 GiB is free\. Set memory to low or auto: low needs 5\.50 GiB\."),
        ("auto", 5, r"needs 5\.50 GiB, 5\.00 GiB is free\. Use 19 frames or a size of 448x448\."),
        ("fast", 4, r"Set memory to low and use 10 frames or a size of 320x320\."),
        ("low", 2, "No clip fits: close what else uses this device"),
    ],
)
def test_what_does_not_fit_says_what_would(mode, free, message):
    with pytest.raises(MemoryError, match=f"tuning 24 frames of 512x512 .*{message}"):
        memory.plan(mode, lambda on: LOW if on else FAST, free * GIB, 24, 512, 512)


def test_the_advice_is_true(inflated):
    """What the error advises does fit."""

    def estimate(frames, side):
        return lambda on: estimate_step(inflated, torch.Size((frames, 4, side, side)), 7, "fp32", on)

    free = int(0.6 * estimate(16, 32)(True).total)
    with pytest.raises(MemoryError) as error:
        memory.plan("auto", estimate(16, 32), free, 16, 256, 256)
    frames, size = (str(error.value).split("Use ")[1].split(part)[0] for part in (" frames", "."))
    side = int(size.split("x")[-1]) // 8
    assert memory.plan("auto", estimate(int(frames), 32), free, int(frames), 256, 256)
    assert memory.plan("auto", estimate(16, side), free, 16, side * 8, side * 8)


def test_the_host_is_asked_before_step_1(inflated, clip, prompts, monkeypatch, unchanged):
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_args: 10_000)
    seen = []
    with unchanged(inflated), torch.inference_mode(), pytest.raises(MemoryError, match="5 frames of 64x64"):
        one_shot_tune(inflated, clip, prompts[1], Recipe(2), "fp32", False, seen.append, memory="auto")
    assert not seen


@pytest.fixture
def out_of_memory(monkeypatch):
    """Make the network run out of memory at chosen calls without checkpointing, and with it."""

    def at(fast, low=()):
        class Scarce(TrainingUNet):
            def __init__(self, model, frames, precision, gradient_checkpointing, blank=False):
                super().__init__(model, frames, precision, gradient_checkpointing, blank)
                self.failing, self.calls = low if gradient_checkpointing else fast, 0

            def __call__(self, *args):
                self.calls += 1
                if self.calls in self.failing:
                    raise torch.cuda.OutOfMemoryError("injected")
                return super().__call__(*args)

        monkeypatch.setattr(one_shot, "TrainingUNet", Scarce)

    return at


def tune(model, clip, prompts, told, saving=None, memory=None):
    with torch.inference_mode():
        return one_shot_tune(
            model,
            clip,
            prompts[1],
            Recipe(4),
            "fp32",
            False,
            lambda _step: None,
            saving=saving,
            memory=memory,
            tell=told.append,
        )


@pytest.mark.parametrize("saved", [False, True])
def test_out_of_memory_is_tried_again_in_low(inflated, clip, prompts, tmp_path, out_of_memory, unchanged, saved):
    expected = tune(inflated, clip, prompts, [])
    told = []
    out_of_memory(fast=[3])
    with unchanged(inflated):
        weights = tune(inflated, clip, prompts, told, Saving(tmp_path) if saved else None)
    start = "from step 2" if saved else "from the start"
    assert told == [f"out of memory; tried again with gradient checkpointing, {start}"]
    assert weights.losses == pytest.approx(expected.losses, rel=1e-5)


def test_out_of_memory_in_low_is_an_error_and_all_stays_usable(inflated, clip, prompts, out_of_memory, unchanged):
    out_of_memory(fast=[2], low=[1])
    with unchanged(inflated):
        with pytest.raises(MemoryError, match="Use fewer frames or a smaller size"):
            tune(inflated, clip, prompts, [])
        out_of_memory(fast=[])
        assert len(tune(inflated, clip, prompts, []).losses) == 4
        with torch.inference_mode():
            editing.invert(inflated, clip, prompts[0], 2)


def test_a_reused_run_needs_no_memory(inflated, clip, prompts, tmp_path, monkeypatch):
    tune(inflated, clip, prompts, [], Saving(tmp_path))
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_args: 10_000)
    told = []
    tune(inflated, clip, prompts, told, Saving(tmp_path), "auto")
    assert told == ["reused: all 4 steps were saved"]


def test_an_estimate_that_fails_does_not_stop_a_tune(inflated, clip, prompts, monkeypatch, caplog):
    def fail(*_args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(one_shot, "estimate_step", fail)
    assert len(tune(inflated, clip, prompts, [], memory="auto").losses) == 4
    assert "memory could not be estimated (no such operator)" in caplog.text
