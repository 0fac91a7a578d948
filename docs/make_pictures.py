#!/usr/bin/env python3
"""Draw the pictures of the help pages: each node of this pack, in the page of a running ComfyUI.

  python docs/make_pictures.py http://127.0.0.1:8188

Needs Playwright and a Chromium: `pip install playwright`, and `playwright install chromium` where there is none.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, Route, sync_playwright

PICTURES = Path(__file__).resolve().parent.parent / "web" / "docs" / "pictures"
MARGIN = 10  # pixels around a node
SCALE = 1.5
COLOURS = 256  # all that a node has, and a third of the file
FILES = {"TAVLoadWeights": "skiing_00001.safetensors", "TAVLoadPublished": "skiing"}  # so that their lists show one

# The page gets these in place of the user's settings, which stay as they are.
SETTINGS = {
    "Comfy.Locale": "en",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
}

READY = "() => window.app?.vueAppReady && Object.keys(LiteGraph.registered_node_types).some(name => /^TAV/.test(name))"
NAMES = "() => Object.keys(LiteGraph.registered_node_types).filter(name => /^TAV/.test(name))"

# Alone on a plain canvas, below the page's bars; returns where it is on the screen: x, y, width, height.
SHOW = """([name, file]) => {
  const {canvas, graph} = app;
  graph.clear();
  const node = LiteGraph.createNode(name);
  node.pos = [0, 0];
  graph.add(node);
  node.setSize([Math.max(node.size[0], 230), node.size[1]]);
  if (file) node.widgets[0].value = file;
  Object.assign(canvas, {background_image: null, clear_background_color: '#202020', show_info: false});
  canvas.ds.scale = 1;
  canvas.ds.offset = [450, 170];
  canvas.deselectAll();
  canvas.draw(true, true);
  const page = canvas.canvas.getBoundingClientRect(), [x, y, width, height] = node.boundingRect;
  return [page.x + x + 450, page.y + y + 170, width, height];
}"""


def answer_settings(route: Route) -> None:
    route.fulfill(json=SETTINGS) if route.request.method == "GET" else route.fulfill(status=200)


def picture(page: Page, name: str) -> bytes:
    x, y, width, height = page.evaluate(SHOW, [name, FILES.get(name)])
    page.wait_for_timeout(500)  # text fields are placed over the canvas a frame later
    clip: Any = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    small = io.BytesIO()
    shot.quantize(COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


def main(address: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # The sandbox does not start for root, nor in most containers; the page is our own ComfyUI's.
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000}, device_scale_factor=SCALE)
        page.route("**/api/settings", answer_settings)
        page.goto(address)
        page.wait_for_function(READY, timeout=120_000)
        page.add_style_tag(content=".p-toast, .p-dialog-mask { display: none !important }")
        for name in page.evaluate(NAMES):
            data = picture(page, name)
            (PICTURES / f"{name}.png").write_bytes(data)
            print(f"{name}.png {len(data) / 1000:.1f} kB")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
