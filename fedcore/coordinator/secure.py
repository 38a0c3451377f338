"""What [secagg] asks of a run: how sums are made, what it cannot be combined with, and the committee."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flwr.serverapp.strategy import Strategy

from fedcore.config import RunConfig, SecAggConfig
from fedcore.coordinator.privacy import Protection
from fedcore.coordinator.strategy import accepts_mean
from fedcore.data import FederatedData
from fedcore.errors import Refused
from fedcore.grids.secure import InnerGrid, SecureGrid, Terms
from fedcore.models import ParameterLayout
from fedcore.secagg.committee import local_committee
from fedcore.secagg.committee_client import RemoteMember
from fedcore.secagg.driver import Committee
from fedcore.secagg.keys import SIGNING, read_message, read_public_key, read_signing_key
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.neighbours import least_survivors
from fedcore.secagg.participant import Demands, SimulatedParticipants
from fedcore.secagg.plan import Policy
from fedcore.secagg.sums import ScoreSum, UpdateSum, plan_update_sum
from fedcore.secagg.trust import about, check_trust
from fedcore.training.client import RoundTask

_LONGEST = 3600  # seconds that operators let a round take, unless their policy says otherwise
_FLOORS = ("minimum_survivors", "corrupt_clients", "noise_multiplier")
_PATIENCE = 60.0  # seconds for which an operator is asked again before the round goes on without it

__all__ = ["Secured", "SimulatedTrust", "secure", "simulated_trust", "trusted_committee"]


@dataclass(frozen=True)
class Secured:
    """How a run's sums are made. ``scores`` where clients evaluate; ``updates`` where their updates are not noised instead.

    ``policy`` is what the committee demands of any of them, ``demands`` what a client demands of each. Widths and largest weights
    that nobody has set (``automatic``) follow from data, of which a node may know other numbers than the coordinator.
    """

    terms: Terms
    demands: Demands
    updates: UpdateSum | None
    scores: ScoreSum | None
    automatic: tuple[str, ...] = ()

    @property
    def policy(self) -> Policy:
        """The floors under all sums of the run."""
        both = (self.demands.updates, self.demands.scores) if self.scores else (self.demands.updates,)
        return Policy(*(min(getattr(one, name) for one in both) for name in _FLOORS))

    @property
    def largest(self) -> int:
        """Numbers in the largest sum without noise."""
        return max((found.size for found in (self.updates, self.scores) if found), default=0)

    def check_task(self, task: RoundTask, *, trains: bool, invited: bool) -> None:
        """On a client: see that it is asked for a masked contribution to the very sum that its own scenario has.

        Raises:
            Refused: it is asked to show what it would send, or to add to another sum.
        """
        if not invited:
            raise Refused("secure aggregation: the coordinator asks for work without an invitation to mask what comes of it")
        expected: UpdateSum | ScoreSum | None = self.updates if trains else self.scores
        noised = trains and self.updates is None  # which is checked with the privacy that asks for it
        asked = task.release
        if expected and isinstance(asked, (UpdateSum, ScoreSum)) and type(asked) is type(expected):
            free = self.automatic if trains else ("weight_cap",)
            expected = replace(expected, **{name: getattr(asked, name) for name in free})
        if asked != expected and not noised:
            raise Refused("secure aggregation: the coordinator asks for another sum than the scenario's")

    def words(self, config: SecAggConfig) -> dict[str, str | list[str]]:
        """What protects the clients' contributions, what that assumes, and what it does not give."""
        corrupt, survivors = self.policy.corrupt_clients, self.policy.minimum_survivors
        if config.simulate == "arithmetic":
            how, committee = "Contributions were added unmasked, with the integers of the protocol: a simulation.", "none"
        else:
            how = "Every client masked what it sent; only the sum of those who uploaded was opened."
            committee = f"{len(config.operators)} operators, as pinned by the trust bundle {config.trust}"
        if not config.operators and config.simulate == "protocol":
            committee = (
                f"{config.members} members in this process, {config.threshold} of them needed: they separate no trust, whoever "
                "runs the coordinator runs them"
            )
        return {
            "how": how,
            "committee": committee,
            "assumed": [
                f"At most {corrupt} of a sum's clients, whom the coordinator picks among all enrolled, are in league with it.",
                f"A sum is opened over {survivors} clients or more.",
                "The members of the committee do not exceed the declared number of corrupt ones.",
            ],
            "not_concluded": [
                "The sum itself is seen: without noise on it, it tells something about a client, and two rounds' sums tell more.",
                "A client can send anything: its part of a sum cannot be inspected, only clipped on the client.",
            ],
        }

    def wrap(self, inner: InnerGrid, layout: ParameterLayout, committee: Committee | None, name: str) -> SecureGrid:
        """A run's grid under secure aggregation; the task's name is new every time."""
        return SecureGrid(inner, layout, self.terms, committee, f"{_shortened(name, 47)}/{secrets.token_hex(8)}")


