import logging
import time
from collections import deque
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..tav_core import host
from ..tav_core.method.memory import MEMORY
from ..tav_core.method.tuning import Recipe
from ..tav_core.pictures import image
from ..tav_core.pictures.plot import curve_with_edit, loss_curve, with_note
from ..tav_core.pipeline.apply import apply_weights
from ..tav_core.pipeline.one_shot import Saving, Validation, one_shot_tune, runs_folder
from . import graph
from .schema import CATEGORY, Weights, advanced, found_by

log = logging.getLogger(__name__)

PICTURE_SECONDS = 0.5  # the page need not redraw the curve more often
# A preview is played like a flip-book, a frame with each picture: the page draws progress pictures on a canvas, where
# an animated file would stand still.
EDIT_FPS = 8


class OneShotTune(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVOneShotTune",
            display_name="One-Shot Tune",
            category=CATEGORY,
            **found_by("train", "fine-tune", "finetune", "learn motion", "motion transfer", "edit video", "v2v"),
            description="Teaches an inflated model the motion of one clip, from the clip and its caption alone.",
            inputs=[
                io.Model.Input("model", tooltip="The model from Inflate UNet. It is not changed."),
                io.Latent.Input("latents", tooltip="The clip, encoded by VAE Encode: 2 frames or more."),
                io.Conditioning.Input("caption", tooltip="What the clip shows, such as: a man is skiing."),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=100_000,
                    tooltip="Training steps. 300 to 500; fewer if edits change too little (overfitting).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=3e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    tooltip="Size of a training step. 3e-5 in the paper; lower it if the loss jumps.",
                ),
                io.Int.Input(
                    "seed",
                    default=33,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Same seed, same inputs and same machine give the same result.",
                ),
                advanced(
                    io.Combo,
                    "precision",
                    options=["auto", "fp32", "bf16"],
                    default="auto",
                    tooltip="bf16 halves memory and time on cards that have it; auto chooses. What trains stays fp32.",
                ),
                advanced(
                    io.Float,
                    "weight_decay",
                    default=1e-2,
                    min=0.0,
                    max=0.999,
                    step=1e-3,
                    round=1e-6,
                    tooltip="AdamW's pull of the trained weights towards zero, per step, times learning rate.",
                ),
                advanced(
                    io.Float,
                    "max_grad_norm",
                    default=1.0,
                    min=1e-3,
                    max=1e6,
                    step=0.1,
                    round=1e-3,
                    tooltip="Gradients longer than this are shortened to it, so that one step cannot spoil the tune.",
                ),
                advanced(
                    io.Combo,
                    "reuse",
                    options=["auto", "restart"],
                    default="auto",
                    optional=True,
                    tooltip="auto continues or reuses what was saved of this very tune; restart trains from step 1.",
                ),
                advanced(
                    io.Int,
                    "save_every",
                    default=50,
                    min=1,
                    max=100_000,
                    optional=True,
                    tooltip="Steps between saves to disk; also saved at Cancel, errors and the end. 0.9 GB for SD1.5.",
                ),
                advanced(
                    io.Combo,
                    "memory",
                    options=list(MEMORY),
                    default="auto",
                    optional=True,
                    tooltip="auto: the fastest way that fits. fast: never gradient checkpointing. low: always.",
                ),
                advanced(
                    io.Int,
                    "validation_every",
                    default=100,
                    min=1,
                    max=100_000,
                    optional=True,
                    tooltip="Steps between previews of validation_prompt. Each takes as long as ten steps or so.",
                ),
                io.Conditioning.Input(
                    "validation_prompt",
                    optional=True,
                    tooltip="An edit prompt: while it tunes, the node shows short previews of it. Changes no result.",
                ),
                io.Conditioning.Input(
                    "validation_negative",
                    optional=True,
                    tooltip="Empty text, as in DDIM Invert and Sample Video, for truer previews.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],  # the graph, which knows the caption's text
            outputs=[
                io.Model.Output("tuned_model", display_name="model", tooltip="The tuned model, to invert and sample."),
                Weights.Output("weights", display_name="weights", tooltip="What was learned, without the base model."),
                io.Image.Output("loss_plot", display_name="loss plot", tooltip="The loss of every step."),
                io.String.Output(
                    "report", display_name="report", tooltip="What happened, such as resumed or reused, and the loss."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        latents,
        caption,
        steps,
        learning_rate,
        seed,
        precision,
        weight_decay,
        max_grad_norm,
        reuse="auto",
        save_every=50,
        memory="auto",
        validation_every=100,
        validation_prompt=None,
        validation_negative=None,
    ) -> io.NodeOutput:
        recipe = Recipe(steps, learning_rate, seed, weight_decay, max_grad_norm)
        prompt, node = (cls.hidden.prompt, cls.hidden.unique_id) if cls.hidden else (None, None)
        known = {"caption": graph.caption_of(prompt, node), "stride": graph.stride_of(prompt, node)}
        show = host.progress(steps)
        losses: list[float] = []
        told: list[str] = []
        drawn = 0.0
        edit: deque[Any] = deque()  # the frames of the latest preview, the one that is shown in front
        edited = 0  # the step that it was made at

        def on_step(step):
            nonlocal drawn
            losses[step.number - 1 :] = [step.loss]  # a step that is done again replaces its first report
            picture, now = None, time.monotonic()
            if now - drawn > (1 / EDIT_FPS if edit else PICTURE_SECONDS) or step.number == steps:
                drawn = now
                edit.rotate(-1)  # one after the other, however slow the steps are
                picture = draw()
            show(step.number, picture)

        def draw():
            if edit:
                picture = curve_with_edit(losses, steps, edit[0], f"edit at step {edited}")
            else:
                picture = loss_curve(losses, steps)
            return with_note(picture, "\n".join(told))

        def on_edit(step, frames):
            nonlocal edit, edited
            edit, edited = deque(frames), step
            show(step, draw())

        def tell(text):
            told.append(text)
            log.info("Tune-A-Video: %s", text)
            host.progress_text(node, "\n".join(told))
            show(len(losses), draw())  # newer pages clear that text when the job ends, but leave the last picture

        validation = None
        if validation_prompt is not None:
            validation = Validation(validation_prompt, validation_negative, validation_every, on_edit)
        weights = one_shot_tune(
            model,
            latents,
            caption,
            recipe,
            precision,
            memory,
            on_step,
            saving=Saving(runs_folder(), save_every, reuse == "restart"),
            validation=validation,
            tell=tell,
        )
        plot = image.from_picture(with_note(loss_curve(weights.losses, steps), "\n".join(told)))
        if not told:
            told.append(f"trained {steps} steps")
            host.progress_text(node, told[0])  # the page shows progress text, but no PreviewText of such a node
        text = "\n".join(told)
        report = f"{text}\n{_summary(weights.losses)}"
        tuned = apply_weights(model, weights)
        return io.NodeOutput(tuned, replace(weights, **known), plot, report, ui=ui.PreviewText(text))


def _summary(losses: list[float]) -> str:
    """The loss at both ends of a tune. A single step's mostly shows which timestep was drawn."""
    part = max(len(losses) // 10, 1)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return f"mean loss of the first {part} of {len(losses)} steps: {first:.4f}, of the last {part}: {last:.4f}"
