"""A ComfyUI that lacks something this pack uses: all nodes are there, and those that need it say what and why not."""

import ast
import asyncio
import logging
import re
import sys

import comfy.samplers
import comfyui_version
import pytest
import torch
import tune_a_video
from pack import PROJECT, load_pack
from tune_a_video.tav_core.host import drift
from tune_a_video.tav_core.host.symbols import NEEDS, TORCH, TRIED

CHANGED = "tune_a_video_on_a_changed_host"
SAMPLING = {"TAVOneShotTune", "TAVDDIMInvert", "TAVFindMask", "TAVSampleVideo"}
PUBLISHED = {"TAVLoadPublished", "TAVExportPublished"}
FILES = {"TAVSaveWeights", "TAVLoadWeights", *PUBLISHED}
OF_A_MODEL = {"TAVInflateUNet", "TAVApplyWeights", "TAVLoadDemoModel", *SAMPLING, *PUBLISHED}
WITHOUT_HOST = {"TAVLoadClip", "TAVPrepareClip", "TAVCompareVideos", "TAVDemoClip"}
MEMBERS = [
    pytest.param(owner, *member, id=f"{owner}.{member[0]}")
    for needs in NEEDS.values()
    for owner, members in needs.items()
    for member in re.findall(r"(\w+)(\(.*?\))?", members)
]


def nodes_of(pack):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in nodes}


@pytest.fixture
def reload():
    """Load the pack anew, as a ComfyUI does that is started now."""
    yield lambda: nodes_of(load_pack(CHANGED))
    for name in [name for name in sys.modules if name.partition(".")[0] == CHANGED]:
        del sys.modules[name]


def lose(monkeypatch, name):
    """Take a module, or "module:name" of one, from the host."""
    module, _, rest = name.partition(":")
    if rest:
        monkeypatch.delattr(f"{module}.{rest}")
    else:
        monkeypatch.setitem(sys.modules, module, None)


def refused(nodes):
    """What each node says that only says why it cannot run, by its id."""
    said = {}
    for name, node in nodes.items():
        if node.__name__ == "Refusing":
            with pytest.raises(RuntimeError) as error:
                node.EXECUTE_NORMALIZED(**{entry.id: None for entry in node.GET_SCHEMA().inputs})
            said[name] = str(error.value)
    return said


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("comfy.ldm.modules.diffusionmodules.openaimodel", OF_A_MODEL),
        ("comfy.ldm.modules.attention:SpatialTransformer", OF_A_MODEL),
        ("comfy.model_patcher:ModelPatcher", OF_A_MODEL),
        ("comfy.samplers:KSAMPLER", SAMPLING),
        ("comfy.samplers:CFGGuider.set_cfg", SAMPLING),
        ("latent_preview", SAMPLING),
        ("comfy.lora", {"TAVOneShotTune", "TAVApplyWeights", *PUBLISHED}),
        ("comfy.utils:ProgressBar", {"TAVOneShotTune"}),
        ("comfy.utils:unet_to_diffusers", PUBLISHED),
        ("folder_paths:get_filename_list", FILES),
        ("comfy.sd1_clip:SD1ClipModel", {"TAVLoadDemoModel"}),
        ("comfy.clip_vision", {"TAVScoreVideo"}),
    ],
)
def test_what_is_missing_stops_the_nodes_that_need_it(name, nodes, monkeypatch, reload, caplog):
    with monkeypatch.context() as changed, caplog.at_level(logging.INFO):
        lose(changed, name)
        said = refused(reload())
    assert said.keys() == nodes
    logged = [record.getMessage() for record in caplog.records if record.name.startswith(CHANGED)]
    assert len(logged) == len(nodes)
    for message in said.values():
        assert message.startswith(f"ComfyUI {comfyui_version.__version__} does not fit this version of Tune-A-Video: ")
        assert name.replace(":", ".") in message and "\n" not in message
        assert "tried on 0.3.75 and 0.33.0" in message and "update Tune-A-Video" in message
        assert any(message in line for line in logged)