@dataclass(frozen=True)
class SimulatedTrust:
    """A committee, and simulated clients that are enrolled with it."""

    committee: Committee
    participants: SimulatedParticipants


def secure(config: RunConfig, data: FederatedData, strategy: Strategy, protection: Protection, dimension: int) -> Secured | None:
    """What [secagg] says for updates of ``dimension`` values; None where it is not enabled.

    Raises:
        Refused: a combination in which the coordinator would see more than sums, or that cannot be summed; with the reason.
    """
    if not config.secagg.enabled:
        return None
    for problem in _what_prevents(config, data, strategy):
        raise Refused(f"[secagg]: {problem}")
    one, population = config.secagg, len(data.clients)
    clients = (config.cohort.size or population) // one.shards
    corrupt, survivors, noise = _assumed(config, protection, clients)
    cap = one.weight_cap or max(len(part) for part in data.clients)
    updates = None if protection.client else plan_update_sum(
        dimension, clients, minimum_survivors=survivors, clip=one.clip, weight_cap=cap, bits=one.bits
    )  # fmt: skip
    scores, among_scores = _scores(config, data) if config.evaluation.federated_every else (None, corrupt)
    if one.neighbours:
        for size, bad in ((clients, corrupt), *([(scores.cohort, among_scores)] if scores else [])):
            with about(f"[secagg]: secagg.neighbours, in a sum of {size} clients"):
                least_survivors(size, one.neighbours, bad)
    terms = Terms(corrupt, among_scores, one.neighbours, one.expected_dropout, one.shards, config.run.seed)
    least = scores.minimum_survivors if scores else survivors
    demands = Demands(Policy(survivors, corrupt, noise), Policy(least, among_scores, 0.0))
    automatic = (() if one.weight_cap else ("weight_cap",)) + (() if one.bits or one.weight_cap else ("bits",))
    return Secured(terms, demands, updates, scores, automatic)


def _scores(config: RunConfig, data: FederatedData) -> tuple[ScoreSum, int]:
    """The sum of evaluations, which is over other clients than a sum of updates, and the corrupt ones among them."""
    evaluated = config.cohort.evaluate_size or len(data.clients)
    corrupt = math.ceil(config.secagg.corrupt_fraction * evaluated)
    least = max(corrupt + 2, math.ceil(evaluated / 2))
    if evaluated < least:
        raise Refused(f"[secagg]: a sum over the scores of {evaluated} clients, {corrupt} of them corrupt, takes {least} clients")
    return ScoreSum(evaluated, least, max(1, max((len(part) for part in data.holdout), default=0))), corrupt


def simulated_trust(config: RunConfig, secured: Secured) -> SimulatedTrust | None:
    """The committee of a simulation and its enrolled clients; None where sums are added unmasked."""
    one = config.secagg
    if one.simulate == "arithmetic":
        return None
    secret = os.urandom(32)  # masks are no part of what a simulation repeats: they leave the sum
    if one.operators:
        if not one.enrolment:
            raise Refused("[secagg]: simulated clients of operators need secagg.enrolment, the directory of the enrolment key")
        committee, enrolment = (
            trusted_committee(config, secured), read_signing_key(config.folder / one.enrolment / f"{SIGNING}.key")
        )  # fmt: skip
        if enrolment.public != committee.trust.enrolment_key:
            raise Refused(f"secagg.enrolment: {one.enrolment} holds another key than the one that the trust bundle names")
    else:
        local = local_committee(
            one.members, one.threshold, one.corrupt_members, _shortened(config.run.name, 64) or "simulation", secured.policy
        )
        committee, enrolment = Committee(local.trust, secured.policy, local.members), local.enrolment
    return SimulatedTrust(committee, SimulatedParticipants(secret, enrolment, committee.trust, secured.demands))


