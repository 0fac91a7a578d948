"""A workflow in the API's form, changed by its nodes' names."""

import json

import pytest
from live_server import PROJECT
from tune_a_video.tools.api import Graph


@pytest.fixture
def graph():
    def node(kind, title, **inputs):
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}

    return Graph(
        {
            "1": node("CLIPTextEncode", "caption", text="a car", clip=["4", 1]),
            "2": node("CLIPTextEncode", "edit", text="a dog", clip=["4", 1]),
            "3": node("KSampler", "KSampler", positive=["2", 0], seed=0),
            "4": {
                "class_type": "CheckpointLoaderSimple",
                "inputs": {"ckpt_name": "sd.ckpt"},
            },  # no title: an older page
            "5": node("SaveImage", "KSampler", images=["3", 0]),
        }
    )


def test_a_node_is_found_by_title_class_or_id(graph):
    assert [graph.find(name) for name in ("edit", "CheckpointLoaderSimple", "SaveImage", "3")] == ["2", "4", "5", "3"]


def test_what_is_not_there_is_said_with_what_is(graph):
    before = json.dumps(graph.prompt)
    with pytest.raises(ValueError, match="no node of the workflow is called 'Edit'. There are .*'caption', 'edit'"):
        graph.set("Edit", text="a cat")
    for name, count in (("KSampler", 2), ("CLIPTextEncode", 2)):
        with pytest.raises(ValueError, match=f"{count} nodes are called '{name}'"):
            graph.find(name)
    with pytest.raises(ValueError, match="'edit' has no input 'txt'. It has text, clip."):
        graph.set("edit", text="a cat", txt="a cat")
    assert json.dumps(graph.prompt) == before


def test_an_input_gets_a_value_or_a_link(graph):
    assert graph.set("edit", text="a cat") == "2"
    graph.set("3", positive=["1", 0], seed=5)
    assert graph.prompt["2"]["inputs"] == {"text": "a cat", "clip": ["4", 1]}
    assert graph.prompt["3"]["inputs"] == {"positive": ["1", 0], "seed": 5}
    graph.prompt["2"]["inputs"] |= {"name": "a", "self": "b"}
    graph.set("edit", name="c", self="d")
    assert graph.prompt["2"]["inputs"] == {"text": "a cat", "clip": ["4", 1], "name": "c", "self": "d"}


def test_copies_are_linked_to_each_other_and_apart_from_the_original(graph):
    original = json.dumps(graph.prompt)
    copies = graph.copy(["2", "3"], "again")
    graph.set(copies["2"], text="a cat")
    text, sampler = (graph.prompt[copies[number]] for number in ("2", "3"))
    assert sampler["inputs"]["positive"] == [copies["2"], 0], "to the copy"
    assert text["inputs"]["clip"] == ["4", 1], "to what was not copied"
    assert {graph.title(copy) for copy in copies.values()} == {"again"}
    graph.remove(copies.values())
    assert json.dumps(graph.prompt) == original


def test_only_the_apis_form_is_read(graph, tmp_path):
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(graph.prompt), encoding="utf-8")
    assert Graph.read(file).prompt == graph.prompt
    file.write_bytes((PROJECT / "example_workflows" / "1-Quickstart.json").read_bytes())
    with pytest.raises(ValueError, match="workflow.json is not in the API's form: write it anew, by Export"):
        Graph.read(file)
    for text in ("", "[]", "{}", "{", "\0"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="workflow.json is no workflow"):
            Graph.read(file)
