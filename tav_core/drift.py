"""Whether ComfyUI still is what this pack was written for: looked up once, when the pack is loaded."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

SHOWN = 3  # changes that a message names: where a host was rebuilt, a list of dozens helps nobody


@dataclass(frozen=True)
class Symbol:
    """Something of the host that this pack uses. How it is called is written as Python writes parameters: those
    before "/" by position, the others by name; "" is a call without arguments, None is none.

    Attributes:
        name: `module:name`, or `module:Class.attribute`.
        why: what for, to follow "used".
        call: how it is called.
        methods: how each method of its instances is called.
        attributes: what its instances have.
        where_loaded: used only where the host itself has imported the module.
    """

    name: str
    why: str
    call: str | None = None
    methods: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    where_loaded: bool = False


def drift(symbols: Iterable[Symbol], tried: str) -> str | None:
    """None when the host has all of them, else one line: which version of it lacks what, and what to do."""
    changes = list(dict.fromkeys(change for symbol in symbols for change in _changes(symbol)))
    if not changes:
        return None
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return (
        f"ComfyUI {host_version()} does not fit this version of Tune-A-Video: {'; '.join(changes[:SHOWN])}{more}. "
        f"Update Tune-A-Video, or use a ComfyUI that it was tried on: {tried}."
    )


def host_version() -> str:
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of an unknown version"


def _changes(symbol: Symbol) -> Iterator[str]:
    """What is missing of a symbol, or called otherwise, each in words."""
    module, _, path = symbol.name.partition(":")
    name = f"{module}.{path}"
    if symbol.where_loaded and module not in sys.modules:
        return
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the host's own code raises
        reason = " ".join(str(error).split())
        yield f"its {module} cannot be imported ({type(error).__name__}: {reason})"
        return
    *classes, last = path.split(".")
    owner = reduce(lambda outer, inner: getattr(outer, inner, None), classes, found)
    # A class's own: without it, V_PREDICTION.calculate_denoised would be that of EPS.
    if not hasattr(owner, last) or (isinstance(owner, type) and last not in vars(owner)):
        yield f"it has no {name} (used {symbol.why})"
        return
    found = getattr(owner, last)
    if symbol.call is not None and (reason := _misfit(found, symbol.call)):
        yield f"its {name} {reason} (used {symbol.why})"
    for method, call in symbol.methods.items():
        function = getattr(found, method, None)
        if function is None:
            yield f"it has no {name}.{method} (used {symbol.why})"
        elif reason := _misfit(function, call, "self"):
            yield f"its {name}.{method} {reason} (used {symbol.why})"
    for attribute in symbol.attributes:
        if not _mentions(found, attribute):
            yield f"its {name} has no attribute {attribute} (used {symbol.why})"


def _misfit(function: Callable[..., Any], call: str, *before: str) -> str | None:
    """Why a function cannot be called so, after the arguments `before`, or None."""
    positional, named = ([*part.replace(",", " ").split()] for part in call.rpartition("/")[::2])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        return f"cannot be called ({error})"
    names = list(signature.parameters)[len(before) :]
    # By name, those by position too: with one of them gone, the next would take its value.
    if lost := [name for name in [*positional, *named] if name not in names]:
        return f"has no parameter {lost[0]}"
    if names[: len(positional)] != positional:
        return "takes its parameters in another order"
    try:
        signature.bind(*before, *positional, **dict.fromkeys(named))
    except TypeError as error:
        return f"cannot be called as it was ({error})"
    return None


def _mentions(kind: Any, attribute: str) -> bool:
    """Whether instances of a class can be taken to have an attribute: the class has it, or its code mentions it."""
    if not isinstance(kind, type):
        return False
    package = kind.__module__.partition(".")[0]
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != package:
            continue
        functions = (inspect.unwrap(value) for value in vars(base).values() if inspect.isfunction(value))
        if attribute in vars(base) or any(attribute in function.__code__.co_names for function in functions):
            return True
    return False
