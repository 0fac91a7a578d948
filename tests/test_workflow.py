"""The example workflow over HTTP: a checkpoint of Stable Diffusion 1.5's kind, a video in, a video out."""

import json
import time
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
from checkpoint import write_checkpoint
from live_server import PROJECT, Server
from prompts import change, node
from tune_a_video.lab import job
from tune_a_video.tools.api import Graph, Refused, to_api
from videos import write_video

CAR = PROJECT.parent / "shared" / "videos" / "car-turn.mp4"
FRAMES, SIZE = 4, 64


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    with Server(base) as server:
        write_checkpoint(base / "models" / "checkpoints" / "sd15.ckpt")
        yield server


@pytest.fixture(scope="module")
def source(server):
    """The name of an uploaded video, and its frames per second."""
    path = server.base / "input" / "clip.mp4"
    path.write_bytes(CAR.read_bytes()) if CAR.is_file() else make_video(path)
    with av.open(str(path)) as video:
        return path.name, video.streams.video[0].average_rate


def make_video(path: Path):
    """A bright square that moves over a gradient: 24 frames, 10 a second."""
    pictures = []
    for i in range(24):
        picture = np.tile(np.linspace(0, 160, 96, dtype=np.uint8)[None, :, None], (80, 1, 3))
        picture[20:50, 3 * i : 3 * i + 20] = 230
        pictures.append(picture)
    write_video(path, pictures)


@pytest.fixture
def prompt(server, source):
    """The example workflow, made small."""
    workflow = json.loads((PROJECT / "example_workflows" / "2-Your own video.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.get("/object_info"))
    small = {
        "CheckpointLoaderSimple": {"ckpt_name": "sd15.ckpt"},
        "LoadVideo": {"file": source[0]},
        "TAVLoadClip": {"count": FRAMES, "width": SIZE, "height": SIZE},
        "TAVOneShotTune": {"steps": 2},
        "TAVDDIMInvert": {"steps": 2},
        "TAVSampleVideo": {"steps": 2},
    }
    for entry in prompt.values():
        entry["inputs"] |= small.get(entry["class_type"], {})
    return prompt


def test_example_workflow_writes_the_edited_video(server, source, prompt):
    progress, previews = {}, {}
    running = ""

    def on_event(kind, data):
        nonlocal running
        if kind == "executing" and data["node"]:
            running = prompt[data["node"]]["class_type"]
        elif kind == "progress":
            progress[running] = data["value"], data["max"]
        elif kind == "binary":
            previews[running] = previews.get(running, 0) + 1

    history = server.run(prompt, on_event)
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
    for kind in ("TAVOneShotTune", "TAVDDIMInvert", "TAVSampleVideo"):
        assert progress[kind] == (2, 2) and previews[kind] >= 1, kind

    written = history["outputs"][Graph(prompt).find("SaveVideo")]["images"][0]
    with av.open(str(server.base / "output" / written["subfolder"] / written["filename"])) as video:
        # The clip takes every second frame and keeps the speed of the source.
        assert abs(video.streams.video[0].average_rate - source[1] / 2) < Fraction(1, 100)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert frames.std() > 5, "the video is one colour"


def test_cancel_stops_a_tune_within_a_step_and_the_next_run_works(server, prompt):
    Graph(prompt).set("TAVOneShotTune", steps=1000, seed=1)
    seen, cancelled = [], None

    def on_event(kind, data):
        nonlocal cancelled
        if kind == "progress" and data["max"] == 1000:
            seen.append((data["value"], time.monotonic()))
            if data["value"] == 2:
                server.post("/interrupt", {})
                cancelled = time.monotonic()

    history = server.run(prompt, on_event)
    assert history["status"]["messages"][-1][0] == "execution_interrupted"
    assert cancelled is not None and seen[-1][0] <= 4

    Graph(prompt).set("TAVOneShotTune", steps=1)
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_bad_input_is_one_clear_line_before_any_work(server, prompt):
    Graph(prompt).set("TAVLoadClip", count=300)
    started = []
    history = server.run(prompt, lambda kind, data: started.append(data) if kind == "progress" else None)
    error = dict(history["status"]["messages"])["execution_error"]
    assert error["exception_type"] == "ValueError"
    assert "300 frames at stride 2" in error["exception_message"] and "largest count is" in error["exception_message"]
    assert not started


def test_weights_are_kept_described_and_read_again_when_they_change(server, prompt):
    tune = Graph(prompt).find("TAVOneShotTune")
    prompt[tune]["inputs"] |= {"steps": 1}
    for kind in ("SaveVideo", "TAVSampleVideo", "TAVDDIMInvert"):
        drop(prompt, Graph(prompt).find(kind))
    prompt["save"] = node("TAVSaveWeights", weights=[tune, 1], filename_prefix="car/turn", precision="fp32")
    assert server.run(prompt)["status"]["status_str"] == "success"
    (name,) = server.get("/object_info/TAVLoadWeights")["TAVLoadWeights"]["input"]["required"]["file"][1]["options"]
    assert name.replace("\\", "/") == "car/turn_00001.safetensors"
    shown = server.get(f"/view_metadata/tune_a_video?filename={quote(name)}")
    assert shown["base_family"] == "Stable Diffusion 1.x (epsilon)"
    assert shown["caption"] == prompt[prompt[tune]["inputs"]["caption"][0]]["inputs"]["text"]
    assert (shown["stride"], shown["frames"], shown["size"]) == ("2", str(FRAMES), f"{SIZE}x{SIZE}")

    again = {
        "load": node("TAVLoadWeights", file=name),
        "save": node("TAVSaveWeights", weights=["load", 0], filename_prefix="copy", precision="fp16"),
    }
    folder = server.base / "models" / "tune_a_video"
    for expected in (1, 1, 2):
        if expected == 2:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
        assert server.run(again)["status"]["status_str"] == "success"
        assert len(list(folder.glob("copy_*.safetensors"))) == expected

    again["load"]["inputs"]["file"] = "../../checkpoints/sd15.ckpt"
    with pytest.raises(Refused, match="is absolute, or has an empty or hidden part or a step upwards"):
        server.run(again)


def test_the_demos_job_on_an_own_clip(server, prompt):
    """`run.py demo --video … --checkpoint …`, made small."""
    own = job.own_clip(server, PROJECT / "lab" / "quickstart.mp4", "a car", "sd15.ckpt", ["a dog", "a cat"])
    change(own, width=SIZE, height=SIZE, count=2, steps=1, stride=1)
    videos, _seconds = job.run(server, own)
    assert set(videos) == {"source", "reconstruction", "a dog", "a cat"}
    assert all(video.pictures.shape == (2, SIZE, SIZE, 3) for video in videos.values())
    assert set(job.measure_own(videos)) == {"a dog", "a cat"}


def drop(prompt, name):
    """Take a node out, with all that follows it."""
    del prompt[name]
    for other, entry in list(prompt.items()):
        links = [value[0] for value in entry["inputs"].values() if isinstance(value, list)]
        if name in links and other in prompt:
            drop(prompt, other)
