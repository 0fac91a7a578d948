"""One workflow for many clips, prompts, seeds and checkpoints, unattended; see docs/batch.md.

  python run.py batch JOBS [--out FOLDER] [--dry-run | --report] [--server URL... | --ray ADDRESS] [--shard I/N]

JOBS is a YAML file, or a CSV table with --workflow. It may be stopped at any time, in any way, and run again: what is
done stays, the rest goes on. Results, with results.csv and index.html, are in FOLDER (JOBS-results).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from .. import run
from . import jobs, results
from .api import Comfy, Prompt, Refused, failure
from .bars import Bars
from .ledger import Ledger, worker_name

BEAT = 15.0  # seconds between signs of life
REPORT = 30.0  # seconds between writing the results
WAIT = 5.0  # seconds, where others are still at work
PATIENCE = 300.0  # seconds that a server may be away
LARGE = ("--max-upload-size", "1000000")  # MB: the clips are the user's own
EMPTY = "previews are not kept. To have files, put a node that saves, such as Save Video, into the workflow."
FULL = (errno.ENOSPC, errno.EDQUOT)


class Lost(Exception):
    """The server does not answer."""


# --- servers ------------------------------------------------------------------------------------------------------


class Running:
    """A ComfyUI that somebody else has started."""

    def __init__(self, address: str):
        self.comfy = Comfy(address.rstrip("/"), PATIENCE)

    def ready(self) -> Comfy:
        """It, as soon as it answers. Raises Lost when it does not."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.comfy.get("/system_stats")
                return self.comfy
            except OSError:
                if time.monotonic() > end:
                    raise Lost(f"{self.comfy.address} does not answer") from None
                time.sleep(2)

    def close(self) -> None:
        pass


class Own:
    """A ComfyUI of our own, started when it is needed and again when it has ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stack = ExitStack()
        self.process: Any = None
        self.comfy: Comfy | None = None

    def ready(self) -> Comfy:
        """It, ready. Raises Lost when it does not start."""
        if self.comfy is None or self.process.poll() is not None:
            self.close()
            host = run.find_host(os.environ, Path.home(), sys.platform)
            port = run.open_port(0)
            log = self.stack.enter_context((self.folder / "comfyui.log").open("a", encoding="utf-8"))
            try:
                starting = run.server(host, Path(sys.executable), port, LARGE, log, self._note)
                self.process = self.stack.enter_context(starting)
            except run.Problem as error:
                raise Lost(f"{error} ({self.folder / 'comfyui.log'})") from None
            self.comfy = Comfy(f"http://127.0.0.1:{port}", PATIENCE)
        return self.comfy

    def close(self) -> None:
        self.stack.close()
        self.comfy = None

    def _note(self, process: int) -> None:
        """Whose process this is: one that was killed cannot end its server, the next one does."""
        noted = self.folder / f"server-{os.getpid()}-{socket.gethostname()}.json"
        self.stack.callback(noted.unlink, missing_ok=True)
        noted.write_text(
            json.dumps({"server": process, "began": psutil.Process(process).create_time()}), encoding="utf-8"
        )


def end_orphans(folder: Path) -> None:
    """End servers whose batch was killed on this machine; they are known by number and the time of their start."""
    for noted in folder.glob("server-*.json"):
        _, owner, machine = noted.stem.split("-", 2)
        if machine != socket.gethostname() or psutil.pid_exists(int(owner)):
            continue
        with suppress(psutil.Error, ValueError, KeyError):
            told = json.loads(noted.read_text(encoding="utf-8"))
            server = psutil.Process(told["server"])
            if abs(server.create_time() - told["began"]) < 1:
                server.kill()
                server.wait(30)
        noted.unlink(missing_ok=True)


# --- one job ------------------------------------------------------------------------------------------------------


def do(
    comfy: Comfy, prompt: Prompt, job: jobs.Job, folder: Path, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run a job's prompt on a server and fetch what it wrote; its scores, and its outputs by their paths in `folder`.

    Raises Refused when the server does not take it, RuntimeError when a node fails, OSError when the server is lost.
    """
    names = {}
    for (number, key), file in job.files.items():
        prompt[number]["inputs"][key] = name = comfy.upload(file)
        names[name] = file.name
    for node in prompt.values():
        _keep_apart(node["inputs"], comfy.client[:8])

    def on_event(kind: str, data: Any) -> None:
        if kind == "progress" and data.get("node") in prompt:
            tell(prompt[data["node"]]["class_type"], data["value"], data["max"])

    history = comfy.run(prompt, on_event)
    if reason := failure(history):
        for name, own in names.items():
            reason = reason.replace(name, own)
        raise RuntimeError(reason)
    scorers = sum(node["class_type"] == "TAVScoreVideo" for node in prompt.values())
    scores, outputs = {}, []
    taken, titled = set(), set()
    for number, node in prompt.items():  # in its order: that in which nodes end changes from job to job
        told = history["outputs"].get(number, {})
        title = node.get("_meta", {}).get("title", number)
        if node["class_type"] == "TAVScoreVideo" and told:
            before = f"{_free(titled, title)}: " if scorers > 1 else ""
            scores |= {f"{before}{name}": value for name, value in told["scores"][0].items()}
        for output in _files(told):
            # Not by the server's name, which counts on from whatever is in its folder.
            name = _free(taken, re.sub(r"[^\w-]+", "_", title), Path(output["filename"]).suffix)
            (folder / job.id).mkdir(parents=True, exist_ok=True)
            results.write_whole(folder / job.id / name, comfy.download(output))
            results.contact_sheet(folder / job.id / name)
            outputs.append(f"{job.id}/{name}")
    return {"scores": scores, "outputs": outputs}