def test_the_other_nodes_work(model, clip, prompts, make_weights, monkeypatch, reload):
    learned = make_weights(model)
    lost = (
        "comfy.sd",
        "comfy.utils:unet_to_diffusers",
        "folder_paths:models_dir",
        "torch.utils.checkpoint:CheckpointPolicy",
    )
    for name in lost:
        lose(monkeypatch, name)
    nodes = reload()
    needing = {"TAVOneShotTune", "TAVFindMask", "TAVLoadDemoModel", "TAVScoreVideo"}
    assert refused(nodes).keys() == needing | set(FILES)
    with torch.inference_mode():
        (inflated,) = nodes["TAVInflateUNet"].execute(model, "video").result
        (tuned,) = nodes["TAVApplyWeights"].execute(inflated, learned, 1.0, 1.0).result
        inverted, _noise, _sigmas = nodes["TAVDDIMInvert"].execute(tuned, clip, prompts[0], 1).result
        (video,) = nodes["TAVSampleVideo"].execute(tuned, inverted, *prompts, 1, 1.0).result
    assert video["samples"].isfinite().all()


def test_a_node_that_needs_no_host_never_refuses(monkeypatch, reload):
    for name in {owner.partition(":")[0] for needs in NEEDS.values() for owner in needs} - {"torch.utils.checkpoint"}:
        lose(monkeypatch, name)
    nodes = reload()
    assert nodes.keys() - refused(nodes).keys() == WITHOUT_HOST


def test_an_old_torch_stops_tuning_only(monkeypatch, reload, caplog):
    """Before 2.4 it lacks all three."""
    with monkeypatch.context() as changed:
        changed.delattr("torch.utils.checkpoint.CheckpointPolicy")
        changed.delattr("torch.utils.checkpoint.create_selective_checkpoint_contexts")
        changed.delitem(vars(torch.ops.aten), "_scaled_dot_product_cudnn_attention", raising=False)
        said = refused(reload())
    assert said.keys() == {"TAVOneShotTune"}
    message = said["TAVOneShotTune"]
    assert message.startswith(f"torch {torch.__version__} is too old") and f"torch {TORCH} or newer" in message
    assert message in caplog.text


def test_parameters_of_another_name_are_only_logged(monkeypatch, reload, caplog):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "set_cfg", lambda self, scale: None)
    monkeypatch.setattr(comfy.samplers, "KSAMPLER", lambda function, **more: None)
    assert not refused(reload())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (cfg, ksampler) = (line for line in said if line.startswith("Tune-A-Video: "))
    assert "comfy.samplers.CFGGuider.set_cfg" in cfg and "has no parameter cfg." in cfg
    assert "comfy.samplers.KSAMPLER" in ksampler and "has no parameter sampler_function." in ksampler


@pytest.mark.parametrize(("owner", "name", "call"), MEMBERS)
def test_every_name_is_looked_up(owner, name, call, caplog):
    """With another name in its place, and other parameters."""
    assert drift.lost({owner: f"{name}{call}"}) == [] and not caplog.records
    assert drift.lost({owner: f"{name}_gone{call}"}) == [f"{owner.replace(':', '.')}.{name}_gone"]
    if "(" in call:
        assert drift.lost({owner: f"{name}(gone)"}) == []
        assert " has no parameter gone. " in caplog.text


def test_a_method_is_not_taken_from_the_code_that_calls_it(monkeypatch):
    monkeypatch.delattr("comfy.model_patcher.ModelPatcher.add_patches")
    assert drift.lost({"comfy.model_patcher:ModelPatcher": "add_patches()"})
    assert not drift.lost({"comfy.model_patcher:ModelPatcher": "load_device"})  # only its code has that name


def test_a_class_that_became_a_function(monkeypatch):
    monkeypatch.setattr("comfy.patcher_extension.WrapperExecutor", lambda: None)
    assert drift.lost({"comfy.patcher_extension:WrapperExecutor": "class_obj"})


