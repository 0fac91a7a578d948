"""The method done plainly: what `run.py bench` compares the pack with, and what the tests check it against.

The same mathematics in the reference's way of doing it, on diffusers' image UNet: latents stay [b, c, f, h, w] and
are rearranged around every convolution; sparse-causal attention gathers two copies of keys and values for every
frame; text is repeated per frame and projected in every call; tuning encodes the clip in every step, recomputes
every block in the backward pass, and hands all parameters to AdamW. Only the attention itself is torch's
`scaled_dot_product_attention`, which the reference did not have. It shares no code with the pack.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TRAINED = ("attn1.to_q", "attn2.to_q", "attn_temp.")

# A published model's `config.json` of Stable Diffusion 1.x, and of its shape at a tenth of the width.
SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}
SMALL = {**SD15, "block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64}


class VideoUNet(nn.Module):
    """The reference's UNet, of random weights: `unet` has a published model's tensors by their names.

    Args:
        config: a published model's `config.json`.
    """

    def __init__(self, config: Mapping[str, Any], seed: int = 0):
        super().__init__()
        kinds = {
            key: [kind.replace("3D", "2D") for kind in config[key]] for key in ("down_block_types", "up_block_types")
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.unet = UNet2DConditionModel(**{**config, **kinds})
            for block in self._all(BasicTransformerBlock):
                heads, width = block.attn1.heads, block.norm1.normalized_shape[0]
                block.norm_temp = nn.LayerNorm(width)
                block.attn_temp = Attention(width, heads=heads, dim_head=width // heads)
        self.requires_grad_(False)
        self.frames, self.checkpointing = 1, False
        for block in self._all(BasicTransformerBlock):
            block.attn1.set_processor(self._sparse_causal)
            block.register_forward_hook(self._temporal)
        for conv in self._all(nn.Conv2d):
            conv.forward = _per_frame(conv.forward)
        for upsample in self._all(Upsample2D):
            upsample.forward = _in_space(upsample.forward)
        for transformer in self._all(Transformer2DModel):
            transformer.forward = self._checkpointed(_repeating_text(transformer.forward))
        for resnet in self._all(ResnetBlock2D):
            resnet.time_emb_proj.register_forward_hook(lambda _m, _args, out: out[..., None])  # to [b, c, f, h, w]
            resnet.forward = self._checkpointed(resnet.forward)

    def _all(self, kind: type) -> list[Any]:
        return [module for module in self.unet.modules() if isinstance(module, kind)]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """What the network predicts for latents [b, c, f, h, w], timesteps [b] and context [b, tokens, width]."""
        self.frames = latents.shape[2]
        dtype = self.unet.dtype
        out = self.unet(latents.to(dtype), timesteps, encoder_hidden_states=context.to(dtype), return_dict=False)[0]
        return out.to(latents.dtype)

    def _sparse_causal(self, attention: Any, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        former = torch.arange(self.frames) - 1
        former[0] = 0

        def gathered(kv: Tensor) -> Tensor:
            video = rearrange(kv, "(b f) n c -> b f n c", f=self.frames)
            return rearrange(torch.cat([video[:, [0] * self.frames], video[:, former]], dim=2), "b f n c -> (b f) n c")

        q, k, v = attention.to_q(x), gathered(attention.to_k(x)), gathered(attention.to_v(x))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=attention.heads) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return attention.to_out[0](rearrange(out, "b h n d -> b n (h d)"))

    def _temporal(self, block: Any, _args: Any, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        x = rearrange(x, "(b f) n c -> (b n) f c", f=self.frames)
        x = block.attn_temp(block.norm_temp(x)) + x
        return rearrange(x, "(b n) f c -> (b f) n c", n=tokens)

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return forward(*args, **kwargs)

        return run


def _per_frame(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        if x.ndim == 4:  # inside a transformer
            return forward(x)
        out = forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(out, "(b f) c h w -> b c f h w", f=x.shape[2])

    return run


def _in_space(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, output_size: Any = None) -> Tensor:
        frames, height, width = x.shape[2:]
        return forward(x, output_size or (frames, 2 * height, 2 * width))

    return run


def _repeating_text(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        frames = x.shape[2]
        text = repeat(encoder_hidden_states, "b n c -> (b f) n c", f=frames)
        (out,) = forward(rearrange(x, "b c f h w -> (b f) c h w"), encoder_hidden_states=text, **kwargs)
        return (rearrange(out, "(b f) c h w -> b c f h w", f=frames),)

    return run


def make_scheduler(steps: int, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> Any:
    """Stable Diffusion's noise schedule, with the timesteps of a DDIM loop."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # 1 - alpha has few digits else, early on
    scheduler.set_timesteps(steps)
    return scheduler


def invert(model: nn.Module, scheduler: Any, latents: Tensor, context: Tensor) -> Iterator[Tensor]:
    """DDIM inversion: the latents after each step."""
    ascending = scheduler.timesteps.flip(0)
    for i, t in enumerate(ascending):
        low, high = scheduler.alphas_cumprod[ascending[i - 1] if i else 0], scheduler.alphas_cumprod[t]
        with torch.no_grad():
            out = model(latents, t[None].to(latents.device), context)
            if scheduler.config.prediction_type == "v_prediction":
                out = high.sqrt() * out + (1 - high).sqrt() * latents
            latents = high.sqrt() * (latents - (1 - low).sqrt() * out) / low.sqrt() + (1 - high).sqrt() * out
        yield latents


def sample(
    model: nn.Module, scheduler: Any, latents: Tensor, uncond: Tensor, cond: Tensor, cfg: float
) -> Iterator[Tensor]:
    """DDIM sampling with guidance: the latents after each step."""
    for t in scheduler.timesteps:
        with torch.no_grad():
            both = model(torch.cat([latents] * 2), t.repeat(2).to(latents.device), torch.cat([uncond, cond]))
            out, guided = both.chunk(2)
            latents = scheduler.step(out + cfg * (guided - out), int(t), latents, return_dict=False)[0]
        yield latents


def tune(
    model: VideoUNet,
    scheduler: Any,
    encode: Callable[[], Tensor],
    context: Tensor,
    draws: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[float, float]]:
    """One-shot tuning in place: the loss and the gradient norm of each step.

    Args:
        encode: the clip's latents. The reference draws them from the VAE's posterior.
        draws: noise, as the latents, and timestep, [1], of each step.
    """
    for name, parameter in model.unet.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, foreach=False, fused=False)
    for noise, t in draws:
        with torch.no_grad():
            clean = encode()
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(clean, noise, t)
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t, context).to(target), target)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item(), norm.item()
