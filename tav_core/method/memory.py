"""How much memory one training step needs, found out before the first one, and the plan that fits.

The step is run on fake tensors: torch's own bookkeeping of shapes and lifetimes without any data, so the figure
follows the real network, whatever its widths and depths, and costs a second or two. It counts tensors;
`HEADROOM` is for what it cannot see.
"""

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .inflation import RECOMPUTE
from .windows import LEAST

Memory = Literal["auto", "fast", "low"]
MEMORY: tuple[str, ...] = get_args(Memory)

HEADROOM = 1.1  # the allocator's rounding and gaps, and the workspaces of convolutions
GIB = 2**30
WORKSPACE = 4 * 32 * 2**20  # of cuBLAS on a large card, for the forward and the backward pass, as it is and recorded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step.

    Attributes:
        weights: frozen and trained.
        states: AdamW's two moments of what is trained.
        kept: activations that wait for the backward pass.
        block: what the largest block needs beside them while it is computed or recomputed, and the gradients so far.
    """

    weights: int
    states: int
    kept: int
    block: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.kept + self.block

    def __str__(self) -> str:
        parts = ("weights", self.weights), ("optimizer", self.states), ("activations", self.kept), ("block", self.block)
        return f"{_gib(self.total)} ({', '.join(f'{name} {_gib(size)}' for name, size in parts)})"


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and still alive: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:  # a view
            return

        def died(_reference: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def estimate(modules: Sequence[nn.Module], forward: Callable[[], Tensor], on_gpu: bool) -> Estimate:
    """Peak memory of a training step with AdamW.

    Args:
        modules: the network, on the meta device; it is used up by this.
        forward: computes a loss from tensors that it makes itself on the CPU (they will be fake).
        on_gpu: AdamW updates all tensors at once, and products have a workspace.
    """
    # Imported here: it brings in half of torch's compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode

    live = Live()
    with FakeTensorMode(), live:
        trained = [p for p in _materialised(modules) if p.requires_grad]
        weights = live.now
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        states = live.now - weights
        loss = forward()
        kept = max(live.now - weights - states, 0)
        loss.backward()
        # The update: gradients, the two moments, and on a CPU square roots of one tensor after the other.
        sizes = [p.numel() * p.element_size() for p in trained]
        update = weights + states + sum(sizes) + (0 if on_gpu else 2 * max(sizes))
        del moments
    peak = max(live.peak, update) + (WORKSPACE if on_gpu else 0)
    return Estimate(weights, states, kept, peak - weights - states - kept)


def _materialised(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Replace parameters on the meta device by ones on the CPU, in place; these."""
    parameters = []
    for part in (part for module in modules for part in module.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                own = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                part._parameters[name] = own
                parameters.append(own)
    return parameters


def plan(memory: str, estimate: Callable[[str], Estimate], free: int, frames: int, width: int, height: int) -> str:
    """What a step recomputes: as little as `memory` allows and as fits.

    Args:
        memory: "auto" takes the fastest that fits, "fast" recomputes nothing, "low" all.
        estimate: of a step that recomputes one of `inflation.RECOMPUTE`.
        free: bytes.
        width, height: of the clip, in pixels.

    Raises MemoryError when nothing fits; it says by how much, and what would.
    """
    for recompute in {"auto": RECOMPUTE, "fast": RECOMPUTE[:1], "low": RECOMPUTE[-1:]}[memory]:
        need = estimate(recompute)
        log.info("Tune-A-Video: a step that recomputes %s needs %s; %s is free", recompute, need, _gib(free))
        if need.total * HEADROOM <= free:
            return recompute
    low = need if memory != "fast" else estimate(RECOMPUTE[-1])
    raise MemoryError(
        f"tuning {frames} frames of {width}x{height} needs {_gib(need.total * HEADROOM)}, {_gib(free)} is free. "
        f"{_what_fits(memory, low, free, frames, width, height)}"
    )


def _what_fits(memory: str, low: Estimate, free: int, frames: int, width: int, height: int) -> str:
    if memory == "fast" and low.total * HEADROOM <= free:
        return f"Set memory to low or auto: low needs {_gib(low.total * HEADROOM)}."
    fixed = low.weights + low.states + low.states // 2  # gradients are as large as one moment
    share = (free / HEADROOM - fixed) / (low.total - fixed)  # activations grow with frames and with pixels
    ways = []
    if (fewer := math.floor(frames * share)) >= 2:
        ways.append(f"{fewer} frames")
    if share > 0:
        smaller = [math.floor(side * math.sqrt(share) / 64) * 64 for side in (width, height)]
        if min(smaller) >= 64:
            ways.append(f"a size of {smaller[0]}x{smaller[1]}")
    change = " or ".join(ways) + (f", or set window to {fewer} in Inflate UNet" if fewer >= LEAST else "")
    setting = "Set memory to low and use" if memory == "fast" else "Use"
    return f"{setting} {change}." if ways else "No clip fits: close what else uses this device, or use a smaller model."


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
