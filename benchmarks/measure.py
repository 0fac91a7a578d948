"""What a step takes: seconds, side by side with other steps; bytes at the peak; operations, and bytes they move.

And how far its result is from another's."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Loop = Callable[[Callable[..., None]], Any]  # takes steps, and calls what it is given after each of them


def interleaved(device: torch.device, loop: Loop, *others: Callable[[], float]) -> list[list[float]]:
    """Seconds of each step of `loop`, and what each of the `others`, called after it, says that it took.

    The first of all are left out.
    """
    times: list[list[float]] = [[] for _ in range(1 + len(others))]
    start = None

    def between(*_args: Any) -> None:
        nonlocal start
        synchronize(device)
        if start is not None:
            times[0].append(clock(device) - start)
        for step, own in zip(others, times[1:], strict=True):
            own.append(step())
        start = clock(device)

    loop(between)
    return [times[0], *(own[1:] for own in times[1:])]


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    start = clock(device)
    call()
    synchronize(device)
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Seconds of this process where it computes with one thread, which a busy machine does not stretch, else of the
    world."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, call: Callable[[], Any]) -> int:
    """Bytes at the peak: on a GPU of all that is there; on the CPU of what `call` allocates, by torch's record."""
    gc.collect()  # what others left would be counted as freed by the call
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = most = 0
    results: Any = record.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def ceiling(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine reaches: operations a second of a large matrix product, bytes a second of a large copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    product = min(seconds(device, lambda: a @ b) for _ in range(6))
    copy = min(seconds(device, lambda: target.copy_(source)) for _ in range(6))
    return 2 * side**3 / product, 2 * size / copy


def distance(ours: Any, theirs: Any) -> float:
    """Relative L2 distance of tensors, or of tuples of numbers, in float64."""
    a, b = (torch.as_tensor(result).cpu().double() for result in (ours, theirs))
    return float((a - b).norm() / b.norm())


class Work(TorchDispatchMode):
    """Counts floating-point operations of products, convolutions and attention (`flop`), and the bytes of all
    tensors that all operations read and write (`moved`)."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if func.namespace == "prim":  # a question, such as for the device
            return func(*args, **kwargs)
        if packet not in COUNTS:
            with self:  # in inference mode some operations arrive as a whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in COUNTS:
            self.flop += COUNTS[packet](*args, **kwargs, out_val=out)
        view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not view and "empty" not in packet.__name__:
            tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return out


def _attention(q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# torch counts a GPU's attention, not the CPU's.
COUNTS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
