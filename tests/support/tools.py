"""The tools that publish and install packs, in an environment of their own beside the host's packages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import PROJECT, run

# pip: the one that comes with Python 3.10 cannot report what it would install.
TOOLS = ("comfy-cli==1.23.0", "comfyui-manager==4.3", "check-jsonschema==0.39.0", "pip")
FOLDER = PROJECT / ".venv-tools"


def tools_python() -> Path:
    """A Python that imports what this one does, and has TOOLS; made once. Skips the test if PyPI cannot be reached."""
    about = run.query(Path(sys.executable))
    # At the versions that are there: a newer copy in this environment would hide them.
    pins = sorted(f"{name}=={version}" for name, version in about["packages"].items() if name not in TOOLS)
    pins = [pin for pin in pins if re.fullmatch(r"[\w.-]+==[\w.!]+", pin)]
    made_of = json.dumps([TOOLS, sys.executable, pins])
    python, stamp = run.venv_python(FOLDER), FOLDER / "made_of.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of and run.runs(python):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
    lines = [f"import site; site.addsitedir({folder!a})\n" for folder in about["folders"]]
    (run.site_packages(python) / "host.pth").write_text("".join(lines), encoding="utf-8")
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    command = [str(python), "-m", "pip", "--no-input", "install", "--constraint", str(constraints), *TOOLS]
    installed = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if installed.returncode and "connection broken" in installed.stdout + installed.stderr:
        pytest.skip("comfy-cli and ComfyUI-Manager cannot be installed: PyPI cannot be reached")
    assert installed.returncode == 0, installed.stderr
    stamp.write_text(made_of, encoding="utf-8")
    return python
