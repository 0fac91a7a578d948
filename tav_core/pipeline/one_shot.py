"""One-shot tuning of an inflated MODEL: `tuning.Training` with the memory plan, saved states and previews around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..method.attention import PAPERS
from ..method.inflation import PAPER, RECOMPUTE
from ..method.low_rank import DOWN, RANK, UP
from ..method.memory import MEMORY, Estimate, plan
from ..method.tuning import (
    METHOD_VERSION,
    Draw,
    Draws,
    Recipe,
    Step,
    Training,
    not_finite,
    reports_of,
    trains,
    weights_of,
)
from ..store import runs
from ..store.digest import digest
from ..store.weights import TunedWeights, difference
from .apply import apply_weights
from .checks import check_caption, check_inputs
from .editing import invert, refuse_inverted, sample_video
from .network import TrainingUNet, estimate_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saving:
    """Whether and how a tune's state is kept on disk.

    Attributes:
        folder: where (`runs_folder`).
        every: steps between two saves; it is also saved at Cancel, at an error and at the end.
        restart: begin anew, even if a saved state could be continued; that stays until this tune has come as far.
        early: steps between weights that are kept beside that, to be used later (`runs.early_steps`); None keeps none.
        use: the step whose weights are wanted; 0 is the last.
    """

    folder: Path
    every: int = 50
    restart: bool = False
    early: int | None = None
    use: int = 0


@dataclass(frozen=True)
class Validation:
    """An edit to sample while a tune runs, to be looked at; it changes nothing of the tune.

    Attributes:
        positive: CONDITIONING of the edit.
        negative: CONDITIONING of empty text, for inversion and guidance; zeros stand in for it when None.
        every: steps between two samples.
        show: called with the step and the frames as PIL pictures.
    """

    positive: host.Conditioning
    negative: host.Conditioning | None
    every: int
    show: Callable[[int, list[Any]], None]


VALIDATION_STEPS = 10  # of DDIM, both ways: enough to judge an edit, for about the price of ten training steps
VALIDATION_CFG = 12.5
OVERLAP = 4  # of Inflate UNet, by default


def runs_folder() -> Path:
    """Where saved states of tunes are kept: in the host's user folder, which survives restarts."""
    return host.user_folder() / "runs"


