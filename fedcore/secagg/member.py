"""A committee member's side of a round: offer, approve, screen, certify, release. It keeps what it promised, and no key longer
than it is needed.

Everything it must never contradict is in its journal before it answers: after a crash at any point it answers the same or not
at all. For one (task, round) there is one offer, one approved plan, one U, one release. Rounds of a task are numbered upwards; a
round that is over is never opened again.
"""

from __future__ import annotations

import dataclasses
import hashlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import ED25519, Signer, digest, open_box, verify
from fedcore.secagg.dealing import share_leaves, shares_in
from fedcore.secagg.journal import Journal
from fedcore.secagg.merkle import MerkleTree, leaf_hash, root_of
from fedcore.secagg.messages import (
    APPROVAL,
    CERTIFICATION,
    OFFER,
    RELEASE,
    SCREENING,
    Approval,
    Certification,
    CertifyRequest,
    DealerShares,
    Deposit,
    Entry,
    Offer,
    OfferRequest,
    Plan,
    Proposal,
    Refusal,
    Release,
    ReleaseRequest,
    Screening,
    ScreenRequest,
    Survivor,
    Survivors,
    TrustBundle,
)
from fedcore.secagg.plan import CheckedPlan, Policy, check_header, check_plan, hash_plan
from fedcore.secagg.records import HISTORY, Closed, History, Record
from fedcore.secagg.trust import about, blaming, check_cohort, member_key

__all__ = ["MOST_ROUNDS", "Member", "rounds_of_a_member"]

MOST_ROUNDS = 1_000_000  # of one committee, for which the graphs' separation bound adds up to 2^-40
_MOST_OPEN = 1024
_MOST_TASKS = 65536
_NONE = b""


