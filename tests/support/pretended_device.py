"""A model on a device of its own: whatever meets its tensors is brought there, and is seldom waited for.

There is no such device here. Torch's fake tensors know shapes, dtypes and devices, and refuse an operation on two
devices as a GPU does; they have no values, so whoever reads one gets 1. `test_devices.py` runs these tests.
"""

import re
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import pytest
import torch
from small import SHALLOW_XL, build_xl
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.guidance import Steering
from tune_a_video.tav_core.method.inflation import LIGHT, PAPER, RECOMPUTE
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.method.windows import WHOLE, Windows
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune
from tune_a_video.tav_core.store import published

PROJECT = Path(__file__).resolve().parents[2]
sys.path.append(str(PROJECT / "benchmarks"))
from baseline import SD15  # noqa: E402
from measure import Work  # noqa: E402

CLIP = (5, 4, 8, 8)
CUT = Windows(4, 1)
BENCHMARKS = (PROJECT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


class Reads(TorchDispatchMode):
    """Lets values of fake tensors be read, and counts those of the device, for each of which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self.count += args[0].device.type != "cpu"
        return 1.0 if args[0].is_floating_point() else 1


@pytest.fixture(scope="module")
def device():
    backend: Any = backend_registration._DummyBackendModule()
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16]  # a recomputation asks for it
    backend_registration._setup_privateuseone_for_python_backend("pretended", backend)
    return torch.device("pretended", 0)


@pytest.fixture
def pretending(device, monkeypatch):
    """The host as if it had that device; fake tensors are made within this."""
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)  # nothing is computed by the way
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)

    def moved(tensor):
        return nn.Parameter(fake.from_tensor(tensor.detach()).to(device), requires_grad=False)

    def load(models, *_args, **_kwargs):
        for module in (module for model in models for module in model.model.modules()):
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: moved(tensor) for name, tensor in tensors.items() if tensor is not None})

    def free(_device=None, torch_free_too=False):
        return (2**40, 2**40) if torch_free_too else 2**40

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: None)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    monkeypatch.setattr(host, "fingerprint", lambda _model: "values")
    reads = Reads()

    @contextmanager
    def pretending():
        with fake, reads:
            yield reads

    return pretending


def on(device, model):
    for patcher in (model, *model.get_nested_additional_models()):
        patcher.load_device = device
    return model


@pytest.mark.parametrize(("recompute", "windows"), [*((way, WHOLE) for way in RECOMPUTE), ("nothing", CUT)])
def test_a_tune_stays_on_the_models_device(model, prompts, device, pretending, recompute, windows):
    counts = []
    model = on(device, host.inflate(model, "video", windows))
    with pretending() as reads:
        latent = {"samples": torch.zeros(CLIP)}
        weights = one_shot_tune(
            model, latent, prompts[0], Recipe(3), "fp32", recompute, lambda _step: counts.append(reads.count)
        )
    assert {tensor.device.type for tensor in (*weights.queries.values(), *weights.temporal.values())} == {"cpu"}
    assert [after - before for before, after in pairwise(counts)] == [2, 2], "loss and norm of the gradient"


MASK = {"noise_mask": torch.eye(8).expand(5, 1, 8, 8)}
STEERED = Steering(structure=0.5, freedom=0.2, cfg_until=0.5, cfg_end=1.0)


@pytest.mark.parametrize("group_norm", ["video", "per_frame"])
@pytest.mark.parametrize(
    ("windows", "method", "mask", "steering", "waits"),
    [
        (WHOLE, "plain", {}, editing.PLAIN, 0),
        (CUT, "plain", {}, editing.PLAIN, 1),  # for the noise level, which says how the clip is cut
        (WHOLE, "plain", MASK, editing.PLAIN, 0),
        (WHOLE, "plain", {}, STEERED, 1),  # for the noise level
        (CUT, "exact", MASK, STEERED, 100),  # it looks how far it is from the solution
    ],
    ids=["plain", "windows", "mask", "steered", "all"],
)
def test_an_edit_stays_on_the_models_device(
    model, make_weights, prompts, device, pretending, monkeypatch, group_norm, windows, method, mask, steering, waits
):
    counts = []
    # Fake tensors have no values to solve for.
    monkeypatch.setattr(torch.linalg, "lstsq", lambda a, _b: SimpleNamespace(solution=a.new_zeros(a.shape[-1])))

    def step(_number, denoised, _x, _steps):
        assert denoised.device == device
        counts.append(reads.count)

    tuned = on(device, apply_weights(host.inflate(model, group_norm, windows), make_weights(model)))
    with pretending() as reads, torch.no_grad():
        latent = {"samples": torch.zeros(CLIP), **mask}
        inverted, _noise, _sigmas = editing.invert(tuned, latent, prompts[1], 3, step, method)
        edited = editing.sample_video(tuned, inverted, prompts[0], prompts[1], 3, 12.5, step, steering)
    assert edited["samples"].device.type == "cpu"
    assert max(counts[2] - counts[0], counts[5] - counts[3]) <= 2 * waits


@pytest.mark.parametrize(("layers", "windows"), [(LIGHT, WHOLE), (LIGHT, CUT), (PAPER, WHOLE)])
def test_sdxl_stays_on_the_models_device(device, pretending, layers, windows):
    """Its pooled text and sizes, too."""
    base, waited = build_xl(SHALLOW_XL), []
    text = [[torch.zeros(1, 7, 16), {"pooled_output": torch.zeros(1, 16)}]]
    recipe, latent = Recipe(3), {"samples": torch.zeros(CLIP)}
    with torch.inference_mode():
        learned = one_shot_tune(
            host.inflate(base, "video", layers=layers), latent, text, Recipe(1), "fp32", "nothing", print
        )
        tuned = apply_weights(host.inflate(base, "video", windows, layers=layers), learned)

    def step(*_args):
        waited.append(reads.count)

    video = on(device, host.inflate(base, "video", windows, layers=layers))
    with pretending() as reads:
        weights = one_shot_tune(video, {"samples": torch.zeros(CLIP)}, text, recipe, "fp32", "nothing", step)
    assert {tensor.device.type for tensor in (*weights.queries.values(), *weights.temporal.values())} == {"cpu"}
    assert [after - before for before, after in pairwise(waited)] == [2, 2], "loss and norm of the gradient"
    on(device, tuned)
    waited.clear()
    with pretending() as reads, torch.no_grad():
        inverted, _noise, _sigmas = editing.invert(tuned, {"samples": torch.zeros(CLIP)}, text, 3, step)
        edited = editing.sample_video(tuned, inverted, text, text, 3, 12.5, step)
    assert edited["samples"].device.type == "cpu"
    waits = 2 if windows.frames else 0  # in two steps, for the noise level
    assert [waited[2] - waited[0], waited[5] - waited[3]] == [waits, waits]


class Launches(Work):
    """Operations that launch something, too: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        moved = self.moved
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.count += self.moved > moved
        return out


def test_what_a_step_launches_and_moves_does_not_grow(device, pretending, monkeypatch):
    """Stable Diffusion 1.5 with 24 frames of 512 x 512, beside docs/benchmarks.md: at most two in a hundred more."""

    def one_kernel(q, k, v, *_args, **_kwargs):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    # As a GPU has it: attention is one kernel, and so is the update of all parameters.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", one_kernel)
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _optimizer: None)
    config = published.to_unet_config(SD15)
    base = comfy.supported_models.SD15({**config})
    base.unet_config = {**config, "dtype": torch.float32}
    cpu = torch.device("cpu")
    model = host.inflate(host.ModelPatcher(comfy.model_base.BaseModel(base), cpu, cpu), "video")
    text = [[torch.zeros(1, 77, 768), {}]]
    now = {"inversion": [], "guided sampling": [], "tuning": []}
    with pretending():
        latent = {"samples": torch.zeros(24, 4, 64, 64)}
        on(device, model)
        with Launches() as launches:

            def note(kind):
                return lambda *_args: now[kind].append((launches.count, launches.moved / 1e9))

            with torch.no_grad():
                inverted, _noise, _sigmas = editing.invert(model, latent, text, 2, note("inversion"))
                editing.sample_video(model, inverted, text, text, 2, 12.5, note("guided sampling"))
            one_shot_tune(model, latent, text, Recipe(2), "fp32", "nothing", note("tuning"))
    for kind, ((count, moved), (count_after, moved_after)) in now.items():
        print(f"| {kind} | {count_after - count} | {moved_after - moved:.1f} |")
    recorded = re.findall(r"\| (inversion|guided sampling|tuning) \| (\d+) \| ([\d.]+) \|", BENCHMARKS)
    assert {kind for kind, *_ in recorded} == set(now)
    for kind, launches, moved in recorded:
        first, second = now[kind]
        assert second[0] - first[0] <= 1.02 * int(launches), kind
        assert second[1] - first[1] <= 1.02 * float(moved), kind
