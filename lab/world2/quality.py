"""Measure a model of world 2: how often it shows what the prompt says, by the strict judge, and its autoencoder.

  python tools/pack.py lab.world2.quality --model FILE --segmenter FILE [--out FOLDER] [--prompts N]

Writes quality.json and quality.jpg (prompts that were missed are red).
"""

from __future__ import annotations

import argparse
import json
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from ...demo import model as demo_model
from ..quality import CFG, STEPS, generate, grid, round_trip
from . import judge, segmenter, world

SEED = 2  # of prompts, noise and pictures; training uses 0, its held-out pictures 1


@torch.inference_mode()
def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.world2.quality", description=__doc__, formatter_class=layout)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--segmenter", type=Path, default=segmenter.WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()

    model, clip, vae = demo_model.load(args.model)
    stream = (world.random_scene(SEED, i) for i in count())
    scenes = list(islice((scene for scene in stream if len(scene.actors) == 1), args.prompts))
    pictures = generate(model, clip, vae, [scene.caption for scene in scenes])
    seen = judge.look_at(segmenter.load(args.segmenter), pictures)
    rows = [
        judge.picture_right(judge.Seen(*(part[i : i + 1] for part in seen)), scene)[0] for i, scene in enumerate(scenes)
    ]
    right = np.array([list(row.values()) for row in rows])
    figures = {scene.actors[0].figure for scene in scenes}
    report = {
        **dict(zip(rows[0], right.mean(0).round(4).tolist(), strict=True)),
        "all": round(float(right.all(1).mean()), 4),
        "vae_psnr": round(round_trip(vae, [world.render(scene) for scene in scenes]), 2),
        "prompts": args.prompts,
        "steps": STEPS,
        "cfg": CFG,
        "seed": SEED,
        "figures": {
            name: round(float(right[[scene.actors[0].figure == name for scene in scenes], 0].mean()), 3)
            for name in sorted(figures)
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    grid(pictures[:64], [scene.caption for scene in scenes], right).save(args.out / "quality.jpg", quality=70)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
