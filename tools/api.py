"""The few calls of ComfyUI's HTTP interface that a program needs: what the page itself does when Run is pressed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import aiohttp

Prompt = dict[str, dict[str, Any]]
MUTED, BYPASSED = 2, 4  # a node's mode in the page's workflows
NOTES = ("Note", "MarkdownNote")
SEEDS = ("fixed", "increment", "decrement", "randomize")  # what the page does with a seed after a run
QUIET = 15.0  # seconds without a word after which a server is asked whether it is there
SLOWEST = 2**18  # bytes a second, of an upload
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Refused(Exception):
    """ComfyUI does not take a prompt or a file; the text says why, of a prompt a line a node."""


def content(file: Path) -> str:
    """The SHA-256 of what a file holds, in hexadecimal digits."""
    about = file.stat()
    return _digest_of(file, about.st_size, about.st_mtime_ns)


@cache
def _digest_of(file: Path, _size: int, _modified: int) -> str:
    """Read once: most jobs of a batch share their clips."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


class Comfy:
    """A running ComfyUI at `address`, such as http://127.0.0.1:8188.

    Args:
        patience: seconds without any answer after which it counts as lost while it computes.
    """

    def __init__(self, address: str, patience: float = 300):
        self.address, self.patience = address, patience
        self.client = uuid.uuid4().hex
        self.running: str | None = None  # the id of the prompt that `run` waits for

    def get(self, path: str, timeout: float = 30) -> Any:
        with urlopen(self.address + path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        with urlopen(Request(self.address + path, json.dumps(data).encode()), timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def upload(self, file: Path) -> str:
        """Put a file into ComfyUI's input folder; its name there, which is made of what it holds.

        Its own may be too long there, where letters are written as bytes. Raises Refused when ComfyUI does not take it.
        """
        return asyncio.run(self._upload(file))

    async def _upload(self, file: Path) -> str:
        form = aiohttp.FormData()
        name, size = f"{content(file)[:16]}{file.suffix}", file.stat().st_size
        limit = aiohttp.ClientTimeout(total=self.patience + size / SLOWEST)
        with file.open("rb") as stream:
            form.add_field("image", stream, filename=name)
            async with (
                aiohttp.ClientSession(timeout=limit) as session,
                session.post(f"{self.address}/upload/image", data=form) as answer,
            ):
                if answer.status == 413:
                    told = f"{file.name} has {size / 2**20:.0f} MiB, more than {self.address} takes"
                    raise Refused(f"{told}: start ComfyUI with --max-upload-size.")
                if answer.status != 200:
                    raise Refused(f"{self.address} does not take {file.name}: {answer.status} {answer.reason}")
                return (await answer.json())["name"]

    def download(self, output: Mapping[str, str]) -> bytes:
        """A file that a node has written, as its history entry names it."""
        with urlopen(f"{self.address}/view?{urlencode(output)}", timeout=60) as answer:
            return answer.read()

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[str, Any], None] = lambda _kind, _data: None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Queue a prompt and wait for its end, however long it computes; returns its history entry.

        Args:
            on_event: told all that the page would be: JSON messages by their type, binary ones as "binary".

        Raises Refused when the prompt is not valid, and OSError when the server is lost.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_event), timeout))

    async def _run(self, prompt: Prompt, on_event: Callable[[str, Any], None]) -> dict[str, Any]:
        socket_address = f"{self.address.replace('http', 'ws', 1)}/ws?clientId={self.client}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(socket_address, max_msg_size=0) as socket,
        ):
            try:
                queued = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
            except HTTPError as error:
                try:
                    told = json.loads(error.read())
                except ValueError:  # not ComfyUI's words, but those of something before it
                    raise error from None
                raise Refused(refusal(told)) from None
            identity = self.running = queued["prompt_id"]
            if queued["node_errors"]:  # ComfyUI runs what is valid of it; a part is not what was asked for
                self.interrupt()
                raise Refused(refusal(queued))
            ended, heard = False, time.monotonic()
            while not ended:
                try:
                    message = await socket.receive(QUIET)
                except asyncio.TimeoutError:  # it computes without a word, or is lost: a frozen one closes nothing
                    try:
                        if not self._has(identity):
                            break
                    except OSError:
                        if time.monotonic() - heard > self.patience:
                            raise ConnectionError(f"{self.address} does not answer any more") from None
                    else:
                        heard = time.monotonic()
                    continue
                heard = time.monotonic()
                if message.type is aiohttp.WSMsgType.BINARY:
                    on_event("binary", message.data)
                elif message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    on_event(event["type"], event["data"])
                    ended = event["type"] in ENDS and event["data"].get("prompt_id") == identity
                else:
                    break  # it was closed
        while identity not in (history := self.get(f"/history/{identity}")):
            # Without the event of its end: it came just now, or the server was started anew and knows nothing of it.
            lost = not ended and not self._has(identity)
            if lost and identity not in self.get(f"/history/{identity}"):
                raise ConnectionError(f"{self.address} was started anew while it ran")
            await asyncio.sleep(0.1)
        return history[identity]

    def _has(self, identity: str) -> bool:
        """Whether a prompt is in the queue, or being computed."""
        return identity in json.dumps(self.get("/queue", QUIET))

    def interrupt(self) -> None:
        """Take what `run` waits for out of the queue, or stop it."""
        if self.running is not None:
            self.post("/queue", {"delete": [self.running]})
            self.post("/interrupt", {"prompt_id": self.running})


