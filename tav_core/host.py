"""Everything this pack asks of ComfyUI, and the only module that imports it.

Host symbols used, and why:

- `comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel`, `ResBlock`; `comfy.ldm.modules.attention.
  BasicTransformerBlock`, `SpatialTransformer`: to recognise a Stable Diffusion UNet and find where to attach.
- `comfy.model_patcher.ModelPatcher`: `clone`, `add_wrapper_with_key`, `set_additional_models`, `set_attachments`,
  `add_patches`, `get_key_patches`, `get_model_object`: inflate and tune without touching the base model.
- `comfy.patcher_extension.WrappersMP`: the wrappers around one UNet call and around one sampling run.
- `comfy.lora.calculate_weight`: the weights that the host would run, LoRAs merged.
- `comfy.model_sampling`: epsilon, v-prediction or neither; the noise level of each timestep.
- `comfy.samplers.CFGGuider`, `KSAMPLER`: invert and sample through the host's own stack, so that LoRA, ControlNet,
  regional prompts, previews and cancel work.
- `comfy.model_management`: devices, memory, interrupt. `comfy.utils.ProgressBar`, `latent_preview`: progress.
- `comfy.model_base.BaseModel`, `comfy.supported_models.SD15`, `comfy.sd.CLIP`, `comfy.sd.VAE`, `comfy.sd1_clip`,
  `comfy.supported_models_base.ClipTarget`, `comfy.utils.unet_to_diffusers`: small models of one's own, in published
  naming.
- `folder_paths`: the folder of weights files, `models/tune_a_video`, as extra_model_paths.yaml may add to it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from . import ddim, files, published
from .attention import sdpa_override
from .inflation import TemporalLayers, UNetParts, attach, checkpoint_stages, inflated
from .tuning import PredictionType, Recipe, Step, draw, trains, tune
from .weights import TunedWeights, difference, load_file, save_file

ModelPatcher = comfy.model_patcher.ModelPatcher
Conditioning = list[list[Any]]
KEY = "tune_a_video"
UNET = "diffusion_model."
FOLDER = "tune_a_video"
LATENT_PIXELS = 8  # width and height of what one latent stands for

log = logging.getLogger(__name__)

# After those of extra_model_paths.yaml, which the host has read by now: new files go to the first folder.
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


@dataclass(frozen=True)
class Inflation:
    """What an inflated MODEL carries with it.

    Attributes:
        temporal: its temporal layers, shared by its clones and never changed once attached.
        group_norm: see `inflation`.
        frames: length of the clip that it was tuned on; None before tuning.
    """

    temporal: TemporalLayers
    group_norm: str
    frames: int | None = None


# --- models -----------------------------------------------------------------------------------------------------


def unet_of(model: ModelPatcher) -> UNetModel:
    """The model's UNet. Raises ValueError, naming what it is, unless it is of Stable Diffusion 1.x or 2.x."""
    unet = getattr(model.model, "diffusion_model", None)
    kind = type(model.model).__name__
    wanted = "Tune-A-Video needs a Stable Diffusion 1.x or 2.x checkpoint."
    if not isinstance(unet, UNetModel):
        raise ValueError(f"this MODEL is a {kind} ({type(unet).__name__}), not a Stable Diffusion UNet. {wanted}")
    if unet.num_classes is not None:
        raise ValueError(f"this MODEL is a {kind} with extra conditioning (SDXL, SVD or unCLIP). {wanted}")
    channels = model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"this MODEL's UNet takes {unet.in_channels} channels instead of {channels}: it is an inpainting, "
            f"instruct or upscale model. {wanted}"
        )
    return unet


def parts_of(unet: nn.Module) -> UNetParts:
    """Where to attach in a `UNetModel`."""
    modules: dict[str, Any] = dict(unet.named_modules())
    resnets = [module for module in modules.values() if isinstance(module, ResBlock)]
    transformers = [module for module in modules.values() if isinstance(module, SpatialTransformer)]
    norms = [norm for resnet in resnets for norm in (resnet.in_layers[0], resnet.out_layers[0])]
    return UNetParts(
        blocks={name: module for name, module in modules.items() if isinstance(module, BasicTransformerBlock)},
        video_norms=[*norms, modules["out.0"]],
        stages=[*resnets, *transformers],
    )


