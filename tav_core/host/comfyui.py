"""What this pack asks of ComfyUI, and the only module that imports it; `video` and `build` use it through this one.

What is used is listed in `symbols`, by what for, and looked up when this module is imported. Where something is
missing, `LOST` says what; this module can be imported still, and `nodes` refuses to run what needs it.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..method import ddim
from ..method.guidance import Source
from ..method.inflation import UNetParts
from ..method.tuning import PredictionType
from ..store.digest import digest
from . import drift
from .symbols import ATTENTION, NEEDS, OPENAI

Conditioning = list[list[Any]]
KEY = "tune_a_video"
UNET = "diffusion_model."
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "invalid buffer size")
FOLDER = "tune_a_video"
LATENT_PIXELS = 8  # width and height of what one latent stands for
# Classes of the host whose UNet reads a vector beside the text, as SDXL's, and cannot be inflated all the same.
OTHERS = {
    "SDXLRefiner": "the SDXL refiner",
    "SVD_img2vid": "Stable Video Diffusion",
    "SV3D_u": "Stable Video 3D",
    "SV3D_p": "Stable Video 3D",
    "SD21UNCLIP": "unCLIP",
}

LOST = {need: drift.lost(names) for need, names in NEEDS.items()}  # imports of the host what is there

if TYPE_CHECKING:
    import comfy.clip_model
    import comfy.clip_vision
    import comfy.ldm.modules.attention
    import comfy.lora
    import comfy.model_base
    import comfy.model_management
    import comfy.model_sampling
    import comfy.patcher_extension
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.supported_models_base
    import comfy.utils
    import folder_paths
    import latent_preview
    from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
    from comfy.model_patcher import ModelPatcher
else:  # None for what is missing: no node runs that needs it
    comfy, folder_paths, latent_preview = map(drift.found, ("comfy", "folder_paths", "latent_preview"))
    BasicTransformerBlock, SpatialTransformer, ResBlock, UNetModel, ModelPatcher = map(
        drift.found,
        (
            f"{ATTENTION}:BasicTransformerBlock",
            f"{ATTENTION}:SpatialTransformer",
            f"{OPENAI}:ResBlock",
            f"{OPENAI}:UNetModel",
            "comfy.model_patcher:ModelPatcher",
        ),
    )

if not LOST["files"]:
    # After those of extra_model_paths.yaml, which the host has read by now: new files go to the first folder.
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


# --- models -----------------------------------------------------------------------------------------------------


def unet_of(model: ModelPatcher) -> UNetModel:
    """The model's UNet. Raises ValueError, naming what it is, unless it is of Stable Diffusion 1.x, 2.x or XL."""
    unet = getattr(model.model, "diffusion_model", None)
    kind = type(model.model).__name__
    wanted = "Tune-A-Video needs a Stable Diffusion 1.x, 2.x or XL checkpoint."
    if not isinstance(unet, UNetModel):
        raise ValueError(f"this MODEL is a {kind} ({type(unet).__name__}), not a Stable Diffusion UNet. {wanted}")
    if unet.num_classes is not None and not isinstance(model.model, comfy.model_base.SDXL):
        raise ValueError(f"this MODEL is {OTHERS.get(kind, f'a {kind} with extra conditioning')}. {wanted}")
    channels = model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"this MODEL's UNet takes {unet.in_channels} channels instead of {channels}: it is an inpainting, "
            f"instruct or upscale model. {wanted}"
        )
    for name, weight in unet.named_parameters():
        # Packed ones, as GGUF's, are whole numbers, or claim another shape than they have.
        if not weight.is_floating_point() or weight.size() != weight.shape:
            raise ValueError(
                f"this MODEL's weights are quantised ({name} is a {type(weight.data).__name__} of {weight.dtype}), and "
                "Tune-A-Video needs plain ones. Use the fp16 checkpoint."
            )
    return unet


def parts_of(unet: nn.Module) -> UNetParts:
    """Where to attach in a `UNetModel`."""
    modules: dict[str, Any] = dict(unet.named_modules())
    resnets = [module for module in modules.values() if isinstance(module, ResBlock)]
    transformers = [module for module in modules.values() if isinstance(module, SpatialTransformer)]
    norms = [norm for resnet in resnets for norm in (resnet.in_layers[0], resnet.out_layers[0])]
    blocks = {name: module for name, module in modules.items() if isinstance(module, BasicTransformerBlock)}
    return UNetParts(
        blocks=blocks,
        video_norms=[*norms, modules["out.0"]],
        stages=[*resnets, *transformers],
        last=frozenset(
            f"{name}.transformer_blocks.{len(module.transformer_blocks) - 1}"
            for name, module in modules.items()
            if isinstance(module, SpatialTransformer)
        ),
        decoder=frozenset(name for name in blocks if name.startswith("output_blocks.")),
        layout=_layout(unet),
    )


