"""The Flower app as its README starts it: SuperLink, two SuperNodes and ``flwr run``, each a process of its own."""

import contextlib
import json
import os
import shutil
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
        self.link, *self.ports = free_ports(3)
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

    def start_nodes(self, enrolments: list[Path | None]) -> None:
        for partition, (enrolment, port) in enumerate(zip(enrolments, self.ports, strict=True)):
            enrolled = f' enrolment="{enrolment}"' if enrolment else ""
            self.start(
                f"supernode-{partition}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.link}",
                "--host", "127.0.0.1", "--port", str(port), "--node-config", f"partition-id={partition}{enrolled}",
            )  # fmt: skip
        wait_until_healthy(f"127.0.0.1:{self.link}")

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

    def logs(self) -> str:
        return "".join(f"==== {log.name}\n{log.read_text()}\n" for log in sorted(self.folder.glob("*.log")))


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


@contextlib.contextmanager
def federation(folder: Path):
    """A SuperLink, known to ``flwr run`` as the connection ``local``."""
    found = Federation(folder)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(f'[superlink.local]\naddress = "127.0.0.1:{found.link}"\ninsecure = true\n')
    try:
        found.start("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(found.link))
        yield found
    finally:
        found.stop()


class Begun:
    """``flwr run`` of our app, which leaves its run in ``out``."""

    def __init__(self, federation: Federation, *settings: str):
        self.federation, self.folder, self.out = federation, federation.folder, federation.folder / "over-superlink"
        config = " ".join([f'out="{self.out}"', *settings])
        self.process = federation.start("flwr-run", "flwr", "run", str(APP), "local", "--stream", "--run-config", config)

    def finish(self) -> Path:
        assert self.process.wait(PATIENCE) == 0, self.federation.logs()
        assert (self.out / "result.json").exists(), self.federation.logs()
        return self.out


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Both federations, at once: each takes a minute, of which it waits for the most part."""
    with federation(tmp_path_factory.mktemp("plain")) as plain, federation(tmp_path_factory.mktemp("masked")) as masked:
        plain.start_nodes([None, None])
        unmasked = Begun(plain)
        committee = Committee(masked)
        masked.start_nodes([committee.enrol(f"node-{i}") for i in range(2)])
        committee.write_scenario()
        yield {"plain": unmasked, "masked": Begun(masked, f'scenario="{masked.folder}/scenario.toml"')}


def master(run: Path, rounds: int = 2) -> np.ndarray:
    return safetensors.numpy.load_file(run / "checkpoints" / f"round-{rounds:06d}.safetensors")["master"]


def test_two_rounds_over_a_superlink_give_the_simulated_model(begun, tmp_path):
    config = load_config(APP / "scenario.toml")
    assert (config.run.rounds, config.data.clients, config.quantization.enabled) == (2, 2, True)
    with SimulatedRun(config, tmp_path / "simulated", resume=False) as run:
        simulated = list(run.rounds())
        run.finish()
    out = begun["plain"].finish()
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


class Committee:
    """Three operators, an enrolment key and a signed bundle, made and run by fedcore's own commands."""

    def __init__(self, federation: Federation):
        self.folder, self.federation = federation.folder, federation
        self.command("trust", "keygen", "--out", "root")
        self.command("enrol-ca", "keygen", "--out", "ca")
        made = [json.loads(self.command("committee", "keygen", "--out", f"m{a}", "--json")) for a in (1, 2, 3)]
        self.fingerprints = [one["fingerprint"] for one in made]
        members = [part for a in (1, 2, 3) for part in ("--member", f"m{a}/identity.pub")]
        self.command(
            "trust", "bundle", "root", "--population", "nodes", "--threshold", "3", "--corrupt", "2", *members,
            "--enrol-ca", "ca/signing.pub", "--out", "bundle.json",
        )  # fmt: skip
        (self.folder / "policy.toml").write_text("minimum_survivors = 2\ncorrupt_clients = 0\nnoise_multiplier = 0\n")

    def command(self, *arguments: str) -> str:
        return subprocess.run(
            [BIN / "fedcore", *arguments], cwd=self.folder, check=True, capture_output=True, text=True, timeout=60
        ).stdout  # fmt: skip

    def enrol(self, node: str) -> Path:
        self.command("enrol-ca", "request", "--out", node)
        self.command(
            "enrol-ca", "sign", "ca", "--key", f"{node}/identity.pub", "--population", "nodes", "--out", f"{node}/certificate.json"
        )
        shutil.copy(self.folder / "bundle.json", self.folder / node / "trust.json")
        shutil.copy(self.folder / "root" / "signing.pub", self.folder / node / "trust.pub")
        return self.folder / node

    def serve(self) -> list[str]:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        for a, address in enumerate(addresses, 1):
            self.federation.start(
                f"member-{a}", "fedcore", "committee", "serve", f"m{a}", "--trust", "bundle.json", "--root", "root/signing.pub",
                "--policy", "policy.toml", "--listen", address,
            )  # fmt: skip
        return addresses

    def write_scenario(self) -> None:
        """Of masked rounds, with operators that are begun."""
        (self.folder / "scenario.toml").write_text(
            '[run]\nname = "masked"\nrounds = 1\n[data]\ndataset = "digits"\nclients = 2\nholdout = 0.1\n[model]\nname = "mlp"\n'
            "[quantization]\nenabled = false\n[evaluation]\nfederated_every = 1\n[secagg]\nenabled = true\n"
            f"operators = {json.dumps(self.serve())}\noperator_fingerprints = {json.dumps(self.fingerprints)}\n"
            f'trust = "{self.folder}/bundle.json"\ntrust_key = "{self.folder}/root/signing.pub"\n'
        )


def test_nodes_mask_what_they_send_and_the_sum_is_the_simulated_one(begun, tmp_path):
    scenario = begun["masked"].folder / "scenario.toml"
    unmasked = scenario.read_text().partition("[secagg]")[0] + '[secagg]\nenabled = true\nsimulate = "arithmetic"\n'
    (tmp_path / "unmasked.toml").write_text(unmasked)
    with SimulatedRun(load_config(tmp_path / "unmasked.toml"), tmp_path / "simulated", resume=False) as run:
        simulated = list(run.rounds())
        run.finish()
    out = begun["masked"].finish()
    # Nodes round with randomness of their own: to a step of 2^-20, of what both trained to the same bits.
    assert np.abs(master(out, 1) - master(tmp_path / "simulated", 1)).max() < 1e-5
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for entry, expected in zip(metrics, simulated, strict=True):
        assert (entry["replies"], entry["failed"], entry["dropped"]) == (2, 0, [])
        assert entry["secure"][0]["members"] == [1, 2, 3]
        assert entry["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-3)
    assert metrics[-1]["federated"]["accuracy"] == pytest.approx(simulated[-1]["federated"]["accuracy"], abs=0.02)
    assert "3 operators" in json.loads((out / "result.json").read_text())["secure_aggregation"]["committee"]
