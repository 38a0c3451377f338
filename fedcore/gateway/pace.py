"""Pace steering: when a device asks for work again, so that the load on the gateways stays flat whatever the size of the fleet.

One law for everybody: after a check-in, answered or not, a device waits a time drawn uniformly from half a period to one and a
half, counted while it is eligible (charging, idle, in its hours). Check-ins are then a renewal process in eligible time whose rate
does not remember what happened: neither the opening of the devices' hours nor an outage brings a crowd. A device that is new
waits as long as one met at a random moment still has to, so that a fleet switched on at once is no crowd either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = ["DAY", "Hours", "Pace", "first_wait", "simulate_load", "wait"]

DAY = 86_400.0
_MINUTE = 60.0
Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """How often a fleet may ask: at most ``rate`` check-ins a second in all, and a device not before ``least`` seconds."""

    rate: float = 200.0
    least: float = 5.0

    def period(self, fleet: int) -> float:
        """Mean eligible seconds between two check-ins of one device of ``fleet``."""
        return max(self.least, fleet / self.rate)


def wait(period: float, uniform: npt.ArrayLike) -> Times:
    """Eligible seconds until the next check-in, for ``uniform`` draws from [0, 1)."""
    return period * (0.5 + np.asarray(uniform, np.float64))


def first_wait(period: float, uniform: npt.ArrayLike, other: npt.ArrayLike) -> Times:
    """Eligible seconds until the second check-in of a new device, for two draws each: what is left of a `wait` met at random.

    The length of that wait has a density in proportion to itself, so it is sqrt(1/4 + 2 u) periods; a uniform share of it is left.
    """
    return period * np.sqrt(0.25 + 2 * np.asarray(uniform, np.float64)) * np.asarray(other, np.float64)


class Hours:
    """The part of a day in which a device is eligible: spans (from, to) in seconds since midnight, within a day, in order.

    Times are seconds since some midnight; eligible time is what has passed of them within the spans.
    """

    def __init__(self, spans: Sequence[tuple[float, float]] = ((0.0, DAY),)) -> None:
        flat = [one for span in spans for one in span]
        if not flat or flat[0] < 0 or flat[-1] > DAY or any(a >= b for a, b in pairwise(flat)):
            raise Refused(f"hours are spans of a day in order, in seconds from 0 to {DAY:.0f}; got {list(spans)}")
        self._times = np.array(flat)
        lengths = np.array([end - begin for begin, end in spans])
        ends = np.cumsum(lengths)
        self._eligible = np.column_stack([ends - lengths, ends]).ravel()
        self.length = float(ends[-1])

    def eligible(self, time: npt.ArrayLike) -> Times:
        """Eligible seconds up to ``time``."""
        days, within = np.divmod(np.asarray(time, np.float64), DAY)
        return np.asarray(days * self.length + np.interp(within, self._times, self._eligible))

    def time(self, eligible: npt.ArrayLike) -> Times:
        """The time at which so many eligible seconds have passed: inverse of `eligible` within the spans."""
        days, within = np.divmod(np.asarray(eligible, np.float64), self.length)
        span = np.searchsorted(self._eligible[1::2], within, side="right")
        return np.asarray(days * DAY + self._times[2 * span] + within - self._eligible[2 * span])

    def after(self, now: npt.ArrayLike, delay: npt.ArrayLike) -> Times:
        """When ``delay`` eligible seconds will have passed since ``now``."""
        return self.time(self.eligible(now) + np.asarray(delay, np.float64))


def simulate_load(
    fleet: int, pace: Pace, hours: Hours, days: float, rng: np.random.Generator, *,
    outage: tuple[float, float] | None = None, together: bool = False,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # fmt: skip
    """Check-ins a minute of eligible time over ``days``, on a virtual clock: all attempts, and those that were answered.

    In an ``outage`` (begin, end; in eligible seconds) nothing is answered. Devices have been at it for long, or all of them are
    new and switched on ``together``.
    """
    period, end = pace.period(fleet), days * hours.length
    eligible = first_wait(period, rng.random(fleet), rng.random(fleet))
    now = hours.time(eligible)
    minutes = int(np.ceil(end / _MINUTE))
    attempts, answered = np.zeros(minutes, np.int64), np.zeros(minutes, np.int64)
    attempts[0] = answered[0] = fleet if together else 0
    while (going := eligible < end).any():
        now, eligible = now[going], eligible[going]
        minute = (eligible / _MINUTE).astype(np.int64)
        attempts += np.bincount(minute, minlength=minutes)
        good = np.ones(len(now), bool) if outage is None else ~((outage[0] <= eligible) & (eligible < outage[1]))
        answered += np.bincount(minute[good], minlength=minutes)
        now = hours.after(now, wait(period, rng.random(len(now))))
        eligible = hours.eligible(now)
    return attempts, answered
