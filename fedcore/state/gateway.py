"""What gateways and a coordinator share: devices, the requests they sent, rounds, and the sums of what was uploaded.

A gateway keeps no state of its own. Everything here is one of a few facts in a `GatewayStore`, which several processes hold at
once; what a method says it did is on the disk when it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from fedcore.state.releases import ReleaseStore

__all__ = [
    "REQUEST_WINDOW", "Acceptance", "Admission", "Contribution", "Device", "GatewayStore", "Note", "Problem", "Round", "RoundState",
    "Standing", "Verdict",
]  # fmt: skip

REQUEST_WINDOW = 660.0
"""Seconds after which nothing that was signed before can arrive: twice the five minutes that clocks may differ, and a margin."""


class Standing(StrEnum):
    """What an identity may do."""

    ACTIVE = "active"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"  # its state was copied: two requests carried one number
    FORGOTTEN = "forgotten"  # its owner withdrew it; only its key and counter are kept, so that nobody takes its place


@dataclass(frozen=True)
class Device:
    """An enrolled device, with an ``id`` below 2^63. ``not_after``: end of its certificate; times are Unix seconds of the
    gateways' clock.

    ``counter`` (below 2^53) is the highest number of any of its requests, seen first at ``counted``. ``told`` is what it last
    said of itself (JSON), ``labels`` what the operator calls it. ``participations``: by task how many of its uploads were counted,
    and the last such round's number.
    """

    id: int
    algorithm: int
    public_key: bytes
    not_after: int
    enrolled: float
    standing: Standing = Standing.ACTIVE
    reason: str = ""
    last_seen: float = 0.0
    counter: int = 0
    counted: float = 0.0
    told: str = ""
    participations: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Admission:
    """A request whose signature is checked: its device, number and nonce, and what the device tells of itself, if it does."""

    device: int
    counter: int
    nonce: bytes
    told: str = ""


class Problem(StrEnum):
    """Why a request is not admitted."""

    UNKNOWN = "unknown"
    REPLAYED = "replayed"  # seen before, or signed before one that was
    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    FORGOTTEN = "forgotten"


@dataclass(frozen=True)
class Verdict:
    """What became of an `Admission`; ``device`` is as it was before it, None where it is unknown."""

    problem: Problem | None
    device: Device | None


class RoundState(StrEnum):
    """Where a round is; it goes only forward."""

    FORMING = "forming"  # devices check in for it
    RUNNING = "running"  # its cohort works
    CLOSED = "closed"  # nothing is counted any more


@dataclass(frozen=True)
class Round:
    """A round as gateways see it: ``key`` is never used again, ``version`` rises with every change, ``document`` is JSON."""

    key: str
    task: str
    number: int
    state: RoundState
    version: int
    document: str


@dataclass(frozen=True)
class Contribution:
    """An upload that goes into a round: who sent it, and the SHA-256 of its bytes."""

    device: int
    digest: bytes


@dataclass(frozen=True)
class Acceptance:
    """What became of several contributions: all of them were counted, or none because some devices (with the digests of what
    counts for them) have been, or because the round is not running."""

    counted: bool
    repeated: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """What a device says in a round; a later one of the same kind takes the place of the one before."""

    device: int
    text: str
    time: float


class GatewayStore(Protocol):
    """Shared, durable state. Methods raise `TryAgain` where the store is busy, full or away: nothing is known to have happened
    then, and the same call may be repeated. A store belongs to the thread that opened it. ``releases`` is its other part."""

    @property
    def releases(self) -> ReleaseStore:
        """Rollouts of releases, and what devices run."""
        ...

    def register(self, device: Device) -> Device:
        """Add a device, or give one of this id and key the new end of its certificate and its labels; the device as it is now.

        Raises:
            Refused: the id belongs to another key.
        """
        ...

    def device(self, device: int) -> Device | None:
        """The device of this id."""
        ...

    def devices(self) -> list[Device]:
        """All devices, by id."""
        ...

    def judge(self, device: int, standing: Standing, reason: str) -> None:
        """Change what a device may do, from its next request on. A revoked one stays revoked, unless it is forgotten, which
        erases what is known of it."""
        ...

    def label(self, device: int, labels: Sequence[str]) -> None:
        """Give a known device these labels."""
        ...

    def admit(self, requests: Sequence[Admission], now: float) -> list[Verdict]:
        """Admit requests, each number and nonce once; one commit for all, in their order.

        A number that two different requests carry, or one below the highest that comes later than any delayed request can,
        shows a copied identity, which is in quarantine from then on.
        """
        ...

    def advance(self, change: Round) -> bool:
        """Add a round (version 1) or replace version - 1 of it; False, without effect, if another version is there, or the round
        is over."""
        ...

    def rounds(self) -> dict[str, int]:
        """The versions of all rounds that are kept, by key."""
        ...

    def round(self, key: str) -> Round | None:
        """The round of this key."""
        ...

    def note(self, key: str, kind: str, notes: Sequence[Note]) -> None:
        """Keep what devices say in a round that exists."""
        ...

    def notes(self, key: str, kind: str) -> list[Note]:
        """What devices said in a round, by device."""
        ...

    def accept(self, key: str, writer: str, partial: bytes, contributions: Sequence[Contribution]) -> Acceptance:
        """Count contributions: keep ``partial``, the sum of everything that ``writer`` has added in this round, in place of what
        it was, and who is in it, in one commit.

        After a failure, a writer may not go on with its sum, since nobody knows what is kept; a new one may.
        """
        ...

    def contributions(self, key: str) -> list[Contribution]:
        """Everything that counts in a round, by device."""
        ...

    def partials(self, key: str) -> list[bytes]:
        """The sums of a round by all its writers; exactly `contributions`, once the round is closed."""
        ...

    def prune(self, now: float, before: float) -> None:
        """Forget what can come no more: requests older than `REQUEST_WINDOW`, and rounds that closed before ``before``."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...
