"""`make demo-push`: a model is released to twenty device processes, followed by a better one, a wrong one and a slow one.

    python -m simulations.push [--devices 20] [--short] [--out DIR]

The wrong and the slow one are stopped by their canaries and taken back by themselves. Then the same decision function over a
simulated fleet of 2,000, with harm that a canary of 20 could not tell. A picture of versions over time and result.json stay in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fedcore_device.agent import enrol_device
from fedcore_device.installed import model_directory
from fedcore_device.state import State
from rich.console import Console

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.release_service import pin_root
from fedcore.coordinator.release_status import Steward
from fedcore.coordinator.releases import Registry, compared, create_release, self_test_batch
from fedcore.coordinator.rollouts import Deployment, Order, Shape
from fedcore.coordinator.run import SimulatedRun
from fedcore.gateway.identity import spell
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create
from fedcore.registry.rollout import Plan, Report, assign, command, decide, exposed, new_rollout
from fedcore.registry.slots import read_pointer
from simulations.push_parts import with_debugging_branch

MODEL, ORDER = "digits", Order("demo", "make demo-push")
SCENARIO = """
[run]
name = "digits"
rounds = {rounds}
seed = 5
[data]
clients = 10
partition = "iid"
{data}
[model]
name = "mlp"
[training]
lr = 0.2
[tiers.flagship]
targets = ["onnx"]
accuracy_loss = 5.0
latency_ms = 0.0
"""
POLICY = """
[device]
tier = "flagship"
[updates]
models = ["digits"]
idle = false
unmetered = false
battery_percent = 0
windows = []
probation = 5
"""
VARIANTS = {
    "harmless": {}, "takes 60 % more memory": {"memory": 1.6}, "crashes on 1 load in 20": {"crash": 0.05},
    "silences 1 device in 5": {"silent": 0.2},
}  # fmt: skip


class Devices:
    """Device processes, and who runs what over time."""

    def __init__(self, folder: Path, fleet: FleetFolder, address: str, count: int) -> None:
        self.folder, self.names, self.processes = folder, list[str](), list[subprocess.Popen[bytes]]()
        self.timeline: list[tuple[float, dict[int, int]]] = []
        self.ran: dict[int, set[str]] = {}
        self._began, self._ending = time.monotonic(), threading.Event()
        signer = fleet.signer()
        for number in range(count):
            state = State(folder / f"device-{number}")
            enrolled = enrol_device(state, address, signer.issue(600).encode())
            self.names.append(spell(enrolled.device))
            (state.directory / "policy.toml").write_text(POLICY)
        signer.close()

    def __enter__(self) -> Devices:
        for number in range(len(self.names)):
            command = [
                sys.executable,
                "-m",
                "fedcore_device",
                "--state",
                str(self.folder / f"device-{number}"),
                "run",
                "--look",
                "1",
            ]
            with (self.folder / f"device-{number}.log").open("ab") as log:
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)
        self._watching.join(10)

    def held(self) -> list[tuple[int, str]]:
        """Of every device the version that it runs, and its file's SHA-256."""
        found = []
        for number in range(len(self.names)):
            pointer = read_pointer(model_directory(self.folder / f"device-{number}", MODEL))
            files = pointer.current.files if pointer.current else {}
            found.append((pointer.current.version if pointer.current else 0, *(one.digest for one in files.values())))
        return [(one[0], one[1] if len(one) > 1 else "") for one in found]

    def now(self) -> float:
        """Seconds since they began."""
        return time.monotonic() - self._began

    def wait(self, what: Any, seconds: float) -> None:
        """Until ``what`` is so of what they hold."""
        end = time.monotonic() + seconds
        while not what(self.held()):
            if time.monotonic() > end:
                raise SystemExit(
                    f"the devices did not get there in {seconds:g} s: {Counter(version for version, _ in self.held())}"
                )
            time.sleep(0.3)

    def _watch(self) -> None:
        while not self._ending.wait(0.2):
            held = self.held()
            self.timeline.append((self.now(), dict(Counter(version for version, _ in held))))
            for name, (version, _) in zip(self.names, held, strict=True):
                self.ran.setdefault(version, set()).add(name)


def train(folder: Path, name: str, rounds: int, *, resume: bool = False, data: str = "") -> Path:
    """Train, and export with gates; the run's folder."""
    scenario = Path(__file__).parent / f".{name}.toml"  # beside push_parts, where its module is looked up
    scenario.write_text(SCENARIO.format(rounds=rounds, data=data))
    try:
        config = load_config(scenario).replace("run", name=MODEL)
    finally:
        scenario.unlink()
    with SimulatedRun(config, folder / name, resume=resume) as run:
        for _ in run.rounds():
            pass
        run.finish()
    subprocess.run([sys.executable, "-m", "fedcore.coordinator.publishing", str(folder / name), "flagship"], check=True)
    return folder / name


