"""Make the thumbnails of the example workflows, beside them. Run after a change of one; the results are committed.

python run.py serve --port 8188
python tools/pack.py lab.make_thumbnails http://127.0.0.1:8188 [NAME…]

Each workflow runs in that ComfyUI as it is. Those for a checkpoint of the user's get the demo's model and clip instead.
"""

import json
import sys
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..tav_core.pictures.compare import side_by_side
from ..tools.api import Comfy, Graph, Prompt, to_api
from . import job
from .make_quickstart import FILE
from .sheet import picture

FOLDER = job.PROJECT / "example_workflows"
# The demo's values where the user's own are expected, by the kind or the title of a node.
DEMO = {
    "TAVLoadClip": {"count": 8, "stride": 1, "width": 128, "height": 128},
    "TAVOneShotTune": {"steps": 300, "learning_rate": 5e-4},
    "TAVSampleVideo": {"cfg": 3.0},
    "caption: what the clip shows": {"text": "a red car on the beach"},
}
EDITS = {"2-Your own video": "a red car in the forest", "9-Another checkpoint": "a red car on the beach, pencil sketch"}


def on_the_demo(comfy: Comfy, prompt: Prompt, edit: str) -> None:
    """Change a workflow for the user's checkpoint and video to one on the demo's."""
    video = comfy.upload(FILE)
    Graph(prompt).set("edit: what you want to see", text=edit)
    for node in prompt.values():
        node["inputs"] |= DEMO.get(node["class_type"], {}) | DEMO.get(node["_meta"]["title"], {})
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "TAVLoadDemoModel", "inputs": {}}  # with the same outputs
        elif node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = video


def clips_of(comfy: Comfy, name: str, workflow: dict[str, Any]) -> list[Tensor]:
    """What the workflow shows: the clip first, then its edits; or one clip that compares them already."""
    info = comfy.get("/object_info")
    muted = [node for node in workflow["nodes"] if node["mode"]]
    prompt = to_api(workflow, info)
    if name in EDITS:
        on_the_demo(comfy, prompt, EDITS[name])
    videos, _seconds = job.run(comfy, prompt)
    if muted:  # it has two parts, the second of which needs what the first has written
        for node in muted:
            node["mode"] = 0
        videos, _seconds = job.run(comfy, to_api(workflow, info))
    clips = [video.pictures for title, video in sorted(videos.items(), key=lambda item: item[0] != "source")
             if title != "reconstruction"]  # fmt: skip
    if name in EDITS or muted:
        clips.insert(0, job.read(FILE.read_bytes()).pictures)
    return clips


def thumbnail(clips: list[Tensor]) -> Image.Image:
    """One clip's middle frame, two clips' first, middle and last frames, or the middle frames of more."""
    if len(clips) == 2:
        stills = [clip[[i]] for clip in clips for i in (0, len(clip) // 2, -1)]
    else:
        stills = [clip[[len(clip) // 2]] for clip in clips]
    return picture(side_by_side({str(i): still for i, still in enumerate(stills)})[0])


def main() -> None:
    address, *names = sys.argv[1:]
    for name in names or [file.stem for file in sorted(FOLDER.glob("*.json"))]:
        workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        with torch.inference_mode():
            thumbnail(clips_of(Comfy(address), name, workflow)).save(FOLDER / f"{name}.jpg", quality=85, optimize=True)
        print(name, flush=True)


if __name__ == "__main__":
    main()
