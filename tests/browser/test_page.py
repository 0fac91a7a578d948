"""The pack in ComfyUI's own page: templates, nodes, runs, help, languages. Screenshots go to output/browser/.

Only `run.py test --browser` runs these; it names the browser's program in TAV_BROWSER.
"""

import json
import os
import re

import pytest
from checkpoint import write_checkpoint
from live_server import NAME, PROJECT, Server
from page import FLAGS, OPEN, workspace
from playwright.sync_api import sync_playwright

BLUEPRINT = "Edit a video (Tune-A-Video)"
TEMPLATES = sorted(file.stem for file in (PROJECT / "example_workflows").glob("*.json"))


def write_settings(base, **settings):
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {f"Comfy.{name}": value for name, value in settings.items()}
    file.write_text(json.dumps({"Comfy.TutorialCompleted": True, **settings}), encoding="utf-8")


# The host's own page, and the newest one that works with it.
PAGES = {"own": [], "newest": ["--front-end-root", os.environ["TAV_NEWEST_PAGE"]]}


@pytest.fixture(scope="module", params=PAGES)
def server(tmp_path_factory, request):
    base = tmp_path_factory.mktemp("page")
    server = Server(base, *PAGES[request.param])
    write_checkpoint(base / "models" / "checkpoints" / "sd15.ckpt")
    with server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        as_root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not start there
        browser = playwright.chromium.launch(
            executable_path=os.environ["TAV_BROWSER"] or None, chromium_sandbox=not as_root, args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, request):
    write_settings(server.base)  # the page keeps there what an earlier test has changed
    with workspace(browser, server, f"{request.node.callspec.params['server']}/{request.node.originalname}") as page:
        yield page


def small(page):
    """Few steps: what is looked at here is the page."""
    page.set("TAVOneShotTune", {"steps": 20})
    for kind in ("TAVDDIMInvert", "TAVSampleVideo"):
        page.set(kind, {"steps": 3})


