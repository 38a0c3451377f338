"""A rehearsal: a deployment is beaten until its run ends, and then judged."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fedcore.chaos.check import Finding, check_run, check_secrets, secrets_of, store_of
from fedcore.chaos.deployment import Deployment, left_behind
from fedcore.chaos.faults import Blow, Faults, blows
from fedcore.chaos.network import HarmfulNetwork
from fedcore.gateway.deployment import Fleet

__all__ = ["KINDS", "Judged", "Plan", "rehearse"]

KINDS = ("kill", "disk", "network")
_LOOK = 0.1  # seconds
_AFTER = 1.0  # seconds before a coordinator that gave up is begun again
_MOST_ABORTS = 40
_LEAVING, _BEGINNING = 60.0, 30.0
WIRE = Faults(drop=0.004, duplicate=0.002, delay=0.05, reorder=0.002, truncate=0.004, corrupt=0.004)
MESSAGES = Faults(drop=0.06, duplicate=0.08, delay=0.08, reorder=0.06, truncate=0.02, corrupt=0.04)


@dataclass(frozen=True)
class Plan:
    """How a deployment is beaten: ``kinds`` of `KINDS`, by a ``seed``, with a blow ``every`` so many seconds for at most
    ``seconds`` (and ``most`` blows, if that is not 0); the network does harm all that time. Then it has ``patience`` seconds to
    finish its run. ``targets`` are who may
    be hit, all where none is named."""

    seed: int
    kinds: Sequence[str] = KINDS
    every: float = 3.0
    seconds: float = 60.0
    most: int = 0
    patience: float = 300.0
    targets: Sequence[str] = ()
    work: float = 0.5
    wire: Faults = WIRE
    messages: Faults = MESSAGES


@dataclass
class Judged:
    """What was done, how often the coordinator gave up with one clear line, and what was found."""

    seed: int
    happened: Counter[str] = field(default_factory=Counter)
    aborts: list[str] = field(default_factory=list)
    rounds: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing was found to be broken."""
        return all(one.holds is not False for one in self.findings)


def rehearse(deployment: Deployment, plan: Plan, tell: Callable[[str], None]) -> Judged:
    """Run a deployment's scenario under faults to its end, and judge it; ``tell`` is told what happens.

    Raises:
        RoundFailed: a process does not begin even before any fault.
    """
    judged = Judged(plan.seed)
    with deployment:
        with _network(deployment, plan) as (network, addresses):
            deployment.enrol_devices(addresses, work=plan.work)
            _beat(deployment, plan, judged, tell)
            if network is not None:
                network.calm()
            finished = _wait(deployment, plan.patience, judged, tell)
            if network is not None:
                judged.happened += network.happened
        judged.rounds = len({one["round"] for one in deployment.events("round")})
        coordinator = deployment.parts["coordinator"].process
        if finished and coordinator is not None:  # which is about to end by itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                coordinator.wait(_LEAVING)
        deployment.end_but_store()
        findings = _findings(deployment)
    text = f"{judged.rounds} rounds, {len(judged.aborts)} times given up and continued"
    unclear = [line for line in judged.aborts if not line.startswith(("error: ", "interrupted"))]
    why = "" if finished else f"the run did not end: {deployment.last_words('coordinator')}"
    judged.findings = [
        Finding("rounds go on", finished, why or text),
        Finding("a run that gives up says why", not unclear, "; ".join(unclear[:2]) or f"{len(judged.aborts)} times"),
        *findings,
    ]
    left = left_behind(deployment.name)
    judged.findings.append(Finding("no process left behind", not left, "; ".join(left) or "none"))
    return judged


@contextlib.contextmanager
def _network(deployment: Deployment, plan: Plan) -> Iterator[tuple[HarmfulNetwork | None, list[str]]]:
    gateways = deployment.gateways()
    if "network" not in plan.kinds:
        yield None, gateways
        return
    with HarmfulNetwork(gateways, Fleet(deployment.fleet / "fleet"), plan.wire, plan.messages, plan.seed) as network:
        yield network, network.addresses


