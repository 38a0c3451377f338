"""Asynchronous work from the coordinator's side: a gateway round for each version of the model, and one in which devices wait.

A version's round is open until its updates would be too old. Its key follows from task and version, so that a coordinator that was
killed finds it again with everything that was acknowledged in it, and the devices that work on it notice nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping

from fedcore.errors import RoundFailed
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.conduct import Conductor, Forming
from fedcore.gateway.fleet import Selection
from fedcore.gateway.rounds import PRESENT, Place, RoundDocument
from fedcore.gateway.sums import UploadTerms
from fedcore.state.gateway import Contribution, Round, RoundState

__all__ = ["VersionConductor"]

_WAITING = "/waiting"  # a task of its own, whose rounds are no participations


class VersionConductor(Conductor):
    """Conducts rounds that are open side by side; the store is all that it shares with gateways."""

    def wait_room(self, task: str, selection: Selection) -> Forming:
        """Open the round in which devices of a task wait for work; one that was left open is closed."""
        return self.form(task + _WAITING, 1, selection)

    def waiting(self, room: Forming, since: Mapping[int, float]) -> list[int]:
        """The devices that checked in for work, each after the time ``since`` (Unix seconds) when it was given some last."""
        fresh = {note.device: note.time for note in self._retried(lambda: self._store.notes(room.round.key, PRESENT))}
        return [one.device for one in self.present(room) if fresh.get(one.device, 0.0) > since.get(one.device, 0.0)]

    def publish(self, task: str, version: int, selection: Selection, uploads: UploadTerms) -> Forming:
        """Open the round of a version, or find it as it is after a restart; no device is in it until `admit`."""
        key = hashlib.sha256(f"{task}/{version}".encode()).hexdigest()[:32]
        document = RoundDocument(selection, self._clock() + selection.deadline, uploads=uploads)
        if not self._made(Round(key, task, version + 1, RoundState.RUNNING, 1, document.encode())):
            found = self.find(task, version)
            if found is None:
                raise RoundFailed(f"version {version} of {task} cannot be opened")
            return found
        return Forming(Round(key, task, version + 1, RoundState.RUNNING, 1, document.encode()), document)

    def find(self, task: str, version: int) -> Forming | None:
        """The round of a version, open or closed; None where there is none."""
        key = hashlib.sha256(f"{task}/{version}".encode()).hexdigest()[:32]
        one = self._retried(lambda: self._store.round(key))
        return Forming(one, RoundDocument.decode(one.document)) if one else None

    def admit(self, one: Forming, plan: pb.Plan, devices: Collection[int]) -> Forming:
        """Give devices a version's plan, good for the selection's deadline from now on. Each call signs anew, so that no device is
        given one that is about to expire."""
        now = self._clock()
        until = now + one.document.selection.deadline
        signed = self._sign(plan, one, now, until).SerializeToString()
        used = sorted({place.plan for place in one.document.cohort.values()})  # plans that nobody holds any more are let go
        plans = (*(one.document.plans[index] for index in used), signed)
        cohort = {device: Place(used.index(place.plan)) for device, place in one.document.cohort.items()}
        cohort |= {device: Place(len(used)) for device in devices}
        return self._change(one, dataclasses.replace(one.document, until=until, plans=plans, cohort=cohort))

    def withdraw(self, one: Forming, devices: Collection[int]) -> Forming:
        """Take devices out that gave nothing in time; they may be given another version."""
        cohort = {device: place for device, place in one.document.cohort.items() if device not in devices}
        return self._change(one, dataclasses.replace(one.document, cohort=cohort))

    def finish(self, one: Forming, reason: str) -> Forming:
        """Close a version's round: what is acknowledged now is all there will be, and other uploads are refused as late."""
        if one.round.state is RoundState.CLOSED:
            return one
        document = dataclasses.replace(one.document, reason=reason)
        return Forming(self._advance(one.round, RoundState.CLOSED, document), document)

    def contributions(self, one: Forming) -> list[Contribution]:
        """Everything that is acknowledged in a version's round."""
        return self._retried(lambda: self._store.contributions(one.round.key))

    def running(self, one: Forming) -> bool:
        """Whether uploads are still taken."""
        return one.round.state is RoundState.RUNNING

    def gone(self, one: Forming) -> Mapping[int, str]:
        """The devices that said they give nothing, and why."""
        return self._gone(one)

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def pause(self) -> None:
        """Between two looks at the store."""
        self._sleep(self._pause)

    def _change(self, one: Forming, document: RoundDocument) -> Forming:
        return Forming(self._advance(one.round, RoundState.RUNNING, document), document)
