"""Which release a device should have: what it says is kept in the store, what it is told is signed and good for a while.

A gateway may know a rollout of a moment ago. The store tells it so before anybody joins, and it reads again: after an abort no
gateway assigns the release any more.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.commits import Committer
from fedcore.gateway.identity import spell
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.registry.assignment import LONGEST, Assignment, sign_assignment
from fedcore.registry.rollout import SILENCE, Arm, Rollout, arm_of, hardware_of, release_of, room
from fedcore.registry.rollout_record import decode_rollout
from fedcore.secagg.committee_wire import one_line
from fedcore.secagg.crypto import Signer
from fedcore.state.gateway import Device
from fedcore.state.releases import Holding, Membership, Outcome, RolloutEntry, Visit, Worst

__all__ = ["Current", "Desk", "as_arm", "holding_of", "visit_of", "votes_of"]

_TEXTS, _LABELS, _REPORTS, _MEASURES, _NOTE = 64, 32, 16, 32, 200
_SHORTEST = 300  # seconds of an assignment: time to fetch a model and try it
_LOOKS = 3  # at a rollout that changes meanwhile
_RARELY = 1.0  # seconds between two looks for a model of which nothing is known


@dataclass(frozen=True)
class Current:
    """A rollout as the store had it."""

    entry: RolloutEntry
    state: Rollout

    @classmethod
    def of(cls, entry: RolloutEntry) -> Current:
        """From the store's row."""
        return cls(entry, decode_rollout(entry.document.encode()))


def holding_of(device: Device, body: pb.ReleaseBody, now: float) -> Holding:
    """What a device says that it runs, under the labels that the operator enrolled it with: whether it is of a group that gets a
    release first is not for the device to say, so the labels in ``body`` count for nothing.

    Raises:
        GatewayRefusal: texts that are too long or too many, or a version that no release has.
    """
    texts = (body.model, body.tier, body.runtime, body.hardware, *body.labels)
    within = len(body.labels) <= _LABELS and len(body.health) <= _REPORTS and all(len(one) <= _TEXTS for one in texts)
    if not (within and body.model and body.version < 1 << 53 and all(len(one.measures) <= _MEASURES for one in body.health)):
        raise GatewayRefusal(
            pb.MALFORMED, f"a model's name, at most {_LABELS} labels, {_REPORTS} reports of {_MEASURES} values, texts of {_TEXTS}"
        )  # fmt: skip
    note = next((f"release {one.version}: {one_line(one.refused)}"[:_NOTE] for one in body.health if one.refused), "")
    return Holding(
        device.id, body.model, body.version, body.tier, body.runtime, body.hardware, device.labels, now, note
    )  # fmt: skip


def votes_of(health: Iterable[pb.Health], known: Mapping[str, Rollout]) -> tuple[Worst, ...]:
    """What counts of a device's reports: known signals, of a release that one of the arms of a known rollout has.

    A release that was not installed counts as a crash, and as the worst wherever nothing is said.
    """
    found = []
    for one in health:
        state = known.get(one.rollout)
        if state is None or one.version not in (state.plan.version, state.plan.baseline):
            continue
        arm = "canary" if one.version == state.plan.version else "control"
        signals = {signal.name for signal in state.plan.signals} - {SILENCE}
        values = {part.signal: part.value for part in one.measures if part.signal in signals and _sound(part.value)}
        if one.refused:
            values["crash"] = max(1.0, values.get("crash", 0.0))
        found.append(Worst(one.rollout, arm, values))
    return tuple(found)


def visit_of(holding: Holding, current: Current, reports: tuple[Worst, ...]) -> Visit:
    """What the store is asked for a device: to join the arm that its place is in, if there is room."""
    state, device, now = current.state, holding.device, holding.seen
    arm, joining = arm_of(state, spell(device), holding.labels), None
    if arm is not None:
        hardware = hardware_of(state.plan, holding.hardware)
        joining = Membership(device, arm, hardware, now, now + state.plan.window)
    known = (current.entry.name, current.entry.revision)
    return Visit(holding, known, joining, room(state, arm) if arm is not None else 0, reports)


class Desk:
    """Answers ``Release``. ``key`` signs assignments, which last two times ``every`` (seconds between two calls of a device)."""

    def __init__(self, committer: Committer, key: Signer, every: float, clock: Callable[[], float] = time.time) -> None:
        self._committer, self._key, self._clock = committer, key, clock
        self._life = int(min(LONGEST, max(_SHORTEST, 2 * every)))
        self._known: dict[str, Current] = {}  # by rollout
        self._newest: dict[str, Current] = {}  # by model
        self._looked = -math.inf

    async def answer(self, device: Device, body: pb.ReleaseBody) -> tuple[bytes, str]:
        """The signed assignment of a device, or nothing and why.

        Raises:
            GatewayRefusal: the body is out of bounds. TryAgain: the store cannot be used now.
        """
        holding = holding_of(device, body, self._clock())
        for _ in range(_LOOKS):
            current = self._newest.get(body.model)
            if current is None:
                await self._look(_RARELY)
                current = self._newest.get(body.model)
            if current is None:  # nothing is kept for names that anybody could make up
                return b"", "there is no release of this model yet"
            reports = votes_of(body.health, {name: one.state for name, one in self._known.items()})
            visit = visit_of(holding, current, reports)
            outcome = await self._committer.call(lambda store, visit=visit: store.releases.visit(visit))  # type: ignore[misc]
            if outcome.current:
                return self._told(device, holding, current, outcome)
            await self._look(0.0)
        raise TryAgain(f"the rollout of {body.model} changes faster than it can be read")

    def _told(self, device: Device, holding: Holding, current: Current, outcome: Outcome) -> tuple[bytes, str]:
        state = current.state
        version = release_of(state, as_arm(outcome.member))
        if not version:
            return b"", "this device is not among those that get the first release now"
        if version < holding.version:
            return b"", f"release {holding.version} was taken back; the one before returns as a new one"
        now = int(self._clock())
        one = Assignment(
            hashlib.sha256(device.public_key).digest(), outcome.sequence, current.entry.name, current.entry.model, version,
            bytes.fromhex(state.targets[version]), now, now + self._life, bytes(64),
        )  # fmt: skip
        return sign_assignment(one, self._key), ""

    async def _look(self, pause: float) -> None:
        """Read all rollouts, unless that was done less than ``pause`` seconds ago."""
        now = time.monotonic()
        if now < self._looked + pause:
            return
        self._looked = now
        entries = await self._committer.call(lambda store: store.releases.rollouts())
        known = {one.name: self._kept(one) for one in entries}
        self._known, self._newest = known, {one.model: known[one.name] for one in entries}  # the last of a model stays

    def _kept(self, entry: RolloutEntry) -> Current:
        before = self._known.get(entry.name)
        return before if before is not None and before.entry == entry else Current.of(entry)


def as_arm(member: Membership | None) -> Arm | None:
    """The arm of a row of the store.

    Raises:
        Refused: it is none.
    """
    if member is None:
        return None
    if member.arm == "canary":
        return "canary"
    if member.arm == "control":
        return "control"
    raise Refused(f"a rollout has no arm {member.arm!r}")


def _sound(value: float) -> bool:
    return math.isfinite(value) and value >= 0
