"""A committee as the code that drives a round sees it: members that answer bytes with bytes, wherever they run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.journal import FileJournal, Journal, MemoryJournal
from fedcore.secagg.keys import IDENTITY, SIGNING, new_directory, new_signing_key, read_message, read_signing_key, write_message
from fedcore.secagg.member import Member
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.plan import Policy
from fedcore.secagg.trust import sign_trust

__all__ = ["STEPS", "Clock", "CommitteeMember", "LocalCommittee", "LocalMember", "local_committee", "wall_clock"]

Clock = Callable[[], int]
STEPS = ("offer", "approve", "screen", "certify", "release")
_BUNDLE, _ENROLMENT, _JOURNAL = "trust.json", "enrolment", "journal"


class CommitteeMember(Protocol):
    """A member in this process (`LocalMember`) or at an operator's (`RemoteMember`). Requests and answers are those of `Member`.

    A member goes by its own clock, and erases by it what belongs to rounds that are over. Every request may be repeated: the
    answer has the same bytes. All steps raise what `Member` raises, and `TryAgain` if the member cannot answer now.
    """

    point: int

    def offer(self, request: bytes) -> bytes:
        """Answer an `OfferRequest` with the `Offer`."""
        ...

    def approve(self, proposal: bytes) -> bytes:
        """Answer a `Proposal` with the `Approval`."""
        ...

    def screen(self, request: bytes) -> bytes:
        """Answer a `ScreenRequest` with a `Screening`."""
        ...

    def certify(self, request: bytes) -> bytes:
        """Answer a `CertifyRequest` with the `Certification`."""
        ...

    def release(self, request: bytes) -> bytes:
        """Answer a `ReleaseRequest` with the `Release`."""
        ...

    def close(self) -> None:
        """Give up what this side holds: a journal or a connection."""
        ...


def wall_clock() -> int:
    """Unix seconds."""
    return int(time.time())


class LocalMember:
    """A member in this process. It separates no trust from whoever runs the process."""

    def __init__(self, point: int, member: Member, journal: Journal, clock: Clock) -> None:
        self.point = point
        self._member, self._journal, self._clock = member, journal, clock

    def offer(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._member.offer(request, self._clock())

    def approve(self, proposal: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._member.approve(proposal, self._clock())

    def screen(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._member.screen(request, self._clock())

    def certify(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._member.certify(request, self._clock())

    def release(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._member.release(request, self._clock())

    def expire(self) -> None:
        """Erase what belongs to rounds that are over. Every step does that too; this is for times without any."""
        self._member.expire(self._clock())

    def close(self) -> None:
        """See `CommitteeMember`."""
        if isinstance(self._journal, FileJournal):
            self._journal.close()


@dataclass(frozen=True)
class LocalCommittee:
    """A committee in one process, and the key that enrols its clients: for one machine, without any separation of trust."""

    trust: TrustBundle
    enrolment: Ed25519Key = field(repr=False)
    members: Mapping[int, LocalMember] = field(repr=False)

    def close(self) -> None:
        """Close all members."""
        for member in self.members.values():
            member.close()


def local_committee(
    m: int, t: int, c: int, population: str, policy: Policy, *,
    directory: Path | None = None, clock: Clock = wall_clock, random: RandomBytes = os.urandom,
) -> LocalCommittee:  # fmt: skip
    """m members of a committee with threshold t that stands c corrupt ones, each with a fresh key, in this process.

    With a ``directory`` keys and journals outlive the process: made there at first, found there afterwards. ``random`` draws the
    members' secrets; no two processes on one directory may draw the same.

    Raises:
        Refused: (m, t, c) is no safe committee, the directory holds another one, or its files are damaged.
        TryAgain: another process holds the directory.
    """
    if directory is None:
        identities, enrolment = [Ed25519Key(random(32)) for _ in range(m)], Ed25519Key(random(32))
        trust = sign_trust(Ed25519Key(random(32)), population, enrolment.public, t, c, [key.public for key in identities])
        journals: list[Journal] = [MemoryJournal() for _ in identities]
    else:
        if not directory.exists():
            _found(directory, m, t, c, population)
        trust = read_message(directory / _BUNDLE, TrustBundle)
        held = len(trust.member_keys), trust.threshold, trust.corrupt_members, trust.population
        if held != (m, t, c, population):
            raise Refused(f"{directory} holds the committee of (m, t, c, population) = {held}, not {(m, t, c, population)}")
        enrolment = read_signing_key(directory / _ENROLMENT / f"{SIGNING}.key")
        identities = [read_signing_key(_folder(directory, point) / f"{IDENTITY}.key") for point in range(1, m + 1)]
        journals = [FileJournal(_folder(directory, point) / _JOURNAL) for point in range(1, m + 1)]
    members = {
        point: LocalMember(point, Member(point, key, trust, policy, journal, random), journal, clock)
        for point, (key, journal) in enumerate(zip(identities, journals, strict=True), 1)
    }
    return LocalCommittee(trust, enrolment, members)


def _found(directory: Path, m: int, t: int, c: int, population: str) -> None:
    """Make the keys. The one that signs the bundle is forgotten: there will be no other bundle for this committee."""
    with new_directory(directory) as fresh:
        keys = []
        for point in range(1, m + 1):
            _folder(fresh, point).mkdir(mode=0o700)
            keys.append(new_signing_key(_folder(fresh, point), IDENTITY).public)
        (fresh / _ENROLMENT).mkdir(mode=0o700)
        enrolment = new_signing_key(fresh / _ENROLMENT, SIGNING)
        write_message(fresh / _BUNDLE, sign_trust(Ed25519Key(os.urandom(32)), population, enrolment.public, t, c, keys))


def _folder(directory: Path, point: int) -> Path:
    return directory / f"member-{point}"
