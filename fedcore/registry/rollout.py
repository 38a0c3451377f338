"""A staged rollout as pure functions of a state, reports and a clock: who may install a release, and whether it goes on.

draft -> running (stage 0 is the canary, then larger shares) -> full, or aborted; and paused. A device's place is
HMAC-SHA-256(secret of the rollout, device): the lowest share is exposed, the highest is the control, which keeps the
baseline. Both grow with the stages and join when they check in, so that they live at the same time. A first release has
nothing to be compared with and is full at once. Each identity has one vote a
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedcore.errors import Refused
from fedcore.registry.confidence import allowed_liars, ceiling_evidence, excess_evidence, histogram, ratio_evidence
from fedcore.registry.rollout_plan import SIGNALS, SILENCE, Plan, Signal

__all__ = ["SIGNALS", "SILENCE", "Arm", "Decision", "Member", "Phase", "Plan", "Report", "Rollout", "Signal", "Test", "arm_of",
           "assign", "command", "decide", "draw_secret", "exposed", "hardware_of", "new_rollout", "place_of", "release_of",
           "room", "votes"]  # fmt: skip

Phase = Literal["draft", "running", "paused", "full", "aborted"]
Decision = Literal["abort", "promote", "inconclusive", "hold"]
Arm = Literal["canary", "control"]
_LIARS_SHARE = 0.2  # of alpha
_ARMS: tuple[Arm, Arm] = ("canary", "control")
_MANY = 2000  # devices, from which on one draw is about as good as the next
_UNBOUNDED = 2**31
_RULE_OF_THREE = 3.0  # n votes without a failure bound its rate by 3 / n at 95 % (Hanley and Lippman-Hand 1983)


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
    """The state. ``fallback`` is the release, above the aborted one, that has the baseline's content once it is published.

    ``targets``: of the releases that devices may be assigned, the hexadecimal SHA-256 that assignments name.
    """

    plan: Plan
    secret: bytes = field(repr=False)
    phase: Phase = "draft"
    stage: int = 0
    members: Mapping[str, Member] = field(default_factory=dict, repr=False)
    fallback: int | None = None
    targets: Mapping[int, str] = field(default_factory=dict, repr=False)


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


def draw_secret(plan: Plan, devices: Sequence[str], random: Callable[[int], bytes], draws: int = 64) -> bytes:
    """Of some random secrets the one that puts the shares of the first stage closest to what was planned, among known devices.

    A draw among draws stays random (rerandomization: Morgan and Rubin 2012, Annals of Statistics 40(2)), and looks at nothing but
    counts; it keeps the canary of a small fleet from being nobody.
    """
    wanted = (plan.stages[0] * len(devices), plan.control_at(0) * len(devices)) if not plan.group else (len(devices) / 2,) * 2
    best, closest = b"", math.inf
    for _ in range(draws):
        state = replace(new_rollout(plan, random(hashlib.sha256().digest_size)), phase="running")
        arms = [arm_of(state, device, (plan.group,)) for device in devices]
        off = sum(abs(arms.count(arm) - share) for arm, share in zip(_ARMS, wanted, strict=True))
        if off < closest:
            best, closest = state.secret, off
        if off <= max(2.0, 0.01 * len(devices)) and len(devices) > _MANY:
            break
    return best


def exposed(state: Rollout) -> int:
    """Devices that were ever assigned the new release by a stage."""
    return sum(member.arm == "canary" for member in state.members.values())


def arm_of(state: Rollout, device: str, labels: Iterable[str] = ()) -> Arm | None:
    """In which arm a device is that checks in now and is in none yet, as long as there is room in it; None: in neither."""
    plan, place = state.plan, place_of(state.secret, device)
    if state.phase != "running":
        return None
    if plan.group and state.stage == 0:
        return None if plan.group not in labels else "canary" if place < 0.5 else "control"
    if place < plan.stages[state.stage]:
        return "canary"
    return "control" if place >= 1 - plan.control_at(state.stage) else None


def room(state: Rollout, arm: Arm) -> int:
    """How many devices an arm may have at this stage."""
    plan = state.plan
    return math.floor(plan.stages[state.stage] * plan.fleet) if arm == "canary" else max(plan.fleet, _UNBOUNDED)


def release_of(state: Rollout, arm: Arm | None) -> int:
    """The release that a device of an arm (None: of neither) should have; 0 for none.

    After an abort that is the baseline, until the fallback is there; devices that have the new release refuse it as older.
    """
    plan = state.plan
    if state.phase == "full":
        return plan.version
    if state.fallback is not None:
        return state.fallback
    if arm == "canary" and state.phase in {"running", "paused"}:
        return plan.version
    return plan.baseline if arm == "control" else plan.outside


def hardware_of(plan: Plan, hardware: str) -> str:
    """The group of hardware in which a device is judged."""
    return hardware if hardware in plan.hardware else "other"


def assign(
    state: Rollout, device: str, hardware: str, clock: float, labels: Iterable[str] = ()
) -> tuple[Rollout, int]:  # fmt: skip
    """The state with the device in it, and the release that it should have: what gateways do with rows of a store, in one piece."""
    member = state.members.get(device)
    arm = arm_of(state, device, labels)
    if member is None and arm is not None and sum(one.arm == arm for one in state.members.values()) < room(state, arm):
        member = Member(arm, hardware_of(state.plan, hardware), clock)
        state = replace(state, members={**state.members, device: member})
    return state, release_of(state, member.arm if member is not None else None)


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
    if what == "start" and not state.plan.baseline:
        return replace(state, phase="full")
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
    if plan.rest is not None:
        return False
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
    liars = _liars(state)
    for group, wall in walls.items():
        arms = [[one for one in closed if one.arm == arm and group in {"all", one.hardware}] for arm in _ARMS]
        for signal in plan.signals:
            yield from _compared(signal, arms, liars, group, wall, math.log(len(plan.signals) / plan.alpha))


def _liars(state: Rollout) -> tuple[int, int]:
    """Most liars in each arm. Who is in one, chance decides, and no more than that: liars choose when they join and what hardware
    they name, so all of an arm may be among the first votes, or in one group."""
    plan = state.plan
    planned = (plan.stages[state.stage] * plan.fleet, plan.control_at(state.stage) * plan.fleet)
    joined = [one.arm for one in state.members.values()]
    canary, control = (max(math.floor(size), joined.count(arm)) for arm, size in zip(_ARMS, planned, strict=True))
    alpha = plan.alpha * _LIARS_SHARE / 2
    return allowed_liars(canary, plan.corrupt, alpha), allowed_liars(control, plan.corrupt, alpha)


def _compared(
    signal: Signal, arms: Sequence[Sequence[Member]], liars: tuple[int, int], group: str, wall: float, fine_wall: float
) -> Iterable[Test]:
    canary, control = (votes(arm, signal) for arm in arms)
    counts = (len(canary), len(control))
    whole = group == "all"
    if signal.kind == "amount":
        harm = ratio_evidence(canary, control, *liars, 1 + signal.tolerance)
        fine = ratio_evidence(control, canary, *liars[::-1], 1 / (1 + signal.limit)) if whole else None
        yield Test(group, signal.name, *counts, liars, harm, wall, fine, fine_wall if whole else None)
        if signal.ceiling < 1:
            over = float(ceiling_evidence(histogram(np.array(canary) > signal.budget), liars[0], signal.ceiling))
            name = f"{signal.name} above {signal.budget:g} or untold on more than {signal.ceiling:g}"
            yield Test(group, name, *counts, liars, over, wall)
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


def votes(arm: Sequence[Member], signal: Signal) -> list[float]:
    """One a member. Who reported but left out what is required gets the worst vote: leaving out must not hide anything."""
    if signal.name == SILENCE:
        return [float(member.values is None) for member in arm]
    worst = 1.0 if signal.kind == "rate" else math.inf
    spoke = [member.values for member in arm if member.values is not None]
    return [values.get(signal.name, worst) for values in spoke if signal.required or signal.name in values]
