"""`fedcore serve` with [release]: devices train a model, the coordinator publishes it, and the same devices run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fedcore_commands import COMMAND

pytest.importorskip("fedcore_device", reason="the device's package is not installed: pip install -e clients/linux")

from fedcore_device.installed import model_directory

from fedcore.config import load_config
from fedcore.data import federate, load_dataset
from fedcore.registry.slots import read_pointer

SCENARIO = """
[run]
name = "digits"
rounds = 2
seed = 3
[data]
dataset = "digits"
clients = 2
partition = "iid"
[model]
name = "mlp"
[training]
lr = 0.2
[cohort]
timeout = 120
[tiers.flagship]
targets = ["onnx"]
accuracy_loss = 20.0
latency_ms = 0.0
[release]
registry = "repository"
keys = "online"
every = 1
"""
POLICY = """
[plan]
secure_aggregation = false
noise_multiplier = 0
minimum_devices = 1
corrupt_devices = 0
[device]
tier = "flagship"
[updates]
models = ["digits"]
agreement = 0.5
"""
GOOD = {"charging": True, "unmetered": True, "idle": True, "temperature": 20.0, "free_storage": 1 << 40}


def fedcore(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def prepared(folder):
    fedcore("registry", "init", folder / "repository", "--offline", folder / "offline", "--online", folder / "online", "--roots", 1,
            "--threshold", 1, "--publish-by-itself")  # fmt: skip
    (folder / "scenario.toml").write_text(SCENARIO)
    config = load_config(folder / "scenario.toml")
    dataset = load_dataset(config.data, config.folder, config.run.seed)
    for number, rows in enumerate(federate(config.data, dataset, config.run.seed).clients):
        part = dataset.train.take(rows)
        (folder / f"client-{number}").mkdir()
        np.savez(folder / f"client-{number}" / "examples.npz", x=part.x, y=part.y)
    (folder / "good.json").write_text(json.dumps(GOOD))


def started(folder, number, address, token):
    state, command = folder / f"state-{number}", [sys.executable, "-m", "fedcore_device", "--state"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [*command, state, "enroll", "--server", address], env=environment, input=token, text=True, check=True, capture_output=True
    )  # fmt: skip
    (state / "policy.toml").write_text(POLICY)
    options = ["--examples", folder / f"client-{number}", "--conditions", folder / "good.json", "--look", "0.5"]
    with (folder / f"device-{number}.log").open("ab") as log:
        return subprocess.Popen([*command, state, "run", *map(str, options)], env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_what_devices_trained_comes_back_to_them_as_a_release(tmp_path):
    prepared(tmp_path)
    options = ("--listen", "127.0.0.1:0", "--json", "--over-selection", "1", "--window", "120", "--release-every", "1", "--stay")
    with (tmp_path / "serve.log").open("ab") as log:
        served = subprocess.Popen(
            [*COMMAND, "serve", tmp_path / "scenario.toml", "--fleet", tmp_path / "fleet", "--out", tmp_path / "run", *options],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    events, devices = [], []

    def until(event):
        for line in served.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == event:
                return events[-1]
        raise AssertionError((tmp_path / "serve.log").read_text())

    try:
        address = until("serving")["address"]
        tokens = fedcore("device", "token", "--fleet", tmp_path / "fleet", "--count", 2).split()
        devices = [started(tmp_path, number, address, token) for number, token in enumerate(tokens)]
        first = until("round")
        assert first["hint"] == "round 1 is release 1 of digits; rollout digits-1 has begun"
        result = until("result")
        assert result["release"].startswith("round 2 is release 2 of digits; its rollout has not begun: of 2 devices")
        end = time.monotonic() + 300
        while True:
            held = [read_pointer(model_directory(tmp_path / f"state-{number}", "digits")).current for number in range(2)]
            if all(one is not None for one in held):
                break
            assert time.monotonic() < end, "".join((tmp_path / f"device-{number}.log").read_text() for number in range(2))
            time.sleep(0.5)
        assert [one.version for one in held] == [1, 1]
        status = json.loads(fedcore("release", "status", "--fleet", tmp_path / "fleet", "--json"))
        assert (status["phase"], status["versions"].get("1", 0) + status["versions"].get("0", 0)) == ("full", 2)
    finally:
        for one in devices:
            one.terminate()
        for one in devices:
            one.wait(60)
        served.send_signal(signal.SIGTERM)
        code = served.wait(60)
        served.stdout.close()
    assert code == 0
    assert Path(tmp_path / "fleet" / "releases.jsonl").exists()
