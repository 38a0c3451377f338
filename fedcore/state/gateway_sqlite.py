"""`GatewayStore` in one SQLite file, for the gateways and the coordinator of one machine.

Every change is one transaction that is on the disk before the method returns (write-ahead log, synchronous = FULL).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcore.errors import Refused, TryAgain
from fedcore.state.gateway import (
    REQUEST_WINDOW,
    Acceptance,
    Admission,
    Contribution,
    Device,
    Note,
    Problem,
    Round,
    RoundState,
    Standing,
    Verdict,
)
from fedcore.state.releases_sqlite import SqliteReleases
from fedcore.state.sqlite import transaction

__all__ = ["SqliteGatewayStore"]

_APPLICATION = 0x46434731  # "FCG1"
_SCHEMA = (
    """CREATE TABLE devices (id INTEGER PRIMARY KEY, algorithm INTEGER NOT NULL, public_key BLOB NOT NULL,
       not_after INTEGER NOT NULL, enrolled REAL NOT NULL, standing TEXT NOT NULL, reason TEXT NOT NULL, last_seen REAL NOT NULL,
       counter INTEGER NOT NULL, counted REAL NOT NULL, told TEXT NOT NULL, labels TEXT NOT NULL DEFAULT '[]')""",
    """CREATE TABLE participations (device INTEGER NOT NULL, task TEXT NOT NULL, times INTEGER NOT NULL, last INTEGER NOT NULL,
       PRIMARY KEY (device, task)) WITHOUT ROWID""",
    """CREATE TABLE requests (device INTEGER NOT NULL, counter INTEGER NOT NULL, nonce BLOB NOT NULL, time REAL NOT NULL,
       PRIMARY KEY (device, counter)) WITHOUT ROWID""",
    "CREATE INDEX requests_by_time ON requests (time)",
    """CREATE TABLE rounds (key TEXT PRIMARY KEY, task TEXT NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL,
       version INTEGER NOT NULL, document TEXT NOT NULL, changed REAL NOT NULL)""",
    """CREATE TABLE notes (round TEXT NOT NULL, kind TEXT NOT NULL, device INTEGER NOT NULL, text TEXT NOT NULL, time REAL NOT NULL,
       PRIMARY KEY (round, kind, device)) WITHOUT ROWID""",
    """CREATE TABLE contributions (round TEXT NOT NULL, device INTEGER NOT NULL, digest BLOB NOT NULL,
       PRIMARY KEY (round, device)) WITHOUT ROWID""",
    "CREATE TABLE partials (round TEXT NOT NULL, writer TEXT NOT NULL, sum BLOB NOT NULL, PRIMARY KEY (round, writer))",
    f"PRAGMA application_id = {_APPLICATION}",
)
_COLUMNS = (
    "id", "algorithm", "public_key", "not_after", "enrolled", "standing", "reason", "last_seen", "counter", "counted", "told",
    "labels",
)  # fmt: skip
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM devices"  # noqa: S608 - constants
_INSERT = f"INSERT INTO devices VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608
_OF_ROUNDS = ("notes", "contributions", "partials")


class SqliteGatewayStore:
    """See `GatewayStore`; the file is made if it is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._clear_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
            try:
                self._prepare()
                self.releases = SqliteReleases(self._db, self._clear_errors)
            except BaseException:
                self._db.close()
                raise

    def register(self, device: Device) -> Device:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            known = self._device(device.id)
            if known is None:
                values = {name: getattr(device, name) for name in _COLUMNS} | {"labels": json.dumps(device.labels)}
                self._db.execute(_INSERT, list(values.values()))
                return replace(device, participations={})
            if (known.algorithm, known.public_key) != (device.algorithm, device.public_key):
                raise Refused(f"device {device.id:016x} is another key's id")
            until = max(known.not_after, device.not_after)
            row = (until, json.dumps(device.labels), device.id)
            self._db.execute("UPDATE devices SET not_after = ?, labels = ? WHERE id = ?", row)
            return replace(known, not_after=until, labels=device.labels)

    def device(self, device: int) -> Device | None:
        """See `GatewayStore`."""
        with self._clear_errors():
            return self._device(device)

    def devices(self) -> list[Device]:
        """See `GatewayStore`."""
        with self._clear_errors():
            taken: dict[int, dict[str, tuple[int, int]]] = {}
            for device, task, times, last in self._db.execute("SELECT * FROM participations ORDER BY device, task"):
                taken.setdefault(device, {})[task] = times, last
            rows = self._db.execute(_SELECT).fetchall()
            return sorted((_read_device(row, taken.get(row[0], {})) for row in rows), key=lambda one: one.id)

    def judge(self, device: int, standing: Standing, reason: str) -> None:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            self._judge(device, standing, reason)

    def label(self, device: int, labels: Sequence[str]) -> None:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            self._db.execute("UPDATE devices SET labels = ? WHERE id = ?", (json.dumps(labels), device))

    def admit(self, requests: Sequence[Admission], now: float) -> list[Verdict]:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            return [self._admit(request, now) for request in requests]

    def advance(self, change: Round) -> bool:
        """See `GatewayStore`."""
        row = (change.task, change.number, change.state, change.version, change.document, time.time(), change.key)
        with self._clear_errors(), transaction(self._db):
            if change.version == 1:
                columns = "task, number, state, version, document, changed, key"
                insert = f"INSERT OR IGNORE INTO rounds ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - a constant
                return self._db.execute(insert, row).rowcount == 1
            update = """UPDATE rounds SET task = ?, number = ?, state = ?, version = ?, document = ?, changed = ?
                        WHERE key = ? AND version = ? AND state != 'closed'"""
            return self._db.execute(update, (*row, change.version - 1)).rowcount == 1

    def rounds(self) -> dict[str, int]:
        """See `GatewayStore`."""
        with self._clear_errors():
            return dict(self._db.execute("SELECT key, version FROM rounds ORDER BY key"))

    def round(self, key: str) -> Round | None:
        """See `GatewayStore`."""
        query = "SELECT key, task, number, state, version, document FROM rounds WHERE key = ?"
        with self._clear_errors():
            row = self._db.execute(query, (key,)).fetchone()
        return None if row is None else Round(row[0], row[1], row[2], RoundState(row[3]), row[4], row[5])

    def note(self, key: str, kind: str, notes: Sequence[Note]) -> None:
        """See `GatewayStore`."""
        rows = [(key, kind, note.device, note.text, note.time, key) for note in notes]
        with self._clear_errors(), transaction(self._db):
            self._db.executemany(
                "INSERT OR REPLACE INTO notes SELECT ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM rounds WHERE key = ?)", rows
            )

    def notes(self, key: str, kind: str) -> list[Note]:
        """See `GatewayStore`."""
        with self._clear_errors():
            rows = self._db.execute("SELECT device, text, time FROM notes WHERE round = ? AND kind = ?", (key, kind)).fetchall()
        return sorted((Note(device, text, when) for device, text, when in rows), key=lambda one: one.device)

    def accept(self, key: str, writer: str, partial: bytes, contributions: Sequence[Contribution]) -> Acceptance:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            found = self._db.execute("SELECT task, number FROM rounds WHERE key = ? AND state = 'running'", (key,)).fetchone()
            if found is None:
                return Acceptance(counted=False)
            task, number = found
            repeated = {one.device: digest for one in contributions if (digest := self._counted(key, one.device)) is not None}
            if repeated:
                return Acceptance(counted=False, repeated=repeated)
            self._db.executemany(
                "INSERT INTO contributions VALUES (?, ?, ?)", [(key, one.device, one.digest) for one in contributions]
            )
            self._db.executemany(
                """INSERT INTO participations VALUES (?, ?, 1, ?)
                   ON CONFLICT DO UPDATE SET times = times + 1, last = max(last, excluded.last)""",
                [(one.device, task, number) for one in contributions],
            )
            self._db.execute("INSERT OR REPLACE INTO partials VALUES (?, ?, ?)", (key, writer, partial))
        return Acceptance(counted=True)

    def contributions(self, key: str) -> list[Contribution]:
        """See `GatewayStore`."""
        with self._clear_errors():
            rows = self._db.execute("SELECT device, digest FROM contributions WHERE round = ?", (key,)).fetchall()
        return sorted((Contribution(device, digest) for device, digest in rows), key=lambda one: one.device)

    def partials(self, key: str) -> list[bytes]:
        """See `GatewayStore`."""
        with self._clear_errors():
            return [row[0] for row in self._db.execute("SELECT sum FROM partials WHERE round = ? ORDER BY writer", (key,))]

    def prune(self, now: float, before: float) -> None:
        """See `GatewayStore`."""
        with self._clear_errors(), transaction(self._db):
            self._db.execute("DELETE FROM requests WHERE time < ?", (now - REQUEST_WINDOW,))
            over = self._db.execute("SELECT key FROM rounds WHERE state = 'closed' AND changed < ?", (before,)).fetchall()
            for table in _OF_ROUNDS:
                self._db.executemany(f"DELETE FROM {table} WHERE round = ?", over)  # noqa: S608 - a constant
            self._db.executemany("DELETE FROM rounds WHERE key = ?", over)

    def close(self) -> None:
        """See `GatewayStore`."""
        self._db.close()

    def _admit(self, request: Admission, now: float) -> Verdict:
        device = self._device(request.device)
        if device is None:
            return Verdict(Problem.UNKNOWN, None)
        if device.standing is not Standing.ACTIVE:
            return Verdict(Problem(device.standing.value), device)
        key = (request.device, request.counter)
        seen = self._db.execute("SELECT nonce FROM requests WHERE device = ? AND counter = ?", key).fetchone()
        if seen is not None and seen[0] == request.nonce:
            return Verdict(Problem.REPLAYED, device)
        behind = request.counter <= device.counter
        if seen is not None or (behind and now - device.counted > REQUEST_WINDOW):
            self._judge(request.device, Standing.QUARANTINED, f"request number {request.counter} was used twice")
            return Verdict(Problem.QUARANTINED, device)
        if behind:
            return Verdict(Problem.REPLAYED, device)
        self._db.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (*key, request.nonce, now))
        self._db.execute(
            "UPDATE devices SET counter = ?, counted = ?, last_seen = ?, told = CASE WHEN ? = '' THEN told ELSE ? END WHERE id = ?",
            (request.counter, now, now, request.told, request.told, key[0]),
        )
        return Verdict(None, device)

    def _judge(self, device: int, standing: Standing, reason: str) -> None:
        final = (Standing.REVOKED, Standing.FORGOTTEN) if standing is not Standing.FORGOTTEN else ("",) * 2
        update = "UPDATE devices SET standing = ?, reason = ? WHERE id = ? AND standing NOT IN (?, ?)"
        self._db.execute(update, (standing, reason, device, *final))
        if standing is Standing.FORGOTTEN:
            self._db.execute("UPDATE devices SET told = '', labels = '[]', last_seen = 0, enrolled = 0 WHERE id = ?", (device,))
            self._db.execute("DELETE FROM participations WHERE device = ?", (device,))
            self._db.execute("DELETE FROM notes WHERE device = ?", (device,))
            self.releases.forget(device)

    def _counted(self, key: str, device: int) -> bytes | None:
        row = self._db.execute("SELECT digest FROM contributions WHERE round = ? AND device = ?", (key, device)).fetchone()
        return None if row is None else bytes(row[0])

    def _device(self, device: int) -> Device | None:
        row = self._db.execute(f"{_SELECT} WHERE id = ?", (device,)).fetchone()
        if row is None:
            return None
        taken = self._db.execute("SELECT task, times, last FROM participations WHERE device = ? ORDER BY task", (row[0],))
        return _read_device(row, {task: (times, last) for task, times, last in taken})

    def _prepare(self) -> None:
        self._db.execute("PRAGMA fullfsync = ON")  # macOS: past the drive's cache
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if self._id() == 0:
            with transaction(self._db):
                for statement in _SCHEMA if self._id() == 0 else ():
                    self._db.execute(statement)
        if self._id() != _APPLICATION:
            raise Refused(f"{self._path}: is not a gateway's store")
        with transaction(self._db):  # stores of before have no labels
            if "labels" not in {row[1] for row in self._db.execute("PRAGMA table_info(devices)")}:
                self._db.execute("ALTER TABLE devices ADD COLUMN labels TEXT NOT NULL DEFAULT '[]'")

    def _id(self) -> int:
        return int(self._db.execute("PRAGMA application_id").fetchone()[0])

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise TryAgain(f"{self._path}: the gateway's store cannot be used now ({error})") from error
        except sqlite3.DatabaseError as error:
            raise Refused(f"{self._path}: is damaged or no gateway's store ({error})") from error
        except OSError as error:
            raise TryAgain(f"{self._path}: the gateway's store cannot be used ({error.strerror})") from error


def _read_device(row: Sequence[Any], participations: dict[str, tuple[int, int]]) -> Device:
    values = dict(zip(_COLUMNS, row, strict=True))
    values |= {"standing": Standing(values["standing"]), "labels": tuple(json.loads(values["labels"]))}
    return Device(**values, participations=participations)
