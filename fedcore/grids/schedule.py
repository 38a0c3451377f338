"""Which worker does which unit next, where workers may be lost: decisions only."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

__all__ = ["Schedule"]

_QUEUED = 2  # units that a worker has at a time, so that it does not wait for the next one
_AHEAD = 4  # units a worker may be ahead of the one that is taken next


class Schedule:
    """The units 0 to ``units`` - 1, taken in their order and done in any. ``tries`` counts how often each failed."""

    def __init__(self, units: int) -> None:
        self.units, self.taken = units, 0
        self.tries = [0] * units
        self._waiting = list(range(units))  # a heap
        self._held: dict[int, deque[int]] = {}
        self._failed: set[tuple[int, int]] = set()

    @property
    def workers(self) -> int:
        """Workers that are there."""
        return len(self._held)

    def join(self, worker: int) -> None:
        """A worker has come."""
        self._held.setdefault(worker, deque())

    def hand_out(self) -> Iterator[tuple[int, int]]:
        """Workers with the unit that each is given now: the one with the fewest first, no unit to a worker that it failed on while
        there are others."""
        while self._waiting and self._waiting[0] < self.taken + _AHEAD * len(self._held):
            unit = self._waiting[0]
            fit = [worker for worker in self._held if (worker, unit) not in self._failed] or list(self._held)
            worker = min(fit, key=lambda one: len(self._held[one]))
            if len(self._held[worker]) >= _QUEUED:
                return
            heapq.heappop(self._waiting)
            self._held[worker].append(unit)
            yield worker, unit

    def done(self, worker: int, unit: int) -> None:
        """A worker has done a unit."""
        self._held[worker].remove(unit)

    def fail(self, worker: int, unit: int) -> int:
        """A worker failed on a unit, which waits for another; returns how often it failed by now."""
        self._held[worker].remove(unit)
        return self._return(worker, unit)

    def lose(self, worker: int) -> int:
        """A worker is gone, and all that it had waits for others; returns how often the unit that it was at failed by now."""
        held = self._held.pop(worker)
        for unit in list(held)[1:]:
            heapq.heappush(self._waiting, unit)
        return self._return(worker, held[0]) if held else 0

    def leave(self, worker: int) -> None:
        """A worker goes, and all that it had waits for others; no unit failed."""
        for unit in self._held.pop(worker):
            heapq.heappush(self._waiting, unit)

    def _return(self, worker: int, unit: int) -> int:
        heapq.heappush(self._waiting, unit)
        self._failed.add((worker, unit))
        self.tries[unit] += 1
        return self.tries[unit]
