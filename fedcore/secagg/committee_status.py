"""What a committee member has promised so far, read from its journal beside a running service. Nothing secret."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import Refused
from fedcore.secagg.records import HISTORY, History, Record

__all__ = ["OpenRound", "Status", "read_records", "status_of"]

_ATTEMPTS, _PAUSE = 5, 0.05


@dataclass(frozen=True)
class OpenRound:
    """A round that is not over: how far it is here (offered, approved, certified or released); ``expiry`` in Unix seconds."""

    task: str
    round: int
    expiry: int
    state: str


@dataclass(frozen=True)
class Status:
    """``approved`` counts all plans ever approved; ``closed`` is the highest round of each task that is over."""

    approved: int
    closed: Mapping[str, int]
    open: tuple[OpenRound, ...]


def status_of(records: Mapping[str, bytes]) -> Status:
    """What the records of a member's journal say.

    Raises:
        Refused: a record is none of a member's.
    """
    history, rounds, approved = History(0, ()), [], 0
    for name, data in records.items():
        if name == HISTORY:
            history = History.decode(data)
            continue
        record = Record.decode(data)
        approved += bool(record.plan_hash)
        steps = (("released", record.release), ("certified", record.survivors_hash), ("approved", record.plan_hash))
        state = next((step for step, done in steps if done), "offered")
        rounds.append(OpenRound(record.offer.task, record.offer.round, record.offer.expiry, state))
    closed = {entry.task: entry.round for entry in history.closed}
    return Status(history.approved + approved, closed, tuple(sorted(rounds, key=lambda one: (one.task, one.round))))


def read_records(directory: Path) -> dict[str, bytes]:
    """The records of a `FileJournal` that another process may be writing: none if there is no journal yet.

    A record that is replaced while it is read is overwritten with zeros and looks damaged; it is read again.

    Raises:
        Refused: a record stays damaged, or cannot be read.
    """
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            found = {path.stem: path.read_bytes() for path in sorted(directory.glob("*.record"))}
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused(f"{directory}: the journal cannot be read ({error.strerror})") from error
        damaged = [name for name, data in found.items() if hashlib.sha256(data[32:]).digest() != data[:32]]
        if not damaged:
            return {name: data[32:] for name, data in found.items()}
        problem = f"{directory / damaged[0]}.record: this record of the journal is damaged"
        time.sleep(_PAUSE)
    raise Refused(problem or f"{directory}: the journal changes too fast to be read")
