"""The coordinator's side of a round. It holds no secret: all that it learns is the sum.

Masked vectors are not kept here: whoever receives uploads keeps each vector as it came, and adds those of U with `add_packed`
once U is certified. `Coordinator.unmask` then turns the masked sum into the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedcore.errors import Refused, RoundFailed
from fedcore.secagg.crypto import ED25519, verify
from fedcore.secagg.dealing import commitment_to, share_leaf
from fedcore.secagg.masks import Words, add_masks, packed_length, reduce, subtract_masks, word_type
from fedcore.secagg.merkle import MerkleTree, leaf_hash, root_of
from fedcore.secagg.messages import (
    CERTIFICATION,
    RELEASE,
    SCREENING,
    Approval,
    Certification,
    CertifyRequest,
    CheckIn,
    DealerShares,
    Deposit,
    Entry,
    Header,
    Invitation,
    Link,
    Plan,
    Proposal,
    Release,
    ReleaseRequest,
    Screening,
    ScreenRequest,
    Statement,
    Survivor,
    Survivors,
    TrustBundle,
    UploadHead,
)
from fedcore.secagg.plan import CheckedPlan, Policy, check_approval, check_header, check_plan, hash_plan
from fedcore.secagg.shamir import combine, lagrange_at_zero
from fedcore.secagg.trust import blaming, check_cohort, member_key

__all__ = ["Coordinator"]


@dataclass(frozen=True)
class _Received:
    statement: Statement
    boxes: tuple[bytes, ...]


class Coordinator:
    """One round: ``header`` with its offers and signers, and the cohort's check-ins by index.

    Methods named ``receive_`` take a message and who sent it; what is wrong with one is a `Misbehaviour` of the sender, whom
    the caller leaves out. ``blamed`` says by party who broke the protocol, ``refusals`` which members refused which client.
    """

    def __init__(
        self, header: Header, check_ins: Sequence[CheckIn], trust: TrustBundle, policy: Policy, now: int
    ) -> None:  # fmt: skip
        check_header(header, trust, policy, now)
        check_cohort(check_ins, header, trust)
        self._header, self._check_ins, self._trust, self._policy = header, tuple(check_ins), trust, policy
        self._entries = [Entry(index, check_in).encode() for index, check_in in enumerate(check_ins)]
        self._tree = MerkleTree([leaf_hash(entry) for entry in self._entries])
        self._hash = hash_plan(header, self._tree.root)
        self._approvals: dict[int, Approval] = {}
        self._plan: tuple[Plan, CheckedPlan] | None = None
        self._received: dict[int, _Received] = {}
        self._shown: dict[int, Survivors] = {}
        self._screened: dict[int, set[int]] = {}  # by member, the clients whose uploads it has seen
        self._survivors: Survivors | None = None
        self._certifications: dict[int, Certification] = {}
        self._releases: dict[int, dict[int, DealerShares]] = {}
        self.blamed: dict[str, str] = {}
        self.refusals: dict[int, dict[int, str]] = {}

    def proposal(self) -> bytes:
        """The `Proposal` to each member of S."""
        return Proposal(self._header, self._check_ins).encode()

    def receive_approval(self, member: int, data: bytes) -> None:
        """Take a signer's `Approval`."""
        with blaming(f"member {member}"):
            approval = Approval.decode(data)
            if approval.member != member or member not in self._header.signers:
                raise Refused("it is not asked for this approval")
            check_approval(approval, self._header, self._hash, self._trust)
        self._approvals[member] = approval

    def plan(self, now: int) -> CheckedPlan:
        """The plan that all of S approved.

        Raises:
            RoundFailed: an approval is missing; the round number is used up.
        """
        if self._plan is None:
            missing = [member for member in self._header.signers if member not in self._approvals]
            if missing:
                raise RoundFailed(f"members {missing} have not approved the plan; try again with others as a new round")
            plan = Plan(self._header, self._tree.root, tuple(self._approvals[member] for member in self._header.signers))
            self._plan = plan, check_plan(plan, self._trust, self._policy, now)
        return self._plan[1]

    def invitation(self, index: int) -> bytes:
        """The `Invitation` to one client."""
        plan, checked = self._agreed
        neighbours = tuple(self._link(j) for j in checked.graph.neighbours(index))
        return Invitation(plan, self._link(index), neighbours).encode()

    def receive_upload(self, index: int, head: bytes, vector: bytes | memoryview) -> None:
        """Take an upload (see `split_upload`). The vector is checked, not kept; a second upload of a client is refused."""
        checked = self._agreed[1]
        if not 0 <= index < self._header.clients:
            raise Refused(f"there is no client {index} in a cohort of {self._header.clients}")
        certificate = self._check_ins[index].certificate
        with blaming(f"client {index} ({certificate.name})"):
            if self._survivors is not None or index in self._received:
                raise Refused("its upload comes too late or twice")
            message = UploadHead.decode(head)
            if len(vector) != packed_length(self._header.length, self._header.bits):
                raise Refused(f"its vector has {len(vector)} bytes")
            checked.check_statement(message.statement, certificate, index)
            if hashlib.sha256(vector).digest() != message.statement.vector_hash:
                raise Refused("its vector is not the one that it signed")
            if tuple(hashlib.sha256(box).digest() for box in message.boxes) != message.statement.box_hashes:
                raise Refused("its boxes are not those that it signed")
        self._received[index] = _Received(message.statement, message.boxes)

    def screen_request(self, member: int) -> bytes:
        """The `ScreenRequest` to a member, over all uploads so far; asked again, the answer over the later ones counts."""
        plan, _ = self._agreed
        indices = sorted(self._received)
        self._shown[member] = Survivors(self._listed(indices))
        return ScreenRequest(plan, tuple(self._deposit(index, member) for index in indices)).encode()

    def receive_screening(self, member: int, data: bytes) -> None:
        """Take a member's `Screening` of the uploads that it was shown last."""
        with blaming(f"member {member}"):
            answer = Screening.decode(data)
            if member not in self._shown:
                raise Refused("it is not asked for this screening")
            shown = self._shown[member]
            if (answer.member, answer.plan_hash, answer.examined) != (member, self._hash, shown.hash):
                raise Refused("its screening is not over the uploads that it was shown")
            verify(ED25519, member_key(self._trust, member), answer.signature, SCREENING, answer.content())
            indices = {survivor.index for survivor in shown.clients}
            if not {refusal.index for refusal in answer.refused} <= indices:
                raise Refused("it refuses clients that it was not shown")
        self._screened[member] = indices
        for refusal in answer.refused:
            self.refusals.setdefault(refusal.index, {})[member] = refusal.reason

    def certify_request(self) -> bytes:
        """Fix U, all uploads that t members have screened and none has refused, and ask the members to certify it.

        Raises:
            RoundFailed: U is not one that they could certify.
        """
        plan, checked = self._agreed
        if self._survivors is None:
            survivors = Survivors(self._listed([index for index in sorted(self._received) if self._is_screened(index)]))
            try:
                checked.check_survivors(survivors)
            except Refused as error:
                raise RoundFailed(f"the round is given up: {error}") from None
            self._survivors = survivors
        return CertifyRequest(plan, self._survivors).encode()

    @property
    def fixed(self) -> bool:
        """Whether U is fixed."""
        return self._survivors is not None

    @property
    def survivors(self) -> tuple[int, ...]:
        """U, once it is fixed."""
        if self._survivors is None:
            raise RoundFailed("the survivors are not fixed yet")
        return tuple(survivor.index for survivor in self._survivors.clients)

    def receive_certification(self, member: int, data: bytes) -> None:
        """Take a member's `Certification` of U."""
        with blaming(f"member {member}"):
            answer = Certification.decode(data)
            expected = (member, self._header.task, self._header.round, self._hash, self._fixed.hash)
            if (answer.member, answer.task, answer.round, answer.plan_hash, answer.survivors_hash) != expected:
                raise Refused("it certifies another round, plan or set of survivors")
            verify(ED25519, member_key(self._trust, member), answer.signature, CERTIFICATION, answer.content())
        self._certifications[member] = answer

    def release_request(self, member: int) -> bytes:
        """The `ReleaseRequest` to a member. The privacy ledger is charged before the first of them is sent.

        Raises:
            RoundFailed: fewer than t members certified U; nothing may be added or asked for then.
        """
        plan, _ = self._agreed
        if len(self._certifications) < self._header.threshold:
            raise RoundFailed(f"{len(self._certifications)} members certified the survivors; {self._header.threshold} are needed")
        certifications = tuple(self._certifications[member] for member in sorted(self._certifications))[: self._header.threshold]
        deposits = tuple(self._deposit(index, member) for index in self.survivors)
        return ReleaseRequest(plan, self._fixed, certifications, deposits).encode()

    def receive_release(self, member: int, data: bytes) -> None:
        """Take a member's `Release`. One share that is not under its client's signed root, and the whole is a lie of the member."""
        try:
            with blaming(f"member {member}"):
                answer = Release.decode(data)
                if (answer.member, answer.plan_hash, answer.survivors_hash) != (member, self._hash, self._fixed.hash):
                    raise Refused("its release is for another plan or set of survivors")
                if member not in self._header.points:
                    raise Refused("it made no offer for this round")
                verify(ED25519, member_key(self._trust, member), answer.signature, RELEASE, answer.content())
                self._check_release(answer)
        except Refused as error:
            self.blamed[f"member {member}"] = str(error)
            raise
        self._releases[member] = {dealer.index: dealer for dealer in answer.dealers}
        for refusal in answer.refused:
            self.refusals.setdefault(refusal.index, {})[member] = refusal.reason

    def unmask(self, total: Words) -> None:
        """Turn the sum of all survivors' masked vectors, in words, into their exact sum modulo 2^b, in place.

        Raises:
            RoundFailed: too few members released shares, or a client dealt shares of something else than it committed to; the
                client is in ``blamed``. The total stays masked.
            Refused: the total is no vector of this round.
        """
        if total.shape != (self._header.length,) or total.dtype != word_type(self._header.bits):
            raise Refused(f"a sum of this round has {self._header.length} words, got {total.shape} of {total.dtype}")
        masks = self._masks()
        add_masks(total, [seed for add, seed in masks if add])
        subtract_masks(total, [seed for add, seed in masks if not add])
        reduce(total, self._header.bits)

    def _masks(self) -> list[tuple[bool, bytes]]:
        """The seeds of all masks in the sum, with whether the mask is to be added back."""
        alive, graph = set(self.survivors), self._agreed[1].graph
        coefficients: dict[tuple[int, ...], list[int]] = {}
        masks: list[tuple[bool, bytes]] = []
        liars = []
        for index in self.survivors:
            members = self._answering(index)
            if members not in coefficients:
                coefficients[members] = lagrange_at_zero(members)
            dropped = [(1 + r, j) for r, j in enumerate(graph.neighbours(index)) if j not in alive]
            columns = zip(*(self._releases[member][index].shares for member in members), strict=True)
            try:
                for (slot, other), shares in zip([(0, index), *dropped], columns, strict=True):
                    seed = combine(coefficients[members], shares)
                    if commitment_to(seed) != self._received[index].statement.commitments[slot]:
                        raise Refused(f"slot {slot}")
                    masks.append((other < index, seed))
            except Refused:
                liars.append(index)
        if liars:
            names = [f"client {index} ({self._check_ins[index].certificate.name})" for index in liars]
            self.blamed.update(dict.fromkeys(names, "it dealt shares of something else than it committed to"))
            raise RoundFailed(f"the round is lost: shares do not give the committed seed, dealt by {', '.join(names)}")
        return masks

    def _answering(self, index: int) -> tuple[int, ...]:
        """The first t members that released this client's shares."""
        members = tuple(member for member in sorted(self._releases) if index in self._releases[member])
        if len(members) < self._header.threshold:
            raise RoundFailed(f"{len(members)} members released the shares of client {index}; {self._header.threshold} are needed")
        return members[: self._header.threshold]

    def _check_release(self, answer: Release) -> None:
        alive, graph = set(self.survivors), self._agreed[1].graph
        named = sorted([dealer.index for dealer in answer.dealers] + [refusal.index for refusal in answer.refused])
        if named != list(self.survivors):
            raise Refused("its release is not over the survivors, once each")
        column = self._header.points.index(answer.member)
        for dealer in answer.dealers:
            index, statement = dealer.index, self._received[dealer.index].statement
            slots = [0, *(1 + r for r, j in enumerate(graph.neighbours(index)) if j not in alive)]
            if len(dealer.shares) != len(slots) or len(dealer.leaves) != self._header.degree + 1:
                raise Refused(f"its release has another number of shares of client {index}")
            if root_of(dealer.leaves) != statement.roots[column]:
                raise Refused(f"its leaves of client {index} are not under that client's signed root")
            for slot, share in zip(slots, dealer.shares, strict=True):
                if share_leaf(self._hash, index, answer.member, slot, share) != dealer.leaves[slot]:
                    raise Refused(f"its share of slot {slot} of client {index} is not under that client's signed root")

    def _deposit(self, index: int, member: int) -> Deposit:
        received = self._received[index]
        return Deposit(self._link(index), received.statement, received.boxes[self._header.points.index(member)])

    def _link(self, index: int) -> Link:
        return Link(self._entries[index], self._tree.path(index))

    def _is_screened(self, index: int) -> bool:
        seen = sum(index in indices for indices in self._screened.values())
        return index not in self.refusals and seen >= self._header.threshold

    def _listed(self, indices: Sequence[int]) -> tuple[Survivor, ...]:
        return tuple(Survivor(index, self._received[index].statement.hash) for index in indices)

    @property
    def _agreed(self) -> tuple[Plan, CheckedPlan]:
        if self._plan is None:
            raise RoundFailed("the plan is not approved yet")
        return self._plan

    @property
    def _fixed(self) -> Survivors:
        if self._survivors is None:
            raise RoundFailed("the survivors are not fixed yet")
        return self._survivors
