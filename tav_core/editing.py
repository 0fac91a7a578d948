"""DDIM inversion of a clip and sampling of its edit, through the host's guider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ddim, host
from .checks import check_inputs


def invert(
    model: host.ModelPatcher, latent: Mapping[str, Any], prompt: host.Conditioning, steps: int, callback=None
) -> tuple[dict[str, Any], InvertedNoise, Tensor]:
    """DDIM inversion of a clip: the noisy LATENT, the same as NOISE for the core's custom sampler, and its SIGMAS.

    The LATENT is in sigma space, as the host's own samplers leave unfinished latents. The sigmas descend to 0.
    """
    samples = check_inputs(model, latent, prompt=prompt)
    sigmas = ddim.ddim_sigmas(host.model_sigmas(model), steps)
    out = host.run_sampler(model, samples, sigmas, prompt, prompt, 1.0, callback or host.preview_callback(model, steps))
    inverted = {"samples": out, host.KEY: {"steps": steps}}
    descending = torch.cat([sigmas[1:].flip(0), sigmas.new_zeros(1)])
    return inverted, InvertedNoise(model, out, float(sigmas[-1])), descending


def sample_video(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    positive: host.Conditioning,
    negative: host.Conditioning,
    steps: int,
    cfg: float,
    callback=None,
) -> dict[str, Any]:
    """DDIM sampling from inverted latents; LATENT of the edited clip."""
    samples = check_inputs(model, latent, positive=positive, negative=negative)
    sigmas = ddim.ddim_sigmas(host.model_sigmas(model), steps).flip(0)
    _check_inverted(model, latent, steps, float(sigmas[0]))
    callback = callback or host.preview_callback(model, steps)
    out = host.run_sampler(model, samples, sigmas, positive, negative, cfg, callback)
    return {"samples": out}


def _check_inverted(model: host.ModelPatcher, latent: Mapping[str, Any], steps: int, sigma: float) -> None:
    if host.KEY not in latent:  # noise of another origin, or what a user took for it
        spread = float(model.model.process_latent_in(latent["samples"]).float().std())
        if spread < sigma / 2:
            raise ValueError(
                f"these latents are not noise (their standard deviation is {spread:.1f}, {steps} steps start at "
                f"{sigma:.1f}): connect the inverted latents of DDIM Invert."
            )
    elif (inverted_steps := latent[host.KEY]["steps"]) != steps:
        raise ValueError(
            f"the latents were inverted in {inverted_steps} steps, but steps is {steps} here: the noise levels would "
            "not meet. Use the same number in both nodes."
        )


class InvertedNoise:
    """NOISE from which the core's samplers start at the inverted latents, whatever latent image they are given."""

    seed = 0

    def __init__(self, model: host.ModelPatcher, inverted: Tensor, sigma: float):
        self.model, self.inverted, self.sigma = model, inverted, sigma

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor:
        """The noise that the host scales and adds to `latent` to get the inverted latents.

        Raises ValueError when the latents are of another shape.
        """
        image = latent["samples"]
        if image.shape != self.inverted.shape:
            raise ValueError(
                f"the NOISE was inverted from latents of shape {tuple(self.inverted.shape)}, the latent image has "
                f"{tuple(image.shape)}: both need the same frames and size."
            )
        sampling = host.sampling_of(self.model)
        at_top = abs(self.sigma / float(sampling.sigma_max) - 1) < 1e-5
        unit = sampling.noise_scaling(torch.tensor(self.sigma), torch.ones(1), torch.zeros(1), at_top)
        process_in = self.model.model.process_latent_in
        # The host leaves an all-zero latent image as it is.
        start = process_in(image) if torch.count_nonzero(image) else image
        return (process_in(self.inverted) - start.to(self.inverted)) / unit.to(self.inverted)
