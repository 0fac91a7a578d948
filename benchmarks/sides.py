"""The two sides of `run.py bench`: this pack, as its nodes call it, and the baseline, with the same weights and inputs.

A side's step is an inversion step, a guided sampling step or a tuning step (`KINDS`). Import this after `load_pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import baseline
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import ddim
from tune_a_video.tav_core.method.inflation import TemporalLayers
from tune_a_video.tav_core.method.tuning import Draws, Recipe
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune
from tune_a_video.tav_core.store import published

KINDS = ("inversion step", "guided sampling step", "tuning step, fast", "tuning step, low memory")
INVERSION, SAMPLING, FAST, LOW = KINDS
CFG = 12.5
TOKENS = 77
# UNet, channels of the VAE (its cost beside the UNet's is that of Stable Diffusion's), frames, size in pixels.
CONFIGS = {
    "small": (baseline.SMALL, (16, 32, 64, 64), 8, 256),
    "sd15": (baseline.SD15, (128, 256, 512, 512), 24, 512),
}


class Baseline:
    """The plain way: `baseline`, with a VAE of its own."""

    def __init__(self, config: dict[str, Any], vae_channels: tuple[int, ...], frames: int, size: int):
        generator = torch.Generator().manual_seed(1)
        self.config = config
        self.vae_config: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": vae_channels,
            "layers_per_block": 2,
            "norm_num_groups": min(32, vae_channels[0]),
        }
        self.model = baseline.VideoUNet(config)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.vae: Any = AutoencoderKL(**self.vae_config).requires_grad_(False)
        self.device = torch.device("cpu")
        self.pictures = 2 * torch.rand(frames, 3, size, size, generator=generator) - 1
        # As large as a real VAE's latents: 0.18215 belongs to Stable Diffusion's weights.
        self.scale = 1 / float(self._means(self.pictures[:1, :, :64, :64]).std())
        width = config["cross_attention_dim"]
        self.uncond, self.cond = (torch.randn(1, TOKENS, width, generator=generator) for _ in range(2))
        self.trained = {
            name: p for name, p in self.model.unet.named_parameters() if any(part in name for part in baseline.TRAINED)
        }
        self.untrained = {name: p.detach().clone() for name, p in self.trained.items()}

    def to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device)
        self.vae.to(device)
        self.pictures, self.uncond, self.cond = (t.to(device) for t in (self.pictures, self.uncond, self.cond))

    def encode(self) -> Tensor:
        """The clip's latents, [1, c, f, h, w]: the mean, where the reference draws, so that both sides tune alike."""
        return rearrange(self.scale * self._means(self.pictures), "f c h w -> 1 c f h w")

    def _means(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vae.encode(pictures).latent_dist.mean.float()

    def weights(self, kind: str) -> int:
        """Bytes that are there before a step."""
        parameters = [*self.model.parameters(), *(self.vae.parameters() if kind in (FAST, LOW) else ())]
        return sum(p.numel() * p.element_size() for p in parameters)

    def steps(self, kind: str, count: int, start: Tensor | None = None) -> Iterator[Any]:
        """Its `count` steps; what each yields is the result so far: latents [f, c, h, w], or loss and gradient norm.

        Args:
            start: noisy latents to sample from.
        """
        scheduler = baseline.make_scheduler(count)
        if kind in (FAST, LOW):
            return self._tune(scheduler, count)
        if kind == INVERSION:
            steps = baseline.invert(self.model, scheduler, self.encode(), self.uncond)
        else:
            assert start is not None
            noisy = rearrange(start, "f c h w -> 1 c f h w").to(self.device)
            steps = baseline.sample(self.model, scheduler, noisy, self.uncond, self.cond, CFG)
        return (rearrange(latents, "1 c f h w -> f c h w") for latents in steps)

    def _tune(self, scheduler: Any, count: int) -> Iterator[tuple[float, float]]:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.untrained[name])
        self.model.checkpointing = True
        shape = self.encode()[0].transpose(0, 1).shape
        recipe = Recipe(count)
        draws = (
            (rearrange(noise, "f c h w -> 1 c f h w").to(self.device), torch.tensor([t], device=self.device))
            for noise, t, _frames in Draws(shape, 1000, recipe.seed)
        )
        steps = baseline.tune(self.model, scheduler, self.encode, self.cond, draws)
        for _ in range(count):
            with torch.inference_mode(False), torch.enable_grad(), self._autocast():
                step = next(steps)
            yield step

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def job(self, tuning: int, ddim_steps: int) -> None:
        """Tune, invert and sample."""
        list(self.steps(FAST, tuning))
        *_, inverted = self.steps(INVERSION, ddim_steps)
        list(self.steps(SAMPLING, ddim_steps, inverted))


