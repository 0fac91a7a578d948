from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.method.inflation import GROUP_NORM_MODES
from .schema import CATEGORY, found_by


class InflateUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVInflateUNet",
            display_name="Inflate UNet",
            category=CATEGORY,
            **found_by("video model", "image to video model", "temporal attention", "animate", "v2v"),
            description=(
                "Makes an image model treat its batch as the frames of one video: sparse-causal attention, and "
                "temporal attention that tuning fills. The model that you connect is not changed."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any Stable Diffusion 1.x or 2.x model, with or without LoRAs."),
                io.Combo.Input(
                    "group_norm",
                    options=list(GROUP_NORM_MODES),
                    default="video",
                    tooltip=(
                        "video: normalise over all frames at once, as the paper's code and published models do. "
                        "per_frame: each frame by itself, for clips with cuts or strong changes of light, or where an "
                        "edited object vanishes from single frames."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("video_model", display_name="model", tooltip="The video model, for One-Shot Tune.")
            ],
        )

    @classmethod
    def execute(cls, model, group_norm) -> io.NodeOutput:
        return io.NodeOutput(host.inflate(model, group_norm))
