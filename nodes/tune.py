from dataclasses import replace

from comfy_api.latest import io, ui

from ..tav_core.method.memory import MEMORY
from ..tav_core.method.tuning import Recipe
from ..tav_core.pipeline.apply import apply_weights
from ..tav_core.pipeline.one_shot import Saving, Validation, one_shot_tune, runs_folder
from . import graph
from .schema import CATEGORY, Weights, advanced, found_by
from .tune_view import TuneView


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
                advanced(
                    io.Int,
                    "use_step",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip=(
                        "0: the last step's weights. Or those of an earlier one, without tuning again: every "
                        "validation_every steps are kept, up to four, 0.3 GB each for SD1.5."
                    ),
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
        use_step=0,
    ) -> io.NodeOutput:
        recipe = Recipe(steps, learning_rate, seed, weight_decay, max_grad_norm)
        prompt, node = (cls.hidden.prompt, cls.hidden.unique_id) if cls.hidden else (None, None)
        view = TuneView(node, steps)
        validation = None
        if validation_prompt is not None:
            validation = Validation(validation_prompt, validation_negative, validation_every, view.on_edit)
        weights = one_shot_tune(
            model,
            latents,
            caption,
            recipe,
            precision,
            memory,
            view.on_step,
            saving=Saving(runs_folder(), save_every, reuse == "restart", validation_every, use_step),
            validation=validation,
            tell=view.tell,
        )
        plot = view.plot()
        text, report = view.report()
        tuned = apply_weights(model, weights)
        known = {"caption": graph.caption_of(prompt, node), "stride": graph.stride_of(prompt, node)}
        return io.NodeOutput(tuned, replace(weights, **known), plot, report, ui=ui.PreviewText(text))
