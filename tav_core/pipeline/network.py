"""A private, differentiable copy of an inflated MODEL to train, and what a step of it takes in memory."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..method import memory
from ..method.attention import sdpa, wide_heads
from ..method.inflation import LIGHT, TemporalLayers, attach, checkpoint_stages
from ..method.low_rank import LowRankQueries
from ..method.norms import MixedGroupNorm, MixedLayerNorm
from ..method.tuning import trains


class PlainOps:
    """Layers for a UNet of our own: torch's, without the host's casting and offloading."""

    Linear, Conv2d, Conv3d, GroupNorm, LayerNorm = nn.Linear, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm
    Embedding = nn.Embedding

    @staticmethod
    def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        return {2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class MixedOps(PlainOps):
    """The same for a GPU's autocast, whose norms would be in float32."""

    GroupNorm, LayerNorm = MixedGroupNorm, MixedLayerNorm


class _Fixed(nn.Module):
    """In place of a projection whose input never changes: its output, [1 or f, tokens, width]."""

    output: Tensor

    def __init__(self, output: Tensor):
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, context: Tensor) -> Tensor:
        return self.output.expand(context.shape[0], -1, -1)


class TrainingUNet:
    """A private, differentiable copy of an inflated MODEL: same architecture, own weights.

    The host's parameters are inference tensors, may be half-loaded, quantised or shared with other branches of
    the graph; here none of them is touched. Build and use it outside inference mode.

    Args:
        frames: f of every batch, of a window where the clip is cut.
        precision: "fp32", or "bf16": frozen matrices in bfloat16 under autocast, all else in float32.
        recompute: in the backward pass (`inflation.checkpoint_stages`).
        context: the text, [1 or f, tokens, width]; None leaves the network without values, on the meta device, for
            `memory.estimate`, until `fix_text`.
        vector: what SDXL reads beside the text (`host.vector_of`).
    """

    def __init__(
        self,
        video: host.Video,
        frames: int,
        precision: str,
        recompute: str,
        context: Tensor | None,
        vector: Tensor | None = None,
    ):
        model, blank = video.patcher, context is None
        self.device = torch.device("cpu") if blank else video.device
        mixed = precision == "bf16"
        # Not an autocast that is switched off: a device may not know of one at all.
        self.autocast: Any = partial(torch.autocast, self.device.type, torch.bfloat16) if mixed else nullcontext
        frozen = torch.bfloat16 if mixed else torch.float32
        config = {**host.config_of(model), "dtype": frozen}
        # On the meta device a UNet costs nothing; the weights are then assigned, not copied.
        operations: Any = MixedOps if mixed and video.device.type == "cuda" else PlainOps
        self.unet = type(video.unet)(**config, device="meta", operations=operations)
        plain = (self.unet.float() if blank else self.unet).state_dict()
        # A quantised MODEL has scales beside its weights; they are applied to those by then.
        source = plain.items() if blank else host.effective_weights(model, self.device, plain.__contains__)
        inflation = video.inflation
        layers = inflation.layers
        # Norms and biases stay in float32 too: not every device normalises in mixed precision.
        weights = {
            name: weight if trains(name, layers) or weight.ndim == 1 else weight.to(frozen) for name, weight in source
        }
        self.unet.load_state_dict(weights, strict=True, assign=True)
        self.unet.requires_grad_(False).eval()
        parts = host.parts_of(self.unet)
        # The host's UNet may have heads that its configuration cannot express.
        for name, heads in video.heads.items():
            host.set_heads(parts.blocks[name], heads)

        where = "meta" if blank else self.device
        self.low_rank = LowRankQueries(parts, where) if layers == LIGHT else None
        self.temporal = TemporalLayers(parts, where, layers)
        if not blank:
            self.temporal.assign(inflation.temporal.named())
        self.temporal.requires_grad_(False).eval()
        # It lives for one tune, so its hooks stay: a recomputation in the backward pass needs them too.
        attention = attach(parts, self.temporal, 1, frames, inflation.group_norm, ExitStack(), inflation.attends)
        self.attend = partial(attention.attend, wide_heads(sdpa) if video.device.type == "cpu" else sdpa)
        checkpoint_stages(parts, recompute)

        named = {**dict(self.unet.named_parameters()), **self.temporal.named()}
        if self.low_rank is not None:
            named |= self.low_rank.named()
        self.trainable = {name: parameter for name, parameter in named.items() if trains(name, layers)}
        for parameter in self.trainable.values():
            parameter.requires_grad_()
        self.vector = vector
        if context is not None:
            self.fix_text(context)

    @property
    def modules(self) -> list[nn.Module]:
        """All that holds parameters."""
        return [self.unet, self.temporal, *([self.low_rank] if self.low_rank is not None else [])]

    def reset(self, generator: torch.Generator) -> None:
        """Give what begins anew in each tune its first values."""
        if self.low_rank is not None:
            self.low_rank.reset(generator)

    def fix_text(self, context: Tensor) -> None:
        """Compute the text's keys and values once, for all steps, and let go of the weights that make them."""
        self.context = context
        with torch.no_grad(), self.autocast():
            for block in host.parts_of(self.unet).blocks.values():
                block.attn2.to_k = _Fixed(block.attn2.to_k(context))
                block.attn2.to_v = _Fixed(block.attn2.to_v(context))

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Network output [f, c, h, w] for latents of the same shape at a timestep, []."""
        options = {
            "cond_or_uncond": [0],
            host.OVERRIDE: lambda _host, *args, **kwargs: self.attend(*args, **kwargs),
        }
        with self.autocast():
            t = timestep.float().expand(latents.shape[0])
            text = self.context.expand(latents.shape[0], -1, -1)
            vector = None if self.vector is None else self.vector.expand(latents.shape[0], -1)
            return self.unet(latents, t, context=text, y=vector, transformer_options=options)


def estimate_step(video: host.Video, shape: torch.Size, tokens: int, precision: str, recompute: str) -> memory.Estimate:
    """Peak memory of a training step of an inflated model on latents of `shape`, with a caption of `tokens`."""
    network = TrainingUNet(video, shape[0], precision, recompute, None)

    def loss() -> Tensor:
        network.fix_text(torch.empty(1, tokens, video.text_width))
        network.vector = torch.empty(1, video.vector_width) if video.vector_width else None
        return network(torch.empty(shape), torch.empty(())).float().square().mean()

    with torch.inference_mode(False), torch.enable_grad():
        return memory.estimate(network.modules, loss, video.device.type == "cuda")
