"""A model on a device of its own: whatever meets its tensors is brought there, and is seldom waited for.

There is no such device here. Torch's fake tensors know shapes, dtypes and devices, and refuse an operation on two
devices as a GPU does; they have no values, so whoever reads one gets 1. `test_devices.py` runs these tests.
"""

from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import comfy.model_management
import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.inflation import RECOMPUTE
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune

CLIP = (5, 4, 8, 8)


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


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_tune_stays_on_the_models_device(inflated, prompts, device, pretending, recompute):
    counts = []
    model = on(device, inflated)
    with pretending() as reads:
        latent = {"samples": torch.zeros(CLIP)}
        weights = one_shot_tune(
            model, latent, prompts[0], Recipe(3), "fp32", recompute, lambda _step: counts.append(reads.count)
        )
    assert {tensor.device.type for tensor in (*weights.queries.values(), *weights.temporal.values())} == {"cpu"}
    assert [after - before for before, after in pairwise(counts)] == [2, 2], "loss and norm of the gradient"


@pytest.mark.parametrize("group_norm", ["video", "per_frame"])
def test_an_edit_stays_on_the_models_device(model, make_weights, prompts, device, pretending, group_norm):
    counts = []

    def step(_number, denoised, _x, _steps):
        assert denoised.device == device
        counts.append(reads.count)

    tuned = on(device, apply_weights(host.inflate(model, group_norm), make_weights(model)))
    with pretending() as reads, torch.no_grad():
        inverted, _noise, _sigmas = editing.invert(tuned, {"samples": torch.zeros(CLIP)}, prompts[1], 3, step)
        edited = editing.sample_video(tuned, inverted, prompts[0], prompts[1], 3, 12.5, step)
    assert edited["samples"].device.type == "cpu"
    assert counts[0] == counts[2] and counts[3] == counts[5], "no step waits"
