"""A federation of device processes on loopback with TLS: what `fedcore serve` runs, and what it must equal."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.run import SimulatedRun
from fedcore.coordinator.serve import Choice, DeviceRun
from fedcore.quantization.layers import set_activation_ranges
from fedcore.state.gateway import open_gateway_store
from fedcore.training.evaluation import load_flat

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
lr = {lr}
momentum = {momentum}
[strategy]
name = "fedavg"
[cohort]
timeout = 120
"""


class Devices:
    """Device processes, with their examples and states in ``folder``; ends them and nothing else."""

    def __init__(self, folder):
        self.folder, self.processes, self.killed = folder, {}, {}

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

    def kill_while_it_trains(self, number):
        """With signal 9, once its child has written a checkpoint; then it begins again."""
        state = self.folder / f"state-{number}"
        while not (state / "round" / "progress.bin").exists():
            time.sleep(0.002)
        process = self.processes.pop(number)
        process.kill()
        process.wait()
        self.killed[number] = json.loads((state / "round.json").read_text())["phase"]
        self.start(number)

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
    values = {"rounds": 2, "clients": 3, "model": "mlp", "quantized": "false", "epochs": 1, "lr": 0.02, "momentum": 0.5} | values
    file.write_text(SCENARIO.format(**values))
    return load_config(file, ["engine.name=loop"])


def simulated(config, folder):
    with SimulatedRun(config, folder / "simulated", resume=False) as run:
        list(run.rounds())
        return run.coordinator.progress, run.assembly


def federated(config, devices, folder, *, killed=()):
    """The run over devices: its progress, and the rounds' metrics. Devices that are ``killed`` are started again."""
    fleet = FleetFolder.open(folder / "fleet", "watches")
    clients = config.data.clients
    with ServedGateway(fleet, "", "127.0.0.1:0", hold=1.0, least=0.2) as gateway:
        signer = fleet.signer()
        for number in range(clients):
            devices.enrol(number, gateway.address, signer.issue(600).encode())
            devices.start(number)
        signer.close()
        killers = [threading.Thread(target=devices.kill_while_it_trains, args=(number,)) for number in killed]
        for one in killers:
            one.start()
        with DeviceRun(config, folder / "run", fleet, fleet.store, Choice(1.0, 60, clients), resume=False) as run:
            rounds = list(run.rounds())
            for one in killers:
                one.join()
            return run.coordinator.progress, rounds, run


def prepared(tmp_path, devices, **values):
    config = scenario(tmp_path, **values)
    expected, assembly = simulated(config, tmp_path)
    devices.hold(assembly.data)
    return config, expected, assembly


def test_device_processes_give_the_model_of_the_simulation_though_one_is_killed_while_it_trains(tmp_path, devices):
    config, expected, _ = prepared(tmp_path, devices, epochs=6)
    found, rounds, _ = federated(config, devices, tmp_path, killed=(1,))
    assert devices.killed == {1: "accepted"}, "it was killed between two checkpoints"
    assert [one["replies"] for one in rounds] == [3, 3], devices.logs()
    assert not any("failed_attempts" in one for one in rounds)
    assert min(one["update_norm"] for one in rounds) > 0.3
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)
    store = open_gateway_store(str(tmp_path / "fleet" / "store.sqlite"))
    taken = [times for one in store.devices() for times, _ in one.participations.values()]
    store.close()
    assert taken == [2, 2, 2], "each upload counts once"


@pytest.mark.slow
def test_eight_devices_and_five_rounds_are_the_simulation(tmp_path, devices):
    config, expected, _ = prepared(tmp_path, devices, clients=8, rounds=5, model="cnn", epochs=1)
    found, rounds, _ = federated(config, devices, tmp_path, killed=(2, 5))
    assert [one["replies"] for one in rounds] == [8] * 5, devices.logs()
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_with_fake_quant_eight_devices_predict_what_the_simulation_predicts(tmp_path, devices):
    config, expected, assembly = prepared(tmp_path, devices, clients=8, rounds=5, model="cnn", quantized="true", epochs=3)
    found, rounds, run = federated(config, devices, tmp_path)
    assert [one["replies"] for one in rounds] == [8] * 5, devices.logs()
    x = torch.from_numpy(assembly.data.dataset.test.x)
    answers = []
    for progress in (expected, found):
        model = assembly.model.eval()
        set_activation_ranges(model, progress.ranges)
        load_flat(model, torch.from_numpy(run.coordinator.received(progress)[1]))
        with torch.no_grad():
            answers.append(model(x).argmax(1))
    assert (answers[0] == answers[1]).float().mean() >= 0.99
