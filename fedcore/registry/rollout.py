"""A staged rollout as pure functions of a state, reports and a clock: who may install a release, and whether it goes on.

draft -> running (stage 0 is the canary, then larger shares) -> full, or aborted; and paused. A device's place is
HMAC-SHA-256(secret of the rollout, device): the lowest share is exposed, the highest is the control, which keeps the
baseline. Both grow with the stages and join when they check in, so that they live at the same time. Each identity has one vote a
signal: what it reported within ``window`` seconds of joining, the worst of it, clipped; or that it was silent. Votes enter when the
window closes, whatever they say, so neither their order nor bad news that travels faster counts. `fedcore.registry.confidence`
judges them, and may be asked as often as one likes.

The chance that a harmless release is ever aborted is at most ``alpha``, of which a fifth pays for a draw of more liars than allowed
for; of the rest one half goes to the signals over all devices, one half to those of each hardware model.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedcore.errors import Refused
from fedcore.registry.confidence import allowed_liars, ceiling_evidence, excess_evidence, histogram, ratio_evidence

__all__ = ["SIGNALS", "SILENCE", "Decision", "Member", "Phase", "Plan", "Report", "Rollout", "Signal", "Test", "assign", "command",
           "decide", "exposed", "new_rollout", "place_of"]  # fmt: skip

Phase = Literal["draft", "running", "paused", "full", "aborted"]
Decision = Literal["abort", "promote", "inconclusive", "hold"]
Arm = Literal["canary", "control"]
SILENCE = "silence"
_LIARS_SHARE = 0.2  # of alpha
_RULE_OF_THREE = 3.0  # n votes without a failure bound its rate by 3 / n at 95 % (Hanley and Lippman-Hand 1983)


@dataclass(frozen=True)
class Signal:
    """Something that devices report, the less the better.

    Args:
        kind: a `rate` is in [0, 1] and compared by means; an `amount` is positive and compared by medians.
        limit: the harm that is still acceptable: an absolute difference of rates, or a share more of an amount.
        tolerance: harm beyond which a release is aborted as soon as it is shown; in the same units.
        ceiling: a rate that is too much whatever the control does; 1 for none.
        clip: rates above it count as it: the lower, the fewer votes show a small difference of rates that are small.
        required: whether promotion needs it. One that is not, as energy, counts where it is reported.
    """

    name: str
    limit: float
    kind: Literal["rate", "amount"] = "rate"
    tolerance: float = 0.0
    ceiling: float = 1.0
    clip: float = 1.0
    required: bool = True


SIGNALS = (
    Signal("disagreement", 0.02, clip=0.2),  # with the labels of the self-test batch in the release
    Signal("errors", 0.02, clip=0.2),
    Signal("crash", 0.02),  # of a load
    Signal("p95_ms", 0.25, "amount"),
    Signal("peak_bytes", 0.25, "amount"),
    Signal("joules", 0.25, "amount", required=False),
    Signal("celsius", 0.1, "amount", required=False),
    Signal(SILENCE, 0.05),
)


@dataclass(frozen=True)
class Plan:
    """What was decided before a rollout began. ``baseline`` is the release that the control keeps; ``fleet`` counts devices.

    ``stages`` are shares of the fleet; ``control`` is the share that stays at the last of them, and less before; ``enough`` is the
    part of a stage whose votes a promotion waits for. ``corrupt`` is the share of devices that may lie. ``hardware`` models are
    judged apart, all others as one.
    """

    name: str
    model: str
    version: int
    baseline: int
    fleet: int
    stages: tuple[float, ...] = (0.05, 0.2, 0.5)
    control: float = 0.4
    window: float = 86400.0
    signals: tuple[Signal, ...] = SIGNALS
    hardware: tuple[str, ...] = ()
    corrupt: float = 0.05
    alpha: float = 0.05
    enough: float = 0.5

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages and rising and self.control > 0 and self.stages[0] > 0 and self.stages[-1] + self.control <= 1):
            raise Refused(f"stages rise from above 0 and leave room for the control, got {self.stages} and {self.control}")
        if min(math.floor(self.stages[0] * self.fleet), math.floor(self.control_at(0) * self.fleet)) < 1:
            raise Refused(f"of {self.fleet} devices, a canary of {self.stages[0]:g} or a control of {self.control:g} is nobody")
        if not (self.version > self.baseline >= 0 and self.window > 0 and 0 < self.alpha < 1 and 0 < self.enough <= 1):
            raise Refused("a rollout's version is above its baseline, its window positive, alpha and enough between 0 and 1")
        if not 0 <= self.corrupt < 0.5:
            raise Refused(f"a share of liars is below one half, got {self.corrupt:g}")
        if len({one.name for one in self.signals}) < len(self.signals) or any(one.limit <= one.tolerance for one in self.signals):
            raise Refused("every signal is named once, and its limit is above its tolerance")
        if any(not 0 < one.clip <= 1 or (one.ceiling < 1 and one.ceiling >= one.clip) for one in self.signals):
            raise Refused("a signal's clip is in (0, 1] and above its ceiling")

    def control_at(self, stage: int) -> float:
        """The share of the fleet that is the control at a stage."""
        return self.control * self.stages[stage] / self.stages[-1]


@dataclass(frozen=True)
class Report:
    """What a device says of the release it was assigned. Values that are no finite numbers of 0 or more are passed over."""

    device: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Member:
    """A device that takes part: since when, the worst of what it reported, and whether its window is over."""

    arm: Arm
    hardware: str
    joined: float
    values: Mapping[str, float] | None = None
    closed: bool = False


@dataclass(frozen=True)
class Rollout:
    """The state. ``fallback`` is the release, above the aborted one, that has the baseline's content once it is published."""

    plan: Plan
    secret: bytes = field(repr=False)
    phase: Phase = "draft"
    stage: int = 0
    members: Mapping[str, Member] = field(default_factory=dict, repr=False)
    fallback: int | None = None


