"""The pack on the real host, in process, and small models of random weights that the host accepts."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path += [str(PROJECT / "benchmarks"), str(PROJECT / "tests" / "support")]

from pack import load_pack  # noqa: E402

load_pack()
from small import TINY, random_weights  # noqa: E402
from tune_a_video.tav_core import host, published  # noqa: E402

import nodes as core_nodes  # noqa: E402  (the host's)


@pytest.fixture(scope="session", autouse=True)
def core():
    """The host's own nodes, by id."""
    asyncio.run(core_nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return core_nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def make_model():
    """Build a small MODEL with random weights, as inference tensors, which is what a live server has."""

    def make(seed=0, prediction_type="epsilon", **config):
        unet_config = published.unet_config({**TINY, **config})
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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
        assert same(before, weights_of(model))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())

    return check
