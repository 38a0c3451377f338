"""The budget of a run: the charges of its rounds, durable before anything is learnt, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from fedcore.config import PrivacyConfig
from fedcore.coordinator.privacy import Protection
from fedcore.errors import Refused
from fedcore.privacy.accountant import epsilon, without_amplification
from fedcore.privacy.exposure import ClientId
from fedcore.privacy.ledger import Charge, Ledger, Unit
from fedcore.privacy.release import Release

__all__ = ["Budget"]


class Budget:
    """What a run may spend, and its ledger. ``fresh_noise``: a round that is repeated is a new attempt, charged anew."""

    def __init__(self, protection: Protection, ledger: Ledger, run: str, *, fresh_noise: bool) -> None:
        self._protection, self._ledger, self._run, self._fresh = protection, ledger, run, fresh_noise
        self._history = list(ledger.charges())
        self._check_units()

    def resting(self, round_number: int) -> frozenset[ClientId]:
        """Clients that must not take part in the round.

        A simulated round that is repeated after a crash draws as it did: from what stood before its own charge.
        """
        history = self._read()
        if self._fresh:
            mine = [charge for charge in history if charge.run == self._run]
            return self._protection.resting(history) | self._protection.resting_after_attempts(mine, round_number)
        own = (n for n, charge in enumerate(history) if (charge.run, charge.round) == (self._run, round_number))
        return self._protection.resting(history[: next(own, None)])

    def charge(self, round_number: int, cohort: Sequence[ClientId], release: Release | None) -> None:
        """Pay for a round, or with new noise for another attempt at it; durable when this returns.

        Raises:
            BudgetSpent: a unit's budget does not suffice; nothing was charged.
        """
        attempts = [c.attempt for c in self._read() if (c.run, c.round) == (self._run, round_number)]
        attempt = max(attempts, default=-1) + 1 if self._fresh else 0
        charges = self._protection.charges(self._run, round_number, attempt, cohort, release)
        for charge in charges:
            self._ledger.check(charge, self._limit(charge.unit))
        for charge in charges:
            self._ledger.charge(charge, self._limit(charge.unit))

    def check_paid(self, rounds: int) -> None:
        """Raises:
        Refused: the ledger lacks a charge for one of the run's first ``rounds`` rounds, so it is not the one they were charged to.
        """
        own = [charge for charge in self._read() if charge.run == self._run]
        paid = {(charge.unit, charge.round) for charge in own}
        paid |= {("example", charge.round) for charge in own if not charge.clients}  # nobody's examples were in an empty cohort
        for one in self._protection.configs():
            missing = [number for number in range(1, rounds + 1) if (one.unit, number) not in paid]
            if missing:
                raise Refused(
                    f"--resume: the privacy ledger has no charge of unit {one.unit} for round {missing[0]}, which is committed; "
                    "it is not the ledger that the run was charged to, or it was emptied"
                )

    def _views(self, one: PrivacyConfig) -> dict[str, float | None]:
        """Epsilon of what is published, and towards someone who knows who took part.

        Under Poisson sampling exact numbers of participations would tell the coins: what follows from them is then that of a
        client that took part in every round. The ledger, which is the operator's, has the exact ones.
        """
        spending = self._ledger.spending(cast("Unit", one.unit), one.delta)
        released, coordinator = (spending.released, spending.coordinator) if spending else (0.0, 0.0)
        if self._protection.client and 0 < self._protection.client.rate < 1:
            events = Counter(without_amplification(charge.event) for charge in self._read() if charge.unit == one.unit)
            if one.unit == "example" and self._protection.example:  # an empty cohort is charged to no example
                empty = sum(charge.unit == "client" and not charge.clients for charge in self._read())
                events[self._protection.example.event] += empty
            coordinator = epsilon(events, one.delta)
            released = coordinator if one.unit == "example" else released
        return {"epsilon": released, "epsilon_coordinator": coordinator}

    def spent(self, clipping_norm: float, unclipped: float | None) -> dict[str, dict[str, float | None]]:
        """By unit what has been spent of the population's budget, for a round's metrics."""
        found: dict[str, dict[str, float | None]] = {}
        for one in self._protection.configs():
            found[one.unit] = self._views(one) | {"delta": one.delta, "budget": self._limit(one.unit)}
        if "client" in found:
            found["client"] |= {"clipping_norm": clipping_norm, "unclipped": unclipped}
        return found

    def _check_units(self) -> None:
        """Raises:
        Refused: another run on this ledger protects other units, whose releases would be missing from this run's epsilon.
        """
        units = {one.unit for one in self._protection.configs()}
        others: dict[str, set[str]] = {}
        for charge in self._history:
            if charge.run != self._run and charge.clients:
                others.setdefault(charge.run, set()).add(charge.unit)
        for run, protected in others.items():
            if protected != units:
                raise Refused(
                    f"privacy.ledger: run {run} on it protects unit {' and '.join(sorted(protected))}, this run "
                    f"{' and '.join(sorted(units))}; neither number would count the other's releases: use a ledger of its own"
                )

    def _limit(self, unit: str) -> float | None:
        one = next(one for one in self._protection.configs() if one.unit == unit)
        return one.budget or one.target_epsilon or None

    def _read(self) -> list[Charge]:
        self._history += self._ledger.charges(len(self._history))
        return self._history
