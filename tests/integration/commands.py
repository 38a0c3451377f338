"""The ``fedcore`` command in processes of its own, without three seconds of imports in each.

A server imports once what commands import and forks a process for each of them, while it has started no thread and run nothing.
That process goes on to the end of the server's program, ``main()``, as ``python -c`` does: exit codes, signals, streams, handlers
at exit and tracebacks are those of a command that was started afresh. Commands of one server share the seed of str's hashes, so
what a run must equal to the bit is made in the test's own process.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, "-c", "from fedcore.cli import main; main()"]  # for what has to be started afresh
PATIENCE = 300  # seconds for any command, on a busy machine
_SERVER = "import runpy, sys; runpy.run_path(sys.argv[1])['await_command'](int(sys.argv[2])); from fedcore.cli import main; main()"
_IMPORTED = ("fedcore.cli", "fedcore.coordinator.run", "fedcore.display", "fedcore.quantization.lower", "fedcore.report.page")
_TASKS = Path("/proc/self/task")
_NUMBER = struct.Struct("i")


def await_command(place: int) -> None:
    """Returns in a new process for each command that is asked for at the socket ``place``, never in the server."""
    channel, before = socket.socket(fileno=place), dict(os.environ)
    importlib.import_module("numpy")  # its BLAS has threads, which it ends itself before a fork
    threads = len(list(_TASKS.iterdir()))
    for name in _IMPORTED:
        importlib.import_module(name)
    if len(list(_TASKS.iterdir())) != threads:
        raise RuntimeError(f"{_IMPORTED} must start no thread, which a fork would leave behind")
    gc.freeze()  # or each process would copy what it looks through before it ends
    imported = {key: value for key, value in os.environ.items() if before.get(key) != value}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries those that wait
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            break
        for one in descriptors:
            os.close(one)
    channel.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():  # this one waits for the command and says how it ended
        for one in descriptors[:3]:
            os.close(one)
        os.write(descriptors[3], _NUMBER.pack(child))
        os.write(descriptors[3], _NUMBER.pack(os.waitpid(child, 0)[1]))
        os._exit(0)
    for number, one in enumerate(descriptors[:3]):
        os.dup2(one, number)
    for one in descriptors:
        os.close(one)
    asked = json.loads(request)
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(imported | asked["environment"])
    sys.argv = ["-c", *asked["arguments"]]


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", _SERVER, __file__, str(theirs.fileno())]
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


class Command:
    """``fedcore`` with these arguments, in this process's folder and environment; ``pid`` is the command's own."""

    def __init__(self, *arguments: object) -> None:
        self.args, self.returncode = [str(one) for one in arguments], None
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - they live as long as this
        self._status, theirs = os.pipe()
        asked = {"arguments": self.args, "directory": str(Path.cwd()), "environment": dict(os.environ)}
        with Path(os.devnull).open() as nothing:
            descriptors = [nothing.fileno(), self._out.fileno(), self._err.fileno(), theirs]
            socket.send_fds(_server(), [json.dumps(asked).encode()], descriptors)
        os.close(theirs)
        self.pid = self._told()

    def _told(self) -> int:
        told = os.read(self._status, _NUMBER.size)
        assert told, "the server of commands is gone"
        return _NUMBER.unpack(told)[0]

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _all(self._out)

    @property
    def stderr(self) -> str:
        return _all(self._err)

    def poll(self, patience: float = 0.0) -> int | None:
        """The exit code, a signal's negated, or None."""
        if self.returncode is None and select.select([self._status], [], [], patience)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._told())
            os.close(self._status)
        return self.returncode

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit code; what has not ended within ``patience`` is killed."""
        if self.poll(patience) is None:
            self.kill()
            raise AssertionError(f"fedcore {self.args} did not end within {patience} seconds: {self.stderr}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.poll(PATIENCE)


def _all(file) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def fedcore(*arguments: object) -> Command:
    """The command, which has ended."""
    command = Command(*arguments)
    command.wait()
    return command


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]