class Graph:
    """A workflow in the API's form, to be changed by its nodes' names.

    Args:
        prompt: node id → {"class_type", "inputs", "_meta": {"title"}}; changed in place. A link is [node id, output].
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt

    @classmethod
    def read(cls, file: Path) -> Graph:
        """A workflow that the page's menu has written, by Export (API). Raises ValueError when it is none."""
        try:
            prompt = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            prompt = None
        if not isinstance(prompt, dict) or not prompt:
            raise ValueError(f"{file.name} is no workflow: choose a .json file that ComfyUI's Export (API) wrote.")
        if not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in prompt.values()):
            raise ValueError(f"{file.name} is not in the API's form: write it anew, by Export (API) in ComfyUI's menu.")
        return cls(prompt)

    def find(self, name: str) -> str:
        """The id of the node that has this id, title or class, looked for in this order.

        Raises ValueError when there is none, or more than one.
        """
        classes = {number: node["class_type"] for number, node in self.prompt.items()}
        titles = {number: self.title(number) for number in self.prompt}
        for names in ({number: number for number in self.prompt}, titles, classes):
            found = [number for number in names if names[number] == name]
            if len(found) > 1:
                raise ValueError(f"{len(found)} nodes are called {name!r}: give the one that is meant its own title.")
            if found:
                return found[0]
        known = ", ".join(sorted(map(repr, titles.values())))
        raise ValueError(f"no node of the workflow is called {name!r}. There are {known}.")

    def title(self, number: str) -> str:
        """What the page calls a node, or its class where the file says no title."""
        node = self.prompt[number]
        return node.get("_meta", {}).get("title", node["class_type"])

    def set(self, name: str, /, **inputs: Any) -> str:
        """Give inputs of a node, named as for `find`, their values or links; its id.

        Raises ValueError as `find`, and for an input that it has not.
        """
        number = self.find(name)
        known = self.prompt[number]["inputs"]
        for wanted in inputs:
            if wanted not in known:
                raise ValueError(
                    f"{self.title(number)!r} has no input {wanted!r}. It has {', '.join(known) or 'none'}."
                )
        known |= inputs
        return number

    def copy(self, numbers: Iterable[str], title: str) -> dict[str, str]:
        """Copy nodes, linked to each other as these are, and to the rest as these are; old id → the copy's."""
        copies = {number: f"{title}.{number}" for number in numbers}

        def relinked(value: Any) -> Any:
            return [copies.get(value[0], value[0]), *value[1:]] if isinstance(value, list) else value

        for number, copy in copies.items():
            node = self.prompt[number]
            inputs = {name: relinked(value) for name, value in node["inputs"].items()}
            self.prompt[copy] = {**node, "inputs": inputs, "_meta": {"title": title}}
        return copies

    def remove(self, numbers: Iterable[str]) -> None:
        for number in numbers:
            del self.prompt[number]


def refusal(answer: Mapping[str, Any]) -> str:
    """ComfyUI's answer to a prompt that it does not take, in words."""
    lines = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in answer.get("node_errors", {}).values()
        for error in node["errors"]
    ]
    return "\n".join(lines) or answer["error"]["message"]


def failure(history: Mapping[str, Any]) -> str | None:
    """What ended a run before its end, in one line; None when nothing did."""
    messages = dict(history["status"]["messages"])
    if "execution_error" in messages:
        error = messages["execution_error"]
        return f"{error['node_type']}: {' '.join(error['exception_message'].split())}"
    return "the run was cancelled" if "execution_interrupted" in messages else None


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Prompt:
    """A workflow as the page saves it → the API's form, as the page sends it.

    Raises ValueError when it has what only the page resolves (bypassed nodes, subgraphs, reroutes), or a node that this
    ComfyUI has not.
    """
    out = {node["id"]: node["mode"] for node in workflow["nodes"] if node["mode"] in (MUTED, BYPASSED)}
    used = {link[1] for link in workflow["links"] if link[3] not in out}
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"] if link[1] not in out}
    prompt = {}
    for node in workflow["nodes"]:
        bypassed = out.get(node["id"]) == BYPASSED and node["id"] in used
        strange = node["type"] not in (*object_info, *NOTES) and node["id"] not in out
        if bypassed or strange:
            raise ValueError(
                f"{node.get('title', node['type'])!r} is bypassed, a subgraph, a reroute or no node of this ComfyUI: "
                "export the workflow from ComfyUI's page by Export (API), and use that."
            )
        if node["id"] in out or node["type"] in NOTES:
            continue
        parts = object_info[node["type"]]["input"].values()
        inputs = _widgets(node, {name for part in parts for name, about in part.items() if _is_seed(name, about)})
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] in links}
        known = {name for part in parts for name in part}
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {name: value for name, value in inputs.items() if name in known},
            "_meta": {"title": node.get("title", object_info[node["type"]]["display_name"])},
        }
    return prompt


def _is_seed(name: str, about: Sequence[Any]) -> bool:
    """Whether the page adds a widget to an input's own, which says what becomes of the value after a run."""
    options = about[-1] if isinstance(about[-1], Mapping) else {}
    if (told := options.get("control_after_generate")) is None:
        return about[0] == "INT" and name in ("seed", "noise_seed")
    return bool(told)


def _widgets(node: Mapping[str, Any], seeds: set[str]) -> dict[str, Any]:
    """The values of a saved node's widgets, by their inputs' names."""
    values = node.get("widgets_values") or []
    names = [slot["widget"]["name"] for slot in node["inputs"] if "widget" in slot]
    if isinstance(values, Mapping):  # as some packs save them
        return {name: values[name] for name in names if name in values}
    # Every widget has an input slot of its name, in the order of the values; what follows a seed, and an upload button,
    # is no input.
    rest, found = list(values), {}
    for name in names:
        found[name] = rest.pop(0)
        if name in seeds and rest and rest[0] in SEEDS:
            del rest[0]
    return found
