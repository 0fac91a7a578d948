"""The two attentions that turn an image UNet into a video UNet (arXiv 2212.11565, section 3.2).

Frames are folded into the batch, as everywhere in an image UNet: `(b f) n c` is b videos of f frames of n
tokens of width c.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .norms import layer_norm

# The frames whose keys and values a frame attends to; the paper's first. "own" is the image model's.
Attends = Literal["first_previous", "first_own_previous", "all", "own"]
ATTENDS: tuple[str, ...] = get_args(Attends)
PAPERS = "first_previous"


def sparse_causal(kv: Tensor, frames: int) -> Tensor:
    """Keys or values that each frame attends to: those of the first and of the previous frame.

    Gathered after the projections, so that every frame is projected once. A frame does not see itself, except
    the first one, whose previous frame is itself (reference: SparseCausalAttention in models/attention.py).

    Args:
        kv: projected keys or values, `(b f) n c`.
        frames: f.
    Returns:
        `(b f) (2 n) c`, or `(b f) n c` where first and previous are the same frame for all of them:
        a softmax over a key given twice equals the softmax over that key given once.
    """
    video = rearrange(kv, "(b f) n c -> b f n c", f=frames)
    first = video[:, :1]
    if frames <= 2:
        return repeat(first, "b 1 n c -> (b f) n c", f=frames)
    previous = torch.cat([first, video[:, :-1]], dim=1)
    return torch.cat([first.expand_as(video), previous], dim=2).flatten(0, 1)


def attended(kv: Tensor, frames: int, attends: str) -> Tensor:
    """Keys or values `(b f) n c` of the frames that each frame attends to, `(b f) (w n) c`; see ATTENDS.

    Not for "first_own_previous", where it is not the same number of frames for all (`with_own`).
    """
    if attends == PAPERS:
        return sparse_causal(kv, frames)
    if attends == "own" or frames == 1:
        return kv
    video = rearrange(kv, "(b f) n c -> b f n c", f=frames)
    return repeat(video, "b g n c -> (b f) (g n) c", f=frames)


def with_own(q: Tensor, k: Tensor, v: Tensor, frames: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of frame 0, of frame 1 and of the others, where each attends to the first, its own and
    the previous frame, each once.

    Apart, for these are one frame's keys, two frames' and three: in frame 1, whose previous frame is the first, that
    one would otherwise count twice. All of several videos, `b …`, so that what tells prompts apart still can.
    """
    q, k, v = (rearrange(t, "(b f) n c -> b f n c", f=frames) for t in (q, k, v))
    parts = [(q[:, 0], k[:, 0], v[:, 0]), (q[:, 1], k[:, :2].flatten(1, 2), v[:, :2].flatten(1, 2))]
    if frames > 2:
        k, v = (torch.cat([t[:, :1].expand_as(t[:, 2:]), t[:, 2:], t[:, 1:-1]], dim=2) for t in (k, v))
        parts.append((q[:, 2:].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)))
    return parts


def _together(parts: list[Tensor], videos: int) -> Tensor:
    """Outputs for each of `with_own` as one for all frames, `(b f) n c`."""
    return torch.cat([part.unflatten(0, (videos, -1)) for part in parts], dim=1).flatten(0, 1)