def trusted_committee(config: RunConfig, secured: Secured) -> Committee:
    """The operators of the scenario, as the trust bundle pins them.

    Raises:
        Refused: no operators are named, or the files are not what they should be.
    """
    one, folder = config.secagg, config.folder
    if not one.operators:
        raise Refused("[secagg]: real clients need a committee of operators (secagg.operators), apart from the coordinator")
    trust = read_message(folder / one.trust, TrustBundle)
    with about(f"secagg.trust {folder / one.trust}, which secagg.trust_key {folder / one.trust_key} should have signed"):
        check_trust(trust, read_public_key(folder / one.trust_key)[1])
    if len(one.operators) != len(trust.member_keys):
        raise Refused(f"secagg.operators: the trust bundle names {len(trust.member_keys)} members, got {len(one.operators)}")
    own = folder / one.credentials if one.credentials else None
    members = {
        point: RemoteMember(point, address, fingerprint, trust, credentials=own, patience=_PATIENCE)
        for point, (address, fingerprint) in enumerate(zip(one.operators, one.operator_fingerprints, strict=True), 1)
    }
    return Committee(trust, replace(secured.policy, longest_round=_LONGEST), members)


def _shortened(name: str, size: int) -> str:
    """The beginning of a name that fits ``size`` bytes."""
    return name.encode()[:size].decode(errors="ignore")


def _assumed(config: RunConfig, protection: Protection, clients: int) -> tuple[int, int, float]:
    """Corrupt clients of a sum, fewest survivors, and noise multiplier."""
    if protection.client:
        shares = protection.client.release(1, protection.client.config.clipping_norm).shares
        if shares is None:
            raise Refused("[secagg]: noise on the sum by the coordinator would let it see the exact sum")
        if shares.minimum_survivors < shares.corrupt + 2:
            raise Refused(
                f"[secagg]: privacy.minimum_survivors = {shares.minimum_survivors} with {shares.corrupt} corrupt clients could "
                f"leave the sum of one honest client; it takes {shares.corrupt + 2}"
            )
        return shares.corrupt, shares.minimum_survivors, shares.noise_multiplier
    corrupt = math.ceil(config.secagg.corrupt_fraction * clients)
    survivors = config.secagg.minimum_survivors or max(corrupt + 2, math.ceil(clients / 2))
    if not corrupt + 2 <= survivors <= clients:
        raise Refused(
            f"[secagg]: a sum of {clients} clients with {corrupt} corrupt ones takes {corrupt + 2} to {clients} survivors, "
            f"minimum_survivors asks for {survivors}"
        )
    return corrupt, survivors, 0.0


def _what_prevents(config: RunConfig, data: FederatedData, strategy: Strategy) -> Iterator[str]:
    one, name, cohort = config.secagg, config.strategy.name, config.cohort.size or len(data.clients)
    client = config.unit_privacy("client")
    if one.shards == 1 and not accepts_mean(strategy):
        yield (
            f"strategy.name {name} looks at clients one by one, which nobody can here; use a strategy that needs only the mean "
            "(fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi), or set secagg.shards: it then compares the sums of shards"
        )
    if config.wire.update != "float32":
        yield f'wire.update = "{config.wire.update}": a sum has its own encoding, leave it out'
    if cohort < 2:
        yield f"a sum takes 2 clients or more, the cohort has {cohort}"
    elif cohort % one.shards or cohort // one.shards < 2:
        yield f"secagg.shards = {one.shards} must divide the cohort of {cohort} into parts of at least 2"
    if client and client.mechanism != "skellam":
        yield (
            'privacy.mechanism = "gaussian" with unit client adds noise where the exact sum is seen; with secure aggregation the '
            'clients add it: use mechanism = "skellam"'
        )
    if client:
        for key in ("corrupt_fraction", "minimum_survivors"):
            if getattr(one, key):
                yield f"secagg.{key}: privacy.{key} says it, leave it out"
        for key in ("clip", "weight_cap", "bits"):
            if getattr(one, key) != getattr(SecAggConfig(), key):
                yield f"secagg.{key} has no meaning with privacy of unit client, whose encoding is its own: leave it out"
