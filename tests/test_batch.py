"""Batches: jobs files, the ledger, and runs that are killed, on a small server that answers as ComfyUI does."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import psutil
import pytest
from fake_comfy import INFO
from live_server import run
from tune_a_video.nodes import NODES
from tune_a_video.tools import api, bars, batch, jobs, results
from tune_a_video.tools.ledger import AFTER_TUNE, LAST, LOST, OF_TUNE, Ledger, worker_name
from videos import picture, write_video

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOW = {
    "1": {"class_type": "Load", "inputs": {"file": "there.txt"}, "_meta": {"title": "the clip"}},
    "2": {"class_type": "TAVOneShotTune", "inputs": {"clip": ["1", 0], "steps": 5, "validation_prompt": ["3", 0]}},
    "3": {"class_type": "Prompt", "inputs": {"text": "a dog"}, "_meta": {"title": "the edit: what to see"}},
    "4": {"class_type": "Sample", "inputs": {"model": ["2", 0], "text": ["3", 0], "seed": 1, "kind": "plain"}},
}
JOBS = """
workflow: workflow.json
names: {clip: the clip.file, seed: Sample.seed}
rows: [{clip: a.txt}, {clip: b.txt}]
cross: {"the edit: what to see.text": [a dog, a cat, a bird], seed: [1, 2]}
"""


def jobs_file(folder):
    """Of two clips, three prompts and two seeds."""
    (folder / "workflow.json").write_text(json.dumps(WORKFLOW), encoding="utf-8")
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"clip {name}", encoding="utf-8")
    (folder / "jobs.yaml").write_text(JOBS, encoding="utf-8")
    return folder / "jobs.yaml"


@pytest.fixture
def file(tmp_path):
    return jobs_file(tmp_path)


def wrong(file, text=None):
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(jobs.Wrong) as error:
        jobs.read(file).jobs(INFO)
    return error.value.lines


# --- jobs files ---------------------------------------------------------------------------------------------------


def test_rows_are_crossed_with_lists(file):
    plan = jobs.read(file)
    planned = plan.jobs(INFO)
    assert len(planned) == len({job.id for job in planned}) == 12
    prompt, files = plan.prompt(planned[-1].values, INFO)
    assert prompt["3"]["inputs"]["text"] == "a bird" and prompt["4"]["inputs"]["seed"] == 2
    assert files == {("1", "file"): file.parent / "b.txt"}
    assert WORKFLOW["4"]["inputs"]["seed"] == 1 and plan.prompt({}, INFO)[0] == WORKFLOW


def test_jobs_of_one_clip_share_a_tune_whatever_is_previewed(file):
    planned = jobs.read(file).jobs(INFO)
    assert len({job.tune for job in planned}) == 2
    assert [job.tune for job in planned[:6]] == [planned[0].tune] * 6
    crossed = JOBS.replace("seed: [1, 2]", "TAVOneShotTune.steps: [5, 6]")
    assert len({job.tune for job in jobs.read(write(file, crossed)).jobs(INFO)}) == 4


def write(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def test_what_a_job_is_called_says_what_it_computes(file):
    before = [job.id for job in jobs.read(file).jobs(INFO)]
    (file.parent / "a.txt").rename(file.parent / "c.txt")
    assert [job.id for job in jobs.read(write(file, JOBS.replace("a.txt", "c.txt"))).jobs(INFO)] == before
    (file.parent / "c.txt").write_text("another clip", encoding="utf-8")
    after = [job.id for job in jobs.read(file).jobs(INFO)]
    assert not set(after[:6]) & set(before) and after[6:] == before[6:]
    assert len(jobs.read(write(file, JOBS.replace("a.txt", "b.txt"))).jobs(INFO)) == 6, "what is twice is done once"


def test_a_table_is_a_job_a_row(file):
    table = file.with_suffix(".csv")
    table.write_text(
        'the clip.file,Sample.seed,the edit: what to see.text\na.txt,3,"a dog, red"\nthere.txt,4,a cat\n',
        encoding="utf-8",
    )
    plan = jobs.read(table, file.parent / "workflow.json")
    assert [job.values["Sample.seed"] for job in plan.jobs(INFO)] == ["3", "4"]
    assert plan.rows[0]["the edit: what to see.text"] == "a dog, red"
    table.write_text("Sample.seed\n1,2\n", encoding="utf-8")
    assert "row 1 is no table" in wrong_table(table, file)
    with pytest.raises(jobs.Wrong, match="no workflow is named"):
        jobs.read(table)


def wrong_table(table, file):
    with pytest.raises(jobs.Wrong) as error:
        jobs.read(table, file.parent / "workflow.json")
    return str(error.value)


def test_what_is_no_table_is_said(file):
    table = file.with_suffix(".csv")
    table.write_bytes("Sample.kind\nré\n".encode("cp1252"))
    assert wrong_table(table, file) == "jobs.csv is not in UTF-8: save it so, from a spreadsheet as CSV UTF-8."
    table.write_text("Sample.seed,Sample.kind,Sample.seed\n1,plain,2\n", encoding="utf-8")
    assert wrong_table(table, file) == "jobs.csv has two columns 'Sample.seed': leave one out."
    table.write_text(f"Sample.kind\n{'a' * 2**18}\n", encoding="utf-8")
    assert wrong_table(table, file).startswith("jobs.csv is no CSV table: field larger")


def test_a_cell_of_a_table_may_hold_any_line_break(file):
    table, told = file.with_suffix(".csv"), "a\u2028man\x0bon\u0085skis"
    table.write_text(f'Prompt.text\n{told}\n"two\nlines"\n', encoding="utf-8")
    rows = jobs.read(table, file.parent / "workflow.json").rows
    assert [row["Prompt.text"] for row in rows] == [told, "two\nlines"]


def test_two_names_of_one_input_are_refused(file):
    told = JOBS.replace("rows: [{clip: a.txt}", "set: {3.text: a fox}\nrows: [{clip: a.txt}")
    (line,) = wrong(file, told)
    assert line.startswith(
        "'3.text' and 'the edit: what to see.text' both set 'text' of 'the edit: what to see': leave"
    )


def test_all_that_is_wrong_is_said_at_once(file):
    lines = wrong(
        file,
        """
