"""`make demo-push`: a model is released to twenty device processes, followed by a better one, a wrong one and a slow one.

    python -m simulations.push [--devices 20] [--out DIR]

The wrong and the slow one are stopped by their canaries and taken back by themselves. Then the same decision function over a
simulated fleet of 2,000, with harm that a canary of 20 could not tell. A picture of versions over time and result.json stay in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcore_device.agent import enrol_device
from fedcore_device.installed import model_directory
from fedcore_device.state import State
from rich.console import Console

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.release_service import pin_root
from fedcore.coordinator.release_status import Steward, standing
from fedcore.coordinator.releases import Registry, compared, create_release, self_test_batch
from fedcore.coordinator.rollouts import Deployment, Order, Shape
from fedcore.coordinator.run import SimulatedRun
from fedcore.gateway.identity import spell
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create
from fedcore.registry.slots import read_pointer
from simulations.push.parts import with_debugging_branch
from simulations.push.rehearsal import VARIANTS, rehearse
from simulations.push.shown import draw, tables

MODEL, ORDER = "digits", Order("demo", "make demo-push")
_ROUNDS = (3, 6)  # of training, before the first release and the second
_EVERY = 2.0  # seconds between two questions of a device
_SHORTEST = 20.0  # seconds of a window
_SEEN = 5.0  # seconds of the end that the picture shows
_PATIENCE = 600.0  # seconds that the devices have for a step
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


class Devices:
    """Device processes, and who runs what over time."""

    def __init__(self, folder: Path, fleet: FleetFolder, address: str, count: int) -> None:
        self.folder, self.names, self.processes = folder, list[str](), list[subprocess.Popen[bytes]]()
        self.timeline: list[tuple[float, dict[int, int]]] = []
        self.ran: dict[int, set[str]] = {}
        self._began, self._ending = time.monotonic(), threading.Event()
        issuer = fleet.signer()
        for number in range(count):
            state = State(folder / f"device-{number}")
            enrolled = enrol_device(state, address, issuer.issue(600).encode())
            self.names.append(spell(enrolled.device))
            (state.directory / "policy.toml").write_text(POLICY)
        issuer.close()

    def __enter__(self) -> Devices:
        for number in range(len(self.names)):
            state = str(self.folder / f"device-{number}")
            command = [sys.executable, "-m", "fedcore_device", "--state", state, "run", "--look", "1"]
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
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._watching.join(10)

    def held(self) -> list[tuple[int, str]]:
        """Of every device the version that it runs, and its file's SHA-256."""
        found = []
        for number in range(len(self.names)):
            pointer = read_pointer(model_directory(self.folder / f"device-{number}", MODEL))
            files = pointer.current.files if pointer.current else {}
            found.append((pointer.current.version if pointer.current else 0, *(one.digest for one in files.values())))
        return [(one[0], one[1] if len(one) > 1 else "") for one in found]

    def refused(self, version: int) -> dict[str, int]:
        """Why devices found a release unfit, and how many did."""
        pointers = (read_pointer(model_directory(self.folder / f"device-{number}", MODEL)) for number in range(len(self.names)))
        return dict(Counter(one.unfit[str(version)] for one in pointers if str(version) in one.unfit))

    def now(self) -> float:
        """Seconds since they began."""
        return time.monotonic() - self._began

    def wait(self, what: Callable[[list[tuple[int, str]]], bool]) -> None:
        """Until ``what`` is so of what they hold."""
        end = time.monotonic() + _PATIENCE
        while not what(self.held()):
            if time.monotonic() > end:
                versions = dict(Counter(version for version, _ in self.held()))
                raise SystemExit(f"the devices did not get there in {_PATIENCE:g} s; they hold {versions}")
            time.sleep(0.3)

    def _watch(self) -> None:
        while not self._ending.wait(0.2):
            held = self.held()
            self.timeline.append((self.now(), dict(Counter(version for version, _ in held))))
            for name, (version, _) in zip(self.names, held, strict=True):
                self.ran.setdefault(version, set()).add(name)


def train(folder: Path, name: str, rounds: int, *, resume: bool = False, data: str = "") -> Path:
    """Train, and export with gates; the run's folder."""
    scenario = Path(__file__).parent / f".{name}.toml"  # beside parts, where its module is looked up
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


