"""The estimate of memory, the plan made of it, and running out in spite of it."""

import faulthandler
import re
import weakref

import comfy.model_base
import comfy.supported_models
import measure
import pytest
import torch
from baseline import SD15
from pack import PROJECT
from small import random_weights
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import memory
from tune_a_video.tav_core.method.inflation import RECOMPUTE
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pipeline import editing, one_shot
from tune_a_video.tav_core.pipeline.network import TrainingUNet, estimate_step
from tune_a_video.tav_core.pipeline.one_shot import Saving, one_shot_tune
from tune_a_video.tav_core.store import published

GIB = memory.GIB
MID = {
    "block_out_channels": [64, 128, 128, 128],
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}


def measured_peak(model, shape, caption, precision, recompute):
    """Bytes at the peak of a real tune, from torch's record of every allocation."""

    def tune():
        latents = {"samples": torch.randn(shape)}
        one_shot_tune(model, latents, caption, Recipe(2), precision, recompute, lambda _step: None)

    return measure.peak(model.load_device, tune)


@pytest.mark.parametrize(
    ("config", "shape", "precision", "recompute"),
    [
        *(({}, (5, 4, 8, 8), "fp32", way) for way in ("nothing", "all")),
        *(({}, (8, 4, 32, 32), "fp32", way) for way in RECOMPUTE),
        *(({"use_linear_projection": True, "layers_per_block": 2}, (4, 4, 16, 24), "fp32", way) for way in RECOMPUTE),
        *((MID, (4, 4, 32, 32), "fp32", way) for way in ("nothing", "all")),
        *((MID, (6, 4, 24, 40), "bf16", way) for way in RECOMPUTE),
    ],
)
def test_the_estimate_is_what_a_tune_takes(make_model, prompts, config, shape, precision, recompute):
    model = host.inflate(make_model(**config), "video")
    estimate = estimate_step(host.video_of(model), torch.Size(shape), 7, precision, recompute)
    peak = measured_peak(model, shape, prompts[0], precision, recompute)
    assert estimate.total == pytest.approx(peak, rel=0.15)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_estimate_is_what_a_tune_takes_on_a_gpu(make_model, prompts, precision, recompute):
    model = host.inflate(make_model(**MID), "video")
    shape = (16, 4, 64, 64)  # large beside what the allocator rounds
    estimate = estimate_step(host.video_of(model), torch.Size(shape), 7, precision, recompute)
    assert estimate.total == pytest.approx(measured_peak(model, shape, prompts[0], precision, recompute), rel=0.15)


def test_stable_diffusion_1_takes_less_than_8_gib(request):
    """Everything loaded before: 24 frames of 512x512 in low."""
    if not (torch.cuda.is_available() or request.config.getoption("--full-size")):
        pytest.skip("needs a GPU, or --full-size and half an hour")
    faulthandler.cancel_dump_traceback_later()  # which would end a test of ten minutes
    config = published.to_unet_config(SD15)
    with torch.inference_mode():
        model = host.inflate(
            host.build_model(config, random_weights(config, torch.Generator().manual_seed(0))), "video"
        )
    host.load(model)
    shape, text = (24, 4, 64, 64), [[torch.randn(1, 77, 768), {}]]
    estimate = estimate_step(host.video_of(model), torch.Size(shape), 77, "bf16", "all")
    peak = measured_peak(model, shape, text, "bf16", "all")
    print(f"peak {peak / GIB:.2f} GiB; estimate {estimate}")
    assert peak < 8 * GIB
    assert estimate.total == pytest.approx(peak, rel=0.15)


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion 1.5's UNet, inflated; its weights are never written, so they take no memory."""
    config = published.to_unet_config(SD15)
    base = comfy.supported_models.SD15({**config})
    base.unet_config = {**config, "dtype": torch.float32}
    cpu = torch.device("cpu")
    return host.inflate(host.ModelPatcher(comfy.model_base.BaseModel(base), cpu, cpu), "video")