def _layout(unet: Any) -> Any:
    """Of the decoder's second level, the middle residual block: in Stable Diffusion, output block 4."""
    level = 0
    levels: list[list[Any]] = [[]]
    for block in unet.output_blocks:
        levels[level].append(block[0])
        if not isinstance(block[-1], (ResBlock, SpatialTransformer)):  # it ends with the step to the next size
            level += 1
            levels.append([])
    second = levels[min(1, len(levels) - 1)]
    return second[(len(second) - 1) // 2]


def model_sigmas(model: ModelPatcher) -> Tensor:
    """The model's noise level at each training timestep, ascending, [T]."""
    return sampling_of(model).sigmas


def sampling_of(model: ModelPatcher) -> Any:
    """The host's noise schedule of this model, as a model sampling node may have replaced it."""
    return model.get_model_object("model_sampling")


def latents_of(model: ModelPatcher, samples: Tensor) -> Tensor:
    """LATENT samples in the scale of the model."""
    return model.model.process_latent_in(samples)


def samples_of(model: ModelPatcher, latents: Tensor) -> Tensor:
    """LATENT samples of latents in the scale of the model."""
    return model.model.process_latent_out(latents)


def config_of(model: ModelPatcher) -> dict[str, Any]:
    """The configuration of the model's UNet, as `UNetModel` takes it."""
    return model.model.model_config.unet_config


def prediction_type_of(model: ModelPatcher) -> PredictionType:
    """What the network predicts. Raises ValueError when neither noise nor velocity on a discrete schedule."""
    sampling = sampling_of(model)
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        # By the method, not the class: LCM and others derive from these and mean something else.
        denoise = getattr(type(sampling), "calculate_denoised", None)
        if denoise is comfy.model_sampling.EPS.calculate_denoised:
            return "epsilon"
        if denoise is comfy.model_sampling.V_PREDICTION.calculate_denoised:
            return "v_prediction"
    bases = "/".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ValueError(
        f"this MODEL's sampling is {bases}; Tune-A-Video needs one that predicts noise (epsilon) or velocity "
        "(v_prediction) on SD's timesteps. Remove the LCM or other model sampling node before it."
    )


def published_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the 2D UNet's tensors in a diffusers folder → the host's names."""
    return comfy.utils.unet_to_diffusers(unet_config)


def own_names(model: ModelPatcher) -> dict[str, str]:
    """Published name → host's name of every tensor of this model's image UNet.

    Raises ValueError when it has one that published models do not.
    """
    own = shapes_of(model).keys()
    names = published_names(config_of(model))
    names = {theirs: ours for theirs, ours in names.items() if ours in own}
    if missing := own - set(names.values()):
        raise ValueError(
            f"this MODEL's UNet has {len(missing)} tensors that published models do not have, the first is "
            f"{min(missing)}. Use a plain Stable Diffusion checkpoint."
        )
    return names


def shapes_of(model: ModelPatcher) -> dict[str, torch.Size]:
    """The shape of every tensor of the model's UNet, by the host's names."""
    # Not from the modules: a host that loads weights only as they are needed leaves None there.
    return {key.removeprefix(UNET): entry[0][0].shape for key, entry in model.get_key_patches(UNET).items()}


def family_of(model: ModelPatcher) -> str:
    """What weights must share to fit each other, in words: the architecture and what the network predicts."""
    config = config_of(model)
    channels, context = config["model_channels"], config["context_dim"]
    names = {
        (320, 768): "Stable Diffusion 1.x",
        (320, 1024): "Stable Diffusion 2.x",
        (320, 2048): "Stable Diffusion XL",
    }
    name = names.get((channels, context), f"a UNet of {channels} channels and text width {context}")
    return f"{name} ({prediction_type_of(model)})"


@torch.no_grad()
def fingerprint(model: ModelPatcher) -> str:
    """SHA-256, as hex, of the UNet's weights and of every patch on them: equal for models that compute the same.

    It reads gigabytes: some seconds for a full-size model.
    """
    return digest([(key, *_plain(entries)) for key, entries in sorted(model.get_key_patches(UNET).items())])


def _plain(entries: Any) -> tuple[Tensor, list[Any]]:
    """A weight as numbers (it may be quantised) and its patches, of which a merged model's are a list of this kind.

    Those that change nothing are left out: of no strength, where the weight's own is 1.
    """
    (weight, convert), *patches = entries
    return convert(weight, inplace=False), [
        (strength, _plain(value) if isinstance(value, list) else value, own, *more)
        for strength, value, own, *more in patches
        if strength or own != 1
    ]


def changed_on_the_way(model: ModelPatcher) -> list[str]:
    """Names of the UNet's weights that other nodes change, as LoRAs do; a merge counts as the checkpoint that it is."""
    return [
        key.removeprefix(UNET)
        for key, patches in model.patches.items()
        if key.startswith(UNET) and any(not isinstance(patch[1], list) for patch in patches)
    ]


def load(model: ModelPatcher) -> None:
    """Have the host bring a model and what belongs to it onto its device."""
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])


