from comfy_api.latest import io

from ..tav_core.method import ddim
from ..tav_core.method.guidance import Steering
from ..tav_core.pipeline import editing
from .schema import CATEGORY, advanced, found_by


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
                advanced(
                    io.Float,
                    "cfg_end",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    tooltip="Guidance scale after cfg_until. 1 or 3 after a strong start changes shapes and is calmer.",
                ),
                advanced(
                    io.Float,
                    "cfg_until",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the steps with cfg; cfg_end for the rest. 1: cfg all the way, as in the paper.",
                ),
                advanced(
                    io.Float,
                    "freedom",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of fresh noise in the inverted one, for another motion. 0 keeps the clip's.",
                ),
                advanced(
                    io.Int,
                    "freedom_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    optional=True,
                    tooltip="Of the fresh noise: it counts only with freedom above 0.",
                ),
                advanced(
                    io.Float,
                    "structure",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "Share of the steps that take their structure from the clip: 0.4 gives calmer motion and keeps "
                        "the layout. Each such step takes half as long again."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output("video", display_name="video", tooltip="The edited clip's latents, for VAE Decode.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        latents,
        positive,
        negative,
        steps,
        cfg,
        cfg_end=1.0,
        cfg_until=1.0,
        freedom=0.0,
        freedom_seed=0,
        structure=0.0,
    ) -> io.NodeOutput:
        steering = Steering(cfg_end, cfg_until, freedom, freedom_seed, structure)
        return io.NodeOutput(editing.sample_video(model, latents, positive, negative, steps, cfg, steering=steering))
