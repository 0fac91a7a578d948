"""Examine world 2's judge: on rendered edits, which it must call right, and on chimeras of them, which it must not.

  python tools/pack.py lab.world2.examine [--segmenter FILE] [--model FILE] [--pairs N]

Prints how many of each it calls right; exits with 1 when a share is out of its bounds. With --model all pictures go
through that model's autoencoder, as an edit's do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...demo import model as demo_model
from ...tav_core.pictures import image
from .. import chimeras
from ..quality import passed
from . import judge, segmenter, world
from .sprites import FIGURES, LOOKS
from .world import PLACES, Scene

SEED = 3  # of the edits; training uses 0, its held-out pictures 1, prompts 2
LEAST_TRUE, MOST_CHIMERAS = 0.97, 0.05
LEAST_HALO = 0.1  # of the new object's pixels that the old one is seen on around it, or it is not called a halo


def scenes(count: int) -> list[tuple[Scene, Scene]]:
    """Scenes of one actor, each with an edit: another figure in any look at the same place."""
    edits, index = [], 0
    while len(edits) < count:
        scene, rng = world.random_scene(SEED, index), np.random.default_rng((SEED, index, 1))
        index += 1
        if len(scene.actors) > 1:
            continue
        old = scene.actors[0]
        figure = [name for name in FIGURES if name != old.figure][rng.integers(len(FIGURES) - 1)]
        pose = world.gait(figure, rng.uniform(), old.pose.flip)
        new = replace(old, figure=figure, look=list(LOOKS)[rng.integers(len(LOOKS))], colour=None, pose=pose)
        edits.append((scene, replace(scene, actors=(new,))))
    return edits


def other_way(scene: Scene, size: float = 1.0) -> Scene:
    """The same scene with its actor facing the other way, and so much larger."""
    (actor,) = scene.actors
    pose = actor.pose._replace(flip=not actor.pose.flip)
    return replace(scene, actors=(replace(actor, pose=pose, size=size * actor.size),))


def drawn(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pictures [n, h, w, 3] in 0 … 1 of scenes with one actor, and its masks [n, h, w]."""
    shown = [world.draw(scene) for scene in scenes]
    pictures, masks = (np.stack(part) for part in ([s.picture for s in shown], [s.masks[0] for s in shown]))
    return image.from_bytes(pictures), torch.from_numpy(masks)


def examine(
    network: segmenter.Segmenter, through: Callable[[Tensor], Tensor], count: int
) -> dict[str, dict[str, float]]:
    """Shares of `count` edits, and of the chimeras of each, that the judge calls right."""
    old, new = (list(part) for part in zip(*scenes(count), strict=True))
    (old_pictures, old_masks), (new_pictures, new_masks) = drawn(old), drawn(new)
    mirrored_pictures, mirrored_masks = drawn([other_way(scene) for scene in new])
    smaller, _ = drawn([other_way(other_way(scene, 0.94)) for scene in new])
    plates = image.from_bytes(np.stack([world.plate(scene) for scene in new]))
    pair = chimeras.Pair(old_pictures, new_pictures, plates, old_masks, new_masks)

    def whole(pictures: Tensor) -> Tensor:
        seen = judge.look_at(network, through(pictures))
        right = [
            judge.whole_object(
                judge.Seen(*(part[i : i + 1] for part in seen)),
                scene.actors[0].figure,
                new_masks[i : i + 1],
                mirrored_masks[i : i + 1],
            )
            for i, scene in enumerate(new)
        ]
        return torch.cat(right)

    names = list(PLACES)
    moved = [
        replace(s, place=names[(names.index(s.place) + 1 + i % (len(names) - 1)) % len(names)])
        for i, s in enumerate(new)
    ]
    moved_pictures, _ = drawn(moved)

    def of_place(pictures: Tensor) -> Tensor:
        seen = judge.look_at(network, through(pictures))
        frames = (judge.Seen(*(part[i : i + 1] for part in seen)) for i in range(len(moved)))
        right = [judge.whole_place(frame, scene.place) for frame, scene in zip(frames, moved, strict=True)]
        return torch.cat(right)

    haloed = (old_masks & ~new_masks).sum((1, 2)) >= LEAST_HALO * new_masks.sum((1, 2))
    seen = judge.look_at(network, through(new_pictures))
    looks = np.array(judge.looks(seen)) == [list(LOOKS).index(scene.actors[0].look) for scene in new]
    right = {
        "true": {
            "drawn": whole(new_pictures),
            "facing the other way": whole(mirrored_pictures),
            "6 % smaller": whole(smaller),
            "another place": of_place(moved_pictures),
            "look": torch.from_numpy(looks),
        },
        "chimeras": {
            **{name: whole(make(pair)) for name, make in chimeras.OF_OBJECTS.items()},
            "patch of the old place": of_place(chimeras.patch(new_pictures, moved_pictures, new_masks)),
        },
    }
    counted = {"halo": haloed}
    return {
        part: {name: round(float(x[counted.get(name, ...)].float().mean()), 4) for name, x in kinds.items()}
        for part, kinds in right.items()
    }


@torch.inference_mode()
def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.world2.examine", description=__doc__, formatter_class=layout)
    parser.add_argument("--segmenter", type=Path, default=segmenter.WEIGHTS)
    parser.add_argument("--model", type=Path, help="whose autoencoder the pictures go through")
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    vae = demo_model.load(args.model)[2] if args.model else None

    def through(pictures: Tensor) -> Tensor:
        return passed(vae, pictures) if vae else pictures

    report = examine(segmenter.load(args.segmenter), through, args.pairs)
    print(json.dumps(report, indent=2))
    wrong = [f"{name} {share:.2f} < {LEAST_TRUE}" for name, share in report["true"].items() if share < LEAST_TRUE]
    wrong += [f"{n} {share:.2f} > {MOST_CHIMERAS}" for n, share in report["chimeras"].items() if share > MOST_CHIMERAS]
    sys.exit(f"out of bounds: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
