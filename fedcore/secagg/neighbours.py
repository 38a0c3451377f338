"""Who masks with whom: a public seed orders the cohort on a circle, each client masks with the nearest k/2 on either side.

Up to 128 clients the graph is complete. In a circulant graph the coordinator reads a group of honest survivors apart from the
rest only if corrupt or absent clients fill two windows of w = k/2 consecutive positions. Members therefore demand D survivors
in every window, where two disjoint windows with D corrupt clients each are impossible (2 D > C) or too unlikely.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from fractions import Fraction

import numpy as np

from fedcore.errors import Refused

__all__ = ["COMPLETE_UP_TO", "Graph", "check_degree", "choose_degree", "circle_of", "least_survivors", "survival_risk"]

COMPLETE_UP_TO = 128
_SEPARATION = Fraction(1, 2**60)  # 2^-40 over the million rounds that a member takes part in
_ABORTS = Fraction(1, 1000)


def circle_of(seed: bytes, clients: int) -> list[int]:
    """The cohort's indices in their order on the circle: sorted by SHA-256(seed | index)."""
    return sorted(range(clients), key=lambda index: hashlib.sha256(seed + index.to_bytes(4, "big")).digest())


class Graph:
    """The mask graph of one round: ``clients`` n, ``degree`` k and ``least`` D survivors a window; complete if k = n - 1."""

    def __init__(self, seed: bytes, clients: int, degree: int, least: int) -> None:
        self.clients, self.degree, self.least = clients, degree, least
        self.complete = degree == clients - 1
        self._circle = list(range(clients)) if self.complete else circle_of(seed, clients)
        self._position = {index: position for position, index in enumerate(self._circle)}

    def neighbours(self, index: int) -> tuple[int, ...]:
        """N(i) in ascending order: the order of the slots in a client's boxes."""
        if self.complete:
            return (*range(index), *range(index + 1, self.clients))
        at, half = self._position[index], self.degree // 2
        steps = (*range(-half, 0), *range(1, half + 1))
        return tuple(sorted(self._circle[(at + step) % self.clients] for step in steps))

    def check_survivors(self, survivors: Collection[int]) -> None:
        """Check that every window of k/2 consecutive positions holds D survivors; a complete graph has no windows.

        Raises:
            Refused: a window holds fewer.
        """
        if self.complete:
            return
        present = np.zeros(self.clients, np.int64)
        present[[self._position[index] for index in survivors]] = 1
        width = self.degree // 2
        sums = np.concatenate([[0], np.cumsum(np.concatenate([present, present[: width - 1]]))])
        fewest = int((sums[width:] - sums[:-width]).min())
        if fewest < self.least:
            raise Refused(f"a window of {width} clients has {fewest} survivors; at least {self.least} are needed")


def check_degree(clients: int, degree: int, least: int, corrupt: int) -> None:
    """Check that (k, D) keep honest survivors together against ``corrupt`` clients C.

    Raises:
        Refused: the degree is not one of a complete or circulant graph, or the separation bound does not hold.
    """
    if degree == clients - 1:
        if least:
            raise Refused(f"a complete graph has no windows, the plan names {least} survivors a window")
        return
    if degree % 2 or not 2 <= degree < clients - 1 or not 1 <= least <= degree // 2:
        raise Refused(
            f"{degree} neighbours of whom {least} must survive on either side: {clients} clients have an even number of them "
            f"below {clients - 1}, at most half of whom must survive, or {clients - 1} and no such demand"
        )
    if not _inseparable(clients, degree // 2, least, corrupt):
        raise Refused(
            f"{degree} neighbours with {least} survivors a window could let {corrupt} corrupt of {clients} clients "
            "separate honest ones"
        )


def choose_degree(clients: int, corrupt: int, dropout: float) -> tuple[int, int]:
    """The smallest safe (k, D) that aborts at most one round in a thousand when a fraction ``dropout`` of clients is missing.

    The complete graph, (n - 1, 0), up to 128 clients and where no smaller degree will do.
    """
    least = 1
    for width in range(1, (clients - 2) // 2 + 1) if clients > COMPLETE_UP_TO else ():
        while least <= width and not _inseparable(clients, width, least, corrupt):
            least += 1
        if least <= width and survival_risk(clients, width, least, dropout) <= _ABORTS:
            return 2 * width, least
    return clients - 1, 0


def least_survivors(clients: int, degree: int, corrupt: int) -> int:
    """The smallest D with which ``degree`` neighbours are safe; 0 for the complete graph, of n - 1 neighbours or more.

    Raises:
        Refused: none is.
    """
    if degree >= clients - 1:
        return 0
    width = degree // 2
    least = next((d for d in range(1, width + 1) if _inseparable(clients, width, d, corrupt)), width)
    check_degree(clients, degree, max(least, 1), corrupt)
    return least


def survival_risk(clients: int, width: int, least: int, dropout: float) -> Fraction:
    """Upper bound on the chance that honest dropouts alone empty a window: n P[Hyp(n, survivors, w) < D]."""
    alive = round(clients * (1 - dropout))
    few = sum(
        math.comb(alive, x) * math.comb(clients - alive, width - x)
        for x in range(max(0, width - (clients - alive)), min(least, width + 1))
    )
    return Fraction(clients * few, math.comb(clients, width))


def _inseparable(clients: int, width: int, least: int, corrupt: int) -> bool:
    """2 D > C, or (n P[Hyp(n, C, w) >= D])^2 / 2 <= 2^-60; exact."""
    if 2 * least > corrupt:
        return True
    many = sum(math.comb(corrupt, x) * math.comb(clients - corrupt, width - x) for x in range(least, min(corrupt, width) + 1))
    return Fraction(clients * many, math.comb(clients, width)) ** 2 / 2 <= _SEPARATION
