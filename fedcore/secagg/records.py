"""What a committee member's journal holds: one record an open round, and one of all rounds that are over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.secagg.encoding import TEXT, U64, Message, blob, coded, nested, sequence
from fedcore.secagg.messages import Offer

__all__ = ["HISTORY", "Closed", "History", "Record"]

HISTORY = "history"  # the name of the one record of that kind


@dataclass(frozen=True, slots=True)
class Record(Message):
    """One open round. Empty bytes: not yet, or no longer."""

    TAG: ClassVar[int] = 64
    offer: Offer = coded(nested(Offer))
    box_secret: bytes = coded(blob(32), secret=True)
    reveal: bytes = coded(blob(32), secret=True)
    plan_hash: bytes = coded(blob(32))
    survivors_hash: bytes = coded(blob(32))
    release: bytes = coded(blob(1 << 30), secret=True)


@dataclass(frozen=True, slots=True)
class Closed(Message):
    """The highest round of a task that is over."""

    TAG: ClassVar[int] = 65
    task: str = coded(TEXT)
    round: int = coded(U64)


@dataclass(frozen=True, slots=True)
class History(Message):
    """Rounds that are over: how many had a plan approved here, and how far each task has come."""

    TAG: ClassVar[int] = 66
    approved: int = coded(U64)
    closed: tuple[Closed, ...] = coded(sequence(nested(Closed), 1 << 20))
