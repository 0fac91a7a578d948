"""An edit's figures beside its source's: how much of the motion and the background stayed, and how steady it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..method import metrics
from . import flow

LEAST = 16  # pixels of a side
EQUAL = 100.0  # dB, for a background that is the same to the bit
NO_VISION = "connect clip_vision"
NO_MASK = "connect a mask"
NO_TEXT = "connect text_encoder and clip_vision, and fill in edit_prompt"


@dataclass(frozen=True)
class Score:
    """One measure, a figure a frame.

    Attributes:
        key: its name for programs.
        name: in words, with its unit, and the model and size that it was measured by.
        edit, source: [f], on the CPU, NaN at frames that have no figure, as the first of a pair; None where there is no
            such figure.
        better: which end is the good one; "" where none is.
        missing: why it was not measured.
    """

    key: str
    name: str
    edit: Tensor | None = None
    source: Tensor | None = None
    better: Literal["low", "high", ""] = field(default="", kw_only=True)
    missing: str = field(default="", kw_only=True)

    @property
    def worst(self) -> int | None:
        """The frame, from 0, at which the edit falls behind the source most; None where there is no such thing."""
        if self.edit is None or not self.better:
            return None
        behind = self.edit if self.source is None else self.edit - self.source
        behind = behind if self.better == "low" else -behind
        known = behind.isfinite()
        return int(behind.masked_fill(~known, -torch.inf).argmax()) if known.any() else None


def score(
    source: Tensor,
    edit: Tensor,
    mask: Tensor | None = None,
    vision: Any = None,
    clip: Any = None,
    caption: str = "",
    prompt: str = "",
) -> list[Score]:
    """All that can be measured with what is given; the rest says what it lacks.

    Args:
        source, edit: IMAGE of one shape, [f, h, w, 3], 2 frames or more.
        mask: MASK, [1 or f, h, w] of any size: black where nothing was to change.
        vision, clip: CLIP_VISION and a CLIP whose text tower has its projection.
        caption, prompt: what the source shows, and what the edit is to show.

    Raises ValueError when the clips do not fit each other, or something was given that the rest leaves no use for.
    """
    source, edit = _checked("source", source), _checked("edit", edit)
    if source.shape != edit.shape:
        sizes = (f"{len(x)} frames of {x.shape[2]} x {x.shape[1]}" for x in (source, edit))
        raise ValueError(
            "source has {} and edit {}: they must agree. Connect the clip that was edited, and its edit.".format(*sizes)
        )
    if clip is not None and vision is None:
        raise ValueError("text_encoder compares texts with what clip_vision sees: connect clip_vision as well.")
    if clip is not None and not prompt.strip():
        raise ValueError("edit_prompt is empty: write what the edit is to show, or take text_encoder away.")
    outside = None if mask is None else _outside(mask, edit)
    return [
        *_by_vision(source, edit, vision, clip, caption.strip(), prompt.strip()),
        *_by_flow(source, edit),
        *_by_pixels(source, edit, outside),
    ]


def _checked(name: str, pictures: Tensor) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or not pictures.is_floating_point():
        raise ValueError(f"{name} has no frames: connect images, such as those of Load Clip or VAE Decode.")
    if len(pictures) < 2 or min(pictures.shape[1:3]) < LEAST:
        raise ValueError(
            f"{name} has {len(pictures)} frames of {pictures.shape[2]} x {pictures.shape[1]} pixels: a clip of 2 "
            f"frames and {LEAST} pixels or more is needed."
        )
    if not pictures.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite pixels: a VAE makes them in fp16. Start ComfyUI with --bf16-vae or "
            "--fp32-vae."
        )
    return pictures[..., :3].to("cpu", torch.float32).clamp(0, 1)


def _outside(mask: Tensor, edit: Tensor) -> Tensor:
    """Where nothing was to change, bool [f, h, w]: where a mask of any size is black."""
    if mask.ndim != 3 or len(mask) not in (1, len(edit)):
        raise ValueError(f"mask holds {len(mask)} pictures: one is needed, or one for each of the {len(edit)} frames.")
    resized = F.interpolate(mask[:, None].float().cpu(), size=tuple(edit.shape[1:3]), mode="bilinear")[:, 0]
    outside = (resized < 1 / 255).expand(len(edit), -1, -1)
    if not outside.any():
        raise ValueError("mask is nowhere black, so there is no background: white is what was to change.")
    return outside


# --- the measures -------------------------------------------------------------------------------------------------


def _by_vision(source: Tensor, edit: Tensor, vision: Any, clip: Any, caption: str, prompt: str) -> Iterator[Score]:
    if vision is None:
        yield Score("frame_consistency", "frame consistency", missing=NO_VISION)
        yield Score("neighbour_consistency", "consistency of neighbours", missing=NO_VISION)
        yield Score("text_alignment", "text alignment", missing=NO_TEXT)
        yield Score("edit_success", "edit success", missing=NO_TEXT)
        return
    name = host.vision_name(vision)
    texts = None if clip is None else host.text_features(clip, [prompt, caption] if caption else [prompt])
    (seen, plain), (source_seen, source_plain) = (host.image_features(vision, clip) for clip in (edit, source))
    if texts is not None and texts.shape[1] != seen.shape[1]:
        raise ValueError(
            f"text_encoder's texts have {texts.shape[1]} features and clip_vision's pictures {seen.shape[1]}: both "
            "must be of one CLIP. SDXL's text tower belongs to ViT-bigG, Stable Diffusion 2's to ViT-H."
        )
    yield Score(
        "frame_consistency",
        f"frame consistency, to the first and the one before ({name})",
        _later(metrics.consistency(seen)),
        _later(metrics.consistency(source_seen)),
        better="high",
    )
    yield Score(
        "neighbour_consistency",
        f"consistency of neighbours ({name})",
        _later(metrics.cosine_to_previous(plain).clamp(min=0)),
        _later(metrics.cosine_to_previous(source_plain).clamp(min=0)),
        better="high",
    )
    if texts is None:
        yield Score("text_alignment", "text alignment", missing=NO_TEXT)
        yield Score("edit_success", "edit success", missing=NO_TEXT)
        return
    # Of each text, for the edit's frames and for the source's.
    fits, *was = ([metrics.text_alignment(x, text) for x in (seen, source_seen)] for text in texts)
    yield Score("text_alignment", f"text alignment, 100 x cosine ({name})", *fits, better="high")
    if not was:
        yield Score("edit_success", "edit success", missing="fill in source_caption")
        return
    success = [(new > old).float() for new, old in zip(fits, was[0], strict=True)]
    yield Score("edit_success", f"edit success, share of frames ({name})", *success)


def _by_flow(source: Tensor, edit: Tensor) -> Iterator[Score]:
    names = {
        "motion": f"motion, px at {flow.SIDE} (OpenCV DIS)",
        "motion_error": f"motion error, px at {flow.SIDE} (OpenCV DIS)",
        "motion_cosine": "motion cosine (OpenCV DIS)",
        "warp_error": f"warp error, of 255 at {flow.SIDE} px (OpenCV DIS)",
    }
    method = flow.dis()
    if method is None:
        yield from (Score(key, name.partition(" (")[0], missing=flow.MISSING) for key, name in names.items())
        return
    found: dict[str, list[tuple[Tensor, ...]]] = {key: [] for key in names}
    for i in range(1, len(source)):  # pair by pair: the flows of a long clip would be gigabytes
        host.stop_if_interrupted()
        before, after, edit_before, edit_after = (
            flow.at_size(clip[j : j + 1]) for clip in (source, edit) for j in (i - 1, i)
        )
        ours, theirs = flow.flow(method, before, after), flow.flow(method, edit_before, edit_after)
        back = flow.flow(method, after, before)
        found["motion"].append((metrics.flow_length(theirs), metrics.flow_length(ours)))
        found["motion_error"].append((metrics.end_point_error(theirs, ours), torch.zeros(1)))
        moves = metrics.flow_cosine(ours, ours)  # 1, or NaN where nothing moves
        found["motion_cosine"].append((metrics.flow_cosine(ours, theirs), moves))
        differences = (metrics.warp_difference(*pair, back) for pair in ((before, after), (edit_before, edit_after)))
        found["warp_error"].append(metrics.warp_error(*differences))
    better: dict[str, Any] = {"motion": "", "motion_error": "low", "motion_cosine": "high", "warp_error": "low"}
    for key, pairs in found.items():
        values = [_later(torch.cat(column)) for column in zip(*pairs, strict=True)]
        if any(value.isfinite().any() for value in values):
            yield Score(key, names[key], *values, better=better[key])
        else:
            missing = "the source moves too little" if key == "motion_cosine" else "the flow finds too little again"
            yield Score(key, names[key], missing=missing)


def _by_pixels(source: Tensor, edit: Tensor, outside: Tensor | None) -> Iterator[Score]:
    if outside is None:
        yield Score("background_psnr", "background kept, PSNR in dB", missing=NO_MASK)
        yield Score("background_ssim", "background kept, SSIM", missing=NO_MASK)
    else:
        kept = metrics.psnr(edit, source, outside).clamp(max=EQUAL)  # or one equal frame would make the mean infinite
        yield Score("background_psnr", "background kept, PSNR in dB", kept, better="high")
        alike = metrics.ssim(edit, source, outside)
        if alike.isfinite().any():
            yield Score("background_ssim", "background kept, SSIM", alike, better="high")
        else:
            window = f"the background holds no window of {metrics.WINDOW} x {metrics.WINDOW} pixels"
            yield Score("background_ssim", "background kept, SSIM", missing=window)
    changes = [_later(metrics.flicker(clip)) for clip in (edit, source)]
    yield Score("flicker", "flicker, of 255", *changes, better="low")
    sharp = [metrics.sharpness(clip) for clip in (edit, source)]
    yield Score("sharpness", "sharpness, variance of the Laplacian", *sharp, better="high")


def _later(values: Tensor) -> Tensor:
    """A figure a pair of frames, [f - 1], as the later frame's, [f]."""
    return torch.cat([values.new_full((1,), torch.nan), values])


# --- in numbers and in words ------------------------------------------------------------------------------------------


def mean(values: Tensor | None) -> float:
    """Of the frames that have a figure; NaN where none has."""
    return math.nan if values is None else float(values.nanmean())


def table(scores: Iterable[Score]) -> str:
    """Means in Markdown, a line a measure."""
    lines = ["| measure | edit | source | worst frame |", "|---|---|---|---|"]
    for each in scores:
        cells = [_number(each.edit), _number(each.source), "" if each.worst is None else str(each.worst)]
        lines.append(
            f"| {each.name} | {' | '.join(cells)} |" if not each.missing else f"| {each.name} | {each.missing} | | |"
        )
    return "\n".join(lines)


def _number(values: Tensor | None) -> str:
    return "" if values is None else f"{mean(values):.4g}"
