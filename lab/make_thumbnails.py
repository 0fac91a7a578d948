"""Make the thumbnails of the example workflows, beside them. Run after a change of one; the results are committed.

python run.py serve --port 8188
python tools/pack.py lab.make_thumbnails http://127.0.0.1:8188 [NAME…]

Each workflow runs in that ComfyUI as it is. Those for a checkpoint of the user's get the demo's model and clip instead.

ComfyUI's page asks for a .jpg; what it gets is an animated WebP, which browsers show as what it is.
"""

import json
import sys
from typing import Any

from PIL import Image
from torch import Tensor

from ..tav_core.pictures.compare import side_by_side
from ..tools.api import Comfy, Graph, Prompt, to_api
from . import job
from .make_quickstart import FILE, FPS
from .sheet import picture

FOLDER = job.PROJECT / "example_workflows"
QUALITY = 45  # of WebP: a clip is 128 pixels wide, and drawn in flat colours
FRAMES = 8  # of a thumbnail; of a longer clip it shows so many, evenly spread
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


def clips_of(comfy: Comfy, name: str, workflow: dict[str, Any]) -> dict[str, Tensor]:
    """What the workflow shows: the clip, then its edits by their titles; or one clip that compares them already."""
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
    edits = {title: videos[title].pictures for title in sorted(videos.keys() - {"source", "reconstruction"})}
    if "source" in videos:
        return {"clip": videos["source"].pictures, **edits}
    if name in EDITS or muted:
        return {"clip": job.read(FILE.read_bytes()).pictures, **edits}
    return edits


def thumbnail(clips: dict[str, Tensor]) -> list[Image.Image]:
    """Frames of the clips side by side, under their titles. The middle comes first: a still picture shows it."""
    together = side_by_side(clips, list(clips) if len(clips) > 1 else ())
    together = together[:: max(len(together) // FRAMES, 1)]
    return [picture(frame) for frame in together.roll(-(len(together) // 2), 0)]


def main() -> None:
    address, *names = sys.argv[1:]
    for name in names or [file.stem for file in sorted(FOLDER.glob("*.json"))]:
        workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        first, *rest = thumbnail(clips_of(Comfy(address), name, workflow))
        animated = {"save_all": True, "append_images": rest, "duration": round(1000 / FPS), "loop": 0}
        first.save(FOLDER / f"{name}.jpg", "WEBP", quality=QUALITY, method=6, **animated)
        print(name, flush=True)


if __name__ == "__main__":
    main()