workflow: workflow.json
rows:
  - {the clip.file: gone.txt, Sample.seed: 100, Sample.kind: strange}
  - {the clip.file: gone.txt, Sample.sed: 1, Nobody.text: a, noise: 1}
  - {Sample.seed: many, TAVOneShotTune.steps: 0, TAVOneShotTune.clip: [9, 0]}
""",
    )
    text = "\n".join(lines)
    for words in (
        "the clip: file is 'gone.txt': there is no such file beside the jobs file, nor in ComfyUI's input folder.",
        "Sample: seed is 100, but must be from 0 to 99. (1 of 3 jobs)",
        "Sample: kind is 'strange', but ComfyUI has plain, other.",
        "'Sample' has no input 'sed'",
        "no node of the workflow is called 'Nobody'",
        "'noise' is no input: write the node's title, a dot and the input's name.",
        "Sample: seed is 'many', which is no whole number.",
    ):
        assert words in text, (words, text)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("4.seed: 5.7", "Sample: seed is 5.7, which is no whole number."),
        ("4.seed: '5.0'", "Sample: seed is '5.0', which is no whole number."),
        ("4.seed: yes", "Sample: seed is True, which is no whole number."),
        ("4.seed: .inf", "Sample: seed is inf, which is no whole number."),
        ("4.cfg: many", "Sample: cfg is 'many', which is no number."),
        ("4.cfg: .nan", "Sample: cfg is nan, which is no number."),
        ("4.exact: 'no'", "Sample: exact is 'no', but must be true or false."),
        ("4.exact: 1", "Sample: exact is 1, but must be true or false."),
        ("3.text: yes", "Prompt: text is True, which is no text: write it in quotes."),
        ("3.text: 2024-01-02", "Prompt: text is 2024-01-02, which is no text: write it in quotes."),
        ("4.model: 2024-01-02", "Sample: model is 2024-01-02, which cannot be sent: write it in quotes."),
    ],
)
def test_a_value_that_comfyui_would_take_for_another_is_refused(file, value, words):
    optional_inputs(file)
    assert wrong(file, f"workflow: workflow.json\nrows: [{{{value}}}]") == [f"{words} (1 of 1 jobs)"]


def test_values_are_taken_as_they_are_meant(file):
    optional_inputs(file)
    (file.parent / "jobs.csv").write_text("4.exact,4.seed,4.cfg\nFALSE,5,2\ntrue,6,.5\n", encoding="utf-8")
    plan = jobs.read(file.parent / "jobs.csv", file.parent / "workflow.json")
    assert [plan.prompt(job.values, INFO)[0]["4"]["inputs"]["exact"] for job in plan.jobs(INFO)] == [False, True]
    plan = jobs.read(write(file, "workflow: workflow.json\nrows: [{4.exact: false, 4.seed: 5.0, 4.cfg: 2, 3.text: 1}]"))
    assert len(plan.jobs(INFO)) == 1


def optional_inputs(file):
    """Have the workflow say its optional inputs, and no titles."""
    workflow = {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]} for number, node in WORKFLOW.items()
    }
    workflow["4"]["inputs"] = {**workflow["4"]["inputs"], "cfg": 7.5, "exact": True}
    (file.parent / "workflow.json").write_text(json.dumps(workflow), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workflow: [", "jobs.yaml is no YAML"),
        ("- 1", "jobs.yaml holds no jobs"),
        ("workflow: gone.json", "there is no workflow"),
        ("workflow: a.txt", "a.txt is no workflow"),
        ("workflow: workflow.json\nrow: []", "jobs.yaml has row; known are cross, names, rows"),
        ("workflow: workflow.json\nrows: {a: 1}", "rows must be a list"),
        ("workflow: workflow.json\ncross: {a: 1}", "cross: a must be a list of values"),
        ("rows: []", "no workflow is named"),
    ],
)
def test_what_is_no_jobs_file_is_said(file, text, words):
    assert any(words in line for line in wrong(file, text))


def saved(number, kind, values, *slots, **more):
    return {"id": number, "type": kind, "mode": 0, "widgets_values": values, "inputs": list(slots), **more}


def widget(name):
    return {"name": name, "widget": {"name": name}, "link": None}


def link(name, number):
    return {"name": name, "link": number}


@pytest.fixture
def page():
    """A workflow as the page saves it."""
    nodes = [
        saved(1, "Load", {"file": "there.txt"}, widget("file"), title="the clip"),
        saved(2, "TAVOneShotTune", [5], link("clip", 1), widget("steps")),
        saved(3, "Prompt", ["a dog"], widget("text")),
        saved(
            4, "Sample", [7, "randomize", "other"], link("model", 2), link("text", 3), widget("seed"), widget("kind")
        ),
        saved(5, "Note", ["a note"]),
    ]
    return {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 4, 0, "*"], [3, 3, 0, 4, 1, "*"]]}


def test_a_workflow_as_the_page_saves_it(file, page):
    (file.parent / "workflow.json").write_text(json.dumps(page), encoding="utf-8")
    plan = jobs.read(write(file, "workflow: workflow.json\nrows: [{the clip.file: a.txt}]"))
    prompt, _files = plan.prompt({}, INFO)
    assert prompt["4"]["inputs"] == {"model": ["2", 0], "text": ["3", 0], "seed": 7, "kind": "other"}
    assert prompt["1"]["inputs"] == {"file": "there.txt"} and len(plan.jobs(INFO)) == 1
    page["nodes"][1]["mode"] = 4
    with pytest.raises(ValueError, match="'TAVOneShotTune' is bypassed, a subgraph, a reroute .* Export"):
        api.to_api(page, INFO)


def test_a_bypassed_node_that_nothing_follows_is_left_out_as_in_the_page(page):
    before = api.to_api(page, INFO)
    page["nodes"] += [saved(6, "TAVOneShotTune", [5], link("clip", 4), widget("steps"), mode=4)]
    page["nodes"] += [saved(7, "Sample", [7, "fixed", "other"], link("model", 5), mode=4)]
    page["links"] += [[4, 1, 0, 6, 0, "*"], [5, 6, 0, 7, 0, "*"]]
    assert api.to_api(page, INFO) == before


@pytest.mark.parametrize("links", [None, [4]])
def test_a_node_that_the_server_lacks_is_no_note(page, links):
    page["nodes"] += [saved(6, "VHS_VideoCombine", {}, link("images", 1), outputs=[{"links": links}])]
    with pytest.raises(ValueError, match="'VHS_VideoCombine' is .* or no node of this ComfyUI"):
        api.to_api(page, INFO)
    page["nodes"][-1]["mode"] = 2
    assert "6" not in api.to_api(page, INFO)


@pytest.mark.parametrize(
    ("name", "about", "follows"),
    [
        ("seed", ["INT"], True),
        ("noise_seed", ["INT", {"control_after_generate": None}], True),
        ("seed", ["INT", {"control_after_generate": False}], False),
        ("first", ["INT", {"control_after_generate": True}], True),
        ("first", ["INT", {}], False),
        ("seed", ["FLOAT", {}], False),
        ("seed", ["COMBO", {"control_after_generate": True}], True),
    ],
)
def test_the_page_adds_a_widget_to_what_is_called_a_seed(name, about, follows):
    info = {"Crop": {"input": {"required": {name: about, "way": ["STRING"]}, "hidden": {"all": "PROMPT"}}}}
    info["Crop"]["display_name"] = "Crop"
    values = [7, "fixed", "mine"] if follows else [7, "fixed"]
    crop = saved(1, "Crop", values, widget(name), widget("way"))
    inputs = api.to_api({"nodes": [crop], "links": []}, info)["1"]["inputs"]
    assert inputs == {name: 7, "way": "mine" if follows else "fixed"}


# --- the ledger ---------------------------------------------------------------------------------------------------


TUNE = "0" * 16


def job(number, tune=TUNE):
    return jobs.Job(f"{number:016x}", {"number": number}, tune, {})


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "jobs.sqlite")


def states(ledger):
    return {int(row["id"], 16): row["state"] for row in ledger.rows()}


def test_a_worker_stays_with_its_tune_and_avoids_those_of_others(ledger):
    a, b = f"{1:016x}", f"{2:016x}"
    ledger.plan([job(0, a), job(1, b), job(2, a), job(3, b), job(4, a)])
    mine, theirs = worker_name(1), worker_name(2)
    assert [ledger.claim(mine), ledger.claim(theirs)] == [(job(0).id, 0), (job(1).id, 1)]
    ledger.done(job(0).id, mine, 1.0, {}, [])
    assert ledger.claim(mine, 0) == (job(2).id, 0)
    ledger.done(job(1).id, theirs, 1.0, {}, [])
    assert ledger.claim(theirs, 1) == (job(3).id, 1)
    ledger.done(job(3).id, theirs, 1.0, {}, [])
    assert ledger.claim(theirs, 1) == (job(4).id, 0), "rather than nothing, it tunes once more"
    assert ledger.claim(theirs, 1) is None


def test_jobs_that_are_added_to_a_tune_are_of_that_tune(ledger):
    a, b = f"{1:016x}", f"{2:016x}"
    ledger.plan([job(1, a), job(2, a)])
    ledger.plan([job(0, b), job(1, a), job(2, a), job(3, a)])
    assert [row["tune"] for row in ledger.rows()] == [0, 1, 1, 1]
    ledger.claim(worker_name(1))
    assert [ledger.claim(worker_name(2), 1) for _ in range(3)] == [(job(number).id, 1) for number in (1, 2, 3)]


def test_shards_divide_the_tunes(tmp_path):
    whole = Ledger(tmp_path / "jobs.sqlite")
    whole.plan([job(i, f"{i // 2:08x}00000000") for i in range(12)])
    taken = []
    for i in range(3):
        part = Ledger(whole.file, share=(i, 3))
        while claimed := part.claim(worker_name(i)):
            taken.append((i, int(claimed[0], 16)))
    assert sorted(number for _i, number in taken) == list(range(12))
    assert all(number // 2 % 3 == i for i, number in taken)


def test_what_is_done_stays_and_the_rest_is_planned_anew(ledger):
    ledger.plan([job(i) for i in range(5)])
    me = worker_name()
    for i in range(3):
        assert ledger.claim(me, 0) == (job(i).id, 0)
    ledger.done(job(0).id, me, 2.5, {"flicker": 1.0}, ["a.mp4"])
    ledger.failed(job(1).id, me, "no", again=False)
    ledger.failed(job(2).id, me, "not yet")
    assert states(ledger) == {0: "done", 1: "failed", 2: "waiting", 3: "waiting", 4: "waiting"}
    ledger.plan([job(i) for i in (6, 2, 1, 0)])
    assert states(ledger) == {0: "done", 1: "waiting", 2: "waiting", 3: "dropped", 4: "dropped", 6: "waiting"}
    assert ledger.claim(me, 0) == (job(6).id, 0), "in the order of the file"
    assert ledger.rows()[0]["values"] and [row["scores"] for row in ledger.rows() if row["state"] == "done"] == [
        {"flicker": 1.0}
    ]


def test_jobs_that_the_file_no_longer_has_are_left_out_and_known_again(ledger):
    ledger.plan([job(0), job(1)])
    me = worker_name()
    for number in (0, 1):
        ledger.claim(me, 0)
        if not number:
            ledger.done(job(0).id, me, 1.0, {}, [])
    ledger.plan([job(2)])
    assert states(ledger) == {0: "dropped", 1: "dropped", 2: "waiting"}
    assert ledger.counts() == {"dropped": 2, "waiting": 1}, "nobody waits for what runs of an earlier file"
    ledger.failed(job(1).id, me, "no")
    assert ledger.claim(me, 0) == (job(2).id, 0) and ledger.claim(me, 0) is None
    ledger.plan([job(0), job(1)])
    assert states(ledger) == {0: "done", 1: "waiting", 2: "dropped"}


def test_a_job_is_tried_so_often_and_one_put_back_was_not_tried(ledger):
    ledger.plan([job(0)])
    me = worker_name()
    for _ in range(3):
        ledger.claim(me)
        ledger.back(job(0).id, me)
    for expected in ("waiting", "failed"):
        assert ledger.claim(me)
        ledger.failed(job(0).id, me, "no")
        assert states(ledger) == {0: expected}
    assert ledger.rows()[0]["error"] == "no" and ledger.claim(me) is None


def test_what_a_lost_worker_had_is_taken_by_another_and_its_late_result_is_not(ledger, monkeypatch):
    ledger.plan([job(0)])
    lost = "another-machine:1:0"
    assert ledger.claim(lost) and ledger.claim(worker_name()) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LOST - 1)
    ledger.beat([lost])
    monkeypatch.setattr(time, "monotonic", lambda: now + LOST + 1)
    assert ledger.claim(worker_name()) is None, "it gave a sign of life"
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * LOST)
    assert ledger.claim(worker_name()) == (job(0).id, 0)
    ledger.done(job(0).id, lost, 1.0, {}, ["late"])
    assert states(ledger) == {0: "running"}
    monkeypatch.setattr(time, "monotonic", lambda: now + 4 * LOST)
    assert ledger.claim(worker_name()) is None and ledger.rows()[0]["error"] == "its worker was lost"


@pytest.mark.parametrize("behind", [10 * LOST, -10 * LOST])
def test_machines_whose_clocks_differ_leave_each_other_their_jobs(ledger, monkeypatch, behind):
    ledger.plan([job(0)])
    own, theirs, now = Ledger(ledger.file), "another-machine:1:0", time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - behind)
        assert ledger.claim(theirs)
    assert own.claim(worker_name()) is None
    ledger.done(job(0).id, theirs, 1.0, {}, [])
    assert states(ledger) == {0: "done"}


def test_what_a_lost_machine_had_is_taken_whatever_its_clock_said(ledger, monkeypatch):
    ledger.plan([job(0)])
    own, later, now = Ledger(ledger.file), time.time() + 10 * LOST, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert ledger.claim("another-machine:1:0")
    assert own.claim(worker_name()) is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * LOST)
    assert own.claim(worker_name()) == (job(0).id, 0)


def test_what_a_killed_process_of_this_machine_had_waits_at_once(ledger):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, encoding="utf-8"
    ).stdout
    ledger.plan([job(0), job(1)])
    ledger.claim(f"{worker_name().split(':')[0]}:{int(gone)}:0")
    ledger.claim(worker_name())
    ledger.plan([job(0), job(1)])
    assert states(ledger) == {0: "waiting", 1: "running"}


def test_who_is_at_work_and_how_much_each_has_done(ledger):
    ledger.plan([job(number) for number in range(5)])
    assert ledger.at_work() == {}
    for worker in ("a", "b", "a"):
        id, _tune = ledger.claim(worker)
        ledger.done(id, worker, 1.0, {}, [])
    ledger.claim("a")
    assert ledger.at_work() == {"a": 2}  # "b" has none now
    ledger.claim("c")
    assert ledger.at_work() == {"a": 2, "c": 0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_of_all_jobs_and_one_of_each_worker(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars.Bars({"done": 3, "waiting": 7, "dropped": 5}) as shown:
        shown.worker("here:1:0", "TAVOneShotTune", 40, 300)
        shown.worker("here:1:1", "TAVSampleVideo", 5, 50)
        shown.jobs({"done": 4, "waiting": 6, "dropped": 5})
        said = sys.stderr.getvalue()
    assert "3/10" in said and "4/10" in said
    assert "here:1:0 TAVOneShotTune" in said and "40/300" in said and "here:1:1 TAVSampleVideo" in said
    assert [bar.pos for bar in (shown.all, *shown.workers.values())] == [0, -1, -2]


@pytest.mark.parametrize("query", [OF_TUNE, AFTER_TUNE, LAST])
def test_claims_search_by_an_index(ledger, query):
    ledger.plan([job(i, f"{i % 50:016x}") for i in range(500)])
    with sqlite3.connect(ledger.file) as db:
        (step,) = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", {"tune": 7, "i": 0, "n": 1})]
    assert step.startswith("SEARCH jobs USING INDEX by_state (state=?"), "no scan, and nothing is sorted"


# --- one job ------------------------------------------------------------------------------------------------------


class Answers:
    """A server that says that nodes have written these outputs, in this order."""

    def __init__(self, outputs):
        self.outputs, self.client = outputs, "0" * 32

    def run(self, _prompt, _on_event):
        return {"outputs": self.outputs, "status": {"messages": []}}

    def download(self, output):
        return output["filename"].encode()


def do(server, prompt, number, folder):
    return batch.do(server, prompt, job(number), folder, lambda *_: None)


def node(kind, title="", **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def test_no_two_servers_write_to_one_file_of_a_shared_output_folder(tmp_path):
    servers = [api.Comfy(""), api.Comfy("")]
    for server in servers:
        server.run = Answers({}).run
    given = []
    for server, number in zip([*servers, servers[0]], (1, 2, 3), strict=True):
        prompt = {"1": node("SaveVideo", filename_prefix="video/a"), "2": node("SaveImage", filename_prefix=["3", 0])}
        do(server, prompt, number, tmp_path)
        given.append([node["inputs"]["filename_prefix"] for node in prompt.values()])
    assert given[0][0].startswith("video/a_") and len({name for names in given for name in names}) == 4
    assert given[0] == given[2], "a server keeps its own, and saves what has not changed but once"


@pytest.mark.parametrize("order", ["1234", "4321"])
def test_files_and_figures_are_named_in_the_prompts_order(tmp_path, order):
    told = {
        "1": {"images": [{"filename": "source.png", "type": "output"}]},
        "2": {"images": [{"filename": "edit.png", "type": "output"}]},
        "3": {"scores": [{"motion": 1}]},
        "4": {"scores": [{"motion": 2}]},
    }
    prompt = {"1": node("SaveImage", "Edit"), "2": node("SaveImage", "edit")}  # one file on some disks
    prompt |= {number: node("TAVScoreVideo", "Score Video") for number in "34"}
    found = do(Answers({number: told[number] for number in order}), prompt, 1, tmp_path)
    assert found["outputs"] == [f"{job(1).id}/Edit.png", f"{job(1).id}/edit_2.png"]
    assert (tmp_path / found["outputs"][0]).read_text(encoding="utf-8") == "source.png"
    assert found["scores"] == {"Score Video: motion": 1, "Score Video_2: motion": 2}


def test_an_upload_is_named_by_what_it_holds_and_an_error_says_the_clips_own_name(tmp_path):
    clip = tmp_path / f"{'雪' * 30}.mp4"
    clip.write_bytes(b"a clip")

    class Failing(Answers):
        def upload(self, file):
            return "0123.mp4"

        def run(self, prompt, _on_event):
            error = {"node_type": "Load", "exception_message": f"{prompt['1']['inputs']['file']} is empty"}
            return {"outputs": {}, "status": {"messages": [["execution_error", error]]}}

    one = jobs.Job("1", {}, TUNE, {("1", "file"): clip})
    with pytest.raises(RuntimeError, match=f"Load: {clip.name} is empty"):
        batch.do(Failing({}), {"1": node("Load", file=clip.name)}, one, tmp_path, lambda *_: None)
    with fake() as address:
        assert api.Comfy(address).upload(clip) == f"{hashlib.sha256(b'a clip').hexdigest()[:16]}.mp4"
        clip.write_bytes(b"-" * 2**21)
        with pytest.raises(api.Refused, match=r"雪.mp4 has 2 MiB, more than http.* takes: .*--max-upload-size\.$"):
            api.Comfy(address).upload(clip)
        with pytest.raises(api.Refused, match=r"does not take 雪+\.mp4: 404 Not Found$"):
            api.Comfy(f"{address}/elsewhere").upload(clip)


# --- runs ---------------------------------------------------------------------------------------------------------


@contextmanager
def fake(seconds=0.02):
    port = run.open_port(0)
    program = [sys.executable, str(PROJECT / "tests" / "support" / "fake_comfy.py"), str(port), str(seconds)]
    with subprocess.Popen(program) as process:
        while not run.answers(port):
            assert process.poll() is None
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def run_batch(monkeypatch, *arguments):
    """The command in this process; its exit code, or the line with which it ended."""
    monkeypatch.setattr(sys, "argv", ["batch", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        batch.main()
    return end.value.code


def table(folder):
    """The results, without what differs from run to run."""
    with (folder / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "worker", "attempt")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of a whole run, to be looked at."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch, fake() as address:
        assert run_batch(monkeypatch, jobs_file(folder), "--server", address, "--out", folder / "whole") == 0
    return folder / "whole"


def test_every_job_is_run_with_its_own_values_and_files(undisturbed):
    rows = table(undisturbed)
    assert [row["state"] for row in rows] == ["done"] * 12
    for row in rows:
        (written,) = (undisturbed / row["outputs"]).parent.iterdir()
        inputs = json.loads(written.read_text(encoding="utf-8"))
        assert inputs[0]["file"] == f"clip {row['clip'][0]}"
        assert inputs[2]["text"] == row["the edit: what to see.text"] and str(inputs[3]["seed"]) == row["seed"]
    page = (undisturbed / "index.html").read_text(encoding="utf-8")
    assert "12 done" in page and page.count("<tr>") == 13 and f'href="{rows[0]["outputs"]}"' in page


def test_a_second_run_does_only_what_is_new(file, undisturbed, monkeypatch, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.txt")}
    write(file, JOBS.replace("[1, 2]", "[1, 2, 3]"))
    with fake() as address:
        assert run_batch(monkeypatch, file, "--server", address, "--out", out) == 0
    assert len(table(out)) == 18 and {row["state"] for row in table(out)} == {"done"}
    assert len(before) >= 12 and all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_after_a_change_the_table_has_the_new_jobs_alone(file, undisturbed, monkeypatch, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "whole")
    changed = {**WORKFLOW, "2": {**WORKFLOW["2"], "inputs": {**WORKFLOW["2"]["inputs"], "steps": 6}}}
    (file.parent / "workflow.json").write_text(json.dumps(changed), encoding="utf-8")
    with fake() as address:
        assert run_batch(monkeypatch, file, "--server", address, "--out", out) == 0
    assert len(table(out)) == 12 and not {row["job"] for row in table(out)} & {row["job"] for row in table(undisturbed)}
    words = "12 done; 12 that the jobs file no longer has are left out"
    assert words in capsys.readouterr().out and words in (out / "index.html").read_text(encoding="utf-8")
    assert all((out / row["outputs"]).is_file() for row in table(undisturbed)), "their files are kept"


def test_a_dry_run_prints_the_jobs_and_runs_nothing(file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["batch", str(file), "--dry-run", "--server"])
    with fake() as address:
        sys.argv.append(address)
        batch.main()
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 13 and told[-1] == "12 jobs, 2 tunes"
        assert "clip: a.txt, the edit: what to see.text: a dog, seed: 1" in told[0]
        assert not (tmp_path / "jobs-results" / "jobs.sqlite").exists()
        write(file, JOBS.replace("a.txt", "gone.txt"))
        said = run_batch(monkeypatch, file, "--server", address)
    assert said == (
        "run.py: error: the clip: file is 'gone.txt': there is no such file beside the jobs file, nor in ComfyUI's "
        "input folder. (6 of 12 jobs)"
    )


def test_what_fails_is_said_and_the_rest_is_done(file, monkeypatch, tmp_path):
    write(file, JOBS.replace("a dog, a cat", "bad, refused"))
    with fake() as address:
        assert run_batch(monkeypatch, file, "--server", address) == 1
    rows = table(tmp_path / "jobs-results")
    by_text = {(row["the edit: what to see.text"], row["state"], row["error"]) for row in rows}
    assert by_text == {
        ("bad", "failed", "Prompt: it is bad"),
        ("refused", "failed", "not taken"),
        ("a bird", "done", ""),
    }
    ledger = Ledger(tmp_path / "jobs-results" / "jobs.sqlite")
    assert {row["error"]: row["attempt"] for row in ledger.rows() if row["error"]} == {
        "Prompt: it is bad": 2,
        "not taken": 1,
    }


@pytest.mark.parametrize("more", ["--dry-run", "--tries=1"])
def test_words_that_the_terminal_cannot_write_end_nothing(file, tmp_path, more):
    write(file, JOBS.replace("a dog, a cat, a bird", "bad 雪, 雪の中"))
    with fake() as address:
        command = [sys.executable, "-P", str(PROJECT / "tools" / "pack.py"), "tools.batch", str(file), more]
        told = subprocess.run(
            [*command, "--server", address],
            env={**os.environ, "PYTHONIOENCODING": "cp1252"},
            capture_output=True,
            encoding="cp1252",
        )
    assert told.returncode == (more != "--dry-run"), told.stderr
    assert r"bad \u96ea" in told.stdout + told.stderr
    if more != "--dry-run":
        assert Ledger(tmp_path / "jobs-results" / "jobs.sqlite").counts() == {"done": 4, "failed": 4}


def test_jobs_that_keep_nothing_are_said_once(file, monkeypatch, capsys):
    workflow = {number: WORKFLOW[number] for number in "123"}  # what it has in place of a Sample saves nothing
    (file.parent / "workflow.json").write_text(json.dumps(workflow), encoding="utf-8")
    write(file, "workflow: workflow.json\ncross: {3.text: [a dog, a cat]}")
    with fake() as address:
        assert run_batch(monkeypatch, file, "--server", address) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("has nothing to keep: previews are not kept.") == 1


@pytest.mark.parametrize("of", ["results", "the ledger"])
def test_a_full_disk_costs_an_attempt(file, undisturbed, monkeypatch, tmp_path, capsys, of):
    """The worker ends and says so; the same command goes on where there is room again."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with fake() as address, monkeypatch.context() as patch:
        if of == "results":
            own, written = results.write_whole, []

            def write_whole(path, content):
                written.append(path)
                if len(written) == 7:  # the fourth job's: of each a text, and what stands for its contact sheet
                    raise full
                own(path, content)

            patch.setattr(results, "write_whole", write_whole)
        else:
            patch.setattr(Ledger, "done", lambda *_args, **_more: raise_(full))
            patch.setattr(Ledger, "failed", lambda *_args: raise_(full))
        assert run_batch(monkeypatch, file, "--server", address) == 1
        said = capsys.readouterr()
        assert "ends: [Errno 28] No space left on device. Run the same command again" in said.out + said.err
        ledger = Ledger(tmp_path / "jobs-results" / "jobs.sqlite")
        assert max(row["attempt"] for row in ledger.rows()) <= 1 and ledger.counts().get("done", 0) < 12
        assert "failed" not in ledger.counts()
        patch.undo()
        assert run_batch(monkeypatch, file, "--server", address) == 0
    assert table(tmp_path / "jobs-results") == table(undisturbed)


