from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.method.attention import ATTENDS, PAPERS
from ..tav_core.method.inflation import GROUP_NORM_MODES, LAYERS
from ..tav_core.method.windows import Windows
from .schema import CATEGORY, advanced, found_by


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
                io.Model.Input("model", tooltip="Any Stable Diffusion 1.x, 2.x or XL model, with or without LoRAs."),
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
                advanced(
                    io.Int,
                    "window",
                    default=0,
                    min=0,
                    max=10_000,
                    optional=True,
                    tooltip=(
                        "For clips that do not fit into memory: so many frames are computed at once (4 or more, such "
                        "as 16), in tuning and in sampling. 0 takes the whole clip at once."
                    ),
                ),
                advanced(
                    io.Int,
                    "overlap",
                    default=4,
                    min=0,
                    max=5_000,
                    optional=True,
                    tooltip=(
                        "Frames that neighbouring windows share, if window is not 0: more join them smoother and take "
                        "longer."
                    ),
                ),
                advanced(
                    io.Combo,
                    "attends",
                    options=[kind for kind in ATTENDS if kind != "own"],
                    default=PAPERS,
                    optional=True,
                    tooltip=(
                        "Frames that each frame looks at: the first and the previous one, as in the paper; itself "
                        "too; or all, which takes three quarters more time at 8 frames. Weights remember it."
                    ),
                ),
                advanced(
                    io.Combo,
                    "layers",
                    options=["auto", *LAYERS],
                    default="auto",
                    optional=True,
                    tooltip=(
                        "What is tuned. paper: all queries, and temporal attention in every block. light: low-rank "
                        "changes of the queries, and one temporal attention a transformer, for less memory. auto: "
                        "light for SDXL, else paper."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("video_model", display_name="model", tooltip="The video model, for One-Shot Tune.")
            ],
        )

    @classmethod
    def execute(cls, model, group_norm, window=0, overlap=4, attends=PAPERS, layers="auto") -> io.NodeOutput:
        return io.NodeOutput(host.inflate(model, group_norm, Windows(window, overlap), attends, layers))