def model_sigmas(model: ModelPatcher) -> Tensor:
    """The model's noise level at each training timestep, ascending, [T]."""
    return sampling_of(model).sigmas


def sampling_of(model: ModelPatcher) -> Any:
    """The host's noise schedule of this model, as a model sampling node may have replaced it."""
    return model.get_model_object("model_sampling")


def prediction_type_of(model: ModelPatcher) -> PredictionType:
    """What the network predicts. Raises ValueError when neither noise nor velocity on a discrete schedule."""
    sampling = sampling_of(model)
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        # By the method, not the class: LCM and others derive from these and mean something else.
        denoise = getattr(type(sampling), "calculate_denoised", None)
        if denoise is comfy.model_sampling.V_PREDICTION.calculate_denoised:
            return "v_prediction"
        if denoise is comfy.model_sampling.EPS.calculate_denoised:
            return "epsilon"
    bases = "/".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ValueError(
        f"this MODEL's sampling is {bases}; Tune-A-Video needs one that predicts noise (epsilon) or velocity "
        "(v_prediction) on SD's timesteps. Remove the LCM or other model sampling node before it."
    )


def build_model(
    unet_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    prediction_type: PredictionType = "epsilon",
    heads: Mapping[str, int] | None = None,
) -> ModelPatcher:
    """A float32 MODEL of SD1.x form and any width, from a `UNetModel` configuration and its state dict.

    Args:
        heads: attention heads by name of transformer block, where they differ from the configuration's.
    Raises ValueError when names or shapes do not fit the configuration.
    """
    config = comfy.supported_models.SD15({**unet_config})
    config.unet_config = {**unet_config, "dtype": torch.float32}
    types = comfy.model_base.ModelType
    base = comfy.model_base.BaseModel(
        config, model_type=types.EPS if prediction_type == "epsilon" else types.V_PREDICTION
    )
    try:
        base.diffusion_model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit the UNet's configuration: {error}") from None
    blocks = parts_of(base.diffusion_model).blocks
    for name, count in (heads or {}).items():
        set_heads(blocks[name], count)
    return ModelPatcher(base, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def build_clip(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """A float32 CLIP of the host's CLIP-L class in another size; `config` as in its configuration files."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"dtype": torch.float32, "clip_l_model_config": dict(config)}
    clip = comfy.sd.CLIP(target, model_options=options)
    clip.cond_stage_model.clip_l.transformer.load_state_dict(weights)
    return clip


def build_vae(weights: Mapping[str, Tensor]) -> comfy.sd.VAE:
    """A VAE from its state dict, whose architecture the host recognises."""
    return comfy.sd.VAE(sd=dict(weights))


def set_heads(block: Any, heads: int) -> None:
    """Split a transformer block's width among another number of heads."""
    block.d_head = block.n_heads * block.d_head // heads
    block.n_heads = heads
    for attention in (block.attn1, block.attn2):
        attention.heads, attention.dim_head = heads, block.d_head


def published_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the 2D UNet's tensors in a diffusers folder → the host's names."""
    return comfy.utils.unet_to_diffusers(unet_config)


def own_names(model: ModelPatcher) -> dict[str, str]:
    """Published name → host's name of every tensor of this model's image UNet.

    Raises ValueError when it has one that published models do not.
    """
    own = shapes_of(model).keys()
    names = published_names(model.model.model_config.unet_config)
    names = {theirs: ours for theirs, ours in names.items() if ours in own}
    if missing := own - set(names.values()):
        raise ValueError(
            f"this MODEL's UNet has {len(missing)} tensors that published models do not have, the first is "
            f"{min(missing)}. Use a plain Stable Diffusion 1.x or 2.x checkpoint."
        )
    return names


def shapes_of(model: ModelPatcher) -> dict[str, torch.Size]:
    """The shape of every tensor of the model's UNet, by the host's names."""
    # Not from the modules: a host that loads weights only as they are needed leaves None there.
    return {key.removeprefix(UNET): entry[0][0].shape for key, entry in model.get_key_patches(UNET).items()}


def family_of(model: ModelPatcher) -> str:
    """What weights must share to fit each other, in words: the architecture and what the network predicts."""
    config = model.model.model_config.unet_config
    channels, context = config["model_channels"], config["context_dim"]
    names = {(320, 768): "Stable Diffusion 1.x", (320, 1024): "Stable Diffusion 2.x"}
    name = names.get((channels, context), f"a UNet of {channels} channels and text width {context}")
    return f"{name} ({prediction_type_of(model)})"


def fingerprint(model: ModelPatcher) -> str:
    """SHA-256, as hex, of the UNet's weights and of every patch on them: equal for models that compute the same.

    It reads gigabytes: some seconds for a full-size model.
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            # Cloned: an inference tensor that was cast outside of inference mode cannot be viewed.
            own = part.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(own.flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, (list, tuple)):
            digest.update(f"{len(part)}:".encode())
            for entry in part:
                add(entry)
        elif hasattr(part, "weights"):  # an adapter: LoRA, LoHa, …
            add((type(part).__name__, part.weights))
        else:
            digest.update((part.__qualname__ if callable(part) else repr(part)).encode())

    for key, ((weight, _convert), *patches) in sorted(model.get_key_patches(UNET).items()):
        add((key, weight, patches))
    return digest.hexdigest()


def load(model: ModelPatcher) -> None:
    """Have the host bring a model and what belongs to it onto its device."""
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])


