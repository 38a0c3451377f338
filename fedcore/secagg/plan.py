"""What a party checks before it acts on a plan: the committee it pins, the floors it was given, and what follows from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedcore.errors import Refused
from fedcore.privacy.skellam import LARGEST_DIMENSION, SkellamPlan, plan_skellam
from fedcore.secagg.crypto import ED25519, SUITE, digest, verify
from fedcore.secagg.masks import WIDTHS
from fedcore.secagg.merkle import check_path, leaf_hash
from fedcore.secagg.messages import (
    APPROVAL,
    LARGEST_COHORT,
    STATEMENT,
    Approval,
    Certificate,
    Entry,
    Header,
    Link,
    Plan,
    Statement,
    Survivors,
    TrustBundle,
)
from fedcore.secagg.neighbours import Graph, check_degree
from fedcore.secagg.trust import about, check_offer, member_key

__all__ = ["CheckedPlan", "Policy", "check_approval", "check_header", "check_plan", "hash_plan", "skellam_plan"]


@dataclass(frozen=True)
class Policy:
    """The least that a client or member demands of a plan, whoever proposes it. ``longest_round`` is in seconds."""

    minimum_survivors: int
    corrupt_clients: int
    noise_multiplier: float
    longest_round: int = 24 * 3600


@dataclass(frozen=True)
class CheckedPlan:
    """A plan that all of S approved and that this party's own policy allows."""

    header: Header
    root: bytes
    hash: bytes
    seed: bytes

    @cached_property
    def graph(self) -> Graph:
        """Who masks with whom."""
        return Graph(self.seed, self.header.clients, self.header.degree, self.header.window_survivors)

    def check_link(self, link: Link) -> Entry:
        """The entry that a link shows to be in this plan's cohort.

        Raises:
            Refused: it is not in the cohort.
        """
        entry = Entry.decode(link.entry)
        try:
            check_path(leaf_hash(link.entry), entry.index, self.header.clients, link.path, self.root)
        except Refused as error:
            raise Refused(f"client {entry.index} is not in the cohort: {error}") from None
        return entry

    def check_statement(self, statement: Statement, certificate: Certificate, index: int) -> None:
        """Check that a client signed this statement for this plan, with as many boxes and slots as the plan asks for.

        Raises:
            Refused: it did not.
        """
        if statement.plan_hash != self.hash:
            raise Refused("the upload is for another plan")
        if statement.index != index:
            raise Refused(f"the upload is that of client {statement.index}, not {index}")
        members, slots = len(self.header.offers), self.header.degree + 1
        if (len(statement.box_hashes), len(statement.roots), len(statement.commitments)) != (members, members, slots):
            raise Refused(f"an upload of this plan has {members} boxes of {slots} slots")
        verify(certificate.algorithm, certificate.public_key, statement.signature, STATEMENT, statement.content())

    def check_survivors(self, survivors: Survivors) -> None:
        """Check U: in order, within the cohort, at least n_min, and D in every window.

        Raises:
            Refused: the sum over U may say too much.
        """
        indices = [survivor.index for survivor in survivors.clients]
        if any(a >= b for a, b in itertools.pairwise(indices)) or any(i >= self.header.clients for i in indices):
            raise Refused(f"survivors are named once each, in ascending order, below {self.header.clients}")
        if len(indices) < self.header.minimum_survivors:
            raise Refused(f"{len(indices)} survivors are fewer than the {self.header.minimum_survivors} that the plan demands")
        self.graph.check_survivors(indices)


def check_header(header: Header, trust: TrustBundle, policy: Policy, now: int) -> None:
    """Check everything in a header that a party can check alone, against the committee it pins and its own floors.

    Raises:
        Refused: with the number that is wrong and what is allowed.
    """
    if header.suite != SUITE:
        raise Refused(f"suite {header.suite} is not known; this version speaks {SUITE}")
    if not now < header.expiry <= now + policy.longest_round:
        raise Refused(f"the round ends at {header.expiry}, which is not within {policy.longest_round} s after {now}")
    _check_committee(header, trust)
    _check_clients(header, policy)
    _check_vector(header, policy)


def hash_plan(header: Header, root: bytes) -> bytes:
    """What S signs: H(domain | canonical header | root)."""
    return digest("plan hash", header.encode(), root)


def check_approval(approval: Approval, header: Header, plan_hash: bytes, trust: TrustBundle) -> None:
    """Check one signer's approval.

    Raises:
        Refused: it is for another plan, its reveal is not the one offered, or its signature is wrong.
    """
    if approval.plan_hash != plan_hash:
        raise Refused("it is for another plan")
    if digest("reveal", approval.reveal) not in {o.commitment for o in header.offers if o.member == approval.member}:
        raise Refused("its reveal is not the one that was offered")
    verify(ED25519, member_key(trust, approval.member), approval.signature, APPROVAL, approval.content())


