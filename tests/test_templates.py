"""The example workflows: whole, neatly laid out, and each of them runs, in few steps."""

import json
import re

import numpy as np
import pytest
from checkpoint import write_checkpoint
from live_server import PROJECT, Server
from PIL import Image, ImageSequence
from prompts import change
from tune_a_video.lab import job
from tune_a_video.tools.api import to_api

FILES = sorted((PROJECT / "example_workflows").glob("*.json"), key=lambda file: int(file.stem.partition("-")[0]))
WORKFLOWS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FILES}
TITLE = 30  # pixels of a node's title, above its position
# How much of its width a node grows by when it shows a picture or a video.
PICTURES = {
    "TAVOneShotTune": 0.7,
    "TAVDDIMInvert": 1.05,
    "TAVFindMask": 1.05,
    "TAVSampleVideo": 1.05,
    "SaveVideo": 1.05,
}
OUTPUTS = {
    "1-Quickstart": {"source", "reconstruction", "object", "background", "style"},
    "3-Change the object": {"source", "edit"},
    "4-Change the place": {"source", "edit"},
    "5-Change the style": {"source", "edit"},
    "7-Compare edits": {"comparison"},
    "6-Many edits from one tuning": {"edits"},
    "8-Use tuned weights again": set(),  # its second part, see below
    "10-Keep the background": {"comparison"},
    "11-Guidance that falls": {"comparison"},
    "12-Choose how long to tune": {"comparison"},
    "13-Long clip": {"comparison"},
}
LENGTHS = {"13-Long clip": 32}  # frames; of the others 8
STEPS = {"12-Choose how long to tune": {"steps": 2, "validation_every": 1}}  # one of which is early; of the others 1
OWN = {"2-Your own video", "9-Another checkpoint"}  # for the user's checkpoint and video


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("templates")) as server:
        yield server


