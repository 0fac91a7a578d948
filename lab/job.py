"""The demo as a job for a running ComfyUI: started by `run.py demo`.

It runs an example workflow over HTTP, saves the videos with a labelled comparison and a contact sheet in
output/demo/, measures them, and exits with 1 when a figure is below its floor.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor
from tqdm import tqdm

from ..demo import world
from ..tav_core.method import metrics
from ..tav_core.pictures import image
from ..tav_core.pictures.compare import side_by_side
from ..tools.api import Comfy, Graph, Prompt, Refused, failure, to_api
from . import classifier, measure, sheet

PROJECT = Path(__file__).resolve().parent.parent
OUT = PROJECT / "output" / "demo"
FLOORS = {"right": 0.75, "motion": 0.85, "psnr": 25.0}
EDITS = ("object", "background", "style")
STAGES = {"TAVOneShotTune": "tune", "TAVDDIMInvert": "invert", "TAVSampleVideo": "sample"}


class Video(NamedTuple):
    """Pictures [f, h, w, 3] in 0 … 1, frames per second, and the file as it was written."""

    pictures: Tensor
    fps: Fraction
    file: bytes


class Stopped(Exception):
    """An expected end before the job's; the text is all that the user is shown."""


# --- what is run ------------------------------------------------------------------------------------------------


def quickstart(comfy: Comfy) -> Prompt:
    """The quickstart workflow as it is."""
    return prompt_of(comfy, "1-Quickstart")


def own_clip(comfy: Comfy, video: Path, caption: str, checkpoint: str, edits: list[str]) -> Prompt:
    """The workflow for a checkpoint, on a video of the user's, with an output for the source and for each edit."""
    graph = Graph(prompt_of(comfy, "2-Your own video"))
    with av.open(str(video)) as source:
        available = source.streams.video[0].frames or sum(1 for _ in source.decode(video=0))
    count = min(24, available)
    graph.set("CheckpointLoaderSimple", ckpt_name=checkpoint)
    graph.set("LoadVideo", file=comfy.upload(video))
    graph.set("caption: what the clip shows", text=caption)
    clip = graph.set("TAVLoadClip", count=count, stride=2 if 2 * count <= available else 1)
    empty = graph.find("empty prompt")
    text = graph.find("edit: what you want to see")
    output = [create := graph.find("CreateVideo"), graph.find("SaveVideo")]
    sampling = [sample := graph.find("TAVSampleVideo"), graph.find("VAEDecode")]

    copies = graph.copy(output, "source")
    graph.set(copies[create], images=[clip, 0])
    copies = graph.copy([*sampling, *output], "reconstruction")
    graph.set(copies[sample], cfg=1.0, positive=[empty, 0])
    for edit in edits:
        copies = graph.copy([text, *sampling, *output], edit)
        graph.set(copies[text], text=edit)
    graph.remove([text, *sampling, *output])
    return graph.prompt


def prompt_of(comfy: Comfy, name: str) -> Prompt:
    workflow = (PROJECT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")
    return to_api(json.loads(workflow), comfy.get("/object_info"))


def run(comfy: Comfy, prompt: Prompt) -> tuple[dict[str, Video], dict[str, float]]:
    """Run a prompt behind a progress bar; returns each SaveVideo's result by its title, and seconds by stage.

    Raises Refused when the prompt is not valid, and Stopped when it ends before its end.
    """
    seconds: dict[str, float] = {}
    stage, started = "load", time.perf_counter()
    bar: tqdm | None = None

    def enter(node: str | None) -> None:
        nonlocal stage, started, bar
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - started
        if bar is not None:
            bar.close()
        bar, started = None, now
        stage = STAGES.get(prompt[node]["class_type"], "encode, decode, write") if node else "end"

    def on_event(kind: str, data: Any) -> None:
        nonlocal bar
        if kind == "executing" and data.get("node") in {*prompt, None}:
            enter(data.get("node"))
        elif kind == "progress" and stage in STAGES.values():
            if bar is None:
                bar = tqdm(total=data["max"], desc=prompt[data["node"]]["_meta"]["title"], unit="step")
            bar.update(data["value"] - bar.n)

    history = comfy.run(prompt, on_event)
    enter(None)
    if reason := failure(history):
        raise Stopped(reason)
    videos = {}
    for number, output in history["outputs"].items():
        if prompt[number]["class_type"] == "SaveVideo":
            videos[prompt[number]["_meta"]["title"]] = read(comfy.download(output["images"][0]))
    return videos, {name: round(value, 1) for name, value in seconds.items()}


def read(file: bytes) -> Video:
    with av.open(io.BytesIO(file)) as video:
        rate = video.streams.video[0].average_rate or Fraction(8)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    return Video(image.from_bytes(frames), Fraction(rate), file)


# --- what is measured -------------------------------------------------------------------------------------------


def measure_demo(prompt: Prompt, videos: Mapping[str, Video]) -> dict[str, Any]:
    """Figures of the quickstart, whose clip is known: each edit shows what it should, where it should."""
    judge = classifier.load()
    graph = Graph(prompt)
    inputs = prompt[graph.find("TAVDemoClip")]["inputs"]
    clip = world.make_clip(
        inputs["motion"], inputs["object"], inputs["background"], frames=inputs["frames"], seed=inputs["seed"]
    )
    figures: dict[str, Any] = {}
    with torch.inference_mode():
        for edit in EDITS:
            pictures = videos[edit].pictures
            caption = prompt[graph.find(f"{edit} edit")]["inputs"]["text"]
            wanted = next(scene for scene in world.scenes() if scene.caption == caption)
            seen = measure.places(judge, pictures)
            figures[edit] = {
                "prompt": caption,
                **measure.right(judge, pictures, wanted),
                "right": measure.right(judge, pictures, wanted)[edit],
                "motion": measure.motion_correlation(seen, clip.positions),
                "position error": measure.position_error(seen, clip.positions),
                "frame consistency": measure.frame_consistency(judge, pictures),
            }
    return figures


def measure_own(videos: Mapping[str, Video]) -> dict[str, Any]:
    """Figures of a clip of which nothing is known: does it move when and where the source moves?"""
    source = videos["source"].pictures
    names = [name for name in videos if name not in ("source", "reconstruction")]
    return {
        name: {"prompt": name, "motion": metrics.change_correlation(source, videos[name].pictures)} for name in names
    }


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(next(iter(figures.values())))
    rows = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in figures.values()]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]]
    return "\n".join(lines)