def test_what_a_changed_host_registers_is_what_it_always_was(monkeypatch, reload):
    usual = nodes_of(tune_a_video)
    with monkeypatch.context() as changed:
        for name in ("folder_paths:recursive_search", "comfy.samplers:KSAMPLER"):
            lose(changed, name)
        nodes = reload()
    assert list(nodes) == list(usual)
    for name, node in nodes.items():
        mine, info = node.GET_NODE_INFO_V1(), usual[name].GET_NODE_INFO_V1()
        for description in (mine, info):
            description.pop("python_module")
            for entries in description["input"].values():  # lists of files: empty, for the host is not asked
                for name in ("published", "file"):
                    entries.pop(name, None)
        assert mine == info


def test_any_input_gets_as_far_as_the_reason(monkeypatch, reload, core):
    """The host looks at values before it runs anything: that a file is in no list must not hide why."""
    import execution

    with monkeypatch.context() as changed:
        lose(changed, "folder_paths:get_filename_list")
        for name, node in reload().items():
            monkeypatch.setitem(core, name, node)
    inputs = {"weights": ["1", 0], "filename_prefix": "a", "precision": "fp32"}
    prompt = {
        "1": {"class_type": "TAVLoadWeights", "inputs": {"file": "mine.safetensors"}},
        "2": {"class_type": "TAVSaveWeights", "inputs": inputs},
    }
    valid, error, _outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and error is None and not node_errors


def test_one_short_line_whatever_is_lost(tmp_path, monkeypatch):
    (tmp_path / "many_lines.py").write_text("raise OSError('first\\nsecond')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    lost = [*drift.lost({"many_lines": "a", "many_lines:B": "c"}), *(f"gone_{i}" for i in range(30))]
    message = drift.refusal(lost)
    assert message.startswith("ComfyUI of an unknown version does not fit")
    assert "it lacks many_lines (first second), gone_0, gone_1 and 28 more, which" in message
    assert len(message) < 400


def test_the_versions_that_are_named_are_the_documented_ones():
    text = (PROJECT / "docs" / "host-compatibility.md").read_text(encoding="utf-8")
    tried = text.partition("\n\n")[2].partition("\n\n")[0]
    assert re.findall(r"\*\*(?:ComfyUI )?([\d.]+)\*\*", tried) == list(TRIED)
    assert f"torch {TORCH} or newer" in tried
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={TRIED[0]}"' in project


# --- the table is complete ---------------------------------------------------------------------------------------

TEXTS = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("nodes", "tav_core")
    for path in (PROJECT / folder).glob("**/*.py")
    if path.name != "symbols.py"
}
OF_OTHERS = {"detach", "size", "device", "dtype", "load", "parent"}  # of tensors and paths, but a MODEL has them too
NAMES = {f"{owner}.{name}".replace(":", ".") for owner, name, _call in (row.values for row in MEMBERS)}
LISTED = {name.rpartition(".")[2] for name in NAMES}


def test_all_that_is_used_of_the_hosts_modules_is_listed():
    ours = "".join(text for name, text in TEXTS.items() if name.startswith("tav_core/host/"))
    code = re.sub(r"^ +(import|from) .+$", "", ours, flags=re.MULTILINE)
    used = set(re.findall(r"\b((?:comfy|folder_paths|latent_preview)\.[\w.]*\w)", code))
    assert {"comfy.lora.calculate_weight", "folder_paths.models_dir"} <= used
    prefixes = {name[: end.start()] for name in NAMES for end in re.finditer(r"\.|$", name)}
    assert not {use for use in used - prefixes if not any(use.startswith(f"{name}.") for name in NAMES)}


def test_all_that_is_used_of_the_hosts_objects_is_listed(model):
    """Whatever attribute of a MODEL, its parts or a guider our sources name."""
    objects = (model, model.model, model.model.diffusion_model, comfy.samplers.CFGGuider(model))
    theirs = {name for thing in objects for name in dir(thing)} - {*dir(torch.nn.Module())}
    used = {
        node.attr
        for text in TEXTS.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("host", "self", "torch", "nn")
    }
    assert {"clone", "attachments", "diffusion_model", "set_conds", "in_channels"} <= used & theirs
    assert used & theirs <= {*LISTED, *OF_OTHERS}


def test_all_that_is_listed_is_used():
    text = "\n".join(TEXTS.values())
    assert not {name for name in LISTED - {"__init__", "__call__", "forward"} if not re.search(rf"\b{name}\b", text)}
