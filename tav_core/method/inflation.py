"""What is attached to an image UNet to make it a video UNet, and how (arXiv 2212.11565, section 3.2).

All of it is hooks on the UNet's own modules and around their `forward`, so no module is replaced and no state-dict key
changes:

- `attn1.to_k`, `attn1.to_v`: their outputs are regrouped for sparse-causal attention;
- each transformer block, or each transformer's last: its output goes through temporal attention;
- each block's feed-forward takes its frames in parts while sampling, for its inner width is the largest there is;
- the group norms of the resnets and of the output (`group_norm="video"`): statistics over all frames of a
  video, as in the reference, whose 5-D tensors are normalised at once; the transformers' entry norms stay per
  frame there too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils import checkpoint

from .attention import PAPERS, SparseCausal, TemporalAttention
from .norms import knows_videos, video_group_norm

GroupNormMode = Literal["video", "per_frame"]
GROUP_NORM_MODES: tuple[str, ...] = get_args(GroupNormMode)


@dataclass(frozen=True)
class UNetParts:
    """Where to attach, in one UNet.

    Attributes:
        blocks: transformer blocks by their name in the UNet; each has `attn1` and `n_heads`.
        video_norms: the group norms that the reference computes over a whole video.
        stages: the residual blocks and transformers, in which almost all activations live; gradient
            checkpointing works on these.
        last: names of the blocks that are the last of their transformer.
        decoder: names of the blocks in the UNet's second half.
        layout: the residual block of the decoder whose output holds the layout of the picture.
    """

    blocks: Mapping[str, Any]
    video_norms: list[Any]
    stages: list[Any]
    last: frozenset[str]
    decoder: frozenset[str]
    layout: Any


# What is tuned: the paper's choice, or less. A temporal attention for each block, or for each transformer, which may
# have ten blocks; the queries whole, or changed at low rank (`low_rank`).
Layers = Literal["paper", "light"]
LAYERS: tuple[str, ...] = get_args(Layers)
PAPER, LIGHT = LAYERS


class TemporalLayers(nn.Module):
    """One `TemporalAttention` for each transformer block, or with `LIGHT` for each transformer's last, under its name.

    Its parameters go by their published names, after the host's names of the blocks:
    `input_blocks.1.1.transformer_blocks.0.attn_temp.to_q.weight`.
    """

    layers: Any  # torch does not say what a ModuleList holds

    def __init__(self, parts: UNetParts, device: torch.device | str = "cpu", layers: str = PAPER):
        super().__init__()
        blocks = {name: block for name, block in parts.blocks.items() if layers == PAPER or name in parts.last}
        self.names = list(blocks)
        # Built without weights (call `reset` or `assign`): torch's own initialisation would draw from the global
        # random state, on which other nodes of the graph depend.
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                TemporalAttention(block.norm1.normalized_shape[0], block.n_heads) for block in blocks.values()
            )
        self.to_empty(device=device)

    def reset(self, seed: int = 0) -> None:
        """Make every layer an identity, with projections drawn from a generator of its own."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.layers:
            layer.reset(generator)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by published name."""
        return {
            f"{name}.{key}": parameter
            for name, layer in zip(self.names, self.layers, strict=True)
            for key, parameter in layer.named_parameters()
        }

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, by published name, into the parameters. Raises ValueError when names or shapes differ."""
        own = self.named()
        if missing := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(
                f"these temporal weights belong to another UNet: {len(missing)} names differ, the first is "
                f"{missing[0]}. Use weights that were tuned on this model's family."
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"temporal weight {name} has shape {tuple(tensors[name].shape)}, this model needs "
                    f"{tuple(parameter.shape)}. Use weights that were tuned on this model's family."
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


class _Temporal:
    """A block's forward hook: its output goes through a layer of temporal attention."""

    def __init__(self, layer: TemporalAttention, frames: int):
        self.layer, self.frames = layer, frames

    def __call__(self, _module: Any, _args: Any, out: Tensor) -> Tensor:
        return self.layer(out, self.frames)


def is_inflated(block: Any) -> bool:
    """Whether a transformer block that has temporal attention in a video UNet is part of one just now."""
    return any(isinstance(hook, _Temporal) for hook in block._forward_hooks.values())


class _Replaced:
    """A module's `forward` replaced by another, until it is removed."""

    def __init__(self, module: Any, forward: Callable[..., Tensor]):
        self.module, self.own = module, vars(module).get("forward")
        module.forward = forward

    def remove(self) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own


# Of a feed-forward while sampling: a quarter of its inner width is less than what attention takes, and a part of fewer
# tokens than this would only read the weights once more.
PARTS, LEAST_TOKENS = 4, 2048


def _in_parts(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A feed-forward on a few of the batch at a time; as a whole where a gradient would keep all parts anyway."""

    def run(x: Tensor) -> Tensor:
        parts = min(PARTS, x.shape[0] * x.shape[1] // LEAST_TOKENS)
        if parts < 2 or torch.is_grad_enabled():
            return forward(x)
        return torch.cat([forward(part) for part in x.chunk(parts)])

    return run


def attach(
    parts: UNetParts,
    temporal: TemporalLayers,
    videos: int,
    frames: int,
    group_norm: str,
    undo: ExitStack,
    attends: str = PAPERS,
) -> SparseCausal:
    """Make one UNet a video UNet, for a batch of `videos` of `frames` each, until `undo` is closed.

    Returns what may compute its attention (`attend`).
    """
    attention = SparseCausal(frames, attends)

    def hook(handle: Any) -> None:
        undo.callback(handle.remove)

    def whole(projected: Tensor) -> Tensor:
        if projected.shape[0] != videos * frames:
            raise ValueError(
                f"another node cut the batch of {videos * frames} frames into {projected.shape[0]} pieces before "
                "self-attention (HyperTile does); remove it from the model, sparse-causal attention needs whole frames."
            )
        return projected

    for name, layer in zip(temporal.names, temporal.layers, strict=True):
        hook(parts.blocks[name].register_forward_hook(_Temporal(layer, frames)))
    for block in parts.blocks.values():
        attn1 = block.attn1
        hook(attn1.to_q.register_forward_hook(lambda _m, _a, q: whole(q)))
        hook(attn1.to_k.register_forward_hook(lambda _m, _a, k: attention.keys(whole(k))))
        hook(attn1.to_v.register_forward_hook(lambda _m, _a, v: attention.values(whole(v))))
        if frames > 1:
            hook(_Replaced(block.ff, _in_parts(block.ff.forward)))

    if group_norm == "video" and frames > 1:
        for norm in parts.video_norms:
            hook(_Replaced(norm, _over_videos(norm, frames)))
    return attention


def _over_videos(norm: Any, frames: int) -> Callable[[Tensor], Tensor]:
    """A group norm's forward with statistics over all frames of each video."""
    forward = norm.forward

    def run(x: Tensor) -> Tensor:
        if knows_videos(norm, x, frames):
            return video_group_norm(x, frames, norm)
        # Frames side by side make one tall picture: the module itself then normalises the whole video, with whatever
        # its host does about casting its weights.
        tall = forward(rearrange(x, "(b f) c h w -> b c (f h) w", f=frames))
        return rearrange(tall, "b c (f h) w -> (b f) c h w", f=frames)

    return run


@contextmanager
def inflated(
    parts: UNetParts, temporal: TemporalLayers, videos: int, frames: int, group_norm: str, attends: str = PAPERS
) -> Iterator[SparseCausal]:
    """The UNet is a video UNet inside this block, and as it was after it, whatever happens. See `attach`."""
    with ExitStack() as undo:
        yield attach(parts, temporal, videos, frames, group_norm, undo, attends)


# What is recomputed in the backward pass instead of kept: the more, the less memory and the more time.
Recompute = Literal["nothing", "pointwise", "linear", "all"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)

_aten = torch.ops.aten
_ATTENTIONS = {
    kernel.default
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    if (kernel := getattr(_aten, f"_scaled_dot_product_{kind}", None))  # not every torch has all of them
}
_HEAVY = {_aten.convolution.default, *_ATTENTIONS}
_LINEAR = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_KEPT = {"pointwise": _HEAVY | _LINEAR, "linear": _HEAVY, "all": set()}


def checkpoint_stages(parts: UNetParts, recompute: str) -> None:
    """Make a *private* UNet recompute in the backward pass instead of keeping all activations of its stages.

    A stage's options dict is copied for each call: the UNet changes it in place from block to block, so a
    recomputation would otherwise see the last block's and silently give wrong gradients.

    Args:
        recompute: "nothing" changes nothing; "pointwise" norms and activations; "linear" these and linear layers;
            "all" everything but sparse-causal attention.
    """
    if recompute != "nothing":
        for stage in parts.stages:
            stage.forward = _checkpointed(stage.forward, _KEPT[recompute])


def _checkpointed(forward: Callable[..., Tensor], kept: set[Any]) -> Callable[..., Tensor]:
    def policy(_context: Any, operation: Any, *args: Any, **_kwargs: Any) -> Any:
        # Of all that a block computes, sparse-causal attention (more keys than queries) costs most for what it takes.
        keep = operation in kept or (operation in _ATTENTIONS and args[1].shape[-2] > args[0].shape[-2])
        return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def run(*args: Any) -> Tensor:
        snapshot = [dict(arg) if isinstance(arg, dict) else arg for arg in args]
        # The UNet draws no random numbers, so there is no random state to preserve.
        return checkpoint.checkpoint(
            forward,
            *snapshot,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy),
        )

    return run
