from comfy_api.latest import io

from ..demo.model import load
from ..demo.world import BACKGROUNDS, MOTIONS, OBJECTS, make_clip
from ..tav_core.pictures import image
from .schema import CATEGORY, found_by

FPS = 8.0


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVLoadDemoModel",
            display_name="Load Demo Model",
            category=f"{CATEGORY}/demo",
            **found_by("example model", "tiny checkpoint", "test model"),
            description=(
                "A tiny text-to-image model that comes with this pack, in Stable Diffusion 1.x's form. It knows "
                "few things and places, at 128 x 128 pixels: a proof that runs anywhere, not a picture maker."
            ),
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="An ordinary MODEL, for Inflate UNet."),
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="An ordinary CLIP; it knows the words of the demo's captions."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="An ordinary VAE; pictures are 128 x 128 pixels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load())


class DemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVDemoClip",
            display_name="Demo Clip",
            category=f"{CATEGORY}/demo",
            **found_by("example video", "test video", "sample clip"),
            description="Draws a short clip of the demo model's world, with its caption: nothing to download.",
            inputs=[
                io.Combo.Input("motion", options=list(MOTIONS), default="arc", tooltip="How the object moves."),
                io.Combo.Input("object", options=list(OBJECTS), default="red car", tooltip="What moves."),
                io.Combo.Input("background", options=list(BACKGROUNDS), default="beach", tooltip="Where it moves."),
                io.Int.Input("frames", default=8, min=2, max=64, tooltip="Number of frames; 8 tune in a minute."),
                io.Int.Input(
                    "size",
                    default=128,
                    min=64,
                    max=512,
                    step=8,
                    tooltip="Width and height in pixels; the demo model was trained at 128.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Chooses the object's size and the background's details.",
                ),
            ],
            outputs=[
                io.Image.Output("frames_out", display_name="frames", tooltip="The clip's frames, for VAE Encode."),
                io.Float.Output("fps", display_name="fps", tooltip="Frames per second, for Create Video."),
                io.String.Output("caption", display_name="caption", tooltip="The clip in words, for CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(cls, motion, object, background, frames, size, seed) -> io.NodeOutput:
        clip = make_clip(motion, object, background, frames=frames, side=size, seed=seed)
        return io.NodeOutput(image.from_bytes(clip.frames), FPS, clip.caption)
