"""What steers an edit away from the plain method: other guidance on the way, fresh noise, features of the source."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inflation import UNetParts


@dataclass(frozen=True)
class Steering:
    """How an edit leaves the plain method; the defaults are it.

    Attributes:
        cfg_end: guidance scale after the first `cfg_until` of the steps.
        cfg_until: share of the steps, 0 … 1, up to which the edit's own guidance scale counts.
        freedom: share of the inverted noise's variance, 0 … 1, that is drawn anew: the more, the less of the clip's
            layout and motion is left.
        seed: of what is drawn.
        structure: share of the steps, from the first on, that take their structure from the source (`Source`).
    """

    cfg_end: float = 1.0
    cfg_until: float = 1.0
    freedom: float = 0.0
    seed: int = 0
    structure: float = 0.0


def until(sigmas: Tensor, share: float) -> float:
    """The noise level that the first steps, a `share` of all, stay above; `sigmas` descend, [steps + 1]."""
    return float(sigmas[round(share * (len(sigmas) - 1))]) * (1 + 1e-5)


def freed(inverted: Tensor, sigma: float, freedom: float, seed: int) -> Tensor:
    """Inverted latents, in sigma space at `sigma`, of which a share of the variance is fresh noise, on the CPU.

    Two unit-variance noises stay one: sqrt(1 - freedom) of the one and sqrt(freedom) of the other.
    """
    fresh = torch.randn(inverted.shape, generator=torch.Generator().manual_seed(seed))
    fresh = fresh.to(inverted) * math.sqrt(1 + sigma**2)  # the latents' spread there, the clip's own included
    return math.sqrt(1 - freedom) * inverted + math.sqrt(freedom) * fresh


class Source:
    """Features of the source that an edit shares: its layout without its looks (arXiv 2211.12572).

    They are queries and keys of the decoder's self-attention, before frames are put together, and the output of one
    residual block. A UNet that takes a clip in several calls, window by window, takes them in the same order each time.
    """

    def __init__(self, parts: UNetParts):
        blocks = [block for name, block in parts.blocks.items() if name in parts.decoder]
        self.layers: Sequence[nn.Module] = [
            *(layer for block in blocks for layer in (block.attn1.to_q, block.attn1.to_k)),
            parts.layout,
        ]
        self._features: dict[nn.Module, list[Tensor]] = {}  # of each call

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the features of the UNet call, of the source's frames, inside this block."""
        self._features.clear()

        def note(layer: nn.Module, _args: Any, out: Tensor) -> None:
            self._features.setdefault(layer, []).append(out)

        with self._hooked(note):
            yield
        if len(self._features) < len(self.layers):
            raise ValueError(
                "structure found no features of the clip: another node answers in the model's place (EasyCache, "
                "LazyCache). Remove it, or set structure to 0."
            )

    @contextmanager
    def shared(self) -> Iterator[None]:
        """UNet calls inside this block have the noted features, each of the videos in their batch."""
        order = {layer: itertools.cycle(features) for layer, features in self._features.items()}

        def replace(layer: nn.Module, _args: Any, out: Tensor) -> Tensor:
            feature = next(order[layer])
            videos = out.shape[0] // feature.shape[0]
            if out.shape != (videos * feature.shape[0], *feature.shape[1:]):
                raise ValueError(
                    f"structure shares features of shape {tuple(feature.shape)}, another node computes "
                    f"{tuple(out.shape)} (tiles, or merged tokens). Remove it, or set structure to 0."
                )
            return feature.repeat(videos, *[1] * (feature.ndim - 1)).to(out)

        try:
            with self._hooked(replace):
                yield
        finally:
            self._features.clear()

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        with ExitStack() as undo:
            for layer in self.layers:
                undo.callback(layer.register_forward_hook(hook).remove)
            yield