def test_every_template_has_a_thumbnail_and_opens_whole(page):
    cards = page.templates().locator("[data-testid^=template-workflow-]")
    cards.nth(len(TEMPLATES) - 1).wait_for(state="attached")  # the page draws them one after another
    names = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    assert sorted(names) == TEMPLATES
    for card in cards.all():
        card.scroll_into_view_if_needed()
        # What the server sent, from the page's cache or under its own address, and not the page's stand-in.
        card.locator("img[src^='blob:'], img[src*='/workflow_templates/']").first.wait_for()
    page.screenshot("template_browser")
    for name in TEMPLATES:
        page.open_template(name)
        written = json.loads((PROJECT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
        opened = page.workflow()
        assert page.page.evaluate("() => app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type])") == []
        assert links(opened) == links(written), name
        known = widgets(written)
        assert {key: values[: len(known[key])] for key, values in widgets(opened).items()} == known, name
        models = [node["widgets_values"][0] for node in written["nodes"] if node["type"] == "CheckpointLoaderSimple"]
        if models:
            page.screenshot(f"models_{name}")
            page.offers_to_download(models)
        assert page.complaints() == [], name
        assert page.overlaps() == [], name
        page.screenshot(f"template_{name}")
    assert page.failed == []


@pytest.mark.parametrize("server", ["newest"], indirect=True)
def test_nothing_overlaps_in_nodes_2(page):
    """The page's newer way of drawing nodes, as parts of a web page: they are taller there."""
    page.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    for name in TEMPLATES:
        page.open_template(name)
        page.page.wait_for_function(
            "() => document.querySelectorAll('.lg-node[data-node-id]').length === app.graph.nodes.length"
        )
        page.screenshot(f"nodes_2_{name}")
        assert page.overlaps() == [], name


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
@pytest.mark.parametrize("server", ["newest"], indirect=True)
def test_a_first_edit_takes_clicks_alone_and_what_it_shows_finds_room(page, nodes_2):
    page.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    page.open_template("1-Quickstart")
    page.set("TAVOneShotTune", {"steps": 2, "seed": 7 + nodes_2})  # of its own: nothing comes from a cache
    for kind in ("TAVDDIMInvert", "TAVSampleVideo"):
        page.set(kind, {"steps": 2})
    page.run()
    page.wait_for("execution_success")
    page.page.wait_for_function(
        "() => [...document.querySelectorAll('video')].filter(video => video.readyState >= 2).length === 5"
    )
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1000)  # the view glides there
    page.screenshot(f"run_{'nodes_2' if nodes_2 else 'classic'}")
    assert page.overlaps() == []


def links(workflow):
    return sorted(map(str, workflow["links"]))


def widgets(workflow):
    # An upload button's value is saved by one page and not by another, no choice as undefined; core's nodes get more
    # widgets with time.
    return {node["id"]: ["" if value == "undefined" else value
                         for value in node.get("widgets_values") or [] if value != "image"]
            for node in workflow["nodes"]}  # fmt: skip


def test_the_quickstart_runs_and_shows_what_it_does(page):
    page.open_template("1-Quickstart")
    small(page)
    page.set("TAVOneShotTune", {"validation_every": 4})
    tune = page.node("TAVOneShotTune")
    page.page.evaluate(
        """() => { const [tune, edit] = ['One-Shot Tune', 'object edit'].map(
            title => app.graph.nodes.find(node => node.title === title));
        edit.connect(0, tune, tune.findInputSlot('validation_prompt')) }"""
    )
    page.run()
    page.wait_for("progress", tune, 6)  # after the first preview of the edit
    shown = page.page.get_by_text("Current node:").locator("..").inner_text()
    assert re.search(r"One-?Shot ?Tune", shown) and "%" in shown
    page.show("TAVOneShotTune")
    page.page.wait_for_function("id => app.nodePreviewImages[id]?.length || app.graph.getNodeById(id).imgs", arg=tune)
    page.screenshot("tuning")
    page.wait_for("execution_success")

    for kind in ("TAVOneShotTune", "TAVDDIMInvert", "TAVSampleVideo"):
        node = page.node(kind)
        assert page.events("b_preview_with_metadata", node), f"{kind} shows previews"
    assert page.events("progress", tune)[-1]["value"] == 20
    assert page.events("progress_text", tune)
    page.show("TAVOneShotTune")
    # Of what the node showed, the last picture is what stays: newer pages clear the progress text.
    page.page.wait_for_function("id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth", arg=tune)
    page.screenshot("tuned")
    for title in ("object", "style"):
        number = page.node("SaveVideo", title)
        page.show("SaveVideo", title)
        page.page.wait_for_function(
            """id => { const video = app.graph.getNodeById(id).widgets.map(w => w.element?.querySelector?.('video'))
                .find(Boolean); return video?.videoWidth === 128 && video.readyState >= 2
                && video.getBoundingClientRect().width > 100 }""",
            arg=number,
        )
        page.screenshot(f"video_{title}")
    assert page.page.locator(".p-toast-message-error:visible").count() == 0


def test_nodes_are_found_by_their_names(page):
    names = page.page.evaluate(
        """() => Object.values(LiteGraph.registered_node_types)
        .filter(node => node.comfyClass?.startsWith('TAV')).map(node => node.title)"""
    )
    assert len(names) >= 13
    for name in sorted(names):
        page.page.evaluate("() => { app.graph.clear() }")
        page.search(name)
        page.page.wait_for_function("name => app.graph.nodes.some(node => node.title === name)", arg=name)


def test_an_address_opens_the_quickstart(page):
    """As `run.py demo --ui` does; the page takes no name with a blank there."""
    page.page.goto(f"{page.server.address}/?template=1-Quickstart&source={NAME}")
    page.page.wait_for_function(OPEN, arg="1-Quickstart")


def with_blueprint(page):
    """Make a graph of it, a clip of two frames, and what saves the video; returns the prompt that Run would send."""
    page.page.evaluate("() => { app.graph.clear() }")
    page.search(BLUEPRINT)
    page.page.wait_for_function("name => app.graph.nodes.some(node => node.title === name)", arg=BLUEPRINT)
    page.page.evaluate(
        """() => { const [edit] = app.graph.nodes;
        const [clip, save] = ['TAVDemoClip', 'SaveVideo'].map(kind => app.graph.add(LiteGraph.createNode(kind)));
        clip.pos = [edit.pos[0] - 400, edit.pos[1]]; save.pos = [edit.pos[0] + 500, edit.pos[1]];
        clip.connect(0, edit, 0); edit.connect(0, save, 0);
        const set = (node, values) => node.widgets.forEach(w => { if (w.name in values) w.value = values[w.name] });
        set(clip, { frames: 2, size: 64 });
        set(edit, { ckpt_name: 'sd15.ckpt', caption: 'a car', edit: 'a dog', steps: 1 });
        for (const node of edit.subgraph.nodes)
            if (['TAVDDIMInvert', 'TAVSampleVideo'].includes(node.type)) set(node, { steps: 1 }) }"""
    )
    return page.page.evaluate("async () => (await app.graphToPrompt()).output")


def test_the_blueprint_is_one_node_that_stands_for_the_whole_way(page):
    prompt = with_blueprint(page)
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert {"TAVInflateUNet", "TAVOneShotTune", "TAVDDIMInvert", "TAVSampleVideo"} < set(nodes)
    assert [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"] == [
        "a car",
        "",
        "a dog",
    ]
    assert nodes["CheckpointLoaderSimple"]["ckpt_name"] == "sd15.ckpt"
    assert nodes["TAVOneShotTune"]["steps"] == 1
    ends = {
        prompt[nodes[kind][slot][0]]["class_type"] for kind, slot in (("VAEEncode", "pixels"), ("SaveVideo", "video"))
    }
    assert ends == {"TAVDemoClip", "CreateVideo"}


@pytest.mark.parametrize("server", ["newest"], indirect=True)
def test_the_blueprint_shows_its_inside_in_nodes_2(page):
    page.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    page.page.evaluate("() => { app.graph.clear() }")
    page.search(BLUEPRINT)
    page.page.wait_for_function("name => app.graph.nodes.some(node => node.title === name)", arg=BLUEPRINT)
    page.page.get_by_test_id("subgraph-enter-button").click()
    page.page.wait_for_function(
        """() => app.canvas.graph !== app.graph
        && document.querySelectorAll('.lg-node[data-node-id]').length === app.canvas.graph.nodes.length"""
    )
    page.page.wait_for_timeout(1000)  # the view glides there
    boxes = [node.bounding_box() for node in page.page.locator(".lg-node[data-node-id]").all()]
    assert all(box["x"] > 0 and box["y"] > 0 and box["width"] > 50 and box["height"] > 20 for box in boxes)
    assert page.overlaps() == []


@pytest.mark.parametrize("server", ["newest"], indirect=True)  # it takes long: a checkpoint of full size
def test_the_blueprint_edits_a_video(page):
    with_blueprint(page)
    page.run()
    page.wait_for("execution_success")
    assert list((page.server.base / "output" / "video").glob("*.mp4"))


@pytest.mark.parametrize("server", ["newest"], indirect=True)
@pytest.mark.parametrize(
    ("name", "controls"),
    [
        ("1-Quickstart", {"object", "motion", "object edit", "style edit", "tuning steps"}),
        ("2-Your own video", {"checkpoint", "video", "caption: what the clip shows", "edit: what you want to see"}),
    ],
)
def test_a_template_is_an_app_as_well(page, name, controls):
    """What the menu Graph, beside the workflow's name, turns into App on newer pages."""
    page.open_template(name)
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    shown = page.page.get_by_test_id("linear-widgets")
    shown.get_by_text("tuning steps", exact=True).wait_for()
    assert controls <= set(shown.inner_text().split("\n"))
    page.screenshot(f"app_{name}")


def test_a_node_has_a_help_page(page):
    page.open_template("1-Quickstart")
    x, y, *_ = page.show("TAVOneShotTune")
    page.page.mouse.click(x + 120, y - 15)
    page.page.get_by_test_id("info-button").click()
    text = (PROJECT / "web" / "docs" / "TAVOneShotTune.md").read_text(encoding="utf-8")
    heading = re.search(r"^#+ (.+)$", text, re.M).group(1)
    page.page.get_by_role("heading", name=heading).first.wait_for()


def test_the_page_speaks_chinese(browser, tmp_path):
    # The page that comes with this ComfyUI shows no translation of any pack's (mended in 1.33).
    write_settings(tmp_path, Locale="zh")
    with Server(tmp_path, *PAGES["newest"]) as server, workspace(browser, server, "newest/chinese") as page:
        chinese = json.loads((PROJECT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
        chinese = chinese["TAVOneShotTune"]
        page.page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('TAVOneShotTune')) }")
        title, *labels = page.page.evaluate(
            "() => { const [node] = app.graph.nodes; return [node.title, ...node.widgets.map(widget => widget.label)] }"
        )
        assert title == chinese["display_name"]
        assert chinese["inputs"]["steps"]["name"] in labels
        page.show("TAVOneShotTune")


def test_cancel_stops_a_tune_and_the_next_run_works(page):
    page.open_template("3-Change the object")
    small(page)
    page.set("TAVOneShotTune", {"steps": 5000, "seed": 5})
    tune = page.node("TAVOneShotTune")
    page.run()
    page.wait_for("progress", tune, 3)
    page.page.get_by_role("button", name="Cancel current run").click()
    page.wait_for("execution_interrupted")
    # That it ends within a step is another test's: here steps take hundredths of a second, and are heard of late.
    assert page.events("progress", tune)[-1]["value"] < 2500

    page.set("TAVOneShotTune", {"steps": 1, "seed": 6})
    page.run()
    page.wait_for("execution_success")


def test_a_saved_workflow_opens_again_as_it_was(page, tmp_path):
    page.open_template("7-Compare edits")
    page.set("TAVSampleVideo", {"cfg": 7.5}, "sample: cfg 4")
    page.set("TAVCompareVideos", {"labels": "片段\n\ncfg 7.5"})
    page.page.mouse.click(800, 960)
    page.page.keyboard.press("Control+s")
    field = page.page.get_by_role("dialog").get_by_role("textbox")
    field.fill("kept")
    field.press("Enter")
    page.page.wait_for_function(
        "async () => (await (await fetch('/userdata?dir=workflows')).json()).includes('kept.json')"
    )
    saved = page.server.base / "user" / "default" / "workflows" / "kept.json"
    before = json.loads(saved.read_text(encoding="utf-8"))
    again = tmp_path / "again.json"
    again.write_bytes(saved.read_bytes())
    page.open_file(again)
    after = page.workflow()
    for part in ("nodes", "links", "groups"):
        assert after[part] == before[part]
    values = {tuple(node.get("widgets_values") or ()) for node in after["nodes"]}
    assert (50, 7.5) in {value[:2] for value in values} and ("片段\n\ncfg 7.5",) in values


def test_a_link_of_a_wrong_type_is_refused(page):
    page.page.evaluate(
        """() => { app.graph.clear(); app.canvas.ds.scale = 1; app.canvas.ds.offset.fill(0);
        for (const [kind, x] of [['TAVLoadDemoModel', 300], ['TAVInflateUNet', 800]]) {
            const node = LiteGraph.createNode(kind); app.graph.add(node); node.pos = [x, 400] }
        app.canvas.draw(true, true) }"""
    )

    def slot(kind, is_input, index):
        return page.page.evaluate(
            """([kind, isInput, index]) => { const node = app.graph.nodes.find(node => node.type === kind);
            const [x, y] = app.canvas.ds.convertOffsetToCanvas(node.getConnectionPos(isInput, index));
            const box = app.canvas.canvas.getBoundingClientRect(); return [box.x + x, box.y + y] }""",
            [kind, is_input, index],
        )

    mouse = page.page.mouse
    for output, linked in ((2, 0), (0, 1)):  # VAE, then MODEL
        mouse.move(*slot("TAVLoadDemoModel", False, output))
        mouse.down()
        mouse.move(*slot("TAVInflateUNet", True, 0), steps=10)
        mouse.up()
        page.page.keyboard.press("Escape")  # what a link that is let go opens
        assert len(page.workflow()["links"]) == linked
