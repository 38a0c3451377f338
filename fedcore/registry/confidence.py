"""Evidence that stays valid however often one looks: betting on votes between 0 and 1, and on medians, by two groups.

The capital of a gambler who bets a fixed fraction c on votes with mean at most m, ``prod(1 + c (x / m - 1))``, is a supermartingale
for every distribution on [0, 1] with such a mean, and so is a mixture over c; by Ville's inequality it ever reaches 1 / alpha with
probability at most alpha (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86(1);
Ville 1939). Fixed fractions make it a product in which the order of the votes does not count: votes enter as a histogram. Two
groups are compared by the product of their capitals, at the worst pair of means that the hypothesis allows. A median is the mean of
indicators at a fixed point (Howard and Ramdas 2022, "Sequential estimation of quantiles", Bernoulli 28(3), theorem 1).

Of each group some votes may be lies. Evidence counts none of the ``liars`` votes that favour it most, but all that speak against
it, so it is never more than what the honest votes alone give.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEVELS", "allowed_liars", "ceiling_evidence", "excess_evidence", "histogram", "mean_interval", "median_interval",
           "ratio_evidence"]  # fmt: skip

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
LEVELS = 200  # votes are rounded to multiples of 1 / LEVELS
_VOTES = np.arange(LEVELS + 1) / LEVELS
_BETS = np.concatenate([[0.0], np.geomspace(0.004, 0.9, 10)])  # who never bets keeps what he has: capital is never less than 1 / 11
_MEANS = np.unique(np.concatenate([[0.0], np.geomspace(5e-4, 0.05, 24), np.linspace(0.05, 0.2, 31), np.linspace(0.2, 1.0, 81)]))


def histogram(votes: npt.ArrayLike) -> Counts:
    """Counts [LEVELS + 1] of votes, clipped to [0, 1] and rounded."""
    levels = np.rint(np.clip(np.asarray(votes, np.float64), 0, 1) * LEVELS).astype(np.int64)
    return np.bincount(levels, minlength=LEVELS + 1).astype(np.int64)


def excess_evidence(a: Counts, b: Counts, liars_a: npt.ArrayLike, liars_b: npt.ArrayLike, tolerance: float) -> Doubles:
    """Log of the evidence that mean(a) > mean(b) + tolerance; histograms [..., LEVELS + 1] and numbers of liars [...].

    At least log(1 / alpha) ever, at any look, with probability at most alpha where it is not so.
    """
    above, below = _tables(tolerance)
    # Between two points of the grid, one capital is at least what it is at the right end, the other what it is at the left.
    total = _capital(a, liars_a, above, top=True) + _capital(b, liars_b, below, top=False)
    return np.asarray(total.min(axis=-1), np.float64)


def ceiling_evidence(a: Counts, liars: npt.ArrayLike, ceiling: float) -> Doubles:
    """Log of the evidence that mean(a) > ceiling."""
    return np.asarray(_capital(a, liars, _above((ceiling,)), top=True)[..., 0], np.float64)


def ratio_evidence(a: npt.ArrayLike, b: npt.ArrayLike, liars_a: int, liars_b: int, ratio: float) -> float:
    """Log of the evidence that median(a) > ratio * median(b), for positive amounts of which every identity gave one."""
    scaled, held = np.sort(np.asarray(a, np.float64) / ratio), np.sort(np.asarray(b, np.float64))
    points = np.unique(np.concatenate([scaled, held]))
    points = np.concatenate([points, (points[:-1] + points[1:]) / 2, [0.0, np.inf]])
    over = len(scaled) - np.searchsorted(scaled, points, side="right")  # a / ratio > x
    under = np.searchsorted(held, points, side="left")  # b < x
    total = _coin(over, len(scaled), liars_a) + _coin(under, len(held), liars_b)
    return float(total.min())


@functools.cache
def allowed_liars(count: int, share: float, alpha: float) -> int:
    """Most liars among ``count`` identities drawn from a fleet with that ``share``; ever exceeded with probability ``alpha``."""
    if share <= 0:
        return 0
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        votes = np.zeros(LEVELS + 1, np.int64)
        votes[0], votes[-1] = count - middle, middle
        if ceiling_evidence(votes, 0, share) < math.log(1 / alpha):
            low = middle
        else:
            high = middle - 1
    return low


def mean_interval(votes: Counts, alpha: float) -> tuple[float, float]:
    """A confidence sequence's interval of a mean, on a grid of means, each end rounded outwards; ends valid at alpha / 2 each."""
    wall = math.log(2 / alpha)
    above, below = _tables(0.0)
    not_under = _capital(votes, 0, above, top=True)  # against "the mean is at most _MEANS[1:]"
    not_over = _capital(votes, 0, below, top=False)  # against "the mean is at least _MEANS[:-1]"
    low = _MEANS[1:][not_under >= wall]
    high = _MEANS[:-1][not_over >= wall]
    return (float(low.max()) if low.size else 0.0, float(high.min()) if high.size else 1.0)


