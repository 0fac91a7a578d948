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
- `comfy.model_management`: devices, memory, interrupt. `comfy.utils.ProgressBar`, `latent_preview`,
  `server.PromptServer.send_progress_text`: progress.
- `comfy.model_base.BaseModel`, `comfy.supported_models.SD15`, `comfy.sd.CLIP`, `comfy.sd.VAE`, `comfy.sd1_clip`,
  `comfy.supported_models_base.ClipTarget`, `comfy.utils.unet_to_diffusers`: small models of one's own, in published
  naming.
- `folder_paths`: the folder of weights files, `models/tune_a_video`, as extra_model_paths.yaml may add to it; the user
  folder, where saved states are kept.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
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

from . import ddim, files, published, runs
from . import memory as memories
from .attention import sdpa_override
from .digest import digest
from .inflation import TemporalLayers, UNetParts, attach, checkpoint_stages, inflated
from .tuning import Draws, PredictionType, Recipe, Step, Training, reports_of, trains, weights_of
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
    patches = sorted(model.get_key_patches(UNET).items())
    return digest([(key, weight, more) for key, ((weight, _convert), *more) in patches])


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


class _Fixed(nn.Module):
    """In place of a projection whose input never changes: its output, [1 or f, tokens, width]."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, context: Tensor) -> Tensor:
        return self.output.expand(context.shape[0], -1, -1)


class TrainingUNet:
    """A private, differentiable copy of an inflated MODEL: same architecture, own weights.

    The host's parameters are inference tensors, may be half-loaded, quantised or shared with other branches of
    the graph; here none of them is touched. Build and use it outside inference mode.

    Args:
        frames: f of every batch.
        precision: "fp32", or "bf16": frozen matrices in bfloat16 under autocast, all else in float32.
        gradient_checkpointing: recompute activations in the backward pass.
        blank: have no values, on the meta device, for `memory.estimate`.
    """

    def __init__(
        self, model: ModelPatcher, frames: int, precision: str, gradient_checkpointing: bool, blank: bool = False
    ):
        inflation = inflation_of(model)
        host_unet = unet_of(model)
        self.device = torch.device("cpu") if blank else model.load_device
        self.autocast = precision == "bf16"
        frozen = torch.bfloat16 if self.autocast else torch.float32
        config = {**model.model.model_config.unet_config, "dtype": frozen}
        # On the meta device a UNet costs nothing; the weights are then assigned, not copied.
        operations: Any = _PlainOps
        self.unet = type(host_unet)(**config, device="meta", operations=operations)
        source = self.unet.float().state_dict().items() if blank else effective_weights(model, self.device)
        # Norms and biases stay in float32 too: not every device normalises in mixed precision.
        weights = {name: weight if trains(name) or weight.ndim == 1 else weight.to(frozen) for name, weight in source}
        self.unet.load_state_dict(weights, strict=True, assign=True)
        self.unet.requires_grad_(False).eval()
        parts = parts_of(self.unet)
        # The host's UNet may have heads that its configuration cannot express.
        for name, block in parts_of(host_unet).blocks.items():
            set_heads(parts.blocks[name], block.n_heads)

        self.temporal = TemporalLayers(parts, device="meta" if blank else self.device)
        if not blank:
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

    def fix_text(self, context: Tensor) -> None:
        """Compute the text's keys and values once, for all steps, and let go of the weights that make them.

        Args:
            context: [1 or f, tokens, width]; calls must pass its first dimension expanded to f.
        """
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            for block in parts_of(self.unet).blocks.values():
                block.attn2.to_k = _Fixed(block.attn2.to_k(context))
                block.attn2.to_v = _Fixed(block.attn2.to_v(context))

    def __call__(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """Network output [f, c, h, w] for latents of the same shape, with text `context` [f, tokens, width]."""
        options = {"cond_or_uncond": [0], "optimized_attention_override": sdpa_override}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            t = torch.full((latents.shape[0],), float(timestep), device=latents.device)
            return self.unet(latents, t, context=context, transformer_options=options)


def estimate_step(
    model: ModelPatcher, shape: torch.Size, tokens: int, precision: str, gradient_checkpointing: bool
) -> memories.Estimate:
    """Peak memory of a training step of an inflated model on latents of `shape`, with a caption of `tokens`."""
    width = next(iter(parts_of(unet_of(model)).blocks.values())).attn2.to_k.in_features
    network = TrainingUNet(model, shape[0], precision, gradient_checkpointing, blank=True)

    def loss() -> Tensor:
        context = torch.empty(1, tokens, width)
        network.fix_text(context)
        return network(torch.empty(shape), 0, context.expand(shape[0], -1, -1)).float().square().mean()

    with torch.inference_mode(False), torch.enable_grad():
        return memories.estimate([network.unet, network.temporal], loss, model.load_device.type == "cuda")


def effective_weights(model: ModelPatcher, device: torch.device, wanted: Callable[[str], bool] = lambda _name: True):
    """Yield (name, float32 tensor of our own on `device`) of each `wanted` UNet weight, as the host would run it.

    Patches (LoRA, merges, earlier tunes) are applied; the model itself is not loaded, patched or changed.
    """
    for key, ((weight, convert), *patches) in model.get_key_patches(UNET).items():
        if not wanted(key):
            continue
        own = convert(weight.detach().to(device, torch.float32, copy=True), inplace=True)
        if patches:
            own = comfy.lora.calculate_weight(patches, own, key)
        yield key.removeprefix(UNET), own


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the device has it in hardware, else fp32."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and comfy.model_management.should_use_bf16(device) else "fp32"
    return precision


@dataclass(frozen=True)
class Saving:
    """Whether and how a tune's state is kept on disk.

    Attributes:
        folder: where (`runs_folder`).
        every: steps between two saves; it is also saved at Cancel, at an error and at the end.
        restart: begin anew, even if a saved state could be continued.
    """

    folder: Path
    every: int = 50
    restart: bool = False


@dataclass(frozen=True)
class Validation:
    """An edit to sample while a tune runs, to be looked at; it changes nothing of the tune.

    Attributes:
        positive: CONDITIONING of the edit.
        negative: CONDITIONING of empty text, for inversion and guidance; zeros stand in for it when None.
        every: steps between two samples.
        show: called with the step and the frames as PIL pictures.
    """

    positive: Conditioning
    negative: Conditioning | None
    every: int
    show: Callable[[int, list[Any]], None]


VALIDATION_STEPS = 10  # of DDIM, both ways: enough to judge an edit, for about the price of ten training steps
VALIDATION_CFG = 12.5


def runs_folder() -> Path:
    """Where saved states of tunes are kept: in the host's user folder, which survives restarts."""
    return Path(folder_paths.get_user_directory()) / "tune_a_video" / "runs"


