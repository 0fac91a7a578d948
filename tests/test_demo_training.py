"""The loop that trains the demo's models: the same whether interrupted or not."""

import time

import pytest
import torch
from torch import nn
from tune_a_video.lab import train
from tune_a_video.lab.optimizer import Muon, orthogonal


def test_orthogonal():
    x = torch.randn(3, 8, 20)
    values = torch.linalg.svdvals(orthogonal(x))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_fits_a_line():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 3) + 2
    model = nn.Linear(6, 3)
    optimizer = Muon(model.parameters(), lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(x) - y).square().mean() < 1e-2


def run(file, steps, deadline):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    trainer = train.Trainer(model, train.Stage(steps, 2, 0, 1e-2), file, deadline)
    trainer.run(lambda: (model(torch.randn(2, 4)) - 1).square().mean(), lambda: None)
    return model.weight


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    whole = run(tmp_path / "whole.pt", 6, time.time() + 100)
    for _ in range(6):
        with pytest.raises(train.OutOfTime):
            run(tmp_path / "parts.pt", 6, 0)  # one step and a checkpoint
    assert torch.equal(whole, run(tmp_path / "parts.pt", 6, 0))


def test_sigmas_are_the_hosts():
    import comfy.model_sampling

    assert torch.allclose(train.sd_sigmas(), comfy.model_sampling.ModelSamplingDiscrete().sigmas, rtol=1e-3)