class Member:
    """Member ``point`` of the pinned committee. Every method takes and returns bytes; ``now`` is in Unix seconds.

    What a request has wrong is a `Misbehaviour` of the coordinator, and nothing is recorded then.
    """

    def __init__(
        self, point: int, identity: Signer, trust: TrustBundle, policy: Policy, journal: Journal, random: RandomBytes
    ) -> None:  # fmt: skip
        if member_key(trust, point) != identity.public:
            raise Refused(f"the trust bundle does not name this key as member {point}")
        self._point, self._identity = point, identity
        self._trust, self._policy, self._journal, self._random = trust, policy, journal, random
        self._records: dict[tuple[str, int], Record] = {}
        self._history = History(0, ())
        for name, data in journal.read().items():
            if name == HISTORY:
                self._history = History.decode(data)
            else:
                record = Record.decode(data)
                self._records[record.offer.task, record.offer.round] = record

    def expire(self, now: int) -> None:
        """Close the rounds whose time is over: their keys and shares are gone from the journal afterwards."""
        for key, record in list(self._records.items()):
            if record.offer.expiry <= now:
                closed = {entry.task: entry.round for entry in self._history.closed}
                closed[key[0]] = max(key[1], closed.get(key[0], 0))
                approved = self._history.approved + bool(record.plan_hash)
                history = History(approved, tuple(Closed(task, number) for task, number in sorted(closed.items())))
                # The record goes last: a crash between the two may count the round twice, but never forgets it.
                self._journal.write(HISTORY, history.encode())
                self._history = history
                self._journal.erase(_name(*key))
                del self._records[key]

    def offer(self, request: bytes, now: int) -> bytes:
        """Answer an `OfferRequest` with this member's one `Offer` for the round."""
        self.expire(now)
        with blaming("coordinator"):
            wanted = OfferRequest.decode(request)
            record = self._records.get((wanted.task, wanted.round))
            if record is None:
                self._check_new_round(wanted, now)
                record = self._new_record(wanted)
                self._keep(record)
            if (record.offer.epoch, record.offer.expiry) != (wanted.epoch, wanted.expiry):
                raise Refused(f"round {wanted.round} of {wanted.task!r} was offered with another epoch or expiry")
            return record.offer.encode()

    def approve(self, proposal: bytes, now: int) -> bytes:
        """Answer a `Proposal`, after every check, with this member's one `Approval` for the round."""
        self.expire(now)
        with blaming("coordinator"):
            message = Proposal.decode(proposal)
            header = message.header
            check_header(header, self._trust, self._policy, now)
            if self._point not in header.signers:
                raise Refused(f"member {self._point} is not one of those whom the plan asks for approval")
            record = self._record(header.task, header.round, header.offers)
            check_cohort(message.check_ins, header, self._trust)
            entries = [Entry(index, check_in) for index, check_in in enumerate(message.check_ins)]
            plan_hash = hash_plan(header, MerkleTree([leaf_hash(entry.encode()) for entry in entries]).root)
            if record.plan_hash not in {_NONE, plan_hash}:
                raise Refused(f"another plan for round {header.round} of {header.task!r} is approved already")
            if not record.reveal:
                raise Refused(f"round {header.round} of {header.task!r} is released already")
            if not record.plan_hash:
                self._check_count()
                self._keep(dataclasses.replace(record, plan_hash=plan_hash))
            parts = (self._point, plan_hash, record.reveal)
            return Approval(*parts, self._identity.sign(APPROVAL, Approval(*parts, bytes(64)).content())).encode()

    def screen(self, request: bytes, now: int) -> bytes:
        """Answer a `ScreenRequest` with the uploads that this member could not release; nothing is recorded."""
        self.expire(now)
        with blaming("coordinator"):
            message = ScreenRequest.decode(request)
            plan, record = self._plan(message.plan, now)
            if not record.box_secret:
                raise Refused("the round is released already")
            refused, seen = [], []
            for deposit in message.deposits:
                index, shares = self._open(plan, record, deposit)
                seen.append(Survivor(index, deposit.statement.hash))
                if isinstance(shares, str):
                    refused.append(Refusal(index, shares))
            parts = (self._point, plan.hash, Survivors(tuple(seen)).hash, tuple(refused))
            return Screening(*parts, self._identity.sign(SCREENING, Screening(*parts, bytes(64)).content())).encode()

    def certify(self, request: bytes, now: int) -> bytes:
        """Answer a `CertifyRequest` with this member's one `Certification` for the round."""
        self.expire(now)
        with blaming("coordinator"):
            message = CertifyRequest.decode(request)
            plan, record = self._plan(message.plan, now)
            self._check_survivors(plan, message.survivors)
            self._keep(self._with_survivors(record, plan, message.survivors))
            header = plan.header
            parts = (self._point, header.task, header.round, plan.hash, message.survivors.hash)
            signature = self._identity.sign(CERTIFICATION, Certification(*parts, bytes(64)).content())
            return Certification(*parts, signature).encode()

    def release(self, request: bytes, now: int) -> bytes:
        """Answer a `ReleaseRequest` that t members certified with this member's one `Release`; the round's keys are gone then."""
        self.expire(now)
        with blaming("coordinator"):
            message = ReleaseRequest.decode(request)
            plan, record = self._plan(message.plan, now)
            self._check_survivors(plan, message.survivors)
            self._check_certified(plan, message)
            record = self._with_survivors(record, plan, message.survivors)
            if record.release:
                return record.release
            answer = self._released(plan, record, message)
            self._keep(dataclasses.replace(record, box_secret=_NONE, reveal=_NONE, release=answer))
            return answer

    def _check_survivors(self, plan: CheckedPlan, survivors: Survivors) -> None:
        plan.check_survivors(survivors)

    def _check_certified(self, plan: CheckedPlan, request: ReleaseRequest) -> None:
        """t distinct members signed this task, round, plan and U."""
        header = plan.header
        signed = set()
        for one in request.certifications:
            if (one.task, one.round, one.plan_hash, one.survivors_hash) != (
                header.task, header.round, plan.hash, request.survivors.hash,
            ):  # fmt: skip
                raise Refused(f"the certification of member {one.member} is for another round, plan or set of survivors")
            with about(f"the certification of member {one.member}"):
                verify(ED25519, member_key(self._trust, one.member), one.signature, CERTIFICATION, one.content())
            signed.add(one.member)
        if len(signed) < header.threshold:
            raise Refused(f"{len(signed)} members certified these survivors; {header.threshold} are needed")

    def _released(self, plan: CheckedPlan, record: Record, request: ReleaseRequest) -> bytes:
        """The shares of b_i for i in U, and of s_ij for i in U, j in N(i) outside U; nothing else."""
        alive = {survivor.index for survivor in request.survivors.clients}
        if len(request.deposits) != len(alive):
            raise Refused(f"{len(alive)} survivors need as many deposits, got {len(request.deposits)}")
        dealers, refused = [], []
        for survivor, deposit in zip(request.survivors.clients, request.deposits, strict=True):
            index, shares = self._open(plan, record, deposit)
            if (index, deposit.statement.hash) != (survivor.index, survivor.statement_hash):
                raise Refused(f"the deposit of client {index} is not the certified one of client {survivor.index}")
            if isinstance(shares, str):
                refused.append(Refusal(index, shares))
                continue
            wanted = [0, *(1 + r for r, j in enumerate(plan.graph.neighbours(index)) if j not in alive)]
            leaves = tuple(share_leaves(plan.hash, index, self._point, shares))
            dealers.append(DealerShares(index, leaves, tuple(shares[slot] for slot in wanted)))
        parts = (self._point, plan.hash, request.survivors.hash, tuple(dealers), tuple(refused))
        return Release(*parts, self._identity.sign(RELEASE, Release(*parts, bytes(64)).content())).encode()

    def _open(self, plan: CheckedPlan, record: Record, deposit: Deposit) -> tuple[int, list[bytes] | str]:
        """The client's index, and its shares for this member, or why there are none.

        Raises:
            Refused: the coordinator handed over what the client did not send, which is no fault of the client.
        """
        entry = plan.check_link(deposit.link)
        index, statement = entry.index, deposit.statement
        try:
            plan.check_statement(statement, entry.check_in.certificate, index)
        except Refused:
            return index, "its signed statement is not one for this plan"
        column = plan.header.points.index(self._point)
        if hashlib.sha256(deposit.box).digest() != statement.box_hashes[column]:
            raise Refused(f"the box of client {index} is not the one that it signed")
        try:
            secret = X25519PrivateKey.from_private_bytes(record.box_secret)
            shares = shares_in(open_box(secret, plan.hash, index, self._point, deposit.box), plan.header.degree + 1)
        except Refused:
            return index, "its box does not open to as many shares as slots"
        if root_of(share_leaves(plan.hash, index, self._point, shares)) != statement.roots[column]:
            return index, "its shares are not those under its signed root"
        return index, shares

    def _plan(self, plan: Plan, now: int) -> tuple[CheckedPlan, Record]:
        checked = check_plan(plan, self._trust, self._policy, now)
        header = checked.header
        record = self._record(header.task, header.round, header.offers)
        if record.plan_hash not in {_NONE, checked.hash}:
            raise Refused(f"another plan for round {header.round} of {header.task!r} is approved already")
        return checked, record

    def _record(self, task: str, number: int, offers: tuple[Offer, ...]) -> Record:
        record = self._records.get((task, number))
        if record is None:
            raise Refused(f"round {number} of {task!r} is not open")
        if record.offer not in offers:
            raise Refused(f"the plan does not contain the offer of member {self._point}")
        return record

    def _with_survivors(self, record: Record, plan: CheckedPlan, survivors: Survivors) -> Record:
        if record.survivors_hash not in {_NONE, survivors.hash}:
            raise Refused(f"other survivors of round {plan.header.round} of {plan.header.task!r} are certified already")
        return dataclasses.replace(record, plan_hash=plan.hash, survivors_hash=survivors.hash)

    def _check_new_round(self, wanted: OfferRequest, now: int) -> None:
        closed = {entry.task: entry.round for entry in self._history.closed}
        if wanted.round <= closed.get(wanted.task, -1):
            raise Refused(f"round {wanted.round} of {wanted.task!r} is over; its number is never used again")
        if not now < wanted.expiry <= now + self._policy.longest_round:
            raise Refused(f"the round would end at {wanted.expiry}, not within {self._policy.longest_round} s after {now}")
        if len(self._records) >= _MOST_OPEN:
            raise Refused(f"{_MOST_OPEN} rounds are open; wait for one to end")
        if wanted.task not in closed and len(closed) >= _MOST_TASKS:
            raise Refused(f"this member has served {_MOST_TASKS} tasks; a committee with new keys is needed")
        self._check_count()

    def _check_count(self) -> None:
        most = rounds_of_a_member(self._trust)
        if self._history.approved + sum(bool(record.plan_hash) for record in self._records.values()) >= most:
            raise Refused(f"this member has taken part in {most} rounds; a committee with new keys is needed")

    def _new_record(self, wanted: OfferRequest) -> Record:
        secret, reveal = self._random(32), self._random(32)
        key = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        parts = (self._point, wanted.task, wanted.round, wanted.epoch, wanted.expiry, key, digest("reveal", reveal))
        offer = Offer(*parts, self._identity.sign(OFFER, Offer(*parts, bytes(64)).content()))
        return Record(offer, secret, reveal, _NONE, _NONE, _NONE)

    def _keep(self, record: Record) -> None:
        key = record.offer.task, record.offer.round
        if self._records.get(key) != record:
            self._journal.write(_name(*key), record.encode())
            self._records[key] = record


def rounds_of_a_member(trust: TrustBundle) -> int:
    """Rounds that each member may approve so that the committee approves `MOST_ROUNDS` at most.

    A plan takes t - c honest approvals or more, of the m - c or more honest members.
    """
    m, t, c = len(trust.member_keys), trust.threshold, trust.corrupt_members
    return MOST_ROUNDS * (t - c) // (m - c)


def _name(task: str, number: int) -> str:
    return hashlib.sha256(f"{number} {task}".encode()).hexdigest()