def one_shot_tune(
    model: ModelPatcher,
    latent: Mapping[str, Any],
    caption: Conditioning,
    recipe: Recipe,
    precision: str,
    gradient_checkpointing: bool,
    on_step: Callable[[Step], None],
    draws: Callable[[], Iterator[tuple[Tensor, int]]] | None = None,
    *,
    saving: Saving | None = None,
    memory: str | None = None,
    validation: Validation | None = None,
    tell: Callable[[str], None] = log.info,
) -> TunedWeights:
    """Tune an inflated model on one clip; the model itself is unchanged.

    Args:
        latent: LATENT of the clip, at least two frames.
        caption: CONDITIONING with one entry.
        precision: "auto", "fp32" or "bf16".
        on_step: called after each step, and at once for each step that a saved state holds. The host's interrupt is
            honoured after each step, too.
        draws: makes noise and timesteps, those of `recipe.seed` by default. With others a tune cannot be saved.
        saving: None saves nothing.
        memory: "auto", "fast" or "low" estimates first and decides on checkpointing (`memory.plan`); None trusts
            `gradient_checkpointing`.
        validation: None samples nothing.
        tell: called with what the user should know: resumed, reused, not saved, out of memory.
    Raises:
        MemoryError: it does not fit, by the estimate or in fact.
        FloatingPointError: the loss is not finite.
    """
    prompts = {"caption": caption}
    if validation is not None:
        prompts["validation_prompt"] = validation.positive
        if validation.negative is not None:
            prompts["validation_negative"] = validation.negative
    samples = check_inputs(model, latent, min_frames=2, **prompts)
    if len(caption) != 1:
        raise ValueError(f"caption combines {len(caption)} prompts; tuning needs exactly one that describes the clip.")
    device = model.load_device
    precision = resolve_precision(precision, device)

    # Nodes run in inference mode, where nothing can be differentiated; tensors made in it stay so for ever.
    with torch.inference_mode(False), torch.enable_grad():
        latents = model.model.process_latent_in(samples.detach().clone()).to(device, torch.float32)
        context = caption[0][0].detach().clone().to(device, torch.float32)
        sigmas = model_sigmas(model).detach().clone().cpu()
        identity = fingerprint(model)

        def signed(weights: TunedWeights) -> TunedWeights:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            return replace(weights, base_fingerprint=identity, date=now)

        run = state = None
        if saving is not None:
            key = _run_key(model, identity, latents, context, sigmas, recipe, precision)
            run = runs.Run(saving.folder, key, recipe.steps)
            state = None if saving.restart else run.load()
        reports = [] if state is None else reports_of(state)
        for report in reports:
            on_step(report)
        if state is not None:
            if len(reports) == recipe.steps:
                tell(f"reused: all {recipe.steps} steps were saved")
                return signed(_result(model, weights_of(state), reports, recipe, latents.shape))
            tell(f"resumed after step {len(reports)}")
        if device.type != "cpu":
            comfy.model_management.unload_all_models()
        free_memory()
        if memory is not None:
            gradient_checkpointing = _plan(model, latents.shape, context.shape[1], precision, memory)
        every = recipe.steps if saving is None else saving.every
        tune = _Tune(
            model, latent, latents, context, sigmas, recipe, precision, draws, run, every, validation, on_step, tell
        )
        for checkpointing in (True,) if gradient_checkpointing else (False, True):
            weights = None
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                weights = tune.attempt(checkpointing, state)
            free_memory()  # here, where no traceback holds the network any more
            if weights is not None:
                return signed(weights)
            state = run and run.load()
            if not checkpointing:
                start = f"from step {len(reports_of(state))}" if state else "from the start"
                tell(f"out of memory; tried again with gradient checkpointing, {start}")
        raise MemoryError(
            "the device ran out of memory even with gradient checkpointing. Use fewer frames or a smaller size, or "
            "close what else uses the device; the same graph then runs as usual."
        )


