"""A tune whose disk fills up, and once more when there is room: `full_disk.py FOLDER`, a file system of 4 MB.

Prints one line of JSON: what the user was told, how many files were left, what was told the second time, and whether
the weights of both are those of an undisturbed run to the bit.
"""

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from equal import same_weights
from killed import tune


def main(disk: Path) -> dict:
    runs, filler = disk / "runs", disk / "filler"

    def fill(step) -> None:
        if step.number == 3:
            room = os.statvfs(disk)
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 100_000))

    told, resumed = [], []
    full = tune(runs, told.append, fill, steps=8)
    files = len(list(runs.iterdir()))
    filler.unlink()
    weights = [full, tune(runs, resumed.append, steps=8), tune(disk / "others", print, steps=8)]
    identical = all(same_weights(full, other) for other in weights[1:])
    same_losses = weights[0].losses == weights[1].losses == weights[2].losses
    return {"told": told, "files": files, "resumed": resumed, "identical": identical and same_losses}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
