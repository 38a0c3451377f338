"""The privacy ledger: an append-only list of facts, who was subject to which event; epsilon is derived from them when asked.

A charge is durable before anything is learnt from the clients, so a crash can cost budget and never refund it. The ledger's
position is compared and set: two coordinators on one store cannot both spend what is left. Each entry carries a SHA-256 chained
over all before it, so damage or a rollback is noticed; it holds no key, and whoever can rewrite the store can forge it.

Imports neither torch nor flwr; epsilon needs dp-accounting when it is first asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal, Protocol

from fedcore.errors import BudgetSpent, Refused, TryAgain
from fedcore.privacy.accountant import check_delta
from fedcore.privacy.events import DpSgd, Event, check_number, event_from_table, event_to_table, is_amplified
from fedcore.privacy.exposure import ClientId, Exposure, View
from fedcore.privacy.statement import Statement, statement

__all__ = ["Charge", "Ledger", "LedgerStore", "PositionTaken", "Spending", "Unit", "participations"]

Unit = Literal["example", "client"]
UNITS: tuple[Unit, ...] = ("example", "client")
Key = tuple[str, int, int, str]
_VERSION = 1
_ENTRY = {"version", "population", "charge", "chain"}
_ATTEMPTS = 100
_START = hashlib.sha256(b"fedcore ledger 1").hexdigest()


class PositionTaken(TryAgain):
    """The store has another number of entries than the caller has seen, or the key already: read what is new and decide again."""


class LedgerStore(Protocol):
    """Durable entries in order. Contract: tests/contracts/test_ledger_store.py."""

    def entries(self, start: int = 0) -> list[dict[str, Any]]:
        """The entries from number ``start`` (the first is 0) on, in order."""

    def append(self, position: int, key: str, entry: Mapping[str, Any]) -> None:
        """Make ``entry`` number ``position``; it is on stable storage when this returns.

        Raises:
            PositionTaken: there are more or fewer than ``position`` entries, or one with this key; nothing was written.
            TryAgain: the store is busy or out of reach; whether the entry was written is not known.
            Refused: the store is damaged, or would not keep what it is given.
        """

    def confirm(self) -> None:
        """Force what `entries` has shown to stable storage, where a writer may have died between the two."""

    def close(self) -> None:
        """Release the store."""


@dataclass(frozen=True)
class Charge:
    """One fact: in ``round`` of ``run``, ``clients`` were subject to ``event``.

    ``attempt`` tells apart repetitions of a round with new noise, each a charge of its own. ``clients`` are those that took part;
    with a sampling rate the charge concerns every registered client, and may name none. ``time`` (ISO 8601) is information and
    no part of the fact. ``delta`` is the one that the run was planned with.
    """

    run: str
    round: int
    attempt: int
    unit: Unit
    event: Event
    clients: tuple[ClientId, ...]
    time: str
    delta: float

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not 0 < len(self.run) <= 200:
            raise Refused(f"charge: run must be a name of 1 to 200 characters, got {str(self.run)[:40]!r}")
        check_number("charge: round", self.round, 0, 2**53, whole=True)
        check_number("charge: attempt", self.attempt, 0, 2**53, whole=True)
        if self.unit not in UNITS or (self.unit == "example") != isinstance(self.event, DpSgd):
            kind = type(self.event).__name__
            raise Refused(f"charge: unit {str(self.unit)[:40]!r} does not fit {kind}; DpSgd is of unit example, others of client")
        known = all(isinstance(client, (int, str)) and not isinstance(client, bool) for client in self.clients)
        if not known or len(set(self.clients)) != len(self.clients):
            raise Refused(f"charge: clients of round {self.round} must be distinct integers or strings")
        if not self.clients and not is_amplified(self.event):
            raise Refused(f"charge: round {self.round} names no client that took part")
        try:
            datetime.fromisoformat(self.time)
        except (TypeError, ValueError):
            raise Refused(f"charge: time must be ISO 8601, got {str(self.time)[:40]!r}") from None
        check_delta(self.delta)

    @property
    def key(self) -> Key:
        """What a fact is identified by; a repetition is no new charge."""
        return self.run, self.round, self.attempt, self.unit

    def to_table(self) -> dict[str, Any]:
        """The charge as a JSON table."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**table, "event": event_to_table(self.event), "clients": list(self.clients)}

    @classmethod
    def from_table(cls, table: Any) -> Charge:
        """Inverse of `to_table`.

        Raises:
            Refused: a field or an event that this version does not know, or a value out of range.
        """
        if not isinstance(table, Mapping) or table.keys() != {field.name for field in fields(cls)}:
            raise Refused("ledger: an entry has other fields than a charge; a newer fedcore may have written it")
        if not isinstance(table["clients"], list):
            raise Refused("ledger: the clients of an entry are no list")
        return cls(**{**table, "event": event_from_table(table["event"]), "clients": tuple(table["clients"])})


@dataclass(frozen=True)
class Spending:
    """What the facts of one unit add up to, at ``delta``.

    ``released`` is epsilon towards whoever sees what is published, ``coordinator`` towards someone who knows in addition who took
    part. ``releases`` counts charges, ``participations`` those of the client that took part most often. ``rounds`` counts rounds;
    a round attempted twice is two releases.
    """

    unit: Unit
    delta: float
    released: float
    coordinator: float
    releases: int
    rounds: int
    runs: int
    clients: int
    participations: int
    statement: Statement


class Ledger:
    """The facts of one population, held in ``store``; several runs may share it and their facts compose.

    Raises:
        Refused: the store belongs to another population, is damaged, or holds what this version does not know.
    """

    def __init__(self, store: LedgerStore, population: str | None = None) -> None:
        """``population`` names the clients that ids refer to; None takes the name that the store's entries give."""
        if population is not None and not population:
            raise Refused("ledger: the name of a population must not be empty")
        self.population = population
        self._store = store
        self._position = 0
        self._chain = _START
        self._facts: dict[Key, str] = {}
        self._exposure: dict[Unit, Exposure] = {unit: Exposure() for unit in UNITS}
        self._events: dict[Unit, Counter[Event]] = {unit: Counter() for unit in UNITS}
        self._deltas: dict[Unit, set[float]] = {unit: set() for unit in UNITS}
        self._catch_up()

    def charge(self, new: Charge, budget: float | None = None, view: View = "released") -> bool:
        """Record ``new``; on stable storage when this returns. False if the very same fact was charged before.

        ``budget`` bounds epsilon of the charge's unit in ``view``, at the charge's delta, over all facts of the ledger.

        Raises:
            BudgetSpent: epsilon would exceed the budget; nothing was written.
            Refused: another fact stands under the same run, round, attempt and unit; or the store was damaged or rolled back.
            TryAgain: the store is out of reach or busy; repeat the same charge, it cannot count twice.
        """
        for _ in range(_ATTEMPTS):
            self._catch_up()
            if self.population is None:
                raise Refused("ledger: the first charge must name the population")
            if new.key in self._facts:
                if self._facts[new.key] != _fingerprint(new):
                    raise Refused(f"ledger: round {new.round} of run {new.run} (attempt {new.attempt}, unit {new.unit}) was "
                                  "charged with other clients or another event; a new attempt needs a new number")  # fmt: skip
                self._store.confirm()
                return False
            if budget is not None:
                self._check_budget(new, budget, view)
            entry = {"version": _VERSION, "population": self.population, "charge": new.to_table()}
            before, chain = self._position, _chained(self._chain, entry)
            try:
                self._store.append(before, json.dumps(new.key), {**entry, "chain": chain})
            except PositionTaken:
                self._catch_up()
                if self._position == before:
                    raise Refused("ledger: the store holds fewer entries than it did; it was rolled back or replaced") from None
                continue
            self._apply(new, chain)
            return True
        raise TryAgain("ledger: others keep writing to it; nothing was charged")

    def check(self, new: Charge, budget: float | None, view: View = "released") -> None:
        """See whether ``new`` could be charged as things stand; one that was charged already costs nothing more.

        Raises:
            BudgetSpent: epsilon would exceed the budget.
        """
        self._catch_up()
        if budget is not None and new.key not in self._facts:
            self._check_budget(new, budget, view)

    def epsilon(self, unit: Unit, delta: float, view: View = "released", after: Charge | None = None) -> float:
        """Epsilon at ``delta`` of the worst-off client (or example) of the population, now or ``after`` one more charge."""
        return self._exposure[unit].epsilon(view, delta, (after.event, after.clients) if after is not None else None)

    def spending(self, unit: Unit, delta: float | None = None) -> Spending | None:
        """What the facts of ``unit`` cost, at ``delta`` or the smallest that a run was planned with; None without facts."""
        if not self._events[unit]:
            return None
        chosen = min(self._deltas[unit]) if delta is None else delta
        exposure, keys = self._exposure[unit], [key for key in self._facts if key[3] == unit]
        released, coordinator = exposure.epsilon("released", chosen), exposure.epsilon("coordinator", chosen)
        return Spending(
            unit, chosen, released, coordinator, len(keys), len({key[:2] for key in keys}), len({key[0] for key in keys}),
            exposure.clients, exposure.most_participations, statement(self._events[unit]),
        )  # fmt: skip

    def charges(self, start: int = 0) -> list[Charge]:
        """The facts from number ``start`` (the first is 0) on, in order, with those that others have written since."""
        self._catch_up()
        return [Charge.from_table(entry["charge"]) for entry in self._store.entries(start)[: self._position - start]]

    def close(self) -> None:
        """Release the store."""
        self._store.close()

    def _check_budget(self, new: Charge, budget: float, view: View) -> None:
        check_number("privacy budget", budget, 0, 1e9)
        after = self.epsilon(new.unit, new.delta, view, new)
        if not after <= budget:
            spent = self.epsilon(new.unit, new.delta, view)
            raise BudgetSpent(
                f"round {new.round} of run {new.run} would overspend the privacy budget of unit {new.unit}: epsilon {after:.4g} "
                f"({view} view, delta {new.delta:g}), allowed {budget:.4g}; {spent:.4g} is spent, {max(budget - spent, 0):.4g} left"
            )

    def _catch_up(self) -> None:
        """Take in what was written since, by whomever."""
        for entry in self._store.entries(self._position):
            number = self._position
            if entry.keys() != _ENTRY or entry["version"] != _VERSION:
                raise Refused(f"ledger: entry {number} is not of a version that this fedcore knows")
            if entry["chain"] != _chained(self._chain, entry):
                raise Refused(f"ledger: entry {number} does not follow from those before; the ledger was damaged or rolled back")
            theirs, self.population = entry["population"], self.population or entry["population"]
            if theirs != self.population:
                raise Refused(f"ledger: its population is {theirs!r}, not {self.population!r}; client ids would be mixed up")
            self._apply(Charge.from_table(entry["charge"]), entry["chain"])

    def _apply(self, charge: Charge, chain: str) -> None:
        self._exposure[charge.unit].add(charge.event, charge.clients)
        self._events[charge.unit][charge.event] += 1
        self._deltas[charge.unit].add(charge.delta)
        self._facts[charge.key] = _fingerprint(charge)
        self._position, self._chain = self._position + 1, chain


def participations(charges: Iterable[Charge]) -> Counter[ClientId]:
    """In how many rounds each client took part; two units charged for one round and attempt are one participation."""
    seen: dict[tuple[str, int, int], set[ClientId]] = {}
    for charge in charges:
        seen.setdefault(charge.key[:3], set()).update(charge.clients)
    return Counter(client for clients in seen.values() for client in clients)


def _chained(before: str, entry: Mapping[str, Any]) -> str:
    facts = {name: value for name, value in entry.items() if name != "chain"}
    return hashlib.sha256((before + json.dumps(facts, sort_keys=True)).encode()).hexdigest()


def _fingerprint(charge: Charge) -> str:
    """The fact without its time, whatever the order of its clients."""
    table = {**charge.to_table(), "clients": sorted(map(repr, charge.clients)), "time": ""}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