def _keep_apart(inputs: dict[str, Any], server: str) -> None:
    """Have a node write to files that no other server writes to.

    Those that share an output folder would take the same number: ComfyUI counts on from the files that are there, and a
    video's is there only when it has been encoded. The same for all jobs of a server, which saves again only what has
    changed: the weights of a tune once, not once a prompt.
    """
    if "filename_prefix" in inputs:
        prefix = inputs["filename_prefix"]
        inputs["filename_prefix"] = f"{prefix}_{server}" if isinstance(prefix, str) else server  # else a link


def _free(taken: set[str], name: str, suffix: str = "") -> str:
    """A name, numbered where it is taken; some disks do not tell capitals apart."""
    numbered = (f"{name}{end}{suffix}" for end in chain([""], (f"_{i}" for i in count(2))))
    found = next(each for each in numbered if each.casefold() not in taken)
    taken.add(found.casefold())
    return found


def _files(told: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The files that a node has kept: all but the page's previews."""
    found = [each for part in told.values() if isinstance(part, list) for each in part]
    return [each for each in found if isinstance(each, dict) and each.get("type") == "output"]


# --- workers ------------------------------------------------------------------------------------------------------


class Batch:
    """Workers, each with a server, that take jobs from the ledger until none is left."""

    def __init__(self, plan: jobs.Plan, info: jobs.Info, planned: list[jobs.Job], ledger: Ledger, folder: Path):
        self.plan, self.info, self.ledger, self.folder = plan, info, ledger, folder
        self.jobs = {job.id: job for job in planned}
        self.stopping = threading.Event()
        self.active: dict[str, Comfy] = {}  # worker → its server, while it computes
        self.bars: Bars | None = None
        self.reported = 0.0
        self.warned = False  # that a job has kept nothing
        self.unwritten = False  # whether the last report could not be written

    def work(self, worker: str, server: Running | Own) -> None:
        """Take jobs until none is left for this worker, its server is lost, or results cannot be written."""
        try:
            self._jobs_of(worker, server)
        except OSError as error:
            with suppress(OSError):
                self.ledger.release(worker)
            tqdm.write(f"{worker} ends: {error}. Run the same command again once that is mended; what is done stays.")

    def _jobs_of(self, worker: str, server: Running | Own) -> None:
        tune = -1
        while not self.stopping.is_set():
            try:
                comfy = server.ready()
            except Lost as error:
                tqdm.write(f"{worker} ends: {error}")
                return
            claimed = self.ledger.claim(worker, tune)
            if claimed is None:
                if not self.ledger.counts().get("running"):
                    return
                self.stopping.wait(WAIT)  # a worker that is lost leaves a job
                continue
            id, tune = claimed
            if id not in self.jobs:
                self.ledger.back(id, worker)
                tqdm.write(f"{worker} ends: another process has other jobs in this ledger; start this one anew.")
                return
            self._one(worker, comfy, self.jobs[id])
            self._show()

    def _one(self, worker: str, comfy: Comfy, job: jobs.Job) -> None:
        began = time.monotonic()
        self.active[worker] = comfy
        try:
            prompt, _files = self.plan.prompt(job.values, self.info)
            found = do(comfy, prompt, job, self.folder, partial(self._at, worker))
            self.ledger.done(job.id, worker, time.monotonic() - began, **found)
            if not (found["scores"] or found["outputs"] or self.warned):
                self.warned = True
                tqdm.write(f"{job.id} is done and has nothing to keep: {EMPTY}")
        except Exception as error:
            if self.stopping.is_set():
                self.ledger.back(job.id, worker)
                return
            text = " ".join(str(error).split()) or type(error).__name__
            again = not isinstance(error, Refused)  # what a server does not take once it never takes
            self.ledger.failed(job.id, worker, text, again)
            tqdm.write(f"{job.id} {'failed' if not again else 'went wrong'}: {text}")
            if isinstance(error, OSError) and error.errno in FULL:  # nor would the next one's results find room
                raise
        finally:
            self.active.pop(worker, None)

    def _at(self, worker: str, what: str, done: int, total: int) -> None:
        if self.bars is not None:
            self.bars.worker(worker, what, done, total)

    def _show(self) -> None:
        if self.bars is not None:
            self.bars.jobs(self.ledger.counts())
        if time.monotonic() - self.reported > REPORT:
            self.report()

    def report(self, last: bool = False) -> None:
        """Write the results. Where that is impossible, such as in a table that a spreadsheet has open, say so once."""
        self.reported = time.monotonic()
        try:
            results.write(self.folder, self.ledger.rows())
            self.unwritten = False
        except OSError as error:
            if last:
                tqdm.write(f"{error}. The results are not written anew: --report does that, once this is mended.")
            elif not self.unwritten:
                tqdm.write(f"{error}. The jobs go on, and the results are written as soon as they can be.")
            self.unwritten = True

    def run(self, servers: list[Running | Own]) -> None:
        """Work with all servers at once. At Ctrl-C jobs are put back, and the servers stop computing them."""
        workers = {worker_name(i): server for i, server in enumerate(servers)}
        threads = [threading.Thread(target=self.work, args=pair, daemon=True) for pair in workers.items()]
        with Bars(self.ledger.counts()) as self.bars, self._beating(list(workers)):
            try:
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    time.sleep(0.2)
            except KeyboardInterrupt:
                self.stopping.set()
                tqdm.write("stopping: jobs that were begun are put back")
                for comfy in list(self.active.values()):
                    with suppress(OSError):
                        comfy.interrupt()
                for thread in threads:
                    thread.join(timeout=5)
                raise
            finally:
                for worker in list(self.active):  # whatever does not come back
                    self.ledger.release(worker)
                for server in servers:
                    server.close()
                self.report(last=True)

    @contextmanager
    def _beating(self, workers: list[str]):
        end = threading.Event()

        def beat() -> None:
            while not end.wait(BEAT):
                with suppress(OSError):  # a full disk ends the workers, which say so
                    self.ledger.beat(workers)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


# --- the command --------------------------------------------------------------------------------------------------


def shard(text: str) -> tuple[int, int]:
    """I/N, from 1, as (i, n) from 0. Raises ValueError for anything else."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i - 1, n


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ends by SystemExit, whose code is 0 when all jobs are done."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="run.py batch", description=__doc__, formatter_class=layout)
    parser.add_argument("jobs", type=Path, metavar="JOBS")
    parser.add_argument("--workflow", type=Path, metavar="FILE", help="the workflow, in place of the one in JOBS")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: JOBS-results)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the jobs, and run nothing")
    parser.add_argument("--report", action="store_true", help="only write results.csv and index.html anew")
    parser.add_argument(
        "--server", nargs="+", metavar="URL", help="running ComfyUIs to use, in place of one of our own"
    )
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="only the I-th of N parts, from 1")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="a worker on each GPU of a Ray cluster; local: of this machine"
    )
    parser.add_argument("--tries", type=int, default=2, metavar="N", help="how often a job is tried (default: 2)")
    args = parser.parse_args(arguments)
    if args.ray and args.server:
        parser.error("--ray starts servers of its own: leave --server out")
    folder: Path = args.out or args.jobs.with_name(f"{args.jobs.stem}-results")
    file = folder / "jobs.sqlite"
    try:
        if args.report:
            if not file.is_file():
                sys.exit(f"run.py: error: there is no {file}: this batch has not been run.")
            results.write(folder, Ledger(file).rows())
            print(f"results: {folder}")
            return
        plan = jobs.read(args.jobs, args.workflow)
        if args.ray and not args.dry_run:
            sys.exit(by_ray(args, folder))
        folder.mkdir(parents=True, exist_ok=True)
        end_orphans(folder)
        servers: list[Running | Own] = [Running(url) for url in args.server or ()] or [Own(folder)]
        try:
            info = servers[0].ready().get("/object_info")
            planned = plan.jobs(info)
            if args.dry_run:
                dry_run(plan, planned)
                return
            ledger = Ledger(file, args.tries, args.shard)
            ledger.plan(planned)
            work = Batch(plan, info, planned, ledger, folder)
            work.run(servers)
        finally:
            for server in servers:
                server.close()
    except jobs.Wrong as error:
        sys.exit("\n".join(f"run.py: error: {line}" for line in error.lines))
    except (Lost, OSError) as error:
        sys.exit(f"run.py: error: {error}")
    counts = ledger.counts()
    print(f"{results.summary(counts)}; results: {folder}")
    sys.exit(1 if work.unwritten or counts.keys() & {"failed", "waiting", "running"} else 0)


def by_ray(args: argparse.Namespace, folder: Path) -> int:
    """This command as an actor on each GPU of a cluster, all on one ledger; its exit code.

    An actor that dies is started again and goes on. All machines must have this pack, ComfyUI and the folders at the
    same places; no clip and no result goes over Ray.
    """
    local = args.ray == "local"
    if local:  # before the import: as on Windows and macOS, its ports then stay on this machine
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray  # type: ignore[reportMissingImports]

    told = [
        "--out",
        str(folder.resolve()),
        "--tries",
        str(args.tries),
        "--shard",
        f"{args.shard[0] + 1}/{args.shard[1]}",
    ]
    if args.workflow:
        told += ["--workflow", str(args.workflow.resolve())]
    command = [str(args.jobs.resolve()), *told]
    wanted = ("TAV_HOST", "COMFYUI_PATH", "COMFYUI_PYTHON", "TAV_KEEP_RUNS", "TAV_KEEP_GIB")
    passed = {"env_vars": {name: os.environ[name] for name in wanted if name in os.environ}}
    ray.init(args.ray, runtime_env=passed, **({"include_dashboard": False} if local else {}))
    gpus = int(ray.cluster_resources().get("GPU", 0))

    # In here, or Ray would look for it by the name of a module that its processes do not have.
    class Worker:
        def work(self, project: str, command: list[str]) -> Any:
            sys.path.insert(0, str(Path(project) / "tools"))
            from pack import load_nothing  # type: ignore[reportMissingImports]

            load_nothing()
            from tune_a_video.tools import batch  # type: ignore[reportMissingImports]

            try:
                batch.main(command)
            except SystemExit as end:
                return end.code

    actor: Any = ray.remote(num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=-1)(Worker)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "jobs.sqlite", args.tries, args.shard)
    try:
        workers = [actor.remote() for _ in range(max(gpus, 1))]
        pending = {worker.work.remote(str(run.PROJECT), command): worker for worker in workers}
        del workers
        ended = []
        with Bars(ledger.counts()) as bars:
            while pending:
                done, _ = ray.wait(list(pending), timeout=WAIT)
                for each in done:
                    ended.append(each)
                    del pending[each]  # frees its GPU, for a worker whose machine does not come back
                counts = ledger.counts()
                bars.jobs(counts)
                for worker, done in ledger.at_work().items():
                    bars.worker(worker, "jobs", done, counts.get("done", 0))
        codes = ray.get(ended)
    finally:
        ray.shutdown()
    for line in sorted({code for code in codes if isinstance(code, str)}):
        print(line, file=sys.stderr)
    return int(any(codes))


def dry_run(plan: jobs.Plan, planned: list[jobs.Job]) -> None:
    for job in planned:
        print(job.id, ", ".join(f"{name}: {value}" for name, value in job.values.items()))
    twice = len(plan.rows) - len(planned)
    tunes = len({job.tune for job in planned})
    print(f"{len(planned)} jobs, {tunes} tunes" + (f"; {twice} that are there twice are done once" if twice else ""))


if __name__ == "__main__":
    run.end_as_by_ctrl_c()
    main()
