"""One-shot tuning (arXiv 2212.11565, section 3.3; reference: train_tuneavideo.py).

Only the queries of both attentions and the temporal attention train, on one clip, against the usual denoising
loss (with `inflation.LIGHT`, low-rank changes of the queries). What predicts is a callable: nothing here knows a host.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inflation import PAPER
from .low_rank import DOWN, UP
from .replay import Replayed
from .windows import WHOLE, Windows

PredictionType = Literal["epsilon", "v_prediction"]

# Raise it with every change after which the same clip, model and recipe end in other weights, whichever file it is in
# (this one, network, attention, inflation): states that older packs saved are then neither continued nor reused.
METHOD_VERSION = 4


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


QUERIES = (".attn1.to_q.weight", ".attn2.to_q.weight")


def trains(name: str, layers: str = PAPER) -> bool:
    """Whether the parameter of this name trains: of the UNet, temporal, or of a low-rank change.

    `norm_temp` stays frozen, as in the reference.
    """
    return name.endswith(QUERIES if layers == PAPER else (DOWN, UP)) or ".attn_temp." in name


class Draw(NamedTuple):
    """What chance decides of a step: noise [f, c, h, w], timestep, and which of the clip's frames it takes (all)."""

    noise: Tensor
    timestep: int
    frames: list[int] | slice = slice(None)


class Draws:
    """Endless draws, a step each, from a generator of its own. Noise is float32 on the CPU.

    Noise is independent per frame; the timestep is one for the video, uniform in [0, `timesteps`). Where the clip is
    cut, every window is as likely.

    Args:
        shape: of the clip's latents, [f, c, h, w].
    """

    def __init__(self, shape: torch.Size, timesteps: int, seed: int, windows: Windows = WHOLE):
        self.timesteps = timesteps
        self.windows = windows.for_tuning(shape[0]) if windows.cuts(shape[0]) else []
        self.shape = (windows.at_once(shape[0]), *shape[1:])
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        noise = torch.randn(self.shape, generator=self.generator)
        timestep = self._below(self.timesteps)
        if not self.windows:
            return Draw(noise, timestep)
        return Draw(noise, timestep, self.windows[self._below(len(self.windows))])

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (1,), generator=self.generator))


def diffuse(latents: Tensor, noise: Tensor, sigma: float, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Noisy latents at a level, and what the network should predict from them.

    With abar = 1 / (1 + sigma²): sqrt(abar)·x + sqrt(1 - abar)·noise; the target is the noise, or the velocity
    sqrt(abar)·noise - sqrt(1 - abar)·x (arXiv 2202.00512).
    """
    signal = 1 / math.sqrt(1 + sigma**2)
    spread = sigma * signal
    target = noise if prediction_type == "epsilon" else signal * noise - spread * latents
    return signal * latents + spread * noise, target


class Training:
    """One tune in the making: `trainable` is trained in place on one clip.

    Continued from a `state` that was taken after any step, it gives the same result to the bit.

    Args:
        trainable: float32 parameters by name.
        draws: a `Draw` for each step: `Draws`, or any iterator where no state is taken.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], recipe: Recipe, draws: Iterator[Draw]):
        self.trainable, self.recipe, self.draws = trainable, recipe, draws
        self.reports: list[Step] = []
        self.whole = True  # False while a step is written into the parameters: a state taken then would be neither
        self.on_gpu = all(parameter.is_cuda for parameter in trainable.values())
        self.optimizer = torch.optim.AdamW(
            list(trainable.values()),
            lr=recipe.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=recipe.weight_decay,
            fused=self.on_gpu,
        )
        self.replayed: Replayed | None = None
        self._generator_state: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, after the last finished step, as copies on the CPU.

        `weight/…`, and AdamW's `exp_avg/…`, `exp_avg_sq/…`, `step/…`, by name; `generator` (uint8), `losses` and
        `grad_norms` (float64, one a step).
        """
        assert self.whole and self._generator_state is not None, "there is no state before or within a step"
        tensors = {"generator": self._generator_state}
        for name, parameter in self.trainable.items():
            for kind, value in {"weight": parameter, **self.optimizer.state[parameter]}.items():
                tensors[f"{kind}/{name}"] = value.detach()
        tensors["losses"] = torch.tensor([step.loss for step in self.reports], dtype=torch.float64)
        tensors["grad_norms"] = torch.tensor([step.grad_norm for step in self.reports], dtype=torch.float64)
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on after the step at which `state` was taken, of a tune of the same parameters and recipe."""
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.trainable.items()):
                parameter.copy_(state[f"weight/{name}"])
                moments[index] = {kind: state[f"{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        assert isinstance(self.draws, Draws)
        self._generator_state = state["generator"]
        self.draws.generator.set_state(self._generator_state)
        self.reports = reports_of(state)

    def release(self) -> None:
        """Leave a GPU's memory to something else between two steps."""
        if self.replayed is not None:
            self.replayed.release()

    def run(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        latents: Tensor,
        sigmas: Tensor,
        prediction_type: PredictionType,
        on_step: Callable[[Step], None],
    ) -> None:
        """Train up to the recipe's number of steps.

        Args:
            predict: network output for noisy latents [f, c, h, w] at a timestep, int64 [], differentiable in
                `trainable`; with `Windows`, of those frames that are computed at once.
            latents: the clip in the model's space, float32, [f, c, h, w].
            sigmas: the model's noise level at each timestep, [T].
            on_step: called after each step; an exception from it ends the run.

        Raises FloatingPointError when the loss or the gradient is not finite; nothing of that step was written.
        """
        parameters = list(self.trainable.values())

        def backward(noisy: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
            loss = F.mse_loss(predict(noisy, timestep).float(), target)
            loss.backward()
            return loss.detach()

        self.replayed = Replayed(backward, parameters) if self.on_gpu else None
        for number in range(len(self.reports) + 1, self.recipe.steps + 1):
            noise, timestep, frames = next(self.draws)
            clip = latents[frames if isinstance(frames, slice) else torch.tensor(frames)]
            noisy, target = diffuse(clip, noise.to(clip), float(sigmas[timestep]), prediction_type)
            inputs = noisy, target, torch.full((), timestep, device=clip.device)
            if self.replayed is None:
                self.optimizer.zero_grad(set_to_none=True)
                loss = backward(*inputs)
            else:
                loss = self.replayed(*inputs)
            norm = nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
            step = Step(number, *torch.stack([loss, norm]).tolist())  # here alone a GPU is waited for
            for what, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the {what} became {value} at step {number}, and tuning was stopped before that step changed "
                        "anything. Lower learning_rate, or set precision to fp32."
                    )
            self.whole = False
            self.optimizer.step()
            if isinstance(self.draws, Draws):
                self._generator_state = self.draws.generator.get_state()
            self.reports.append(step)
            self.whole = True
            on_step(self.reports[-1])


def reports_of(state: Mapping[str, Tensor]) -> list[Step]:
    """The reports of all steps that a `Training.state` holds."""
    pairs = zip(state["losses"].tolist(), state["grad_norms"].tolist(), strict=True)
    return [Step(number, *pair) for number, pair in enumerate(pairs, 1)]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinite values."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors, by name, that a `Training.state` holds."""
    return {name.removeprefix("weight/"): tensor for name, tensor in state.items() if name.startswith("weight/")}