@contextlib.contextmanager
def served(folder: Path, every: float) -> Iterator[tuple[FleetFolder, Registry, str]]:
    """A repository, a fleet that pins its root, and a gateway that serves both."""
    place = folder / "repository"
    keys = make_keys(folder / "offline", folder / "online", 3, 2, publishes=True)
    create(LocalFiles(place), keys, load_signers([folder / "offline", folder / "online"]), datetime.now(UTC))
    fleet = FleetFolder.open(folder / "fleet", MODEL)
    pin_root(fleet.fleet, str(place))
    with ServedGateway(fleet, fleet.store, "127.0.0.1:0", repository=str(place), release_every=every) as gateway:
        yield fleet, Registry.open(str(place), [folder / "online"]), gateway.address


def demonstrate(folder: Path, count: int, console: Console, *, short: bool) -> dict[str, Any]:
    """The releases over device processes; what came of them."""
    rounds, canary = (3, 6), 0.4
    shape = Shape((canary,), 1 - canary, corrupt=0.0, budgets={"p95_ms": 5.0})
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    with served(folder, 1.0) as (fleet, registry, address):
        deployment = Deployment.of(fleet.directory)
        console.print(f"{count} devices, a gateway at {address}; one root key in three may be lost", highlight=False)
        run = train(folder, "good", rounds[0])
        batch = self_test_batch(run, 64)
        with Devices(folder, fleet, address, count) as devices, Steward(deployment, registry, 0.5, say):
            first = release(run / "export", batch, registry, deployment, shape)
            devices.wait(lambda held: all(version == first for version, _ in held), 300)
            # As long as this machine takes for all of them; and a device that found a release unfit says so within 90 s.
            window = max(100.0, (1.0 if short else 1.5) * devices.now())
            shape = dataclasses.replace(shape, window=window)
            say(f"release {first} runs on all devices; from now on what a device says within {window:.0f} s is its vote")

            run = train(folder, "good", rounds[1], resume=True)
            second = release(run / "export", batch, registry, deployment, shape)
            devices.wait(lambda held: sum(version == second for version, _ in held) == int(canary * count), 300)
            say(f"release {second}: its canary has it")
            time.sleep(window)
            with deployment.control() as control:
                control.order(MODEL, "promote", Order("demo", "the canary shows no harm; so few devices cannot rule it out"))
            devices.wait(lambda held: all(version == second for version, _ in held), 300)
            good = devices.held()[0][1]
            say(f"release {second} was promoted by a person and runs on all devices")

            slow = spoiled(run / "export", folder / "slow")
            wrong = train(folder, "wrong", rounds[1], data='dataset = "push_parts:off_by_one"') / "export"
            found = []
            for name, export in (("wrong", wrong), ("slow", slow)):
                found.append(one_bad(name, export, batch, registry, deployment, shape, devices, good, say))
        with deployment.control() as control:
            rows, _ = compared(control, MODEL, second, first)
        say("; ".join(f"{row.signal}: {row.verdict}" for row in rows[:3]) + f" (release {first} against {second})")
        return {
            "bad": found, "good": good, "contents": [digest for _, digest in devices.held()], "timeline": devices.timeline,
            "devices": count, "second": second,
        }  # fmt: skip


def release(export: Path, batch: bytes | None, registry: Registry, deployment: Deployment, shape: Shape) -> int:
    """Publish an export and begin its rollout."""
    made = create_release(export, MODEL, batch, registry)
    with deployment.control() as control:
        control.start(MODEL, made.version, registry.catalogue(), shape, ORDER)
    return made.version


def spoiled(export: Path, folder: Path) -> Path:
    """A copy of an export whose file was changed after the gates."""
    place = folder / "flagship" / "onnx"
    place.mkdir(parents=True)
    (folder / "export.json").write_bytes((export / "export.json").read_bytes())
    for path in (export / "flagship" / "onnx").iterdir():
        (place / path.name).write_bytes(with_debugging_branch(path.read_bytes()))
    return folder


def one_bad(
    name: str, export: Path, batch: bytes | None, registry: Registry, deployment: Deployment, shape: Shape, devices: Devices,
    good: str, say: Any,
) -> dict[str, Any]:  # fmt: skip
    """Release something bad, and wait until every device is back on the good content."""
    began = devices.now()
    version = release(export, batch, registry, deployment, shape)
    say(f"release {version} is {name}")
    devices.wait(lambda _: _over(deployment, version), 600)
    devices.wait(lambda held: all(one > version and digest == good for one, digest in held), 300)
    with deployment.control() as control:
        state = control.running(MODEL).state
    canary = sorted(device for device, member in state.members.items() if member.arm == "canary")
    records = [json.loads(line) for line in deployment.journal.read_text().splitlines()]
    abort = next(one for one in records if one["version"] == version and one["event"] == "abort")
    started = next(one for one in records if one["version"] == version and one["event"] == "start")
    harmful = sorted({one["signal"] for one in abort["evidence"] if one["harmful"]})
    ran = sorted(devices.ran.get(version, set()))
    seconds = abort["at"] - started["at"]
    say(f"release {version} was aborted after {seconds:.0f} s by {', '.join(harmful)}; {len(ran)} of its {len(canary)} canaries "
        f"ran it and nobody else; all are back after {devices.now() - began:.0f} s")  # fmt: skip
    if not set(ran) <= set(canary):
        raise SystemExit(f"release {version} ran outside of its canary")
    return {"name": name, "version": version, "canary": canary, "ran": ran, "aborted_by": harmful, "seconds": seconds,
            "began": began, "over": devices.now()}  # fmt: skip


