from comfy_api.latest import io

from ..tav_core.method.windows import Windows
from ..tav_core.pipeline import library
from ..tav_core.pipeline.apply import apply_weights, check_base
from ..tav_core.store.weights import PRECISIONS
from .schema import CATEGORY, Weights, advanced, found_by


class SaveWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVSaveWeights",
            display_name="Save Weights",
            category=CATEGORY,
            **found_by("save tune", "save motion", "export"),
            description="Keeps what was tuned as a file in models/tune_a_video, for Load Weights.",
            is_output_node=True,
            inputs=[
                Weights.Input("weights", tooltip="What to keep, from One-Shot Tune or Load Published Model."),
                io.String.Input(
                    "filename_prefix",
                    default="tune_a_video",
                    tooltip=(
                        "Beginning of the file's name, or subfolder/name. A number is added; nothing is replaced. "
                        "%date:yyyy-MM-dd% and the like are filled in."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp32",
                    tooltip="fp32 samples the same to the bit when loaded again; fp16 is half the size.",
                ),
                advanced(
                    io.Boolean,
                    "lora",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Write the queries of light weights to models/loras as well, as an ordinary LoRA: the look "
                        "without the motion."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    "saved_name",
                    display_name="file",
                    tooltip="Name of the new file, as Load Weights lists it after a refresh of the page.",
                )
            ],
        )

    @classmethod
    def execute(cls, weights, filename_prefix, precision, lora=False) -> io.NodeOutput:
        return io.NodeOutput(library.save_weights(weights, filename_prefix, precision, lora))


class LoadWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVLoadWeights",
            display_name="Load Weights",
            category=CATEGORY,
            **found_by("load tune", "load motion", "reuse"),
            description="Reads what Save Weights kept.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=library.weights_list(),
                    tooltip="A file in models/tune_a_video; R refreshes the list. Its metadata says how it was tuned.",
                )
            ],
            outputs=[Weights.Output("weights", display_name="weights", tooltip="The weights, for Apply Weights.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return library.problem_with(file) or True

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return library.stamp(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(library.load_weights(file))


class ApplyWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVApplyWeights",
            display_name="Apply Weights",
            category=CATEGORY,
            **found_by("motion transfer", "motion strength", "apply motion", "motion lora"),
            description="Gives a model the motion of the clip that the weights were tuned on.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A checkpoint of the family that was tuned, with or without LoRAs, inflated or not.",
                ),
                Weights.Input("weights", tooltip="From Load Weights, Load Published Model or One-Shot Tune."),
                io.Float.Input(
                    "motion",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the temporal attention: 1 as tuned, 0 without. Lower it if motion is stiff.",
                ),
                io.Float.Input(
                    "content",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of what the image layers learned: 1 as tuned. Lower it if edits come out weak.",
                ),
                advanced(
                    io.Int,
                    "window",
                    default=-1,
                    min=-1,
                    max=10_000,
                    optional=True,
                    tooltip=(
                        "Frames that are computed at once, as in Inflate UNet. -1 as set before or tuned, 0 the whole "
                        "clip."
                    ),
                ),
                advanced(
                    io.Int,
                    "overlap",
                    default=4,
                    min=0,
                    max=5_000,
                    optional=True,
                    tooltip="Frames that neighbouring windows share. Used where window is not -1.",
                ),
            ],
            outputs=[
                io.Model.Output("tuned_model", display_name="model", tooltip="The tuned model, to invert and sample.")
            ],
        )

    @classmethod
    def execute(cls, model, weights, motion, content, window=-1, overlap=4) -> io.NodeOutput:
        check_base(model, weights)
        windows = None if window < 0 else Windows(window, overlap)
        return io.NodeOutput(apply_weights(model, weights, motion, content, windows))
