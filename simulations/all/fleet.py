"""The processes of `simulations.all`: three operators, ``fedcore serve``, eight device agents; started here, and ended here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from fedcore_device.agent import enrol_device
from fedcore_device.state import State

from fedcore.coordinator.fleet import FleetFolder
from fedcore.data.datasets import Dataset
from fedcore.data.partition import FederatedData
from simulations.all.people import held_out

__all__ = ["FEDCORE", "Processes", "Watch", "fedcore", "operators", "repository", "sent_by_fetch", "serve"]

ROOT = Path(__file__).parents[2]
FEDCORE = [sys.executable, "-c", "from fedcore.cli import main; main()"]
POLICY = """
[plan]
minimum_devices = 4
corrupt_devices = 0
[conditions]
idle = false
windows = []
[device]
tier = "flagship"
[updates]
models = ["watches"]
runtime = "{runtime}"
agreement = 0.7
idle = false
unmetered = false
battery_percent = 0
windows = []
probation = 5
"""
_MEMBERS = (1, 2, 3)
_END = 30.0  # seconds for a process to end by itself


def _environment() -> dict[str, str]:
    """Modules as this process finds them, one thread, and a quiet gRPC."""
    paths = [str(ROOT), str(ROOT / "clients" / "linux"), *filter(None, sys.path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}


def fedcore(folder: Path, *arguments: object) -> str:
    """What a command of fedcore prints, in ``folder``.

    Raises:
        SystemExit: it failed; with its last line.
    """
    return _done([*FEDCORE, *map(str, arguments)], folder)


def _done(command: list[str], folder: Path) -> str:
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=_environment(), start_new_session=True,
    )  # fmt: skip
    try:
        said, errors = process.communicate()
    finally:
        _end_group(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[2:])[:100]}: exit code {process.returncode}: {errors.strip()[-500:]}")
    return said


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and of those that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


class Processes:
    """Processes that end with this one, the last one first; a context manager. Each is in a session of its own, so that Ctrl-C
    reaches the one that ends them and nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._running = folder, list[tuple[str, subprocess.Popen[str]]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for _, process in reversed(self._running):
            process.terminate()
        for _, process in reversed(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END)
            _end_group(process)

    def start(self, name: str, command: list[str], *, piped: bool = False) -> subprocess.Popen[str]:
        """Begin one, with NAME.log for what it says."""
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if piped else log, stderr=log,
                text=True, env=_environment(), start_new_session=True,
            )  # fmt: skip
        self._running.append((name, process))
        return process

    def check(self) -> None:
        """See that all of them run.

        Raises:
            SystemExit: one has ended; with the end of its log.
        """
        for name, process in self._running:
            if process.poll() is not None:
                last = (self.folder / f"{name}.log").read_text(errors="replace").strip()[-500:]
                raise SystemExit(f"{name} ended with code {process.returncode}: {last}")


def repository(folder: Path) -> None:
    """An empty signed repository: keys of root and targets offline, that of releases at the coordinator's hand."""
    fedcore(folder, "registry", "init", "repository", "--offline", "offline", "--online", "online", "--publish-by-itself")


def operators(folder: Path, fleet: FleetFolder, name: str, processes: Processes) -> str:
    """Three operators as processes, a trust bundle that names them, and the lines of [secagg] for it."""
    fedcore(folder, "trust", "keygen", "--out", "root")
    made = [json.loads(fedcore(folder, "committee", "keygen", "--out", f"m{a}", "--json")) for a in _MEMBERS]
    members = [part for a in _MEMBERS for part in ("--member", f"m{a}/identity.pub")]
    signer = fleet.fleet.directory / "signer" / "signing.pub"
    fedcore(
        folder, "trust", "bundle", "root", "--population", name, "--threshold", 3, "--corrupt", 2, *members,
        "--enrol-ca", signer, "--out", "bundle.json",
    )  # fmt: skip
    (folder / "floor.toml").write_text("minimum_survivors = 4\ncorrupt_clients = 0\nnoise_multiplier = 0\n")
    common = ["--trust", "bundle.json", "--root", "root/signing.pub", "--policy", "floor.toml"]
    started = [processes.start(f"operator-{a}", [*FEDCORE, "committee", "serve", f"m{a}", *common], piped=True) for a in _MEMBERS]
    addresses = [_line(one.stdout, processes).split()[-1] for one in started]
    return (
        f"operators = {json.dumps(addresses)}\noperator_fingerprints = {json.dumps([one['fingerprint'] for one in made])}\n"
        'trust = "bundle.json"\ntrust_key = "root/signing.pub"\n'
    )


def serve(processes: Processes, told: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """``fedcore serve`` on a free port with the scenario of the folder; its first event, and what reads on to a named one.
    ``told`` hears every event."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *FEDCORE, "serve", "scenario.toml", "--fleet", "fleet", "--out", "run", "--listen", "127.0.0.1:0", "--over-selection", "1",
        "--window", "120", "--minimum", "6", "--release-every", "1", "--metrics", metrics, "--stay", "--json",
    ]  # fmt: skip
    process = processes.start("serve", command, piped=True)

    def until(event: str) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = json.loads(_line(process.stdout, processes))
            told(found)
            if found["event"] == event:
                return found

    return until("serving") | {"metrics": metrics}, until


def _line(stream: IO[str] | None, processes: Processes) -> str:
    line = stream.readline() if stream else ""
    if not line:
        time.sleep(0.5)  # for the one that closed it to have ended
        processes.check()
        raise SystemExit("a process closed its output; the logs say why")
    return line


def sent_by_fetch(metrics: str) -> int:
    """Bytes of rounds' blobs and of the repository that the gateway has handed out so far, by its own count."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = re.search(r'^fedcore_gateway_sent_bytes_total\{method="Fetch"\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


class Watch:
    """One person's device: what it trains on, what is held out there, its agent, and an app on it."""

    def __init__(self, folder: Path, person: int) -> None:
        self.folder, self.person = folder, person
        self.state, self.examples, self.held = (folder / f"{name}-{person}" for name in ("device", "person", "held"))
        self.held = self.held.with_suffix(".npz")

    def hold(self, data: FederatedData, dataset: Dataset) -> None:
        """Give it its wearer's windows: normalised ones to train on, raw ones for the app."""
        part = dataset.train.take(data.clients[self.person])
        self.examples.mkdir()
        np.savez(self.examples / "recordings.npz", x=part.x, y=part.y)
        x, y = held_out(self.person)
        np.savez(self.held, x=x, y=y)

    def start(self, processes: Processes, address: str, token: str, runtime: str = "onnx") -> None:
        """Enrol it over TLS, and start its agent."""
        enrol_device(State(self.state), address, token)
        (self.state / "policy.toml").write_text(POLICY.format(runtime=runtime))
        command = [sys.executable, "-m", "fedcore_device", "--state", str(self.state), "run", "--look", "1"]
        processes.start(f"watch-{self.person}", [*command, "--examples", str(self.examples)])

    def predict(self, model: str) -> dict[str, Any]:
        """What `simulations.all.app` says of the held-out windows."""
        command = [sys.executable, "-m", "simulations.all.app", str(self.state), model, str(self.held)]
        found: dict[str, Any] = json.loads(_done(command, self.folder))
        return found
