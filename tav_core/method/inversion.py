"""DDIM inversion that sampling takes back exactly: each step is solved and not guessed (arXiv 2309.04907)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

TOLERANCE = 1e-3  # of the residual, relative to the latents
DEPTH = 3  # of Anderson's method
MAX_CALLS = 12  # a step, where it does not converge


def invert_exactly(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """`ddim.sample_ddim` upwards, with the epsilon of the place where each step arrives.

    That is where sampling begins to take it back, so y = x + (sigma(next) - sigma) * epsilon(y) is solved for y. The
    first guess is the epsilon of the step before, which costs no call; Anderson's method does the rest.

    Args:
        model, x, sigmas: as in `ddim.sample_ddim`; sigmas ascend.
    """
    extra_args = extra_args or {}
    x = x * (1 + sigmas[0] ** 2).sqrt()
    epsilon = None
    for i in trange(len(sigmas) - 1, disable=disable):
        sigma, level = sigmas[i], sigmas[i + 1]

        def predicted(y: Tensor, level: Tensor = level) -> Tensor:
            return (y - model(y, level.expand(y.shape[0]), **extra_args)) / level

        if epsilon is None:
            epsilon = predicted(x * ((1 + level**2) / (1 + sigma**2)).sqrt())
        start, step = x, level - sigma
        x = _solved(lambda y, start=start, step=step: start + step * predicted(y), start + step * epsilon)
        epsilon = (x - start) / step
        if callback is not None:
            denoised = x - level * epsilon
            callback({"i": i, "x": start, "sigma": sigma, "sigma_hat": level, "denoised": denoised})
    return x


def _solved(function: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
    """y = function(y), by Anderson's method from a guess."""
    tried: list[tuple[Tensor, Tensor]] = []  # the last few y and function(y) - y
    y = guess
    for _ in range(MAX_CALLS):
        off = function(y) - y
        tried = [*tried[-DEPTH:], (y, off)]
        if float(off.norm() / y.norm()) < TOLERANCE:
            break
        y = _next(tried)
    return y + off


def _next(tried: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Where the residual would vanish if it were linear in between what was tried."""
    y, off = tried[-1]
    if len(tried) == 1:
        return y + off
    # In float64, which not every device has: the last residuals are small.
    offs = torch.stack([residual.flatten().cpu().double() for _, residual in tried])
    images = torch.stack([(place + residual).flatten().cpu().double() for place, residual in tried])
    changes, moves = offs.diff(dim=0), images.diff(dim=0)
    share = torch.linalg.lstsq(changes.mT, offs[-1]).solution
    return (images[-1] - share @ moves).view_as(y).to(y)
