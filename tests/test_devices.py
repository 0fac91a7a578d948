"""The pack with a model on a device of its own (see support/pretended_device.py)."""

import subprocess
import sys

import pytest
from live_server import PROJECT
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="older torch has no such device",
)
def test_a_tune_and_an_edit_stay_on_the_models_device():
    """In a process of their own: torch cannot be rid of a device again, and other tests would find it."""
    inside = PROJECT / "tests" / "support" / "pretended_device.py"
    command = [sys.executable, "-I", "-Xwarn_default_encoding", "-m", "pytest", "-q", "-p", "no:xdist", str(inside)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout
