"""What the host and the page see of the pack."""

import ast
import asyncio
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import tune_a_video
from comfy_api.latest import io
from pack import PROJECT, load_pack
from tune_a_video.tav_core.store import weights

NODES = asyncio.run(asyncio.run(tune_a_video.comfy_entrypoint()).get_node_list())
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in NODES}


def test_node_ids_and_names_stay():
    assert {name: schema.display_name for name, schema in SCHEMAS.items()} == {
        "TAVLoadClip": "Load Clip",
        "TAVPrepareClip": "Prepare Clip",
        "TAVInflateUNet": "Inflate UNet",
        "TAVOneShotTune": "One-Shot Tune",
        "TAVDDIMInvert": "DDIM Invert",
        "TAVFindMask": "Find Mask",
        "TAVSampleVideo": "Sample Video",
        "TAVLoadDemoModel": "Load Demo Model",
        "TAVDemoClip": "Demo Clip",
        "TAVSaveWeights": "Save Weights",
        "TAVLoadWeights": "Load Weights",
        "TAVApplyWeights": "Apply Weights",
        "TAVLoadPublished": "Load Published Model",
        "TAVExportPublished": "Export Published Model",
        "TAVCompareVideos": "Compare Videos",
        "TAVScoreVideo": "Score Video",
    }


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_input_and_output_is_explained(schema):
    assert schema.description
    ends = [*schema.inputs, *schema.outputs]
    for end in ends:
        assert end.tooltip and end.tooltip.endswith("."), end.id
    # Before 0.8 the host needs them to differ.
    assert len({end.id for end in ends}) == len(ends)


@dataclass
class NewerSchema(io.Schema):
    """What hosts have from 0.10 on, and this one may lack."""

    search_aliases: list[str] = field(default_factory=list)


def test_on_newer_hosts_nodes_are_found_by_what_people_type(monkeypatch):
    monkeypatch.setattr(io, "Schema", NewerSchema)
    found = {word for node in NODES for word in node.define_schema().search_aliases}
    assert all(node.define_schema().search_aliases for node in NODES)
    typed = {
        "edit video",
        "video to video",
        "v2v",
        "motion transfer",
        "train",
        "fine-tune",
        "inversion",
        "side by side",
    }
    assert typed <= found


def test_defaults_are_the_papers():
    method = [schema for name, schema in SCHEMAS.items() if "Demo" not in name]
    defaults = {entry.id: getattr(entry, "default", None) for schema in method for entry in schema.inputs}
    paper = {"learning_rate": 3e-5, "seed": 33, "cfg": 12.5, "weight_decay": 1e-2, "max_grad_norm": 1.0}
    assert defaults | paper == defaults
    clip = {entry.id: entry.default for entry in SCHEMAS["TAVLoadClip"].inputs if hasattr(entry, "default")}
    assert (clip["count"], clip["width"], clip["height"]) == (24, 512, 512)
    steps = {name: entry.default for name, schema in SCHEMAS.items() for entry in schema.inputs if entry.id == "steps"}
    assert steps == {"TAVOneShotTune": 500, "TAVDDIMInvert": 50, "TAVSampleVideo": 50}


def test_importing_the_pack_imports_nothing_that_the_host_has_not():
    code = (
        "import asyncio, os, sys; sys.path[:0] = [os.environ['TAV_HOST'], sys.argv[1]]\n"
        "import utils, torch; from comfy.cli_args import args; args.cpu = True\n"
        "import nodes\n"
        "asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))\n"
        "before = set(sys.modules); import pack; pack.load_pack()\n"
        "print(*(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-c", code, str(PROJECT / "tools")]
    brought = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()
    assert "tune_a_video" in brought
    assert [name for name in brought if name.split(".")[0] not in ("pack", "tune_a_video")] == []


@pytest.mark.parametrize("kind", ["cuda", "backends.mps", "xpu"])
def test_programs_use_the_device_that_the_host_would(kind, monkeypatch):
    from comfy.cli_args import args

    devices = {"cuda": torch.cuda, "backends.mps": torch.backends.mps, "xpu": torch.xpu}
    for name, device in devices.items():
        monkeypatch.setattr(device, "is_available", lambda name=name: name == kind)
    monkeypatch.setattr(args, "cpu", None)
    for cpu in (False, True):
        load_pack("tune_a_video_elsewhere", cpu)
        assert args.cpu is cpu
        for name in [name for name in sys.modules if name.startswith("tune_a_video_elsewhere")]:
            del sys.modules[name]


def test_the_demo_model_is_small():
    files = [PROJECT / "demo" / "model.safetensors", PROJECT / "lab" / "classifier.safetensors"]
    assert files[0].stat().st_size <= 16_000_000 and files[1].stat().st_size < 1_000_000


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    return names


def test_one_module_imports_the_host():
    files = [
        PROJECT / "__init__.py",
        *(path for folder in ("nodes", "tav_core", "demo") for path in PROJECT.glob(f"{folder}/**/*.py")),
    ]
    hosts = {"comfy", "comfy_extras", "latent_preview", "folder_paths", "execution", "server"}
    assert {path.name for path in files if imports(path) & hosts} == {"comfyui.py"}
    assert all("comfy_api" not in imports(path) for path in files if path.parent not in (PROJECT, PROJECT / "nodes"))


def test_weights_say_which_pack_wrote_them():
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{weights.PACK_VERSION}"' in project


def test_requirements_name_what_is_imported_and_never_torch():
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert f"dependencies = {json.dumps(required)}" in project
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    named = re.findall(r'^[\w-]+ = \["([\w-]+)"\]$', extras, re.MULTILINE)
    assert named == ["xformers", "flash-attn", "sageattention", "opencv-python-headless", "ray"], (
        "of whatever version fits"
    )
    assert not any(re.match(r"(torch|xformers)", line) for line in required)
