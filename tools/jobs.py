"""The jobs of a batch: one workflow, and what each job changes in it.

A jobs file is YAML, or a CSV table with the workflow named beside it:

    workflow: my_workflow.json          # as ComfyUI's page saves it, or exports it for the API
    names:                              # optional: short names for inputs, one name for several
      clip: Load Video.file             # node title, a dot, the input's name
      steps: [DDIM Invert.steps, Sample Video.steps]
    set: {steps: 50}                    # the same in every job
    rows:                               # a job a row
      - {clip: skiing.mp4, caption.text: a man is skiing}
    cross:                              # every row with every combination of these
      edit.text: [spider man is skiing, a bear is skiing]

Files are looked for beside the jobs file, and uploaded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from .api import Graph, Prompt, content, to_api

KEYS = {"workflow", "names", "set", "rows", "cross"}
TUNE = "TAVOneShotTune"
SHOWN = 5  # of a list of choices in a message

Values = dict[str, Any]
Info = Mapping[str, Any]  # the server's /object_info


class Wrong(ValueError):
    """What is wrong with a jobs file, a line each."""

    def __init__(self, lines: Iterable[str]):
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class Job:
    """One run of the workflow.

    Attributes:
        id: sixteen digits that say what is computed: the prompt, and what its files hold.
        values: what the jobs file says of it, by name.
        tune: the same for jobs that share a tune.
        files: (node's id, input) of what is to be uploaded.
    """

    id: str
    values: Values
    tune: str
    files: dict[tuple[str, str], Path]


@dataclass(frozen=True)
class Plan:
    """A jobs file that was read: the workflow as its file has it, and what each job sets."""

    folder: Path
    workflow: dict[str, Any]
    names: dict[str, list[str]]
    rows: list[Values]

    def prompt(self, values: Values, info: Info) -> tuple[Prompt, dict[tuple[str, str], Path]]:
        """The prompt of a job in the API's form, with files by their names here, and where these are.

        Raises ValueError, with a line for each node or input that the workflow has not.
        """
        graph = Graph(deepcopy(self._api(info)))
        files, wrong = {}, []
        given: dict[tuple[str, str], str] = {}
        for name, value in values.items():
            for target in self.names.get(name, [name]):
                title, dot, key = str(target).rpartition(".")
                try:
                    if not dot:
                        raise ValueError(f"{target!r} is no input: write the node's title, a dot and the input's name.")
                    number = graph.set(title, **{key: value})
                    if (other := given.setdefault((number, key), name)) != name:
                        raise ValueError(f"{other!r} and {name!r} both set {key!r} of {title!r}: leave one out.")
                except ValueError as error:
                    wrong.append(str(error))
                    continue
                about = _input(info, graph.prompt[number]["class_type"], key)
                graph.prompt[number]["inputs"][key] = _meant(about, value)
                if (
                    isinstance(value, str)
                    and about is not None
                    and _is_upload(about)
                    and (self.folder / value).is_file()
                ):
                    files[number, key] = self.folder / value
        if wrong:
            raise Wrong(wrong)
        return graph.prompt, files

    def _api(self, info: Info) -> Prompt:
        return to_api(self.workflow, info) if "nodes" in self.workflow else self.workflow

    def jobs(self, info: Info) -> list[Job]:
        """All jobs, each once. Raises Wrong with all that no server of this kind could run, a line each."""
        jobs: dict[str, Job] = {}
        wrong: Counter[str] = Counter()
        for values in self.rows:
            try:
                prompt, files = self.prompt(values, info)
            except ValueError as error:
                wrong.update(str(error).splitlines())
                continue
            wrong.update(faults(prompt, files, info))
            job = Job(_digest(prompt, files), values, _tune(prompt, files), files)
            jobs.setdefault(job.id, job)
        if wrong:
            raise Wrong(f"{line} ({count} of {len(self.rows)} jobs)" for line, count in wrong.items())
        return list(jobs.values())


# --- reading ----------------------------------------------------------------------------------------------------


def read(file: Path, workflow: Path | None = None) -> Plan:
    """Read a jobs file; `workflow` is for a table, which names none. Raises Wrong when it is none."""
    wrong: list[str] = []
    told: Any
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise Wrong([f"{file.name} is not in UTF-8: save it so, from a spreadsheet as CSV UTF-8."]) from None
    if file.suffix.lower() == ".csv":
        told = {"rows": _table(file.name, text)}
    else:
        try:
            told = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise Wrong([f"{file.name} is no YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(told, dict):
        raise Wrong([f"{file.name} holds no jobs: it needs workflow, and rows or cross."])
    if unknown := told.keys() - KEYS:
        wrong.append(f"{file.name} has {', '.join(sorted(map(str, unknown)))}; known are {', '.join(sorted(KEYS))}.")
    for key, kind in (("names", dict), ("set", dict), ("rows", list), ("cross", dict)):
        if not isinstance(told.get(key) or kind(), kind):
            wrong.append(f"{key} must be a {'list' if kind is list else 'table'}.")
    rows, cross = told.get("rows") or [{}], told.get("cross") or {}
    if not wrong:
        wrong += [f"row {i} is no table of inputs and values." for i, row in enumerate(rows, 1) if not _is_row(row)]
        wrong += [
            f"cross: {name} must be a list of values." for name, ways in cross.items() if not isinstance(ways, list)
        ]
    if workflow is None and not isinstance(told.get("workflow"), str):
        wrong.append("no workflow is named: write workflow: FILE into the jobs file, or give --workflow.")
    path = workflow or file.parent / str(told.get("workflow"))
    if not wrong and not path.is_file():
        wrong.append(f"there is no workflow {path}.")
    if wrong:
        raise Wrong(wrong)
    names = {
        str(name): targets if isinstance(targets, list) else [targets]
        for name, targets in (told.get("names") or {}).items()
    }
    ways = [dict(zip(cross, chosen, strict=True)) for chosen in product(*cross.values())]
    everywhere = told.get("set") or {}
    return Plan(file.parent, _workflow(path), names, [everywhere | row | way for row in rows for way in ways])


def _table(name: str, text: str) -> list[Any]:
    table = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = list(table)
    except csv.Error as error:
        raise Wrong([f"{name} is no CSV table: {error}"]) from None
    if twice := [head for head, count in Counter(table.fieldnames or ()).items() if count > 1]:
        raise Wrong([f"{name} has two columns {head!r}: leave one out." for head in twice])
    return rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and None not in row and None not in row.values()  # csv's for too many or few cells


def _workflow(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        return found
    try:
        return Graph.read(path).prompt
    except ValueError as error:
        raise Wrong([str(error)]) from None


# --- what a job is ------------------------------------------------------------------------------------------------


def _digest(prompt: Prompt, files: Mapping[tuple[str, str], Path], nodes: Iterable[str] | None = None) -> str:
    """Sixteen digits that say what nodes compute: by their inputs, and by what files hold, whatever they are called."""
    told = {}
    for number in prompt if nodes is None else nodes:
        inputs = {
            key: f"sha256:{content(files[number, key])}" if (number, key) in files else value
            for key, value in prompt[number]["inputs"].items()
        }
        told[number] = [prompt[number]["class_type"], inputs]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tune(prompt: Prompt, files: Mapping[tuple[str, str], Path]) -> str:
    """What tells a job's tune from others: all that One-Shot Tune is made of. Without one, the job itself."""
    todo = [number for number, node in prompt.items() if node["class_type"] == TUNE]
    seen: set[str] = set()
    while todo:
        if (number := todo.pop()) in seen or number not in prompt:
            continue
        seen.add(number)
        node = prompt[number]
        # Previews change no result, and one may well show the edit's own prompt.
        links = [
            v for k, v in node["inputs"].items() if not (node["class_type"] == TUNE and k.startswith("validation_"))
        ]
        todo += [str(link[0]) for link in links if _is_link(link)]
    return _digest(prompt, files, sorted(seen) or None)


# --- validation ---------------------------------------------------------------------------------------------------


def faults(prompt: Prompt, files: Mapping[tuple[str, str], Path], info: Info) -> Iterator[str]:
    """What the server's own node list says against a prompt, a line each."""
    graph = Graph(prompt)
    for number, node in prompt.items():
        title, kind = graph.title(number), node["class_type"]
        if kind not in info:
            yield f"{title}: ComfyUI has no node {kind}."
            continue
        for name in info[kind]["input"].get("required", {}):
            if name not in node["inputs"]:
                yield f"{title}: {name} is missing."
        for name, value in node["inputs"].items():
            about = _input(info, kind, name)
            if _is_link(value):
                if str(value[0]) not in prompt:
                    yield f"{title}: {name} leads to node {value[0]}, which is not there."
            elif (number, name) not in files and (fault := _fault(about or [None], value)):
                yield f"{title}: {name} {fault}"


def _fault(about: list[Any], value: Any) -> str | None:
    """What is wrong with a value for an input, as the server describes it."""
    kind: Any = about[0]
    options = about[1] if len(about) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if isinstance(choices, list) and not isinstance(value, list) and value not in choices:
        if _is_upload(about):
            return f"is {value!r}: there is no such file beside the jobs file, nor in ComfyUI's input folder."
        shown = ", ".join(map(str, choices[:SHOWN])) + (
            f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else ""
        )
        return f"is {value!r}, but ComfyUI has {shown or 'none'}."
    if kind in ("INT", "FLOAT"):
        number = _number(kind, value)
        if number is None:
            return f"is {value!r}, which is no {'whole ' * (kind == 'INT')}number."
        low, high = options.get("min"), options.get("max")
        if (low is not None and number < low) or (high is not None and number > high):
            return f"is {value}, but must be from {low} to {high}."
    if kind == "BOOLEAN" and not isinstance(value, bool):
        return f"is {value!r}, but must be true or false."
    if kind == "STRING" and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        return f"is {value}, which is no text: write it in quotes."
    try:
        json.dumps(value)
    except TypeError:  # YAML's dates, for one
        return f"is {value}, which cannot be sent: write it in quotes."
    return None


def _number(kind: str, value: Any) -> int | float | None:
    """What ComfyUI makes of a value for an INT or a FLOAT; None where that is no number, or another."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    with suppress(ValueError, OverflowError):
        number = int(value) if kind == "INT" else float(value)
        same = kind == "FLOAT" or isinstance(value, str) or number == value
        return number if same and isfinite(number) else None
    return None


def _meant(about: list[Any] | None, value: Any) -> Any:
    """A value as it is meant: a table's cell is text, and ComfyUI takes any text for true."""
    if about and about[0] == "BOOLEAN" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)  # spreadsheets write them in capitals
    return value


def _input(info: Info, kind: str, name: str) -> list[Any] | None:
    """What the server says of an input: its type, and options."""
    parts = info.get(kind, {}).get("input", {})
    return next((part[name] for part in parts.values() if isinstance(part, dict) and name in part), None)


def _is_upload(about: list[Any]) -> bool:
    return len(about) > 1 and any(key.endswith("_upload") and on for key, on in about[1].items())


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
