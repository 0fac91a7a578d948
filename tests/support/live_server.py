"""A really started ComfyUI with this pack."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tune_a_video.tools.api import Comfy

PROJECT = Path(__file__).resolve().parents[2]
NAME = "tune-a-video"

spec = importlib.util.spec_from_file_location("tav_run", PROJECT / "run.py")
run = sys.modules["tav_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


class Server(Comfy):
    """Use as a context manager; `base` becomes its folder for models, input, output and the user's files.

    Args:
        options: further arguments of ComfyUI.
        python: what it runs on.
        pack: where this pack is; linked into the custom_nodes of `base` unless it is there.
    """

    def __init__(self, base, *options, python=sys.executable, pack=PROJECT):
        self.base, self.options, self.python, self.pack = Path(base), options, python, pack
        for folder in ("models/checkpoints", "custom_nodes", "input", "output"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}")

    def __enter__(self):
        run.link_folder(self.base / "custom_nodes" / NAME, self.pack)
        command = [str(self.python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-api-nodes", "--base-directory", str(self.base), "--preview-method", "latent2rgb"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", NAME, *self.options]
        with open(self.base / "log.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=os.environ["TAV_HOST"], stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while True:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise RuntimeError(self.log()) from None
                time.sleep(0.2)

    def __exit__(self, *_error):
        self.process.kill()
        self.process.wait()

    def log(self):
        return (self.base / "log.txt").read_text(encoding="utf-8", errors="replace")