@dataclass
class _Tune:
    """One call of `one_shot_tune`: what stays the same if it is tried again with less memory.

    Attributes:
        latents, context, sigmas: in the model's space, float32; the sigmas on the CPU.
        run: where the state is saved after every `save_every` steps; None saves nothing.
        saved, last_save: the step whose state is on disk, and the last one that should be.
    """

    model: ModelPatcher
    latent: Mapping[str, Any]
    latents: Tensor
    context: Tensor
    sigmas: Tensor
    recipe: Recipe
    precision: str
    draws: Callable[[], Iterator[tuple[Tensor, int]]] | None
    run: runs.Run | None
    save_every: int
    validation: Validation | None
    on_step: Callable[[Step], None]
    tell: Callable[[str], None]
    saved: int = 0
    last_save: int = 0

    def attempt(self, gradient_checkpointing: bool, state: dict[str, Tensor] | None) -> TunedWeights:
        """Train to the end, from the start or from `state`, which is used up by this."""
        frames = self.latents.shape[0]
        network = TrainingUNet(self.model, frames, self.precision, gradient_checkpointing)
        network.fix_text(self.context)
        draws = Draws(self.latents.shape, len(self.sigmas), self.recipe.seed) if self.draws is None else self.draws()
        training = Training(network.trainable, self.recipe, draws)
        if state is not None:
            training.restore(state)
            state.clear()  # a gigabyte
        self.saved = self.last_save = len(training.reports)
        count = sum(parameter.numel() for parameter in network.trainable.values())
        log.info("Tune-A-Video: tuning %.2f M parameters on %d frames", count / 1e6, frames)
        text = self.context.expand(frames, -1, -1)

        def after_step(step: Step) -> None:
            self.on_step(step)
            if step.number % self.save_every == 0:
                self.save(training)
            if self.validation is not None and step.number % self.validation.every == 0:
                self.validate(training, self.validation)
            comfy.model_management.throw_exception_if_processing_interrupted()

        try:
            training.run(
                lambda noisy, timestep: network(noisy, timestep, text),
                self.latents,
                self.sigmas,
                prediction_type_of(self.model),
                after_step,
            )
        finally:
            self.save(training)  # at the end, at Cancel and at an error alike
        return self.result(training)

    def save(self, training: Training) -> None:
        """Save the state, if there is a new and whole one. A full disk is told, and does not stop the tune."""
        step = len(training.reports)
        if self.run is None or step == self.last_save or not training.whole:
            return
        self.last_save = step
        try:
            self.run.save(training.state(), step)
            self.saved = step
        except OSError as error:
            older = f"the saved state of step {self.saved} stays" if self.saved else "nothing is saved yet"
            self.tell(f"step {step} could not be saved ({error}); tuning goes on, {older}")

    def validate(self, training: Training, validation: Validation) -> None:
        """Sample the edit with the present weights, and show it. Out of memory ends the previews, not the tune."""
        step, pictures = len(training.reports), None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            pictures = _sample_edit(self.model, self.latent, self.result(training), validation)
        if self.model.load_device.type != "cpu":
            comfy.model_management.unload_all_models()
        free_memory()
        if pictures is None:
            self.validation = None
            self.tell(f"no preview at step {step}: out of memory; tuning goes on without previews")
        else:
            validation.show(step, pictures)

    def result(self, training: Training) -> TunedWeights:
        """What was learned so far."""
        trained = {name: parameter.detach() for name, parameter in training.trainable.items()}
        return _result(self.model, trained, training.reports, self.recipe, self.latents.shape)