def median_interval(amounts: npt.ArrayLike, alpha: float) -> tuple[float, float]:
    """A confidence sequence's interval of a median; 0 and infinity where there are too few amounts."""
    held = np.sort(np.asarray(amounts, np.float64))
    wall, count = math.log(2 / alpha), len(held)
    ranks = np.arange(count + 1)
    enough = ranks[_coin(ranks, count, 0) >= wall]  # so many on one side are too many for a median
    if not enough.size:
        return 0.0, math.inf
    return float(held[count - enough[0]]), float(held[enough[0] - 1])


@dataclass(frozen=True)
class _Table:
    """Log factors [LEVELS + 1, means * bets], their positive parts, and for which means no vote is needed to refute them."""

    factors: Doubles
    gains: Doubles
    refuted: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, odds: Doubles, refuted: npt.NDArray[np.bool_]) -> _Table:
        """From what a bet of everything would multiply by [LEVELS + 1, means]."""
        factors = np.log1p(_BETS * (odds[:, :, None] - 1)).reshape(LEVELS + 1, -1)
        return cls(factors, np.maximum(factors, 0), refuted)


@functools.lru_cache(maxsize=64)
def _above(means: tuple[float, ...]) -> _Table:
    """Bets that the mean is more than each of ``means``; none is less than 0, so such a hypothesis is refuted."""
    held = np.array(means)
    return _Table.of(_VOTES[:, None] / np.maximum(held, 1e-9), held < 0)


@functools.lru_cache(maxsize=64)
def _below(means: tuple[float, ...]) -> _Table:
    """Bets that the mean is less than each of ``means``, which are below 1."""
    held = np.array(means)
    return _Table.of((1 - _VOTES[:, None]) / (1 - held), np.zeros(len(held), bool))


@functools.cache
def _tables(tolerance: float) -> tuple[_Table, _Table]:
    return _above(tuple(_MEANS[1:] + tolerance)), _below(tuple(_MEANS[:-1]))


def _capital(counts: Counts, liars: npt.ArrayLike, table: _Table, *, top: bool) -> Doubles:
    """Log capital [..., means]. ``top``: the highest votes favour the bet, and ``liars`` of them are not counted."""
    logs = counts.astype(np.float64) @ table.factors
    if np.any(liars):
        ends = counts[..., ::-1] if top else counts
        before = np.cumsum(ends, axis=-1) - ends
        doubted = np.clip(np.asarray(liars)[..., None] - before, 0, ends)
        logs = logs - (doubted[..., ::-1] if top else doubted).astype(np.float64) @ table.gains
    logs = logs.reshape(*counts.shape[:-1], -1, len(_BETS))
    largest = logs.max(axis=-1)
    total = largest + np.log(np.exp(logs - largest[..., None]).mean(axis=-1))
    return np.asarray(np.where(table.refuted, np.inf, total), np.float64)


def _coin(hits: npt.NDArray[np.int64], count: int, liars: int) -> Doubles:
    """Log capital of bets that hits come more often than every second time."""
    logs = np.maximum(hits - liars, 0)[:, None] * np.log1p(_BETS) + (count - hits)[:, None] * np.log1p(-_BETS)
    largest = logs.max(axis=-1)
    return np.asarray(largest + np.log(np.exp(logs - largest[:, None]).mean(axis=-1)), np.float64)
