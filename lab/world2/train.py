"""Train the models of world 2: autoencoder, text-to-image; both go on from the demo's.

  python benchmarks/pack.py lab.world2.train --out FOLDER [--minutes N]     (TAV_HOST names a ComfyUI folder)

Start it again to go on where it stopped; --minutes stops it in time. The finished models lie in FOLDER, beside
checkpoints and sample grids.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...demo import model, networks
from ...demo.train import (
    DEVICE,
    HELD_OUT,
    Stage,
    encoded,
    fit_autoencoder,
    fit_captions,
    pictures,
    run_stages,
    unit,
    write,
)
from . import world
from .sprites import FIGURES, LOOKS
from .world import PLACES, STYLES, Actor, Scene

RECIPES = {
    "cpu": {
        "autoencoder": Stage(steps=700, batch=16, pictures=2000, lr=1e-3, average=100),
        "text_to_image": Stage(steps=6000, batch=16, pictures=10000, lr=2e-3),
    },
    "cuda": {
        "autoencoder": Stage(steps=8000, batch=64, pictures=20000, lr=2e-3),
        "text_to_image": Stage(steps=30000, batch=512, pictures=200000, lr=2e-3, average=1000),
    },
}


def picture(index: int, seed: int) -> np.ndarray:
    """Picture number `index` of the stream `seed`, uint8 [side, side, 3]."""
    return world.render(world.random_scene(seed, index))


def rows(vocabulary: networks.Vocabulary, count: int, seed: int) -> Tensor:
    """Vocabulary rows of the captions of the first `count` pictures, [count, 77]."""
    return vocabulary.rows(world.random_scene(seed, i).caption for i in range(count)).to(DEVICE)


def prompts() -> list[str]:
    """Each figure once, with places, looks and styles in turn, and a few whose look is told."""
    turns = [
        (figure, look, list(PLACES)[i % len(PLACES)], list(STYLES)[i // 2 % len(STYLES)])
        for i, (figure, look) in enumerate(zip((*FIGURES, *FIGURES[::3]), list(LOOKS) * 4, strict=True))
    ]
    return [
        Scene((Actor(figure, look, tells=("look",) if i >= len(FIGURES) else ()),), place, style).caption
        for i, (figure, look, place, style) in enumerate(turns)
    ]


def train_autoencoder(stage: Stage, out: Path, deadline: float) -> None:
    """On from the demo's, on random quarters of pictures."""
    torch.manual_seed(0)
    vae = networks.new_vae()
    vae.load_state_dict(model.part(load_file(model.WEIGHTS), model.VAE_PREFIX))
    vae.to(DEVICE).to(memory_format=torch.channels_last)
    pool = pictures(0, stage.pictures, 0, picture)
    fit_autoencoder(vae, stage, out, deadline, pool, unit(pictures(0, 32, HELD_OUT, picture)))


def train_text_to_image(stage: Stage, out: Path, deadline: float) -> None:
    """On from the demo's UNet and text encoder, whose vocabulary grows."""
    vae = networks.new_vae().to(DEVICE).to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(out / "vae.pt", map_location=DEVICE, weights_only=True))
    latents = encoded(vae, stage.pictures, out / "latents", 0, picture)
    held_out = encoded(vae, 256, out / "latents_held_out", HELD_OUT, picture)
    vocabulary = networks.Vocabulary(world.captions())
    captions = rows(vocabulary, stage.pictures, 0)

    def captioned() -> tuple[Tensor, Tensor]:
        picks = torch.randint(len(latents), (stage.batch,)).to(DEVICE)
        return latents[picks].float(), captions[picks]

    torch.manual_seed(1)
    network = nn.ModuleDict({"text": networks.new_text_encoder(len(vocabulary)), "unet": networks.new_unet()})
    start_from(model.WEIGHTS, network, vocabulary)
    held_out_pairs = (held_out, rows(vocabulary, 256, HELD_OUT))
    fit_captions(network, stage, out, deadline, "text_to_image", captioned, held_out_pairs, vocabulary, vae, prompts())
    metadata = {"steps": str(stage.steps), "batch": str(stage.batch), "pictures": str(stage.pictures)}
    save = partial(networks.save, network["unet"], network["text"], vocabulary.ids, vae, metadata=metadata)
    write(out / "model.safetensors", lambda file: save(file=file))


@torch.no_grad()
def start_from(file: Path, network: nn.ModuleDict, vocabulary: networks.Vocabulary) -> None:
    """Give a network the weights of a model with the same layers; words that it does not know keep their own."""
    weights = load_file(file)
    ids, known = weights[model.IDS], weights[model.ROWS].float()
    own = network["text"].get_input_embeddings().weight
    new = own.clone()
    for row, token in enumerate(vocabulary.ids.tolist()):
        old = (ids == token).nonzero()
        new[row] = known[old[0, 0]] if len(old) else new[row]
    new[-1] = known[-1]
    network["text"].load_state_dict({**model.part({**weights, model.ROWS: new}, model.TEXT_PREFIX)})
    network["unet"].load_state_dict(model.part(weights, model.UNET_PREFIX))


STAGES = {  # and the file that each leaves behind
    "autoencoder": (train_autoencoder, "vae.pt"),
    "text_to_image": (train_text_to_image, "model.safetensors"),
}

if __name__ == "__main__":
    run_stages(STAGES, RECIPES, __doc__)
