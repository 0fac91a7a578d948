"""Whether ComfyUI, and torch, have what this pack uses of them: looked up once, when the pack is loaded."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from .symbols import TORCH, TRIED

SHOWN = 3  # names in a message: where a host was rebuilt, a list of dozens helps nobody

log = logging.getLogger(__name__)


def found(owner: str) -> Any:
    """A module, or "module:name" of one; None where it is missing."""
    module, _, name = owner.partition(":")
    with suppress(Exception):  # whatever the host's own code raises
        here = importlib.import_module(module)
        return getattr(here, name) if name else here


def lost(needs: Mapping[str, str]) -> list[str]:
    """The names that are missing. A parameter of another name is no reason to refuse: the log warns of it.

    Args:
        needs: names used of each module or class ("module:Class"), functions with the parameters that are passed:
            "clone() add_patches(patches, strength_patch) load_device". Other names of a class are its instances'.
    """
    gone = []
    for owner, members in needs.items():
        try:
            importlib.import_module(module := owner.partition(":")[0])
        except Exception as error:
            gone.append(f"{module} ({' '.join(str(error).split())})")
            continue
        dotted, here = owner.replace(":", "."), found(owner)
        if here is None:
            gone.append(dotted)
            continue
        for name, call in re.findall(r"(\w+)(\(.*?\))?", members):
            if not hasattr(here, name) and (call or not _mentions(here, name)):
                gone.append(f"{dotted}.{name}")
            elif other := set(re.findall(r"\w+", call)) - _parameters(getattr(here, name, None)):
                names = ", ".join(sorted(other))
                log.warning(
                    f"Tune-A-Video: {dotted}.{name} of ComfyUI {host_version()} has no parameter {names}. "
                    "If a node fails for it, update Tune-A-Video."
                )
    return gone


def refusal(lost: Iterable[str]) -> str | None:
    """Why a node cannot run without these names, and what to do, in one line; None when none is missing."""
    gone = list(dict.fromkeys(lost))
    if not gone:
        return None
    if all(name.startswith("torch.") for name in gone):
        return (
            f"torch {torch.__version__} is too old for this node, which needs torch {TORCH} or newer: update the "
            "torch of ComfyUI's Python."
        )
    more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
    return (
        f"ComfyUI {host_version()} does not fit this version of Tune-A-Video: it lacks "
        f"{', '.join(gone[:SHOWN])}{more}, which this node needs. This version was tried on {' and '.join(TRIED)}: "
        "use one of these, or update Tune-A-Video."
    )


def host_version() -> str:
    return getattr(found("comfyui_version"), "__version__", "of an unknown version")


def _mentions(kind: Any, name: str) -> bool:
    """Whether instances of a class can be taken to have an attribute: the code of the class mentions it."""
    values = (value for base in getattr(kind, "__mro__", ()) for value in vars(base).values())
    return any(name in value.__code__.co_names for value in values if inspect.isfunction(value))


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # no longer a function of Python's
        return set()
