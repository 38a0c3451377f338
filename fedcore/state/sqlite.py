"""What a run has committed: SQLite for the facts, one file per checkpoint for the arrays.

A commit first makes the file durable under a name that nothing refers to yet, then names it in one SQLite transaction. A kill
or a full disk at any byte therefore leaves either the old or the new commit, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import safetensors.numpy

from fedcore import durable
from fedcore.errors import Refused, TryAgain

__all__ = ["Checkpoint", "RunStore", "transaction"]

Arrays = dict[str, npt.NDArray[Any]]
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, metrics TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS checkpoints
       (round INTEGER PRIMARY KEY, file TEXT NOT NULL, sha256 TEXT NOT NULL, facts TEXT NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS run (id TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS clients (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
)


@dataclass(frozen=True)
class Checkpoint:
    """State after ``round_number`` rounds: arrays by name and facts that are JSON."""

    round_number: int
    arrays: Arrays
    facts: Mapping[str, Any]


class RunStore:
    """The durable state of one run directory; one coordinator at a time may hold it.

    ``run_id`` names the run wherever several share something, as a privacy ledger; it is drawn once and survives resumption.
    """

    def __init__(self, directory: Path) -> None:
        self._blobs = directory / "checkpoints"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(directory / "state.sqlite", timeout=0.5, isolation_level=None)
        with _clear_errors(directory):
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN EXCLUSIVE")  # held from here on, and released by the system if this process dies
            for statement in _SCHEMA:
                self._db.execute(statement)
            self._db.execute("INSERT INTO run SELECT ? WHERE NOT EXISTS (SELECT 1 FROM run)", (uuid.uuid4().hex,))
            self._db.execute("COMMIT")
            self.run_id = str(self._db.execute("SELECT id FROM run").fetchone()[0])
        self._directory = directory

    def close(self) -> None:
        """Let another coordinator hold the run."""
        self._db.close()

    def commit(self, checkpoint: Checkpoint, metrics: Sequence[Mapping[str, Any]], keep: int) -> None:
        """Make ``checkpoint`` and the metrics of the rounds since the last one durable, together; keep ``keep`` checkpoints.

        Raises:
            TryAgain: the disk is full or cannot be written; the previous commit is intact.
        """
        with _clear_errors(self._directory):
            data = safetensors.numpy.save(checkpoint.arrays)
            name = f"round-{checkpoint.round_number:06d}.safetensors"
            durable.write(self._blobs / name, data)
            facts = json.dumps(checkpoint.facts, sort_keys=True)
            with transaction(self._db):
                self._db.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)",
                    (checkpoint.round_number, name, hashlib.sha256(data).hexdigest(), facts),
                )
                rows = [(entry["round"], json.dumps(entry)) for entry in metrics]
                self._db.executemany("INSERT OR REPLACE INTO rounds VALUES (?, ?)", rows)
                outdated = self._db.execute(
                    "SELECT file FROM checkpoints ORDER BY round DESC LIMIT -1 OFFSET ?", (keep,)
                ).fetchall()
                self._db.executemany("DELETE FROM checkpoints WHERE file = ?", outdated)
            for (file,) in outdated:
                (self._blobs / file).unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """The last commit, or None for a run that has none.

        Raises:
            Refused: its file is missing or is not what was committed.
        """
        with _clear_errors(self._directory):
            row = self._db.execute("SELECT round, file, sha256, facts FROM checkpoints ORDER BY round DESC LIMIT 1").fetchone()
        if row is None:
            return None
        round_number, file, digest, facts = row
        try:
            data = (self._blobs / file).read_bytes()
        except OSError as error:
            raise Refused(f"{self._blobs / file}: the last checkpoint cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused(f"{self._blobs / file}: the last checkpoint is damaged (its SHA-256 is not the one committed)")
        return Checkpoint(round_number, safetensors.numpy.load(data), json.loads(facts))

    def numbers(self, names: Sequence[str]) -> list[int]:
        """The numbers of clients that are known by name, the same from the first question on; new ones are counted from 0."""
        with _clear_errors(self._directory), transaction(self._db):
            for name in names:
                self._db.execute("INSERT OR IGNORE INTO clients VALUES ((SELECT COUNT(*) FROM clients), ?)", (name,))
            known = [self._db.execute("SELECT number FROM clients WHERE name = ?", (name,)).fetchone() for name in names]
        return [int(number) for (number,) in known]

    def metrics(self) -> list[dict[str, Any]]:
        """The committed rounds' metrics, in order."""
        with _clear_errors(self._directory):
            return [json.loads(text) for (text,) in self._db.execute("SELECT metrics FROM rounds ORDER BY round")]


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block's statements or none of them."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _clear_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise TryAgain(f"{directory}: another process is running this run") from error
        raise TryAgain(
            f"{directory}: cannot be written ({error}); the last commit is intact, free space and use --resume"
        ) from error
    except sqlite3.DatabaseError as error:
        raise Refused(f"{directory / 'state.sqlite'}: is damaged ({error})") from error
    except OSError as error:
        raise TryAgain(
            f"{directory}: cannot be written ({error.strerror}); the last commit is intact, free space and use --resume"
        ) from error