def one_shot_tune(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    caption: host.Conditioning,
    recipe: Recipe,
    precision: str,
    memory: str,
    on_step: Callable[[Step], None],
    draws: Callable[[], Iterator[Draw]] | None = None,
    *,
    saving: Saving | None = None,
    validation: Validation | None = None,
    tell: Callable[[str], None] = log.info,
) -> TunedWeights:
    """Tune an inflated model on one clip; the model itself is unchanged.

    Args:
        latent: LATENT of the clip, at least two frames.
        caption: CONDITIONING with one entry.
        precision: "auto", "fp32" or "bf16".
        memory: "auto", "fast" or "low" estimates first and decides what the backward pass recomputes (`memory.plan`);
            one of `inflation.RECOMPUTE` is taken as it is. The result is the same.
        on_step: called after each step, and at once for each step that a saved state holds. The host's interrupt is
            honoured after each step, too.
        draws: makes noise and timesteps, those of `recipe.seed` by default. With others a tune cannot be saved.
        saving: None saves nothing.
        validation: None samples nothing.
        tell: called with what the user should know: resumed, reused, not saved, out of memory, what of the model and
            the latents is not used.

    Raises ValueError when the inputs do not fit each other, the caption carries what a tune cannot use or the step that
    is wanted (`saving.use`) is neither kept nor will be, MemoryError when it does not fit, by the estimate or in fact,
    and FloatingPointError when the loss, the gradient or what was learned is not finite.
    """
    prompts = {"caption": caption}
    if validation is not None:
        prompts["validation_prompt"] = validation.positive
        if validation.negative is not None:
            prompts["validation_negative"] = validation.negative
    video, samples = check_inputs(model, latent, min_frames=2, uncut="", **prompts)
    refuse_inverted(latent)
    check_caption(caption, sizes=video.vector_width > 0)
    if memory not in (*MEMORY, *RECOMPUTE):
        raise ValueError(f"memory is {memory[:20]!r}; it must be one of {', '.join(MEMORY)}.")
    if unused := host.unused_in_training(model):
        tell(f"not used while it tunes, only when it samples: {', '.join(unused)}")
    if latent.get("noise_mask") is not None:
        tell("the latents' mask is not used: a tune learns whole frames")
    windows, frames = video.inflation.windows, len(samples)
    if frames < windows.frames:
        tell(f"the window of {windows.frames} frames is not used: the clip has {frames}")
    elif windows.cuts(frames) and _prompts_in(caption) > 1:
        raise ValueError(
            "caption has one prompt for each frame, which a tune in windows cannot use. Connect CLIP Text Encode "
            "directly, or set window to 0 in Inflate UNet."
        )
    precision = host.resolve_precision(precision, video.device)

    # Nodes run in inference mode, where nothing can be differentiated; tensors made in it stay so for ever.
    with torch.inference_mode(False), torch.enable_grad():
        latents = video.latents(samples.detach().clone()).to(video.device, torch.float32)
        context = caption[0][0].detach().clone().to(video.device, torch.float32)
        vector = host.vector_of(model, caption, latents)
        if vector is not None:
            vector = vector.detach().clone().to(video.device, torch.float32)
        identity = host.fingerprint(model)

        def signed(weights: TunedWeights, date: str) -> TunedWeights:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            return replace(weights, base_fingerprint=identity, date=date or now)

        def reused(saved: runs.Saved, recipe: Recipe) -> TunedWeights:
            reports = reports_of(saved.state)
            for report in reports:
                on_step(report)
            return signed(_result(video, weights_of(saved.state), reports, recipe, latents.shape), saved.date)

        run = saved = None
        if saving is not None:
            key = _run_key(video, identity, latents, context, vector, recipe, precision)
            run = runs.Run(saving.folder, key, recipe.steps)
            earlier = 0 < saving.use < recipe.steps and not saving.restart
            if earlier and (kept := run.at(saving.use)):
                tell(f"used: the weights of step {saving.use}")
                return reused(kept, replace(recipe, steps=saving.use))
            saved = None if saving.restart else run.load()
            _check_use(saving, recipe.steps, len(reports_of(saved.state)) if saved else 0)
        if saved is not None:
            reports = reports_of(saved.state)
            finished = len(reports) == recipe.steps
            tell(f"reused: all {recipe.steps} steps were saved" if finished else f"resumed after step {len(reports)}")
            if finished:
                return reused(saved, recipe)
            for report in reports:
                on_step(report)
        host.unload(video.device)
        recompute = memory if memory in RECOMPUTE else _plan(video, latents.shape, context.shape[1], precision, memory)
        saving = saving or Saving(runs_folder(), recipe.steps)  # where there is no run, nothing is saved
        tune = _Tune(
            video, latent, latents, context, vector, recipe, precision, draws, run, saving, validation, on_step, tell
        )
        for attempted in dict.fromkeys((recompute, "all")):
            weights = None
            with host.surviving_out_of_memory():
                weights = tune.attempt(attempted, saved and saved.state)
            host.free_memory()  # here, where no traceback holds the network any more
            if weights is not None:
                if tune.used:
                    tell(f"used: the weights of step {saving.use}")
                return signed(weights, tune.date)
            if attempted != "all":
                # After `restart`, only what this very tune has saved.
                saved = run.load(tune.saved if saving.restart else None) if run and tune.saved else None
                start = f"from step {len(reports_of(saved.state))}" if saved else "from the start"
                tell(f"out of memory; tried again with memory low, {start}")
        raise MemoryError(
            "the device ran out of memory even with memory low. Use fewer frames or a smaller size, or "
            "close what else uses the device; the same graph then runs as usual."
        )


def _prompts_in(caption: host.Conditioning) -> int:
    text, options = caption[0]
    return max(len(part) for part in (text, options.get("pooled_output")) if part is not None)


def _check_use(saving: Saving, steps: int, done: int) -> None:
    """Whether a tune that is to go on after `done` steps will come past the step that is wanted.

    Raises ValueError when it will not, or would not keep it.
    """
    if saving.use in (0, steps):
        return
    if saving.use > steps:
        raise ValueError(f"use_step is {saving.use}, but steps is {steps}: use an earlier step, or tune for longer.")
    kept = runs.early_steps(steps, saving.early) if saving.early else []
    if saving.use in kept and saving.use <= done:
        raise ValueError(
            f"step {saving.use} of this tune is not kept: it was tuned with another validation_every, or the file is "
            "gone. Set reuse to restart, which tunes again, or use_step to 0."
        )
    if saving.use not in kept:
        raise ValueError(
            f"step {saving.use} of this tune is not kept; of {steps} steps it keeps "
            f"{', '.join(map(str, [*kept, steps]))} (validation_every). Set use_step to one of these, or steps to "
            f"{saving.use}."
        )