def _sample_edit(
    model: ModelPatcher, latent: Mapping[str, Any], weights: TunedWeights, validation: Validation
) -> list[Any]:
    """Invert the clip and sample the edit with these weights, as the nodes do; rough pictures of its frames."""
    with torch.inference_mode():
        tuned = apply_weights(model, weights)
        negative = validation.negative
        if negative is None:
            negative = [[torch.zeros_like(validation.positive[0][0]), {}]]

        def silent(*_args: Any) -> None: ...

        inverted, _noise, _sigmas = invert(tuned, latent, negative, VALIDATION_STEPS, silent)
        video = sample_video(tuned, inverted, validation.positive, negative, VALIDATION_STEPS, VALIDATION_CFG, silent)
        return pictures_of(model, video["samples"])


def _plan(model: ModelPatcher, shape: torch.Size, tokens: int, precision: str, mode: str) -> bool:
    """Whether to use gradient checkpointing, from an estimate and the host's free memory. See `memory.plan`."""

    def estimate(gradient_checkpointing: bool) -> memories.Estimate:
        return estimate_step(model, shape, tokens, precision, gradient_checkpointing)

    free: Any = comfy.model_management.get_free_memory(model.load_device)
    frames, _channels, height, width = shape
    try:
        return memories.plan(mode, estimate, free, frames, LATENT_PIXELS * width, LATENT_PIXELS * height)
    except RuntimeError as error:  # fake tensors do not know every build of torch: no reason not to tune
        log.warning("Tune-A-Video: memory could not be estimated (%s)", error)
        return mode != "fast"


def free_memory() -> None:
    """Give back to the device what no one uses any more; a network and its hooks refer to each other."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _run_key(
    model: ModelPatcher, identity: str, latents: Tensor, context: Tensor, sigmas: Tensor, recipe: Recipe, precision: str
) -> str:
    """What determines a tune's result beside its number of steps, as a digest.

    Gradient checkpointing is left out: it computes the same in another order of work.
    """
    unet, inflation = unet_of(model), inflation_of(model)
    return digest(
        {
            "model": identity,
            "config": repr(sorted(model.model.model_config.unet_config.items())),
            "heads": {name: block.n_heads for name, block in parts_of(unet).blocks.items()},
            "temporal": inflation.temporal.named(),
            "group_norm": inflation.group_norm,
            "latents": latents,
            "context": context,
            "sigmas": sigmas,
            "prediction_type": prediction_type_of(model),
            "recipe": {name: value for name, value in asdict(recipe).items() if name != "steps"},
            "precision": precision,
        }
    )


def _result(
    model: ModelPatcher, trained: Mapping[str, Tensor], reports: list[Step], recipe: Recipe, shape: torch.Size
) -> TunedWeights:
    """Trained tensors, by name, as what they change in `model`; `shape` is the latents'."""
    inflation = inflation_of(model)
    base = effective_weights(model, model.load_device, trains)
    frames, _channels, height, width = shape
    return TunedWeights(
        queries={name: difference(trained[name].to(old), old).cpu() for name, old in base},
        temporal={
            name: trained.get(name, tensor).detach().to("cpu", torch.float32, copy=True)
            for name, tensor in inflation.temporal.named().items()
        },
        frames=frames,
        group_norm=inflation.group_norm,
        losses=[report.loss for report in reports],
        base_family=family_of(model),
        size=(LATENT_PIXELS * width, LATENT_PIXELS * height),
        recipe=recipe,
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


def pictures_of(model: ModelPatcher, samples: Tensor) -> list[Any]:
    """LATENT samples as rough PIL pictures, one a frame, by the host's previewer: no VAE is loaded."""
    latent_format = model.get_model_object("latent_format")
    previewer: Any = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None:  # the user has switched previews of sampling off, but asked for these
        previewer = latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors)
    x0 = model.model.process_latent_in(samples).to(model.load_device)
    return [previewer.decode_latent_to_preview(frame[None]) for frame in x0]


def progress(steps: int) -> Callable[[int, Any], None]:
    """The host's progress bar: call with the number of finished steps and a PIL picture (or None) to show."""
    bar = comfy.utils.ProgressBar(steps)

    def update(done: int, picture: Any = None) -> None:
        bar.update_absolute(done, steps, ("JPEG", picture, max(picture.size)) if picture is not None else None)

    return update


def progress_text(node_id: str | None, text: str) -> None:
    """Show `text` in a node of the page, where a server runs."""
    # Imported here: the server module starts half of the host, and tests and tools work without it.
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
