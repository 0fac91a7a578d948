"""What must hold before long work begins: the model, the clip's latents and the prompts fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import host

# Options of a CONDITIONING that a tune honours, or that the UNet does not read; those that SDXL reads; and values at
# which others change nothing.
HONOURED = {"pooled_output", "uuid"}
SIZES = {"width", "height", "crop_w", "crop_h", "target_width", "target_height"}
NEUTRAL = {"strength": 1, "start_percent": 0, "end_percent": 1, "clip_start_percent": 0, "clip_end_percent": 1}


def check_inputs(
    model: host.ModelPatcher,
    latent: Mapping[str, Any],
    min_frames: int = 1,
    uncut: str = "",
    **prompts: host.Conditioning,
) -> tuple[host.Video, Tensor]:
    """The video model and the clip's latents [f, c, h, w], after all was checked that can be before long work begins.

    Args:
        uncut: what the host's context windows would spoil, if anything.
    Raises ValueError saying what is wrong, what was expected and what to do.
    """
    video = host.video_of(model)
    unet, inflation = video.unet, video.inflation
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        raise ValueError(
            f"the latents have shape {tuple(samples.shape)}; expected [frames, channels, height, width], as "
            "VAE Encode of an SD checkpoint makes them from a batch of frames."
        )
    frames, channels, *sides = samples.shape
    smallest = 2 ** (len(unet.channel_mult) - 1)  # one pixel is left on the coarsest level
    if min(sides) < smallest:
        raise ValueError(
            f"the latents are {sides[1]} x {sides[0]}; this MODEL needs {smallest} x {smallest} or more, which are "
            f"{host.LATENT_PIXELS * smallest} pixels a side. Make the clip larger."
        )
    if host.cut_by_host(model.model_options, frames, inflation.windows) and uncut:
        raise ValueError(
            f"{uncut} needs all frames in one call, and context windows cut the clip. Remove the context windows node "
            "from this MODEL, and set window in Inflate UNet instead."
        )
    if channels != unet.in_channels:
        raise ValueError(
            f"the latents have {channels} channels, this MODEL's have {unet.in_channels}: encode the frames with "
            "the VAE of the same checkpoint."
        )
    if frames < min_frames:
        raise ValueError(
            f"the clip has {frames} frame{'s' * (frames != 1)}; at least {min_frames} are needed (the paper uses "
            "24 to 32). Raise count in Load Clip."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            "the latents hold NaN or infinite values: a VAE makes them in fp16, SDXL's own above all. Start ComfyUI "
            "with --bf16-vae or --fp32-vae, or load a VAE that is made for fp16 (sdxl-vae-fp16-fix); else check the "
            "frames."
        )
    host.refuse_merged_tunes(model)
    host.check_mask("the latents'", latent.get("noise_mask"), frames, sides)
    if inflation.frames not in (None, frames):
        raise ValueError(
            f"this MODEL was tuned on {inflation.frames} frames, but the latents have {frames}: use the clip that "
            "it was tuned on, or tune the MODEL of Inflate UNet on this one."
        )
    for name, conditioning in prompts.items():
        _check_conditioning(name, conditioning, video, samples)
    return video, samples


def _check_conditioning(name: str, conditioning: host.Conditioning, video: host.Video, samples: Tensor) -> None:
    if not conditioning:
        raise ValueError(f"{name} is empty: connect a CLIP Text Encode node.")
    width, frames = video.text_width, len(samples)
    for entry in conditioning:
        if entry[0].ndim != 3 or not entry[0].shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(entry[0].shape)}; expected [prompts, tokens, width], as CLIP Text Encode "
                "makes it."
            )
        batch, _tokens, channels = entry[0].shape
        if batch not in (1, frames):
            raise ValueError(
                f"{name} has a batch of {batch} prompts; expected 1 for the whole clip, or {frames}, one a frame."
            )
        if channels != width:
            raise ValueError(
                f"{name} is {channels} wide, this MODEL reads {width}: encode it with the CLIP of the same checkpoint."
            )
        host.check_options(name, entry[1], frames, samples.shape[2:], video.inflation.windows)
        if video.vector_width:
            _check_vector(name, entry, video, samples)


def _check_vector(name: str, entry: list[Any], video: host.Video, samples: Tensor) -> None:
    pooled = entry[1].get("pooled_output")
    fits = pooled is not None and pooled.ndim == 2 and len(pooled) in (1, len(samples))
    vector = host.vector_of(video.patcher, [entry], samples) if fits else None
    if vector is None or vector.shape[1] != video.vector_width:
        found = "has none" if pooled is None else f"has one of shape {tuple(pooled.shape)}"
        raise ValueError(
            f"{name} must come with the text's pooled output that this MODEL reads, and {found}: encode it with CLIP "
            "Text Encode and the CLIP of the same checkpoint."
        )


def check_caption(caption: host.Conditioning, sizes: bool) -> None:
    """Whether a tune can use all of the caption. Raises ValueError naming what it cannot.

    Args:
        sizes: whether the model reads them.
    """
    if len(caption) != 1:
        raise ValueError(f"caption combines {len(caption)} prompts; tuning needs exactly one that describes the clip.")
    honoured = HONOURED | SIZES if sizes else HONOURED
    lost = [
        name
        for name, value in caption[0][1].items()
        if not (name in honoured or value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name]))
    ]
    if lost:
        raise ValueError(
            f"caption carries {', '.join(map(str, lost))}, which tuning cannot use: it learns the whole clip with one "
            "plain prompt. Connect CLIP Text Encode directly."
        )
