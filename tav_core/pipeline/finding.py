"""A mask of the thing that a word of the caption names, from the clip's inversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..method import masks
from .checks import check_inputs
from .editing import inversion_of

EDITS = ("object", "background")
LEVELS = 5  # noise levels that are looked at, each one call of the UNet


def find_mask(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    clip: Any,
    caption: str,
    word: str,
    edit: str = "object",
    grow: int = 0,
    feather: int = 0,
    callback=None,
) -> tuple[dict[str, Any], Tensor]:
    """The inverted LATENT with a mask on it, and the mask: white where the edit may change the clip.

    Args:
        clip: the CLIP of the checkpoint.
        caption: what the clip shows.
        word: one or more words of the caption: the object.
        edit: "object" leaves the edit to it, "background" keeps it.
        grow: pixels by which what is found as the object is made larger, every way.
        feather: pixels over which an edge fades, on both sides.
    Returns:
        LATENT, and MASK [f, height, width] in pixels, float32.
    Raises ValueError when the word is not in the caption, or the latents do not come from an inversion.
    """
    words = host.positions(clip, caption, word)
    prompt = host.encoded(clip, caption)
    video, samples = check_inputs(model, latent, uncut="Find Mask", caption=prompt)
    trajectory = inversion_of(latent)["trajectory"]
    steps = len(trajectory.sigmas) - 1
    chosen = torch.linspace(steps, 1, min(steps, LEVELS)).round().long()
    sigmas = torch.cat([trajectory.sigmas[chosen], torch.zeros(1)])

    def visit(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        """A sampler that goes nowhere: the UNet looks at the clip's trajectory."""
        for i, sigma in enumerate(sigmas[:-1]):
            at = trajectory.at(float(sigma)).to(x)
            denoised = denoise(at, sigma.expand(len(x)), **(extra_args or {}))
            if callback is not None:
                callback({"i": i, "x": at, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x

    guider = host.unguided(model, prompt)
    with masks.watching(video.parts, words) as maps:
        host.run_sampler(guider, samples, sigmas, callback or host.preview_callback(model, len(chosen)), sampler=visit)
    frames, _channels, height, width = samples.shape
    timesteps = [int((video.sigmas - sigma).abs().argmin()) for sigma in sigmas[:-1]]
    windows = [video.inflation.windows.of(frames, timestep) for timestep in timesteps]
    maps = masks.of_whole_clips(maps, len(video.parts.blocks), windows, frames)
    attention = masks.combined(maps, height, width)
    found = (attention > masks.otsu(attention)).float()
    found = found.repeat_interleave(host.LATENT_PIXELS, 1).repeat_interleave(host.LATENT_PIXELS, 2)
    found = masks.grown(found, grow)
    mask = masks.feathered(found if edit == "object" else 1 - found, feather)
    return {**latent, "noise_mask": mask[:, None]}, mask
