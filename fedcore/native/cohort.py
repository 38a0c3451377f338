"""A whole round of simulated clients in the native engine: by any number of processes, with one result for all of their numbers."""

from __future__ import annotations

import ctypes
import math
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedcore.data import Examples
from fedcore.errors import Refused
from fedcore.native.trainer import Worker
from fedcore.training.plan import LocalPlan

__all__ = ["Board", "Cohort", "units_of"]

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]
_UNITS = 32  # of a round: a constant, so that the order of summation does not depend on the number of workers
_NO_ROOM = 1  # what run_cohort gives where a worker has to wait for others
_FULL = 0.0002  # seconds between two looks whether they have made room


def units_of(clients: int) -> list[int]:
    """With which client each work unit ends: at most 32 units, whose sizes differ by at most one client."""
    count = min(_UNITS, clients)
    return [round((i + 1) * clients / count) for i in range(count)]


class _Cohort(ctypes.Structure):
    """``Cohort`` of cohort.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("job", "board", "rows", "ends", "units", "words")),
        *((name, ctypes.c_int64) for name in ("word_count", "unit_count", "room")),
        ("limit", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("losses", "norms", "sums", "complete", "joined", "total")),
        *((name, ctypes.c_int64) for name in ("unit", "number", "empty")),
        *((name, ctypes.c_void_p) for name in ("raw", "values", "labels", "own")),
        *((name, ctypes.c_int64) for name in ("channels", "plane")),
        *((name, ctypes.c_void_p) for name in ("coins", "noise")),
        ("private_count", ctypes.c_int64),
    )


class Board:
    """What the processes that work on a round share; made before they are forked.

    ``total`` [size]: the sum of the usable updates, each times its client's examples. By position in the cohort: ``norms``, the L2
    norm of the update, -1 where a label is no class, and ``losses``, the mean loss. Sums lie as the program's blob of ``blob``
    numbers does until all have joined.
    """

    def __init__(self, clients: int, size: int, blob: int, workers: int) -> None:
        self.room = 2 * workers
        self.counters: Ints = np.frombuffer(mmap.mmap(-1, 8 * (4 + self.room)), np.int64)
        self.total, self.norms, self.losses = _shared(size), _shared(clients), _shared(clients)
        self.sums, self.joined = _shared(self.room * blob), _shared(blob)

    @property
    def finished(self) -> int:
        """Clients whose training is over."""
        return int(self.counters[3])

    def begin(self) -> None:
        """Begin a round."""
        self.counters[:] = 0
        self.total[:] = self.joined[:] = 0


@dataclass(frozen=True)
class Cohort:
    """The ``clients`` of a round and, of each, the ``rows`` of its examples in the whole data set.

    ``seed``, ``round_number`` and ``purpose`` are, beside the client, what `client_rng` makes the generator of its order of.
    ``limit``: L2 norm above which an update does not count. ``keys`` are, for a plan of DP-SGD, what `keyed_rng` makes each
    client's coins and simulated noise of.
    """

    clients: Sequence[int]
    rows: Sequence[Ints]
    seed: int
    round_number: int
    purpose: int
    limit: float
    keys: tuple[bytes, bytes] | None = None

    def train(
        self, worker: Worker, start: Tensor, data: Examples, plan: LocalPlan, board: Board, *, one_unit: bool = False
    ) -> None:  # fmt: skip
        """Work on the round until nothing is left to take; every process of a round calls this with the same arguments. With
        ``one_unit`` the clients are added up as one unit: on the board is then what a larger round adds to its total for them.

        ``data`` is the whole data set; bytes stay bytes, and become numbers a client at a time.
        """
        if not self.rows:
            return
        rows, sizes = np.concatenate(self.rows), np.array([len(one) for one in self.rows])
        ends, units = np.cumsum(sizes), np.array([len(self.rows)] if one_unit else units_of(len(self.rows)))
        words = self.words()
        most = int(sizes.max())
        order, y = np.empty(plan.epochs * most, np.int64), np.ascontiguousarray(data.y, np.int64)
        job = worker.job(start, plan)
        job.order, job.epochs = order.ctypes.data, plan.epochs
        mine = _Cohort(
            job=ctypes.addressof(job), board=board.counters.ctypes.data, rows=rows.ctypes.data, ends=ends.ctypes.data,
            units=units.ctypes.data, words=words.ctypes.data, word_count=words.shape[1], unit_count=len(units), room=board.room,
            limit=self.limit, losses=board.losses.ctypes.data, norms=board.norms.ctypes.data, sums=board.sums.ctypes.data,
            complete=board.counters[4:].ctypes.data, joined=board.joined.ctypes.data, total=board.total.ctypes.data, unit=-1,
        )  # fmt: skip
        if data.values is None:
            x = np.ascontiguousarray(data.raw, worker.numbers)
        else:
            x, labels, own = np.empty((most, *data.shape), worker.numbers), y, np.arange(most)
            y, raw = np.empty(most, np.int64), np.ascontiguousarray(data.raw)
            values = np.ascontiguousarray(np.broadcast_to(data.values, (data.shape[0], 256)), worker.numbers)
            mine.raw, mine.values, mine.labels, mine.own = (one.ctypes.data for one in (raw, values, labels, own))
            mine.channels, mine.plane = data.shape[0], math.prod(data.shape[1:])
        job.x, job.y = x.ctypes.data, y.ctypes.data
        if plan.dp is not None:
            coins, noise = self._private_words()
            seed = np.empty(32, np.uint64)
            worker.set_privacy(plan, plan.dp)
            job.seed, mine.coins, mine.noise = seed.ctypes.data, coins.ctypes.data, noise.ctypes.data
            mine.private_count = coins.shape[1]
        while found := worker.library.run_cohort(ctypes.byref(mine)):
            if found == _NO_ROOM:
                time.sleep(_FULL)

    def words(self) -> Words:
        """The entropy of each client's SeedSequence, as numpy takes numbers apart."""
        return self._entropy([*_halves(self.seed), *_halves(self.round_number)], _halves(self.purpose))

    def _private_words(self) -> tuple[Words, Words]:
        if self.keys is None:
            raise Refused("DP-SGD: a cohort without keys has no noise")
        coins, noise = (self._entropy(np.frombuffer(key, "<u4").tolist(), []) for key in self.keys)
        return coins, noise

    def _entropy(self, before: list[int], after: list[int]) -> Words:
        words = np.empty((len(self.clients), len(before) + 1 + len(after)), np.uint32)
        words[:, : len(before)], words[:, len(before)], words[:, len(before) + 1 :] = before, self.clients, after
        return words


def _halves(number: int) -> list[int]:
    """The 32-bit words of a number, the lowest first; zero has one."""
    found = [number & 0xFFFFFFFF]
    while number := number >> 32:
        found.append(number & 0xFFFFFFFF)
    return found


def _shared(size: int) -> Doubles:
    return np.frombuffer(mmap.mmap(-1, max(8, 8 * size)), np.float64, size)