@dataclass(frozen=True)
class Test:
    """One comparison: logs of the evidence for harm and for its absence, and what each has to reach."""

    __test__ = False  # not one of pytest's

    group: str
    signal: str
    canary: int
    control: int
    liars: tuple[int, int]
    harm: float
    harm_needed: float
    fine: float | None = None
    fine_needed: float | None = None

    @property
    def harmful(self) -> bool:
        """Harm is shown."""
        return self.harm >= self.harm_needed

    @property
    def harmless(self) -> bool:
        """Harm beyond the limit is ruled out."""
        return self.fine is not None and self.fine_needed is not None and self.fine >= self.fine_needed


def new_rollout(plan: Plan, secret: bytes) -> Rollout:
    """A draft. ``secret``: 32 random bytes that no device knows, new for each rollout: who could aim at a place would."""
    if len(secret) != hashlib.sha256().digest_size:
        raise Refused(f"a rollout's secret has 32 bytes, got {len(secret)}")
    return Rollout(plan, secret)


def place_of(secret: bytes, device: str) -> float:
    """A device's place in [0, 1), the same as long as the rollout lasts."""
    return int.from_bytes(hmac.digest(secret, device.encode(), "sha256")[:6], "big") / 2**48


def exposed(state: Rollout) -> int:
    """Devices that were ever assigned the new release by a stage."""
    return sum(member.arm == "canary" for member in state.members.values())


def assign(state: Rollout, device: str, hardware: str, clock: float) -> tuple[Rollout, int]:
    """The state with the device in it, and the release that it should have.

    After an abort that is the baseline, until the fallback is there; devices that have the new release refuse it as older.
    """
    plan = state.plan
    if state.phase == "full":
        return state, plan.version
    if state.phase in {"draft", "aborted"}:
        return state, plan.baseline if state.fallback is None else state.fallback
    member = state.members.get(device)
    if member is None and state.phase == "running":
        share, place = plan.stages[state.stage], place_of(state.secret, device)
        arm: Arm | None = None
        if place < share and exposed(state) < math.floor(share * plan.fleet):
            arm = "canary"
        elif place >= 1 - plan.control_at(state.stage):
            arm = "control"
        if arm is not None:
            member = Member(arm, hardware if hardware in plan.hardware else "other", clock)
            state = replace(state, members={**state.members, device: member})
    return state, plan.version if member is not None and member.arm == "canary" else plan.baseline


def decide(state: Rollout, reports: Iterable[Report], clock: float) -> tuple[Rollout, Decision, tuple[Test, ...]]:
    """Take reports in, close windows that are over, and abort, go on to the next stage, or wait. The tests are the evidence."""
    state = replace(state, members=_closed(_merged(state.members, reports), state.plan.window, clock))
    if state.phase != "running":
        return state, "hold", ()
    tests = tuple(_tests(state))
    if any(test.harmful for test in tests):
        return replace(state, phase="aborted"), "abort", tests
    if _may_promote(state, tests):
        return _promoted(state), "promote", tests
    return state, "inconclusive", tests


def command(state: Rollout, what: str, *, fallback: int | None = None) -> Rollout:
    """What a person orders: start, pause, resume, promote, abort, or roll back (with the release that has the old content).

    Raises:
        Refused: the rollout is not where that makes sense.
    """
    if what == "roll back":
        if fallback is None or fallback <= state.plan.version:
            raise Refused(f"going back is a release above {state.plan.version} that has the content of {state.plan.baseline}")
        if state.phase == "draft":
            raise Refused("the rollout is draft: nothing to roll back")
        return replace(state, phase="aborted", fallback=fallback)
    moves: dict[str, tuple[tuple[Phase, ...], Phase]] = {
        "start": (("draft",), "running"), "pause": (("running",), "paused"), "resume": (("paused",), "running"),
        "promote": (("running", "paused"), "running"), "abort": (("running", "paused", "full"), "aborted"),
    }  # fmt: skip
    if what not in moves:
        raise Refused(f"{what!r} is no order; orders are {', '.join(moves)}, roll back")
    allowed, phase = moves[what]
    if state.phase not in allowed:
        raise Refused(f"the rollout is {state.phase}: {what} is possible when it is {' or '.join(allowed)}")
    return _promoted(state) if what == "promote" else replace(state, phase=phase)


