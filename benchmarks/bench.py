"""Measure this pack beside the same method done plainly, and beside the reference where there is one.

    python run.py bench [--config small|sd15] [--frames N] [--size PIXELS] [--device cpu|cuda] [--json FILE]

A is the pack, called as its nodes call it; B is `baseline.py`, with the same weights and inputs, and its results are
checked to be A's. Steps are taken in turn, A B A B …, so that whatever else the machine does meets both; with
OMP_NUM_THREADS=1 on a CPU the processor's seconds are counted, which other programs do not stretch. Prints the
README's table; exits with 1 when the results differ. `--growth` shows instead how time and memory of the pack's steps
grow with frames and with size; `--long` how they grow with frames where the clip is cut into windows.

The last columns are the pack's: operations counted, and the share of what this machine reaches in a large matrix
product and in a large copy. `--reference` names a checkout of the reference, and `--reference-python` the Python of an
environment that can run it: its own steps are then taken in turn with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Work, ceiling, distance, interleaved, peak, seconds

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from pack import load_pack

GIB = 2**30
# Largest relative difference of the two sides' latents, and losses: they round in another order.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (0.1, 1e-2)}
# Frames, size, and the window and its overlap; None is the configuration's own.
GROWTH = [*((frames, None, (0, 0)) for frames in (8, 16, 32, 64)), *((None, size, (0, 0)) for size in (256, 512, 768))]
LONG = [(frames, None, window) for window in ((8, 2), (16, 4)) for frames in (16, 32, 64)]

COLUMNS = ["pack", "baseline", "ratio", "pack, peak", "baseline, peak", "ratio", "TFLOP", "TFLOP/s", "of the product"]
COLUMNS += ["of the copy"]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    load_pack(cpu=options.device == "cpu")
    torch.manual_seed(0)
    bench = Bench(options)
    report: dict[str, Any] = bench.about
    print("; ".join(f"{name} {value}" for name, value in {**report["versions"], **report["machine"]}.items()))
    if options.growth:
        report["growth"] = bench.growth(GROWTH)
    elif options.long:
        report["long"] = bench.growth(LONG)
        print(*ratios(report["long"]), sep="\n")
    else:
        report |= bench.compare()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    if different := [kind for kind, figures in report.get("steps", {}).items() if not figures["equal"]]:
        print(f"bench: the two sides differ in {', '.join(different)}: the ratios mean nothing.")
        return 1
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="run.py bench", description="Measure the pack beside the method done plainly."
    )
    parser.add_argument("--config", choices=("small", "sd15"), help="the UNet (default: small, on a GPU sd15)")
    parser.add_argument("--frames", type=int, metavar="N", help="default: 8 for small, 24 for sd15")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: 256 for small, 512 for sd15")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a median, or more (default: 5, on a GPU 20)")
    parser.add_argument(
        "--job", type=int, metavar="N", help="tuning steps of a job (default: 12, on a GPU 300; 0: none)"
    )
    parser.add_argument("--growth", action="store_true", help="how time and memory grow, instead")
    parser.add_argument("--long", action="store_true", help="how they grow in windows, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to it")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="a checkout of the reference")
    parser.add_argument("--reference-python", default=sys.executable, metavar="EXE", help="what can run it")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.config = options.config or ("sd15" if gpu else "small")
    options.steps = options.steps or (20 if gpu else 5)
    options.job = options.job if options.job is not None else (300 if gpu else 12)
    return options


class Bench:
    """One run: what was asked for, on one machine."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.about = about(self.device)
        self.ceiling = {"flop": 1e12 * self.about["machine"]["TFLOP/s"], "moved": 1e9 * self.about["machine"]["GB/s"]}

    def sides(
        self, frames: int | None, size: int | None, window: tuple[int, int] = (0, 0)
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The pack, the baseline, and what they work on, described."""
        import sides

        config, vae, *default = sides.CONFIGS[self.options.config]
        frames, size = frames or default[0], size or default[1]
        theirs = sides.Baseline(config, vae, frames, size)
        theirs.to(self.device)
        case = {"config": self.options.config, "frames": frames, "size": size}
        return sides.Pack(theirs, config, window), theirs, case

    def compare(self) -> dict[str, Any]:
        from sides import INVERSION, KINDS, SAMPLING

        ours, theirs, case = self.sides(self.options.frames, self.options.size)
        dtype = ours.dtype
        steps: dict[str, Any] = {}
        start = None
        with self.reference(theirs, case) as ask:
            print(header(*COLUMNS, *(["reference"] if ask else [])), flush=True)
            for kind in KINDS:
                theirs.model.to(dtype if kind in (INVERSION, SAMPLING) else torch.float32)
                steps[kind], result = self.measure(kind, ours, theirs, start, ask)
                latents, loss = TOLERANCES[dtype]
                steps[kind]["equal"] = steps[kind]["difference"] <= (loss if "tuning" in kind else latents)
                start = result if kind == INVERSION else start
                print(row(kind, steps[kind]), flush=True)
        report: dict[str, Any] = {"case": case, "steps": steps}
        if tuning := self.options.job:
            length = max(1, tuning // 6)  # 300 and 50 are the paper's
            a, b = (seconds(self.device, lambda side=side: side.job(tuning, length)) for side in (ours, theirs))
            report["job"] = {"tuning": tuning, "ddim": length, "pack": a, "baseline": b, "ratio": a / b}
            print(f"| {tuning} tuning, {length} + {length} DDIM steps | {a:.1f} s | {b:.1f} s | {a / b:.2f} |")
        return report

    def measure(
        self, kind: str, ours: Any, theirs: Any, start: Any, ask: Callable[[str], float] | None
    ) -> tuple[dict[str, Any], Any]:
        """Everything about one kind of step, and the pack's result; `start`: noisy latents to sample from."""
        times, results = self.in_turn(kind, ours, theirs, start, ask)
        names = ("pack", "baseline", "reference")
        figures: dict[str, Any] = {
            name: {"seconds": own, "median": statistics.median(own)} for name, own in zip(names, times, strict=False)
        }
        a, b = figures["pack"], figures["baseline"]
        a |= self.work(ours, kind, start) | {"peak": self.peak_of_pack(ours, theirs, kind, start)}
        for name, most in self.ceiling.items():
            a[f"{name} share"] = a[name] / a["median"] / most
        b["peak"] = self.peak_of_baseline(ours, theirs, kind, start)
        figures |= {"ratio": a["median"] / b["median"], "peak ratio": a["peak"] / b["peak"]}
        figures["difference"] = distance(*results)
        return figures, results[0]

    def in_turn(
        self, kind: str, ours: Any, theirs: Any, start: Any, ask: Callable[[str], float] | None
    ) -> tuple[list[list[float]], list[Any]]:
        """Seconds of the steps of the pack, the baseline and the reference, and the results of the first two."""
        # diffusers rounds the stride, the pack each timestep: the same where the count divides a thousand.
        count = next(n for n in range(self.options.steps + 1, 1001) if 1000 % n == 0)
        plain = theirs.steps(kind, count, start)
        results: list[Any] = [None, None]

        def loop(between: Callable[..., None]) -> None:
            results[0] = ours.steps(kind, count, between, start)

        def plain_step() -> None:
            results[1] = next(plain)

        others = [lambda: seconds(self.device, plain_step), *([lambda: ask(kind)] if ask else [])]
        return interleaved(self.device, loop, *others), results

    def work(self, ours: Any, kind: str, start: Any) -> dict[str, int]:
        """Operations of one step of the pack, and the bytes that they read and write."""
        counts = []
        with Work() as counter:
            ours.steps(kind, 2, lambda *_args: counts.append((counter.flop, counter.moved)), start)
        flop, moved = (after - before for before, after in zip(*counts, strict=True))
        return {"flop": flop, "moved": moved}

    def peak_of_pack(self, ours: Any, theirs: Any, kind: str, start: Any) -> int:
        theirs.to(torch.device("cpu"))
        most = peak(self.device, lambda: ours.steps(kind, 2, lambda *_args: None, start))
        theirs.to(self.device)
        return most + (ours.weights(kind) if self.device.type == "cpu" else 0)

    def peak_of_baseline(self, ours: Any, theirs: Any, kind: str, start: Any) -> int:
        ours.unload(self.device)
        steps = theirs.steps(kind, 2, start)  # what is inverted was encoded here
        most = peak(self.device, lambda: list(steps))
        return most + (theirs.weights(kind) if self.device.type == "cpu" else 0)

    def growth(self, cases: list[Any]) -> list[dict[str, Any]]:
        """Of the pack's guided sampling and fast tuning step, with frames, size or window."""
        from sides import FAST, INVERSION, SAMPLING

        points = []
        print(header("frames", "size", "window", "TFLOP", "time", "s / TFLOP", "peak"))
        for frames, size, window in cases:
            ours, theirs, case = self.sides(frames or self.options.frames, size or self.options.size, window)
            case["window"] = window[0]
            start = ours.steps(INVERSION, 1, lambda *_args: None)
            for kind in (SAMPLING, FAST):
                (times,) = interleaved(self.device, partial(ours.steps, kind, 4, start=start))
                point = {**case, "kind": kind, "median": statistics.median(times), **self.work(ours, kind, start)}
                point["peak"] = self.peak_of_pack(ours, theirs, kind, start)
                points.append(point)
                work = point["flop"] / 1e12
                cells = [kind, case["frames"], case["size"], case["window"], f"{work:.3f}", f"{point['median']:.3f} s"]
                print(line(*cells, f"{point['median'] / work:.1f}", f"{point['peak'] / GIB:.2f} GiB"), flush=True)
        return points

    @contextmanager
    def reference(self, theirs: Any, case: dict[str, Any]) -> Iterator[Callable[[str], float] | None]:
        """What has the reference take a step of a kind, and returns its seconds; None without a checkout."""
        if self.options.reference is None:
            yield None
            return
        setting = {**case, "device": self.device.type, "vae": theirs.vae_config, "config": theirs.config}
        command = [self.options.reference_python, str(Path(__file__).with_name("reference_steps.py"))]
        command += [str(self.options.reference.resolve()), json.dumps(setting)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None and stdout is not None

            def ask(kind: str) -> float:
                print(kind, file=stdin, flush=True)
                if not (answer := stdout.readline()):
                    raise SystemExit("bench: the reference ended by itself; its messages above say why.")
                return float(answer)

            try:
                yield ask
            finally:
                stdin.close()


def about(device: torch.device) -> dict[str, Any]:
    """Versions, and the machine with what it reaches."""
    import comfyui_version
    import diffusers

    product, copy = ceiling(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions["ComfyUI"] = comfyui_version.__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine: dict[str, Any] = {"device": name, "threads": torch.get_num_threads(), "processors": os.cpu_count()}
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 1)
    machine |= {"TFLOP/s": round(product / 1e12, 3), "GB/s": round(copy / 1e9, 1)}
    return {"versions": versions, "machine": machine}


def line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def ratios(points: list[dict[str, Any]]) -> Iterator[str]:
    """Of each kind of step and window: time and peak of the longest clip to those of the shortest."""
    for kind, window in dict.fromkeys((point["kind"], point["window"]) for point in points):
        first, *_, last = (point for point in points if (point["kind"], point["window"]) == (kind, window))
        time, peak = (last[figure] / first[figure] for figure in ("median", "peak"))
        frames = f"{last['frames']} / {first['frames']} frames"
        yield f"{kind}, window {window}, {frames}: time {time:.2f}, peak {peak:.2f}"


def header(*cells: str) -> str:
    return f"{line('', *cells)}\n{'|---' * (1 + len(cells))}|"


def row(kind: str, figures: dict[str, Any]) -> str:
    a, b = figures["pack"], figures["baseline"]
    cells = [f"{side['median']:.3f} s" for side in (a, b)] + [f"{figures['ratio']:.2f}"]
    cells += [f"{side['peak'] / GIB:.2f} GiB" for side in (a, b)] + [f"{figures['peak ratio']:.2f}"]
    cells += [f"{a['flop'] / 1e12:.3f}", f"{a['flop'] / 1e12 / a['median']:.3f}"]
    cells += [f"{100 * a[share]:.0f} %" for share in ("flop share", "moved share")]
    if "reference" in figures:
        cells.append(f"{figures['reference']['median']:.3f} s")
    return line(kind, *cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
