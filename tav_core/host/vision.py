"""What the host's CLIP models see in frames, and read in texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..store.digest import digest
from .comfyui import comfy, stop_if_interrupted

AT_ONCE = 16  # frames
# By width, number of layers and size of a patch: what files of the field are called.
KINDS = {(1024, 24, 14): "CLIP ViT-L/14", (1280, 32, 14): "CLIP ViT-H/14", (1664, 48, 14): "CLIP ViT-bigG/14"}


def vision_name(vision: comfy.clip_vision.ClipVisionModel) -> str:
    """A CLIP_VISION's kind, the size of its pictures and eight digits of a digest of it, as it has no other name.

    Raises ValueError unless it is a CLIP: SigLIP has features of parts of a picture only, and DINO no projection.
    """
    model: Any = getattr(vision.model, "vision_model", None)
    if not isinstance(model, comfy.clip_model.CLIPVision) or model.output_layernorm:
        raise ValueError(
            f"this CLIP_VISION is a {type(vision.model).__name__} without CLIP's features of a whole picture: choose a "
            "CLIP, such as ViT-L, ViT-H or bigG, in Load CLIP Vision."
        )
    weights = vision.get_sd()
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    shape = (patches.shape[0], len(model.encoder.layers), patches.shape[-1])
    kind = KINDS.get(shape, f"CLIP of width {shape[0]}, {shape[1]} layers")
    # The vectors alone, which every training changes: the whole is gigabytes.
    mark = digest([(name, weight) for name, weight in sorted(weights.items()) if weight.ndim == 1])
    return f"{kind} {mark[:8]}, {vision.image_size} px"


def image_features(vision: comfy.clip_vision.ClipVisionModel, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Features of IMAGE frames, after the projection and before it: [f, d] and [f, width], float32, on the CPU.

    The host scales a frame's shorter side to the model's size and takes the middle, as CLIP's own preparation does.
    """
    projected, plain = [], []
    for part in frames.split(AT_ONCE):
        stop_if_interrupted()
        seen = vision.encode_image(part)
        norm = vision.model.vision_model.post_layernorm
        first = seen["last_hidden_state"][:, 0].to(vision.load_device)
        projected.append(seen["image_embeds"].float().cpu())
        plain.append(norm(first).float().cpu())
    return torch.cat(projected), torch.cat(plain)


def text_features(clip: comfy.sd.CLIP, texts: list[str]) -> Tensor:
    """Projected features of texts, [n, d], float32, on the CPU.

    Raises ValueError where this CLIP's text tower has no projection to what pictures are compared with.
    """
    encode: Any = clip.encode_from_tokens  # whose types know not all that it takes
    found = []
    for text in texts:
        tokens = clip.tokenize(text)
        projected, plain = (encode(tokens, return_pooled=kind)[1] for kind in (True, "unprojected"))
        if projected is None or torch.equal(projected, plain):
            raise ValueError(
                "this CLIP's text tower comes without a projection, as that of Stable Diffusion 1.x does: connect the "
                "CLIP of an SDXL or a Stable Diffusion 2.x checkpoint."
            )
        found.append(projected.float().cpu())
    return torch.cat(found)
