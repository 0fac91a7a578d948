"""Measure `run.py batch` on the demo's model: one worker beside two, and two that are killed again and again.

    python benchmarks/batches.py --out FOLDER [--jobs 24] [--kills 20]

A worker is the command itself, with a ComfyUI that it starts, on a processor of its own. Three batches of the same
jobs: by one worker, by two, and by two of which a driver, or its ComfyUI, is killed at random moments, every third time
while a result is written, and the command given again. The table of the last must be that of the first, byte by byte of
each result, with no file more; exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sqlite3
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parent.parent
CLIPS = [("red car", "beach"), ("boat", "water"), ("dog", "grass"), ("penguin", "snow")]
EDITS = ["a cat on the grass", "a boat in the desert", "pencil sketch"]
VARYING = {"seconds", "worker", "attempt"}


def write_jobs(folder: Path, count: int) -> Path:
    """A jobs file of so many short jobs, three to a tune."""
    rows = [
        f'  - {{object: {thing}, place: {place}, seed: {number}, edit: "{edit}"}}'
        for number in range(count)
        for thing, place in CLIPS
        for edit in EDITS
    ][:count]
    file = folder / "jobs.yaml"
    file.write_text(
        f"workflow: {(PROJECT / 'tools' / 'batch_example.json').as_posix()}\n"
        "names: {object: Demo Clip.object, place: Demo Clip.background, seed: Demo Clip.seed, "
        '"edit": "edit: what you want to see.text", ddim: [DDIM Invert.steps, Sample Video.steps]}\n'
        "set: {One-Shot Tune.steps: 20, ddim: 10}\nrows:\n" + "\n".join(rows) + "\n",
        encoding="utf-8",
    )
    return file


class Worker:
    """The command, on one processor."""

    def __init__(self, file: Path, out: Path, processor: int, keep: int = 20):
        """`keep`: saved tunes that may be found again."""
        self.file, self.out, self.processor, self.keep = file, out, processor, keep
        self.driver_seconds = 0.0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(PROJECT / "run.py"), "batch", str(self.file), "--out", str(self.out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TAV_KEEP_RUNS": str(self.keep)}
        with (self.out.parent / f"{self.out.name}.log").open("a", encoding="utf-8") as log:
            self.process = psutil.Popen([*command, "--tries", "50"], stdout=log, stderr=log, env=environment)
        if hasattr(self.process, "cpu_affinity"):
            self.process.cpu_affinity([self.processor])

    def find(self, word: str) -> Any:
        """Its process that runs a program or module of this name; None where there is none."""
        with suppress(psutil.Error):
            for process in self.process.children(recursive=True):
                with suppress(psutil.Error):
                    if any(part.endswith(word) for part in process.cmdline()):
                        return process
        return None

    def running(self) -> bool:
        """Whether it has not ended; notes what its driver took."""
        if driver := self.find("tools.batch"):
            with suppress(psutil.Error):
                times = driver.cpu_times()
                self.driver_seconds = max(self.driver_seconds, times.user + times.system)
        return self.process.poll() is None


def run(file: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds from the first job's start to the end, and the drivers' processor seconds."""
    team = [Worker(file, out, number, keep=1) for number in range(workers)]  # none but its own
    while not (out / "jobs.sqlite").exists() and any(worker.running() for worker in team):
        time.sleep(0.1)
    begin = time.monotonic()
    while any([worker.running() for worker in team]):
        time.sleep(0.2)
    if codes := [code for worker in team if (code := worker.process.returncode)]:
        raise SystemExit(f"batches: a worker ended with {codes}: see {out}.log")
    return time.monotonic() - begin, sum(worker.driver_seconds for worker in team)


def killed(file: Path, out: Path, kills: int, jobs: int) -> dict[str, int]:
    """Two workers that are killed so many times, if their jobs last so long; how often what was killed."""
    random = Random(7)
    done: dict[str, int] = dict.fromkeys(("driver", "ComfyUI", "driver while it writes"), 0)
    team = [Worker(file, out, number) for number in range(2)]
    while sum(done.values()) < kills and finished(out) < jobs:
        worker, kind = random.choice(team), list(done)[sum(done.values()) % 3]
        time.sleep(random.uniform(0, 8))
        end = time.monotonic() + 60
        while kind.endswith("writes") and not list(out.rglob("*.part")) and time.monotonic() < end:
            time.sleep(0.001)
        victim = worker.find("main.py" if kind == "ComfyUI" else "tools.batch")
        if victim is not None:
            with suppress(psutil.Error):
                victim.kill()
                done[kind] += 1
                print(f"killed: {kind}; {finished(out)} jobs are done", flush=True)
        for other in team:
            if not other.running() and finished(out) < jobs:
                other.start()
    for worker in team:
        worker.process.wait()
    last = Worker(file, out, 0)  # whatever was killed at the very end
    last.process.wait()
    return done


def finished(out: Path) -> int:
    """How many jobs are done, by the ledger as it is."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{out / 'jobs.sqlite'}?mode=ro", uri=True)) as ledger:
        return ledger.execute("SELECT COUNT(*) FROM jobs WHERE state = 'done'").fetchone()[0]
    return 0


def results(out: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The table without what differs from run to run, and each result's digest by its path."""
    with (out / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in VARYING} for row in csv.DictReader(file)]
    files = [path for path in sorted(out.glob("*/*")) if path.is_file()]
    return rows, {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=("speed", "kills"), help="one half of it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = write_jobs(args.out, args.jobs)
    seconds = {}
    for workers in (1, 2) if args.only != "kills" else (1,):
        seconds[workers], driver = run(file, args.out / f"by_{workers}", workers)
        each = driver / args.jobs
        told = f"{workers} worker(s): {seconds[workers]:.0f} s for {args.jobs} jobs, driver {each:.2f} s a job"
        print(f"{told}, load {psutil.getloadavg()[0]:.1f}", flush=True)
    if len(seconds) == 2:
        print(f"speed-up of two workers: {seconds[1] / seconds[2]:.2f}")
    whole = results(args.out / "by_1")
    compared = {"two workers": args.out / "by_2"} if len(seconds) == 2 else {}
    if args.only != "speed":
        print(killed(file, args.out / "killed", args.kills, args.jobs))
        compared["killed"] = args.out / "killed"
    different = [name for name, out in compared.items() if results(out) != whole]
    print(f"{len(whole[0])} rows, {len(whole[1])} files; different from one worker's: {', '.join(different) or 'none'}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
