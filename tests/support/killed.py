"""A tune that is killed at 20 moments, also while it saves, and continued each time: `killed.py FOLDER`.

Prints one line of JSON: how often it was killed, how often during a save, how many of the processes went on from a
saved state or found none, how many went on, and whether the weights are those of an undisturbed run to the bit. Each
process is a fork of this one, so that twenty starts cost no imports.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent.parent / "tools"), str(HERE.parent.parent / "benchmarks")]

from pack import load_pack  # noqa: E402

load_pack()
import torch  # noqa: E402
from equal import same_tensors  # noqa: E402
from small import TINY, random_weights  # noqa: E402
from tune_a_video.tav_core import host  # noqa: E402
from tune_a_video.tav_core.method.tuning import Recipe  # noqa: E402
from tune_a_video.tav_core.pipeline.one_shot import Saving, one_shot_tune  # noqa: E402
from tune_a_video.tav_core.store import files, published  # noqa: E402

STEPS, KILLS, EVERY, PIECES = 80, 20, 2, 10


def tune(folder: Path, tell, on_step=lambda _step: None, steps: int = STEPS):
    config = published.to_unet_config(TINY)
    generator = torch.Generator().manual_seed(0)
    model = host.inflate(host.build_model(config, random_weights(config, generator)), "video")
    latents = {"samples": torch.randn(4, 4, 8, 8, generator=generator) * 5}
    caption = [[torch.randn(1, 7, 16, generator=generator), {}]]
    with torch.inference_mode():
        return one_shot_tune(
            model, latents, caption, Recipe(steps), "fp32", "all", on_step, saving=Saving(folder, EVERY), tell=tell
        )


def forked(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def written(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def note(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def killed(pid: int, begun: Path, delay: float) -> bool:
    """End a process `delay` seconds after it wrote `begun`; False if it ended by itself before."""
    while not begun.exists():
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _pid, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def main(folder: Path) -> dict:
    torch.set_num_threads(1)
    log, end = folder / "told", folder / "weights.pt"
    save_file = files.save_file
    stall = None  # the save, from 1, and the piece of it at which a process waits to be killed
    saves = 0

    def slow_save(tensors, path, metadata):
        """As on a slow disk: the file grows piece by piece."""
        nonlocal saves
        saves += 1
        save_file(tensors, path, metadata)
        data = path.read_bytes()
        with open(path, "wb", buffering=0) as file:
            for piece in range(PIECES + 1):  # at the last one all is written, but not yet under its name
                if stall == (saves, piece):
                    (folder / "saving").touch()
                    time.sleep(60)
                size = len(data) // PIECES + 1
                file.write(data[piece * size : (piece + 1) * size])

    files.save_file = slow_save

    def work(name: str = "killed") -> None:
        weights = tune(folder / name, lambda text: note(log, text), lambda _step: (folder / "stepping").touch())
        torch.save({**weights.queries, **weights.temporal, "losses": torch.tensor(weights.losses)}, end)

    os.waitpid(forked(lambda: work("undisturbed")), 0)
    expected = torch.load(end, weights_only=True)
    end.unlink()

    chance = random.Random(0)
    kills = during = continued = 0
    while kills < KILLS:
        during_save = chance.random() < 0.6
        stall = (chance.randint(1, 2), chance.randint(0, PIECES)) if during_save else None
        begun = folder / ("saving" if during_save else "stepping")
        for name in ("saving", "stepping"):
            (folder / name).unlink(missing_ok=True)
        had_state, told = any((folder / "killed").glob("*.safetensors")), len(written(folder, "told"))
        if not killed(forked(work), begun, 0 if during_save else chance.uniform(0, 0.1)):
            break
        kills += 1
        during += during_save
        continued += not had_state or len(written(folder, "told")) == told + 1
    stall = None
    os.waitpid(forked(work), 0)
    got = torch.load(end, weights_only=True)
    return {
        "kills": kills,
        "kills_during_a_save": during,
        "continued": continued,
        "resumed": len(written(folder, "told")),
        "identical": same_tensors(got, expected),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
