"""Who decides about rollouts: orders of people and evidence, each in the journal before it is done, then in the gateways' store.

Everything that changes a rollout goes through `RolloutControl`, in whatever process; those of one journal take turns, and the store
takes a change only of the revision that was looked at.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcore.errors import Refused, TryAgain
from fedcore.gateway.identity import spell
from fedcore.gateway.releases import Current, as_arm
from fedcore.privacy.randomness import RandomBytes
from fedcore.registry.catalogue import Catalogue
from fedcore.registry.journal import Journal, held
from fedcore.registry.names import check_model
from fedcore.registry.rollout import (
    Decision,
    Member,
    Plan,
    Rollout,
    Signal,
    Test,
    command,
    decide,
    draw_secret,
    new_rollout,
)
from fedcore.registry.rollout_record import decision_record, encode_rollout, order_record
from fedcore.state.gateway import GatewayStore
from fedcore.state.releases import Holding, Membership, RolloutEntry
from fedcore.state.stores import open_gateway_store

__all__ = ["Deployment", "Order", "RolloutControl", "Shape", "evidence_of", "plan_for", "read_settings", "with_members"]

_RECENT = 14 * 86_400  # seconds: a device that was not here for longer is not of the fleet that is counted
_PATIENCE = 30.0  # seconds to wait for another decider


@dataclass(frozen=True)
class Order:
    """Who ordered something, and why; for the journal."""

    who: str
    why: str


@dataclass(frozen=True)
class Shape:
    """How a rollout is to go; see `fedcore.registry.rollout_plan.Plan`. ``fleet`` devices, 0: as many as were here lately.
    ``budgets``: amounts, as p95_ms, that no more than a quarter of the canary may be above. ``kept``: so many of the model's
    rollouts stay in the store, this one among them; audit records all stay."""

    stages: tuple[float, ...] = (0.05, 0.2, 0.5)
    control: float = 0.4
    window: float = 86_400.0
    group: str = ""
    hardware: tuple[str, ...] = ()
    corrupt: float = 0.05
    fleet: int = 0
    budgets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kept: int = 20


@dataclass(frozen=True)
class Deployment:
    """Where a fleet keeps what concerns releases: the gateways' store, audit records, and the repository (empty: none)."""

    store: str
    journal: Path
    repository: str

    @classmethod
    def of(cls, fleet: Path, repository: str = "") -> Deployment:
        """That of a fleet's folder, as ``fedcore serve`` keeps it.

        Raises:
            Refused: it is no fleet's folder, or its gateway.json is damaged.
        """
        if not (fleet / "fleet").is_dir():
            raise Refused(f"{fleet} is no fleet's folder; fedcore serve makes one")
        settings = read_settings(fleet / "gateway.json")
        store = str(settings.get("store") or fleet / "store.sqlite")
        return cls(store, fleet / "releases.jsonl", repository or str(settings.get("repository") or ""))

    def control(self) -> RolloutControl:
        """With a connection of its own."""
        return RolloutControl(open_gateway_store(self.store), self.journal)


def read_settings(path: Path) -> dict[str, Any]:
    """What a gateway of the fleet was begun with; nothing where none ever was.

    Raises:
        Refused: the file is there and is damaged. Another store than the gateways' would be looked into if it were passed over.
    """
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        pass
    raise Refused(
        f"{path} is damaged, and says where the gateways' store is: put a copy of it back, or remove it if that is "
        f"{path.parent / 'store.sqlite'}"
    )


