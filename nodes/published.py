from comfy_api.latest import io

from ..tav_core.pipeline import library
from .schema import CATEGORY, Weights, found_by


class LoadPublished(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVLoadPublished",
            display_name="Load Published Model",
            category=CATEGORY,
            **found_by("import diffusers", "pretrained", "convert"),
            description="Reads a model that was tuned and published with the paper's code.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that it was tuned on, or one of the same family."),
                io.Combo.Input(
                    "published",
                    options=library.published_list(),
                    tooltip=(
                        "A diffusers folder, or its single .safetensors, .bin or .pt file, in models/tune_a_video; R "
                        "refreshes the list."
                    ),
                ),
            ],
            outputs=[
                Weights.Output(
                    "weights", display_name="weights", tooltip="The weights for this checkpoint, for Apply Weights."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was read, and how much else of it differs from your checkpoint, as text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, published=None) -> bool | str:
        return library.problem_with(published) or True

    @classmethod
    def fingerprint_inputs(cls, model, published) -> str:
        return library.stamp(published)

    @classmethod
    def execute(cls, model, published) -> io.NodeOutput:
        return io.NodeOutput(*library.load_published(model, published))


class ExportPublished(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVExportPublished",
            display_name="Export Published Model",
            category=CATEGORY,
            **found_by("export diffusers", "save model", "convert"),
            description="Writes a tuned model in the form that the paper's code and diffusers load.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the weights were tuned on, before they are applied."),
                Weights.Input("weights", tooltip="What was tuned, from One-Shot Tune or Load Weights."),
                io.String.Input(
                    "folder_prefix",
                    default="published",
                    tooltip=(
                        "Beginning of the new folder's name in models/tune_a_video. A number is added; nothing is "
                        "replaced. It takes 3.8 GB for Stable Diffusion 1.x. %date:yyyy-MM-dd% and the like are filled "
                        "in."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    "saved_name",
                    display_name="folder",
                    tooltip="Name of the new folder, as Load Published Model lists it after a refresh of the page.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, weights, folder_prefix) -> io.NodeOutput:
        return io.NodeOutput(library.save_published(model, weights, folder_prefix))
