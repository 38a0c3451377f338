"""A federation of device processes on loopback with TLS: what `fedcore serve` runs, and what it must equal."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.run import SimulatedRun
from fedcore.coordinator.serve import Choice, DeviceRun

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device.agent import enrol_device
from fedcore_device.state import State

PROCESS = Path(__file__).with_name("device_process.py")
SCENARIO = """
[run]
name = "watches"
rounds = {rounds}
seed = 3
[data]
dataset = "digits"
clients = {clients}
partition = "dirichlet"
alpha = 1.0
[model]
name = "{model}"
[quantization]
enabled = {quantized}
[training]
epochs = {epochs}
batch_size = 10
lr = 0.05
momentum = 0.9
[strategy]
name = "fedavg"
[cohort]
timeout = 120
"""


class Devices:
    """Device processes, with their examples and states in ``folder``; ends them and nothing else."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}

    def hold(self, data):
        for number, rows in enumerate(data.clients):
            directory = self.folder / f"client-{number}"
            directory.mkdir()
            part = data.dataset.train.take(rows)
            np.savez(directory / "examples.npz", x=part.x, y=part.y)

    def enrol(self, number, address, token):
        return enrol_device(State(self.folder / f"state-{number}"), address, token)

    def start(self, number):
        with (self.folder / f"device-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(
                [sys.executable, PROCESS, self.folder / f"state-{number}", str(number), self.folder], stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self, number):
        process = self.processes.pop(number)
        process.kill()
        process.wait()

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("device-*.log")))

    def stop(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def devices(tmp_path):
    one = Devices(tmp_path)
    yield one
    one.stop()


def scenario(folder, **values):
    file = folder / "scenario.toml"
    values = {"rounds": 2, "clients": 3, "model": "mlp", "quantized": "false", "epochs": 1} | values
    file.write_text(SCENARIO.format(**values))
    return load_config(file, ["engine.name=loop"])


def simulated(config, folder):
    with SimulatedRun(config, folder / "simulated", resume=False) as run:
        list(run.rounds())
        return run.coordinator.progress, run.assembly


def federated(config, devices, folder, meanwhile=None):
    """The run over devices: its progress, and the rounds' metrics."""
    fleet = FleetFolder.open(folder / "fleet", "watches")
    clients = config.data.clients
    with ServedGateway(fleet, "", "127.0.0.1:0", hold=1.0, least=0.2) as gateway:
        signer = fleet.signer()
        for number in range(clients):
            devices.enrol(number, gateway.address, signer.issue(600).encode())
            devices.start(number)
        signer.close()
        with DeviceRun(config, folder / "run", fleet, fleet.store, Choice(1.0, 60, clients), resume=False) as run:
            rounds = []
            for metrics in run.rounds():
                rounds.append(metrics)
                if meanwhile:
                    meanwhile(metrics["round"])
            return run.coordinator.progress, rounds


def prepared(tmp_path, devices, **values):
    config = scenario(tmp_path, **values)
    expected, assembly = simulated(config, tmp_path)
    devices.hold(assembly.data)
    return config, expected, assembly


def test_device_processes_give_the_model_of_the_simulation(tmp_path, devices):
    config, expected, _ = prepared(tmp_path, devices)
    found, rounds = federated(config, devices, tmp_path)
    assert [one["replies"] for one in rounds] == [3, 3], devices.logs()
    moved = np.abs(expected.master).max()
    assert moved > 0.1
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)
