"""The coordinator's way through a round with its committee: whom to ask, and what to do when somebody does not answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore.errors import Refused, RoundFailed, TryAgain
from fedcore.secagg.client import split_upload
from fedcore.secagg.committee import CommitteeMember, LocalMember
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.masks import Words, add_packed, zeros
from fedcore.secagg.messages import CheckIn, Header, Offer, OfferRequest, TrustBundle
from fedcore.secagg.participant import Visit
from fedcore.secagg.plan import Policy
from fedcore.secagg.trust import check_check_in, check_offer

__all__ = ["Committee", "MemberLost", "SecureRound"]


class MemberLost(TryAgain):
    """A member stands in the way of a round of which nothing has been opened; others may do without it."""

    def __init__(self, member: int, reason: str) -> None:
        super().__init__(f"member {member} {reason}")
        self.member = member


@dataclass(frozen=True)
class Committee:
    """Whom the coordinator asks, and by what it judges their answers and the plans it makes itself."""

    trust: TrustBundle
    policy: Policy
    members: Mapping[int, CommitteeMember]

    @property
    def separate(self) -> bool:
        """Whether the members are processes of others: those in this process separate no trust."""
        return not any(isinstance(member, LocalMember) for member in self.members.values())

    def close(self) -> None:
        """Close all members."""
        for member in self.members.values():
            member.close()


@dataclass
class SecureRound:
    """One attempt at a round: `offers`, `plan`, `receive` for every upload, `total`.

    ``silent`` says by member why it did not answer, ``seconds`` what the coordinator's own work took: verify, sum and unmask.
    """

    committee: Committee
    visit: Visit
    silent: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def offers(self) -> tuple[Offer, ...]:
        """The offers of all members that answer.

        Raises:
            RoundFailed: fewer than the threshold.
        """
        visit, found = self.visit, dict[int, Offer]()
        request = OfferRequest(visit.task, visit.epoch, visit.epoch, visit.expiry).encode()

        def receive(point: int, answer: bytes) -> None:
            offer = Offer.decode(answer)
            check_offer(offer, self.committee.trust, point)
            found[point] = offer

        self._each(sorted(self.committee.members), lambda _: request, "offer", receive)
        needed, m = self.committee.trust.threshold, len(self.committee.members)
        if len(found) < needed:
            reasons = "; ".join(f"member {point}: {reason}" for point, reason in self.silent.items())
            raise RoundFailed(f"{len(found)} of {m} committee members answer, {needed} are needed: {reasons}")
        return tuple(found[point] for point in sorted(found))

    def check(self, check_in: bytes) -> CheckIn:
        """A client's check-in for this attempt.

        Raises:
            Refused: it is none, or of nobody who is enrolled.
        """
        found = CheckIn.decode(check_in)
        check_check_in(found, self.committee.trust, self.visit.task, self.visit.epoch, self.visit.expiry)
        return found

    def plan(self, header: Header, check_ins: Sequence[CheckIn]) -> Coordinator:
        """The round's state machine, with the plan that the header's signers approved.

        Raises:
            MemberLost: one of them did not.
        """
        now = int(time.time())
        coordinator = Coordinator(header, check_ins, self.committee.trust, self.committee.policy, now)
        for point in header.signers:
            self._each([point], lambda _: coordinator.proposal(), "approve", coordinator.receive_approval)
            if point in self.silent:
                raise MemberLost(point, f"has not approved the plan: {self.silent[point]}")
        coordinator.plan(now)
        return coordinator

    def receive(self, coordinator: Coordinator, index: int, upload: bytes) -> memoryview:
        """The packed vector in a client's upload, once everything about it is checked.

        Raises:
            Refused: it is not one of this round.
        """
        with self._timed("verify"):
            head, vector = split_upload(upload)
            coordinator.receive_upload(index, head, vector)
        return vector

    def total(self, coordinator: Coordinator, header: Header, vectors: Mapping[int, memoryview]) -> Words:
        """The exact sum [length] modulo 2^b over the survivors, whom ``coordinator.survivors`` names then.

        Raises:
            RoundFailed: too few survivors or members; nothing is learnt.
            MemberLost: there would be enough survivors if this member had not refused their uploads.
        """
        self._each(header.points, coordinator.screen_request, "screen", coordinator.receive_screening)
        try:
            request = coordinator.certify_request()
        except RoundFailed as failure:
            refused = Counter(member for by_member in coordinator.refusals.values() for member in by_member)
            if not refused:
                raise
            member, count = refused.most_common(1)[0]
            reason = next(by_member[member] for by_member in coordinator.refusals.values() if member in by_member)
            raise MemberLost(member, f"refused {count} uploads ({reason}): {failure}") from failure
        self._each(header.points, lambda _: request, "certify", coordinator.receive_certification)
        self._each(header.points, coordinator.release_request, "release", coordinator.receive_release)
        with self._timed("sum"):
            total = zeros(header.length, header.bits)
            for index in coordinator.survivors:
                add_packed(total, vectors[index], header.bits)
        with self._timed("unmask"):
            coordinator.unmask(total)
        return total

    def _each(
        self, points: Sequence[int], request: Callable[[int], bytes], step: str, receive: Callable[[int, bytes], None]
    ) -> None:  # fmt: skip
        """Ask every member; what a member gets wrong is its own loss, as long as enough others answer."""
        for point in points:
            wanted = request(point)
            try:
                answer = getattr(self.committee.members[point], step)(wanted)
                with self._timed("verify"):
                    receive(point, answer)
            except (TryAgain, Refused) as error:
                self.silent[point] = str(error)

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)


class _Timer:
    """Adds the seconds of a block to an entry."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._start
