"""How a rollout stands, as plain values for people and scripts; and the loop that decides by evidence."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedcore.coordinator.releases import Registry, roll_back
from fedcore.coordinator.rollouts import Deployment, Order, RolloutControl, evidence_of
from fedcore.errors import FedcoreError, TryAgain
from fedcore.registry.journal import plain
from fedcore.registry.repository import renew
from fedcore.registry.rollout import Rollout, Test, decide, exposed
from fedcore.secagg.committee_wire import one_line
from fedcore.state.releases import Holding

__all__ = ["Steward", "attend", "standing"]

_LOG = logging.getLogger(__name__)
_RENEWAL = 6 * 3600.0  # seconds between two signatures of a timestamp, which is good for a day
_NOTES = 5
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_BY_EVIDENCE = "evidence"


def standing(control: RolloutControl, model: str, now: float | None = None) -> dict[str, Any]:
    """Where a model's rollout is: phase, stage, arms with their votes, evidence, versions that devices run, why some refused.

    Raises:
        Refused: it has no rollout.
    """
    state, clock = control.running(model).state, time.time() if now is None else now
    held = control.holdings(model)
    closed, _, _ = decide(state, (), clock)  # of which only the votes are taken
    versions = Counter(one.version for one in held)
    return {
        "model": model, "rollout": state.plan.name, "version": state.plan.version, "baseline": state.plan.baseline,
        "rest": state.plan.rest, "phase": state.phase, "stage": state.stage, "stages": list(state.plan.stages),
        "fallback": state.fallback, "fleet": state.plan.fleet, "exposed": exposed(state), "arms": _arms(closed),
        "tests": [_test(one) for one in evidence_of(state, clock)],
        "versions": {str(version): count for version, count in sorted(versions.items())},
        "refused": _reasons(held),
    }  # fmt: skip


def _reasons(held: Sequence[Holding]) -> dict[str, int]:
    """Why devices refused a release, and how many for each reason; reasons that differ in numbers alone are one, by an example."""
    groups: dict[str, list[str]] = {}
    for one in held:
        if one.note:
            note = f"{one.version} runs, {one.note}"
            head, colon, reason = note.partition(": ")
            groups.setdefault(head + colon + _NUMBER.sub("0", reason), []).append(note)
    found = sorted(groups.values(), key=lambda notes: (-len(notes), min(notes)))
    shown = {min(notes): len(notes) for notes in found[:_NOTES]}
    return shown | ({"other reasons": sum(map(len, found[_NOTES:]))} if found[_NOTES:] else {})


def _arms(state: Rollout) -> dict[str, dict[str, int]]:
    found = {}
    for arm in ("canary", "control"):
        members = [one for one in state.members.values() if one.arm == arm]
        found[arm] = {
            "devices": len(members), "votes": sum(one.closed for one in members),
            "reported": sum(one.values is not None for one in members),
        }  # fmt: skip
    return found


def _test(one: Test) -> dict[str, Any]:
    return {name: plain(value) for name, value in {
        "group": one.group, "signal": one.signal, "canary": one.canary, "control": one.control, "harm": one.harm,
        "harm_needed": one.harm_needed, "fine": one.fine, "fine_needed": one.fine_needed, "harmful": one.harmful,
        "harmless": one.harmless,
    }.items()}  # fmt: skip


def attend(control: RolloutControl, model: str, registry: Registry | None) -> str:
    """Look once at a model's rollout: decide by evidence, and take back what was aborted where the keys for that are at hand.

    What was done, in a line; empty for nothing.
    """
    state, decision, tests = control.decide(model)
    done = ""
    if decision == "promote":
        share = f"stage {state.stage}, {state.plan.stages[state.stage]:.0%}" if state.phase == "running" else "all devices"
        done = f"{state.plan.name}: harm is ruled out; on to {share}"
    elif decision == "abort":
        why = ", ".join(sorted({test.signal for test in tests if test.harmful}))
        done = f"{state.plan.name}: aborted, by {why}; {exposed(state)} devices were exposed"
    if registry is not None and state.phase == "aborted" and state.fallback is None and state.plan.baseline:
        version = roll_back(control, registry, model, Order(_BY_EVIDENCE, "the rollout was aborted"))
        done = "; ".join(filter(None, (done, f"{state.plan.name}: release {version} has the content of {state.plan.outside}")))
    return done


@dataclass
class Steward:
    """Attends to all rollouts of a fleet every ``pause`` seconds, in a thread of its own; a context manager.

    With a registry it also takes back what was aborted, and signs the repository's timestamp anew. ``told`` hears what was done,
    and what went wrong, once each time that it changes.
    """

    deployment: Deployment
    registry: Registry | None
    pause: float = 30.0
    told: Callable[[str], None] = _LOG.info

    def __enter__(self) -> Steward:
        self._ending, self._problem, self._renewed = threading.Event(), "", 0.0
        self._thread = threading.Thread(target=self.run, name="release-steward", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(60)

    def run(self) -> None:
        """Go on until it is left."""
        while not self._ending.is_set():
            try:
                with self.deployment.control() as control:  # the store belongs to this thread, and may come back after a while
                    while not self._ending.is_set():
                        self._look(control)
                        self._ending.wait(self.pause)
            except FedcoreError as error:
                self._wrong(error)
                self._ending.wait(self.pause)

    def _look(self, control: RolloutControl) -> None:
        wrong: FedcoreError | None = None
        for model in control.models():
            try:
                if done := attend(control, model, self.registry):
                    self.told(done)
            except FedcoreError as error:  # neither the other models nor the timestamp wait for this one
                wrong = wrong or error
        if not self._renewed or time.monotonic() > self._renewed + _RENEWAL:
            self._renew()
        if wrong is not None:
            raise wrong
        self._problem = ""

    def _renew(self) -> None:
        from datetime import UTC, datetime

        with contextlib.suppress(TryAgain):  # whoever publishes at this moment signs anew as well
            if self.registry is not None:
                renew(self.registry.files, self.registry.signers, datetime.now(UTC))
            self._renewed = time.monotonic()

    def _wrong(self, error: FedcoreError) -> None:
        problem = one_line(str(error))
        if problem != self._problem:
            self.told(f"releases: {problem}")
        self._problem = problem
