"""`ReleaseStore` in the SQLite file of a gateway's store."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedcore.state.releases import Holding, Membership, Outcome, RolloutEntry, Visit, Worst
from fedcore.state.sqlite import transaction

__all__ = ["SqliteReleases"]

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS rollouts (name TEXT PRIMARY KEY, model TEXT NOT NULL, number INTEGER NOT NULL,
       revision INTEGER NOT NULL, document TEXT NOT NULL, UNIQUE (model, number))""",
    """CREATE TABLE IF NOT EXISTS members (rollout TEXT NOT NULL, device INTEGER NOT NULL, arm TEXT NOT NULL,
       hardware TEXT NOT NULL, joined REAL NOT NULL, closes REAL NOT NULL, reported TEXT,
       PRIMARY KEY (rollout, device)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS arms (rollout TEXT NOT NULL, arm TEXT NOT NULL, joined INTEGER NOT NULL,
       PRIMARY KEY (rollout, arm)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS holdings (model TEXT NOT NULL, device INTEGER NOT NULL, version INTEGER NOT NULL,
       tier TEXT NOT NULL, runtime TEXT NOT NULL, hardware TEXT NOT NULL, labels TEXT NOT NULL, seen REAL NOT NULL,
       note TEXT NOT NULL, PRIMARY KEY (model, device)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS sequences (device INTEGER PRIMARY KEY, last INTEGER NOT NULL)",
)
_CURRENT = "SELECT name, revision FROM rollouts WHERE model = ? ORDER BY number DESC LIMIT 1"
_HOLD = """INSERT INTO holdings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    note = CASE WHEN excluded.note = '' AND excluded.version = version THEN note ELSE excluded.note END,
    version = excluded.version, tier = excluded.tier, runtime = excluded.runtime, hardware = excluded.hardware,
    labels = excluded.labels, seen = excluded.seen"""
_MEMBER = "SELECT device, arm, hardware, joined, closes, reported FROM members WHERE rollout = ?"


class SqliteReleases:
    """See `ReleaseStore`. ``clear_errors`` turns SQLite's errors into ours."""

    def __init__(self, db: sqlite3.Connection, clear_errors: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._db, self._clear_errors = db, clear_errors
        with clear_errors():
            for statement in _SCHEMA:
                db.execute(statement)

    def rollouts(self) -> list[RolloutEntry]:
        """See `ReleaseStore`."""
        query = "SELECT name, model, number, revision, document FROM rollouts ORDER BY model, number"
        with self._clear_errors():
            return [RolloutEntry(*row) for row in self._db.execute(query)]

    def advance_rollout(self, change: RolloutEntry) -> bool:
        """See `ReleaseStore`."""
        with self._clear_errors(), transaction(self._db):
            if change.revision > 1:
                update = (
                    "UPDATE rollouts SET revision = ?, document = ? WHERE name = ? AND model = ? AND number = ? AND revision = ?"
                )
                row = (change.revision, change.document, change.name, change.model, change.number, change.revision - 1)
                return self._db.execute(update, row).rowcount == 1
            last = self._db.execute("SELECT max(number) FROM rollouts WHERE model = ?", (change.model,)).fetchone()[0] or 0
            if change.number != last + 1:
                return False
            new = (change.name, change.model, change.number, 1, change.document)
            return self._db.execute("INSERT OR IGNORE INTO rollouts VALUES (?, ?, ?, ?, ?)", new).rowcount == 1

    def visit(self, visit: Visit) -> Outcome:
        """See `ReleaseStore`."""
        one = visit.holding
        with self._clear_errors(), transaction(self._db):
            held = (
                one.model,
                one.device,
                one.version,
                one.tier,
                one.runtime,
                one.hardware,
                json.dumps(one.labels),
                one.seen,
                one.note,
            )
            self._db.execute(_HOLD, held)
            for report in visit.reports:
                self._report(one.device, report, one.seen)
            row = self._db.execute(_CURRENT, (one.model,)).fetchone()
            current = row == visit.known
            member = None
            if current and visit.known is not None:
                member = self._joined(visit.known[0], visit)
            return Outcome(current, member, self._sequence(one.device, int(1000 * one.seen)))

    def prune_rollouts(self, model: str, keep: int) -> None:
        """See `ReleaseStore`."""
        query = "SELECT name FROM rollouts WHERE model = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
        with self._clear_errors(), transaction(self._db):
            old = self._db.execute(query, (model, max(keep, 1))).fetchall()
            for table in ("members", "arms"):
                self._db.executemany(f"DELETE FROM {table} WHERE rollout = ?", old)  # noqa: S608 - a constant
            self._db.executemany("DELETE FROM rollouts WHERE name = ?", old)

    def members(self, rollout: str) -> list[Membership]:
        """See `ReleaseStore`."""
        with self._clear_errors():
            return [_member(row) for row in self._db.execute(f"{_MEMBER} ORDER BY device", (rollout,))]

    def holdings(self, model: str) -> list[Holding]:
        """See `ReleaseStore`."""
        query = """SELECT device, model, version, tier, runtime, hardware, labels, seen, note FROM holdings WHERE model = ?
                   ORDER BY device"""
        with self._clear_errors():
            rows = self._db.execute(query, (model,)).fetchall()
        return [Holding(row[0], row[1], row[2], row[3], row[4], row[5], tuple(json.loads(row[6])), row[7], row[8]) for row in rows]

    def forget(self, device: int) -> None:
        """Erase a device, within the caller's transaction."""
        for table in ("members", "holdings", "sequences"):
            self._db.execute(f"DELETE FROM {table} WHERE device = ?", (device,))  # noqa: S608 - a constant

    def _report(self, device: int, report: Worst, now: float) -> None:
        member = self._member(report.rollout, device)
        if member is None or member.arm != report.arm or now >= member.closes:
            return
        worst = dict(member.values or {})
        for name, value in report.values.items():
            worst[name] = max(value, worst.get(name, value))
        update = "UPDATE members SET reported = ? WHERE rollout = ? AND device = ?"
        self._db.execute(update, (json.dumps(worst, sort_keys=True), report.rollout, device))

    def _joined(self, rollout: str, visit: Visit) -> Membership | None:
        found, wanted = self._member(rollout, visit.holding.device), visit.joining
        if found is not None or wanted is None:
            return found
        row = self._db.execute("SELECT joined FROM arms WHERE rollout = ? AND arm = ?", (rollout, wanted.arm)).fetchone()
        if (row[0] if row else 0) >= visit.most:
            return None
        self._db.execute(
            "INSERT INTO arms VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET joined = joined + 1", (rollout, wanted.arm)
        )  # fmt: skip
        new = (rollout, wanted.device, wanted.arm, wanted.hardware, wanted.joined, wanted.closes)
        self._db.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, NULL)", new)
        return replace(wanted, values=None)

    def _member(self, rollout: str, device: int) -> Membership | None:
        row = self._db.execute(f"{_MEMBER} AND device = ?", (rollout, device)).fetchone()
        return None if row is None else _member(row)

    def _sequence(self, device: int, least: int) -> int:
        insert = """INSERT INTO sequences VALUES (?, ?) ON CONFLICT DO UPDATE SET last = max(last + 1, excluded.last)
                    RETURNING last"""
        return int(self._db.execute(insert, (device, least)).fetchone()[0])


def _member(row: Any) -> Membership:
    device, arm, hardware, joined, closes, reported = row
    return Membership(device, arm, hardware, joined, closes, None if reported is None else json.loads(reported))
