"""What an installation meets: pip, the registry's tools, ComfyUI-Manager, and other file systems."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from live_server import NAME, PROJECT, Server
from PIL import Image
from tune_a_video.nodes import NODES

from tools import tools_python

PYPROJECT = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]

# What main.py of newer hosts does for --enable-manager, which ComfyUI 0.3.75 does not know.
MANAGER = """
from comfy.cli_args import args
args.enable_manager, args.enable_manager_legacy_ui = True, False
import comfyui_manager
comfyui_manager.start()
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="session")
def tools() -> Path:
    return tools_python()


def call(*command: object, folder: Path = PROJECT, **environment: str) -> str:
    """What a command prints; an AssertionError when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def files() -> list[PurePosixPath]:
    """The files of this repository."""
    if not (PROJECT / ".git").exists():
        pytest.skip("this copy is no git checkout, and only git tells the pack's files from others")
    return [PurePosixPath(name) for name in call("git", "ls-files", "-z").split("\0") if name]


# ---- pip ------------------------------------------------------------------------------------------------


def would_install(tools: Path, report: Path, *options: str) -> set[str]:
    """The names of what pip would install into the environment of these tests for requirements.txt."""
    command = [tools, "-m", "pip", "--python", sys.executable, "install", "--dry-run", "--report", report, *options]
    call(*command, "--requirement", PROJECT / "requirements.txt")
    return {found["metadata"]["name"] for found in json.loads(report.read_text(encoding="utf-8"))["install"]}


def test_nothing_is_installed_into_a_host(tools, tmp_path):
    assert would_install(tools, tmp_path / "report.json") == set()


def test_even_in_an_empty_environment_nothing_else_is_fetched(tools, tmp_path):
    assert would_install(tools, tmp_path / "report.json", "--ignore-installed") == {"einops", "safetensors"}


# ---- the registry's tools -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(files, tmp_path_factory) -> Path:
    """A fresh checkout: the tools write beside what they read."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in files:
        if (PROJECT / file).is_file():  # not one that is removed, but not committed
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes((PROJECT / file).read_bytes())
    call("git", "init", "--quiet", folder=folder)
    call("git", "add", "--all", "--force", folder=folder)
    return folder


def comfy_cli(tools: Path, checkout: Path, command: str) -> str:
    """`comfy node …`, which asks nothing, reports nothing and keeps its settings in the checkout."""
    home = str(checkout / ".git")
    quiet = {"HOME": home, "USERPROFILE": home, "DO_NOT_TRACK": "1"}
    return call(tools, "-m", "comfy_cli", "--skip-prompt", "node", command, folder=checkout, **quiet)


@pytest.fixture(scope="module")
def archive(tools, checkout) -> zipfile.ZipFile:
    """The package as the registry would get it."""
    said = comfy_cli(tools, checkout, "pack")
    assert "Created zip file" in said and "Warning" not in said
    return zipfile.ZipFile(checkout / "node.zip")


def test_the_registrys_validation_passes(tools, checkout):
    said = comfy_cli(tools, checkout, "validate")
    assert "All validation checks passed" in said and "Warning" not in said


def test_the_registrys_validation_can_fail(tools, checkout):
    doubtful = checkout / "doubtful.py"
    doubtful.write_text("eval('1')\n", encoding="utf-8")
    said = comfy_cli(tools, checkout, "validate")
    doubtful.unlink()
    assert "Security warnings found" in said and "doubtful.py" in said


def test_the_package_holds_what_runs_and_nothing_else(archive, files):
    packed = set(archive.namelist())
    folders = {"nodes", "tav_core", "web", "locales", "example_workflows", "subgraphs", "tools"}
    assert packed >= {str(file) for file in files if file.parts[0] in folders and (PROJECT / file).is_file()}
    assert packed >= {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "demo/LICENSES.md"}
    assert packed >= {"run.py"} and {name for name in packed if name.startswith("docs/")} == {"docs/batch.md"}
    others = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE", "demo"}
    assert {name.split("/")[0] for name in packed} <= folders | others | {"run.py", "docs"}
    assert Path(archive.filename).stat().st_size < 20_000_000


def test_the_metadata_is_filled_in():
    assert re.search(r'^requires-comfyui = ">=\d+\.\d+\.\d+"$', PYPROJECT, re.MULTILINE)
    for field, limit in (("Icon", (400, 400)), ("Banner", (1260, 540))):
        url = re.search(rf'^{field} = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
        assert url.startswith("https://raw.githubusercontent.com/")
        with Image.open(PROJECT / url.partition("/main/")[2]) as picture:
            assert picture.size == limit
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == VERSION


@pytest.mark.parametrize(
    ("schema", "pattern"), [("workflows", "workflows/*.yml"), ("issue-forms", "ISSUE_TEMPLATE/*.yml")]
)
def test_githubs_files_are_valid(tools, schema, pattern):
    forms = sorted((PROJECT / ".github").glob(pattern))
    call(tools, "-m", "check_jsonschema", "--builtin-schema", f"vendor.github-{schema}", *forms)


# ---- the package in a host, with ComfyUI-Manager --------------------------------------------------------


@pytest.fixture(scope="module")
def server(tools, archive, tmp_path_factory):
    """A host in which nothing is but the package, as ComfyUI-Manager installs it, and ComfyUI-Manager itself."""
    from comfy.cli_args import args

    base = tmp_path_factory.mktemp("installed")
    pack, manager = base / "custom_nodes" / NAME, base / "custom_nodes" / "manager"
    archive.extractall(pack)
    (pack / ".tracking").write_text("\n".join(archive.namelist()), encoding="utf-8")
    settings = base / "user" / "__manager" / "config.ini"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nnetwork_mode = offline\n", encoding="utf-8")
    options = ["--whitelist-custom-nodes", NAME, "manager"]
    if hasattr(args, "enable_manager"):
        options.append("--enable-manager")
    else:
        manager.mkdir()
        (manager / "__init__.py").write_text(MANAGER, encoding="utf-8")
    with Server(base, *options, python=tools, pack=pack) as server:
        yield server


def test_every_node_is_served(server):
    served = server.get("/object_info")
    assert {node.define_schema().node_id for node in NODES} <= set(served)
    assert sorted(path.stem for path in PROJECT.glob("example_workflows/*.json")) == sorted(
        server.get("/workflow_templates")[NAME]
    )
    log = server.log()
    assert NAME in log and f"Cannot import {server.base}" not in log


def test_what_the_page_shows_of_the_pack_is_served(server):
    """Template by template with its picture, help pages with theirs, blueprints, and all languages."""

    def served(address):
        with urlopen(server.address + quote(address), timeout=30) as answer:
            return answer.read()

    for folder, address in (("example_workflows", "/api/workflow_templates/"), ("web", "/extensions/")):
        files = [path for path in (PROJECT / folder).rglob("*.*") if path.is_file()]
        assert len(files) >= 18
        for path in files:
            assert served(f"{address}{NAME}/{path.relative_to(PROJECT / folder).as_posix()}") == path.read_bytes(), path
    for node in NODES:
        assert served(f"/extensions/{NAME}/docs/{node.define_schema().node_id}.md")
    blueprints = {entry["name"]: number for number, entry in server.get("/global_subgraphs").items()}
    for path in PROJECT.glob("subgraphs/*.json"):
        assert json.loads(server.get(f"/global_subgraphs/{blueprints[path.stem]}")["data"]) == json.loads(
            path.read_text(encoding="utf-8")
        )
    languages = {path.name for path in (PROJECT / "locales").iterdir()}
    translated = server.get("/i18n")
    assert {name for name in languages if "TAVOneShotTune" in translated[name]["nodeDefs"]} == languages


def test_the_demos_nodes_run(server):
    """They need files that are no Python: the model and the pictures of its world."""
    clip = {"motion": "arc", "object": "red car", "background": "beach", "frames": 2, "size": 128, "seed": 0}
    prompt = {
        "1": {"class_type": "TAVLoadDemoModel", "inputs": {}},
        "2": {"class_type": "TAVDemoClip", "inputs": clip},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    history = server.run(prompt, timeout=120)
    assert history["status"]["status_str"] == "success"
    pictures = history["outputs"]["5"]["images"]
    assert Image.open(io.BytesIO(server.download(pictures[0]))).size == (128, 128)


def test_comfyui_manager_lists_it_as_installed(server):
    installed = server.get("/v2/customnode/installed")
    assert installed[NAME] == {"ver": VERSION, "cnr_id": NAME, "aux_id": None, "enabled": True}


# ---- other file systems ---------------------------------------------------------------------------------


def test_windows_can_hold_every_file(files):
    for file in files:
        assert len(str(file)) <= 200
        for part in file.parts:
            assert not re.search(r'^(con|prn|aux|nul|com\d|lpt\d)(\.|$)|[<>:"|?*\\]|[. ]$', part, re.IGNORECASE), file
    everything = {path for file in files for path in (file, *file.parents)}
    spellings = Counter(str(path).casefold() for path in everything)
    assert not [name for name, count in spellings.items() if count > 1]


def test_a_text_file_of_unnamed_encoding_fails_these_tests(tmp_path):
    with pytest.raises(EncodingWarning):
        (tmp_path / "a.txt").write_text("ä")