def _beat(deployment: Deployment, plan: Plan, judged: Judged, tell: Callable[[str], None]) -> None:
    """Blow upon blow, until the run ends or the time is over."""
    end = time.monotonic() + plan.seconds
    parts = [one for one in (*deployment.parts, "gateway") if not plan.targets or one in plan.targets]
    kills = parts if "kill" in plan.kinds else []
    disks = [one for one in parts if one != "redis"] if "disk" in plan.kinds else []  # Redis ends itself on a full disk
    if not kills and not disks:
        _wait(deployment, plan.seconds, judged, tell)
        return
    series = blows(plan.seed, kills, disks, plan.every)
    for blow in itertools.islice(series, plan.most) if plan.most else series:
        if _wait(deployment, min(blow.pause, end - time.monotonic()), judged, tell) or time.monotonic() >= end:
            return
        if _strike(deployment, blow, judged, tell):
            judged.happened[f"{blow.kind} {blow.target.rpartition('-')[0] or blow.target}"] += 1
    if "network" in plan.kinds:  # which goes on when no blow is left
        _wait(deployment, end - time.monotonic(), judged, tell)


def _strike(deployment: Deployment, blow: Blow, judged: Judged, tell: Callable[[str], None]) -> bool:
    """One blow and its end; whether it hit anybody: one who is just being begun again is waited for."""
    end = time.monotonic() + _BEGINNING
    while deployment.process_of(blow.target) is None and time.monotonic() < end:
        if _wait(deployment, _LOOK, judged, tell):
            return False
    hit = deployment.kill(blow.target) if blow.kind == "kill" else deployment.fill_disk(blow.target, full=True)
    if hit:
        tell(f"{blow.kind} {blow.target} for {blow.seconds:.1f} s")
    _wait(deployment, blow.seconds, judged, tell)
    if blow.kind == "kill":
        deployment.begin_again(blow.target)
    else:
        deployment.fill_disk(blow.target, full=False)
    return hit


def _wait(deployment: Deployment, seconds: float, judged: Judged, tell: Callable[[str], None]) -> bool:
    """Wait, and begin again what ended by itself; whether the run has ended well."""
    end = time.monotonic() + seconds
    while True:
        if deployment.events("result"):
            return True
        for part in deployment.parts.values():
            if part.wanted and not part.running:
                words = deployment.last_words(part.name)
                if part.name == "coordinator":
                    judged.aborts.append(words)
                tell(f"{part.name} ended by itself: {words}")
                if len(judged.aborts) > _MOST_ABORTS:
                    return False
                time.sleep(_AFTER)
                part.begin()
        if time.monotonic() >= end:
            return False
        time.sleep(min(_LOOK, max(0.0, end - time.monotonic())))


def _findings(deployment: Deployment) -> list[Finding]:
    folders = sorted((deployment.folder / "devices").iterdir())
    journals = [folder / "journal.jsonl" for folder in folders if (folder / "journal.jsonl").exists()]
    logs = [*sorted((deployment.folder / "logs").glob("*.log")), deployment.fleet / "gateway.log"]
    logs = [one for one in logs if one.exists() and one.name != "redis.log"]
    found = check_run(
        deployment.run, deployment.store or store_of(deployment.fleet), journals=journals,
        uploads=[folder / "uploads" for folder in folders if (folder / "uploads").exists()], logs=logs,
    )  # fmt: skip
    told = [*(deployment.folder / "logs").iterdir(), deployment.fleet / "gateway.log", *journals]
    told += [path for path in deployment.run.rglob("*") if path.is_file()]
    return [*found, check_secrets(told, secrets_of(deployment.folder))]


def least(devices: int) -> int:
    """Uploads that suffice at a round's deadline: half of the devices, so that rounds go on while others are down."""
    return math.ceil(devices / 2)
