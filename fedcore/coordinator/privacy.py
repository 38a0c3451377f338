"""What [privacy] asks of a run: the noise solved, a plan for every round, and the facts that its ledger must hold.

The formulas lie in fedcore.privacy; here is decided which of them a scenario may claim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from fedcore.config import PrivacyConfig, RunConfig
from fedcore.coordinator.voiding import what_voids
from fedcore.data import FederatedData
from fedcore.errors import Refused
from fedcore.flower import only_record
from fedcore.privacy.accountant import DpSgd, GaussianRelease, SkellamRelease, solve_noise
from fedcore.privacy.exposure import ClientId
from fedcore.privacy.ledger import Charge
from fedcore.privacy.mechanisms import adapt
from fedcore.privacy.randomness import derive_key
from fedcore.privacy.release import Release, plan_release
from fedcore.training.client import RoundTask
from fedcore.training.plan import DpSgdPlan

__all__ = ["ClientUnit", "ExampleUnit", "Protection", "protect"]


@dataclass(frozen=True)
class ExampleUnit:
    """One example of a client is protected by DP-SGD on the client.

    A round is charged for ``plan.batches``, the smallest number that an epoch has on any client of this partition; a client whose
    own data have fewer refuses to train.
    """

    config: PrivacyConfig
    plan: DpSgdPlan
    epochs: int
    batch_size: int

    @property
    def event(self) -> DpSgd:
        """What one round costs a client's example."""
        return DpSgd(self.plan.noise_multiplier, self.plan.batches, self.epochs)


@dataclass(frozen=True)
class ClientUnit:
    """A client with all that it holds is protected by noise on the cohort's sum.

    ``cohort``: clients planned for a sum, the public denominator. ``dimension``: values of an update.
    """

    config: PrivacyConfig
    noise_multiplier: float
    population: int
    cohort: int
    dimension: int
    seed: int

    @property
    def rate(self) -> float:
        """The bias of a client's coin; 0 where a cohort has a fixed size, and nothing is amplified."""
        return self.cohort / self.population if self.config.sampling == "poisson" else 0.0

    def release(self, round_number: int, clipping_norm: float) -> Release:
        """How the round's contributions are made and summed, around the clipping norm that the rounds before have found."""
        one, shares = self.config, None
        if one.mechanism == "skellam":
            seed = derive_key("rotation", self.seed, round_number)
            shares = (one.minimum_survivors or self.cohort, math.ceil(one.corrupt_fraction * self.cohort), seed)
        return plan_release(
            self.dimension, clipping_norm, self.noise_multiplier, self.cohort,
            weight_cap=one.weight_cap, loss_cap=one.loss_cap, shares=shares,
            bit_noise=(one.adaptive_noise or max(self.cohort / 20, self.noise_multiplier)) if one.adaptive_quantile else 0.0,
        )  # fmt: skip

    def next_norm(self, clipping_norm: float, unclipped: float | None) -> float:
        """The clipping norm after a round in which the share ``unclipped`` of the updates, noised, needed no clipping."""
        if unclipped is None:
            return clipping_norm
        return adapt(clipping_norm, min(max(unclipped, 0.0), 1.0), self.config.adaptive_quantile, self.config.adaptive_rate)

    def event(self, release: Release) -> GaussianRelease | SkellamRelease:
        """What the round costs a client that takes part."""
        shares = release.shares
        if shares is None:
            return GaussianRelease(self.noise_multiplier, self.rate)
        return SkellamRelease(self.noise_multiplier, shares.l2, shares.l1, shares.mu, shares.total_variation)


