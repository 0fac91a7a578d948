"""A name for a value by what it holds: the same in every process, another for every other value."""

import functools
import hashlib
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CODE = ("co_code", "co_exceptiontable", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars")
PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def digest(value: Any) -> str:
    """SHA-256, as hex, of tensors, numbers, texts, functions and model patches in mappings and sequences.

    Tensors are read whole, wherever they are: gigabytes take seconds. What cannot be told from others of its kind
    makes another digest each time: two values that may compute different things never share one.
    """
    result = hashlib.sha256()
    functions: list[types.FunctionType] = []  # those added so far: they may name themselves and each other

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            result.update(f"{part.dtype}{tuple(part.shape)}".encode())
            # Cloned: an inference tensor that was cast outside of inference mode cannot be viewed.
            own = part.detach().cpu().clone(memory_format=torch.contiguous_format)
            result.update(own.flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, PLAIN):
            result.update(f"{part!r};".encode(errors="backslashreplace"))
        elif isinstance(part, Sequence):
            result.update(f"{len(part)}:".encode())
            for entry in part:
                add(entry)
        elif isinstance(part, types.FunctionType) and part in functions:
            result.update(f"function {functions.index(part)};".encode())
        else:
            if isinstance(part, types.FunctionType):
                functions.append(part)
            result.update(f"{type(part).__name__} ".encode())
            add(_held(part))

    add(value)
    return result.hexdigest()


def _held(part: Any) -> Any:
    """What tells an object from others of its type, as a value that `digest` knows."""
    if isinstance(part, Mapping):
        return sorted(part.items(), key=lambda item: str(item[0]))
    if isinstance(part, Set):
        return sorted(map(digest, part))
    if isinstance(part, types.ModuleType):
        return part.__name__
    if isinstance(part, functools.partial):
        return part.func, part.args, part.keywords
    if isinstance(part, types.MethodType):
        return part.__self__, part.__func__
    if isinstance(part, types.CodeType):
        return [getattr(part, name) for name in CODE if hasattr(part, name)]
    if isinstance(part, types.FunctionType):
        empty = types.CellType()
        cells = [cell.cell_contents for cell in part.__closure__ or () if cell != empty]
        named = [part.__globals__[name] for name in _names(part.__code__) if name in part.__globals__]
        return part.__code__, part.__defaults__, part.__kwdefaults__, vars(part), cells, named
    if isinstance(part, types.BuiltinFunctionType):
        return part.__module__, part.__self__, part.__name__
    if isinstance(part, type) and _importable(part):
        return part.__module__, part.__qualname__
    if hasattr(part, "weights") and _importable(type(part)):  # an adapter: LoRA, LoHa, …
        return type(part), vars(part)
    log.warning("Tune-A-Video: a %s cannot be told from others: what holds it is never found again", type(part))
    return os.urandom(16)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function's code, and that of the functions in it, may look up globally."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _importable(part: type) -> bool:
    """Whether a class is what its name says, and no other of the same name."""
    found = sys.modules.get(part.__module__)
    for name in part.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is part
