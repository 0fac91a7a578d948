import math

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.pictures.image import from_picture
from ..tav_core.pictures.plot import Curve, frame_curves
from ..tav_core.pipeline import scores
from .schema import CATEGORY, found_by

# The figures that are outputs by themselves, and what each is.
FIGURES = {
    "motion_error": "How far the edit's motion is from the clip's, in pixels at 512. Lower is better.",
    "warp_error": "What changes from frame to frame beside the clip's motion, of 255. Lower is steadier.",
    "background_psnr": "How well the background was kept, in dB. 30 is hard to see, needs a mask.",
    "frame_consistency": "How much the frames agree, up to 1. Compare it with the clip's own in the table.",
    "text_alignment": "How well the frames fit edit_prompt. Compare it with the clip's own in the table.",
    "edit_success": "Share of the frames that fit edit_prompt better than source_caption.",
}


class ScoreVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVScoreVideo",
            display_name="Score Video",
            category=CATEGORY,
            **found_by("metrics", "evaluate", "quality", "measure", "psnr", "ssim", "clip score", "optical flow"),
            description="Measures an edit beside its clip: motion and background kept, steadiness, fit to the prompt.",
            inputs=[
                io.Image.Input("source", tooltip="The clip that was edited, from Load Clip."),
                io.Image.Input("edit", tooltip="The edit, as many frames of the same size."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where something was to change, one or one a frame."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A CLIP such as ViT-H, for how the frames agree and fit the text.",
                ),
                io.Clip.Input(
                    "text_encoder", optional=True, tooltip="The CLIP of an SDXL or SD 2.x checkpoint, for the text."
                ),
                io.String.Input("source_caption", default="", optional=True, tooltip="What the clip shows."),
                io.String.Input("edit_prompt", default="", optional=True, tooltip="What the edit is to show."),
            ],
            outputs=[
                *(
                    io.Float.Output(key, display_name=key.replace("_", " "), tooltip=about)
                    for key, about in FIGURES.items()
                ),
                io.String.Output("table", display_name="table", tooltip="All figures, the edit's beside the clip's."),
                io.Image.Output("plot", display_name="plot", tooltip="Each figure over the frames, the worst marked."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, source, edit, mask=None, clip_vision=None, text_encoder=None, source_caption="", edit_prompt=""
    ) -> io.NodeOutput:
        measured = scores.score(source, edit, mask, clip_vision, text_encoder, source_caption, edit_prompt)
        text = scores.table(measured)
        host.progress_text(cls.hidden and cls.hidden.unique_id, text)
        curves = [
            Curve(each.name.partition(" (")[0], each.edit.tolist(), _listed(each.source), each.worst)
            for each in measured
            if each.edit is not None and each.worst is not None
        ]
        means = {each.key: scores.mean(each.edit) for each in measured}
        # JSON has neither NaN nor infinity, and the page would stop at them.
        told = {key: value if math.isfinite(value) else None for key, value in means.items()}
        plot = from_picture(frame_curves(curves))
        return io.NodeOutput(*(means[key] for key in FIGURES), text, plot, ui={"text": (text,), "scores": (told,)})


def _listed(values):
    return None if values is None else values.tolist()
