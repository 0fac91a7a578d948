"""DDIM (arXiv 2010.02502) in both directions, as a k-diffusion sampler on the host's sigmas.

With sigma = sqrt((1 - abar) / abar) and x = latents / sqrt(abar), a deterministic DDIM step is an Euler step:
x(next) = x + (sigma(next) - sigma) * epsilon. The schedule's conventions are the reference's (diffusers,
`steps_offset=1`, `set_alpha_to_one=False`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

# The reference trains, and its schedule counts, a thousand timesteps; half of them are more than any edit needs.
MAX_STEPS = 500


def ddim_timesteps(steps: int, train_timesteps: int = 1000) -> Tensor:
    """The timesteps of an inversion, ascending: 1, 1 + T/n, … (int64, [steps]).

    Where n does not divide T, each timestep is rounded and not T/n: diffusers rounds that down, and a clip inverted in
    400 steps would end at timestep 799, in 50 steps at 981.

    Raises ValueError when `steps` is out of range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}; DDIM takes 1 to {MAX_STEPS} steps, the paper uses 50.")
    return (torch.arange(steps, dtype=torch.float64) * train_timesteps / steps).round().long() + 1


def ddim_sigmas(model_sigmas: Tensor, steps: int) -> Tensor:
    """Noise levels of an inversion, ascending (float32, [steps + 1]); flip them to sample.

    Args:
        model_sigmas: the model's sigma of each training timestep, ascending, [T].
    """
    timesteps = ddim_timesteps(steps, len(model_sigmas))
    # Before the first timestep comes the level of timestep 0, not a clean picture.
    return torch.cat([model_sigmas[:1], model_sigmas[timesteps]]).cpu().float()


@dataclass(frozen=True)
class Trajectory:
    """A clip's latents at every noise level of its inversion.

    Attributes:
        sigmas: ascending, float32 on the CPU, [steps + 1].
        latents: of each level, in sigma space and the model's scale, float32 on the CPU, [steps + 1, f, c, h, w].
    """

    sigmas: Tensor
    latents: Tensor

    def at(self, sigma: float) -> Tensor:
        """The latents [f, c, h, w] of the level nearest to one."""
        return self.latents[int((self.sigmas - sigma).abs().argmin())]


def sample_ddim(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Follow `sigmas` up (inversion) or down (sampling) without noise: k-diffusion's sampler signature.

    In both directions epsilon is the one predicted at the *higher* of a step's two levels. For an inversion that
    is an approximation: it is evaluated on the latents of the lower level (reference: `ddim_loop` in util.py).

    Args:
        model: the host's denoiser, `model(x, sigma)` → denoised; epsilon is recovered from that, so epsilon and
            v-prediction models are alike here.
        x: [f, c, h, w]. The noisy end is in sigma space (as the host's samplers leave it), the clean end is
            latents as the model was trained on them.
        sigmas: strictly monotonic, [steps + 1].
    """
    extra_args = extra_args or {}
    inverting = bool(sigmas[0] < sigmas[-1])
    if inverting:
        x = x * (1 + sigmas[0] ** 2).sqrt()
    for i in trange(len(sigmas) - 1, disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        level = torch.maximum(sigma, sigma_next)
        # The model divides its input by sqrt(1 + level²); the network must see x at its own level's scale.
        x_in = x * ((1 + level**2) / (1 + sigma**2)).sqrt()
        denoised = model(x_in, level.expand(x.shape[0]), **extra_args)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": level, "denoised": denoised})
        x = x + (sigma_next - sigma) * (x_in - denoised) / level
    return x if inverting else x / (1 + sigmas[-1] ** 2).sqrt()
