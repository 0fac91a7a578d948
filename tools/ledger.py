"""What has become of each job of a batch, in an SQLite file that any number of processes may share.

A job is waiting, running, done or failed; or dropped, where the jobs file no longer has it. What is done stays done. No
write-ahead log, which does not work on network file systems.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from .jobs import Job

LOST = 120.0  # seconds without a sign of life after which another worker takes a job
# position: in the jobs file, -1 for jobs that it no longer has. tune: the position of the first job that has the same.
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, position INTEGER NOT NULL, tune INTEGER NOT NULL, share INTEGER NOT NULL, "values" TEXT NOT NULL,
  state TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, worker TEXT, beat REAL, seconds REAL,
  scores TEXT, outputs TEXT, error TEXT
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, tune, position, share);
"""
WAITING = "SELECT id, tune FROM jobs WHERE state = 'waiting' AND position >= 0 AND share % :n = :i"
OF_TUNE = f"{WAITING} AND tune = :tune ORDER BY position LIMIT 1"
AFTER_TUNE = f"{WAITING} AND tune > :tune ORDER BY tune, position LIMIT 1"
LAST = f"{WAITING} ORDER BY tune DESC, position DESC LIMIT 1"


def worker_name(number: int = 0) -> str:
    """A worker by its machine, process and number in it."""
    return f"{socket.gethostname()}:{os.getpid()}:{number}"