class RolloutControl:
    """Starts rollouts, carries out orders, decides. Raises, in all of its methods, `TryAgain` where the store or the disk fail.

    Raises:
        Refused: the journal's chain is broken.
    """

    def __init__(
        self, store: GatewayStore, journal: Path, clock: Callable[[], float] = time.time, random: RandomBytes = os.urandom
    ) -> None:  # fmt: skip
        self._store, self._journal, self._clock, self._random = store, journal, clock, random
        with held(journal, _PATIENCE):  # a torn line is cut off, which must not be one that somebody writes
            Journal(journal)

    def __enter__(self) -> RolloutControl:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def models(self) -> list[str]:
        """Models that have a rollout."""
        return sorted({one.model for one in self._store.releases.rollouts()})

    def newest(self, model: str) -> Current | None:
        """A model's current rollout, with its members; None if there never was one."""
        entries = [one for one in self._store.releases.rollouts() if one.model == model]
        return self._whole(entries[-1]) if entries else None

    def all_of(self, model: str) -> list[Current]:
        """Every rollout of a model, with its members."""
        return [self._whole(one) for one in self._store.releases.rollouts() if one.model == model]

    def running(self, model: str) -> Current:
        """As `newest`.

        Raises:
            Refused: there is none.
        """
        found = self.newest(model)
        if found is None:
            raise Refused(f"{model} has no rollout; fedcore release start begins one")
        return found

    def holdings(self, model: str) -> list[Holding]:
        """What devices run, as far as they were here lately."""
        since = self._clock() - _RECENT
        return [one for one in self._store.releases.holdings(model) if one.seen > since]

    def needed(self) -> dict[str, set[int]]:
        """By model, the releases that devices may be assigned or go back to: both sides of the current rollout, and what everybody
        else has. They may not be withdrawn."""
        found = {}
        for entry in self._store.releases.rollouts():  # the last of a model stays
            state = Current.of(entry).state
            plan = state.plan
            found[entry.model] = {plan.version, plan.baseline, plan.outside, state.fallback or 0} - {0}
        return found

    def start(
        self, model: str, version: int, catalogue: Catalogue, shape: Shape, order: Order, against: int | None = None
    ) -> Rollout:  # fmt: skip
        """Begin to roll a release out.

        Raises:
            Refused: there is no such release, another rollout is in its way, or the plan makes no sense.
        """
        with held(self._journal, _PATIENCE):
            before = self.newest(model)
            if shape.kept < 1:
                raise Refused(f"a model's current rollout is kept, so at least 1, got {shape.kept}")
            here, labelled = self.holdings(model), self._labelled(shape.group) if shape.group else set()
            fleet = [one for one in here if not shape.group or one.device in labelled]
            counted = shape.fleet or len(here)
            plan = plan_for(model, version, before.state if before else None, shape, counted, len(fleet), against)
            plan = replace(plan, signals=_shared(plan, catalogue))
            known = [spell(one.device) for one in fleet]
            secret = draw_secret(plan, known, self._random) if plan.baseline else self._random(32)
            targets = {} if before is None else dict(before.state.targets)
            wanted = {plan.version, plan.baseline, plan.rest or 0} - {0}
            for one in (*sorted(wanted - set(targets)), plan.version):
                targets[one] = catalogue.digest(model, one).hex()
            kept = {one: targets[one] for one in wanted}
            state = command(replace(new_rollout(plan, secret), targets=kept), "start")
            record = order_record(state, "start", order.who, order.why, self._clock()) | {"plan": dataclasses.asdict(plan)}
            number = before.entry.number + 1 if before else 1
            self._commit(RolloutEntry(plan.name, model, number, 1, ""), state, record)
            self._store.releases.prune_rollouts(model, shape.kept)
        return state

    def order(self, model: str, what: str, order: Order, fallback: tuple[int, str] | None = None) -> Rollout:
        """Carry out what a person wants (see `fedcore.registry.rollout.command`); ``fallback`` is a release and its SHA-256.

        Raises:
            Refused: the rollout is not where that makes sense.
        """
        with held(self._journal, _PATIENCE):
            current = self.running(model)
            state = command(current.state, what, fallback=fallback[0] if fallback else None)
            if fallback is not None:
                state = replace(state, targets={**state.targets, fallback[0]: fallback[1]})
            tests = evidence_of(current.state, self._clock()) if what == "promote" else ()
            self._commit(current.entry, state, order_record(state, what, order.who, order.why, self._clock(), tests))
        return state

    def decide(self, model: str) -> tuple[Rollout, Decision, tuple[Test, ...]]:
        """Look at the evidence, and do what follows from it: abort, go on to the next stage, or nothing."""
        with held(self._journal, _PATIENCE):
            current = self.running(model)
            state, decision, tests = decide(current.state, (), self._clock())
            if decision in {"abort", "promote"}:
                self._commit(current.entry, state, decision_record(state, decision, tests, self._clock()))
        return state, decision, tests

    def _labelled(self, label: str) -> set[int]:
        """The devices that the operator gave a label."""
        return {one.id for one in self._store.devices() if label in one.labels}

    def _whole(self, entry: RolloutEntry) -> Current:
        current = Current.of(entry)
        return replace(current, state=with_members(current.state, self._store.releases.members(entry.name)))

    def _commit(self, entry: RolloutEntry, state: Rollout, record: Mapping[str, Any]) -> None:
        """Into the journal, then into the store. ``entry`` is what was there, or a new one with an empty document."""
        journal = Journal(self._journal)
        journal.append(record)
        document = encode_rollout(replace(state, members={})).decode()
        revision = entry.revision + 1 if entry.document else 1
        if not self._store.releases.advance_rollout(replace(entry, revision=revision, document=document)):
            journal.append({"at": self._clock(), "rollout": entry.name, "event": "void", "by": "store", "why": "decided elsewhere"})
            raise TryAgain(f"{entry.name}: somebody else decided about it at this moment; look again")


