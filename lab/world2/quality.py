"""Measure a model of world 2: how often it shows what the prompt says, by the strict judge, and its autoencoder.

Beside it what the judge says of the prompts' own scenes, drawn, as the autoencoder passes them: no model can do better.

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
from torch import Tensor

from ...demo import model as demo_model
from ...tav_core.method import metrics
from ...tav_core.pictures import image
from ..quality import CFG, STEPS, generate, grid, passed
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
    network = segmenter.load(args.segmenter)

    def right_in(pictures: Tensor) -> dict[str, np.ndarray]:
        """What of each prompt its picture is right in, bool [prompts] each."""
        seen = judge.look_at(network, pictures)
        frames = (judge.Seen(*(part[i : i + 1] for part in seen)) for i in range(len(scenes)))
        rows = [judge.picture_right(frame, scene)[0] for frame, scene in zip(frames, scenes, strict=True)]
        rows = [{**row, "all": all(row.values())} for row in rows]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def shares(found: dict[str, np.ndarray]) -> dict[str, float]:
        return {name: round(float(right.mean()), 4) for name, right in found.items()}

    drawn = image.from_bytes(np.stack([world.render(scene) for scene in scenes]))
    through = passed(vae, drawn)
    pictures = generate(model, clip, vae, [scene.caption for scene in scenes])
    right = right_in(pictures)
    figure_of = np.array([scene.actors[0].figure for scene in scenes])
    report = {
        **shares(right),
        "drawn": shares(right_in(through)),
        "vae_psnr": round(float(metrics.psnr(through, drawn).mean()), 2),
        "prompts": args.prompts,
        "steps": STEPS,
        "cfg": CFG,
        "seed": SEED,
        "figures": {
            name: round(float(right["object"][figure_of == name].mean()), 3) for name in np.unique(figure_of).tolist()
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    grid(pictures[:64], [scene.caption for scene in scenes], right["all"][:, None]).save(
        args.out / "quality.jpg", quality=70
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
