"""Make docs/workflow.png: the quickstart in ComfyUI's page, opened and run by clicks alone, and what it shows then. Run
after a change of its layout; the result is committed.

python run.py test --browser --collect-only
python run.py serve --port 8188 -- --preview-method latent2rgb --front-end-root …
python tools/pack.py lab.make_workflow_picture http://127.0.0.1:8188 [--nodes-2] [--out FILE]

The first sets up the browser and the newest page, which is in .host/comfyui-frontend-package-…/…/static.
--nodes-2: as the page's newer way of drawing nodes shows it.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, Route, sync_playwright

from ..tools.api import Comfy
from .job import PROJECT

FILE = PROJECT / "docs" / "workflow.png"
WINDOW = {"width": 2600, "height": 2000}  # large enough for the whole graph with its text
WIDTH = 1400  # of the picture
MARGIN = 12
COLOURS = 256  # a third of the file, and hardly to be seen
PATIENCE = 30 * 60_000  # milliseconds

# Where nodes and groups are in the window: left, top, right, bottom.
BOUNDS = """() => {
  const {canvas, ds} = app.canvas, page = canvas.getBoundingClientRect();
  const boxes = [...app.graph.nodes, ...app.graph.groups].map(part => part.boundingRect);
  const at = ([x, y]) => ds.convertOffsetToCanvas([x, y]);
  const [left, top] = at([0, 1].map(i => Math.min(...boxes.map(box => box[i]))));
  const [right, bottom] = at([0, 1].map(i => Math.max(...boxes.map(box => box[i] + box[i + 2]))));
  return [page.x + left, page.y + top, page.x + right, page.y + bottom];
}"""
VIDEOS = """() => [...document.querySelectorAll('video')].filter(video => video.readyState >= 2).length
  >= app.graph.nodes.filter(node => node.type === 'SaveVideo').length"""


def run_quickstart(page: Page, comfy: Comfy, folder: Path) -> Image.Image:
    """From the page as it first opens to the finished edits, by three clicks."""
    from page import Workspace  # of the tests

    # What an earlier run has computed would be skipped, and those nodes stay without pictures.
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    workspace = Workspace(page, comfy, folder)
    workspace.open_template("1-Quickstart")
    workspace.run()
    workspace.wait_for("execution_success")
    page.wait_for_function(VIDEOS)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.add_style_tag(content=".p-toast, .comfyui-body-top, .side-tool-bar-container { visibility: hidden }")
    page.mouse.move(5, 5)
    page.wait_for_timeout(3000)  # the view glides there
    left, top, right, bottom = page.evaluate(BOUNDS)
    clip: Any = {"x": left - MARGIN, "y": top - MARGIN, "width": right - left, "height": bottom - top}
    clip["width"] += 2 * MARGIN
    clip["height"] += 2 * MARGIN
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--nodes-2", action="store_true")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    sys.path += [str(PROJECT / "tests" / folder) for folder in ("browser", "support")]
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.VueNodes.Enabled": args.nodes_2}

    def answer_settings(route: Route) -> None:  # in place of the user's, which stay as they are
        route.fulfill(json=settings) if route.request.method == "GET" else route.fulfill(status=200)

    with sync_playwright() as playwright:
        # The sandbox does not start for root, nor in most containers; the page is our own ComfyUI's.
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(PATIENCE)
        page.route("**/api/settings", answer_settings)
        shot = run_quickstart(page, Comfy(args.address), args.out.parent)
        browser.close()
    small = shot.resize((WIDTH, round(shot.height * WIDTH / shot.width)), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, kmeans=3).save(args.out, optimize=True)
    print(f"{args.out} {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