def run(server, workflow, **changes):
    """Run it with one step everywhere, or few; returns the videos by their titles."""
    prompt = to_api(workflow, server.get("/object_info"))
    change(prompt, **{"steps": 1, **changes})
    for entry in prompt.values():
        if entry["inputs"].get("use_step"):
            entry["inputs"]["use_step"] = 1
    videos, _seconds = job.run(server, prompt)
    return videos


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_it_is_whole_and_laid_out_without_overlaps(server, workflow):
    known = {*server.get("/object_info"), "MarkdownNote"}
    assert {node["type"] for node in workflow["nodes"]} <= known
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert kind == nodes[source]["outputs"][output]["type"]
    linked = {slot["link"] for node in nodes.values() for slot in node["inputs"] if slot.get("link") is not None}
    assert linked == {link[0] for link in workflow["links"]}
    assert any(node["type"] == "MarkdownNote" for node in nodes.values())

    boxes = [box(node) for node in nodes.values()]
    groups = [(x, y, x + width, y + height) for group in workflow["groups"]
              for x, y, width, height in [group["bounding"]]]  # fmt: skip
    for some in (boxes, groups):
        assert not [(a, b) for a in some for b in some if a < b and overlap(a, b)]
    for node in boxes:
        assert all(contains(group, node) for group in groups if overlap(group, node))


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_nodes_are_small_and_there_is_room_for_their_pictures(workflow):
    """Previews are off by default: a node with room inside for one would stay black."""
    nodes = workflow["nodes"]
    by_inputs = {"TAVSampleVideo": 300, "TAVFindMask": 320, "TAVOneShotTune": np.inf}
    most = {kind: 200 for kind in PICTURES} | by_inputs
    assert all(node["size"][1] <= most.get(node["type"], np.inf) for node in nodes)
    boxes = [box(node, PICTURES.get(node["type"], 0) * node["size"][0]) for node in nodes]
    assert not [(a, b) for a in boxes for b in boxes if a < b and overlap(a, b)]


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_it_can_be_read_as_it_opens(workflow):
    """The page fits a template's nodes into three quarters of the window, here of 1920 x 1080. What is smaller than
    0.57 has no text."""
    left, top, right, bottom = zip(*map(box, workflow["nodes"]), strict=True)
    width, height = max(right) - min(left) + 20, max(bottom) - min(top) + 20  # ten around it
    assert min(0.75 * 1920 / width, 0.75 * 1080 / height) >= 0.6


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_page_can_fetch_the_checkpoints(name):
    """A loader says where its file is to be had, so that the page offers it where it is missing: ComfyUI 0.3.75's
    offers no pickles."""
    loaders = [node for node in WORKFLOWS[name]["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    assert len(loaders) == (2 if name == "9-Another checkpoint" else 1)
    for node in loaders:
        [model] = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] == model["url"].rpartition("/")[2]
        assert model["directory"] == "checkpoints" and model["name"].endswith(".safetensors")
        assert model["url"].startswith("https://huggingface.co/")


def test_only_those_for_the_users_checkpoint_load_one():
    kinds = {name: {node["type"] for node in workflow["nodes"]} for name, workflow in WORKFLOWS.items()}
    assert {name for name, types in kinds.items() if "CheckpointLoaderSimple" in types} == OWN


def box(node, more=0):
    """Left, top, right and bottom of a node, `more` pixels higher than it is; a collapsed one is its title alone."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y if node["flags"].get("collapsed") else y + height + more


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contains(outer, inner):
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


@pytest.mark.parametrize("file", FILES, ids=WORKFLOWS)
def test_it_has_a_small_thumbnail_that_moves(file):
    """Under the name that the page asks for; a browser looks at what a picture is."""
    picture = file.with_suffix(".jpg")
    with Image.open(picture) as opened:
        assert opened.format == "WEBP" and opened.n_frames == 8 and opened.width >= 256
        frames = [np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(opened)]
    assert frames[0].std() > 20 and np.abs(frames[0] - frames[4]).mean() > 1  # something is to be seen, and it moves
    assert picture.stat().st_size < 150_000 and file.stat().st_size < 60_000


def test_cards_show_names_to_read_in_an_order_that_shows():
    """A card's title is the file's name, and cards come in the order in which the file system lists them."""
    names = [re.fullmatch(r"(\d+)-([A-Z][a-z]+( [a-z]+)*)", file.stem) for file in FILES]
    assert [int(name[1]) for name in names] == list(range(1, len(FILES) + 1))


def test_the_blueprint_fits_the_nodes(server):
    [file] = (PROJECT / "subgraphs").glob("*.json")
    assert file.read_bytes().isascii()  # the host reads it in whatever encoding the system has
    info = server.get("/object_info")
    [blueprint] = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    for node in blueprint["nodes"]:
        known = {name for part in ("required", "optional") for name in info[node["type"]]["input"].get(part, {})}
        assert {slot["name"] for slot in node["inputs"]} <= known
        assert len(node["widgets_values"]) == sum("widget" in slot for slot in node["inputs"])


def test_each_is_run_here():
    assert set(WORKFLOWS) == {*OUTPUTS, *OWN}


@pytest.mark.parametrize("name", OUTPUTS)
def test_on_the_demos_model_it_runs_as_it_is(server, name):
    videos = run(server, WORKFLOWS[name], **STEPS.get(name, {}))
    assert set(videos) == OUTPUTS[name]
    for video in videos.values():
        assert len(video.pictures) == LENGTHS.get(name, 8) and video.fps == 8 and video.pictures.std() > 0.02


def test_the_second_part_of_reload_edits_with_the_weights_that_the_first_has_kept(server):
    workflow = WORKFLOWS["8-Use tuned weights again"]
    run(server, workflow)
    unmuted = [{**node, "mode": 0} for node in workflow["nodes"]]
    assert set(run(server, {**workflow, "nodes": unmuted})) == {"edit"}


def test_an_early_step_is_of_the_same_tune_which_runs_once(server):
    name, before = "12-Choose how long to tune", len(server.log())
    run(server, WORKFLOWS[name], seed=8, **STEPS[name])
    said = server.log()[before:]
    assert said.count("Tune-A-Video: tuning ") == said.count("Tune-A-Video: used: the weights of step 1") == 1


def test_a_personalised_checkpoint_takes_over_the_motion(server):
    write_checkpoint(server.base / "models" / "checkpoints" / "sd15.ckpt")
    video = server.upload(PROJECT / "lab" / "quickstart.mp4")
    small = {"count": 2, "stride": 1, "width": 64, "height": 64}
    videos = run(server, WORKFLOWS["9-Another checkpoint"], ckpt_name="sd15.ckpt", file=video, **small)
    assert videos["edit"].pictures.shape == (2, 64, 64, 3)
    assert list((server.base / "models" / "tune_a_video").glob("motion_*.safetensors"))