class Ledger:
    """The ledger in `file`, made if it is not there.

    Args:
        tries: how often a job is tried before it counts as failed.
        share: (i, n): only the i-th of n parts of the tunes, from 0.
    """

    def __init__(self, file: Path, tries: int = 2, share: tuple[int, int] = (0, 1)):
        self.file, self.tries, self.share = file, tries, share
        self.seen: dict[
            str, tuple[Any, float]
        ] = {}  # running job → its last sign of life, and when it was first seen here
        with self._open() as db:
            for statement in TABLE.split(";"):
                db.execute(statement)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own: another process waits for its end, and sees all of it or nothing.

        Raises OSError when the file cannot be written.
        """
        try:
            with closing(sqlite3.connect(self.file, timeout=60, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.file} cannot be written: {error}") from None

    def plan(self, jobs: Iterable[Job]) -> None:
        """Note these jobs: new ones wait, done ones stay, failed ones are tried anew, those that are gone are dropped.

        What a process of this machine was running that is no longer there is waiting again.
        """
        first: dict[str, int] = {}  # position by tune
        rows = [
            (j.id, i, first.setdefault(j.tune, i), int(j.tune[:8], 16), json.dumps(j.values, ensure_ascii=False))
            for i, j in enumerate(jobs)
        ]
        with self._open() as db:
            db.execute("CREATE TEMP TABLE planned (id TEXT PRIMARY KEY)")
            db.executemany("INSERT INTO planned VALUES (?)", [row[:1] for row in rows])
            db.executemany(
                "INSERT INTO jobs (id, position, tune, share, \"values\", state) VALUES (?, ?, ?, ?, ?, 'waiting') "
                'ON CONFLICT (id) DO UPDATE SET position = excluded.position, "values" = excluded."values", '
                "tune = excluded.tune, share = excluded.share",
                rows,
            )
            for row in db.execute("SELECT id, worker FROM jobs WHERE state = 'running'").fetchall():
                if _is_gone(row["worker"]):
                    db.execute("UPDATE jobs SET state = 'waiting', attempt = 0 WHERE id = ?", (row["id"],))
            db.execute("UPDATE jobs SET position = -1 WHERE id NOT IN (SELECT id FROM planned)")
            db.execute("UPDATE jobs SET state = 'dropped' WHERE state IN ('waiting', 'failed') AND position < 0")
            anew = "state = 'waiting', attempt = 0, error = NULL"
            db.execute(f"UPDATE jobs SET {anew} WHERE state IN ('failed', 'dropped') AND position >= 0")

    def claim(self, worker: str, tune: int = -1) -> tuple[str, int] | None:
        """Take a worker's next job: of the tune that it has, of one that nobody works at, or any.

        Returns the job's id and its tune, or None when none is waiting.
        """
        i, n = self.share
        with self._open() as db:
            for id in self._lost(db):
                failed = "state = 'failed', error = 'its worker was lost'"
                db.execute(f"UPDATE jobs SET {failed} WHERE id = ? AND attempt >= ?", (id, self.tries))
                db.execute("UPDATE jobs SET state = 'waiting' WHERE id = ? AND state = 'running'", (id,))
            row = self._next(db, {"tune": tune, "i": i, "n": n})
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'running', attempt = attempt + 1, worker = ?, beat = ? WHERE id = ?",
                (worker, time.time(), row["id"]),
            )
            self._lost(db)
            return row["id"], row["tune"]

    def _lost(self, db: sqlite3.Connection) -> list[str]:
        """Running jobs whose worker has given no sign of life for long, by this process's own clock: those of other
        machines may differ."""
        now = time.monotonic()
        told = {id: sign for id, *sign in db.execute("SELECT id, worker, beat FROM jobs WHERE state = 'running'")}
        before, self.seen = self.seen, {id: (sign, now) for id, sign in told.items()}
        self.seen |= {id: seen for id, seen in before.items() if seen[0] == told.get(id)}
        return [id for id, (_, since) in self.seen.items() if now - since > LOST]

    @staticmethod
    def _next(db: sqlite3.Connection, asked: dict[str, int]) -> sqlite3.Row | None:
        if row := db.execute(OF_TUNE, asked).fetchone():
            return row
        held = {tune for (tune,) in db.execute("SELECT tune FROM jobs WHERE state = 'running'")}
        asked = {**asked, "tune": -1}
        while row := db.execute(AFTER_TUNE, asked).fetchone():
            if row["tune"] not in held:
                return row
            asked["tune"] = row["tune"]
        return db.execute(LAST, asked).fetchone()  # rather than nothing: tune once more, far from who is at it

    def beat(self, workers: Iterable[str]) -> None:
        """Say that these workers live."""
        with self._open() as db:
            db.executemany(
                "UPDATE jobs SET beat = ? WHERE state = 'running' AND worker = ?", [(time.time(), w) for w in workers]
            )
            self._lost(db)  # to see when the others' change

    def done(self, id: str, worker: str, seconds: float, scores: dict[str, Any], outputs: list[str]) -> None:
        """Note a job's results, unless another worker has taken it meanwhile."""
        values = (seconds, json.dumps(scores), json.dumps(outputs), id, worker)
        self._end("state = 'done', seconds = ?, scores = ?, outputs = ?, error = NULL", values)

    def failed(self, id: str, worker: str, error: str, again: bool = True) -> None:
        """Note an error: the job waits for another try, or has failed."""
        state = "CASE WHEN ? AND attempt < ? THEN 'waiting' ELSE 'failed' END"
        self._end(f"state = {state}, error = ?", (again, self.tries, error, id, worker))

    def back(self, id: str, worker: str) -> None:
        """Put a job back that was stopped, as if it had not been begun."""
        self._end("state = 'waiting', attempt = attempt - 1", (id, worker))

    def release(self, worker: str) -> None:
        """Put back whatever a worker has begun."""
        with self._open() as db:
            change = "state = 'waiting', attempt = attempt - 1"
            db.execute(f"UPDATE jobs SET {change} WHERE worker = ? AND state = 'running'", (worker,))

    def _end(self, change: str, values: tuple[Any, ...]) -> None:
        with self._open() as db:
            db.execute(f"UPDATE jobs SET {change} WHERE id = ? AND worker = ? AND state = 'running'", values)

    def counts(self) -> dict[str, int]:
        """How many jobs of the share are in each state."""
        i, n = self.share
        with self._open() as db:
            state = "CASE WHEN position < 0 THEN 'dropped' ELSE state END"
            query = f"SELECT {state}, COUNT(*) FROM jobs WHERE share % ? = ? GROUP BY 1"
            return dict(map(tuple, db.execute(query, (n, i))))

    def at_work(self) -> dict[str, int]:
        """The workers that have a job, and how many each has done."""
        with self._open() as db:
            having = "SELECT DISTINCT worker FROM jobs WHERE state = 'running'"
            query = f"SELECT worker, SUM(state = 'done') AS done FROM jobs WHERE worker IN ({having}) GROUP BY worker"
            return {row["worker"]: row["done"] for row in db.execute(query)}

    def rows(self) -> list[dict[str, Any]]:
        """Every job in the order of the jobs file; values, scores and outputs as they were given."""
        with self._open() as db:
            rows = [dict(row) for row in db.execute("SELECT * FROM jobs ORDER BY position, id")]
        for row in rows:
            row["state"] = "dropped" if row["position"] < 0 else row["state"]
            row["values"] = json.loads(row["values"])
            row["scores"], row["outputs"] = json.loads(row["scores"] or "{}"), json.loads(row["outputs"] or "[]")
        return rows


def _is_gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that is no longer there."""
    host, process, _number = worker.rsplit(":", 2)
    return host == socket.gethostname() and not psutil.pid_exists(int(process))
