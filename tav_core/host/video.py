"""The act of inflating a MODEL: what its clone carries, and what a sampling run of it is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..method.attention import PAPERS, SparseCausal, wide_heads
from ..method.inflation import LIGHT, PAPER, TemporalLayers, UNetParts, inflated, is_inflated
from ..method.low_rank import pairs
from ..method.tuning import PredictionType
from ..method.windows import WHOLE, Windows, blended
from .build import heads_of
from .comfyui import (
    KEY,
    LATENT_PIXELS,
    UNET,
    ModelPatcher,
    UNetModel,
    comfy,
    config_of,
    latents_of,
    model_sigmas,
    others_on,
    parts_of,
    prediction_type_of,
    unet_of,
)

OVERRIDE = "optimized_attention_override"  # the host's transformer option


@dataclass(frozen=True)
class Inflation:
    """What an inflated MODEL carries with it.

    Attributes:
        temporal: its temporal layers, shared by its clones and never changed once attached.
        group_norm: see `inflation`.
        frames: length of the clip that it was tuned on; None before tuning, or where it is not known.
        windows: how a clip is cut.
        attends: see `attention`.
        layers: see `inflation`.
        tuned: whether the layers, and the queries beside them, are tuned ones, at whatever strength.
    """

    temporal: TemporalLayers
    group_norm: str
    frames: int | None = None
    windows: Windows = WHOLE
    attends: str = PAPERS
    layers: str = PAPER
    tuned: bool = False


@dataclass(frozen=True)
class Video:
    """An inflated MODEL with all that is asked of it on the way, asked once (`video_of`).

    Attributes:
        patcher: the MODEL.
        unet, parts: its UNet, shared with other MODELs, and where to attach in it.
        sigmas: noise level at each training timestep, ascending, float32 on the CPU, [T].
    """

    patcher: ModelPatcher
    unet: UNetModel
    parts: UNetParts
    inflation: Inflation
    prediction_type: PredictionType
    sigmas: Tensor

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.patcher.load_device

    @property
    def heads(self) -> dict[str, int]:
        """Attention heads of every transformer block."""
        return heads_of(self.parts)

    @property
    def text_width(self) -> int:
        return next(iter(self.parts.blocks.values())).attn2.to_k.in_features

    @property
    def vector_width(self) -> int:
        """Of what SDXL reads beside the text (`vector_of`); 0 where the model reads no such thing."""
        return 0 if self.unet.num_classes is None else config_of(self.patcher)["adm_in_channels"]

    def latents(self, samples: Tensor) -> Tensor:
        """LATENT samples in the scale of the model."""
        return latents_of(self.patcher, samples)


def video_of(model: ModelPatcher) -> Video:
    """An inflated MODEL as a value. Raises ValueError when it is not inflated, or cannot be a video model."""
    unet = unet_of(model)
    inflation = inflation_of(model)
    sigmas = model_sigmas(model).detach().clone().cpu().float()
    return Video(model, unet, parts_of(unet), inflation, prediction_type_of(model), sigmas)


def inflation_of(model: ModelPatcher) -> Inflation:
    """What an inflated MODEL carries. Raises ValueError when it is not inflated, or another node has undone that."""
    inflation = model.attachments.get(KEY)
    kinds = comfy.patcher_extension.WrappersMP
    if inflation is None or not all(
        model.get_wrappers(kind, KEY) for kind in (kinds.DIFFUSION_MODEL, kinds.OUTER_SAMPLE)
    ):
        raise ValueError("this MODEL is not inflated: connect it through the Inflate UNet node first.")
    return inflation


def inflate(
    model: ModelPatcher, group_norm: str, windows: Windows = WHOLE, attends: str = PAPERS, layers: str = "auto"
) -> ModelPatcher:
    """A clone of `model` whose UNet treats its batch as the frames of a video.

    Untuned, it differs from the image model by the frames that each one `attends` to and by `group_norm` only. A clip
    longer than a window is computed in `windows`. With `layers` "auto", SDXL is light: of its deep transformers the
    paper's choice would train 614 million parameters.

    Raises ValueError for a model that is no UNet of Stable Diffusion 1.x, 2.x or XL, or is inflated already.
    """
    unet = unet_of(model)
    prediction_type_of(model)
    if KEY in model.attachments:
        raise ValueError("this MODEL is inflated already: connect the checkpoint's own MODEL to Inflate UNet.")
    if layers == "auto":
        layers = PAPER if unet.num_classes is None else LIGHT
    temporal = TemporalLayers(parts_of(unet), layers=layers)
    temporal.reset()
    return with_inflation(model, Inflation(temporal, group_norm, windows=windows, attends=attends, layers=layers))


def with_inflation(model: ModelPatcher, inflation: Inflation) -> ModelPatcher:
    """A clone of `model` that carries `inflation`, instead of any that it had."""
    # A copy: the caller's layers stay as they are.
    temporal = copy.deepcopy(inflation.temporal).requires_grad_(False).to(inference_dtype(model))
    # A patcher of their own: the host counts, loads and offloads the new layers like any other model.
    patcher: Any = ModelPatcher(temporal, model.load_device, model.offload_device)
    if hasattr(patcher, "cached_patcher_init"):
        # Newer hosts rebuild a model for each further GPU through this factory.
        patcher.cached_patcher_init = (lambda *_args, **_kwargs: patcher.clone(), ())
    clone = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    clone.remove_wrappers_with_key(wrappers.DIFFUSION_MODEL, KEY)
    clone.remove_wrappers_with_key(wrappers.OUTER_SAMPLE, KEY)
    clone.remove_wrappers_with_key(wrappers.PREPARE_SAMPLING, KEY)
    # torch.compile does not see that other layers are attached, and would go on with those that it compiled first.
    video_call = torch.compiler.disable(_video_call(temporal, inflation))
    clone.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, KEY, video_call)
    clone.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, _whole_video)
    if inflation.windows.frames:
        clone.add_wrapper_with_key(wrappers.PREPARE_SAMPLING, KEY, partial(_making_room, inflation.windows))
    clone.set_additional_models(KEY, [patcher])
    clone.set_attachments(KEY, inflation)
    return clone


def inference_dtype(model: ModelPatcher) -> Any:
    """The dtype in which the host runs the model's UNet."""
    base: Any = model.model
    return model.get_model_object("manual_cast_dtype") or base.get_dtype()


