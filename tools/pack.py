"""Load this pack outside a running ComfyUI, the way the host does: under a package name, with relative imports.

As a program, `pack.py MODULE …` runs one of its modules, such as `lab.train`, with the arguments that follow. Those of
`tools` need nothing of the pack, and run without it and the host.
"""

import importlib.util
import io
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).resolve().parent.parent
NAME = "tune_a_video"


def load_pack(name: str = NAME, cpu: bool = False) -> ModuleType:
    """The pack as a package of this name, on the host in the folder that TAV_HOST names (run.py sets it).

    Args:
        cpu: whether to have the host use the CPU where there is another device.
    """
    if name in sys.modules:
        return sys.modules[name]
    host = os.environ.get("TAV_HOST")
    if not host:
        raise SystemExit("TAV_HOST does not name a ComfyUI folder: start this through run.py.")
    # ComfyUI claims top-level names such as `nodes`, which this project has as well.
    if host not in sys.path:
        sys.path.insert(0, host)
    # First, as in the host's main.py: later its nodes.py puts comfy/ in front, whose utils.py would be found.
    import torch
    import utils  # noqa: F401
    from comfy.cli_args import args

    # As run.py starts the host's server: it takes what torch finds, and does not start where that is nothing.
    kinds = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", None))
    args.cpu = cpu or not any(kind and kind.is_available() for kind in kinds)
    spec = importlib.util.spec_from_file_location(
        name, PROJECT / "__init__.py", submodule_search_locations=[str(PROJECT)]
    )
    assert spec is not None and spec.loader is not None
    pack = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def load_nothing(name: str = NAME) -> None:
    """Only the package's name, so that its modules can be imported by themselves."""
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = [str(PROJECT)]


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv = sys.argv[1:]
    load_nothing() if sys.argv[0].startswith("tools.") else load_pack()
    try:
        runpy.run_module(f"{NAME}.{sys.argv[0]}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # run.py says what is to be said
        sys.exit(130)