@dataclass(frozen=True)
class Protection:
    """The units that a run protects; both, one or none."""

    example: ExampleUnit | None = None
    client: ClientUnit | None = None

    @property
    def released(self) -> int:
        """Numbers in a client's contribution; 0 where no release is made."""
        return self.client.release(1, self.client.config.clipping_norm).size if self.client else 0

    def configs(self) -> list[PrivacyConfig]:
        """What the scenario says of each unit that is protected."""
        return [unit.config for unit in (self.example, self.client) if unit]

    def charges(
        self, run: str, round_number: int, attempt: int, cohort: Sequence[ClientId], release: Release | None
    ) -> list[Charge]:  # fmt: skip
        """What the ledger must hold before anything of a round is learnt."""
        clients, now = tuple(cohort), datetime.now(UTC).isoformat(timespec="seconds")
        found = []
        if self.example and clients:
            event, delta = self.example.event, self.example.config.delta
            found.append(Charge(run, round_number, attempt, "example", event, clients, now, delta))
        if self.client and release:
            spent, delta = self.client.event(release), self.client.config.delta
            found.append(Charge(run, round_number, attempt, "client", spent, clients, now, delta))
        return found

    def resting(self, history: Sequence[Charge]) -> frozenset[ClientId]:
        """Clients that must not take part in a round: their participations are used up, or the last one is too recent.

        ``history``: the population's charges before the round, in order.
        """
        if self.client is None:
            return frozenset()
        cap, separation = self.client.config.max_participations, self.client.config.min_separation
        releases = [charge.clients for charge in history if charge.unit == "client"]
        taken = Counter(client for clients in releases for client in clients) if cap else {}
        recent = {client for clients in releases[max(0, len(releases) - separation + 1) :] for client in clients}
        return frozenset(recent | {client for client, count in taken.items() if count >= cap})

    def resting_after_attempts(self, own: Sequence[Charge], round_number: int) -> frozenset[ClientId]:
        """Clients of which a run's ``own`` charges show that one more round is too soon, however often rounds were attempted.

        `resting` counts releases, of which a round that was tried again has several; what the noise was solved for counts rounds.
        """
        separation = self.client.config.min_separation if self.client else 1
        if separation == 1:
            return frozenset()
        recent = [charge for charge in own if charge.unit == "client" and round_number - charge.round < separation]
        return frozenset(client for charge in recent for client in charge.clients)

    def check_task(self, task: RoundTask, *, trains: bool) -> None:
        """On a client: see that it is asked for no less protection than its own scenario has.

        Raises:
            Refused: noise, clipping, steps or sum are not the scenario's, or it is asked for an exact number.
        """
        own = [unit for unit in ("example", "client") if getattr(self, unit)]
        if own and not trains:
            raise Refused(f"privacy of unit {own[0]}: this client tells no accuracy on its own examples")
        if self.example:
            # The coordinator says what it charges for: a partition with stand-ins for others' data does not know their batches.
            asked = replace(task.plan.dp, batches=self.example.plan.batches) if task.plan.dp else None
            if (asked, task.plan.epochs, task.plan.batch_size) != (self.example.plan, self.example.epochs, self.example.batch_size):
                raise Refused("privacy of unit example: the coordinator asks for another noise, clipping norm or number of steps")
        if self.client:
            norm = task.release.joint.clipping_norm if isinstance(task.release, Release) else 1.0
            if task.release != self.client.release(task.round_number, norm):
                raise Refused("privacy of unit client: the coordinator asks for another way to sum than the scenario's")

    def check_messages(self, messages: Sequence[Message], task: RoundTask, cohort: Sequence[int]) -> None:
        """See that the strategy left alone what the guarantee rests on.

        Raises:
            Refused: it changed the private part of the training configuration, or did not address the drawn cohort.
        """
        self.check_sum(messages, task)
        if self.client is not None and len(messages) != len(cohort):
            raise Refused(
                f"the strategy addressed {len(messages)} of the {len(cohort)} clients drawn; with privacy of unit client it must "
                "address all of them, since who takes part is part of the guarantee"
            )

    def check_sum(self, messages: Sequence[Message], task: RoundTask) -> None:
        """See that the strategy left alone how contributions are made and summed.

        Raises:
            Refused: it changed the private part of the training configuration.
        """
        expected = task.guarded()
        if not all(isinstance(message, Message) for message in messages):
            raise Refused("the strategy must give messages")
        for content in {id(message.content): message for message in messages}.values():
            found = RoundTask.from_table(only_record(content, ConfigRecord)).guarded()
            for key, value in expected.items():
                if found.get(key) != value or type(found.get(key)) is not type(value):
                    raise Refused(f"the strategy changed {key} from {value} to {found.get(key)}, on which the run's privacy rests")


def protect(config: RunConfig, data: FederatedData, strategy: Strategy, dimension: int) -> Protection:
    """The protection that a scenario asks for; ``dimension`` is the number of trainable parameters.

    Raises:
        Refused: a combination for which the guarantee would not hold, or noise that cannot be found; with the reason.
    """
    for problem in what_voids(config, data, strategy):
        raise Refused(f"[privacy]: {problem}")
    example, client = config.unit_privacy("example"), config.unit_privacy("client")
    return Protection(
        _example_unit(example, config, data) if example else None,
        _client_unit(client, config, len(data.clients), dimension) if client else None,
    )


def _example_unit(one: PrivacyConfig, config: RunConfig, data: FederatedData) -> ExampleUnit:
    batches = min(math.ceil(len(part) / config.training.batch_size) for part in data.clients)
    epochs = config.training.epochs

    def event(noise: float) -> DpSgd:
        return DpSgd(noise, batches, epochs)

    # A client may be drawn in every round: nothing is gained from the draw of cohorts.
    noise = one.noise_multiplier or solve_noise(event, config.run.rounds, one.target_epsilon, one.delta)
    return ExampleUnit(one, DpSgdPlan(one.clipping_norm, noise, batches), epochs, config.training.batch_size)


def _client_unit(one: PrivacyConfig, config: RunConfig, population: int, dimension: int) -> ClientUnit:
    cohort = (config.cohort.size or population) // config.secagg.shards

    def unit(noise: float) -> ClientUnit:
        return ClientUnit(one, noise, population, cohort, dimension, config.run.seed)

    def event(noise: float) -> GaussianRelease | SkellamRelease:
        return unit(noise).event(unit(noise).release(1, one.clipping_norm))

    rounds = config.run.rounds
    if one.sampling == "fixed":  # of which a client takes part in no more than cap and separation let it
        rounds = min(one.max_participations or rounds, math.ceil(rounds / one.min_separation))
    chosen = unit(one.noise_multiplier or solve_noise(event, rounds, one.target_epsilon, one.delta))
    chosen.release(1, one.clipping_norm)  # refuses what has no plan, before anything is begun
    return chosen