def raise_(error):
    raise error


@pytest.mark.parametrize(("most", "code", "words"), [(5, 0, "The jobs go on"), (math.inf, 1, "--report does that")])
def test_a_table_that_is_open_elsewhere_ends_no_worker(
    file, undisturbed, monkeypatch, tmp_path, capsys, most, code, words
):
    monkeypatch.setattr(batch, "REPORT", 0.0)
    out, replace, refused = tmp_path / "jobs-results", os.replace, []

    def locked(source, target):
        if Path(target).name == "results.csv" and len(refused) < most:
            refused.append(target)
            raise PermissionError(errno.EACCES, "it is open elsewhere", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with fake() as address:
        assert run_batch(monkeypatch, file, "--server", address) == code
    said = capsys.readouterr()
    assert (said.out + said.err).count(words) == 1 and "results.csv" in said.out + said.err
    assert len(refused) >= 5 and not list(out.glob("*.part"))
    assert "12 done" in (out / "index.html").read_text(encoding="utf-8")
    assert code or table(out) == table(undisturbed)


def test_servers_share_the_jobs_and_one_that_goes_leaves_them_to_the_others(file, undisturbed, monkeypatch, tmp_path):
    monkeypatch.setattr(batch, "PATIENCE", 0.5)
    monkeypatch.setattr(batch, "WAIT", 0.05)
    with fake(0.05) as one, fake(0.05) as two, fake(0.05) as three:
        port = int(three.rpartition(":")[2])
        killer = subprocess.Popen(
            [sys.executable, "-c", KILL_ON_PORT, str(port), str(tmp_path / "out" / "jobs.sqlite")]
        )
        run_batch(monkeypatch, file, "--server", one, two, three, "--out", tmp_path / "out")
        killer.wait()
    assert table(tmp_path / "out") == table(undisturbed)
    workers = {row["worker"].rpartition(":")[2] for row in Ledger(tmp_path / "out" / "jobs.sqlite").rows()}
    assert workers >= {"0", "1"}


def test_a_server_that_freezes_leaves_its_job_to_the_others(file, undisturbed, monkeypatch, tmp_path):
    monkeypatch.setattr(batch, "PATIENCE", 0.5)
    monkeypatch.setattr(batch, "WAIT", 0.05)
    monkeypatch.setattr(api, "QUIET", 0.2)
    get = api.Comfy.get
    monkeypatch.setattr(api.Comfy, "get", lambda self, path, timeout=0.5: get(self, path, timeout))
    with fake(0.05) as one, fake(3) as two:
        freezer = threading.Thread(target=freeze_at_work, args=(two,))
        freezer.start()
        assert run_batch(monkeypatch, file, "--server", one, two, "--out", tmp_path / "out") == 0
        freezer.join()
    assert table(tmp_path / "out") == table(undisturbed)


def freeze_at_work(address):
    """Stop a server, as one that loses its network stops, as soon as it computes."""
    port = address.rpartition(":")[2]
    (process,) = (child for child in psutil.Process().children() if port in child.cmdline())
    while not api.Comfy(address).get("/queue")["queue_running"]:
        time.sleep(0.02)
    process.suspend()


def test_a_server_that_computes_without_a_word_is_waited_for(monkeypatch):
    monkeypatch.setattr(api, "QUIET", 0.1)
    with fake(1) as address:
        history = api.Comfy(address, patience=0.1).run(WORKFLOW)
    assert "execution_success" in dict(history["status"]["messages"])


# Ends the server on a port as soon as a job is running.
KILL_ON_PORT = """
import psutil, sqlite3, sys, time
port, file = sys.argv[1:]
while True:
    time.sleep(0.05)
    try:
        if sqlite3.connect(file).execute("SELECT 1 FROM jobs WHERE worker LIKE '%:2'").fetchone():
            break
    except sqlite3.Error:
        pass
for process in psutil.process_iter(["cmdline"]):
    line = process.info["cmdline"] or []
    if port in line and any("fake_comfy" in word for word in line):
        process.kill()
"""


def finished(folder):
    """How many jobs are done, by the ledger as it is."""
    try:
        with sqlite3.connect(f"file:{folder / 'jobs.sqlite'}?mode=ro", uri=True) as db:
            return db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'done'").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_random_moments_the_table_is_that_of_an_undisturbed_run(file, undisturbed, tmp_path):
    out, random = tmp_path / "killed", Random(5)
    with fake(0.1) as address:
        command = [sys.executable, "-P", str(PROJECT / "tools" / "pack.py"), "tools.batch", str(file)]
        command += ["--server", address, "--out", str(out)]
        kills = 0
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
            before = finished(out)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number is None:
                process.wait()
                break
            while finished(out) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3 * random.random())
            if process.poll() is None:
                kills += 1
                process.send_signal(number)
            process.wait()
            with sqlite3.connect(out / "jobs.sqlite") as db:
                running = db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'running'").fetchone()[0]
            assert running <= (number == signal.SIGKILL), "at Ctrl-C all is put back"
    assert kills >= 2 and process.returncode == 0
    assert table(out) == table(undisturbed)


