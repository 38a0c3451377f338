"""When a model gives way to a smaller one, as the device is hot or its battery low, and when it comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedcore.errors import FedcoreError
from fedcore_device.environment import Conditions

__all__ = ["Strain", "StrainWatch"]


@dataclass(frozen=True)
class Strain:
    """Degrees Celsius above ``hot``, or a battery below ``low`` percent, and the lower tier runs; it does until the device is at
    ``cool`` or less and the battery at ``enough`` or more, so that a value at the edge does not load models over and over."""

    hot: float = 45.0
    cool: float = 42.0
    low: int = 20
    enough: int = 25

    def holds(self, before: bool, found: Conditions) -> bool:
        """Whether the device is strained now; ``before``: whether it was. What it cannot sense strains nothing."""
        warm, charge = found.temperature, found.battery_percent
        if before:
            return (warm is not None and warm > self.cool) or (charge is not None and charge < self.enough)
        return (warm is not None and warm > self.hot) or (charge is not None and charge < self.low)


class StrainWatch:
    """Looks at the conditions at most every ``every`` seconds, for any number of threads."""

    def __init__(
        self, conditions: Callable[[], Conditions], strain: Strain, every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._conditions, self._strain, self._every, self._clock = conditions, strain, every, clock
        self._lock, self._looked, self._strained = threading.Lock(), -float("inf"), False
        self.celsius: float | None = None

    def strained(self) -> bool:
        """Whether the lower tier is to run; the last answer where the conditions cannot be read."""
        with self._lock:
            if self._clock() >= self._looked + self._every:
                self._looked = self._clock()
                with contextlib.suppress(FedcoreError, OSError):
                    found = self._conditions()
                    self.celsius = found.temperature
                    self._strained = self._strain.holds(self._strained, found)
            return self._strained
