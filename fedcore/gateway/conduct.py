"""A round from the coordinator's side: collect devices, publish plans, watch uploads come in, close.

It talks to the store alone, so that gateways may die and come back meanwhile. What a coordinator that died left open, the next
one closes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedcore.errors import BudgetSpent, RoundFailed, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.fleet import HOLD, Progress, Selection, Told, choose, judge_round, why_ineligible, why_resting
from fedcore.gateway.plan import sign_plan
from fedcore.gateway.rounds import ENDS, PRESENT, REPORT, Place, RoundDocument, is_for
from fedcore.gateway.sums import RunningSum, UploadTerms
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import Signer
from fedcore.state.gateway import Contribution, GatewayStore, Round, RoundState, Standing

__all__ = ["Conductor", "Finished", "Forming", "Present"]

_GRACE = 5.0  # seconds that a device may need to check in again
_FOR_SPARE = 0.1  # of the window, waited for devices beyond the goal
_PATIENCE = 60.0  # seconds that a store may be away in the middle of a round
_T = TypeVar("_T")
_GIVES_NOTHING = ENDS | {pb.INELIGIBLE}


@dataclass(frozen=True)
class Present:
    """A device that waits for a round: what it told, and its round key, where it was asked for one."""

    device: int
    told: Told
    round_key: bytes


@dataclass(frozen=True)
class Forming:
    """A round for which devices check in."""

    round: Round
    document: RoundDocument
    asked: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Finished:
    """A round that is over: what counts, its sum (empty where uploads were kept whole), and why other devices gave nothing."""

    contributions: Sequence[Contribution]
    total: RunningSum
    absent: Mapping[int, str]
    progress: Progress
    seconds: float


class Conductor:
    """Conducts the rounds of a deployment. ``pause``: seconds between two looks at the store."""

    def __init__(
        self, store: GatewayStore, deployment: str, plan_key: Signer, *, pause: float = 0.1, clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep, random: RandomBytes = os.urandom,
    ) -> None:  # fmt: skip
        self._store, self._deployment, self._key = store, deployment, plan_key
        self._pause, self._clock, self._sleep, self._random = pause, clock, sleep, random
        self._attempt = 0
        self._tasks = set[str]()  # that rounds were formed for here

    def form(self, task: str, number: int, selection: Selection) -> Forming:
        """Open a round for check-ins; what a coordinator of this task that died left open is closed first."""
        if task not in self._tasks:
            self._end_abandoned(task)
            self._tasks.add(task)
        document = RoundDocument(selection, self._clock() + selection.window)
        one = Round(secrets.token_hex(16), task, number, RoundState.FORMING, 1, document.encode())
        if not self._made(one):
            raise RoundFailed("a round's key was used before")
        return Forming(one, document)

    def gather(self, forming: Forming, resting: Collection[int] = ()) -> list[int]:
        """Devices to work in the round, none of them ``resting``: wait until enough check in or the window ends, then draw.

        Where only devices beyond the goal are missing, a tenth of the window is waited for them: a fleet may have no more.

        Raises:
            RoundFailed: fewer than the minimum checked in; the round is closed.
            BudgetSpent: likewise, and with those that rest there would be enough.
        """
        selection, end = forming.document.selection, forming.document.until
        until = end
        while True:
            present = [one.device for one in self.present(forming) if one.device not in resting]
            until = min(until, self._clock() + selection.window * _FOR_SPARE) if len(present) >= selection.goal else end
            if len(present) >= selection.asked or self._clock() >= until:
                break
            self._sleep(self._pause)
        if len(present) < selection.minimum:
            reason = f"{len(present)} devices checked in within {selection.window:g} s; the round needs {selection.minimum}"
            self.close(forming, reason)
            others = self._resting(forming, resting)
            if len(present) + others < selection.minimum:
                raise RoundFailed(reason)
            raise BudgetSpent(
                f"round {forming.round.number}: {reason}. {others} others may not take part: they have as often as they may, or "
                "too recently"
            )
        return choose(present, selection, self._random)

    def _resting(self, forming: Forming, resting: Collection[int]) -> int:
        """How many devices of the fleet only their earlier rounds keep out."""
        task, number, selection = forming.round.task, forming.round.number, forming.document.selection
        fleet = [one for one in self._retried(self._store.devices) if one.standing is Standing.ACTIVE]
        return sum(one.id in resting or bool(why_resting(one.participations.get(task), selection, number)) for one in fleet)

    def present(self, forming: Forming) -> list[Present]:
        """The devices that wait for a round now and may take part."""
        since = self._clock() - HOLD - _GRACE
        found = []
        for note in self._retried(lambda: self._store.notes(forming.round.key, PRESENT)):
            if note.time >= since:
                said = json.loads(note.text)
                found.append(Present(note.device, Told.decode(said["told"]), bytes.fromhex(said["round_key"])))
        task, number, selection = forming.round.task, forming.round.number, forming.document.selection
        taken = {one.device: self._retried(lambda one=one: self._store.device(one.device)) for one in found}  # type: ignore[misc]
        return [
            one for one in found
            if (device := taken[one.device]) and not why_ineligible(one.told, device.participations.get(task), selection, number)
        ]  # fmt: skip

    def invite(
        self, forming: Forming, visit: tuple[str, int, int], devices: Sequence[int], wait: float
    ) -> tuple[Forming, list[Present]]:
        """Ask devices for a round key for ``visit``; those of them that gave one within ``wait`` seconds."""
        document = dataclasses.replace(forming.document, visit=visit, until=self._clock() + wait)
        asked = Forming(self._advance(forming.round, RoundState.FORMING, document), document, frozenset(devices))
        end = self._clock() + wait
        while True:
            found = [one for one in self.present(asked) if one.device in asked.asked and is_for(one.round_key, visit)]
            if len(found) == len(asked.asked) or self._clock() >= end:
                return asked, found
            self._sleep(self._pause)

    def run(
        self, forming: Forming, plans: Sequence[pb.Plan], cohort: Mapping[int, Place], uploads: UploadTerms, deadline: float, *,
        task: str = "", number: int = 0,
    ) -> Finished:  # fmt: skip
        """Give the cohort its plans, which are completed and signed here, and wait until the round is decided.

        ``task`` and ``number`` replace those that the round was formed under; devices' participations are counted by them.
        """
        begun = self._clock()
        changed = dataclasses.replace(forming.round, task=task or forming.round.task, number=number or forming.round.number)
        forming = dataclasses.replace(forming, round=changed)
        selection = dataclasses.replace(forming.document.selection, deadline=min(deadline, forming.document.selection.deadline))
        until = begun + selection.deadline
        self._tasks.add(forming.round.task)
        signed = tuple(self._sign(plan, forming, begun, until).SerializeToString() for plan in plans)
        document = dataclasses.replace(
            forming.document, selection=selection, until=until, plans=signed, cohort=cohort, uploads=uploads
        )  # fmt: skip
        running = Forming(self._advance(forming.round, RoundState.RUNNING, document), document)
        while True:
            uploaded = {one.device for one in self._retried(lambda: self._store.contributions(running.round.key))}
            gone = {device for device in self._gone(running) if device not in uploaded}
            progress = judge_round(selection, len(cohort), len(uploaded), len(gone), self._clock() - begun)
            if progress is not Progress.GOING:
                break
            self._sleep(self._pause)
        reason = "the round has what it needs" if progress is Progress.DONE else "the round failed"
        self.close(running, reason)
        return self._finished(running, progress, self._clock() - begun)

    def close(self, one: Forming, reason: str) -> None:
        """End a round; nothing counts any more."""
        document = dataclasses.replace(one.document, reason=reason)
        self._advance(one.round, RoundState.CLOSED, document)

    def _sign(self, plan: pb.Plan, forming: Forming, now: float, until: float) -> pb.SignedPlan:
        self._attempt = max(self._attempt + 1, int(1000 * now))  # rises also after a restart
        complete = pb.Plan()
        complete.CopyFrom(plan)
        complete.deployment, complete.task, complete.round = self._deployment, forming.round.task, self._attempt
        complete.issued_ms, complete.expires_ms = int(1000 * now), int(1000 * until)
        complete.minimum_uploads = forming.document.selection.minimum
        return sign_plan(self._key, complete)

    def _finished(self, running: Forming, progress: Progress, seconds: float) -> Finished:
        key = running.round.key
        contributions = self._retried(lambda: self._store.contributions(key))
        total = RunningSum()
        for partial in self._retried(lambda: self._store.partials(key)):
            total.merge(RunningSum.decode(partial))
        counted, gone = {one.device for one in contributions}, self._gone(running)
        absent = {device: gone.get(device, "no upload") for device in sorted(running.document.cohort) if device not in counted}
        return Finished(contributions, total, absent, progress, seconds)

    def _gone(self, running: Forming) -> dict[int, str]:
        """The devices that said they give nothing, and why."""
        found = {}
        for note in self._retried(lambda: self._store.notes(running.round.key, REPORT)):
            said = json.loads(note.text)
            if said.get("outcome") in _GIVES_NOTHING:
                found[note.device] = f"{pb.Outcome.Name(said['outcome']).lower()}: {said['text']}".rstrip(": ")
        return found

    def _advance(self, before: Round, state: RoundState, document: RoundDocument) -> Round:
        after = dataclasses.replace(before, state=state, version=before.version + 1, document=document.encode())
        if not self._made(after):
            raise RoundFailed("another coordinator works on this deployment's rounds")
        return after

    def _made(self, change: Round) -> bool:
        """Make a change of a round, or find that it was made by a call whose answer was lost."""
        return self._retried(lambda: self._store.advance(change)) or self._retried(lambda: self._store.round(change.key)) == change

    def _end_abandoned(self, task: str) -> None:
        """Close what is open of a task and of those below it, as its evaluations."""
        for key in self._retried(self._store.rounds):
            one = self._retried(lambda key=key: self._store.round(key))  # type: ignore[misc]
            if one is not None and f"{one.task}/".startswith(f"{task}/") and one.state is not RoundState.CLOSED:
                self.close(Forming(one, RoundDocument.decode(one.document)), "the coordinator began anew")

    def _retried(self, work: Callable[[], _T]) -> _T:
        end = self._clock() + _PATIENCE
        while True:
            try:
                return work()
            except TryAgain:
                if self._clock() >= end:
                    raise
            self._sleep(self._pause)
