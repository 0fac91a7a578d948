"""A MODEL, CLIP and VAE of sizes that the host does not recognise by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.inflation import UNetParts
from ..method.tuning import PredictionType
from .comfyui import ModelPatcher, comfy, parts_of


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


def preview_in(model: ModelPatcher, factors: Sequence[Sequence[float]], bias: Sequence[float]) -> ModelPatcher:
    """Have a MODEL that `build_model` has made previewed in colours of its own; nothing else of it changes.

    Args:
        factors: red, green and blue, -1 to 1, of each channel of a latent in the model's scale, [c, 3].
        bias: what is added, [3].
    """
    latent_format = model.model.latent_format  # of this MODEL alone
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = factors, bias
    latent_format.taesd_decoder_name = None  # the user's would decode another model's latents
    return model


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


def heads_of(parts: UNetParts) -> dict[str, int]:
    """Attention heads of every transformer block, by its name."""
    return {name: block.n_heads for name, block in parts.blocks.items()}


def set_heads(block: Any, heads: int) -> None:
    """Split a transformer block's width among another number of heads."""
    block.d_head = block.n_heads * block.d_head // heads
    block.n_heads = heads
    for attention in (block.attn1, block.attn2):
        attention.heads, attention.dim_head = heads, block.d_head