def evidence_of(state: Rollout, clock: float) -> tuple[Test, ...]:
    """What the votes show, also of a rollout that is paused or over; nothing of a first release, which is compared with nothing."""
    return decide(replace(state, phase="running"), (), clock)[2] if state.plan.baseline else ()


def _shared(plan: Plan, catalogue: Catalogue) -> tuple[Signal, ...]:
    """The signals that both releases can have: agreement with a self-test batch is one only where each of them has a batch."""
    both = all(catalogue.self_test(plan.model, one) for one in (plan.version, plan.baseline))
    return tuple(one for one in plan.signals if both or one.name != "disagreement")


def with_members(state: Rollout, rows: Sequence[Membership]) -> Rollout:
    """The state with what the store knows of its devices."""
    members = {}
    for row in rows:
        arm = as_arm(row)
        if arm is not None:
            members[spell(row.device)] = Member(arm, row.hardware, row.joined, row.values)
    return replace(state, members=members)


def plan_for(
    model: str, version: int, before: Rollout | None, shape: Shape, fleet: int, grouped: int, against: int | None = None
) -> Plan:  # fmt: skip
    """The plan of a new rollout, after the one ``before`` of its model.

    Args:
        fleet: devices that were here lately. grouped: those of ``shape.group``. against: the release to compare with (A/B).

    Raises:
        Refused: the rollout before has to be ended, the version is not a new one, or the shape makes no sense.
    """
    check_model(model)
    baseline = _settled(before)
    if before is not None and version <= max(before.plan.version, baseline):
        raise Refused(f"release {version} of {model} is not above {max(before.plan.version, baseline)}, which devices have seen")
    stages, control = shape.stages, shape.control
    if shape.group and baseline:
        if grouped < 2:
            raise Refused(
                f"{grouped} devices with the label {shape.group!r} were here lately; a canary and its control take two "
                "(fedcore device label gives labels)"
            )
        half = (grouped + 1) // 2
        first = half / fleet if half / fleet * fleet >= half else math.nextafter(half / fleet, 1.0)
        stages = (first, *(one for one in stages[1:] if one > first))
    if against is not None:
        if not baseline < against < version:
            raise Refused(f"A/B: {against} has to be above {baseline}, which all devices have, and below {version}")
        if not baseline:
            raise Refused("A/B: a first release has nothing beside it")
    rest, baseline = (None, baseline) if against is None else (baseline, against)
    return Plan(
        f"{model}-{version}", model, version, baseline, max(fleet, 1), stages, min(control, 1 - stages[-1]) or control,
        shape.window, _signals(shape.budgets), shape.hardware, shape.corrupt, group=shape.group, rest=rest,
    )  # fmt: skip


def _settled(before: Rollout | None) -> int:
    """The release that every device should have now; 0 for none.

    Raises:
        Refused: a rollout is under way.
    """
    if before is None:
        return 0
    if before.phase == "full":
        return before.plan.version
    if before.fallback is not None:
        return before.fallback
    if before.phase == "aborted" and before.plan.baseline:
        raise Refused(f"{before.plan.name} was aborted, and its canary still has it: fedcore release rollback {before.plan.model}")
    if before.phase == "aborted":
        return 0
    raise Refused(f"{before.plan.name} is {before.phase}: promote it to the end or abort it first")


def _signals(budgets: Mapping[str, float]) -> tuple[Signal, ...]:
    from fedcore.registry.rollout import SIGNALS

    amounts = {one.name for one in SIGNALS if one.kind == "amount"}
    if unknown := sorted(set(budgets) - amounts):
        raise Refused(f"no amount {unknown[0]!r} is reported; budgets are of {', '.join(sorted(amounts))}")
    return tuple(
        replace(one, budget=budgets[one.name], ceiling=0.25) if one.name in budgets else one for one in SIGNALS
    )  # fmt: skip
