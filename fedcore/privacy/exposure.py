"""Who was subject to what: every client's events, kept small enough for a million clients and thousands of rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from fedcore.privacy.accountant import Composition, check_delta, composed_epsilon, composition
from fedcore.privacy.events import Event, is_amplified, without_amplification

__all__ = ["ClientId", "Exposure", "View"]

ClientId = int | str
View = Literal["released", "coordinator"]


class Exposure:
    """The events of one unit, by client, and the worst client's epsilon.

    Released view: an amplified release concerns every registered client, whoever took part; any other concerns those that did.
    Coordinator view: who took part is known, nothing is amplified, and every release concerns those that did.

    Clients with the same events share one entry, and only compositions that no other contains are kept for the maximum: a
    client's events only grow, so what contains all others costs the most.
    """

    def __init__(self) -> None:
        self._everyone: dict[Event, int] = {}
        self._views: dict[View, _Clients] = {"released": _Clients(), "coordinator": _Clients()}
        self.most_participations = 0
        self._participations: dict[ClientId, int] = {}

    @property
    def clients(self) -> int:
        """How many distinct clients took part."""
        return len(self._participations)

    def add(self, event: Event, clients: Iterable[ClientId]) -> None:
        """One more event that ``clients`` took part in."""
        chosen = tuple(clients)
        for client in chosen:
            count = self._participations[client] = self._participations.get(client, 0) + 1
            self.most_participations = max(self.most_participations, count)
        if is_amplified(event):
            self._everyone[event] = self._everyone.get(event, 0) + 1
        else:
            self._views["released"].add(event, chosen)
        self._views["coordinator"].add(without_amplification(event), chosen)

    def epsilon(self, view: View, delta: float, after: tuple[Event, Iterable[ClientId]] | None = None) -> float:
        """The worst client's epsilon at ``delta``, now or ``after`` one more event for some clients."""
        check_delta(delta)
        everyone = dict(self._everyone) if view == "released" else {}
        worst = list(self._views[view].worst)
        if after is not None:
            event, clients = after
            if view == "released" and is_amplified(event):
                everyone[event] = everyone.get(event, 0) + 1
            else:
                worst += self._views[view].reached(event if view == "released" else without_amplification(event), clients)
        totals = {composition(_sum(everyone, dict(own))) for own in worst or [frozenset()]}
        return max(composed_epsilon(total, delta) for total in totals)


class _Clients:
    """Each client's composition, and the maximal ones."""

    def __init__(self) -> None:
        self._of: dict[ClientId, Composition] = {}
        self._next: dict[tuple[Composition, Event], Composition] = {}
        self.worst: list[Composition] = []

    def add(self, event: Event, clients: Iterable[ClientId]) -> None:
        reached = set()
        for client in clients:
            self._of[client] = after = self._after(self._of.get(client, frozenset()), event)
            reached.add(after)
        for one in reached:
            if not any(_contains(other, one) for other in self.worst):
                self.worst = [other for other in self.worst if not _contains(one, other)] + [one]

    def reached(self, event: Event, clients: Iterable[ClientId]) -> set[Composition]:
        """The compositions that ``clients`` would have after ``event``."""
        return {self._after(before, event) for before in {self._of.get(client, frozenset()) for client in clients}}

    def _after(self, before: Composition, event: Event) -> Composition:
        found = self._next.get((before, event))
        if found is None:
            found = self._next[before, event] = composition(_sum(dict(before), {event: 1}))
        return found


def _sum(one: Mapping[Event, int], other: Mapping[Event, int]) -> dict[Event, int]:
    return {event: one.get(event, 0) + other.get(event, 0) for event in {**one, **other}}


def _contains(one: Composition, other: Composition) -> bool:
    counts = dict(one)
    return all(counts.get(event, 0) >= count for event, count in other)
