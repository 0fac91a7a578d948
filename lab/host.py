"""What training and measuring the demo's model ask of ComfyUI beside `host`; no node needs any of it."""

from comfy.clip_model import CLIPTextModel
from comfy.latent_formats import SD15 as LatentFormatSD15
from comfy.ldm.modules.attention import SpatialTransformer, attention_basic
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.ops import disable_weight_init
from comfy.sample import prepare_noise, sample
from comfy.sd1_clip import SD1Tokenizer
from comfy.taesd.taesd import TAESD
from comfy.taesd.taesd import Block as TAESDBlock

__all__ = [
    "TAESD",
    "CLIPTextModel",
    "LatentFormatSD15",
    "ResBlock",
    "SD1Tokenizer",
    "SpatialTransformer",
    "TAESDBlock",
    "UNetModel",
    "attention_basic",
    "disable_weight_init",
    "prepare_noise",
    "sample",
]