class SparseCausal:
    """Sparse-causal attention in one UNet: selects keys and values, and leaves out the work that repeats itself.

    The keys go to whatever computes the attention, so another pack's attention sees them all. Where it is the UNet's
    own that is called (`attend`), frames 0 and 1, whose two frames are one and the same, are computed together on that
    frame's keys alone; and where each frame attends to all, their keys are there once for all of them. Where it attends
    to its own as well, the keys are put together there only, frames 0 and 1 apart.

    Args:
        frames: of each video in the batch.
        attends: one of ATTENDS.
    """

    def __init__(self, frames: int, attends: str = PAPERS):
        self.frames, self.attends = frames, attends
        self._keys: Tensor | None = None
        self._own: list[Tensor] | None = None  # each frame's own keys and values, where a node replaces the attention

    def keys(self, projected: Tensor) -> Tensor:
        """The keys that are attended to, which `attend` will know again."""
        if self._left_to_attend and self._keys is not None:
            raise ValueError(
                "another node computes self-attention by itself, and would leave each frame alone where others should "
                "be attended to. Remove it, or set attends to first_previous in Inflate UNet."
            )
        if self._own is not None:
            self._own = [projected]
        self._keys = self._selected(projected)
        return self._keys

    def values(self, projected: Tensor) -> Tensor:
        """The values that are attended to."""
        if self._own is not None:
            self._own.append(projected)
        return self._selected(projected)

    @property
    def _with_own(self) -> bool:
        return self.attends == "first_own_previous" and self.frames > 1

    @property
    def _left_to_attend(self) -> bool:
        # A copy of all keys for each frame would be large, and `attend` needs none.
        return self._with_own or (self.attends == "all" and self.frames > 1 and self._own is None)

    def _selected(self, projected: Tensor) -> Tensor:
        return projected if self._left_to_attend else attended(projected, self.frames, self.attends)

    def replaced(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Another node's `function(q, k, v, …)` in place of the attention, on the keys and values of this one.

        It is called once more on each frame's own, for such nodes look at one frame: what it notes of its last call
        (SAG the scores) is then of one frame, and where it returns as many tokens as there are values (PAG), that is
        its result.
        """
        self._own = []

        def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own_k, own_v = self._own or (k, v)
            self._keys = None
            if self.frames == 1:
                return function(q, k, v, *args, **kwargs)
            if self._with_own:
                parts = with_own(q, k, v, self.frames)
                outs = [function(*part, *args, **kwargs) for part in parts]
                own = function(q, k, v, *args, **kwargs)
                return own if outs[-1].shape[1] == parts[-1][2].shape[1] else _together(outs, len(q) // self.frames)
            if k.shape == own_k.shape:  # one frame for both: given twice, it changes nothing but the length
                k, v = torch.cat([k, k], dim=1), torch.cat([v, v], dim=1)
            out = function(q, k, v, *args, **kwargs)
            own = function(q, own_k, own_v, *args, **kwargs)
            return own if out.shape[1] == v.shape[1] else out

        return attend

    def attend(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`function(q, k, v, heads, …)`: an attention of any kind, on `b n c`. All but ours is left to it."""
        ours = k is self._keys  # no cross-attention's, nor copies that another node has made
        self._keys = None
        if ours and self._with_own:
            outs = [function(*part, heads, *args, **kwargs) for part in with_own(q, k, v, self.frames)]
            return _together(outs, len(q) // self.frames)
        if ours and self._left_to_attend:
            q, k, v = (t.unflatten(0, (-1, self.frames)).flatten(1, 2) for t in (q, k, v))
            return function(q, k, v, heads, *args, **kwargs).unflatten(1, (self.frames, -1)).flatten(0, 1)
        if not ours or self.attends != PAPERS or self.frames <= 2 or args or kwargs.get("mask") is not None:
            return function(q, k, v, heads, *args, **kwargs)
        tokens = k.shape[1] // 2  # of one frame; there are fewer queries where another node merged them (ToMe)

        def of_video(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
            early = function(q[:2].flatten(0, 1)[None], k[:1, :tokens], v[:1, :tokens], heads, **kwargs)
            yield early[0].unflatten(0, (2, q.shape[1]))
            yield function(q[2:], k[2:], v[2:], heads, **kwargs)

        # One video after the other, as whole frames of one are no copies.
        videos = zip(*(t.split(self.frames) for t in (q, k, v)), strict=True)
        return torch.cat([part for video in videos for part in of_video(*video)])


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of a published checkpoint (`to_q` … `to_out.0`).

    Weights are cast to the input's dtype and device at use: the host may keep them anywhere.

    Args:
        dim: c, the width of a token; a multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` → `b n c`, every token attending to every token."""
        q, k, v = (F.linear(x, layer.weight.to(x)) for layer in (self.to_q, self.to_k, self.to_v))
        weight, bias = self.to_out.parameters()
        return F.linear(sdpa(q, k, v, self.heads), weight.to(x), bias.to(x))


class TemporalAttention(nn.Module):
    """Attention over the frames at each spatial position, with its own layer norm and residual.

    Bidirectional, without positions or mask, after the block's feed-forward (reference: attn_temp in
    models/attention.py). The output projection starts at zero, weight *and* bias, so a new layer is an exact identity
    (the reference leaves the bias random).

    Args:
        dim: c, the width of a token; a multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_temp = nn.LayerNorm(dim)
        self.attn_temp = Attention(dim, heads)

    def reset(self, generator: torch.Generator) -> None:
        """Start as an identity, with projections drawn from `generator` at torch's default scale for Linear."""
        nn.init.ones_(self.norm_temp.weight)
        nn.init.zeros_(self.norm_temp.bias)
        for layer in (self.attn_temp.to_q, self.attn_temp.to_k, self.attn_temp.to_v):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
        for parameter in self.attn_temp.to_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """`(b f) n c` → the same shape."""
        h = layer_norm(x, self.norm_temp)
        # Contiguous, or each of the three projections would make a copy of its own, and keep it for the backward pass.
        h = self.attn_temp(rearrange(h, "(b f) n c -> (b n) f c", f=frames).contiguous())
        return x + rearrange(h, "(b n) f c -> (b f) n c", n=x.shape[1])


WIDE = 16  # channels of a head from which on torch's attention on a CPU is fast


def wide_heads(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention on a CPU, `function(q, k, v, heads, …)` on `b n (h d)`, faster for narrow heads.

    Zeros make them as wide as torch's kernel likes them (4 channels take 1.4 times as long as 16), and change nothing.
    Where no gradient is wanted, it is done for one of the batch after the other, so that zeros take little memory.
    """

    def padded(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b n h d", h=heads) for t in (q, k, v))
        width = q.shape[-1]
        scale = (WIDE / width) ** 0.5  # softmax(q k / sqrt(d)): the function will divide by the new d
        q, k, v = (F.pad(t, (0, WIDE - width)).flatten(2) for t in (scale * q, k, v))
        out = function(q, k, v, heads, *args, **kwargs)
        return rearrange(out, "b n (h d) -> b n h d", h=heads)[..., :width].flatten(2)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        if q.shape[-1] // heads >= WIDE:
            return function(q, k, v, heads, *args, **kwargs)
        if torch.is_grad_enabled() or args or kwargs.get("mask") is not None:
            return padded(q, k, v, heads, *args, **kwargs)
        parts = zip(*(t.split(1) for t in (q, k, v)), strict=True)
        return torch.cat([padded(*part, heads, **kwargs) for part in parts])

    return attend


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, *_args: Any, **_kwargs: Any) -> Tensor:
    """Torch's attention on `b n (h d)`. The one that the host chose for sampling may not be differentiable."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