def others_on(model_options: Mapping[str, Any]) -> list[str]:
    """What other nodes have put on a MODEL: names of the modules and packs that their functions come from."""

    def functions(value: Any) -> Iterator[Any]:
        if isinstance(value, Mapping):
            for part in value.values():
                yield from functions(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from functions(part)
        elif callable(value):
            yield value

    found = functions(model_options)
    names = {getattr(function, "__module__", None) or type(function).__module__ for function in found}
    own = __name__.removesuffix(".tav_core.host.comfyui")
    # A pack's modules are named by its folder's path.
    return sorted({re.split(r"[/\\]", name)[-1] for name in names if not name.startswith((own, "torch"))})


# --- checks -----------------------------------------------------------------------------------------------------


def unused_in_training(model: ModelPatcher) -> list[str]:
    """Names of what a MODEL carries for the host's sampling and a private copy of its weights does not compute.

    Left out is what works on the prediction only, as guidance does, and what is honoured otherwise.
    """
    elsewhere = ("sampler_", "multigpu_", "disable_cfg1_optimization", "denoise_mask_function")
    options = {name: value for name, value in model.model_options.items() if not name.startswith(elsewhere)}
    inner = {**options.pop("transformer_options", {})}
    inner.pop("callbacks", None)
    called = [comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, comfy.patcher_extension.WrappersMP.APPLY_MODEL]
    wrappers = [
        {f"{kind} wrapper": {key: value for key, value in wrapped.get(kind, {}).items() if key != KEY}}
        for wrapped in (model.wrappers, inner.pop("wrappers", {}))
        for kind in called
    ]
    objects = {
        name: value
        for name, value in model.object_patches.items()
        if name not in ("model_sampling", "manual_cast_dtype")
    }
    kinds = ("injections", "weight_wrapper_patches", "hook_patches")
    rest = {"object_patches": objects, **{kind: getattr(model, kind, None) for kind in kinds}}
    return list(dict.fromkeys(name for part in (options, inner, *wrappers, rest) for name in _set_in(part)))


def _set_in(options: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """The paths of names in nested options at which something is set."""
    for name, value in options.items():
        here = f"{path} {name}".strip() if isinstance(name, str) else path
        if isinstance(value, Mapping):
            yield from _set_in(value, here)
        elif not (value is None or value is False or (isinstance(value, (list, tuple)) and not value)):
            yield here


# --- weights and memory ----------------------------------------------------------------------------------------------


def effective_weights(model: ModelPatcher, device: torch.device, wanted: Callable[[str], bool] = lambda _name: True):
    """Yield (name, float32 tensor of our own on `device`) of each `wanted` UNet weight, as the host would run it.

    Patches (LoRA, merges, earlier tunes) are applied; the model itself is not loaded, patched or changed.
    """
    for key, ((weight, convert), *patches) in model.get_key_patches(UNET).items():
        if not wanted(key.removeprefix(UNET)):
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


def unload(device: torch.device) -> None:
    """Have the host take its models off a device that is not the CPU, and give the memory back."""
    if device.type != "cpu":
        comfy.model_management.unload_all_models()
    free_memory()


def free_memory() -> None:
    """Give back to the device what no one uses any more; a network and its hooks refer to each other."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, of any kind, has no memory left. Not all kinds have a class for it."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def surviving_out_of_memory() -> Iterator[None]:
    """End the block, and go on after it, when a device has no memory left. Other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def free_bytes(device: torch.device) -> int:
    """What the host reports as free on a device."""
    free: Any = comfy.model_management.get_free_memory(device)
    return free


def stop_if_interrupted() -> None:
    """Raises the host's own exception when the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is the host's own exception for Cancel."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


# --- sample ----------------------------------------------------------------------------------------------------------


def guided(model: ModelPatcher, positive: Conditioning, negative: Conditioning, cfg: float) -> comfy.samplers.CFGGuider:
    """The host's guider, with all that other nodes add to guidance."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def steered(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    cfg_at: Callable[[float], float],
    source: tuple[Source, Conditioning, Callable[[float], Tensor | None]] | None = None,
) -> comfy.samplers.CFGGuider:
    """The host's guider, whose guidance scale may change, and which may share features of the source.

    Args:
        cfg_at: the guidance scale at a noise level.
        source: the features, the prompt under which they are computed, and the source's latents [f, c, h, w] at a
            noise level in the model's scale, or None where they are not shared. Each time costs a call of the UNet.
    """

    class Steered(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
            sigma = float(timestep.max())
            self.cfg = cfg_at(sigma)
            latents = source and source[2](sigma)
            if source is None or latents is None:
                return super().predict_noise(x, timestep, model_options, seed)
            with source[0].recorded():
                prompt = [self.conds["source"]]
                comfy.samplers.calc_cond_batch(self.inner_model, prompt, latents.to(x), timestep, model_options)
            with source[0].shared():
                return super().predict_noise(x, timestep, model_options, seed)

    guider = Steered(model)
    prompts = {"positive": positive, "negative": negative}
    guider.inner_set_conds(prompts if source is None else {**prompts, "source": source[1]})
    return guider


def unguided(model: ModelPatcher, prompt: Conditioning) -> comfy.samplers.CFGGuider:
    """A guider that asks the model for one prompt and leaves it at that: an inversion is without guidance.

    The host's caches (EasyCache, LazyCache), which expect noise levels to fall, are left out as well.
    """

    class Unguided(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
            conds = [self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[0]

    model = model.clone()
    kinds = comfy.patcher_extension.WrappersMP
    for kind in (kinds.OUTER_SAMPLE, kinds.PREDICT_NOISE, kinds.CALC_COND_BATCH, kinds.DIFFUSION_MODEL):
        for key in ("easycache", "lazycache"):
            model.remove_wrappers_with_key(kind, key)
    guider = Unguided(model)
    guider.inner_set_conds({"positive": prompt})
    return guider


def active_at(model: ModelPatcher, prompt: Conditioning, sigmas: Sequence[float]) -> list[list[bool]]:
    """Which of a prompt's entries are active at which noise levels, by their timestep ranges: a row an entry."""
    sampling = sampling_of(model)
    active = []
    for _text, options in prompt:
        starts, ends = ([options.get(f"{of}{at}_percent") for of in ("", "clip_")] for at in ("start", "end"))
        start = max([0.0, *(percent for percent in starts if percent is not None)])
        end = min([1.0, *(percent for percent in ends if percent is not None)])
        high, low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
        active.append([low <= sigma <= high for sigma in sigmas])
    return active


def check_active(name: str, model: ModelPatcher, prompt: Conditioning, sigmas: Sequence[float]) -> None:
    """Whether a prompt says something at all of these noise levels; where it does not, the host predicts zeros.

    Raises ValueError when none of its entries is active at one of them.
    """
    active = [any(entries) for entries in zip(*active_at(model, prompt, sigmas), strict=True)]
    if not all(active):
        raise ValueError(
            f"{name} is active at {sum(active)} of the {len(active)} noise levels that need it, by a timestep "
            "range (ConditioningSetTimestepRange): at the others the model would be told nothing. Let it, or another "
            "prompt combined with it, reach from 0 to 1."
        )


def check_hooks(name: str, prompt: Conditioning) -> None:
    """Whether the hooks on a prompt are as strong at all noise levels.

    Raises ValueError where keyframes change that: the host goes through them as noise falls and never back, so an
    inversion, in which it rises, would have the last one's strength throughout.
    """
    for _text, options in prompt:
        for hook in getattr(options.get("hooks"), "hooks", ()):
            if len({keyframe.strength for keyframe in hook.hook_keyframe.keyframes}) > 1:
                raise ValueError(
                    f"{name} has a hook whose strength changes on the way (Create Hook Keyframe), which an inversion "
                    "cannot follow. Remove its keyframes here; Sample Video can have them."
                )


def run_sampler(
    guider: comfy.samplers.CFGGuider,
    samples: Tensor,
    sigmas: Tensor,
    callback: Callable[[int, Tensor, Tensor, int], None],
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    sampler: Callable[..., Tensor] = ddim.sample_ddim,
) -> Tensor:
    """Follow `sigmas` with a sampler of k-diffusion's signature; LATENT samples in, LATENT samples out.

    Args:
        guider: `guided` or `unguided`.
        callback: the host's: step, denoised, x, number of steps. Called before each step is taken.
        noise: added to `samples` at the first of `sigmas`; None where they are at that level already.
        mask: where the samples are replaced, as the host has it in a LATENT; elsewhere they stay. None replaces all.

    Raises ValueError when the result is not finite.
    """

    def interruptible(*args: Any) -> None:
        stop_if_interrupted()
        callback(*args)

    out = guider.sample(
        torch.zeros_like(samples) if noise is None else noise,
        samples,
        comfy.samplers.KSAMPLER(sampler),
        sigmas,
        denoise_mask=mask,
        callback=interruptible,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    out = out.to(comfy.model_management.intermediate_device())
    if not torch.isfinite(out).all():
        found = ", ".join(others_on(guider.model_options))
        raise ValueError(
            "the model's predictions became NaN or infinite. Lower cfg, run ComfyUI with --force-fp32"
            + (f", or remove what other nodes put on the MODEL: {found}." if found else ".")
        )
    if mask is not None:  # to the bit: the scale of the model's latents rounds
        mask = comfy.sampler_helpers.prepare_mask(mask, out.shape, out.device)
        out = torch.where(mask == 0, samples.to(out), out)
    return out


# --- text ------------------------------------------------------------------------------------------------------------


def vector_of(model: ModelPatcher, prompt: Conditioning, latents: Tensor) -> Tensor | None:
    """What SDXL reads of a prompt beside its tokens, [1 or f, width]: its pooled output, and sizes and crop.

    By the host's own encoding, as when it samples `latents`: a size that the prompt does not give is theirs. None where
    the model reads no such thing.
    """
    if model.model.diffusion_model.num_classes is None:
        return None
    conds = comfy.sampler_helpers.convert_cond(prompt)
    [cond] = comfy.samplers.encode_model_conds(model.model.extra_conds, conds, latents, latents.device, "positive")
    return cond["model_conds"]["y"].cond


def encoded(clip: Any, text: str) -> Conditioning:
    """CONDITIONING of a text, as CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def positions(clip: Any, text: str, words: str) -> list[int]:
    """Where words stand in a text's CONDITIONING: the positions of their tokens, wherever these occur in a row.

    Raises ValueError when the text does not have them.
    """

    def tokens(text: str) -> list[Any]:
        parts = next(iter(clip.tokenize(text).values()))
        return [token if isinstance(token, int) else None for part in parts for token, *_weight in part]

    end = tokens("")[1]
    wanted = list(itertools.takewhile(lambda token: token != end, tokens(words)[1:]))
    given = tokens(text)
    starts = [i for i in range(len(given)) if given[i : i + len(wanted)] == wanted]
    if not wanted or not starts:
        raise ValueError(
            f"the word {words[:80]!r} is not in the caption {text[:200]!r}: write a word, or several in a row, as the "
            "caption has them."
        )
    return sorted({start + i for start in starts for i in range(len(wanted))})


# --- folders ---------------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """The folders of tuned weights, as extra_model_paths.yaml has them; new files go to the first.

    None where the host lacks what lists them: the nodes' schemas still ask.
    """
    return [] if LOST["files"] else [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def lora_folder() -> Path:
    """Where new LoRA files go."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def file_names() -> list[str]:
    """Names of the weights files in all of them, from the host's own cached listing. None, likewise."""
    return [] if LOST["files"] else folder_paths.get_filename_list(FOLDER)


def names_inside(folder: Path) -> list[str]:
    """Names of all files below a folder, with their subfolders, as the host walks it."""
    return folder_paths.recursive_search(str(folder))[0]


def user_folder() -> Path:
    """This pack's own place in the host's user folder, which survives restarts."""
    return Path(folder_paths.get_user_directory()) / KEY


# --- progress ---------------------------------------------------------------------------------------------------


def preview_callback(model: ModelPatcher, steps: int) -> Callable[[int, Tensor, Tensor, int], None]:
    """The host's progress bar and latent preview for a sampling run."""
    return latent_preview.prepare_callback(model, steps)


def pictures_of(model: ModelPatcher, samples: Tensor) -> list[Any]:
    """LATENT samples as rough PIL pictures, one a frame, by the host's previewer: no VAE is loaded."""
    latent_format = model.get_model_object("latent_format")
    previewer: Any = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None:  # the user has switched previews of sampling off, but asked for these
        factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
        previewer = latent_preview.Latent2RGBPreviewer(factors, bias)
    x0 = latents_of(model, samples).to(model.load_device)
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