def _over(deployment: Deployment, version: int) -> bool:
    with deployment.control() as control:
        state = control.running(MODEL).state
    return state.plan.version == version and state.fallback is not None


def rehearse(fleet: int, variant: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """A rollout over simulated devices: exposed devices and the phase by hour, until it is over."""
    rng = np.random.default_rng(seed)
    plan = Plan("rehearsal", MODEL, 2, 1, fleet, stages=(0.3, 0.6), control=0.4, window=6 * 3600.0, corrupt=0.0)
    state = command(new_rollout(plan, rng.bytes(32)), "start")
    memory, speed = 5e6 * np.exp(0.2 * rng.standard_normal(fleet)), 10 * np.exp(0.3 * rng.standard_normal(fleet))
    hours: list[tuple[int, int, str]] = []
    decision, tests = "inconclusive", ()
    for hour in range(96):
        clock, reports = 3600.0 * hour, []
        for number in np.flatnonzero(rng.random(fleet) < 0.25):
            device = f"device-{number}"
            state, _ = assign(state, device, "other", clock)
            member = state.members.get(device)
            if member is None or member.joined != clock:
                continue
            worse = variant if member.arm == "canary" else {}
            if rng.random() < 0.03 + worse.get("silent", 0.0):
                continue
            reports.append(Report(device, {
                "disagreement": float(np.clip(rng.normal(0.03, 0.01), 0, 1)), "errors": 0.1 * float(rng.random() < 0.01),
                "crash": float(rng.random() < 0.002 + worse.get("crash", 0.0)), "p95_ms": float(speed[number]),
                "peak_bytes": float(memory[number] * worse.get("memory", 1.0)),
            }))  # fmt: skip
        state, now, evidence = decide(state, reports, clock)
        hours.append((hour, exposed(state), state.phase))
        if now != "hold":
            decision, tests = now, evidence
        if state.phase in {"full", "aborted"}:
            break
    by = sorted({test.signal for test in tests if test.harmful}) if decision == "abort" else []
    return {"phase": state.phase, "exposed": exposed(state), "hours": len(hours), "by": by, "curve": hours}


def draw(told: dict[str, Any], path: Path) -> None:
    """Versions on the devices over time, and the simulated rollouts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), layout="constrained")
    times = [at for at, _ in told["timeline"]]
    versions = sorted({version for _, held in told["timeline"] for version in held})
    counts = [[held.get(version, 0) for _, held in told["timeline"]] for version in versions]
    above.stackplot(times, counts, labels=[f"release {version}" if version else "none" for version in versions])
    for one in told["bad"]:
        above.axvline(one["began"], color="black", lw=0.8, ls=":")
        above.text(one["began"], told["devices"] * 1.01, f"release {one['version']}: {one['name']}", fontsize=8)
    above.set(xlabel="seconds", ylabel="devices", ylim=(0, told["devices"]), xlim=(min(times), max(times)))
    above.legend(loc="lower right", fontsize=8)
    for name, one in told["rehearsals"].items():
        hours, shown = [hour for hour, _, _ in one["curve"]], [count for _, count, _ in one["curve"]]
        below.plot(
            hours, shown, label=f"{name}: {one['phase']}{' by ' + ', '.join(one['by']) if one['by'] else ''}", marker=".", ms=3
        )
    below.set(xlabel="hours", ylabel=f"of {told['fleet']} devices exposed", ylim=(0, None))
    below.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the demonstration below runs/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--fleet", type=int, default=2000, help="of the simulated part")
    parser.add_argument("--short", action="store_true", help="shorter windows")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    folder = (given.out or Path(tempfile.mkdtemp(prefix="push-", dir="runs"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console, began = Console(width=140), time.monotonic()
    told = demonstrate(folder, given.devices, console, short=given.short)
    told |= {"fleet": given.fleet, "rehearsals": {name: rehearse(given.fleet, one) for name, one in VARIANTS.items()}}
    for name, one in told["rehearsals"].items():
        why = f", by {', '.join(one['by'])}" if one["by"] else ""
        words = f"{one['phase']} after {one['hours']} h, {one['exposed']} exposed{why}"
        console.print(f"{given.fleet} simulated devices, a release that {name if name != 'harmless' else 'is harmless'}: {words}",
                      highlight=False)  # fmt: skip
    draw(told, folder / "versions.png")
    (folder / "result.json").write_text(json.dumps(told, default=dataclasses.asdict) + "\n")
    console.print(f"{time.monotonic() - began:.0f} s; versions over time: {folder / 'versions.png'}", highlight=False)


if __name__ == "__main__":
    main()
