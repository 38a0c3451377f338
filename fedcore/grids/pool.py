"""Worker processes that share memory with the coordinator.

Workers are forked, so data sets and models that the parent holds cost nothing per worker. Small results travel through a
pipe, vectors through memory that parent and worker share.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedcore.errors import RoundFailed

__all__ = ["Doubles", "Handler", "WorkerPool", "available_workers", "check_deadline"]

Doubles = npt.NDArray[np.float64]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AHEAD = 4  # jobs a worker may be ahead of the one whose result is yielded next


class Handler(Protocol):
    """Does one job in a worker: reads ``shared``, may fill ``out``, returns something small that pickles."""

    def __call__(self, job: Any, shared: Doubles, out: Doubles) -> Any:
        """The result."""
        ...


def available_workers() -> int:
    """Worker processes that this machine can use: the cores this process may run on; 1 where processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """``workers`` processes around one handler; with one worker the jobs run in this process.

    ``shared`` [shared_size] is written by the parent between calls of `map` and read by the workers.
    """

    def __init__(self, workers: int, handler: Handler, shared_size: int, out_size: int) -> None:
        self.shared = _shared_doubles(shared_size)
        self.workers = workers
        self._handler = handler
        self._outs = [_shared_doubles(out_size) for _ in range(workers)]
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        if workers > 1:
            self._fork(workers)

    @property
    def place(self) -> str:
        """Where the work is done, for the user."""
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}"

    def map(self, jobs: Sequence[Any], timeout: float | None = None) -> Iterator[tuple[Any, Doubles]]:
        """Results in the order of ``jobs``; the vector is valid until the next one is asked for.

        Raises:
            RoundFailed: a worker died, raised, or ``timeout`` seconds passed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._processes:
            for job in jobs:
                yield self._handler(job, self.shared, self._outs[0]), self._outs[0]
                check_deadline(deadline)
            return
        early: dict[int, tuple[Any, Doubles]] = {}
        running: dict[Connection, int] = {}
        idle, sent, done = list(range(len(self._pipes))), 0, 0
        while done < len(jobs):
            while idle and sent < min(len(jobs), done + _AHEAD * len(self._pipes)):
                worker = idle.pop()
                self._send(worker, jobs[sent])
                running[self._pipes[worker]] = sent
                sent += 1
            if done in early:
                yield early.pop(done)
                done += 1
                continue
            for pipe in self._wait(list(running), deadline):
                worker, number = self._pipes.index(pipe), running.pop(pipe)
                result = self._receive(worker)
                if number == done:
                    yield result, self._outs[worker]
                    done += 1
                else:
                    early[number] = (result, self._outs[worker].copy())
                idle.append(worker)

    def close(self) -> None:
        """End the workers; a worker in the middle of a job is terminated."""
        if self._processes:
            gc.unfreeze()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._processes, self._pipes = [], []
        self._handler = _closed  # the handler is often its owner's method: a circle that would keep the data in memory

    def _fork(self, workers: int) -> None:
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be looked at again, here and in the workers, which would copy it
        context = multiprocessing.get_context("fork")
        pairs = [context.Pipe() for _ in range(workers)]
        for worker, (_, theirs) in enumerate(pairs):
            # A worker closes every end that is not its own, so that it sees the parent's death as the end of its pipe.
            foreign = [end for pair in pairs for end in pair if end is not theirs]
            arguments = (theirs, foreign, self._handler, self.shared, self._outs[worker])
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
        for ours, theirs in pairs:
            theirs.close()
            self._pipes.append(ours)

    def _send(self, worker: int, job: Any) -> None:
        try:
            self._pipes[worker].send(job)
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, worker: int) -> Any:
        try:
            failed, result = self._pipes[worker].recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if failed:
            raise RoundFailed(f"worker process failed: {result}")
        return result

    def _wait(self, pipes: list[Connection], deadline: float | None) -> list[Connection]:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(pipes, remaining)
        check_deadline(deadline)
        return [pipe for pipe in pipes if pipe in ready]

    def _death(self, worker: int) -> RoundFailed:
        process = self._processes[worker]
        process.join(timeout=5)
        code = process.exitcode
        cause = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "; was memory short?" if code == -signal.SIGKILL else ""
        return RoundFailed(f"a worker process died ({cause}{hint})")


def _closed(job: Any, shared: Doubles, out: Doubles) -> Any:  # noqa: ARG001 - a handler's arguments
    """The handler of a pool that is closed."""
    raise RuntimeError("the pool is closed")


def check_deadline(deadline: float | None) -> None:
    """Raise RoundFailed if ``deadline``, on the monotonic clock, is over."""
    if deadline is not None and time.monotonic() > deadline:
        raise RoundFailed("the round did not finish within cohort.timeout")


def _end_with_parent() -> None:
    """Have the system kill this process when the one that forked it dies, also in the middle of a long job."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(pipe: Connection, foreign: list[Connection], handler: Handler, shared: Doubles, out: Doubles) -> None:
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the parent sends, and may itself take for something else
    for end in foreign:
        end.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            try:
                answer = (False, handler(job, shared, out))
            except Exception as error:  # noqa: BLE001 - reported to the parent, which raises
                answer = (True, f"{type(error).__name__}: {error}")
            pipe.send(answer)
    os._exit(0)


def _shared_doubles(size: int) -> Doubles:
    return np.frombuffer(mmap.mmap(-1, max(8, 8 * size)), np.float64, size)
