"""The demo's model: Stable Diffusion 1.x's architecture at small width, from ComfyUI's own classes.

Everything is kept in one safetensors file (float16) with SD's own prefixes. Of the text encoder's vocabulary only the
words of the world's captions are kept, and one row for all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..tav_core import host

WEIGHTS = Path(__file__).with_name("model.safetensors")

WIDTH = 64
UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": [1, 1, 1],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": WIDTH,
    "transformer_depth": [0, 1, 1],
    "transformer_depth_middle": -1,
    "transformer_depth_output": [1, 0, 1, 1, 0, 0],
    "use_linear_in_transformer": False,
    "legacy": False,
}
TEXT = {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."
ROWS = f"{TEXT_PREFIX}text_model.embeddings.token_embedding.weight"
IDS = "vocabulary"  # the token of each row but the last, which is for all others
VOCABULARY = 49408  # tokens of the host's tokenizer

# In what colours samplers preview a latent: of each of its channels, and on top (made by lab/fit_previews.py).
COLOURS = ((-0.304, -0.124, -0.019), (0.198, -0.060, -0.041), (-0.054, -0.067, 0.255), (0.111, 0.342, 0.302))
COLOURS_BIAS = (0.380, 0.185, 0.043)


def load(file: Path = WEIGHTS) -> tuple[host.ModelPatcher, Any, Any]:
    """MODEL, CLIP and VAE as the host's own loaders return them, in float32."""
    weights = load_file(file)
    ids = weights.pop(IDS)
    rows = weights.pop(ROWS)
    weights[ROWS] = rows[-1].repeat(VOCABULARY, 1)
    weights[ROWS][ids] = rows[:-1]

    return (
        host.preview_in(host.build_model(UNET, part(weights, UNET_PREFIX)), COLOURS, COLOURS_BIAS),
        host.build_clip(TEXT, part(weights, TEXT_PREFIX)),
        host.build_vae(part(weights, VAE_PREFIX)),
    )


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it, in float32."""
    named = ((name.removeprefix(prefix), tensor) for name, tensor in weights.items() if name.startswith(prefix))
    return {name: tensor.float() for name, tensor in named}
