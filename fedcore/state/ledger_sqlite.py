"""A privacy ledger in a SQLite file of its own."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedcore import durable
from fedcore.errors import Refused, TryAgain
from fedcore.privacy.ledger import PositionTaken
from fedcore.state.sqlite import transaction

__all__ = ["SqliteLedger"]

_APPLICATION = 0x46434C31  # "FCL1"
_EXTRA = 3
_SCHEMA = (
    "CREATE TABLE entries (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, entry TEXT NOT NULL)",
    "CREATE TABLE confirmed (one INTEGER PRIMARY KEY CHECK (one = 1), times INTEGER NOT NULL)",
    "INSERT INTO confirmed VALUES (1, 0)",
    f"PRAGMA application_id = {_APPLICATION}",
)


class SqliteLedger:
    """A `LedgerStore` in one file; several processes of one machine may hold it. With ``write`` it is created if missing."""

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self._path = path
        if not write and not path.is_file():
            raise Refused(f"{path}: there is no privacy ledger; a run with [privacy] writes one")
        with self._clear_errors():
            if write:
                _make_durable_directory(path.parent)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it names who took part
            uri = f"file:{quote(str(path.absolute()))}?mode={'rwc' if write else 'rw'}"
            self._db = sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)
            try:
                self._prepare(write)
            except BaseException:
                self._db.close()
                raise

    def entries(self, start: int = 0) -> list[dict[str, Any]]:
        """See `LedgerStore`."""
        with self._clear_errors():
            rows = self._db.execute(
                "SELECT position, entry FROM entries WHERE position >= ? ORDER BY position", (start,)
            ).fetchall()
        found = []
        for number, (position, text) in enumerate(rows, start):
            try:
                found.append(dict(json.loads(text)))
            except (TypeError, ValueError) as error:
                raise Refused(f"{self._path}: is damaged (entry {number} cannot be read)") from error
            if position != number:
                raise Refused(f"{self._path}: is damaged (entry {number} is missing)")
        return found

    def append(self, position: int, key: str, entry: Mapping[str, Any]) -> None:
        """See `LedgerStore`."""
        with self._clear_errors(), transaction(self._db):
            (count,) = self._db.execute("SELECT COUNT(*) FROM entries").fetchone()
            if count != position:
                raise PositionTaken(f"{self._path}: the ledger has {count} entries, not {position}")
            try:
                self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (position, key, json.dumps(entry)))
            except sqlite3.IntegrityError:
                raise PositionTaken(f"{self._path}: the ledger has an entry for {key} already") from None

    def confirm(self) -> None:
        """See `LedgerStore`."""
        with self._clear_errors(), transaction(self._db):  # syncs the file, and the end of the transaction before it
            self._db.execute("UPDATE confirmed SET times = times + 1")

    def close(self) -> None:
        """See `LedgerStore`."""
        self._db.close()

    def _prepare(self, write: bool) -> None:
        """Settings under which a commit is on the disk when it returns, and the schema of a new file."""
        self._db.execute("PRAGMA fullfsync = ON")  # macOS: past the drive's cache
        self._db.execute("PRAGMA synchronous = EXTRA")
        if self._ledger_id() == 0 and write:
            with transaction(self._db):
                tables = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
                for statement in _SCHEMA if self._ledger_id() == 0 and tables == 0 else ():
                    self._db.execute(statement)
        if self._ledger_id() != _APPLICATION:
            raise Refused(f"{self._path}: is not a privacy ledger")
        if write:
            (mode,) = self._db.execute("PRAGMA journal_mode = DELETE").fetchone()
            (synchronous,) = self._db.execute("PRAGMA synchronous").fetchone()
            if (mode, synchronous) != ("delete", _EXTRA):
                raise Refused(f"{self._path}: this SQLite does not sync every commit (journal {mode}, synchronous {synchronous})")
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise Refused(f"{self._path}: is damaged ({verdict})")

    def _ledger_id(self) -> int:
        return int(self._db.execute("PRAGMA application_id").fetchone()[0])

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise TryAgain(f"{self._path}: another process is writing to this ledger") from error
            raise TryAgain(f"{self._path}: the ledger cannot be used ({error}); nothing counts as charged") from error
        except sqlite3.DatabaseError as error:
            raise Refused(f"{self._path}: is damaged or no ledger ({error})") from error
        except OSError as error:
            raise TryAgain(f"{self._path}: the ledger cannot be used ({error.strerror}); nothing counts as charged") from error


def _make_durable_directory(directory: Path) -> None:
    """Create ``directory`` so that a power failure cannot take it, with the ledger in it, away again."""
    missing = [one for one in (directory.absolute(), *directory.absolute().parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for one in {directory.absolute(), *(made.parent for made in missing)}:
        durable.sync(one)