def _video_call(temporal: TemporalLayers, inflation: Inflation) -> Callable[..., Tensor]:
    """A wrapper that makes one UNet call a video call; everything it attaches is gone when it returns.

    Args:
        temporal: the layers of `inflation` in the model's dtype.
    """
    group_norm, windows, attends = inflation.group_norm, inflation.windows, inflation.attends

    def wrapper(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        prompts = len(transformer_options.get("cond_or_uncond", (0,)))
        clip, others = transformer_options.get(KEY, (None, ""))
        if window := transformer_options.get("context_window"):  # the host's: `cut_by_host`
            clip = len(window.index_list) + (getattr(window, "causal_anchor_index", None) is not None)
        frames = frames_of(x, prompts, clip, others)
        videos = x.shape[0] // frames
        if not windows.cuts(frames):
            return whole(executor, videos, frames, x, timesteps, context, y, control, transformer_options, **kwargs)
        if transformer_options.get("patches_replace", {}).get("attn1"):
            raise ValueError(
                "another node replaces this MODEL's self-attention (PAG and SAG do) and would see one window of the "
                f"clip for all of it. Remove it, or set window to 0; {_on_it(others)}."
            )

        def compute(numbers: list[int]) -> Tensor:
            rows = [video * frames + number for video in range(videos) for number in numbers]
            part = partial(_rows, batch=x.shape[0], rows=torch.tensor(rows).to(x.device))
            # Other packs look here for the frames that a call is of.
            options = {**transformer_options, "ad_params": {"sub_idxs": numbers, "full_length": frames}}
            if "sigmas" in options:
                options["sigmas"] = part(options["sigmas"])
            each = part([x, timesteps, context, y, control])
            return whole(executor, videos, len(numbers), *each, transformer_options=options, **part(kwargs))

        timestep = 0.0 if timesteps is None else float(timesteps.max())
        return blended(windows.of(frames, timestep), frames, compute)

    def whole(executor, videos, frames, x, timesteps, context, y, control, transformer_options, **kwargs):
        # The executor's own module, not the base model's: with several GPUs each has its copy.
        with inflated(parts_of(executor.class_obj), temporal, videos, frames, group_norm, attends) as attention:
            if frames > 1:  # a single frame stays the image model's, to the bit
                override = _video_attention(attention, transformer_options.get(OVERRIDE), x.device)
                transformer_options = {**transformer_options, OVERRIDE: override}
                replaced = transformer_options.get("patches_replace", {})
                if functions := replaced.get("attn1"):
                    functions = {block: attention.replaced(function) for block, function in functions.items()}
                    transformer_options["patches_replace"] = {**replaced, "attn1": functions}
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    return wrapper


def _rows(value: Any, batch: int, rows: Tensor) -> Any:
    """Rows of all tensors in `value` that have one for each of the batch; all else as it is, in containers of its own.

    The UNet empties the lists of a ControlNet's residuals.
    """
    match value:
        case Tensor() if value.ndim and value.shape[0] == batch:
            return value[rows.to(value.device)]
        case dict():
            return {key: _rows(part, batch, rows) for key, part in value.items()}
        case list():
            return [_rows(part, batch, rows) for part in value]
    return value


def _making_room(windows: Windows, executor, model, noise_shape, *args, **kwargs):
    """A wrapper around what the host does before a sampling run: no more than a window needs its memory at once."""
    return executor(model, [windows.at_once(noise_shape[0]), *noise_shape[1:]], *args, **kwargs)


def _video_attention(attention: SparseCausal, override: Callable | None, device: torch.device) -> Callable[..., Tensor]:
    """What computes the attention of a video call: another pack's override, else the host's choice.

    On a CPU the host, unless told otherwise, takes one that saves memory: torch's saves more, and is three times as
    fast.
    """
    torch_attention = wide_heads(comfy.ldm.modules.attention.attention_pytorch) if device.type == "cpu" else None

    def attend(chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if override is not None:
            chosen = partial(override, chosen)
        elif torch_attention is not None and chosen.__name__ == "attention_sub_quad":
            chosen = torch_attention
        return attention.attend(chosen, *args, **kwargs)

    return attend


def frames_of(x: Tensor, prompts: int, clip: int | None, others: str = "") -> int:
    """The frames of each video in a UNet call, which holds whole videos: one for each prompt, and for each tile.

    Args:
        x: the call's batch of frames, video after video.
        prompts: how many of them the host computes in this call.
        clip: frames of the clip that is sampled; None where the UNet is called outside of a sampling run.
        others: what other nodes have put on the MODEL, for the message.

    Raises ValueError when the batch is no whole number of videos.
    """
    batch = x.shape[0]
    clip = clip or batch // prompts
    if clip and batch % clip == 0:
        videos = batch // clip
        # Fewer videos than prompts: one prompt's alone (whole), or a part of the frames for all prompts, which then
        # share their latents. A still clip cannot be told from that, and is refused.
        parts = x.chunk(prompts)
        if videos % prompts == 0 or any(not torch.equal(part, parts[0]) for part in parts):
            return clip
    raise ValueError(
        f"another node calls this MODEL with {batch} pictures for {prompts} prompt{'s' * (prompts != 1)}, which are no "
        f"whole videos of {clip} frames. Remove the node that cuts the clip; {_on_it(others)}."
    )


def _whole_video(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
    """A wrapper around one sampling run, any sampler's: the clip is known in it, and its UNet must be a video's."""
    guider = executor.class_obj
    frames = noise.shape[0]
    inflation = inflation_of(guider.model_patcher)
    if cut_by_host(guider.model_options, frames, inflation.windows) and any(
        "control" in prompt for conditioning in guider.conds.values() for prompt in conditioning or ()
    ):
        raise ValueError(
            "a ControlNet gives every context window the pictures of the first one. Remove the context windows node, "
            "and set window in Inflate UNet instead."
        )
    for name, conditioning in guider.conds.items():
        for prompt in conditioning or ():
            check_options(name, prompt, frames, noise.shape[2:], inflation.windows)
    refuse_merged_tunes(guider.model_patcher)
    others = ", ".join(others_on(guider.model_options))
    if denoise_mask is not None and not torch.count_nonzero(noise):
        raise ValueError(
            "the latents have a mask and no noise is added, so what the mask keeps would stay the noise that it is. "
            "Use Sample Video, or SamplerCustomAdvanced with the NOISE of DDIM Invert."
        )
    options = guider.model_options.setdefault("transformer_options", {})  # the guider's own, for this run
    options[KEY] = frames, others
    # Innermost, wherever other nodes stand: what they keep from call to call (EasyCache) is the clip's, not a window's.
    wrapped = options["wrappers"][comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL]
    wrapped[KEY] = wrapped.pop(KEY)
    calls = 0

    def check(block: Any, _args: Any) -> None:
        nonlocal calls
        calls += 1
        if not is_inflated(block):
            raise ValueError(
                "another node computed this MODEL without its inflation, each frame as a picture of its own (DeepCache "
                f"is of this kind). Remove it; {_on_it(others)}."
            )

    with ExitStack() as undo:
        blocks = parts_of(guider.model_patcher.model.diffusion_model).blocks
        for name in inflation.temporal.names:
            undo.callback(blocks[name].register_forward_pre_hook(check).remove)
        out = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    if not calls and len(sigmas) > 1:
        raise ValueError(
            "this MODEL was never computed: no prompt is active at these noise levels (timestep ranges), or another "
            f"node answers in its place; {_on_it(others)}."
        )
    return out


def check_options(
    name: str, options: Mapping[str, Any], frames: int, sides: Sequence[int], windows: Windows = WHOLE
) -> None:
    """Whether what a prompt carries beside its text has a part for each frame, or one for all.

    Args:
        options: of one entry of a CONDITIONING.
        sides: height and width of the clip's latents.
        windows: how the clip is cut.
    Raises ValueError saying what it is that has not: the host would share it out over the frames, without a word. So
    for GLIGEN's boxes, which the host makes for whole clips, where windows cut this one.
    """
    if "gligen" in options and windows.cuts(frames):
        raise ValueError(
            f"{name} has GLIGEN's text boxes, which cannot be cut into windows. Remove them, or set window to 0 in "
            "Inflate UNet (or Apply Weights)."
        )
    check_mask(f"{name}'s", options.get("mask"), frames, sides)
    control = options.get("control")
    while control is not None:
        hints = getattr(control, "cond_hint_original", None)
        if isinstance(hints, Tensor) and len(hints) not in (1, frames):
            raise ValueError(
                f"{name} has a ControlNet with {len(hints)} pictures, the clip has {frames} frames: one picture is "
                f"needed for the whole clip, or {frames}, one a frame."
            )
        control = getattr(control, "previous_controlnet", None)


def check_mask(whose: str, mask: Tensor | None, frames: int, sides: Sequence[int]) -> None:
    """Whether a mask is of the clip's shape, and has a part for each frame, or one for all.

    Raises ValueError: the host would repeat too few masks, drop too many, and stretch those of another shape, without a
    word.
    """
    if mask is None:
        return
    (height, width), (tall, wide) = mask.shape[-2:], sides
    if abs(height * wide - width * tall) >= max(height, width):  # by a latent or more, were it as large as these
        raise ValueError(
            f"{whose} mask is {width} x {height}, another shape than the clip's {LATENT_PIXELS * wide} x "
            f"{LATENT_PIXELS * tall}: it would be stretched. Crop or scale it as the clip was."
        )
    if mask.ndim > 2 and mask.shape[0] not in (1, frames):
        raise ValueError(
            f"{whose} mask has {mask.shape[0]} frames, the clip has {frames}: one mask is needed for the whole clip, "
            f"or {frames}, one a frame."
        )


def _on_it(others: str) -> str:
    return f"on this MODEL are {others or 'none that tell their names'}"


def cut_by_host(model_options: Mapping[str, Any], frames: int, windows: Windows) -> bool:
    """Whether the host's own context windows cut a clip of so many frames, each with the clip's first one before it.

    The host puts an anchor frame before a window and takes its output away; `latent_retain_index_list` 0 makes that
    anchor the first frame, which the attention needs, and `cond_retain_index_list` 0 gives it its own conditioning.

    Args:
        windows: the model's own, which must not cut what is cut already.
    Raises ValueError when they would cut the clip otherwise.
    """
    handler = model_options.get("context_handler")
    if handler is None or getattr(handler, "dim", 0) != 0 or getattr(handler, "context_length", 0) >= frames:
        return False
    keeps = [getattr(handler, f"{what}_retain_index_list", None) for what in ("latent", "cond")] == [[0], [0]]
    anchored = getattr(handler, "causal_window_fix", False) and not getattr(handler, "freenoise", False)
    if not (keeps and anchored and handler.context_schedule.name == "standard_static"):
        raise ValueError(
            "context windows would cut the video into pieces that do not see its first frame, which Tune-A-Video's "
            "attention needs. Remove the context windows node from this MODEL, and set window in Inflate UNet instead; "
            "or, where the node has them, set latent_retain_index_list and cond_retain_index_list to 0, "
            "causal_window_fix to true, freenoise to false and context_schedule to standard_static."
        )
    if windows.cuts(frames):
        raise ValueError(
            "context windows and this MODEL's own window both cut the clip: set window to 0 in Inflate UNet (or Apply "
            "Weights), or remove the context windows node."
        )
    return True


def add_tune(model: ModelPatcher, queries: Mapping[str, Tensor], strength: float) -> None:
    """Add the change of the queries to a MODEL as the host's patches, marked as ours."""
    mark = {"pad_weight": False, KEY: True}
    model.add_patches({f"{UNET}{name}": ("diff", (delta, mark)) for name, delta in queries.items()}, strength)


def add_low_rank_tune(model: ModelPatcher, queries: Mapping[str, Tensor], strength: float) -> None:
    """The same of low-rank changes, as the host's LoRA patches."""
    patches = comfy.lora.load_lora(dict(queries), {layer: f"{UNET}{layer}.weight" for layer in pairs(queries)})
    for patch in patches.values():
        setattr(patch, KEY, True)
    model.add_patches(patches, strength)


def refuse_merged_tunes(model: ModelPatcher) -> None:
    """Raises ValueError for an inflated MODEL that was merged with a tuned one: of that only the queries came along."""

    def changes(patch: Any) -> Iterator[int]:
        """The marked changes within a patch, by identity: clones share them."""
        match patch:
            case Tensor() as change, {"tune_a_video": _}:
                yield id(change)
            case object(tune_a_video=True):
                yield id(patch)
            case list() | tuple():
                for part in patch:
                    yield from changes(part)

    for patches in model.patches.values():
        # (strength, value, …), where the value is a list if it is another model's weight with that one's patches.
        own = {change for patch in patches if not isinstance(patch[1], list) for change in changes(patch)}
        if not own.issuperset(changes([patch for patch in patches if isinstance(patch[1], list)])):
            raise ValueError(
                "this MODEL was merged with a tuned one, of which only the image layers came along and no motion. "
                "Merge the checkpoints first, then connect Inflate UNet and One-Shot Tune, or Apply Weights."
            )
