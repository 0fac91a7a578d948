import logging
import time
from collections import deque
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..tav_core import graph, host
from ..tav_core.apply import apply_weights
from ..tav_core.clip import to_image
from ..tav_core.memory import MEMORY
from ..tav_core.one_shot import Saving, Validation, one_shot_tune, runs_folder
from ..tav_core.plot import curve_with_edit, loss_curve
from ..tav_core.tuning import Recipe
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
                    io.Boolean,
                    "gradient_checkpointing",
                    default=False,
                    tooltip="On: always (as memory low). Much less memory, a third more time, the same result.",
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
        gradient_checkpointing,
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
        show = host.progress(steps)
        losses: list[float] = []
        drawn = 0.0
        edit: deque[Any] = deque()  # the frames of the latest preview, the one that is shown in front
        edited = 0  # the step that it was made at

        def on_step(step):
            nonlocal drawn
            losses[step.number - 1 :] = [step.loss]  # a step that is done again replaces its first report
            picture, now = None, time.monotonic()
            if now - drawn > (1 / EDIT_FPS if edit else PICTURE_SECONDS) or step.number == steps:
                drawn = now
                # One after the other, however slow the steps are.
                edit.rotate(-1)
                picture = draw(edit[0]) if edit else loss_curve(losses, steps)
            show(step.number, picture)

        def draw(frame):
            return curve_with_edit(losses, steps, frame, f"edit at step {edited}")

        def on_edit(step, frames):
            nonlocal edit, edited
            edit, edited = deque(frames), step
            show(step, draw(edit[0]))

        validation = None
        if validation_prompt is not None:
            validation = Validation(validation_prompt, validation_negative, validation_every, on_edit)
        told: list[str] = []

        def tell(text):
            told.append(text)
            log.info("Tune-A-Video: %s", text)
            host.progress_text(cls.hidden and cls.hidden.unique_id, "\n".join(told))

        weights = one_shot_tune(
            model,
            latents,
            caption,
            recipe,
            precision,
            "nothing",
            on_step,
            saving=Saving(runs_folder(), save_every, reuse == "restart"),
            memory="low" if gradient_checkpointing else memory,
            validation=validation,
            tell=tell,
        )
        if not told:
            tell(f"trained {steps} steps")  # the page shows progress text, but no PreviewText of such a node
        if cls.hidden:
            prompt, node = cls.hidden.prompt, cls.hidden.unique_id
            weights = replace(weights, caption=graph.caption_of(prompt, node), stride=graph.stride_of(prompt, node))
        plot = to_image(loss_curve(weights.losses, steps))
        text = "\n".join(told)
        return io.NodeOutput(apply_weights(model, weights), weights, plot, ui=ui.PreviewText(text))
