"""The method measured on the demo's world, beside what is left of it when a part is taken away.

  python run.py evaluate [--quick | --long] [--out FOLDER]

Clips of known motion, three edits each (object, background, style): twelve to develop on, and twelve that are held out.
Writes the figures and contact sheets of each clip as it is done, and takes clips that are there from the folder; prints
two tables in Markdown for either set, the second one strict, and exits with 1 when the whole method is below its floor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..demo import model
from ..tav_core import host
from ..tav_core.method import ddim
from ..tav_core.method.guidance import Steering
from ..tav_core.method.inflation import LIGHT
from ..tav_core.pictures import image
from ..tav_core.pipeline import finding
from . import classifier, long, sheet, tables
from .clips import ALL, HEADS, SETS, drawn, made
from .judged import CELL, FLOW, Judge
from .kept import kept
from .subject import CFG, GROUP_NORM, RECIPE, STEPS, Edit, Studio, Subject, quiet

FRAMES = 8
QUICK = (0, 1, 12)
FLOORS = {"right": 0.85, "motion": 0.9}
CEILINGS = {"cells": 1.0}


def whole_method(subject: Subject) -> Edit:
    return subject.edit_from(subject.tuned, subject.invert(subject.tuned))


def without_tuning(subject: Subject) -> Edit:
    video = subject.video()
    return subject.edit_from(video, subject.invert(video))


def without_inversion(subject: Subject) -> Edit:
    """The tuned model from noise that has nothing of the clip."""
    sigma = ddim.ddim_sigmas(host.model_sigmas(subject.tuned), subject.steps)[-1]
    noise = torch.randn(subject.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    start = subject.tuned.model.process_latent_out(noise * (1 + sigma**2).sqrt())
    return subject.edit_from(subject.tuned, {"samples": start, host.KEY: {"steps": subject.steps}})


def inflated_with(**choices: Any) -> Callable[[Subject], Edit]:
    """The whole method on a model that is inflated otherwise, tuned so as well; `choices` are of `host.inflate`."""

    def method(subject: Subject) -> Edit:
        video = subject.tune(**choices)
        return subject.edit_from(video, subject.invert(video))

    return method


def frame_by_frame(subject: Subject) -> Edit:
    """The image model on each frame by itself: inflated, one frame is exactly that."""
    frames = [replace(subject, latent={"samples": frame[None]}) for frame in subject.latent["samples"]]
    parts = [without_tuning(frame) for frame in frames]
    return lambda prompt: {"samples": torch.cat([part(prompt)["samples"] for part in parts])}


def steered(steering: Steering, cfg: float = CFG) -> Callable[[Subject], Edit]:
    """The whole method with one of the ways to leave it."""
    return lambda subject: subject.edit_from(subject.tuned, subject.invert(subject.tuned), cfg, steering)


def shorter(subject: Subject) -> Edit:
    """The whole method with half of the tuning steps."""
    return whole_method(replace(subject, recipe=replace(subject.recipe, steps=subject.recipe.steps // 2)))


def exactly_inverted(subject: Subject) -> Edit:
    return subject.edit_from(subject.tuned, subject.invert(subject.tuned, "exact"))


def masked(subject: Subject) -> Edit:
    """With a mask of the object that the caption names, or of all but that; none where the style is edited."""
    scene = subject.clip.scenes[0]
    return masked_by(subject, scene.object, lambda prompt: (scene.object in prompt, scene.background in prompt))


def masked_by(subject: Subject, word: str, keeps: Callable[[str], tuple[bool, bool]]) -> Edit:
    """The whole method with a mask of what `word` names; `keeps` says whether a prompt keeps that, and the place."""
    video, start = subject.tuned, subject.invert(subject.tuned)

    def edit(prompt: str) -> dict[str, Tensor]:
        keeps_object, keeps_place = keeps(prompt)
        latent = start
        if not (keeps_object and keeps_place):
            what, grow = ("background", 0) if keeps_object else ("object", CELL)
            words = subject.studio.clip, subject.clip.caption, word
            latent, _mask = finding.find_mask(video, start, *words, what, grow, callback=quiet)
        return subject.edit_from(video, latent)(prompt)

    return edit


QUICK_METHODS = ["Tune-A-Video", "every frame by itself", "mask of the object"]
METHODS: dict[str, Callable[[Subject], Edit]] = {
    "Tune-A-Video": whole_method,
    "without tuning": without_tuning,
    "without inversion": without_inversion,
    "without sparse-causal attention": inflated_with(attends="own"),
    "group norms over the whole video": inflated_with(group_norm="video"),
    "every frame by itself": frame_by_frame,
}
# Ways to leave the plain method; by --methods only.
LEVERS: dict[str, Callable[[Subject], Edit]] = {
    "mask of the object": masked,
    "structure in 40 % of the steps": steered(Steering(structure=0.4)),
    "guidance 7.5, then 1": steered(Steering(cfg_end=1.0, cfg_until=0.5), 7.5),
    "freedom 0.3": steered(Steering(freedom=0.3)),
    "attending to itself too": inflated_with(attends="first_own_previous"),
    "attending to all frames": inflated_with(attends="all"),
    "tuned for half as long": shorter,
    "exact inversion": exactly_inverted,
    "light layers": inflated_with(layers=LIGHT),
}
TRUTH = "the edit drawn, not sampled"  # the last row of the table: what there is to reach


@torch.inference_mode()
def run(studio: Studio, number: int, methods: list[str], out: Path) -> list[dict[str, Any]]:
    """Edit one of the clips by each method; its figures, and contact sheets of its edits in `out`."""
    clip, wanted = made(number, FRAMES)
    judged = Judge(studio, clip)
    subject = Subject(studio, clip, studio.latents(clip.frames), RECIPE, STEPS)
    rows = []

    def judge(method: str, head: str, pictures: Tensor) -> None:
        measured = judged.figures(head, wanted[head], pictures)
        rows.append({"method": method, "clip": clip.caption, "motion_kind": ALL[number][0], "edit": head, **measured})

    source = {clip.caption: image.from_bytes(clip.frames)}
    edited: dict[str, dict[str, Tensor]] = {}
    for name in methods:
        started = time.perf_counter()
        edit = {**METHODS, **LEVERS}[name](subject)
        edited[name] = {head: studio.decode(edit(scene.caption)) for head, scene in wanted.items()}
        for head, pictures in edited[name].items():
            judge(name, head, pictures)
        tqdm.write(f"{clip.caption}, {name}: {time.perf_counter() - started:.0f} s")
    for head, scene in wanted.items():
        judge(TRUTH, head, studio.through(drawn(clip, head, scene)))
        ways = {f"{scene.caption}\n{name}": pictures[head] for name, pictures in edited.items()}
        sheet.contact_sheet({**source, **ways}).save(out / f"clip_{number:02d}_{head}.png")
    first = {scene.caption: edited[methods[0]][head] for head, scene in wanted.items()}
    sheet.contact_sheet({**source, **first}).save(out / f"clip_{number:02d}.png")
    return rows


def evaluated(studio: Studio, number: int, methods: list[str], out: Path) -> list[dict[str, Any]]:
    """`run`, whose figures are kept."""
    setting = {"clip": list(ALL[number]), "methods": methods, "recipe": asdict(RECIPE)}
    setting |= {"steps": STEPS, "cfg": CFG, "frames": FRAMES, "group_norm": GROUP_NORM, "figures": [*STRICT, *FLOW]}
    return kept(out / f"clip_{number:02d}.json", setting, lambda: run(studio, number, methods, out))


def summary(rows: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Means of shares, medians of the rest, as the table shows them; of consistency and flicker also means."""
    mine = [row for row in rows if row["method"] == method]
    by_edit = {head: np.mean([row["right"] for row in mine if row["edit"] == head]) for head in HEADS}
    return {
        **{f"right {head}": float(share) for head, share in by_edit.items()},
        "right": float(np.mean([row["right"] for row in mine])),
        "kept": float(np.mean([row["kept"] for row in mine])),
        "motion": float(np.nanmedian([row["motion"] for row in mine])),
        "cells": float(np.median([row["cells"] for row in mine])),
        **{name: float(np.median([row[name] for row in mine])) for name in ("consistency", "flicker")},
        **{f"mean {name}": float(np.mean([row[name] for row in mine])) for name in ("consistency", "flicker")},
    }


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """The comparison in Markdown."""
    heads = ["right object", "right background", "right style", "right edit", "rest kept"]
    heads += ["motion correlation", "position error, cells", "frame consistency (mean)", "flicker on the path (mean)"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for method in methods:
        s = summary(rows, method)
        cells = [f"{100 * s[f'right {head}']:.0f} %" for head in HEADS]
        cells += [f"{100 * s['right']:.0f} %", f"{100 * s['kept']:.0f} %"]
        cells += [f"{s['motion']:.3f}", f"{s['cells']:.2f}", f"{s['consistency']:.3f} ({s['mean consistency']:.3f})"]
        cells.append(f"{s['flicker']:.1f} ({s['mean flicker']:.1f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Of the strict table: names, digits and how the edits come together.
STRICT: tables.Columns = {
    "whole": ("whole object", ".0%", np.mean),
    "iou": ("outline, IoU", ".2f", np.mean),
    "old_left": ("old object left", ".1%", np.mean),
    "background": ("background kept, dB", ".1f", np.median),
    "object_kept": ("object kept, dB", ".1f", np.median),
}
BY_FLOW: tables.Columns = {
    "motion_error": ("motion error, px at 512", ".2f", np.median),
    "motion_cosine": ("motion cosine", ".3f", np.median),
    "warp_error": ("warp error, of 255", ".1f", np.median),
}


def strict_table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """Of edits to another object the first four, to another place the fifth, of all edits the flow's."""
    return tables.table(rows, "method", methods, {**STRICT, **BY_FLOW})


# Of the table of differences: names and digits.
DIFFERENCES = {
    "consistency": ("frame consistency", ".4f"),
    "cells": ("position error, cells", ".2f"),
    "flicker": ("flicker on the path", ".1f"),
    "motion": ("motion correlation", ".3f"),
    "whole": ("whole object", ".0%"),
    "background": ("background kept, dB", ".1f"),
    "object_kept": ("object kept, dB", ".1f"),
}
LESS_IS_MORE = {"cells", "flicker"}


def beside(rows: list[dict[str, Any]], methods: list[str]) -> str:
    return tables.beside(rows, "method", methods, DIFFERENCES, LESS_IS_MORE)


def main() -> str:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="run.py evaluate", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="three clips, and three of the ways to edit them")
    numbers = range(len(ALL))
    parser.add_argument("--clips", nargs="+", type=int, choices=numbers, metavar="N", help="these clips only")
    parser.add_argument("--methods", nargs="+", choices={**METHODS, **LEVERS})
    parser.add_argument("--out", type=Path, default=Path("output/evaluation"))
    parser.add_argument("--long", action="store_true", help="clips longer than a window instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    studio = Studio(*model.load(), classifier.load())
    if args.long:
        return long.evaluate(studio, args.out)
    methods = args.methods or (QUICK_METHODS if args.quick else list(METHODS))
    taken = args.clips or (QUICK if args.quick else numbers)
    by_clip = {number: evaluated(studio, number, methods, args.out) for number in tqdm(taken, "clips")}
    for name, clips in SETS.items():
        if rows := [row for number in clips for row in by_clip.get(number, [])]:
            ways = [*methods, TRUTH]
            count = len(rows) // len(ways)
            print(f"## {name}, {count} edits", table(rows, ways), strict_table(rows, ways), sep="\n\n", end="\n\n")
            print(beside(rows, methods), end="\n\n")
    whole = summary([row for rows in by_clip.values() for row in rows], methods[0])
    missed = [f"{name} {whole[name]:.2f} < {floor}" for name, floor in FLOORS.items() if not whole[name] >= floor]
    missed += [f"{name} {whole[name]:.2f} > {top}" for name, top in CEILINGS.items() if not whole[name] <= top]
    return f"out of its bounds: {', '.join(missed)}" if missed else ""


if __name__ == "__main__":
    sys.exit(main() or 0)
