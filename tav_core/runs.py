"""Saved states of tunes: one file a run, found again by what determines its result.

A state is a safetensors file `KEY.STEPS.safetensors`. KEY is the `digest` of all that the result depends on except
the number of steps: as the draws are one stream, a run of 300 steps is the beginning of one of 500, so a run is
continued from the longest saved state that does not reach beyond it. STEPS is where the run was to end: a shorter run
never overwrites a longer one.

How much is kept is set here: `KEEP_RUNS` files and `KEEP_GIB` GiB, or the environment variables TAV_KEEP_RUNS and
TAV_KEEP_GIB. The files used longest ago go first.
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import files
from .digest import digest

KEEP_RUNS = 20
KEEP_GIB = 20.0

FORMAT = "tune_a_video run 1"
SUFFIX = ".safetensors"
CORRUPT = ".corrupt"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run's place in a folder of saved states.

    Attributes:
        folder: where states are kept; made when the first one is saved.
        key: `digest` of all that determines the result except the number of steps.
        steps: where the run is to end.
    """

    folder: Path
    key: str
    steps: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}.{self.steps}{SUFFIX}"

    def load(self) -> dict[str, Tensor] | None:
        """The longest saved state from which this run can go on, or None. What is corrupt is renamed and left out."""
        usable = []
        for path in self.folder.glob(f"{self.key}.*{SUFFIX}"):
            try:
                if (step := _step(path)) <= self.steps:
                    usable.append((step, path))
            except (OSError, ValueError) as error:
                _distrust(path, error)
        for _, path in sorted(usable, reverse=True):
            try:
                state = _read(path, self.key)
            except (OSError, ValueError) as error:
                _distrust(path, error)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)  # used now: among the last to go
            return state
        return None

    def save(self, state: Mapping[str, Tensor], step: int) -> None:
        """Replace this run's file by `state` after `step` steps, at once or not at all.

        Raises OSError when it cannot be written; the older file is then as it was.
        """
        metadata = {"format": FORMAT, "step": str(step), "digest": digest([self.key, step, state])}
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(self.path, state, metadata)
        _tidy(self.folder, self.path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _step(path: Path) -> int:
    """The number of steps done in a saved state. Raises ValueError or OSError when it cannot be one."""
    with _open(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or not metadata.keys() >= {"step", "digest"}:
        raise ValueError(f"it is no file of {FORMAT}")
    return int(metadata["step"])


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """A saved state, checked against its digest. Raises ValueError or OSError when it is not what was saved."""
    with _open(path) as file:
        metadata = file.metadata()
        # Cloned: the file stays mapped otherwise, and Windows replaces no mapped file.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if metadata["digest"] != digest([key, int(metadata["step"]), state]):
        raise ValueError("it does not hold what was written")
    return state


def _distrust(path: Path, error: Exception) -> None:
    """Say that a saved state is not used; rename it unless it is only unreadable just now."""
    log.warning("Tune-A-Video: the saved state %s is not used: %s.", path, error)
    if isinstance(error, ValueError):
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(path.name + CORRUPT))


def _tidy(folder: Path, keep: Path) -> None:
    """Remove what killed processes left half-written, then the states used longest ago, until the limits hold."""
    runs, size = _limit("TAV_KEEP_RUNS", KEEP_RUNS), _limit("TAV_KEEP_GIB", KEEP_GIB) * 2**30
    with contextlib.suppress(OSError):  # another process may tidy too
        files.sweep(folder, f"*{files.UNFINISHED}")
        states = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}{CORRUPT}")]
        by_age = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in states if path != keep)
        count, total = len(by_age) + 1, sum(entry[1] for entry in by_age) + keep.stat().st_size
        for _time, length, path in by_age:
            if count <= runs and total <= size:
                break
            path.unlink()
            count, total = count - 1, total - length


def _limit(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        return float(text) if text else default
    except ValueError:
        log.warning("Tune-A-Video: %s is %r, not a number; using %g.", variable, text, default)
        return default
