"""One-shot tuning (arXiv 2212.11565, section 3.3; reference: train_tuneavideo.py).

Only the queries of both attentions and the temporal attention train, on one clip, against the usual denoising
loss. What predicts is a callable: nothing here knows a host.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Recipe:
    """What determines a tune beside model, clip and caption. Defaults are the reference's.

    Raises ValueError when a figure is out of range.
    """

    steps: int = 500
    learning_rate: float = 3e-5
    seed: int = 33
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; tuning needs at least 1, the paper uses 300 to 500.")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0 and at most 1 (paper: 3e-5).")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be from 0 to below 1 (paper: 0.01).")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be above 0 (paper: 1.0).")


@dataclass(frozen=True)
class Step:
    """Report of one finished step: its number from 1, loss, and gradient norm before clipping."""

    number: int
    loss: float
    grad_norm: float


def trains(name: str) -> bool:
    """Whether the UNet or temporal parameter of this name trains. `norm_temp` stays frozen, as in the reference."""
    return name.endswith((".attn1.to_q.weight", ".attn2.to_q.weight")) or ".attn_temp." in name


def draw(shape: torch.Size, timesteps: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Endless noise (float32, `shape`, CPU) and timestep for each step, from a generator of its own.

    Noise is independent per frame; the timestep is one for the video, uniform in [0, `timesteps`).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        noise = torch.randn(shape, generator=generator)
        yield noise, int(torch.randint(timesteps, (1,), generator=generator))


def diffuse(latents: Tensor, noise: Tensor, sigma: float, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Noisy latents at a level, and what the network should predict from them.

    With abar = 1 / (1 + sigma²): sqrt(abar)·x + sqrt(1 - abar)·noise; the target is the noise, or the velocity
    sqrt(abar)·noise - sqrt(1 - abar)·x (arXiv 2202.00512).
    """
    signal = 1 / math.sqrt(1 + sigma**2)
    spread = sigma * signal
    target = noise if prediction_type == "epsilon" else signal * noise - spread * latents
    return signal * latents + spread * noise, target


def tune(
    predict: Callable[[Tensor, int], Tensor],
    trainable: Mapping[str, nn.Parameter],
    latents: Tensor,
    sigmas: Tensor,
    prediction_type: PredictionType,
    recipe: Recipe,
    draws: Iterator[tuple[Tensor, int]],
    on_step: Callable[[Step], None],
) -> None:
    """Train `trainable` in place on one clip.

    Args:
        predict: network output for noisy latents [f, c, h, w] at a timestep, differentiable in `trainable`.
        trainable: float32 parameters by name.
        latents: the clip in the model's space, float32, [f, c, h, w].
        sigmas: the model's noise level at each timestep, [T].
        draws: noise and timestep for each step, as `draw` makes them.
        on_step: called after each step; an exception from it ends the tune.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = list(trainable.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay
    )
    for number in range(1, recipe.steps + 1):
        noise, timestep = next(draws)
        noisy, target = diffuse(latents, noise.to(latents), float(sigmas[timestep]), prediction_type)
        loss = F.mse_loss(predict(noisy, timestep).float(), target)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {number}: tuning was stopped and its result discarded. "
                "Lower learning_rate, or set precision to fp32."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        on_step(Step(number, loss.item(), float(norm)))
