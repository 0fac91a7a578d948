from comfy_api.latest import io

from ..tav_core.method import ddim
from ..tav_core.pipeline import editing
from .schema import CATEGORY, found_by


class SampleVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVSampleVideo",
            display_name="Sample Video",
            category=CATEGORY,
            **found_by("edit video", "video edit", "video to video", "vid2vid", "v2v", "restyle", "sampler"),
            description="Samples the edited video from the inverted clip and a new prompt, with DDIM.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model."),
                io.Latent.Input("latents", tooltip="The inverted latents, from DDIM Invert."),
                io.Conditioning.Input("positive", tooltip="The edit prompt, such as: spider man is skiing."),
                io.Conditioning.Input("negative", tooltip="What to avoid. Empty text in the paper."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=ddim.MAX_STEPS,
                    tooltip="DDIM steps, the same as in DDIM Invert. 50 in the paper.",
                ),
                io.Float.Input(
                    "cfg",
                    default=12.5,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    tooltip="Guidance scale. 12.5 in the paper; lower keeps more of the clip, 1 reconstructs it.",
                ),
            ],
            outputs=[
                io.Latent.Output("video", display_name="video", tooltip="The edited clip's latents, for VAE Decode.")
            ],
        )

    @classmethod
    def execute(cls, model, latents, positive, negative, steps, cfg) -> io.NodeOutput:
        return io.NodeOutput(editing.sample_video(model, latents, positive, negative, steps, cfg))
