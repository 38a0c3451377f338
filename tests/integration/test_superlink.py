"""The Flower app as its README starts it: SuperLink, two SuperNodes and ``flwr run``, each a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun
from fedcore.quantization.wire import decode_model

APP = Path(__file__).parents[2] / "clients" / "flower"
BIN = Path(sys.executable).parent
PATIENCE = 240  # seconds for a run that takes one minute on two cores


class Federation:
    """Flower's processes, with logs in ``folder``; ends them, and what they started, and nothing else."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[psutil.Popen] = []
        self.environment = {
            **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }  # fmt: skip

    def start(self, name: str, *command: str) -> psutil.Popen:
        with (self.folder / f"{name}.log").open("w") as log:
            process = psutil.Popen(
                [BIN / command[0], *command[1:]], cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def stop(self) -> None:
        running = [process for process in self.started if process.is_running()]
        everything = {process for parent in running for process in (parent, *parent.children(recursive=True))}
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(everything, timeout=15)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=15)
        for log in sorted(self.folder.glob("*.log")):  # shown by pytest where the test failed
            print(f"==== {log.name}\n{log.read_text()}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "the SuperLink did not start"
            time.sleep(0.2)


@pytest.fixture
def federation(tmp_path):
    """A SuperLink with two SuperNodes, known to ``flwr run`` as the connection ``local``."""
    found = Federation(tmp_path)
    link, *ports = free_ports(3)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(f'[superlink.local]\naddress = "127.0.0.1:{link}"\ninsecure = true\n')
    try:
        found.start("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link))
        for partition, port in enumerate(ports):
            found.start(
                f"supernode-{partition}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
                "--host", "127.0.0.1", "--port", str(port), "--node-config", f"partition-id={partition}",
            )  # fmt: skip
        wait_until_healthy(f"127.0.0.1:{link}")
        yield found
    finally:
        found.stop()


def master(run: Path) -> np.ndarray:
    return safetensors.numpy.load_file(run / "checkpoints" / "round-000002.safetensors")["master"]


def test_two_rounds_over_a_superlink_give_the_simulated_model(federation, tmp_path):
    out = tmp_path / "over-superlink"
    command = federation.start("flwr-run", "flwr", "run", str(APP), "local", "--stream", "--run-config", f'out="{out}"')
    assert command.wait(PATIENCE) == 0
    assert (out / "result.json").exists(), "the run failed"

    config = load_config(APP / "scenario.toml")
    assert (config.run.rounds, config.data.clients, config.quantization.enabled) == (2, 2, True)
    with SimulatedRun(config, tmp_path / "simulated", resume=False) as run:
        simulated = list(run.rounds())
        run.finish()
    assert np.abs(master(out) - master(tmp_path / "simulated")).max() <= 1e-5
    models = [decode_model((folder / "model" / "model.fcm").read_bytes()) for folder in (out, tmp_path / "simulated")]
    assert models[0].ranges == models[1].ranges
    for name, values in models[0].tensors.items():
        np.testing.assert_allclose(values, models[1].tensors[name], rtol=0, atol=1e-5)

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["round"], entry["replies"], entry["dropped"], entry["quantized"]) for entry in metrics] == [
        (1, 2, [], True), (2, 2, [], True),
    ]  # fmt: skip
    for key in ("accuracy", "fake_quant_accuracy", "bytes_up", "bytes_down"):
        assert [entry[key] for entry in metrics] == [entry[key] for entry in simulated]
    result = json.loads((out / "result.json").read_text())
    assert result["strategy_replies"] == "one mean reply"
    assert (out / "report.html").exists()