@pytest.fixture
def own_host(tmp_path, monkeypatch):
    """A ComfyUI folder whose main.py is the small server, for a batch that starts its own."""
    host = tmp_path / "ComfyUI"
    (host / "comfy").mkdir(parents=True)
    (host / "nodes.py").write_text("", encoding="utf-8")
    fake = PROJECT / "tests" / "support" / "fake_comfy.py"
    (host / "main.py").write_text(
        "import pathlib, runpy, sys\n"
        "pathlib.Path(__file__).with_name('told.txt').write_text(' '.join(sys.argv), encoding='utf-8')\n"
        "port = sys.argv[sys.argv.index('--port') + 1]\n"
        f"sys.argv = ['', port, '0.1']; runpy.run_path({str(fake)!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(batch.run, "STATE", tmp_path / "state")
    monkeypatch.setattr(batch.run, "device_arguments", lambda _python: [])
    return host


def test_a_server_of_our_own_that_dies_is_started_again(file, undisturbed, own_host, monkeypatch, tmp_path):
    out = tmp_path / "own"
    killer = subprocess.Popen([sys.executable, "-c", KILL_OUR_SERVER, str(out)])
    assert run_batch(monkeypatch, file, "--out", out) == 0
    assert killer.wait() == 0 and table(out) == table(undisturbed)
    assert max(row["attempt"] for row in Ledger(out / "jobs.sqlite").rows()) == 2
    assert not list(out.glob("server-*.json"))
    assert " --max-upload-size 1000000" in (own_host / "told.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="signals and terminals")
@pytest.mark.parametrize("way", ["its group is told to end", "its terminal goes", "nohup"])
def test_a_batch_that_is_told_to_end_ends_its_server(file, own_host, tmp_path, way):
    out = tmp_path / "told"
    ours, theirs = os.openpty()
    command = [sys.executable, "-P", "-c", BATCH_IN_A_TERMINAL, str(PROJECT / "tools"), str(tmp_path / "state"), way]
    process = subprocess.Popen(
        [*command, str(file), "--out", str(out)], start_new_session=True, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        while not finished(out):
            assert process.poll() is None
            with suppress(BlockingIOError):
                os.read(ours, 2**16)
            time.sleep(0.02)
        (note,) = out.glob("server-*.json")
        server = psutil.Process(json.loads(note.read_text(encoding="utf-8"))["server"])
        if way == "its group is told to end":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.close(ours)
        code = process.wait(60)
    finally:
        process.kill()
    assert not server.is_running() and not note.exists()
    counts = Ledger(out / "jobs.sqlite").counts()
    assert (code, counts) == (0, {"done": 12}) if way == "nohup" else code == 130 and "running" not in counts


# The command in a terminal of its own, whose host is looked for in a folder of the test's.
BATCH_IN_A_TERMINAL = """
import fcntl, runpy, signal, sys, termios
from pathlib import Path
_, tools, state, way, *sys.argv[1:] = sys.argv
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, tools)
from pack import load_nothing
load_nothing()
from tune_a_video import run
run.STATE, run.device_arguments = Path(state), lambda _python: []
if way == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout = sys.stderr = open(state + ".log", "w", encoding="utf-8")
try:
    runpy.run_module("tune_a_video.tools.batch", run_name="__main__")
except KeyboardInterrupt:
    sys.exit(130)
"""


# Kills the batch's server as soon as two jobs are done.
KILL_OUR_SERVER = """
import json, pathlib, psutil, sqlite3, sys, time
out = pathlib.Path(sys.argv[1])
while True:
    time.sleep(0.02)
    try:
        with sqlite3.connect(out / "jobs.sqlite") as db:
            if db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'done'").fetchone()[0] >= 2:
                break
    except sqlite3.Error:
        pass
(note,) = out.glob("server-*.json")
psutil.Process(json.loads(note.read_text(encoding="utf-8"))["server"]).kill()
"""


def test_ray_starts_a_worker_that_does_all_jobs(file, undisturbed, own_host, monkeypatch, tmp_path):
    pytest.importorskip("ray")
    monkeypatch.setenv("TAV_HOST", str(own_host))
    assert run_batch(monkeypatch, file, "--out", tmp_path / "ray", "--ray", "local") == 0
    assert table(tmp_path / "ray") == table(undisturbed)


def test_a_server_whose_batch_was_killed_is_ended_by_the_next(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        gone = 2**22 - 1
        assert not psutil.pid_exists(gone)
        began = psutil.Process(sleeper.pid).create_time()
        note = tmp_path / f"server-{gone}-{socket.gethostname()}.json"
        note.write_text(json.dumps({"server": other.pid, "began": began - 100}), encoding="utf-8")
        batch.end_orphans(tmp_path)
        assert other.poll() is None and not note.exists(), "another process has the number by now"
        note.write_text(json.dumps({"server": sleeper.pid, "began": began}), encoding="utf-8")
        others = [f"server-{os.getpid()}-{socket.gethostname()}.json", f"server-{gone}-elsewhere.json"]
        for name in others:
            (tmp_path / name).write_text("{}", encoding="utf-8")
        batch.end_orphans(tmp_path)
        assert not psutil.pid_exists(sleeper.pid) and sorted(os.listdir(tmp_path)) == sorted(others)
    finally:
        sleeper.kill()
        other.kill()


# --- the example --------------------------------------------------------------------------------------------------


def test_the_example_fits_the_nodes(core):
    def about(node):
        told = node.GET_NODE_INFO_V1() if hasattr(node, "GET_NODE_INFO_V1") else {"input": node.INPUT_TYPES()}
        return {"display_name": "", **told}

    nodes = {**core, **{node.GET_SCHEMA().node_id: node for node in NODES}}
    plan = jobs.read(PROJECT / "tools" / "batch_example.yaml")
    used = {node["class_type"] for node in plan.workflow.values()}
    planned = plan.jobs(json.loads(json.dumps({name: about(nodes[name]) for name in used})))
    assert len(planned) == 6 and len({job.tune for job in planned}) == 2


# --- the results --------------------------------------------------------------------------------------------------


def test_the_page_shows_videos_and_takes_no_text_for_code(tmp_path):
    row = {"id": "1", "values": {"text": "<b>&"}, "state": "done", "attempt": 1, "worker": "w", "seconds": 1.25}
    row |= {"scores": {"flicker": 1 / 3, "edit_success": None}, "outputs": ["1/a.mp4"], "error": None}
    (tmp_path / "1").mkdir()
    write_video(tmp_path / "1" / "a.mp4", [picture(i) for i in range(3)])
    assert results.contact_sheet(tmp_path / "1" / "a.mp4") == tmp_path / "1" / "a.mp4.jpg"
    results.write(tmp_path, [row, {**row, "id": "2", "state": "dropped"}])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and 'src="1/a.mp4.jpg"' in page and "0.33333" in page
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8-sig").splitlines()) == 2
    (tmp_path / "no.mp4").write_bytes(b"no video")
    assert results.contact_sheet(tmp_path / "no.mp4") is None