def check_plan(plan: Plan, trust: TrustBundle, policy: Policy, now: int) -> CheckedPlan:
    """Check a plan with its approvals, and derive the seed H(domain | plan hash | reveals of S in order).

    Raises:
        Refused: the header is not acceptable, an approval is missing or wrong, or a reveal is not what was offered.
    """
    check_header(plan.header, trust, policy, now)
    plan_hash = hash_plan(plan.header, plan.root)
    if tuple(approval.member for approval in plan.approvals) != plan.header.signers:
        raise Refused(f"the plan needs the approvals of members {_listed(plan.header.signers)}, in this order")
    for approval in plan.approvals:
        with about(f"the approval of member {approval.member}"):
            check_approval(approval, plan.header, plan_hash, trust)
    seed = digest("graph seed", plan_hash, *(approval.reveal for approval in plan.approvals))
    return CheckedPlan(plan.header, plan.root, plan_hash, seed)


def skellam_plan(header: Header, seed: bytes) -> SkellamPlan:
    """The noise mechanism of a header that has noise; ``seed``, the plan's, sets its rotation.

    Raises:
        Refused: granularity or norm bound are not what the other numbers give, to 1e-9.
    """
    ours = plan_skellam(
        header.dimension, header.clipping_norm, header.noise_multiplier, header.planned, header.minimum_survivors,
        header.corrupt_clients, seed, header.bits,
    )  # fmt: skip
    # All clients round with the very number that was signed, whose last bits may differ from one's own.
    signed = replace(ours, granularity=header.granularity, squared_norm_bound=header.squared_norm_bound)
    signed.check()
    return signed


def _check_committee(header: Header, trust: TrustBundle) -> None:
    pinned = len(trust.member_keys), trust.threshold, trust.corrupt_members
    if (header.members, header.threshold, header.corrupt_members) != pinned:
        named = (header.members, header.threshold, header.corrupt_members)
        raise Refused(f"the plan names a committee of (m, t, c) = {named}; the one pinned at enrolment has {pinned}")
    points = header.points
    if any(a >= b for a, b in itertools.pairwise(points)):
        raise Refused("offers are in ascending order of the member, one each")
    for offer in header.offers:
        check_offer(offer, trust, offer.member)
        if (offer.task, offer.round, offer.epoch, offer.expiry) != (header.task, header.round, header.epoch, header.expiry):
            raise Refused(f"the offer of member {offer.member} is for another round")
    signers = header.signers
    ordered = all(a < b for a, b in itertools.pairwise(signers))
    if len(signers) != header.threshold or not ordered or not set(signers) <= set(points):
        raise Refused(f"a plan is approved by exactly {header.threshold} members with an offer, got {_listed(signers)}")


def _check_clients(header: Header, policy: Policy) -> None:
    n, corrupt, survivors = header.clients, header.corrupt_clients, header.minimum_survivors
    if not 2 <= n <= header.planned <= LARGEST_COHORT:
        raise Refused(f"a cohort has 2 to {LARGEST_COHORT} clients, the plan names {n} of {header.planned} planned")
    if corrupt < policy.corrupt_clients:
        raise Refused(f"the plan allows for {corrupt} corrupt clients; at least {policy.corrupt_clients} are demanded")
    least = max(corrupt + 2, policy.minimum_survivors)
    if not least <= survivors <= n:
        raise Refused(f"the plan's minimum of {survivors} survivors is not between {least} and {n}")
    check_degree(n, header.degree, header.window_survivors, corrupt)


def _check_vector(header: Header, policy: Policy) -> None:
    if header.bits not in WIDTHS or not 1 <= header.dimension <= LARGEST_DIMENSION:
        raise Refused(f"{header.dimension} values of {header.bits} bits; allowed: {WIDTHS} bits and 1 to {LARGEST_DIMENSION}")
    names = [block.name for block in header.layout]
    if len(set(names)) != len(names) or sum(block.count for block in header.layout) > header.dimension:
        raise Refused(f"metric blocks have names of their own and fit {header.dimension} values together")
    if header.noise_multiplier < policy.noise_multiplier:
        raise Refused(f"noise multiplier {header.noise_multiplier:g} is below the {policy.noise_multiplier:g} demanded")
    if header.clipping_norm <= 0 or header.granularity <= 0:
        raise Refused("clipping norm and granularity must be positive")
    if header.noise_multiplier:
        skellam_plan(header, b"")
    elif header.squared_norm_bound:
        raise Refused("a round without noise has no norm bound; it must be 0")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
