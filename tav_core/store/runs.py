"""Saved states of tunes: one file a run, found again by what determines its result.

A state is a safetensors file `KEY.STEP.safetensors`. KEY is the `digest` of all that the result depends on except
the number of steps: as the draws are one stream, a run of 300 steps is the beginning of one of 500, so a run is
continued from the longest saved state that does not reach beyond it. STEP is how many steps were done: a state
replaces none but one of as many steps. A run that has come further removes its own shorter ones, and no others.

Of a few early steps, what was trained is kept without what it takes to go on from there, as `KEY.STEP.early…`: a third
of the size. These stay as long as a state of their run does.

How much is kept is set here: `KEEP_RUNS` files and `KEEP_GIB` GiB, or the environment variables TAV_KEEP_RUNS and
TAV_KEEP_GIB. The files used longest ago go first.
"""

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..method.tuning import not_finite
from . import files
from .digest import digest

KEEP_RUNS = 20
KEEP_GIB = 20.0

FORMAT = "tune_a_video run 2"
SUFFIX = ".safetensors"
EARLY = ".early.safetensors"
CORRUPT = ".corrupt"
MOST_EARLY = 4  # of one run

# Parts of a `Training.state` that say what was trained, by the beginnings of their names.
WEIGHTS_OF_A_STATE = ("weight/", "losses", "grad_norms")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A state (`Training.state`) that was saved, and when: UTC, ISO 8601."""

    state: dict[str, Tensor]
    date: str


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
        """Where the run is saved when it is done."""
        return self._path(self.steps)

    def load(self, step: int | None = None) -> Saved | None:
        """The longest saved state from which this run can go on, or the one of `step`; None where there is none.

        What is corrupt is renamed and left out.
        """
        for done, path in sorted(self._saved(), reverse=True):
            if done > self.steps or step not in (None, done):
                continue
            if saved := self._trusted(path, done):
                return saved
        return None

    def _trusted(self, path: Path, step: int) -> Saved | None:
        try:
            saved = _read(path, self.key, step)
        except (OSError, ValueError) as error:
            _distrust(path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: among the last to go
        return saved

    def at(self, step: int) -> Saved | None:
        """What was trained by exactly this step, from a state or an early one; None where neither is kept."""
        if saved := self.load(step):
            return saved
        path = self._path(step, EARLY)
        return self._trusted(path, step) if path.exists() else None

    def keep(self, state: Mapping[str, Tensor], step: int) -> None:
        """Keep what was trained by an early `step`. Raises as `save`, of whose `state` it takes a part."""
        trained = {name: value for name, value in state.items() if name.startswith(WEIGHTS_OF_A_STATE)}
        self._write(trained, step, self._path(step, EARLY))
        _tidy(self.folder, {path for _step, path in self._saved()})

    def save(self, state: Mapping[str, Tensor], step: int) -> str:
        """Save `state` after `step` steps, at once or not at all; the date that it is saved with.

        Raises ValueError when it holds values that are not finite, OSError when it cannot be written; what was saved
        before is then as it was.
        """
        date = self._write(state, step, self._path(step))
        for done, path in self._saved():
            if done < step:
                with contextlib.suppress(OSError, ValueError):
                    if _about(path)["steps"] == str(self.steps):
                        path.unlink()
        _tidy(self.folder, {path for done, path in self._saved() if done >= step})
        return date

    def _write(self, state: Mapping[str, Tensor], step: int, path: Path) -> str:
        _check_finite(state)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"format": FORMAT, "step": str(step), "steps": str(self.steps), "date": date}
        about["digest"] = _signature(self.key, about, state)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(path, state, about)
        return date

    def _path(self, step: int, ending: str = SUFFIX) -> Path:
        return self.folder / f"{self.key}.{step}{ending}"

    def _saved(self) -> list[tuple[int, Path]]:
        """The steps done in each saved state of this key, and its file."""
        found = (
            (path.name[len(self.key) + 1 : -len(SUFFIX)], path) for path in self.folder.glob(f"{self.key}.*{SUFFIX}")
        )
        return [(int(done), path) for done, path in found if done.isdecimal()]


def early_steps(steps: int, every: int) -> list[int]:
    """The early steps of a run of `steps` that are kept: every so many, or fewer, as evenly as that allows."""
    offered = range(every, steps, every)
    apart = math.ceil(len(offered) / MOST_EARLY) or 1
    return list(offered[apart - 1 :: apart])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _about(path: Path) -> dict[str, str]:
    """The metadata of a saved state. Raises ValueError or OSError when it cannot be one."""
    with _open(path) as file:
        about = file.metadata() or {}
    if about.get("format") != FORMAT or not about.keys() >= {"step", "steps", "date", "digest"}:
        raise ValueError(f"it is no file of {FORMAT}")
    return about


def _read(path: Path, key: str, step: int) -> Saved:
    """A saved state, checked against its digest. Raises ValueError or OSError when it is not what was saved."""
    about = _about(path)
    with _open(path) as file:
        # Cloned: the file stays mapped otherwise, and Windows replaces no mapped file.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if about["step"] != str(step) or about["digest"] != _signature(key, about, state):
        raise ValueError("it does not hold what was written")
    _check_finite(state)
    return Saved(state, about["date"])


def _signature(key: str, about: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    return digest([key, about["step"], about["steps"], about["date"], state])


def _check_finite(state: Mapping[str, Tensor]) -> None:
    if names := not_finite(state):
        raise ValueError(f"it holds NaN or infinite values in {names[0]}")


def _distrust(path: Path, error: Exception) -> None:
    """Say that a saved state is not used; rename it unless it is only unreadable just now."""
    log.warning("Tune-A-Video: the saved state %s is not used: %s.", path, error)
    if isinstance(error, ValueError):
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(path.name + CORRUPT))


def _tidy(folder: Path, spared: set[Path]) -> None:
    """Remove what killed processes left half-written, then the states used longest ago, until the limits hold.

    Early ones count for the size, and go with the last state of their run.
    """
    runs, size = _limit("TAV_KEEP_RUNS", KEEP_RUNS), _limit("TAV_KEEP_GIB", KEEP_GIB) * 2**30
    files.sweep(folder, f"*{files.UNFINISHED}")
    states = []
    for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}{CORRUPT}")):
        with contextlib.suppress(OSError):  # here and below: another process may tidy too
            states.append((path.stat().st_mtime, path.stat().st_size, path))
    early = {path for _, _, path in states if path.name.endswith(EARLY)}
    count, total = len(states) - len(early), sum(length for _, length, _ in states)
    for _, length, path in sorted(states):
        if path not in spared and (total > size or (count > runs and path not in early)):
            with contextlib.suppress(OSError):
                path.unlink()
                count, total = count - (path not in early), total - length
    for path in early:
        key = path.name.partition(".")[0]
        if not any(state.exists() for _, _, state in states if state not in early and state.name.startswith(key)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _limit(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if text is None:
        return default
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    log.warning("Tune-A-Video: %s is %r, not a number above 0; using %g.", variable, text, default)
    return default
