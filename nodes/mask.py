from comfy_api.latest import io, ui

from ..tav_core.pipeline import finding
from .schema import CATEGORY, found_by

MAX_PIXELS = 512


class FindMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVFindMask",
            display_name="Find Mask",
            category=CATEGORY,
            **found_by("segment", "object mask", "attention mask", "keep background", "inpaint"),
            description="Finds the object that a word of the caption names: an edit then keeps the rest.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model, the same as in DDIM Invert."),
                io.Latent.Input("latents", tooltip="The inverted latents, from DDIM Invert."),
                io.Clip.Input("clip", tooltip="The CLIP of the checkpoint."),
                io.String.Input(
                    "caption", multiline=True, tooltip="What the clip shows: the caption of One-Shot Tune."
                ),
                io.String.Input("word", tooltip="The object: a word of the caption, or several in a row."),
                io.Combo.Input(
                    "edit",
                    options=list(finding.EDITS),
                    default="object",
                    tooltip="What the edit may change: the object that is found, or all but that.",
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=MAX_PIXELS,
                    tooltip="Pixels by which the object is made larger. 8 or more to change it, 0 to keep it.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=MAX_PIXELS,
                    tooltip="Pixels over which the edge fades. 0: sharp, and what is kept is kept to the bit.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "masked", display_name="masked", tooltip="The inverted latents with the mask, for Sample Video."
                ),
                io.Mask.Output("mask", display_name="mask", tooltip="The mask of each frame; white may change."),
            ],
        )

    @classmethod
    def execute(cls, model, latents, clip, caption, word, edit, grow, feather) -> io.NodeOutput:
        masked, mask = finding.find_mask(model, latents, clip, caption, word, edit, grow, feather)
        return io.NodeOutput(masked, mask, ui=ui.PreviewMask(mask))