def demonstrate(folder: Path, count: int, console: Console) -> dict[str, Any]:
    """The releases over device processes; what came of them."""
    canary = 0.4
    shape = Shape((canary,), 1 - canary, corrupt=0.0, budgets={"p95_ms": 5.0})
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    with served(folder, _EVERY) as (fleet, registry, address):
        deployment = Deployment.of(fleet.directory)
        say(f"{count} devices, a gateway at {address}; one root key in three may be lost")
        run = train(folder, "good", _ROUNDS[0])
        with Devices(folder, fleet, address, count) as devices, Steward(deployment, registry, 0.5, say):
            scene = Scene(registry, deployment, devices, self_test_batch(run, 64), say)
            first = scene.release(run / "export", shape)
            began = devices.now()
            devices.wait(lambda held: all(version == first for version, _ in held))
            # For twenty at once this machine takes that long, their start included; a canary of eight has time to spare.
            shape = dataclasses.replace(shape, window=max(_SHORTEST, devices.now() - began))
            say(f"release {first} runs on all devices; from now on what a device says within {shape.window:.0f} s is its vote")

            run = train(folder, "good", _ROUNDS[1], resume=True)
            second, wrong = better(scene, run / "export", shape, int(canary * count), folder)
            good = devices.held()[0][1]
            slow = spoiled(run / "export", folder / "slow")
            found = [one_bad(scene, name, export, shape, good) for name, export in (("wrong", wrong), ("slow", slow))]
            contents = [digest for _, digest in devices.held()]
            time.sleep(_SEEN)
        with deployment.control() as control:
            rows, _ = compared(control, MODEL, second, first)
        say(f"release {second} against {first}: " + "; ".join(f"{row.signal}, {row.verdict}" for row in rows[:3]))
        return {
            "bad": found, "good": good, "contents": contents, "timeline": devices.timeline, "devices": count, "second": second,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a release meets. ``batch`` is for self-tests; ``say`` hears how it goes."""

    registry: Registry
    deployment: Deployment
    devices: Devices
    batch: bytes | None
    say: Callable[[str], None]

    def release(self, export: Path, shape: Shape) -> int:
        """Publish an export and begin its rollout; its version."""
        made = create_release(export, MODEL, self.batch, self.registry)
        with self.deployment.control() as control:
            control.start(MODEL, made.version, self.registry.catalogue(), shape, ORDER)
        return made.version

    def stands(self) -> dict[str, Any]:
        """See `standing`."""
        with self.deployment.control() as control:
            return standing(control, MODEL)

    def records(self, version: int) -> dict[str, Any]:
        """What the journal says of a release: the first record of each event."""
        held = [json.loads(line) for line in self.deployment.journal.read_text().splitlines()]
        return {one["event"]: one for one in reversed(held) if one["version"] == version}


def better(scene: Scene, export: Path, shape: Shape, canary: int, folder: Path) -> tuple[int, Path]:
    """A release that its canary likes and a person promotes: its version; and the export of a wrong one, trained meanwhile."""
    version = scene.release(export, shape)
    scene.devices.wait(lambda held: sum(one == version for one, _ in held) == canary)
    scene.say(f"release {version}: its canary has it")
    wrong = train(folder, "wrong", _ROUNDS[1], data='dataset = "parts:off_by_one"') / "export"
    scene.devices.wait(lambda held: sum(arm["votes"] for arm in scene.stands()["arms"].values()) == len(held))
    found = scene.stands()
    if harmful := [test["signal"] for test in found["tests"] if test["harmful"]] or found["phase"] != "running":
        raise SystemExit(f"release {version} was to be promoted; it is {found['phase']}, harmful by {harmful}")
    why = "the canary shows no harm; so few devices cannot rule it out"
    with scene.deployment.control() as control:
        control.order(MODEL, "promote", Order("demo", why))
    scene.devices.wait(lambda held: all(one == version for one, _ in held))
    scene.say(f"release {version} was promoted by a person ({why}) and runs on all devices")
    return version, wrong


def spoiled(export: Path, folder: Path) -> Path:
    """A copy of an export whose file was changed after the gates."""
    place = folder / "flagship" / "onnx"
    place.mkdir(parents=True)
    (folder / "export.json").write_bytes((export / "export.json").read_bytes())
    for path in (export / "flagship" / "onnx").iterdir():
        (place / path.name).write_bytes(with_debugging_branch(path.read_bytes()))
    return folder


def one_bad(scene: Scene, name: str, export: Path, shape: Shape, good: str) -> dict[str, Any]:
    """Release something bad, and wait until every device is back on the good content."""
    devices, began = scene.devices, scene.devices.now()
    version = scene.release(export, shape)
    scene.say(f"release {version} is {name}")
    devices.wait(lambda _: "roll back" in scene.records(version))
    devices.wait(lambda held: all(one > version and digest == good for one, digest in held))
    with scene.deployment.control() as control:
        members = control.running(MODEL).state.members
    canary = sorted(device for device, member in members.items() if member.arm == "canary")
    records = scene.records(version)
    harmful = sorted({one["signal"] for one in records["abort"].get("evidence", ()) if one["harmful"]})
    ran, refused = sorted(devices.ran.get(version, set())), devices.refused(version)
    seconds = records["abort"]["at"] - records["start"]["at"]
    scene.say(
        f"release {version} was aborted after {seconds:.0f} s; {len(ran)} of its {len(canary)} canaries ran it and nobody else; "
        f"all are back after {devices.now() - began:.0f} s"
    )
    for why, number in refused.items():
        scene.say(f"{number} devices did not install it, {why}")
    if not set(ran) <= set(canary):
        raise SystemExit(f"release {version} ran outside of its canary")
    return {"name": name, "version": version, "canary": canary, "ran": ran, "refused": refused, "aborted_by": harmful,
            "seconds": seconds, "began": began, "over": devices.now()}  # fmt: skip


def main() -> None:
    """Run the demonstration below runs/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--fleet", type=int, default=2000, help="of the simulated part")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    folder = (given.out or Path(tempfile.mkdtemp(prefix="push-", dir="runs"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console, began = Console(width=140), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the devices end with it
    told = demonstrate(folder, given.devices, console)
    told |= {"fleet": given.fleet, "rehearsals": {name: rehearse(given.fleet, one) for name, one in VARIANTS.items()}}
    for table in tables(told):
        console.print(table, highlight=False)
    draw(told, folder / "versions.png")
    (folder / "result.json").write_text(json.dumps(told, default=dataclasses.asdict) + "\n")
    console.print(f"{time.monotonic() - began:.0f} s; versions over time: {folder / 'versions.png'}", highlight=False)


if __name__ == "__main__":
    main()
