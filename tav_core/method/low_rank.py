"""Low-rank changes of the queries: up @ down, added to each weight (LoRA, arXiv 2106.09685).

Names are those of ordinary LoRA files: of `….attn1.to_q.weight` the change is `….attn1.to_q.lora_down.weight` [r, in]
and `….attn1.to_q.lora_up.weight` [out, r].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inflation import UNetParts

RANK = 32
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


class _Change(nn.Module):
    """A layer's forward hook: its output changes by up(down(input))."""

    def __init__(self, layer: Any, device: torch.device | str):
        super().__init__()
        self.lora_down = _empty(layer.in_features, RANK, device)
        self.lora_up = _empty(RANK, layer.out_features, device)

    def hook(self, _layer: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out + self.lora_up(self.lora_down(args[0]))


def _empty(n_in: int, n_out: int, device: torch.device | str) -> nn.Linear:
    """A layer without values: nothing is drawn from the global random state, as in `TemporalLayers`."""
    layer = nn.Linear(n_in, n_out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(n_out, n_in, device=device))
    return layer


class LowRankQueries(nn.Module):
    """A change of the queries of both attentions in every transformer block of a *private* UNet, while it lives.

    Without values until `reset`.
    """

    changes: Any  # torch does not say what a ModuleList holds

    def __init__(self, parts: UNetParts, device: torch.device | str):
        super().__init__()
        layers = {
            f"{name}.{attention}.to_q": getattr(block, attention).to_q
            for name, block in parts.blocks.items()
            for attention in ("attn1", "attn2")
        }
        self.names = list(layers)
        self.changes = nn.ModuleList(_Change(layer, device) for layer in layers.values())
        for layer, change in zip(layers.values(), self.changes, strict=True):
            layer.register_forward_hook(change.hook)

    def reset(self, generator: torch.Generator) -> None:
        """No change at all: down at torch's default scale for Linear, up zero."""
        for change in self.changes:
            down = torch.empty(change.lora_down.weight.shape)  # on the CPU, where the generator is
            change.lora_down.weight.data.copy_(nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator))
            nn.init.zeros_(change.lora_up.weight)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by name."""
        return {
            f"{name}.{key}": parameter
            for name, change in zip(self.names, self.changes, strict=True)
            for key, parameter in change.named_parameters()
        }


def pairs(queries: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) by the name of the layer that they change. Raises ValueError when something is no half of a pair."""
    found = {}
    for name in queries:
        layer = name.removesuffix(DOWN).removesuffix(UP)
        up, down = queries.get(layer + UP), queries.get(layer + DOWN)
        if up is None or down is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"{name[:100]} is no half of a low-rank change: tune again, and save the weights.")
        found[layer] = up, down
    return found


def whole(queries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change of each weight, up @ down, by the weight's name."""
    return {f"{layer}.weight": up @ down for layer, (up, down) in pairs(queries).items()}
