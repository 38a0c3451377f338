"""Buffered asynchronous aggregation, FedBuff (Nguyen et al. 2022, AISTATS, arXiv:2106.06639, algorithm 1). Pure: a buffer and an
update in, a buffer out.

Clients train from the model they were given, while the server goes on. It adds up what they send, less the older the model they
began with, and steps once the buffer holds enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedcore.errors import RoundFailed

__all__ = ["Arrived", "Buffer", "Staleness", "fill_buffer"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Staleness:
    """What the age of an update, in server steps since the client was given its model, does to its weight.

    ``exponent`` a gives 1 / (1 + age)^a (section 5 of the paper, after Xie et al. 2019, arXiv:1903.03934); 0 weighs all ages alike.
    An update older than ``limit`` is discarded.
    """

    exponent: float
    limit: int

    def admits(self, age: int) -> bool:
        """Whether an update of this age still counts."""
        return 0 <= age <= self.limit

    def weight(self, age: int) -> float:
        """The factor on an update of this age; 1 for one that is not stale."""
        return float((1 + age) ** -self.exponent)


@dataclass(frozen=True)
class Arrived:
    """Updates of ``clients`` that began with the same ``version`` of the model: ``weighted`` [d] is the sum of examples x update,
    ``examples`` and ``loss`` (summed over examples) are theirs together."""

    version: int
    clients: tuple[int, ...]
    weighted: npt.NDArray[np.floating]
    examples: int
    loss: float = 0.0


@dataclass(frozen=True)
class Buffer:
    """What was added since the last server step: the sum [d] of s(age) x examples x update, and the counts that go with it.

    ``ages`` are those of its updates, one each.
    """

    total: Doubles
    examples: int = 0
    loss: float = 0.0
    ages: tuple[int, ...] = field(default=())

    @classmethod
    def empty(cls, size: int) -> Buffer:
        """For updates of ``size`` values."""
        return cls(np.zeros(size))

    def add(self, part: Arrived, version: int, staleness: Staleness) -> Buffer:
        """This buffer with updates that arrive while the model is at ``version``; the caller has seen that they are not too old."""
        age = version - part.version
        total = self.total + staleness.weight(age) * part.weighted
        return Buffer(total, self.examples + part.examples, self.loss + part.loss, (*self.ages, *[age] * len(part.clients)))

    @property
    def mean(self) -> Doubles:
        """The server's step [d]: the sum over the examples of all updates. They count in full, so that stale updates do not only
        weigh less among each other, but make the step smaller, as dividing by K does in the paper, whose clients weigh alike."""
        return self.total / self.examples


def fill_buffer(size: int, parts: Iterable[Arrived], version: int, staleness: Staleness) -> Buffer:
    """The buffer of ``parts``, added up in the order of (version, clients), so that it does not depend on that of their arrival.

    Raises:
        RoundFailed: an update is too old, or counted twice.
    """
    buffer, seen = Buffer.empty(size), set[tuple[int, int]]()
    for part in sorted(parts, key=lambda one: (one.version, one.clients)):
        work = {(part.version, client) for client in part.clients}
        if not staleness.admits(version - part.version) or len(work) < len(part.clients) or seen & work:
            raise RoundFailed(f"an update from version {part.version} cannot count for the step after version {version}")
        seen |= work
        buffer = buffer.add(part, version, staleness)
    return buffer
