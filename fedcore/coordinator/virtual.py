"""Buffered asynchronous rounds of simulated clients, on a virtual clock.

When work arrives does not depend on what it gives, so a client trains when its update is wanted: the models that work in progress
began with are all that must be kept, and what is discarded as too stale is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.config import AsynchronousConfig
from fedcore.coordinator.asynchronous import Collected, Given
from fedcore.coordinator.buffered import Arrived, Staleness, fill_buffer
from fedcore.coordinator.checkpoint import Pending
from fedcore.coordinator.flights import Flight, Flights, draw_order
from fedcore.data.fleet import VirtualFleet
from fedcore.flower import Facts
from fedcore.grids.cohort import Begun, CohortGrid, Trained
from fedcore.training.client import RoundTask

__all__ = ["VirtualArrivals"]


@dataclass(frozen=True)
class _Version:
    """A version that somebody still trains from."""

    start: npt.NDArray[np.float32]
    config: Mapping[str, Any]


class VirtualArrivals:
    """Simulated clients of ``grid``, as fast as those of ``fleet``; see `Arrivals`."""

    def __init__(self, grid: CohortGrid, config: AsynchronousConfig, fleet: VirtualFleet, timeout: float) -> None:
        self._grid, self._config, self._fleet, self._timeout = grid, config, fleet, timeout
        self._population = len(fleet.usual)
        self._staleness = Staleness(config.staleness_exponent, config.max_staleness)

    def collect(self, given: Given, pending: Pending | None, pay: Callable[[Sequence[int]], None]) -> Collected:
        """As `Arrivals`."""
        flights, versions = _read(pending)
        versions = versions | {given.version: _Version(given.start, dict(given.config))}
        order = draw_order(self._fleet.seed, given.version, self._population)
        coming = flights.arrivals(order, self._config.at_once(self._population), self._seconds)
        wanted, discarded, parts, facts = self._config.buffer, 0, list[Arrived](), list[Facts]()
        while wanted:
            landed = list[Flight]()
            while len(landed) < wanted:
                flight, flights = next(coming)
                fresh = self._staleness.admits(given.version - flight.version)
                landed += [flight] if fresh else []
                discarded += not fresh
            for version, trained in self._train(landed, versions):
                facts.append(trained.facts)
                if clients := trained.facts.clients:
                    parts.append(Arrived(version, clients, trained.weighted, trained.examples, trained.loss))
                    wanted -= len(clients)
        pay(sorted(flights.given))
        counted = sum(len(part.clients) for part in parts)
        down = len(given.blob) * (counted + sum(len(one.dropped) for one in facts) + discarded)
        return Collected(
            fill_buffer(len(given.start), parts, given.version, self._staleness), Facts.merge([*facts, Facts(bytes_down=down)]),
            discarded, self._write(flights.step(), versions), flights.now,
        )  # fmt: skip

    def _seconds(self, version: int, client: int) -> float:
        return self._fleet.seconds(version + 1, client)  # as in the synchronous round that begins with this version

    def _train(self, landed: Sequence[Flight], versions: Mapping[int, _Version]) -> Iterator[tuple[int, Trained]]:
        """The work that has arrived, by the version it began with."""
        clients: dict[int, list[int]] = {}
        for flight in sorted(landed, key=lambda one: (one.version, one.client)):
            clients.setdefault(flight.version, []).append(flight.client)
        begun = [
            Begun(versions[version].start, RoundTask.from_table(versions[version].config), tuple(group))
            for version, group in clients.items()
        ]  # fmt: skip
        yield from zip(clients, self._grid.train(begun, self._timeout), strict=True)

    def _write(self, flights: Flights, versions: Mapping[int, _Version]) -> Pending:
        """Models from which nothing that arrives can count any more are let go."""
        used = {one.version for one in flights.going if self._staleness.admits(flights.version - one.version)}
        kept = {str(version): versions[version] for version in sorted(used)}
        facts = {
            "now": flights.now, "version": flights.version, "configs": {name: dict(one.config) for name, one in kept.items()},
            "going": [astuple(one) for one in flights.going],
        }  # fmt: skip
        return Pending(facts, {name: one.start for name, one in kept.items()})


def _read(pending: Pending | None) -> tuple[Flights, dict[int, _Version]]:
    if pending is None:
        return Flights(), {}
    facts = pending.facts
    going = tuple(Flight(float(arrives), int(version), int(client)) for arrives, version, client in facts["going"])
    versions = {int(name): _Version(pending.arrays[name], config) for name, config in facts["configs"].items()}
    return Flights(facts["now"], facts["version"], going), versions