@dataclass
class _Tune:
    """One call of `one_shot_tune`: what stays the same if it is tried again with less memory.

    Attributes:
        latents, context, vector: in the model's space, float32.
        run: where the state is saved as `saving` says; None saves nothing.
        saved, last_save: the step whose state this tune has on disk, and the last one that should be.
        date: of the state of `last_save`, where it was saved.
        used: what was learned by the step that is wanted, if that is not the last.
    """

    video: host.Video
    latent: Mapping[str, Any]
    latents: Tensor
    context: Tensor
    vector: Tensor | None
    recipe: Recipe
    precision: str
    draws: Callable[[], Iterator[Draw]] | None
    run: runs.Run | None
    saving: Saving
    validation: Validation | None
    on_step: Callable[[Step], None]
    tell: Callable[[str], None]
    saved: int = 0
    last_save: int = 0
    date: str = ""
    used: TunedWeights | None = None

    def attempt(self, recompute: str, state: dict[str, Tensor] | None) -> TunedWeights:
        """Train to the end, from the start or from `state`, which is used up by this."""
        self.saved = self.last_save = len(reports_of(state)) if state else 0
        windows, sigmas = self.video.inflation.windows, self.video.sigmas
        frames = windows.at_once(len(self.latents))
        network = TrainingUNet(self.video, frames, self.precision, recompute, self.context, self.vector)
        own = Draws(self.latents.shape, len(sigmas), self.recipe.seed, windows)
        network.reset(own.generator)
        draws = own if self.draws is None else self.draws()
        training = Training(network.trainable, self.recipe, draws)
        if state is not None:
            training.restore(state)
            state.clear()  # a gigabyte
        count = sum(parameter.numel() for parameter in network.trainable.values())
        log.info("Tune-A-Video: tuning %.2f M parameters on %d frames at once", count / 1e6, frames)

        def after_step(step: Step) -> None:
            self.on_step(step)
            early = self.run is not None and self.saving.early and step.number in self.early
            if early or step.number % self.saving.every == 0:
                self.save(training)
            if early:  # after a save: early ones stay for as long as their run has a state
                self.keep(training)
            if step.number == self.saving.use:
                self.used = replace(self.result(training), recipe=replace(self.recipe, steps=step.number))
            if self.validation is not None and step.number % self.validation.every == 0:
                self.validate(training, self.validation)
            host.stop_if_interrupted()

        try:
            training.run(network, self.latents, sigmas, self.video.prediction_type, after_step)
            return self.used or self.result(training)
        except FloatingPointError as error:
            self.save(training)
            kept = f"The state of step {self.saved} stays saved: set steps to {self.saved} to use it."
            raise FloatingPointError(f"{error} {kept if self.saved else 'Nothing of it is saved.'}") from None
        finally:
            self.save(training)  # at the end, at Cancel and at an error alike

    def save(self, training: Training) -> None:
        """Save the state, if there is a new and whole one. That it cannot be is told, and does not stop the tune."""
        step = len(training.reports)
        if self.run is None or step == self.last_save or not training.whole:
            return
        self.last_save, self.date = step, ""
        try:
            self.date = self.run.save(training.state(), step)
            self.saved = step
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            older = f"the saved state of step {self.saved} stays" if self.saved else "nothing is saved yet"
            self.tell(f"step {step} could not be saved ({error}); {older}")

    @property
    def early(self) -> list[int]:
        return runs.early_steps(self.recipe.steps, self.saving.early or self.recipe.steps)

    def keep(self, training: Training) -> None:
        """Keep what was trained so far, to be used later. That it cannot be is told, and does not stop the tune."""
        assert self.run is not None
        step = len(training.reports)
        try:
            self.run.keep(training.state(), step)
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            self.tell(f"the weights of step {step} could not be kept ({error})")

    def validate(self, training: Training, validation: Validation) -> None:
        """Sample the edit with the present weights, and show it. What fails in this ends the previews, not the tune."""
        step, pictures, why = len(training.reports), None, "out of memory"
        result = self.result(training)
        training.release()
        try:
            with host.surviving_out_of_memory():
                pictures = _sample_edit(self.video.patcher, self.latent, result, validation)
        except ValueError as error:  # what sampling refuses, of other nodes on the MODEL
            why = str(error)
        except Exception as error:  # of any kind, in another node's code: the tune would end there at every resume
            if host.is_interrupt(error):
                raise
            log.warning("Tune-A-Video: the preview failed", exc_info=True)
            why = f"{type(error).__name__}: {error}"
        host.unload(self.video.device)
        if pictures is None:
            self.validation = None
            self.tell(f"no preview at step {step}: {why}; tuning goes on without previews")
        else:
            validation.show(step, pictures)

    def result(self, training: Training) -> TunedWeights:
        """What was learned so far."""
        trained = {name: parameter.detach() for name, parameter in training.trainable.items()}
        return _result(self.video, trained, training.reports, self.recipe, self.latents.shape)