# --- what is kept -----------------------------------------------------------------------------------------------


def keep(videos: Mapping[str, Video], figures: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("edit_*.mp4"):  # of a run with more prompts
        old.unlink()
    names = {name: f"edit_{i}" for i, name in enumerate(figures, 1)}
    for name, video in videos.items():
        (OUT / f"{names.get(name, name)}.mp4").write_bytes(video.file)
    labelled = {name: videos[name].pictures for name in ("source", "reconstruction")}
    labelled |= {row["prompt"]: videos[name].pictures for name, row in figures.items()}
    sheet.contact_sheet(labelled).save(OUT / "contact_sheet.png")
    together = (side_by_side(labelled, list(labelled)) * 255).round().byte().numpy()
    fps = videos["source"].fps
    write_video(OUT / "side_by_side.mp4", together, fps, crf="14")
    del labelled["reconstruction"]
    first, *rest = map(sheet.picture, side_by_side(labelled, list(labelled)))
    first.save(OUT / "edits.webp", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=85)
    (OUT / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def write_video(file: Path, frames: np.ndarray, fps: Fraction, **options: str) -> None:
    """Write frames, uint8 [f, h, w, 3], with H.264; `options` are its encoder's."""
    with av.open(str(file), "w") as video:
        stream = video.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="run.py demo")
    parser.add_argument("address")
    parser.add_argument("--video", type=Path)
    parser.add_argument("--caption")
    parser.add_argument("--checkpoint")
    parser.add_argument("--prompt", nargs="+")
    args = parser.parse_args()
    comfy = Comfy(args.address)
    try:
        if args.video:
            prompt = own_clip(comfy, args.video, args.caption, args.checkpoint, args.prompt)
        else:
            prompt = quickstart(comfy)
        videos, seconds = run(comfy, prompt)
    except (Stopped, Refused) as error:
        sys.exit(f"run.py: error: {error}")
    except FFmpegError as error:
        sys.exit(f"run.py: error: {args.video} cannot be read as a video ({error}): name an mp4, webm or mov file.")
    figures = measure_own(videos) if args.video else measure_demo(prompt, videos)
    psnr = float(metrics.psnr(videos["reconstruction"].pictures, videos["source"].pictures).mean())
    report = {"edits": figures, "reconstruction PSNR": round(psnr, 2), "seconds": seconds}
    keep(videos, figures, report)
    print(table(figures))
    print(f"reconstruction of the source: {psnr:.1f} dB")
    print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value >= 0.5))
    print(f"results: {OUT}")
    missed = []
    if not args.video:
        missed = [f"{edit}: {name} {row[name]:.2f}" for edit, row in figures.items() for name in ("right", "motion")
                  if not row[name] >= FLOORS[name]]  # fmt: skip
        missed += [f"reconstruction {psnr:.1f} dB"] if psnr < FLOORS["psnr"] else []
    sys.exit(f"run.py: below the floor: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
