"""Buffered asynchronous rounds of real devices: whoever checks in is given the present version, and uploads are taken as they come.

Uploads are kept whole until they are in a committed step. What was taken from which version is part of the commit, so each counts
exactly once, whoever is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MessageType

from fedcore.config import RunConfig
from fedcore.coordinator.asynchronous import Collected, Given
from fedcore.coordinator.buffered import Arrived, Staleness, fill_buffer
from fedcore.coordinator.checkpoint import Pending
from fedcore.errors import Refused, RoundFailed
from fedcore.flower import Facts
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.conduct import Forming
from fedcore.gateway.fleet import Selection
from fedcore.gateway.sums import read_upload
from fedcore.gateway.versions import VersionConductor
from fedcore.grids.device import DeviceGrid, Offering
from fedcore.models import ParameterLayout

__all__ = ["BufferedDevices"]


class BufferedDevices(DeviceGrid):
    """The devices of a deployment as `asynchronous.Arrivals`, which the strategy is shown as so many nodes without a name.

    ``at_once`` devices work at once. One that has given nothing for the selection's deadline makes room for another.
    """

    def __init__(
        self, conductor: VersionConductor, blobs: Blobs, layout: ParameterLayout, task: str, selection: Selection,
        offering: Offering, config: RunConfig, at_once: int,
    ) -> None:  # fmt: skip
        super().__init__(conductor, blobs, layout, task, selection, offering, mean=False)
        self._versions, self._config, self._at_once = conductor, config.asynchronous, at_once
        self._staleness = Staleness(config.asynchronous.staleness_exponent, config.asynchronous.max_staleness)
        self._open: dict[int, Forming] = {}
        self._taken: dict[int, set[int]] = {}
        self._given: dict[int, tuple[int, float]] = {}  # by device the version it works on, and since when
        self._last: dict[int, float] = {}  # by device when it was given work last
        self._room: Forming | None = None
        self._finished: list[Forming] = []  # in the step before, whose uploads are committed by now
        self._shown: Sequence[int] = ()

    @property
    def gathering(self) -> None:
        """Nobody is gathered for a round."""
        return

    @property
    def nodes(self) -> Sequence[int]:
        """As many as the strategy is shown."""
        return self._shown

    @nodes.setter
    def nodes(self, shown: Sequence[int]) -> None:
        self._shown = shown

    def get_node_ids(self) -> Sequence[int]:
        """As many as the strategy is shown."""
        return list(self._shown)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        """Not available: nobody is waited for."""
        raise Refused("asynchronous rounds over devices give work to whoever checks in; a strategy cannot send its own messages")

    def close(self) -> None:
        """Let nobody wait any more. Versions stay open for the uploads of devices that work, until the run is continued."""
        if self._room is not None:
            self._versions.close(self._room, "the coordinator has stopped")
            self._room = None

    def collect(self, given: Given, pending: Pending | None, pay: Callable[[Sequence[int]], None]) -> Collected:  # noqa: ARG002
        """See `asynchronous.Arrivals`; with privacy, which is refused before, there would be a charge."""
        self._begin(given, pending)
        terms = self._terms(MessageType.TRAIN, given.task, masked=False)
        plan = self.plan(given.blob, given.config, MessageType.TRAIN, terms)
        self._open[given.version] = self._versions.publish(self._task, given.version, self._selection, terms)
        self._taken.setdefault(given.version, set())
        self._recall()
        parts, admitted, active = list[Arrived](), 0, self._versions.now()
        while True:
            arrived = [part for version in sorted(self._open) for part in self._take(version)]
            parts += arrived
            if len(parts) >= self._config.buffer:
                break
            self._make_room()
            chosen = self._choose(given.version)
            if chosen:
                self._open[given.version] = self._versions.admit(self._open[given.version], plan, chosen)
                now = self._versions.now()
                self._given |= dict.fromkeys(chosen, (given.version, now))
                self._last |= dict.fromkeys(chosen, now)
                admitted += len(chosen)
            active = self._versions.now() if arrived or chosen else active
            if self._versions.now() - active > self._selection.deadline + self._selection.window:
                reasons = [reason for one in self._open.values() for reason in self._versions.gone(one).values()]
                why = f"; a device said: {reasons[-1]}" if reasons else ""
                raise RoundFailed(f"{len(parts)} of {self._config.buffer} updates came, and nobody takes work any more{why}")
            self._versions.pause()
        discarded, late = self._expire(given.version)
        parts += late
        return self._collected(given, parts, admitted, discarded, terms.most_bytes)

    def _collected(self, given: Given, parts: Sequence[Arrived], admitted: int, discarded: int, upload: int) -> Collected:
        clients = tuple(sorted(client for part in parts for client in part.clients))
        facts = Facts(clients, (), upload * len(parts), admitted * len(given.blob))
        taken = {str(version): sorted(self._taken[version]) for version in sorted(self._open)}
        buffer = fill_buffer(len(given.start), parts, given.version, self._staleness)
        return Collected(buffer, facts, discarded, Pending({"taken": taken}, {}))

    def _begin(self, given: Given, pending: Pending | None) -> None:
        """After a start, find the versions again that were open at the last commit; later, forget what that commit settled."""
        for one in self._finished:
            self._forget(one)
        self._finished = []
        if self._room is not None:
            return
        taken = pending.facts["taken"] if pending else {}
        for name, devices in taken.items():
            found = self._versions.find(self._task, int(name))
            if found is None:
                raise RoundFailed(f"the store of the gateways has lost version {name} of {self._task}")
            self._open[int(name)], self._taken[int(name)] = found, set(devices)
        self._room = self._versions.wait_room(self._task, self._selection)
        if not self._staleness.admits(given.version - min(self._open, default=given.version)):
            raise RoundFailed("the last commit holds versions that are too old")

    def _recall(self) -> None:
        """After a restart: whoever is in a version's round and has not uploaded is taken to work on it since now."""
        now = self._versions.now()
        for version, one in self._open.items():
            for device in one.document.cohort if self._versions.running(one) else ():
                if device not in self._given and device not in self._taken[version]:
                    self._given[device] = version, now

    def _take(self, version: int) -> list[Arrived]:
        """The uploads of a version that were not taken before."""
        one, found = self._open[version], []
        if one.document.uploads is None:
            raise RoundFailed(f"version {version} of {self._task} says nothing of its uploads")
        for contribution in self._versions.contributions(one):
            device = contribution.device
            if device in self._taken[version]:
                continue
            part = read_upload(self._blobs.get(contribution.digest), one.document.uploads)
            weighted = part.weight * part.vector.astype(np.float64)
            found.append(Arrived(version, self._clients([device]), weighted, part.examples, part.loss))
            self._taken[version].add(device)
            if self._given.get(device, (version, 0.0))[0] == version:
                self._given.pop(device, None)
        return found

    def _make_room(self) -> None:
        """Count no more on devices that said they give nothing, or were silent for too long."""
        now = self._versions.now()
        for number, one in [(number, one) for number, one in self._open.items() if self._versions.running(one)]:
            working = {device: since for device, (held, since) in self._given.items() if held == number}
            gone = set(self._versions.gone(one)) & set(working) if working else set()
            silent = {device for device, since in working.items() if now - since > self._selection.deadline}
            if silent - gone:
                self._open[number] = self._versions.withdraw(one, silent - gone)
            for device in gone | silent:
                del self._given[device]

    def _choose(self, version: int) -> list[int]:
        """Devices that wait, as many as there is room for, that have not had this version."""
        if self._room is None or len(self._given) >= self._at_once:
            return []
        had = self._taken[version] | set(self._open[version].document.cohort) | set(self._given)
        found = [device for device in self._versions.waiting(self._room, self._last) if device not in had]
        return sorted(found)[: self._at_once - len(self._given)]

    def _expire(self, version: int) -> tuple[int, list[Arrived]]:
        """Close the versions whose updates would be too old after this step: how many devices that leaves behind, and the last
        uploads, which were acknowledged and count in this step."""
        discarded, late = 0, list[Arrived]()
        for number in [one for one in sorted(self._open) if not self._staleness.admits(version + 1 - one)]:
            reason = f"the model that it began with is more than {self._staleness.limit} steps old"
            self._open[number] = self._versions.finish(self._open[number], reason)
            late += self._take(number)
            left = self._left_behind(number)
            discarded += len(left)
            for device in left:
                del self._given[device]
            self._finished.append(self._open.pop(number))
        return discarded, late

    def _left_behind(self, number: int) -> Collection[int]:
        return [device for device, (held, _) in self._given.items() if held == number]

    def _forget(self, one: Forming) -> None:
        """Remove the uploads of a version that is closed and committed, but for what an open one shares with it."""
        shared = {found.digest for other in self._open.values() for found in self._versions.contributions(other)}
        for contribution in self._versions.contributions(one):
            if contribution.digest not in shared:
                self._blobs.remove(contribution.digest)