def _promoted(state: Rollout) -> Rollout:
    if state.stage + 1 < len(state.plan.stages):
        return replace(state, phase="running", stage=state.stage + 1)
    return replace(state, phase="full")


def _merged(members: Mapping[str, Member], reports: Iterable[Report]) -> dict[str, Member]:
    """The worst of each value counts, so neither order nor repetition does. Strangers and late reports are left out."""
    found = dict(members)
    for report in reports:
        member = found.get(report.device)
        if member is None or member.closed:
            continue
        values = dict(member.values or {})
        for name, value in report.values.items():
            if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
                values[name] = max(float(value), values.get(name, 0.0))
        found[report.device] = replace(member, values=values)
    return found


def _closed(members: Mapping[str, Member], window: float, clock: float) -> dict[str, Member]:
    return {
        device: replace(member, closed=True) if not member.closed and member.joined + window <= clock else member
        for device, member in members.items()
    }


def _may_promote(state: Rollout, tests: Sequence[Test]) -> bool:
    plan = state.plan
    votes = sum(member.closed and member.arm == "canary" for member in state.members.values())
    if votes < plan.enough * math.floor(plan.stages[state.stage] * plan.fleet):
        return False
    overall = {test.signal: test for test in tests if test.group == "all" and test.fine is not None}
    return all(
        overall[one.name].harmless and (one.kind == "amount" or overall[one.name].canary >= _RULE_OF_THREE / one.limit)
        for one in plan.signals
        if one.required
    )


def _tests(state: Rollout) -> Iterable[Test]:
    plan = state.plan
    closed = [member for member in state.members.values() if member.closed]
    groups = (*plan.hardware, "other") if plan.hardware else ()
    rows = len(plan.signals) + sum(one.ceiling < 1 for one in plan.signals)
    alpha = plan.alpha * (1 - _LIARS_SHARE) / (2 if groups else 1)
    walls = {"all": math.log(rows / alpha), **{group: math.log(rows * len(groups) / alpha) for group in groups}}
    liars_alpha = plan.alpha * _LIARS_SHARE / (2 * len(walls))
    for group, wall in walls.items():
        arms = [[one for one in closed if one.arm == arm and group in {"all", one.hardware}] for arm in ("canary", "control")]
        liars = (
            allowed_liars(len(arms[0]), plan.corrupt, liars_alpha),
            allowed_liars(len(arms[1]), plan.corrupt, liars_alpha),
        )
        for signal in plan.signals:
            yield from _compared(signal, arms, liars, group, wall, math.log(len(plan.signals) / plan.alpha))


def _compared(
    signal: Signal, arms: Sequence[Sequence[Member]], liars: tuple[int, int], group: str, wall: float, fine_wall: float
) -> Iterable[Test]:
    canary, control = (_votes(arm, signal) for arm in arms)
    counts = (len(canary), len(control))
    whole = group == "all"
    if signal.kind == "amount":
        harm = ratio_evidence(canary, control, *liars, 1 + signal.tolerance)
        fine = ratio_evidence(control, canary, *liars[::-1], 1 / (1 + signal.limit)) if whole else None
        yield Test(group, signal.name, *counts, liars, harm, wall, fine, fine_wall if whole else None)
        return
    new, old = (histogram(np.array(votes) / signal.clip) for votes in (canary, control))
    harm = float(excess_evidence(new, old, *liars, signal.tolerance / signal.clip))
    fine = float(excess_evidence(old, new, *liars[::-1], -signal.limit / signal.clip)) if whole else None
    yield Test(group, signal.name, *counts, liars, harm, wall, fine, fine_wall if whole else None)
    if signal.ceiling < 1:
        yield Test(
            group,
            f"{signal.name} at most {signal.ceiling:g}",
            *counts,
            liars,
            float(ceiling_evidence(new, liars[0], signal.ceiling / signal.clip)),
            wall,
        )


def _votes(arm: Sequence[Member], signal: Signal) -> list[float]:
    """One a member. Who reported but left out what is required gets the worst vote: leaving out must not hide anything."""
    if signal.name == SILENCE:
        return [float(member.values is None) for member in arm]
    worst = 1.0 if signal.kind == "rate" else math.inf
    spoke = [member.values for member in arm if member.values is not None]
    return [values.get(signal.name, worst) for values in spoke if signal.required or signal.name in values]
