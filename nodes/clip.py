from comfy_api.latest import io

from ..tav_core import clip
from .schema import CATEGORY, found_by


class PrepareClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVPrepareClip",
            display_name="Prepare Clip",
            category=CATEGORY,
            **found_by("trim video", "cut video", "pick frames", "crop video", "video frames"),
            description="Picks the frames of one short clip from a video and fits them to the model's size.",
            inputs=[
                io.Image.Input("frames", tooltip="All frames of the video, from Get Video Components."),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="First frame to use, counted from 0."),
                io.Int.Input(
                    "stride",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Use every n-th frame. 1 or 2 keeps motion smooth; larger covers a longer time.",
                ),
                io.Int.Input(
                    "count",
                    default=24,
                    min=1,
                    max=4096,
                    tooltip="Number of frames in the clip. The paper uses 24 to 32; memory and time grow with it.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=8,
                    max=clip.MAX_SIZE,
                    tooltip="Width in pixels, a multiple of 8. SD 1.x is at home at 512, SD 2.1 at 768.",
                ),
                io.Int.Input(
                    "height", default=512, min=8, max=clip.MAX_SIZE, tooltip="Height in pixels, a multiple of 8."
                ),
                io.Combo.Input(
                    "fit",
                    options=list(clip.FITS),
                    default="crop",
                    tooltip="crop: fill the size, cut the edges. pad: whole picture on black. stretch: distort.",
                ),
                io.Float.Input(
                    "source_fps",
                    default=24.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second of the video: connect fps of Get Video Components.",
                ),
            ],
            outputs=[
                io.Image.Output("clip", display_name="clip", tooltip="The clip's frames, for VAE Encode."),
                io.Float.Output(
                    "fps", display_name="fps", tooltip="Frames per second at which the clip plays at its own speed."
                ),
            ],
        )

    @classmethod
    def execute(cls, frames, start, stride, count, width, height, fit, source_fps) -> io.NodeOutput:
        return io.NodeOutput(clip.prepare_clip(frames, start, stride, count, width, height, fit), source_fps / stride)
