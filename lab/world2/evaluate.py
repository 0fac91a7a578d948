"""The method measured on world 2, by its segmenter and the clips' known truth.

  python tools/pack.py lab.world2.evaluate --model FILE [--clips N …] [--methods NAME …] [--out FOLDER]

Three edits of each clip: another thing, or the person does something else; another place; another style. Writes figures
and contact sheets of each clip as it is done, takes those that are there from the folder, and prints a table for the
clips to develop on and one for those that are held out, with two ceilings: the drawn edit as the autoencoder passes it,
and the image model without a clip.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...demo import model as demo_model
from ...tav_core.pictures import image
from .. import evaluate, measure, quality, sheet, strict, tables
from ..evaluate import LEVERS, METHODS
from ..judged import CELL
from ..kept import kept
from ..subject import CFG, GROUP_NORM, RECIPE, STEPS, Edit, Studio, Subject
from . import clips, judge, segmenter
from .sprites import FIGURES, PERSON, VERBS
from .world import PLACES, STYLES, Clip, draw, plate

FRAMES = 8
DRAWN, ALONE = "the edit drawn, not sampled", "the image model, from noise alone"
SETS = {"development": clips.DEVELOPMENT, "held out": clips.HELD_OUT}


@dataclass
class Judge:
    """What says how good the edits of a clip are.

    Attributes:
        source, other: the clip; the figure that crosses its actor's way, or None.
        network: the segmenter.
    """

    studio: Studio
    source: Clip
    other: str | None
    network: segmenter.Segmenter

    def figures(self, kind: str, drawn: Clip, pictures: Tensor) -> dict[str, float]:
        """All figures of an edit of a kind, of clips.EDITS, that should look as `drawn`; pictures [f, h, w, 3].

        Returns:
            thing, verb, place, style: share of frames with the new one.
            whole, iou: see `judge.whole_object`, of edits to another figure; mean overlap of outlines.
            old_left: share of the old figure's pixels, outside of the drawn one, that still show it.
            background, object_kept: PSNR in dB to the source: outside of both figures and their shadows, where the
                figure is edited; inside of the figure, where the place is.
            agreement: share of frames with the look that most frames have.
            motion, cells, flicker: see `measure`; the figure's middle against the drawn one's.
        """
        seen = self.without_other(judge.look_at(self.network, pictures), drawn)
        wanted, actor = drawn.scenes[0], drawn.scenes[0].actors[0]
        masks = torch.from_numpy(drawn.masks[:, 0])
        found = {"agreement": judge.look_agreement(seen), **self.path(seen, actor.figure, masks)}
        found["flicker"] = measure.flicker(pictures, drawn.positions[:, 0])
        if kind == "figure":
            found["verb" if actor.figure in VERBS else "thing"] = judge.figure_right(seen, actor.figure)
            found |= self.object(seen, drawn, pictures)
        elif kind == "place":
            found["place"] = float(judge.whole_place(seen, wanted.place).float().mean())
            found["object_kept"] = strict.psnr_within(pictures, self.shown, self.masks)
        else:
            found["style"] = float((seen.style == list(STYLES).index(wanted.style)).float().mean())
        return found

    def object(self, seen: judge.Seen, drawn: Clip, pictures: Tensor) -> dict[str, float]:
        """The strict figures of an edit to another figure."""
        actors = [scene.actors[0] for scene in drawn.scenes]
        turned = [replace(actor, pose=actor.pose._replace(flip=not actor.pose.flip)) for actor in actors]
        mirrored = [
            draw(replace(scene, actors=(actor, *scene.actors[1:]))).masks[0]
            for scene, actor in zip(drawn.scenes, turned, strict=True)
        ]
        new, other_way = torch.from_numpy(drawn.masks[:, 0]), torch.from_numpy(np.stack(mirrored))
        figure, old = actors[0].figure, self.source.scenes[0].actors[0].figure
        overlap = torch.maximum(*(judge.iou(seen.shows == FIGURES.index(figure), mask) for mask in (new, other_way)))
        empty = self.studio.through(image.from_bytes(np.stack([plate(scene) for scene in drawn.scenes])))
        stands = [strict.seen(x, empty, 0) for x in (self.shown, self.studio.through(image.from_bytes(drawn.frames)))]
        return {
            "whole": float(judge.whole_object(seen, figure, new, other_way).float().mean()),
            "iou": float(overlap.mean()),
            "old_left": float(judge.object_left(seen, old, self.masks & ~new).mean()),
            "background": strict.psnr_within(pictures, self.shown, ~strict.grown(stands[0] | stands[1], 3)),
        }

    def path(self, seen: judge.Seen, figure: str, masks: Tensor) -> dict[str, float]:
        """How the figure follows the drawn one, in the frames that show both; without three of them it does not."""
        found, truth = judge.places(seen, figure), judge.middles(masks)
        both = np.isfinite(found).all(1) & np.isfinite(truth).all(1)
        if both.sum() < 3:
            return {"motion": 0.0}
        where = found[both], truth[both]
        return {"motion": measure.motion_correlation(*where), "cells": measure.position_error(*where) / CELL}

    def without_other(self, seen: judge.Seen, drawn: Clip) -> judge.Seen:
        """The same with the place where the figure that crosses is seen, or drawn: it is not what is judged."""
        if self.other is None:
            return seen
        actor, other = torch.from_numpy(drawn.masks).unbind(1)
        there = (strict.grown(other, 2) & ~actor) | (seen.shows == FIGURES.index(self.other))
        return seen._replace(shows=seen.shows.masked_fill(there, segmenter.CLASSES.index(drawn.scenes[0].place)))

    @cached_property
    def shown(self) -> Tensor:
        return self.studio.through(image.from_bytes(self.source.frames))

    @cached_property
    def masks(self) -> Tensor:
        return torch.from_numpy(self.source.masks[:, 0])


def masked(subject: Subject) -> Edit:
    """With a mask of the figure that the caption names, or of all but that; none where the style is edited."""
    scene = subject.clip.scenes[0]
    actor = scene.actors[0]
    word = PERSON if actor.figure in VERBS else actor.figure
    return evaluate.masked_by(
        subject, word, lambda prompt: (prompt.startswith(actor.phrase), PLACES[scene.place] in prompt)
    )


WAYS = {**METHODS, **LEVERS, "mask of the object": masked}
COLUMNS: tables.Columns = {
    "thing": ("right thing", ".0%", np.mean),
    "verb": ("right verb", ".0%", np.mean),
    "place": ("right place", ".0%", np.mean),
    "style": ("right style", ".0%", np.mean),
    "whole": ("whole figure", ".0%", np.mean),
    "iou": ("outline, IoU", ".2f", np.mean),
    "old_left": ("old figure left", ".1%", np.mean),
    "background": ("background kept, dB", ".1f", np.median),
    "object_kept": ("object kept, dB", ".1f", np.median),
    "agreement": ("looks that agree", ".0%", np.mean),
    "motion": ("motion correlation", ".3f", np.median),
    "cells": ("position error, cells", ".2f", np.median),
    "flicker": ("flicker on the path", ".1f", np.median),
}
# Of the table of differences: names and digits.
DIFFERENCES = {
    "agreement": ("looks that agree", ".0%"),
    "verb": ("right verb", ".0%"),
    "whole": ("whole figure", ".0%"),
    "background": ("background kept, dB", ".1f"),
    "object_kept": ("object kept, dB", ".1f"),
    "motion": ("motion correlation", ".3f"),
    "flicker": ("flicker on the path", ".1f"),
}
OF_PICTURES = ("thing", "verb", "place", "style")  # what pictures without a clip can be right in


@torch.inference_mode()
def run(
    studio: Studio, network: segmenter.Segmenter, number: int, methods: list[str], out: Path
) -> list[dict[str, Any]]:
    """Edit one of the clips by each method; its figures, and contact sheets of its edits in `out`."""
    plan, edits = clips.plan(number), clips.edits(number)
    clip, drawn = plan.make(FRAMES), {kind: edit.make(FRAMES) for kind, edit in edits.items()}
    judged = Judge(studio, clip, plan.other and plan.other.figure, network)
    subject = Subject(studio, clip, studio.latents(clip.frames), RECIPE, STEPS)
    rows, sheets = [], {kind: {clip.caption: image.from_bytes(clip.frames)} for kind in drawn}

    def take(method: str, kind: str, pictures: Tensor, keys: tuple[str, ...] = ()) -> None:
        found = judged.figures(kind, drawn[kind], pictures)
        found = {key: value for key, value in found.items() if not keys or key in keys}
        rows.append({"method": method, "clip": number, "edit": kind, **found})
        sheets[kind][f"{drawn[kind].caption}\n{method}"] = pictures

    for method in tqdm(methods, clip.caption, leave=False):
        edit = WAYS[method](subject)
        for kind, wanted in drawn.items():
            take(method, kind, studio.decode(edit(wanted.caption)))
    for kind, wanted in drawn.items():
        alone = quality.generate(studio.model, studio.clip, studio.vae, [wanted.caption] * FRAMES)
        take(ALONE, kind, alone, OF_PICTURES)
        take(DRAWN, kind, studio.through(image.from_bytes(wanted.frames)))
        sheet.contact_sheet(sheets[kind]).save(out / f"clip_{number:02d}_{kind}.png")
    return rows


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.world2.evaluate", description=__doc__, formatter_class=layout)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--segmenter", type=Path, default=segmenter.WEIGHTS)
    parser.add_argument("--clips", nargs="+", type=int, choices=range(clips.COUNT), default=range(clips.COUNT))
    parser.add_argument("--methods", nargs="+", choices=WAYS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("output/evaluation2"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    studio, network = Studio(*demo_model.load(args.model), None), segmenter.load(args.segmenter)
    files = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (args.model, args.segmenter)]
    setting = {"files": files, "methods": args.methods, "recipe": asdict(RECIPE), "steps": STEPS, "cfg": CFG}
    setting |= {"frames": FRAMES, "group_norm": GROUP_NORM, "figures": list(COLUMNS)}

    def rows_of(number: int) -> list[dict[str, Any]]:
        file = args.out / f"clip_{number:02d}.json"
        return kept(file, setting, lambda: run(studio, network, number, args.methods, args.out))

    by_clip = {number: rows_of(number) for number in tqdm(args.clips, "clips")}
    for name, numbers in SETS.items():
        if rows := [row for number in numbers for row in by_clip.get(number, [])]:
            ways = [*args.methods, ALONE, DRAWN]
            print(f"## {name}, {len(rows) // len(ways)} edits", tables.table(rows, "method", ways, COLUMNS), sep="\n\n")
            print(tables.beside(rows, "method", args.methods, DIFFERENCES, evaluate.LESS_IS_MORE), sep="\n\n")


if __name__ == "__main__":
    main()
