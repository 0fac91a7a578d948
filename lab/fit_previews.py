"""Fit the colours in which samplers preview the demo's model: `COLOURS` and `COLOURS_BIAS` of demo/model.py. Run after
the model was trained anew, and copy what it prints.

python tools/pack.py lab.fit_previews
"""

import torch
from einops import rearrange
from torch import Tensor

from ..demo import model, world
from ..tav_core.method import metrics
from .networks import LATENT_SCALE, LatentFormatSD15

CELL = 8  # pixels, each way, that one latent stands for
PICTURES = 400
FITTED, HELD_OUT = 3, 4  # seeds of pictures; training and the measures of quality use 0 to 2


@torch.inference_mode()
def latents_and_colours(vae, seed: int, count: int = PICTURES) -> tuple[Tensor, Tensor]:
    """Pictures of the world: their latents in the model's scale, [n, 4], and the mean colours, [n, 3], -1 to 1."""
    scenes = (world.random_scene(seed, i) for i in range(count))
    pictures = torch.stack([torch.from_numpy(world.render(scene)) for scene in scenes]).float() / 255
    latents = torch.cat([vae.encode(part) for part in pictures.split(50)]) * LATENT_SCALE
    colours = rearrange(pictures, "n (h i) (w j) c -> n h w (i j) c", i=CELL, j=CELL).mean(-2) * 2 - 1
    return rearrange(latents, "n c h w -> (n h w) c"), colours.flatten(0, -2)


def fit(latents: Tensor, colours: Tensor) -> Tensor:
    """The factors of each latent channel, and last the bias, [5, 3], that come closest to the colours."""
    ones = torch.ones(len(latents), 1)
    return torch.linalg.lstsq(torch.cat((latents, ones), 1).double(), colours.double()).solution


def error(latents: Tensor, colours: Tensor, factors: Tensor) -> float:
    """PSNR in dB of previews by these factors, [4 or 5, 3]."""
    seen = latents @ factors[:4].float() + (factors[4].float() if len(factors) > 4 else 0)
    return float(metrics.psnr(seen.clamp(-1, 1)[None] / 2, colours[None] / 2))


def main() -> None:
    _model, _clip, vae = model.load()
    factors = fit(*latents_and_colours(vae, FITTED))
    held_out = latents_and_colours(vae, HELD_OUT)
    others = torch.tensor(LatentFormatSD15().latent_rgb_factors)
    *rows, bias = [", ".join(f"{value:.3f}" for value in row) for row in factors.tolist()]
    print("COLOURS = (" + ", ".join(f"({row})" for row in rows) + ")")
    print(f"COLOURS_BIAS = ({bias})")
    print(
        f"held-out pictures: {error(*held_out, factors):.1f} dB; Stable Diffusion's: {error(*held_out, others):.1f} dB"
    )


if __name__ == "__main__":
    main()
