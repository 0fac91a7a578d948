from comfy_api.latest import io

from ..tav_core.method import ddim
from ..tav_core.pipeline import editing
from .schema import CATEGORY, advanced, found_by


class DDIMInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVDDIMInvert",
            display_name="DDIM Invert",
            category=CATEGORY,
            **found_by("inversion", "reverse sampling", "unsampler", "video to noise", "edit video"),
            description="Finds the noise from which the model would sample the clip: it holds layout and motion.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model."),
                io.Latent.Input("latents", tooltip="The clip that the model was tuned on, from VAE Encode."),
                io.Conditioning.Input(
                    "prompt", tooltip="The source prompt. Usually empty text, as in the paper; no guidance is used."
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=ddim.MAX_STEPS,
                    tooltip="DDIM steps, the same as in Sample Video. 50 in the paper; more follow the clip closer.",
                ),
                advanced(
                    io.Combo,
                    "method",
                    options=list(editing.METHODS),
                    default="plain",
                    optional=True,
                    tooltip=(
                        "plain: as in the paper, and best for edits. exact: cfg 1 gives the clip back; takes half as "
                        "long again. For reconstruction and masks only: plain edits get worse with it."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "inverted",
                    display_name="inverted",
                    tooltip=(
                        "The clip as noise, for Sample Video, or KSampler (Advanced) with add_noise disabled: "
                        "scheduler ddim_uniform, sampler euler or ddim, the same steps."
                    ),
                ),
                io.Noise.Output("noise", display_name="noise", tooltip="The same as NOISE, for SamplerCustomAdvanced."),
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="The noise levels to sample, for SamplerCustomAdvanced."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latents, prompt, steps, method="plain") -> io.NodeOutput:
        return io.NodeOutput(*editing.invert(model, latents, prompt, steps, method=method))