class Pack:
    """This pack's own path through the host's model."""

    def __init__(self, other: Baseline, config: dict[str, Any], window: tuple[int, int] = (0, 0)):
        """`window`: frames that are computed at once, 0 for all, and their overlap."""
        self.other = other
        unet_config = published.to_unet_config(config)
        names = host.published_names(unet_config)
        base, temporal_weights = published.to_unet(other.model.unet.state_dict(), names)
        heads = published.heads_per_block(config, names)
        model = load_model(unet_config, base, heads)
        temporal = TemporalLayers(host.parts_of(host.unet_of(model)))
        temporal.assign(temporal_weights)
        self.model = host.with_inflation(model, host.Inflation(temporal, "video", windows=Windows(*window)))
        self.uncond, self.cond = ([[text.cpu(), {}]] for text in (other.uncond, other.cond))
        self.latent = self.encode()
        self.dtype: torch.dtype = host.inference_dtype(self.model)
        self.unload = host.unload

    def encode(self) -> dict[str, Any]:
        """LATENT of the clip."""
        latents = rearrange(self.other.encode(), "1 c f h w -> f c h w")
        return {"samples": self.model.model.process_latent_out(latents.cpu())}

    def weights(self, kind: str) -> int:
        """Bytes that are there before a step: tuning makes its own copy."""
        if kind in (FAST, LOW):
            return 0
        modules = [self.model.model.diffusion_model, host.inflation_of(self.model).temporal]
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def steps(self, kind: str, count: int, between: Callable[..., None], start: Tensor | None = None) -> Any:
        """Take `count` steps and call `between` after each; the result, as `Baseline.steps` yields it.

        Args:
            start: as there.
        """
        if kind in (FAST, LOW):
            reports = []

            def on_step(step: Any) -> None:
                reports.append((step.loss, step.grad_norm))
                between()

            recipe = Recipe(count)
            one_shot_tune(
                self.model, self.latent, self.cond, recipe, "auto", "all" if kind == LOW else "nothing", on_step
            )
            return reports[-1]
        sigmas = ddim.ddim_sigmas(host.model_sigmas(self.model), count)
        scale = float((1 + sigmas[-1] ** 2).sqrt())
        into, out_of = self.model.model.process_latent_in, self.model.model.process_latent_out
        with torch.inference_mode():
            if kind == INVERSION:
                inverted, _noise, _sigmas = editing.invert(self.model, self.latent, self.uncond, count, between)
                return into(inverted["samples"]) / scale
            assert start is not None
            noisy = {"samples": out_of(start.cpu() * scale), host.KEY: {"steps": count}}
            return into(editing.sample_video(self.model, noisy, self.cond, self.uncond, count, CFG, between)["samples"])

    def job(self, tuning: int, ddim_steps: int) -> None:
        """Encode, tune, invert and sample; nothing is saved."""
        latent, nothing = self.encode(), lambda *_args: None
        with torch.inference_mode():
            weights = one_shot_tune(self.model, latent, self.cond, Recipe(tuning), "auto", "auto", nothing)
            tuned = apply_weights(self.model, weights)
            inverted, _noise, _sigmas = editing.invert(tuned, latent, self.uncond, ddim_steps, nothing)
            editing.sample_video(tuned, inverted, self.cond, self.uncond, ddim_steps, CFG, nothing)


def load_model(unet_config: dict[str, Any], weights: dict[str, Tensor], heads: dict[str, int]) -> Any:
    """A MODEL of these weights: as the host loads a checkpoint where it knows the shape, which decides the dtype."""
    if unet_config["model_channels"] != 320:
        return host.build_model(unet_config, weights, heads=heads)
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(weights))
