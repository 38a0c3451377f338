"""The child that trains, as the agent sees it: started, watched, told to stop, and what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import ClientFailure, Refused, TryAgain
from fedcore_device.child import DONE, PAUSED, REFUSED

__all__ = ["Outcome", "train_in_child"]

_GRACE = 10.0  # seconds that a child has to write its checkpoint before it is killed
_TURN = 0.05


@dataclass(frozen=True)
class Outcome:
    """What a child says at its end; ``paused`` is why it was told to stop, empty where it finished."""

    paused: str
    told: Mapping[str, Any] = field(default_factory=dict)


def train_in_child(directory: Path, *, memory: int, seconds: float, why_stop: Callable[[], str]) -> Outcome:
    """Train what ``job.json`` in ``directory`` says, in a process of its own; ``why_stop`` is asked all the time.

    Raises:
        Refused: the child refuses the step, the plan or the examples.
        ClientFailure: training failed, was killed, or went over ``memory`` bytes resident or ``seconds``.
        TryAgain: the checkpoint cannot be written.
    """
    (directory / "result.json").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "FEDCORE_TOKEN"}  # the examples' code may need it
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}  # arenas and threads are address space
    command = [sys.executable, "-m", "fedcore_device.child", str(directory)]
    process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True, env=environment,
    )  # fmt: skip
    try:
        paused = _watch(process, memory, time.monotonic() + seconds, why_stop)
    except BaseException:
        process.kill()
        process.wait()
        raise
    told = {}
    with contextlib.suppress(OSError, ValueError):
        told = dict(json.loads((directory / "result.json").read_bytes()))
    return _judge(process.returncode, paused, told)


def _watch(process: subprocess.Popen[bytes], memory: int, end: float, why_stop: Callable[[], str]) -> str:
    """Wait for the child; why it was told to stop, if it was.

    Raises:
        ClientFailure: it went over a limit, and is killed.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TURN)
            return ""
        if _resident(process.pid) > memory:
            raise ClientFailure(f"training took more than {memory} bytes of memory")
        if time.monotonic() > end:
            raise ClientFailure("training took longer than the device allows, or than the plan is good for")
        if reason := why_stop():
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()  # what it wrote last is on the disk
                process.wait()
            return reason


def _judge(code: int, paused: str, told: Mapping[str, Any]) -> Outcome:
    if code == DONE:
        return Outcome("", told)
    if paused:
        return Outcome(paused, told)
    reason = str(told.get("reason", f"training ended with code {code}"))
    if code == PAUSED:
        raise TryAgain(reason)
    if code == REFUSED:
        raise Refused(reason)
    raise ClientFailure(reason)


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
