"""DDIM inversion of a clip and sampling of its edit, through the host's guider."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..method import ddim, guidance
from ..method.inversion import invert_exactly
from .checks import check_inputs

# How a clip is inverted: each step guessed, as in the paper, or solved, so that sampling gives the clip back.
METHODS = {"plain": ddim.sample_ddim, "exact": invert_exactly}
PLAIN = guidance.Steering()


def invert(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    prompt: host.Conditioning,
    steps: int,
    callback=None,
    method: str = "plain",
) -> tuple[dict[str, Any], InvertedNoise, Tensor]:
    """DDIM inversion of a clip: the noisy LATENT, the same as NOISE for the core's custom sampler, and its SIGMAS.

    The LATENT is in sigma space, as the host's own samplers leave unfinished latents. It keeps a mask that the clip
    has, and carries how and of what it was made, with the latents of every level (76 MB for 24 frames of 512 x 512 in
    50 steps). The sigmas descend to 0. A mask takes no part in the inversion.

    Args:
        method: one of METHODS.
    """
    video, samples = check_inputs(model, latent, prompt=prompt)
    refuse_inverted(latent)
    sigmas = ddim.ddim_sigmas(video.sigmas, steps)
    # Both methods ask at the higher level of each step.
    host.check_active("prompt", model, prompt, [float(sigma) for sigma in sigmas[1:]])
    host.check_hooks("prompt", prompt)
    show = callback or host.preview_callback(model, steps)
    levels: list[Tensor] = []

    def keep(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        levels.append(x.to("cpu", torch.float32, copy=True))
        show(step, denoised, x, total)

    out = host.run_sampler(host.unguided(model, prompt), samples, sigmas, keep, sampler=METHODS[method])
    trajectory = ddim.Trajectory(sigmas, torch.stack([*levels, video.latents(out).to("cpu", torch.float32)]))
    sigma = float(sigmas[-1])
    made = {"steps": steps, "sigma": sigma, "clip": samples, "inverted": out}
    made |= {"prompt": prompt, "trajectory": trajectory}
    inverted = {**latent, "samples": out, host.KEY: made}
    descending = torch.cat([sigmas[1:].flip(0), sigmas.new_zeros(1)])
    return inverted, InvertedNoise(model, out, sigma), descending


def sample_video(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    positive: host.Conditioning,
    negative: host.Conditioning,
    steps: int,
    cfg: float,
    callback=None,
    steering: guidance.Steering = PLAIN,
) -> dict[str, Any]:
    """DDIM sampling from inverted latents; LATENT of the edited clip.

    Outside of a mask in `latent`, the clip stays as it was. The model sees it there on a straight line to its noise, as
    in the host's own inpainting; on its trajectory instead, edits came out the same.
    """
    uncut = "structure" if steering.structure else ""
    video, samples = check_inputs(model, latent, uncut=uncut, positive=positive, negative=negative)
    sigmas = ddim.ddim_sigmas(video.sigmas, steps).flip(0)
    _check_inverted(video, latent, steps, float(sigmas[0]))
    guider = _guider(video, latent, positive, negative, cfg, steering, sigmas)
    if steering.freedom:
        freed = guidance.freed(video.latents(samples), float(sigmas[0]), steering.freedom, steering.seed)
        samples = host.samples_of(model, freed)
    noise, mask = None, latent.get("noise_mask")
    if mask is not None and bool((mask == 1).all()):
        mask = None  # it keeps nothing
    if mask is not None:
        clip = {"samples": inversion_of(latent)["clip"]}
        noise = InvertedNoise(model, samples, float(sigmas[0])).generate_noise(clip)
        samples = clip["samples"]
        # As the core: what a soft mask blends is the model's last prediction, not what is left of the noise in it.
        sigmas = torch.cat([sigmas[:-1], sigmas.new_zeros(1)])
    out = host.run_sampler(guider, samples, sigmas, callback or host.preview_callback(model, steps), noise, mask)
    return {**{key: value for key, value in latent.items() if key != host.KEY}, "samples": out}


def _guider(
    video: host.Video,
    latent: Mapping[str, Any],
    positive: host.Conditioning,
    negative: host.Conditioning,
    cfg: float,
    steering: guidance.Steering,
    sigmas: Tensor,
) -> Any:
    """What guides an edit: the host's own guider, unless guidance changes or the source takes part.

    Raises ValueError where a prompt is not active at a noise level at which it counts.
    """
    switch, apart = (guidance.until(sigmas, share) for share in (steering.cfg_until, steering.structure))

    def cfg_at(sigma: float) -> float:
        return cfg if sigma > switch else steering.cfg_end

    levels = [float(sigma) for sigma in sigmas[:-1]]
    host.check_active("positive", video.patcher, positive, levels)
    guided = [sigma for sigma in levels if not math.isclose(cfg_at(sigma), 1)]  # elsewhere the host does not ask for it
    host.check_active("negative", video.patcher, negative, guided)
    if steering.cfg_until == 1 and not steering.structure:
        return host.guided(video.patcher, positive, negative, cfg)
    source = None
    if steering.structure:
        made = inversion_of(latent)
        path = made["trajectory"]
        prompts = {"positive": positive, "negative": negative, "DDIM Invert's prompt": made["prompt"]}
        _check_shared(video.patcher, "DDIM Invert's prompt", prompts, [sigma for sigma in levels if sigma > apart])
        source = guidance.Source(video.parts), made["prompt"], lambda sigma: path.at(sigma) if sigma > apart else None
    return host.steered(video.patcher, positive, negative, cfg_at, source)


def _check_shared(
    model: host.ModelPatcher, source: str, prompts: Mapping[str, host.Conditioning], levels: Sequence[float]
) -> None:
    """Whether the features of the `source` prompt are of the same places as all prompts' of the edit.

    Raises ValueError where they are not at one of these noise levels. That their shapes may fit says nothing: how the
    host puts prompts together is a matter of its free memory.
    """
    host.check_active(source, model, prompts[source], levels)
    together = max(map(sum, zip(*host.active_at(model, prompts[source], levels), strict=True)), default=0)
    if together > 1:
        raise ValueError(
            f"{source} combines {together} prompts, and structure shares the features of one. Combine none "
            "in DDIM Invert, or set structure to 0."
        )
    for name, prompt in prompts.items():
        for (_text, options), active in zip(prompt, host.active_at(model, prompt, levels), strict=True):
            if any(active) and ("area" in options or options.get("set_area_to_bounds")):
                raise ValueError(
                    f"{name} has an area (ConditioningSetArea, or mask bounds), and structure shares features of whole "
                    "pictures. Remove the area, or take a mask with set_cond_area default, or set structure to 0."
                )


def inversion_of(latent: Mapping[str, Any]) -> Mapping[str, Any]:
    """How and of what an inverted LATENT was made.

    Raises ValueError where that is not known: the clip and its trajectory are.
    """
    made = latent.get(host.KEY, {})
    if "trajectory" not in made or _changed(latent):
        raise ValueError(
            "the clip behind these latents is not known: they do not come from DDIM Invert, or were changed since. "
            "Connect inverted of DDIM Invert."
        )
    return made


def refuse_inverted(latent: Mapping[str, Any]) -> None:
    """Raises ValueError for an inverted LATENT, which is noise, where a clip is wanted."""
    if host.KEY in latent and not _changed(latent):
        raise ValueError(
            "these latents are the noise that DDIM Invert made of a clip, and the clip itself is needed: connect VAE "
            "Encode."
        )


def _changed(latent: Mapping[str, Any]) -> bool:
    inverted = latent.get(host.KEY, {}).get("inverted", latent["samples"])
    return inverted is not latent["samples"] and not torch.equal(inverted, latent["samples"])


def _check_inverted(video: host.Video, latent: Mapping[str, Any], steps: int, sigma: float) -> None:
    made = latent.get(host.KEY, {})
    changed = _changed(latent)
    if latent.get("noise_mask") is not None and (changed or "trajectory" not in made):
        raise ValueError(
            "the latents have a mask, but what it should keep of the clip is not known: they do not come from DDIM "
            "Invert, or were changed since. Connect DDIM Invert, or take the mask off the latents."
        )
    if changed or not made:  # noise of another origin, changed since, or sampled: another node hands on how it was made
        spread = float(video.latents(latent["samples"]).float().std())
        if spread < sigma / 2:
            raise ValueError(
                f"these latents are not noise (their standard deviation is {spread:.1f}, {steps} steps start at "
                f"{sigma:.1f}): connect the inverted latents of DDIM Invert."
            )
    if made.get("steps", steps) != steps:
        raise ValueError(
            f"the latents were inverted in {made['steps']} steps, but steps is {steps} here: the noise levels would "
            "not meet. Use the same number in both nodes."
        )
    if not math.isclose(made.get("sigma", sigma), sigma, rel_tol=1e-4):
        raise ValueError(
            f"the latents were inverted to noise level {made['sigma']:.3f}, this MODEL samples from {sigma:.3f}: a "
            "node such as ModelSamplingDiscrete (zsnr) stands before one of the two nodes only. Put it before both."
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
        process_in = partial(host.latents_of, self.model)
        # The host leaves an all-zero latent image as it is.
        start = process_in(image) if torch.count_nonzero(image) else image
        return (process_in(self.inverted) - start.to(self.inverted)) / unit.to(self.inverted)
