"""A really started ComfyUI with this pack, and the few calls of its HTTP API that a page makes."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import aiohttp

PROJECT = Path(__file__).resolve().parents[2]
NAME = "tune-a-video"


class Server:
    """Use as a context manager; `base` becomes its folder for models, input and output."""

    def __init__(self, base):
        self.base = Path(base)
        for folder in ("models/checkpoints", "custom_nodes", "input", "output"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"

    def __enter__(self):
        link_folder(self.base / "custom_nodes" / NAME, PROJECT)
        host, port = self.address.split(":")
        command = [sys.executable, "main.py", "--cpu", "--listen", host, "--port", port, "--disable-api-nodes"]
        command += ["--base-directory", str(self.base), "--preview-method", "latent2rgb"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", NAME]
        with open(self.base / "log.txt", "w") as log:
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
        return (self.base / "log.txt").read_text(errors="replace")

    def get(self, path):
        with urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path, data):
        with urlopen(Request(f"http://{self.address}{path}", json.dumps(data).encode()), timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def run(self, prompt, on_event=lambda _kind, _data: None, timeout=600):
        """Queue an API-format prompt and wait for its end; returns its history entry.

        `on_event` is told all that the page would be: JSON messages by their type, binary ones as "binary".
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_event), timeout))

    async def _run(self, prompt, on_event):
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://{self.address}/ws?clientId=tests", max_msg_size=0) as socket,
        ):
            identity = self.post("/prompt", {"prompt": prompt, "client_id": "tests"})["prompt_id"]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    on_event("binary", message.data)
                    continue
                event = json.loads(message.data)
                on_event(event["type"], event["data"])
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        while identity not in (history := self.get(f"/history/{identity}")):
            await asyncio.sleep(0.1)
        return history[identity]


def link_folder(link, target):
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def to_api(workflow, object_info):
    """The page's format → the API's, as the page itself does when Run is pressed."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        # Every widget has an input slot of its name, in the order of the values; an upload button is no input.
        inputs = {slot["widget"]["name"]: next(values) for slot in node["inputs"] if "widget" in slot}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        known = {
            **object_info[node["type"]]["input"]["required"],
            **object_info[node["type"]]["input"].get("optional", {}),
        }
        assert not list(values), node["type"]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {name: value for name, value in inputs.items() if name in known},
        }
    return prompt
