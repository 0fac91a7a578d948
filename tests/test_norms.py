"""Norms of whole videos as a GPU takes them, and a training step that is replayed."""

import pytest
import torch
from einops import rearrange
from torch import nn
from tune_a_video.tav_core.method import norms
from tune_a_video.tav_core.method.replay import Replayed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FRAMES = 3


def over_channels(t):
    return t[None, :, None, None]


@pytest.fixture
def kernels(monkeypatch):
    """On a CPU torch has no kernels of synchronised batch norm: what they compute, by their definition."""
    if torch.cuda.is_available():
        return torch.device("cuda")

    def stats(x, eps):
        return x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + eps).rsqrt()

    def elemt(x, weight, bias, mean, scale, eps, out=None):
        mean, factor = over_channels(mean), over_channels(scale * weight)
        return torch.add((x - mean) * factor, over_channels(bias), out=out)

    def backward_reduce(gradient, x, mean, scale, weight, *_wanted):
        return gradient.sum((0, 2, 3)), (gradient * (x - over_channels(mean))).sum((0, 2, 3)), None, None

    kinds = {"batch_norm_stats": stats, "batch_norm_elemt": elemt, "batch_norm_backward_reduce": backward_reduce}
    for name, kernel in kinds.items():
        monkeypatch.setattr(torch, name, kernel)
    return torch.device("cpu")


def group_norm(device, dtype):
    norm = nn.GroupNorm(4, 12, device=device, dtype=dtype).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def as_one_picture(norm, x):
    return rearrange(norm(rearrange(x, "(b f) c h w -> b c (f h) w", f=FRAMES)), "b c (f h) w -> (b f) c h w", f=FRAMES)


@pytest.mark.parametrize("videos", [1, 2])
def test_a_norm_in_place_is_the_norm_of_a_tall_picture(kernels, videos):
    norm = group_norm(kernels, torch.float64)
    x = 3 + torch.randn(videos * FRAMES, 12, 5, 7, device=kernels, dtype=torch.float64)
    assert torch.allclose(norms.video_group_norm(x, FRAMES, norm), as_one_picture(norm, x))


def test_its_gradient_is_that_of_a_tall_picture(kernels):
    norm = group_norm(kernels, torch.float64)
    x = torch.randn(FRAMES, 12, 5, 7, device=kernels, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    ways = (norms.video_group_norm(x, FRAMES, norm), as_one_picture(norm, x))
    ours, plain = (torch.autograd.grad(out, x, upstream)[0] for out in ways)
    assert torch.allclose(ours, plain)


def test_it_is_taken_only_where_it_is_right():
    norm, x = nn.GroupNorm(4, 12).requires_grad_(False), torch.randn(3, 12, 5, 7)
    assert not norms.knows_videos(norm, x, 3)  # a CPU has no such kernels
    x = x.cuda() if torch.cuda.is_available() else FakeCuda()
    norm = norm.to(x.device)
    assert norms.knows_videos(norm, x, 3)
    assert not norms.knows_videos(norm, x, 1)  # three videos, of which a gradient may be wanted
    with torch.no_grad():
        assert norms.knows_videos(norm, x, 1)
    norm.weight_function = [lambda weight: weight]  # the host patches it as it calls the module
    assert not norms.knows_videos(norm, x, 3)
    assert not norms.knows_videos(nn.GroupNorm(4, 12).to(x.device), x, 3)  # its weights may be trained
    assert not norms.knows_videos(nn.GroupNorm(4, 12, device="meta").requires_grad_(False), x, 3)


class FakeCuda:
    """What `knows_videos` asks of a tensor on a GPU."""

    is_cuda, device, dtype = True, torch.device("cpu"), torch.float32

    def __len__(self):
        return 3


def tuned(steps, replayed):
    """Weights after a few steps on a GPU."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).cuda()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    def loss(x):
        loss = network(x).square().mean()
        loss.backward()
        return loss.detach()

    step = Replayed(loss, parameters)
    step.possible = replayed
    losses = []
    for number in range(steps):
        if number == 4:
            step.release()
        losses.append(float(step(torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).cuda())))
        optimizer.step()
    assert (step.graph is not None) == replayed
    return losses, [parameter.detach().clone() for parameter in parameters]


@needs_gpu
def test_a_replayed_step_is_the_step():
    (losses, weights), (plain_losses, plain_weights) = tuned(9, True), tuned(9, False)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records")
def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "0")  # as if this torch had been built for one
    weight = nn.Parameter(torch.ones(3))

    def loss(x):
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach()

    step = Replayed(loss, [weight])
    with caplog.at_level("INFO"):
        for number in range(1, 4):
            assert float(step(torch.full((3,), float(number)))) == 3 * number
            assert torch.equal(weight.grad, torch.full((3,), float(number)))  # not the sum of all
    assert len([record for record in caplog.records if "cannot be recorded" in record.message]) == 1
