"""Clips longer than a window: the whole clip at once beside windows, in tuning, inversion and sampling.

A way to cut a clip is right where nobody can see it: as much changes at the joins of windows as elsewhere, and a new
place does not wander off while the clip goes on.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..demo.world import Scene
from ..tav_core.method.windows import WHOLE, Windows
from ..tav_core.pictures import image
from . import sheet, strict, tables
from .clips import ALL, made
from .judged import Judge
from .kept import kept
from .measure import path_changes
from .subject import CFG, RECIPE, Studio, Subject

FRAMES, ENDS = 64, 8  # of a clip; of the part at either end that drift is measured on
CLIPS = (0, 1, 3)
HEADS = ("object", "background")
# Shorter than for clips of 8 frames, where neither more tuning nor more steps was seen to change a figure.
SHORT, STEPS = replace(RECIPE, steps=150), 20
CUT = Windows(16, 4)
WAYS = {"whole clip at once": WHOLE, "windows of 16, overlap 4": CUT}
# What windows may do, as a part of the whole clip's figure at the same frames, for a clip has jumps of its own.
BOUNDS = {"joins": 1.1, "largest": 1.1, "drift_background": 1.5}


def joins(windows: Windows, frames: int) -> Tensor:
    """Which neighbours, frame t and t + 1, lie in an overlap of two windows or beside one; bool [frames - 1]."""
    shared = torch.zeros(frames, dtype=torch.bool)
    runs = [set(run[1:]) for run in windows.of(frames)]
    for one, other in pairwise(runs):
        shared[sorted(one & other)] = True
    return shared[1:] | shared[:-1]


def steadiness(judged: Judge, head: str, wanted: Scene, pictures: Tensor, at: Tensor) -> dict[str, float]:
    """How much an edit changes where nothing should, pictures [f, h, w, 3]; `at`: what `joins` says.

    Returns:
        joins, largest: change of the place from frame to frame `at` joins, as a part of that elsewhere: mean, largest.
        object_joins: the same of a square that goes with the object's path, whose own motion counts too.
        drift: difference of the mean pictures of the first and last ENDS frames where nothing ever stands, 0 … 255.
    """
    thing = judged.meant(wanted, pictures)
    shown = judged.truth(thing)
    stands = strict.seen(shown.source, shown.plate, 0) | strict.seen(shown.drawn, shown.plate, 0)
    place = ~strict.grown(stands, 3)
    both = place[1:] & place[:-1]
    changes = 255 * (pictures[1:] - pictures[:-1]).abs().mean(-1)
    changes = (changes * both).sum((1, 2)) / both.sum((1, 2))
    objects = path_changes(pictures, judged.clip.positions)
    first, last = (part.mean(0) for part in (pictures[:ENDS], pictures[-ENDS:]))
    return {
        "joins": float(changes[at].mean() / changes[~at].mean()),
        "largest": float(changes[at].max() / changes[~at].max()),
        "object_joins": float(objects[at].mean() / objects[~at].mean()),
        "drift": float(255 * (first - last).abs().mean(-1)[place.all(0)].mean()),
    }


@torch.inference_mode()
def run(studio: Studio, number: int, way: str, out: Path) -> list[dict[str, Any]]:
    """Edit one of the clips in one way; its figures, and contact sheets of its edits in `out`."""
    clip, wanted = made(number, FRAMES)
    judged, at = Judge(studio, clip), joins(CUT, FRAMES)
    subject = Subject(studio, clip, studio.latents(clip.frames), SHORT, STEPS)
    started = time.perf_counter()
    video = subject.tune(windows=WAYS[way])
    edit = subject.edit_from(video, subject.invert(video))
    edited = {head: studio.decode(edit(wanted[head].caption)) for head in HEADS}
    tqdm.write(f"{clip.caption}, {way}: {time.perf_counter() - started:.0f} s")
    shown = {clip.caption: image.from_bytes(clip.frames), **{wanted[head].caption: edited[head] for head in HEADS}}
    sheet.contact_sheet(shown, FRAMES // 8).save(out / f"long_{number:02d}_{list(WAYS).index(way)}.png")
    rows = []
    for head, pictures in edited.items():
        row = {"way": way, "clip": clip.caption, "edit": head, **judged.figures(head, wanted[head], pictures)}
        row |= steadiness(judged, head, wanted[head], pictures, at)
        rows.append(row | ({"drift_background": row["drift"]} if head == "background" else {}))
    return rows


# Means over the edits.
COLUMNS: tables.Columns = {
    "right": ("right edit", ".0%", np.mean),
    "whole": ("whole object", ".0%", np.mean),
    "motion": ("motion correlation", ".3f", np.mean),
    "cells": ("position error, cells", ".2f", np.mean),
    "flicker": ("flicker on the path", ".1f", np.mean),
    "joins": ("change at joins / elsewhere", ".2f", np.mean),
    "largest": ("largest change", ".2f", np.mean),
    "object_joins": ("of the object", ".2f", np.mean),
    "drift": ("drift, of 255", ".2f", np.mean),
    "drift_background": ("of a new place", ".2f", np.mean),
}


def table(rows: list[dict[str, Any]]) -> str:
    """The whole clip at once has no joins: its changes at the same frames stand there."""
    return tables.table(rows, "way", WAYS, COLUMNS)


def mean(rows: list[dict[str, Any]], way: str, key: str) -> float:
    return float(np.mean([row[key] for row in rows if row["way"] == way and key in row]))


def evaluate(studio: Studio, out: Path) -> str:
    """Print the table; what is out of its bounds, or ""."""
    rows = []
    for number in tqdm(CLIPS, "clips"):
        for i, way in enumerate(WAYS):
            setting = {"clip": list(ALL[number]), "way": way, "recipe": asdict(SHORT), "steps": STEPS, "cfg": CFG}
            layout = [WAYS[way].of(FRAMES, timestep) for timestep in range(0, 1000, 100)]
            setting |= {"windows": [*layout, WAYS[way].for_tuning(FRAMES)]}
            file = out / f"long_{number:02d}_{i}.json"
            rows += kept(file, setting, lambda number=number, way=way: run(studio, number, way, out))
    print(f"{FRAMES} frames, {len(rows) // len(WAYS)} edits", table(rows), sep="\n\n")
    once, cut = WAYS
    found = {name: mean(rows, cut, name) / mean(rows, once, name) for name in BOUNDS}
    print("beside the whole clip:", ", ".join(f"{COLUMNS[name][0]} {share:.2f}" for name, share in found.items()))
    missed = [f"{name} {found[name]:.2f} > {most}" for name, most in BOUNDS.items() if not found[name] <= most]
    return f"out of its bounds: {', '.join(missed)}" if missed else ""
