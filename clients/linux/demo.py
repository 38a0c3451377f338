"""`make demo-devices`: a federation of device processes on this machine, with TLS, secure aggregation and differential privacy.

Each device holds the smartwatch recordings of one person. Two are killed on the way, one is added late.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fedcore_device.agent import enrol_device
from fedcore_device.state import State
from rich.console import Console

from fedcore.cli_gateway import list_devices
from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.serve import Choice, DeviceRun, pin_committee
from fedcore.data import federate, load_dataset
from fedcore.display import follow

DEVICES, KILLED, MEMBERS = 8, (1, 4), (1, 2, 3)
SCENARIO = """
[run]
name = "watches"
rounds = 10
[data]
dataset = "smartwatch"
partition = "natural"
[model]
name = "imu_cnn"
[training]
epochs = 2
batch_size = 16
lr = 0.1
[strategy]
name = "fedavg"
[cohort]
timeout = 30
[[privacy]]
unit = "example"
noise_multiplier = 1.0
delta = 1e-5
[secagg]
enabled = true
minimum_survivors = 4
trust = "bundle.json"
trust_key = "root/signing.pub"
"""
POLICY = """
[plan]
minimum_devices = 4
corrupt_devices = 0
[conditions]
idle = false
windows = []
"""
FEDCORE = [sys.executable, "-c", "from fedcore.cli import main; main()"]


def fedcore(folder: Path, *arguments: str) -> str:
    """What a command of fedcore prints, in ``folder``."""
    return subprocess.run([*FEDCORE, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout  # noqa: S603


@contextlib.contextmanager
def committee(folder: Path, fleet: FleetFolder) -> Iterator[str]:
    """Three operators as processes; the lines of [secagg] that name them."""
    fedcore(folder, "trust", "keygen", "--out", "root")
    made = [json.loads(fedcore(folder, "committee", "keygen", "--out", f"m{a}", "--json")) for a in MEMBERS]
    members = [part for a in MEMBERS for part in ("--member", f"m{a}/identity.pub")]
    signer = fleet.fleet.directory / "signer" / "signing.pub"
    fedcore(
        folder, "trust", "bundle", "root", "--population", "watches", "--threshold", "3", "--corrupt", "2", *members,
        "--enrol-ca", str(signer), "--out", "bundle.json",
    )  # fmt: skip
    (folder / "floor.toml").write_text("minimum_survivors = 4\ncorrupt_clients = 0\nnoise_multiplier = 0\n")
    command = [*FEDCORE, "committee", "serve"]
    common = ["--trust", "bundle.json", "--root", "root/signing.pub", "--policy", "floor.toml"]
    processes = [
        subprocess.Popen([*command, f"m{a}", *common], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        for a in MEMBERS
    ]
    try:
        addresses = [process.stdout.readline().split()[-1] for process in processes if process.stdout]
        fingerprints = [one["fingerprint"] for one in made]
        yield f"operators = {json.dumps(addresses)}\noperator_fingerprints = {json.dumps(fingerprints)}\n"
    finally:
        for process in processes:
            process.terminate()


class Watches:
    """The devices: one process each."""

    def __init__(self, folder: Path, fleet: FleetFolder, address: str) -> None:
        self.folder, self.fleet, self.address = folder, fleet, address
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def add(self, number: int) -> None:
        """Enrol a device and start it."""
        signer = self.fleet.signer()
        state = State(self.folder / f"device-{number}")
        enrol_device(state, self.address, signer.issue(600).encode())
        signer.close()
        (state.directory / "policy.toml").write_text(POLICY)
        command = [sys.executable, "-m", "fedcore_device", "--state", str(state.directory), "run", "--look", "1"]
        with (self.folder / f"device-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(  # noqa: S603
                [*command, "--examples", str(self.folder / f"person-{number}")], stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip

    def disturb(self, run: DeviceRun, console: Console) -> None:
        """Kill two devices and add one, as the rounds go by."""
        for after, number in ((3, KILLED[0]), (5, KILLED[1]), (7, None)):
            while run.coordinator.progress.round_number < after:
                time.sleep(0.1)
            if number is None:
                self.add(DEVICES)
                console.print(f"device {DEVICES} is added")
            else:
                self.processes[number].kill()
                console.print(f"device {number} is killed")

    def stop(self) -> None:
        """End them all."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(30)


def main() -> None:
    """Run the demonstration below runs/."""
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="devices-", dir="runs")).absolute()
    console, fleet = Console(width=160), FleetFolder.open(folder / "fleet", "watches")
    with committee(folder, fleet) as operators:
        (folder / "scenario.toml").write_text(SCENARIO + operators)
        config = load_config(folder / "scenario.toml")
        pin_committee(config, fleet)
        data = federate(config.data, load_dataset(config.data, config.folder, config.run.seed), config.run.seed)
        for number, rows in enumerate(data.clients):
            (folder / f"person-{number}").mkdir()
            part = data.dataset.train.take(rows)
            np.savez(folder / f"person-{number}" / "recordings.npz", x=part.x, y=part.y)
        with ServedGateway(fleet, "", "127.0.0.1:0", hold=2.0, least=0.5) as gateway:
            watches = Watches(folder, fleet, gateway.address)
            try:
                for number in range(DEVICES):
                    watches.add(number)
                with DeviceRun(config, folder / "run", fleet, fleet.store, Choice(1.0, 30.0, 4, 6), resume=False) as run:
                    threading.Thread(target=watches.disturb, args=(run, console), daemon=True).start()
                    follow(run, console, as_json=False)
                    result = run.finish()
            finally:
                watches.stop()
    list_devices(folder / "fleet")
    console.print(f"accuracy {result['accuracy']:.4f}; {folder / 'run' / 'report.html'}")


if __name__ == "__main__":
    main()
