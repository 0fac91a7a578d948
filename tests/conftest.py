"""The pack on the real host, in process, and small models of random weights that the host accepts."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

PROJECT = Path(__file__).resolve().parent.parent
sys.path += [str(PROJECT / folder) for folder in ("tools", "benchmarks", "tests/support", "tests/browser")]
collect_ignore = [] if "TAV_BROWSER" in os.environ else ["browser"]  # run.py test --browser sets it

from pack import load_pack  # noqa: E402

load_pack(cpu=not torch.cuda.is_available())  # what the tests compare with is in float64, which not every device has
from equal import same_tensors  # noqa: E402
from small import TINY, random_weights  # noqa: E402
from tune_a_video.tav_core import host  # noqa: E402
from tune_a_video.tav_core.method.inflation import TemporalLayers  # noqa: E402
from tune_a_video.tav_core.method.tuning import trains  # noqa: E402
from tune_a_video.tav_core.store import published  # noqa: E402
from tune_a_video.tav_core.store.weights import TunedWeights  # noqa: E402

import nodes as core_nodes  # noqa: E402  (the host's)

# That a machine is busy is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser):
    about = "also measure a tune of Stable Diffusion 1.5 where there is no GPU (half an hour), and take one step of "
    about += "SDXL's in full size (some minutes): 16 GiB of memory"
    parser.addoption("--full-size", action="store_true", help=about)


@pytest.fixture(scope="session", autouse=True)
def core():
    """The host's own nodes, by id."""
    asyncio.run(core_nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return core_nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(autouse=True)
def user_folder(tmp_path_factory, monkeypatch):
    """In place of the host's: a test must neither find another's tune there nor push out one of the user's."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setattr(host, "user_folder", lambda: folder)
    return folder


@pytest.fixture(autouse=True)
def free_memory(monkeypatch):
    """What the host reports as free, as on an idle machine: what else runs on this one is no failure."""

    def free(dev=None, torch_free_too=False):
        return (64 * 2**30, 64 * 2**30) if torch_free_too else 64 * 2**30

    monkeypatch.setattr("comfy.model_management.get_free_memory", free)


@pytest.fixture
def make_model():
    """Build a small MODEL with random weights, as inference tensors, which is what a live server has."""

    def make(seed=0, prediction_type="epsilon", **config):
        unet_config = published.to_unet_config({**TINY, **config})
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            return host.build_model(unet_config, random_weights(unet_config, generator), prediction_type)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def inflated(model):
    return host.inflate(model, "video")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of weights files, empty."""
    import folder_paths

    path = tmp_path / "models" / "tune_a_video"
    path.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "tune_a_video", ([str(path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("tune_a_video", None)
    return path


@pytest.fixture
def make_weights():
    """What a tune of a model could have made: every tensor contributes."""

    def make(model, seed=3, **about):
        generator = torch.Generator().manual_seed(seed)
        unet = host.unet_of(model)
        layers = TemporalLayers(host.parts_of(unet))
        changes = {
            name: 0.05 * torch.randn(p.shape, generator=generator)
            for name, p in unet.named_parameters()
            if trains(name)
        }
        temporal = {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in layers.named().items()}
        about = {"frames": 5, "group_norm": "video", "losses": [0.5, 0.25], **about}
        known = {"base_family": host.family_of(model), "base_fingerprint": host.fingerprint(model)}
        return TunedWeights(changes, temporal, **{**known, **about})

    return make


@pytest.fixture
def clip():
    """LATENT of five frames."""
    return {"samples": torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 5}


@pytest.fixture
def prompts():
    """Two CONDITIONINGs of the tiny model's text width."""
    generator = torch.Generator().manual_seed(2)
    return [[[torch.randn(1, 7, 16, generator=generator), {}]] for _ in range(2)]


def weights_of(model):
    """A copy of everything that the model's UNet holds."""
    return {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}


@pytest.fixture
def unchanged():
    """Check that a model's UNet holds what it held: `with unchanged(model): …`."""
    from contextlib import contextmanager

    @contextmanager
    def check(model):
        before = weights_of(model)
        yield
        # Another model may still be loaded over the same UNet: unpatch as the host does when it needs the base.
        host.load(model)
        unet = model.model.diffusion_model
        assert same_tensors(before, weights_of(model))
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in unet.modules())

    return check