# --- inflate ----------------------------------------------------------------------------------------------------


def inflation_of(model: ModelPatcher) -> Inflation:
    """What an inflated MODEL carries. Raises ValueError when it is not inflated."""
    inflation = model.attachments.get(KEY)
    if inflation is None:
        raise ValueError("this MODEL is not inflated: connect it through the Inflate UNet node first.")
    return inflation


def inflate(model: ModelPatcher, group_norm: str) -> ModelPatcher:
    """A clone of `model` whose UNet treats its batch as the frames of a video.

    Untuned, it differs from the image model by sparse-causal attention and by `group_norm` only.

    Raises ValueError for a model that is no SD1.x or SD2.x UNet, or is inflated already.
    """
    unet = unet_of(model)
    prediction_type_of(model)
    if KEY in model.attachments:
        raise ValueError("this MODEL is inflated already: connect the checkpoint's own MODEL to Inflate UNet.")
    temporal = TemporalLayers(parts_of(unet))
    temporal.reset()
    return with_inflation(model, Inflation(temporal, group_norm))


def with_inflation(model: ModelPatcher, inflation: Inflation) -> ModelPatcher:
    """A clone of `model` that carries `inflation`, instead of any that it had."""
    temporal = inflation.temporal.requires_grad_(False).to(inference_dtype(model))
    # A patcher of their own: the host counts, loads and offloads the new layers like any other model.
    patcher: Any = ModelPatcher(temporal, model.load_device, model.offload_device)
    if hasattr(patcher, "cached_patcher_init"):
        # Newer hosts rebuild a model for each further GPU through this factory.
        patcher.cached_patcher_init = (lambda *_args, **_kwargs: patcher.clone(), ())
    clone = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    clone.remove_wrappers_with_key(wrappers.DIFFUSION_MODEL, KEY)
    clone.remove_wrappers_with_key(wrappers.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, KEY, _video_call(temporal, inflation.group_norm))
    clone.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, _whole_video)
    clone.set_additional_models(KEY, [patcher])
    clone.set_attachments(KEY, inflation)
    return clone


def inference_dtype(model: ModelPatcher) -> Any:
    """The dtype in which the host runs the model's UNet."""
    base: Any = model.model
    return model.get_model_object("manual_cast_dtype") or base.get_dtype()


