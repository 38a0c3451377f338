"""The budget of a run: the charges of its rounds, durable before anything is learnt, and what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fedcore.coordinator.privacy import Protection
from fedcore.errors import Refused
from fedcore.privacy.ledger import Charge, Ledger, Unit
from fedcore.privacy.release import Release

__all__ = ["Budget"]


class Budget:
    """What a run may spend, and its ledger. ``fresh_noise``: a round that is repeated is a new attempt, charged anew."""

    def __init__(self, protection: Protection, ledger: Ledger, run: str, *, fresh_noise: bool) -> None:
        self._protection, self._ledger, self._run, self._fresh = protection, ledger, run, fresh_noise
        self._history = list(ledger.charges())

    def resting(self, round_number: int) -> frozenset[int]:
        """Clients that must not take part in the round."""
        return self._protection.resting(round_number, self._run, self._read())

    def charge(self, round_number: int, cohort: Sequence[int], release: Release | None) -> None:
        """Pay for a round; durable when this returns.

        Raises:
            BudgetSpent: a unit's budget does not suffice; nothing was charged.
        """
        attempts = [c.attempt for c in self._read() if (c.run, c.round) == (self._run, round_number)]
        attempt = max(attempts, default=-1) + 1 if self._fresh else 0
        charges = self._protection.charges(self._run, round_number, attempt, cohort, release)
        for charge in charges:
            self._ledger.charge(charge, self._limit(charge.unit))

    def check_paid(self, rounds: int) -> None:
        """Raises:
        Refused: the ledger lacks a charge for one of the run's first ``rounds`` rounds, so it is not the one they were charged to.
        """
        paid = {(charge.unit, charge.round) for charge in self._read() if charge.run == self._run}
        for one in self._protection.configs():
            missing = [number for number in range(1, rounds + 1) if (one.unit, number) not in paid]
            if missing:
                raise Refused(
                    f"--resume: the privacy ledger has no charge of unit {one.unit} for round {missing[0]}, which is committed"
                )

    def spent(self, clipping_norm: float, unclipped: float | None) -> dict[str, dict[str, float | None]]:
        """By unit what has been spent of the population's budget, for a round's metrics."""
        found: dict[str, dict[str, float | None]] = {}
        for one in self._protection.configs():
            spending = self._ledger.spending(cast("Unit", one.unit), one.delta)
            if spending:
                found[one.unit] = {
                    "epsilon": spending.released, "epsilon_coordinator": spending.coordinator, "delta": one.delta,
                    "budget": self._limit(one.unit),
                }  # fmt: skip
        if "client" in found:
            found["client"] |= {"clipping_norm": clipping_norm, "unclipped": unclipped}
        return found

    def _limit(self, unit: str) -> float | None:
        one = next(one for one in self._protection.configs() if one.unit == unit)
        return one.budget or one.target_epsilon or None

    def _read(self) -> list[Charge]:
        self._history += self._ledger.charges(len(self._history))
        return self._history
