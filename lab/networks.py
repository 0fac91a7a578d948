"""The networks of the demo's model as they are trained and written; `model.py` reads them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..demo.model import IDS, TEXT, TEXT_PREFIX, UNET, UNET_PREFIX, VAE_PREFIX, WIDTH, part
from ..tav_core.host import OVERRIDE
from ..tav_core.method.attention import sdpa
from .host import (
    TAESD,
    CLIPTextModel,
    LatentFormatSD15,
    ResBlock,
    SD1Tokenizer,
    SpatialTransformer,
    TAESDBlock,
    UNetModel,
    attention_basic,
    disable_weight_init,
)

LATENT_SCALE = LatentFormatSD15().scale_factor
TEXT_FIXED = {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}

# --- to train -------------------------------------------------------------------------------------------------------


def new_unet() -> UNetModel:
    """An untrained UNet whose blocks start as identities."""
    unet = UNetModel(**UNET, operations=disable_weight_init)
    _default_weights(unet)
    for module in unet.modules():
        if isinstance(module, ResBlock):
            _zero(module.out_layers[-1])
        elif isinstance(module, SpatialTransformer):
            _zero(module.proj_out)
    _zero(unet.out[-1])
    return unet


def new_vae() -> TAESD:
    """An untrained autoencoder whose blocks start as identities (with torch's own start it learns far slower)."""
    vae = TAESD()
    _default_weights(vae)
    for module in vae.modules():
        if isinstance(module, TAESDBlock):
            _zero(module.conv[-1])
    return vae


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """An untrained text encoder for tokens 0 … vocabulary - 1."""
    text = CLIPTextModel({**TEXT, **TEXT_FIXED}, torch.float32, "cpu", disable_weight_init)
    text.set_input_embeddings(disable_weight_init.Embedding(vocabulary, WIDTH))
    _default_weights(text)
    for module in text.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    return text


def encode_text(text: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Text for the UNet, [b, 77, width], of tokens [b, 77]: the host's layers, whose own loop adds in place."""
    model = text.text_model
    x = model.embeddings(tokens)
    mask = torch.full((tokens.shape[1],) * 2, float("-inf"), device=x.device).triu(1)
    layers: Any = model.encoder.layers
    for layer in layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_basic)
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.final_layer_norm(x)


def _plain_attention(_host: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_args: Any, **_options: Any) -> Tensor:
    """Attention of q, k, v [b, n, heads * d] that can be differentiated; the host's may not be, or slower."""
    if q.is_cuda:
        return sdpa(q, k, v, heads)
    b, n, width = q.shape
    # On a CPU two products are faster to train through.
    q, k, v = (t.view(b, -1, heads, width // heads).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    weights = (q @ k.mT * (width // heads) ** -0.5).softmax(-1)
    return (weights @ v).view(b, heads, n, -1).transpose(1, 2).reshape(b, n, width)


DIFFERENTIABLE = {OVERRIDE: _plain_attention}


def _default_weights(module: nn.Module) -> None:
    """torch's own initial weights, which the host's layers leave out."""
    for layer in module.modules():
        kinds: Any = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
        for kind in kinds:
            if isinstance(layer, kind):
                kind.reset_parameters(layer)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


# --- to keep --------------------------------------------------------------------------------------------


class Vocabulary:
    """The tokens of the world's captions as row numbers of a small embedding; all others share the last row."""

    def __init__(self, captions: Iterable[str]):
        self.tokenizer = SD1Tokenizer()
        self.ids = torch.tensor(sorted({token for caption in captions for token in self._tokens(caption)}))

    def __len__(self) -> int:
        return len(self.ids) + 1

    def rows(self, captions: Iterable[str]) -> Tensor:
        """Row numbers of the captions' tokens, [n, 77]."""
        tokens = torch.tensor([self._tokens(caption) for caption in captions])
        rows = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[rows] == tokens, rows, len(self.ids))

    def _tokens(self, caption: str) -> list[int]:
        return [token for token, _ in self.tokenizer.tokenize_with_weights(caption)["l"][0]]


def save(
    unet: UNetModel, text: CLIPTextModel, ids: Tensor, vae: TAESD, file: Path, metadata: Mapping[str, str]
) -> None:
    """Write the three models as one file, in float16."""
    weights = {
        **{UNET_PREFIX + name: tensor for name, tensor in unet.state_dict().items()},
        **{TEXT_PREFIX + name: tensor for name, tensor in text.state_dict().items()},
        **{VAE_PREFIX + name: tensor for name, tensor in vae.state_dict().items()},
    }
    half = {name: tensor.detach().cpu().half().contiguous() for name, tensor in weights.items()}
    save_file({**half, IDS: ids}, file, dict(metadata))


def load(unet: UNetModel, text: CLIPTextModel, file: Path) -> None:
    """Read a UNet and a text encoder of the same vocabulary back from what `save` wrote."""
    weights = load_file(file)
    unet.load_state_dict(part(weights, UNET_PREFIX))
    text.load_state_dict(part(weights, TEXT_PREFIX))