def _sample_edit(
    model: host.ModelPatcher, latent: Mapping[str, Any], weights: TunedWeights, validation: Validation
) -> list[Any]:
    """Invert the clip and sample the edit with these weights, as the nodes do; rough pictures of its frames."""
    with torch.inference_mode():
        tuned = apply_weights(model, weights)
        negative = validation.negative
        if negative is None:
            text, options = validation.positive[0]
            pooled = options.get("pooled_output")
            nothing = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
            negative = [[torch.zeros_like(text), nothing]]

        def silent(*_args: Any) -> None: ...

        inverted, _noise, _sigmas = invert(tuned, latent, negative, VALIDATION_STEPS, silent)
        edit = sample_video(tuned, inverted, validation.positive, negative, VALIDATION_STEPS, VALIDATION_CFG, silent)
        return host.pictures_of(model, edit["samples"])


def _plan(video: host.Video, shape: torch.Size, tokens: int, precision: str, mode: str) -> str:
    """What to recompute, from an estimate and the host's free memory. See `memory.plan`."""

    def estimate(recompute: str) -> Estimate:
        return estimate_step(video, shape, tokens, precision, recompute)

    windows = video.inflation.windows
    frames, _channels, height, width = shape = torch.Size([windows.at_once(shape[0]), *shape[1:]])
    try:
        return plan(
            mode,
            estimate,
            host.free_bytes(video.device),
            frames,
            host.LATENT_PIXELS * width,
            host.LATENT_PIXELS * height,
        )
    except RuntimeError as error:  # fake tensors do not know every build of torch: no reason not to tune
        log.warning("Tune-A-Video: memory could not be estimated (%s)", error)
        return "nothing" if mode == "fast" else "all"


def _run_key(
    video: host.Video,
    identity: str,
    latents: Tensor,
    context: Tensor,
    vector: Tensor | None,
    recipe: Recipe,
    precision: str,
) -> str:
    """What determines a tune's result beside its number of steps, as a digest.

    What is recomputed is left out: the result is the same.
    """
    windows, attends, layers = video.inflation.windows, video.inflation.attends, video.inflation.layers
    # A tune's windows do not overlap as a clip's do (`Windows.for_tuning`). It was in the key once, and stands there as
    # what it is by default: so states of then stay found.
    cut = {"frames": windows.frames, "overlap": OVERLAP}
    return digest(
        {
            **({} if attends == PAPERS else {"attends": attends}),  # states saved before there was a choice stay found
            **({} if layers == PAPER else {"layers": layers, "rank": RANK}),
            **({} if vector is None else {"vector": vector}),
            "method": METHOD_VERSION,
            "model": identity,
            "config": repr(sorted(host.config_of(video.patcher).items())),
            "heads": video.heads,
            "temporal": video.inflation.temporal.named(),
            "group_norm": video.inflation.group_norm,
            "latents": latents,
            "context": context,
            "sigmas": video.sigmas,
            "prediction_type": video.prediction_type,
            "recipe": {name: value for name, value in asdict(recipe).items() if name != "steps"},
            "precision": precision,
            **({"windows": cut} if windows.cuts(len(latents)) else {}),
        }
    )


def _result(
    video: host.Video, trained: Mapping[str, Tensor], reports: list[Step], recipe: Recipe, shape: torch.Size
) -> TunedWeights:
    """Trained tensors, by name, as what they change in the model; `shape` is the latents'.

    Raises FloatingPointError when they hold values that are not finite.
    """
    if names := not_finite(trained):
        raise FloatingPointError(
            f"{names[0]} became NaN or infinite by step {len(reports)}, so there is no result. Lower learning_rate, or "
            "set precision to fp32."
        )
    layers = video.inflation.layers
    if layers == PAPER:
        base = host.effective_weights(video.patcher, video.device, trains)
        queries = {name: difference(trained[name].to(old), old).cpu() for name, old in base}
    else:
        queries = {name: _own(tensor) for name, tensor in trained.items() if name.endswith((DOWN, UP))}
    frames, _channels, height, width = shape
    return TunedWeights(
        queries=queries,
        temporal={name: _own(trained.get(name, tensor)) for name, tensor in video.inflation.temporal.named().items()},
        frames=frames,
        group_norm=video.inflation.group_norm,
        windows=video.inflation.windows,
        attends=video.inflation.attends,
        layers=layers,
        losses=[report.loss for report in reports],
        base_family=host.family_of(video.patcher),
        base_tuned=video.inflation.tuned,
        size=(host.LATENT_PIXELS * width, host.LATENT_PIXELS * height),
        recipe=recipe,
    )


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