def test_stable_diffusion_1_on_an_8_gib_card(full_size, monkeypatch):
    """By the estimate only: 24 frames of 512x512 in low, as on a GPU."""
    monkeypatch.setattr(full_size, "load_device", torch.device("cuda"))
    fast, pointwise, linear, low = (
        estimate_step(host.video_of(full_size), torch.Size((24, 4, 64, 64)), 77, "bf16", recompute)
        for recompute in RECOMPUTE
    )
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    plain = estimate_step(host.video_of(full_size), torch.Size((24, 4, 64, 64)), 77, "fp32", "all")
    totals = [estimate.total * memory.HEADROOM / GIB for estimate in (low, linear, plain, pointwise, fast)]
    promised = [float(total) for total in re.findall(r"GB \|.*?\| ([\d.]+) GiB \|", readme)]
    assert totals == pytest.approx(promised, rel=0.03)  # not every torch keeps the same
    assert totals[0] < 8
    assert low.total < linear.total < 0.6 * pointwise.total < 0.5 * fast.total
    assert round(low.states / GIB, 2) == round(2 * 4 * 74.35e6 / GIB, 2)


# By what is recomputed: 12, 9, 7 and 5 GiB.
ESTIMATES = {
    recompute: memory.Estimate(GIB, GIB, kept * GIB, GIB)
    for recompute, kept in zip(RECOMPUTE, (9, 6, 4, 2), strict=True)
}


@pytest.mark.parametrize(
    ("mode", "free", "recompute"),
    [
        *(("auto", free, recompute) for free, recompute in zip((14, 10, 8, 6), RECOMPUTE, strict=True)),
        ("low", 20, "all"),
        ("fast", 20, "nothing"),
    ],
)
def test_the_fastest_plan_that_fits(mode, free, recompute, caplog):
    with caplog.at_level("INFO"):
        assert memory.plan(mode, ESTIMATES.get, free * GIB, 24, 512, 512) == recompute
    last = caplog.messages[-1]
    assert f"recomputes {recompute} needs {ESTIMATES[recompute]}" in last and f"{free}.00 GiB is free" in last
    for part in ("weights 1.00", "optimizer 1.00", "activations", "block 1.00"):
        assert part in last


@pytest.mark.parametrize(
    ("mode", "free", "message"),
    [
        ("fast", 6, r"needs 13\.20 GiB, 6\.00 GiB is free\. Set memory to low or auto: low needs 5\.50 GiB\."),
        ("auto", 5, r"5\.00 GiB is free\. Use 19 frames or a size of 448x448, or set window to 19 in Inflate UNet\."),
        ("fast", 4, r"Set memory to low and use 10 frames or a size of 320x320, or set window to 10 in Inflate UNet\."),
        ("low", 2, "No clip fits: close what else uses this device"),
    ],
)
def test_what_does_not_fit_says_what_would(mode, free, message):
    with pytest.raises(MemoryError, match=f"tuning 24 frames of 512x512 .*{message}"):
        memory.plan(mode, ESTIMATES.get, free * GIB, 24, 512, 512)


def test_the_advice_is_true(inflated):
    """What the error advises does fit."""

    def estimate(frames, side):
        return lambda way: estimate_step(host.video_of(inflated), torch.Size((frames, 4, side, side)), 7, "fp32", way)

    free = int(0.6 * estimate(16, 32)("all").total)
    with pytest.raises(MemoryError) as error:
        memory.plan("auto", estimate(16, 32), free, 16, 256, 256)
    [(frames, size, window)] = re.findall(r"Use (\d+) frames .* \d+x(\d+), or set window to (\d+) in", str(error.value))
    side = int(size) // 8
    assert frames == window  # so many at once
    assert memory.plan("auto", estimate(int(frames), 32), free, int(frames), 256, 256)
    assert memory.plan("auto", estimate(16, side), free, 16, side * 8, side * 8)


def test_the_host_is_asked_before_step_1(inflated, clip, prompts, monkeypatch, unchanged):
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_args: 10_000)
    seen = []
    with unchanged(inflated), torch.inference_mode(), pytest.raises(MemoryError, match="5 frames of 64x64"):
        one_shot_tune(inflated, clip, prompts[1], Recipe(2), "fp32", "auto", seen.append)
    assert not seen


def test_the_hosts_models_make_room_before_the_network_is_built(inflated, clip, prompts, monkeypatch):
    order = []

    def recorded(name, call):
        return lambda *args, **kwargs: order.append(name) or call(*args, **kwargs)

    monkeypatch.setattr("comfy.model_management.unload_all_models", lambda: order.append("unload"))
    host.unload(torch.device("cuda"))
    assert order == ["unload"]
    order.clear()
    for module, name in ((host, "unload"), (host, "free_bytes"), (one_shot, "TrainingUNet")):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    with torch.inference_mode():
        one_shot_tune(inflated, clip, prompts[1], Recipe(1), "fp32", "auto", print)
    assert order == ["unload", "free_bytes", "TrainingUNet"]


