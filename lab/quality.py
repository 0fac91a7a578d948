"""Measure the demo's model: how often it shows what the prompt says, by the classifier, and what the autoencoder loses.

  python run.py quality [--model FILE] [--classifier FILE] [--out FOLDER] [--prompts N]

Writes quality.json and quality.jpg (prompts that were missed are red). Exits 1 when a figure is below its floor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..demo import model as demo_model
from ..demo import world
from ..tav_core.method import metrics
from ..tav_core.pictures import image
from . import classifier
from .host import prepare_noise, sample

FLOORS = {"object": 0.85, "background": 0.95, "style": 0.90, "vae_psnr": 26.0}
STEPS, CFG = 30, 5.0
SEED = 2  # of prompts, noise and pictures; training uses 0, its held-out pictures 1


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="run.py quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model.WEIGHTS)
    parser.add_argument("--classifier", type=Path, default=classifier.WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    model, clip, vae = demo_model.load(args.model)
    judge = classifier.load(args.classifier)
    scenes = [world.random_scene(SEED, i) for i in range(args.prompts)]
    wanted = [(scene.object, scene.background, scene.style) for scene in scenes]
    started = time.time()
    pictures = generate(model, clip, vae, [scene.caption for scene in scenes])
    seconds = (time.time() - started) / len(scenes)
    seen = [label for part in pictures.split(50) for label in judge(part.movedim(-1, 1)).labels()]

    right = np.array([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(wanted, seen, strict=True)])
    report = {
        **dict(zip(classifier.HEADS, right.mean(0).round(4).tolist(), strict=True)),
        "all_three": round(float(right.all(1).mean()), 4),
        "vae_psnr": round(round_trip(vae, [world.render(scene) for scene in scenes]), 2),
        "seconds_per_picture": round(seconds, 3),
        "prompts": args.prompts,
        "steps": STEPS,
        "cfg": CFG,
        "seed": SEED,
        "objects": {
            name: round(float(right[[w[0] == name for w in wanted], 0].mean()), 3)
            for name in world.OBJECTS
            if any(w[0] == name for w in wanted)
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    grid(pictures[:64], [scene.caption for scene in scenes], right).save(args.out / "quality.jpg", quality=70)
    print(json.dumps(report, indent=2))
    missed = [f"{name} {report[name]} < {floor}" for name, floor in FLOORS.items() if report[name] < floor]
    sys.exit(f"below the floor: {', '.join(missed)}" if missed else 0)


def generate(model, clip, vae, prompts: list[str], batch: int = 25) -> Tensor:
    """Pictures [n, h, w, 3] of the prompts, by the host's own sampler."""
    empty, _ = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in part])
        latents = torch.zeros(len(part), 4, world.SIDE // 8, world.SIDE // 8)
        noise = prepare_noise(latents, SEED + start)
        conditioning = [[texts, {}]], [[empty.expand_as(texts), {}]]
        samples = sample(
            model,
            noise,
            STEPS,
            CFG,
            "ddim",
            "ddim_uniform",
            *conditioning,
            latents,
            disable_pbar=True,
            seed=SEED + start,
        )
        pictures.append(vae.decode(samples))
    return torch.cat(pictures)


def round_trip(vae, pictures: list[np.ndarray]) -> float:
    """Mean peak signal-to-noise ratio of pictures through the autoencoder, dB."""
    x = image.from_bytes(np.stack(pictures))
    return float(metrics.psnr(x, passed(vae, x)).mean())


def passed(vae, pictures: Tensor) -> Tensor:
    """Pictures [n, h, w, 3] as the autoencoder passes them."""
    return torch.cat([vae.decode(vae.encode(part)) for part in pictures.split(50)]).to(pictures)


def grid(pictures: Tensor, prompts: list[str], right: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures with their prompts below, in red where something is wrong."""
    side, text = world.SIDE, 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate((pictures * 255).byte().cpu().numpy()):
        x, y = i % columns * side, i // columns * (side + text)
        sheet.paste(Image.fromarray(picture), (x, y))
        colour = "black" if right[i].all() else "red"
        draw.text((x + 2, y + side), prompts[i].replace(", ", ",\n"), fill=colour, font_size=10)
    return sheet


if __name__ == "__main__":
    main()
