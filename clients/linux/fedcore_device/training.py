"""The child that trains, as the agent sees it: started, watched, told to stop, and what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import ClientFailure, Refused, TryAgain
from fedcore_device.child import DONE, LOADING, PAUSED, REFUSED, UNFIT
from fedcore_device.native import Unfit

__all__ = ["Crashed", "Outcome", "train_in_child"]

_GRACE = 10.0  # seconds that a child has to write its checkpoint before it is killed
_TURN = 0.05
_LONGEST_CALL = 60.0  # seconds that a native library may take for one call, which is for a batch of examples
_FAULTS = (signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)


class Crashed(ClientFailure):
    """The child ended, or had to be ended, by a fault of code in it; ``how``, for people, says what that code did."""

    def __init__(self, how: str, text: str) -> None:
        self.how = how
        super().__init__(text)


@dataclass(frozen=True)
class Outcome:
    """What a child says at its end; ``paused`` is why it was told to stop, empty where it finished."""

    paused: str
    told: Mapping[str, Any] = field(default_factory=dict)


def train_in_child(directory: Path, *, memory: int, seconds: float, why_stop: Callable[[], str]) -> Outcome:
    """Train what ``job.json`` in ``directory`` says, in a process of its own; ``why_stop`` is asked all the time.

    Raises:
        Refused: the child refuses the step, the plan or the examples.
        Unfit: the native library that was to train cannot.
        Crashed: code in the child did something that ends a process, went over ``memory`` bytes resident, or a call of a native
            library does not end.
        ClientFailure: training failed, was killed, or went over ``seconds``.
        TryAgain: the checkpoint, or how training ended, cannot be written.
    """
    (directory / "result.json").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "FEDCORE_TOKEN"}  # the examples' code may need it
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}  # arenas and threads are address space
    command = [sys.executable, "-m", "fedcore_device.child", str(directory)]
    process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True, env=environment,
    )  # fmt: skip
    calls = _Calls(directory / LOADING)
    try:
        paused = _watch(process, memory, time.monotonic() + seconds, why_stop, calls)
    except BaseException:
        process.kill()
        process.wait()
        raise
    told = {}
    with contextlib.suppress(OSError, ValueError):
        told = dict(json.loads((directory / "result.json").read_bytes()))
    return _judge(process.returncode, paused, told, in_call=calls.begun)


class _Calls:
    """The calls of a native library in a child, by what the file grew to to which every begin and every end adds a byte."""

    def __init__(self, file: Path) -> None:
        self._file, self._length, self._looks = file, 0, 0

    def hang(self) -> bool:
        """Whether one has lasted too long, counted in looks: a device that slept meanwhile has not looked."""
        length = self._size
        same = length % 2 and length == self._length
        self._length, self._looks = length, self._looks + 1 if same else 0
        return self._looks * _TURN > _LONGEST_CALL

    @property
    def begun(self) -> bool:
        """Whether one has begun that has not ended."""
        return self._size % 2 == 1

    @property
    def _size(self) -> int:
        with contextlib.suppress(OSError):
            return self._file.stat().st_size
        return 0


def _watch(
    process: subprocess.Popen[bytes], memory: int, end: float, why_stop: Callable[[], str], calls: _Calls
) -> str:  # fmt: skip
    """Wait for the child; why it was told to stop, if it was.

    Raises:
        ClientFailure: it went over a limit, and is killed.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TURN)
            return ""
        if _resident(process.pid) > memory:
            raise Crashed(f"it took more than {memory} bytes of memory", f"training took more than {memory} bytes of memory")
        if calls.hang():
            raise Crashed(f"a call took longer than {_LONGEST_CALL:g} s", "training hangs in the native library")
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


def _judge(code: int, paused: str, told: Mapping[str, Any], *, in_call: bool) -> Outcome:
    if code == DONE and told:
        return Outcome("", told)
    if paused:
        return Outcome(paused, told)
    if -code in _FAULTS:
        name = signal.Signals(-code).name
        raise Crashed(f"it crashed ({name})", f"training ended with code {code} ({name})")
    if code >= 0 and not told and in_call:  # a child says why it ends, unless its disk is full
        raise Crashed(f"it ended the process with code {code}", f"training ended with code {code}")
    reason = str(told.get("reason", f"training ended with code {code}"))
    if code == PAUSED:
        raise TryAgain(reason if told else "how training ended cannot be written; is the disk full?")
    if code == UNFIT:
        raise Unfit(reason)
    if code == REFUSED:
        raise Refused(reason)
    raise ClientFailure(reason)


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