def test_one_bf16_copy_of_what_is_frozen_and_text_projected_once(inflated, clip, prompts, monkeypatch):
    frames = len(clip["samples"])
    video, (text, noisy) = host.video_of(inflated), (prompts[1][0][0], clip["samples"])
    network = TrainingUNet(video, frames, "bf16", "nothing", text)
    matrices = {name: p for name, p in network.unet.named_parameters() if p.ndim > 1}
    assert {p.dtype for name, p in matrices.items() if name not in network.trainable} == {torch.bfloat16}
    assert {p.dtype for p in network.trainable.values()} == {torch.float32}
    with torch.no_grad():
        assert not any(".attn2.to_k" in name or ".attn2.to_v" in name for name, _ in network.unet.named_parameters())
        fixed = network(noisy, torch.tensor(500))
        monkeypatch.setattr(TrainingUNet, "fix_text", lambda self, context: setattr(self, "context", context))
        whole = TrainingUNet(video, frames, "bf16", "nothing", text)(noisy, torch.tensor(500))
    assert torch.equal(fixed, whole)


@pytest.fixture
def out_of_memory(monkeypatch):
    """Make the network run out of memory at chosen calls when it recomputes nothing, and all."""

    networks = []

    def at(fast, low=(), error=(torch.cuda.OutOfMemoryError, "injected")):
        class Scarce(TrainingUNet):
            def __init__(self, video, frames, precision, recompute, *conditioning):
                super().__init__(video, frames, precision, recompute, *conditioning)
                assert not any(alive() for alive in networks)  # the one that failed takes no memory any more
                networks.append(weakref.ref(self.unet))
                self.failing, self.calls = fast if recompute == "nothing" else low, 0

            def __call__(self, *args):
                self.calls += 1
                if self.calls in self.failing:
                    raise error[0](error[1])
                return super().__call__(*args)

        monkeypatch.setattr(one_shot, "TrainingUNet", Scarce)

    return at


def tune(model, clip, prompts, told, saving=None, memory="nothing", on_step=lambda _step: None):
    with torch.inference_mode():
        return one_shot_tune(
            model,
            clip,
            prompts[1],
            Recipe(4),
            "fp32",
            memory,
            on_step,
            saving=saving,
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
    assert told == [f"out of memory; tried again with memory low, {start}"]
    assert weights.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("failing", [3, 1])
def test_out_of_memory_after_restart_takes_nothing_older(inflated, clip, prompts, tmp_path, out_of_memory, failing):
    first = tune(inflated, clip, prompts, [], Saving(tmp_path))
    told, trained = [], []
    out_of_memory(fast=[failing])
    weights = tune(inflated, clip, prompts, told, Saving(tmp_path, restart=True), on_step=trained.append)
    start = "from step 2" if failing == 3 else "from the start"
    assert told == [f"out of memory; tried again with memory low, {start}"]
    assert [step.number for step in trained] == [1, 2, 3, 4]
    assert weights.losses == pytest.approx(first.losses, rel=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        (torch.cuda.OutOfMemoryError, "HIP out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "MPS backend out of memory (MPS allocated: 17.60 GB, max allowed: 18.13 GB)."),
        (RuntimeError, "Invalid buffer size: 12.00 GiB"),
        (RuntimeError, "XPU out of memory. Tried to allocate 20.00 MiB"),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
        (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 4294967296 bytes."),
        (MemoryError, ""),
    ],
)
def test_every_device_runs_out_of_memory(inflated, clip, prompts, out_of_memory, error):
    told = []
    out_of_memory(fast=[1], error=error)
    assert len(tune(inflated, clip, prompts, told).losses) == 4
    assert told == ["out of memory; tried again with memory low, from the start"]


@pytest.mark.parametrize("error", [(RuntimeError, "shapes cannot be multiplied"), (ValueError, "out of memory")])
def test_other_errors_are_not_out_of_memory(inflated, clip, prompts, out_of_memory, error):
    out_of_memory(fast=[1], error=error)
    with pytest.raises(error[0], match=error[1]):
        tune(inflated, clip, prompts, [])


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
