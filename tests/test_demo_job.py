"""The job of `run.py demo`, short: over HTTP in a started server, and what it says of bad input."""

import json

import pytest
import torch
from live_server import Server
from prompts import change
from tune_a_video.lab import job
from tune_a_video.tools.api import Graph, Refused


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("demo")) as server:
        yield server


def test_the_quickstart_edits_what_it_should_where_it_should(server, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "OUT", tmp_path / "out")
    prompt = job.quickstart(server)
    change(prompt, steps=20)
    videos, seconds = job.run(server, prompt)
    assert set(videos) == {"source", "reconstruction", *job.EDITS} and {"tune", "invert", "sample"} <= seconds.keys()
    figures = job.measure_demo(prompt, videos)
    # Twenty steps instead of 100 and 50: a new object is then not yet in every frame.
    for edit, right, motion in (("object", 0.6, 0.4), ("background", 0.75, 0.8), ("style", 0.75, 0.8)):
        assert figures[edit]["right"] >= right and figures[edit]["motion"] > motion, figures[edit]
    psnr = job.metrics.psnr(videos["reconstruction"].pictures, videos["source"].pictures).mean()
    assert psnr > 22

    job.keep(videos, figures, {"edits": figures})
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"source.mp4", "edit_3.mp4", "side_by_side.mp4", "contact_sheet.png", "report.json"} <= written
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["edits"]["style"]["right"] >= 0.75
    together = job.read((tmp_path / "out" / "side_by_side.mp4").read_bytes())
    assert together.pictures.shape[0] == 8 and together.fps == videos["source"].fps
    assert "prompt" in job.table(figures)


def test_what_the_server_refuses_or_fails_at_is_said_in_a_line(server):
    prompt = job.quickstart(server)
    Graph(prompt).set("TAVDemoClip", object="unicorn")
    with pytest.raises((Refused, job.Stopped), match="TAVDemoClip: (Value not in list|object is 'unicorn')"):
        job.run(server, prompt)
    prompt = job.quickstart(server)
    Graph(prompt).set("sample: style", cfg="much")
    with pytest.raises(Refused, match="TAVSampleVideo: Failed to convert"):  # the other outputs are valid
        job.run(server, prompt)
    prompt = job.quickstart(server)
    change(prompt, steps=1)
    Graph(prompt).set("sample: style", steps=3)
    with pytest.raises(job.Stopped, match="TAVSampleVideo: the latents were inverted in 1 steps"):
        job.run(server, prompt)


def test_an_own_clip_gets_an_output_for_each_edit(server):
    names = {"source", "reconstruction", "a dog", "a cat"}
    prompt = job.own_clip(server, job.PROJECT / "lab" / "quickstart.mp4", "a car", "sd.ckpt", ["a dog", "a cat"])
    outputs = {node["_meta"]["title"] for node in prompt.values() if node["class_type"] == "SaveVideo"}
    assert outputs == names
    clip = prompt[Graph(prompt).find("TAVLoadClip")]["inputs"]
    assert (clip["count"], clip["stride"]) == (8, 1), "as many of the video's eight frames as there are"
    for node in prompt.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in prompt
    texts = {node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"}
    assert texts == {"", "a car", "a dog", "a cat"}
    with pytest.raises(Refused, match="CheckpointLoaderSimple"):  # there is no such checkpoint
        job.run(server, prompt)


def test_a_video_never_takes_the_place_of_the_users(server, tmp_path):
    users, video = server.base / "input" / "clip.mp4", tmp_path / "clip.mp4"
    users.write_bytes(b"the user's")
    video.write_bytes((job.PROJECT / "lab" / "quickstart.mp4").read_bytes())
    prompt = job.own_clip(server, video, "a car", "sd.ckpt", ["a dog"])
    name = prompt[Graph(prompt).find("LoadVideo")]["inputs"]["file"]
    assert users.read_bytes() == b"the user's"
    assert name != "clip.mp4" and (server.base / "input" / name).read_bytes() == video.read_bytes()
    assert server.upload(video) == name, "the same again takes no further room"
    assert server.upload(video.rename(tmp_path / f"{'雪' * 30}.mp4")) == name, (
        "its own name is too long as ComfyUI takes it"
    )


def test_edits_of_an_earlier_run_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "OUT", tmp_path)
    for names in (["a cat", "a dog"], ["a bear"]):
        videos = {
            name: job.Video(torch.rand(2, 64, 64, 3), 8, name.encode()) for name in ("source", "reconstruction", *names)
        }
        job.keep(videos, {name: {"prompt": name} for name in names}, {})
    assert [path.read_bytes() for path in tmp_path.glob("edit_*.mp4")] == [b"a bear"]
