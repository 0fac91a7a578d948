"""A batch in the terminal: a bar of all jobs, and one of each worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Bars:
    """Shown where somebody sees them, for as long as a `with` lasts.

    Args:
        counts: jobs by state, when it begins: what was done before is no part of the rate.
    """

    def __init__(self, counts: Mapping[str, int]):
        self.all = tqdm(total=_all(counts), initial=counts.get("done", 0), unit="job", disable=None)
        self.workers: dict[str, Any] = {}
        self.one = threading.Lock()  # workers are threads, and each takes a line

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_error: object) -> None:
        for bar in (*self.workers.values(), self.all):
            bar.close()

    def jobs(self, counts: Mapping[str, int]) -> None:
        self.all.total, self.all.n = _all(counts), counts.get("done", 0)
        self.all.refresh()

    def worker(self, name: str, what: str, done: int, total: int) -> None:
        """That a worker is at `what`, and how far."""
        with self.one:
            if name not in self.workers:
                line, layout = len(self.workers) + 1, "{desc}: {bar} {n_fmt}/{total_fmt}"
                self.workers[name] = tqdm(position=line, bar_format=layout, leave=False, disable=None)
        bar = self.workers[name]
        bar.total, bar.n = total, done
        bar.set_description_str(f"{name} {what}")


def _all(counts: Mapping[str, int]) -> int:
    return sum(counts.values()) - counts.get("dropped", 0)
