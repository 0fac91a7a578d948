"""Muon for matrices and kernels, Adam for the rest: on these small networks it needs far fewer steps than AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# torch does not export its operations on lists of tensors by name, and its optimizers use no others.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (Jordan et al., 2024), as large as Adam's (Liu et al., 2025).

    Args:
        lr: of every parameter, as for AdamW.
        decay: of the weights, decoupled; matrices and kernels only.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay, "steps": 0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            given = [p for p in group["params"] if p.grad is not None]
            self.adam([p for p in given if p.ndim == 1], group["lr"], group["steps"])
            alike = defaultdict(list)  # matrices of one shape are made orthogonal together
            for p in given:
                if p.ndim > 1:
                    alike[p.flatten(1).shape].append(p)
            for matrices in alike.values():
                self.muon(matrices, group["lr"], group["momentum"], group["decay"])

    def kept(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        """One kept tensor for each parameter, at first zero."""
        return [self.state[p].setdefault(name, torch.zeros_like(p)) for p in parameters]

    def muon(self, matrices: list[Tensor], lr: float, momentum: float, decay: float) -> None:
        gradients, means = [p.grad for p in matrices], self.kept("momentum", matrices)
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, means, momentum)
        updates = orthogonal(torch.stack([update.flatten(1) for update in nesterov]))
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(matrices, 1 - lr * decay)
        torch._foreach_sub_(matrices, [u.view_as(p) for u, p in zip(updates, matrices, strict=True)], alpha=lr * scale)

    def adam(self, vectors: list[Tensor], lr: float, steps: int, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        gradients, means, squares = [p.grad for p in vectors], self.kept("mean", vectors), self.kept("square", vectors)
        torch._foreach_lerp_(means, gradients, 1 - betas[0])
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - betas[1])
        sizes = torch._foreach_sqrt(torch._foreach_div(squares, 1 - betas[1] ** steps))
        torch._foreach_add_(sizes, 1e-8)
        torch._foreach_addcdiv_(vectors, means, sizes, value=-lr / (1 - betas[0] ** steps))


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: on a CPU without it, it is ten times slower."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of x [n, rows, columns], by Newton-Schulz iteration."""
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).to(torch.bfloat16 if has_bfloat16(x.device) else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x if wide else x.mT).float()
