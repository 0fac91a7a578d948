"""A name for a value by what it holds: the same in every process, another for every other value."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256, as hex, of tensors, numbers, texts and model patches in mappings and sequences.

    Tensors are read whole, wherever they are: gigabytes take seconds.
    """
    result = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            result.update(f"{part.dtype}{tuple(part.shape)}".encode())
            # Cloned: an inference tensor that was cast outside of inference mode cannot be viewed.
            own = part.detach().cpu().clone(memory_format=torch.contiguous_format)
            result.update(own.flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            add(sorted(part.items()))
        elif isinstance(part, Sequence) and not isinstance(part, str):
            result.update(f"{len(part)}:".encode())
            for entry in part:
                add(entry)
        elif (weights := getattr(part, "weights", None)) is not None:  # an adapter: LoRA, LoHa, …
            add((type(part).__name__, weights))
        else:
            result.update(f"{part.__qualname__ if callable(part) else repr(part)};".encode())

    add(value)
    return result.hexdigest()