def _video_call(temporal: TemporalLayers, group_norm: str) -> Callable[..., Tensor]:
    """A wrapper that makes one UNet call a video call; everything it attaches is gone when it returns."""

    def wrapper(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        # The batch holds whole videos, one for each prompt that is computed in this call.
        videos = len(transformer_options.get("cond_or_uncond", (0,)))
        # The executor's own module, not the base model's: with several GPUs each has its copy.
        with inflated(parts_of(executor.class_obj), temporal, videos, x.shape[0] // videos, group_norm):
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    return wrapper


def _whole_video(executor, noise, *args, **kwargs):
    """A wrapper around one sampling run, any sampler's."""
    _refuse_context_windows(executor.class_obj.model_options, noise.shape[0])
    return executor(noise, *args, **kwargs)


# --- checks -----------------------------------------------------------------------------------------------------


def _refuse_context_windows(model_options: Mapping[str, Any], frames: int) -> None:
    handler = model_options.get("context_handler")
    if handler is None or getattr(handler, "dim", 0) != 0 or getattr(handler, "context_length", 0) >= frames:
        return
    raise ValueError(
        "context windows would cut the video into pieces, but Tune-A-Video's attention needs all its frames at "
        "once. Remove the context windows node from this MODEL."
    )


def check_inputs(
    model: ModelPatcher, latent: Mapping[str, Any], min_frames: int = 1, **prompts: Conditioning
) -> Tensor:
    """The clip's latents [f, c, h, w], after all that can be checked before long work begins was checked.

    Raises ValueError saying what is wrong, what was expected and what to do.
    """
    unet = unet_of(model)
    inflation = inflation_of(model)
    prediction_type_of(model)
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
            f"{LATENT_PIXELS * smallest} pixels a side. Make the clip larger."
        )
    _refuse_context_windows(model.model_options, frames)
    if channels != unet.in_channels:
        raise ValueError(
            f"the latents have {channels} channels, this MODEL's have {unet.in_channels}: encode the frames with "
            "the VAE of the same checkpoint."
        )
    if frames < min_frames:
        raise ValueError(
            f"the clip has {frames} frame{'s' * (frames != 1)}; at least {min_frames} are needed (the paper uses "
            "24 to 32). Raise count in Prepare Clip."
        )
    if not torch.isfinite(samples).all():
        raise ValueError("the latents hold NaN or infinite values: check the VAE (try it in fp32) and the frames.")
    if inflation.frames not in (None, frames):
        raise ValueError(
            f"this MODEL was tuned on {inflation.frames} frames, but the latents have {frames}: use the clip that "
            "it was tuned on, or tune on this one."
        )
    for name, conditioning in prompts.items():
        _check_conditioning(name, conditioning, unet, frames)
    return samples


def _check_conditioning(name: str, conditioning: Conditioning, unet: UNetModel, frames: int) -> None:
    if not conditioning:
        raise ValueError(f"{name} is empty: connect a CLIP Text Encode node.")
    width = next(block.attn2.to_k.in_features for block in parts_of(unet).blocks.values())
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


# --- tune -------------------------------------------------------------------------------------------------------


class _PlainOps:
    """Layers for a UNet of our own: torch's, without the host's casting and offloading."""

    Linear, Conv2d, Conv3d, GroupNorm, LayerNorm = nn.Linear, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm
    Embedding = nn.Embedding

    @staticmethod
    def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        return {2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class TrainingUNet:
    """A private, differentiable copy of an inflated MODEL: same architecture, own weights.

    The host's parameters are inference tensors, may be half-loaded, quantised or shared with other branches of
    the graph; here none of them is touched. Build and use it outside inference mode.

    Args:
        frames: f of every batch.
        precision: "fp32", or "bf16": frozen matrices in bfloat16 under autocast, all else in float32.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, model: ModelPatcher, frames: int, precision: str, gradient_checkpointing: bool):
        inflation = inflation_of(model)
        host_unet = unet_of(model)
        self.device = model.load_device
        self.autocast = precision == "bf16"
        frozen = torch.bfloat16 if self.autocast else torch.float32
        config = {**model.model.model_config.unet_config, "dtype": frozen}
        # On the meta device a UNet costs nothing; the weights are then assigned, not copied.
        operations: Any = _PlainOps
        self.unet = type(host_unet)(**config, device="meta", operations=operations)
        # Norms and biases stay in float32 too: not every device normalises in mixed precision.
        weights = {
            name: weight if trains(name) or weight.ndim == 1 else weight.to(frozen)
            for name, weight in effective_weights(model, self.device)
        }
        self.unet.load_state_dict(weights, strict=True, assign=True)
        self.unet.requires_grad_(False).eval()
        parts = parts_of(self.unet)
        # The host's UNet may have heads that its configuration cannot express.
        for name, block in parts_of(host_unet).blocks.items():
            set_heads(parts.blocks[name], block.n_heads)

        self.temporal = TemporalLayers(parts, device=self.device)
        self.temporal.assign(inflation.temporal.named())
        self.temporal.requires_grad_(False).eval()
        # It lives for one tune, so its hooks stay: a recomputation in the backward pass needs them too.
        attach(parts, self.temporal, 1, frames, inflation.group_norm)
        if gradient_checkpointing:
            checkpoint_stages(parts)

        named = {**dict(self.unet.named_parameters()), **self.temporal.named()}
        self.trainable = {name: parameter for name, parameter in named.items() if trains(name)}
        for parameter in self.trainable.values():
            parameter.requires_grad_()

    def __call__(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """Network output [f, c, h, w] for latents of the same shape, with text `context` [f, tokens, width]."""
        options = {"cond_or_uncond": [0], "optimized_attention_override": sdpa_override}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            t = torch.full((latents.shape[0],), float(timestep), device=latents.device)
            return self.unet(latents, t, context=context, transformer_options=options)


def effective_weights(model: ModelPatcher, device: torch.device):
    """Yield (name, float32 tensor of our own on `device`) of each UNet weight, as the host would run it.

    Patches (LoRA, merges, earlier tunes) are applied; the model itself is not loaded, patched or changed.
    """
    for key, ((weight, convert), *patches) in model.get_key_patches(UNET).items():
        own = convert(weight.detach().to(device, torch.float32, copy=True), inplace=True)
        if patches:
            own = comfy.lora.calculate_weight(patches, own, key)
        yield key.removeprefix(UNET), own


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the device has it in hardware, else fp32."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and comfy.model_management.should_use_bf16(device) else "fp32"
    return precision


def one_shot_tune(
    model: ModelPatcher,
    latent: Mapping[str, Any],
    caption: Conditioning,
    recipe: Recipe,
    precision: str,
    gradient_checkpointing: bool,
    on_step: Callable[[Step], None],
    draws=None,
) -> TunedWeights:
    """Tune an inflated model on one clip; the model itself is unchanged.

    Args:
        latent: LATENT of the clip, at least two frames.
        caption: CONDITIONING with one entry.
        precision: "auto", "fp32" or "bf16".
        on_step: called after each step. The host's interrupt is honoured after each step, too.
        draws: noise and timesteps; by default those of `recipe.seed`.
    """
    samples = check_inputs(model, latent, min_frames=2, caption=caption)
    if len(caption) != 1:
        raise ValueError(f"caption combines {len(caption)} prompts; tuning needs exactly one that describes the clip.")
    frames = samples.shape[0]
    inflation = inflation_of(model)
    prediction_type = prediction_type_of(model)
    device = model.load_device

    losses: list[float] = []

    def interruptible(step: Step) -> None:
        losses.append(step.loss)
        on_step(step)
        comfy.model_management.throw_exception_if_processing_interrupted()

    # Nodes run in inference mode, where nothing can be differentiated; tensors made in it stay so for ever.
    with torch.inference_mode(False), torch.enable_grad():
        latents = model.model.process_latent_in(samples.detach().clone()).to(device, torch.float32)
        context = caption[0][0].detach().clone().to(device, torch.float32).expand(frames, -1, -1)
        sigmas = model_sigmas(model).detach().clone().cpu()
        if device.type != "cpu":
            comfy.model_management.unload_all_models()
        network = TrainingUNet(model, frames, resolve_precision(precision, device), gradient_checkpointing)
        before = {name: p.detach().clone() for name, p in network.trainable.items() if ".attn_temp." not in name}
        count = sum(parameter.numel() for parameter in network.trainable.values())
        log.info("Tune-A-Video: tuning %.2f M parameters on %d frames", count / 1e6, frames)
        tune(
            predict=lambda noisy, timestep: network(noisy, timestep, context),
            trainable=network.trainable,
            latents=latents,
            sigmas=sigmas,
            prediction_type=prediction_type,
            recipe=recipe,
            draws=draws if draws is not None else draw(latents.shape, len(sigmas), recipe.seed),
            on_step=interruptible,
        )
        height, width = (LATENT_PIXELS * side for side in samples.shape[2:])
        return TunedWeights(
            queries={name: difference(network.trainable[name].detach(), old).cpu() for name, old in before.items()},
            temporal={name: p.detach().cpu().clone() for name, p in network.temporal.named().items()},
            frames=frames,
            group_norm=inflation.group_norm,
            losses=losses,
            base_family=family_of(model),
            base_fingerprint=fingerprint(model),
            size=(width, height),
            recipe=recipe,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def apply_weights(
    model: ModelPatcher, weights: TunedWeights, motion: float = 1.0, content: float = 1.0
) -> ModelPatcher:
    """A clone of a model, inflated or not, with tuned weights; the host patches its own, and only while it is loaded.

    Args:
        motion: strength of the temporal attention.
        content: strength of the change in the queries.
    Raises ValueError when the weights belong to another UNet.
    """
    temporal = TemporalLayers(parts_of(unet_of(model)))
    temporal.assign(weights.temporal)
    shapes = shapes_of(model)
    if wrong := [name for name, delta in weights.queries.items() if shapes.get(name) != delta.shape]:
        raise ValueError(
            f"{len(wrong)} of {len(weights.queries)} tuned queries do not fit this MODEL, the first is {min(wrong)}. "
            "Use weights that were tuned on this model's family."
        )
    for layer in temporal.layers:
        for parameter in layer.attn_temp.to_out.parameters():
            parameter.data *= motion
    tuned = with_inflation(model, Inflation(temporal, weights.group_norm, weights.frames))
    patches = {f"{UNET}{name}": ("diff", (delta,)) for name, delta in weights.queries.items()}
    tuned.add_patches(patches, strength_patch=content)
    return tuned


def check_base(model: ModelPatcher, weights: TunedWeights) -> None:
    """Whether weights may be applied to a model; another base of the same family is only noted in the log.

    Raises ValueError for another family, naming both, and for a model that carries other tuned weights.
    """
    family = family_of(model)
    if weights.base_family not in ("", family):
        raise ValueError(
            f"these weights were tuned on {weights.base_family}, this MODEL is {family}: use a checkpoint of their "
            "family."
        )
    if weights.base_fingerprint == fingerprint(model):
        return
    if _is_tuned(model):
        raise ValueError(
            "this MODEL has other tuned weights already: connect the MODEL from before One-Shot Tune or Apply Weights."
        )
    log.info("Tune-A-Video: the weights were tuned on another base of this family (%s)", family)


def _is_tuned(model: ModelPatcher) -> bool:
    inflation = model.attachments.get(KEY)
    # An untuned layer's output is zero.
    return inflation is not None and any(layer.attn_temp.to_out[0].weight.any() for layer in inflation.temporal.layers)


# --- files ------------------------------------------------------------------------------------------------------


def weights_folder() -> Path:
    """Where new files go."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def weights_list() -> list[str]:
    """Names of the weights files that can be loaded, in all folders."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if _found(name)]


def published_list() -> list[str]:
    """Names of the folders and single files that may hold a published model, in all folders."""
    names = set()
    for folder in folder_paths.get_folder_paths(FOLDER):
        inside, _ = folder_paths.recursive_search(folder)
        names |= set(published.sources(inside))
    return sorted(name for name in names if _found(name))


def find(name: str) -> Path:
    """The file or folder of a name from a list. Raises ValueError when it is not there, or not inside our folders."""
    for folder in folder_paths.get_folder_paths(FOLDER):
        path = files.inside(Path(folder), name)
        if path.is_file() or path.is_dir():
            return path
    raise ValueError(
        f"there is no {name[:80]!r} in models/{FOLDER}: put it there, or in a folder that extra_model_paths.yaml names "
        f"as {FOLDER}."
    )


def problem_with(name: str | None) -> bool | str:
    """True when a name can be read, else why not; a name that another node will make is not known yet (None)."""
    try:
        return name is None or bool(find(name))
    except ValueError as error:
        return str(error)


def _found(name: str) -> bool:
    return problem_with(name) is True


def stamp(name: str) -> str:
    """Changes when the file, or any file of the folder, is another or was written to. Raises ValueError as `find`."""
    path = find(name)
    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    stats = [file.stat() for file in inside if file.is_file()]
    return str([(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats])


def save_weights(weights: TunedWeights, prefix: str, precision: str) -> str:
    """Write a new weights file; its name, as `load_weights` takes it."""
    path = files.numbered(weights_folder(), prefix, ".safetensors")
    save_file(weights, path, precision)
    return path.relative_to(weights_folder()).as_posix()


def load_weights(name: str) -> TunedWeights:
    """Read a weights file. Raises ValueError when it is none."""
    path = find(name)
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name} is not a .safetensors file: choose a file that Save Weights wrote.")
    return load_file(path)


def import_published(model: ModelPatcher, name: str) -> tuple[TunedWeights, str]:
    """A published model as weights for this base, and a report of what else differs from the base.

    Raises ValueError as `find` and `read_published` do.
    """
    weights, report = read_published(model, find(name))
    log.info("Tune-A-Video: %s: %s", name, report)
    return weights, report


def read_published(model: ModelPatcher, path: Path) -> tuple[TunedWeights, str]:
    """`import_published` of a folder or file anywhere.

    Raises ValueError when it is no published Tune-A-Video model, or of another shape.
    """
    parts = parts_of(unet_of(model))
    family = family_of(model)
    names = own_names(model)
    tensors, config = published.read(path)
    if config is not None:
        published.check_config(config, {name: block.n_heads for name, block in parts.blocks.items()}, names)
    layers = TemporalLayers(parts, device="meta").named()
    shapes = shapes_of(model) | {name: parameter.shape for name, parameter in layers.items()}
    base = effective_weights(model, torch.device("cpu"))
    queries, temporal, report = published.to_weights(tensors, names, shapes, base)
    weights = TunedWeights(
        queries, temporal, frames=None, group_norm="video", base_family=family, base_fingerprint=fingerprint(model)
    )
    return weights, report


def export_published(model: ModelPatcher, weights: TunedWeights, prefix: str) -> str:
    """Write a base with its weights as a published model into a new folder; its name.

    Raises ValueError when they do not fit each other, or the disk does not take them.
    """
    folder = files.numbered(weights_folder(), prefix)
    check_base(model, weights)
    write_published(model, weights, folder)
    if weights.group_norm != "video":
        log.warning("Tune-A-Video: these weights were tuned with group norm per frame, which the paper's code has not")
    return folder.relative_to(weights_folder()).as_posix()


def write_published(model: ModelPatcher, weights: TunedWeights, folder: Path) -> None:
    """Write a base with its weights, in float32, into a folder anywhere. Raises ValueError as `export_published`."""
    apply_weights(model, weights)  # for its checks of names and shapes
    names = own_names(model)
    heads = {name: block.n_heads for name, block in parts_of(unet_of(model)).blocks.items()}
    config = published.config_of(model.model.model_config.unet_config, heads, names)
    tensors = published.from_weights(weights, names, effective_weights(model, torch.device("cpu")))
    published.write(folder, config, tensors)


# --- invert and sample ------------------------------------------------------------------------------------------


def run_sampler(
    model: ModelPatcher,
    samples: Tensor,
    sigmas: Tensor,
    positive: Conditioning,
    negative: Conditioning,
    cfg: float,
    callback: Callable[[int, Tensor, Tensor, int], None],
) -> Tensor:
    """Follow `sigmas` with `ddim.sample_ddim` through the host's guider; LATENT samples in, LATENT samples out.

    Args:
        callback: the host's: step, denoised, x, number of steps. Called before each step is taken.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def interruptible(*args: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        callback(*args)

    out = guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(ddim.sample_ddim),
        sigmas,
        callback=interruptible,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return out.to(comfy.model_management.intermediate_device())


def invert(
    model: ModelPatcher, latent: Mapping[str, Any], prompt: Conditioning, steps: int, callback=None
) -> tuple[dict[str, Any], InvertedNoise, Tensor]:
    """DDIM inversion of a clip: the noisy LATENT, the same as NOISE for the core's custom sampler, and its SIGMAS.

    The LATENT is in sigma space, as the host's own samplers leave unfinished latents. The sigmas descend to 0.
    """
    samples = check_inputs(model, latent, prompt=prompt)
    sigmas = ddim.ddim_sigmas(model_sigmas(model), steps)
    out = run_sampler(model, samples, sigmas, prompt, prompt, 1.0, callback or preview_callback(model, steps))
    inverted = {"samples": out, KEY: {"steps": steps}}
    descending = torch.cat([sigmas[1:].flip(0), sigmas.new_zeros(1)])
    return inverted, InvertedNoise(model, out, float(sigmas[-1])), descending


def sample_video(
    model: ModelPatcher,
    latent: Mapping[str, Any],
    positive: Conditioning,
    negative: Conditioning,
    steps: int,
    cfg: float,
    callback=None,
) -> dict[str, Any]:
    """DDIM sampling from inverted latents; LATENT of the edited clip."""
    samples = check_inputs(model, latent, positive=positive, negative=negative)
    sigmas = ddim.ddim_sigmas(model_sigmas(model), steps).flip(0)
    _check_inverted(model, latent, steps, float(sigmas[0]))
    out = run_sampler(model, samples, sigmas, positive, negative, cfg, callback or preview_callback(model, steps))
    return {"samples": out}


def _check_inverted(model: ModelPatcher, latent: Mapping[str, Any], steps: int, sigma: float) -> None:
    if KEY not in latent:  # noise of another origin, or what a user took for it
        spread = float(model.model.process_latent_in(latent["samples"]).float().std())
        if spread < sigma / 2:
            raise ValueError(
                f"these latents are not noise (their standard deviation is {spread:.1f}, {steps} steps start at "
                f"{sigma:.1f}): connect the inverted latents of DDIM Invert."
            )
    elif (inverted_steps := latent[KEY]["steps"]) != steps:
        raise ValueError(
            f"the latents were inverted in {inverted_steps} steps, but steps is {steps} here: the noise levels would "
            "not meet. Use the same number in both nodes."
        )


class InvertedNoise:
    """NOISE from which the core's samplers start at the inverted latents, whatever latent image they are given."""

    seed = 0

    def __init__(self, model: ModelPatcher, inverted: Tensor, sigma: float):
        self.model, self.inverted, self.sigma = model, inverted, sigma

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor:
        """The noise that the host scales and adds to `latent` to get the inverted latents.

        Raises ValueError when the latents are of another shape.
        """
        image = latent["samples"]
        if image.shape != self.inverted.shape:
            raise ValueError(
                f"the NOISE was inverted from latents of shape {tuple(self.inverted.shape)}, the latent image has "
                f"{tuple(image.shape)}: both need the same frames and size."
            )
        sampling = sampling_of(self.model)
        at_top = abs(self.sigma / float(sampling.sigma_max) - 1) < 1e-5
        unit = sampling.noise_scaling(torch.tensor(self.sigma), torch.ones(1), torch.zeros(1), at_top)
        process_in = self.model.model.process_latent_in
        # The host leaves an all-zero latent image as it is.
        start = process_in(image) if torch.count_nonzero(image) else image
        return (process_in(self.inverted) - start.to(self.inverted)) / unit.to(self.inverted)


# --- progress ---------------------------------------------------------------------------------------------------


def preview_callback(model: ModelPatcher, steps: int) -> Callable[[int, Tensor, Tensor, int], None]:
    """The host's progress bar and latent preview for a sampling run."""
    return latent_preview.prepare_callback(model, steps)


def progress(steps: int) -> Callable[[int, Any], None]:
    """The host's progress bar: call with the number of finished steps and a PIL picture (or None) to show."""
    bar = comfy.utils.ProgressBar(steps)

    def update(done: int, picture: Any = None) -> None:
        bar.update_absolute(done, steps, ("JPEG", picture, 512) if picture is not None else None)

    return update
