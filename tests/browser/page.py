"""ComfyUI's page in a real browser, used as a user uses it."""

import re
from contextlib import contextmanager, suppress
from functools import partial

from live_server import NAME, PROJECT
from playwright.sync_api import TimeoutError

SCREENSHOTS = PROJECT / "output" / "browser"
SLOW = 180_000  # milliseconds: the machine may have other work, but pytest ends a test of ten minutes without a word
# Without a display, a graphics card, or the browser's own requests to its maker.
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

# The page opens a workflow of its own at last.
READY = """() => window.app?.vueAppReady && app.extensionManager?.workflow?.activeWorkflow && app.graph?.nodes.length
    && document.querySelector('#comfy-file-input') && LiteGraph.registered_node_types.TAVOneShotTune"""
OPEN = "name => window.app?.extensionManager.workflow?.activeWorkflow?.filename === name && app.graph.nodes.length"
NODE = "app.graph.nodes.find(node => node.type === kind && (!title || node.title === title))"


class Workspace:
    """One open page of a server."""

    def __init__(self, page, server, folder):
        self.page, self.server, self.folder = page, server, folder
        self.failed = []  # requests to the pack that the server did not answer well
        page.on("response", lambda answer: self.failed.append(answer.url) if self._is_bad(answer) else None)
        page.goto(server.address, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.evaluate(
            """() => { window.events = [];
            for (const kind of ['execution_start', 'execution_success', 'execution_error', 'execution_interrupted',
                                'progress', 'progress_text', 'b_preview_with_metadata'])
                app.api.addEventListener(kind, event => {
                    const { node, nodeId, displayNodeId, value, max } = event.detail ?? {};
                    events.push({ kind, node: String(node ?? displayNodeId ?? nodeId ?? ''), value, max }) }) }"""
        )

    @staticmethod
    def _is_bad(answer):
        return answer.status >= 400 and NAME in answer.url

    @staticmethod
    def _until(act, locator, state, patience):
        """Act again while a part of the page has not come or gone: a busy page loses a click now and then."""
        for _ in range(SLOW // patience):
            with suppress(TimeoutError):  # the last one did it after all, and what it was on has gone
                act()
            try:
                return locator.wait_for(state=state, timeout=patience)
            except TimeoutError:
                continue
        raise AssertionError(f"no click made it {state}: {locator}")

    # --- workflows ---

    def templates(self):
        """Open the template browser, if it is not open, at this pack; returns the dialog."""
        dialog = self.page.get_by_role("dialog")
        if not dialog.is_visible():
            self.page.get_by_role("button", name="Templates").first.click()
        dialog.get_by_text(NAME, exact=True).first.click()
        return dialog

    def open_template(self, name):
        card = self.templates().get_by_test_id(f"template-workflow-{name}")
        # The card, and not the dialog that it is in: another may open at once, for models that are missing.
        self._until(partial(card.click, timeout=30_000), card, "detached", 30_000)
        self.page.wait_for_function(OPEN, arg=name)

    def open_file(self, path):
        self.page.set_input_files("#comfy-file-input", path)
        self.page.wait_for_function(OPEN, arg=path.stem)

    def workflow(self):
        """The workflow as the page saves it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def set(self, kind, values, title=None):
        """Give widgets of all nodes of a kind (and title) other values, as typing does."""
        self.page.evaluate(
            """([kind, title, values]) => {
            for (const node of app.graph.nodes)
                if (node.type === kind && (!title || node.title === title))
                    for (const widget of node.widgets)
                        if (widget.name in values) {
                            widget.value = values[widget.name]
                            widget.callback?.(widget.value, app.canvas, node)
                        } }""",
            [kind, title, values],
        )

    def node(self, kind, title=None):
        """The number of a node."""
        return self.page.evaluate(f"([kind, title]) => String({NODE}.id)", [kind, title])

    def show(self, kind, title=None):
        """Bring a node to the middle of the canvas at its full size; returns its corners in the window."""
        return self.page.evaluate(
            f"""([kind, title]) => {{
            const node = {NODE}, {{ ds, canvas }} = app.canvas, box = canvas.getBoundingClientRect()
            ds.scale = 1
            ds.offset[0] = box.width / 2 - node.pos[0] - node.size[0] / 2
            ds.offset[1] = Math.max(box.height / 2 - node.size[1] / 2, 130) - node.pos[1]
            app.canvas.draw(true, true)
            const [x, y] = ds.convertOffsetToCanvas(node.pos)
            return [box.x + x, box.y + y, box.x + x + node.size[0], box.y + y + node.size[1]] }}""",
            [kind, title],
        )

    def search(self, text):
        """Look for a node in the menu that a double click opens, and take the first that has this text."""
        field = self.page.get_by_placeholder(re.compile("Search Nodes|Add a node"))  # an older page, a newer one
        self._until(lambda: self.page.mouse.dblclick(800, 500), field, "visible", 5000)
        field.fill(text)
        # By its letters' case: Load CLIP is the host's, Load Clip ours.
        self.page.get_by_role("option").filter(has_text=re.compile(re.escape(text))).first.click()
        field.wait_for(state="detached")
        self.page.mouse.click(800, 300)  # on newer pages it hangs on the pointer until it is put down

    # --- running ---

    def run(self):
        """Press Run; what `events` has from now on belongs to this run."""
        self.page.evaluate("() => { events.length = 0 }")
        self.page.locator("button[data-testid=queue-button], [data-testid=queue-button] button").first.click()

    def events(self, kind, node=""):
        return self.page.evaluate(
            "([kind, node]) => events.filter(e => e.kind === kind && (!node || e.node === node))", [kind, node]
        )

    def wait_for(self, kind, node="", value=0):
        """Until an event has come; an error ends the wait too."""
        self.page.wait_for_function(
            """([kind, node, value]) => events.some(e => e.kind === 'execution_error'
                || e.kind === kind && (!node || e.node === node) && (e.value ?? 0) >= value)""",
            arg=[kind, node, value],
        )
        assert kind == "execution_error" or not self.events("execution_error"), self.server.log()[-3000:]

    # --- looking ---

    def overlaps(self):
        """Pairs of nodes of the graph that is shown that lie over each other, as they are drawn."""
        return self.page.evaluate(
            """() => { const boxes = app.canvas.graph.nodes.map(({ id, type, pos, boundingRect }) => {
                const box = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
                const [x, y, width, height] = box ? [pos[0], pos[1] - 30, box.width / app.canvas.ds.scale,
                    box.height / app.canvas.ds.scale] : boundingRect;
                return { type, left: x, top: y, right: x + width, bottom: y + height } });
            return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
                && a.top < b.bottom && b.top < a.bottom).map(b => [a.type, b.type])) }"""
        )

    def complaints(self):
        """What toasts, dialogs and the overlay for errors say."""
        return self.page.locator(".p-toast-message:visible, [role=dialog]:visible, .comfy-missing-nodes:visible, "
                                 "[data-testid=error-overlay]:visible").all_inner_texts()  # fmt: skip

    def offers_to_download(self, models):
        """Wait until the page offers to download these missing models and complains of nothing else; then go on."""
        dialog, details = self.page.get_by_role("dialog"), self.page.get_by_test_id("error-overlay-see-errors")
        dialog.or_(details).wait_for()
        if newer := details.is_visible():
            details.click()
        buttons = self.page.get_by_test_id("missing-model-download") if newer else dialog.get_by_text("Download")
        buttons.first.wait_for()
        assert buttons.count() == len(models)
        for model in models:
            self.page.get_by_text(model).first.wait_for()
        if not newer:
            self._until(lambda: self.page.keyboard.press("Escape"), dialog, "detached", 5000)

    def screenshot(self, name):
        self.page.screenshot(path=self.folder / f"{name}.png")


@contextmanager
def workspace(browser, server, name):
    """A page of its own, with a screenshot of how it ended; the folder in `name` takes its other ones too."""
    path = SCREENSHOTS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, locale="en-US")
    context.set_default_timeout(SLOW)
    page = context.new_page()
    try:
        yield Workspace(page, server, path.parent)
    finally:
        with suppress(TimeoutError):  # of a page that hangs there is none
            page.screenshot(path=path, timeout=30_000)
        context.close()
