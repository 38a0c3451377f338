"""Exact sampling of Skellam noise: the difference of two Poisson variables of equal mean, by inverse CDF at 128 bits.

A draw is one sign bit and an integer U, uniform over 127 bits; the magnitude is the number of thresholds ``T_k <= U``, with
``T_k = 2^127 P(|X| <= k)`` rounded up to an integer. The high 64 bits of a draw (sign, and the upper 63 bits of U) are read
first. A guide table over their top bits answers most draws with one look-up, a binary search the rest; the low 64 bits are read
only where the upper 63 bits of U equal those of a threshold. Reading them always would give the same distribution.

Distance from the exact distribution. (1) Thresholds are integers: each is off by less than 2^-127 of probability, hence a
magnitude by at most 2^-127, and half the sum over N magnitudes is N / 2^128. (2) Magnitudes with less than 2^-127 beyond them
have no threshold, which (1) includes. (3) Probabilities come from the backward recurrence of the modified Bessel functions
(Miller's algorithm, normalised by its own sum), ``I_{k-1} = I_{k+1} + (2 k / v) I_k``, in integers that start at 2^160: all terms
are positive, so the relative error after N steps is below N / 2^160. (4) The recurrence starts at zero where Chernoff's bound
leaves less than 2^-160; that error reaches magnitude k damped by ``(p_start / p_k)^2``. With N <= `LARGEST_TABLE` = 2^22 the sum
is below 2^-106 + 2^-136, and `TOTAL_VARIATION_PER_SAMPLE` leaves a factor of two. No floating-point number takes part, except
to find where to start.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes

__all__ = [
    "BLOCK", "LARGEST_TABLE", "TOTAL_VARIATION_PER_SAMPLE", "SkellamTable", "sample_skellam", "skellam_table", "table_size",
]  # fmt: skip

TOTAL_VARIATION_PER_SAMPLE = 2.0**-105
LARGEST_TABLE = 2**22  # thresholds: 64 MiB, and some seconds to build; a standard deviation of about 280,000
BLOCK = 2**15  # draws at a time: their temporaries stay in a core's cache
_START_BITS = 160
_UPPER_BITS, _U_BITS = 63, 127  # of U: read with the sign, and in all
_MOST_GUIDE_BITS = 20
_SEARCH = np.int32(-(2**31))  # in the guide: this cell holds a threshold


@dataclass(frozen=True, eq=False)
class SkellamTable:
    """Thresholds of the magnitude, ascending, and the guide to them.

    ``upper`` [N] holds bits 64 to 126 of each threshold, ``lower`` [N] bits 0 to 63. ``guide`` [2^(guide_bits + 1)] maps the top
    bits of a draw's high word, sign first, to the signed value, or to -2^31 where a search is needed.
    """

    variance: float
    upper: npt.NDArray[np.uint64]
    lower: npt.NDArray[np.uint64]
    guide: npt.NDArray[np.int32]
    guide_bits: int


def sample_skellam(variance: float, size: int, random: RandomBytes) -> npt.NDArray[np.int64]:
    """``size`` independent draws of mean 0 and the given variance, within `TOTAL_VARIATION_PER_SAMPLE` each.

    Bytes are read a block of `BLOCK` draws at a time: 8 little-endian bytes a draw, then 8 for each draw of the block that ties.
    Variance 0 is the point mass at zero and reads nothing.

    Raises:
        Refused: as `skellam_table`.
    """
    values = np.zeros(size, np.int64)
    if variance == 0:
        return values
    table = skellam_table(variance)
    for first in range(0, size, BLOCK):
        words = np.frombuffer(random(8 * min(BLOCK, size - first)), "<u8")
        values[first : first + BLOCK] = _look_up(table, words, random)
    return values


@functools.lru_cache(maxsize=4)
def skellam_table(variance: float) -> SkellamTable:
    """The table for a variance > 0 (the sum of the two Poisson means); about 2 us a threshold to build, then kept.

    Raises:
        Refused: the variance is not a positive number, or needs more than `LARGEST_TABLE` thresholds.
    """
    words = _thresholds(variance, _start(variance))
    kept = int(np.searchsorted(words[:, 1], np.uint64(1 << _UPPER_BITS)))  # thresholds of 2^127 are never reached
    upper, lower = words[:kept, 1].copy(), words[:kept, 0].copy()
    guide_bits = min(_MOST_GUIDE_BITS, (16 * kept).bit_length())
    cells = (upper >> np.uint64(_UPPER_BITS - guide_bits)).astype(np.int64)
    numbers = np.arange(1 << guide_bits)
    below = np.searchsorted(cells, numbers, "left").astype(np.int32)
    certain = below == np.searchsorted(cells, numbers, "right")
    guide = np.concatenate([np.where(certain, below, _SEARCH), np.where(certain, -below, _SEARCH)])
    for array in (upper, lower, guide):
        array.setflags(write=False)
    return SkellamTable(variance, upper, lower, guide, guide_bits)


def table_size(variance: float) -> int:
    """At least the number of thresholds that the table for this variance has, without building it.

    Raises:
        Refused: as `skellam_table`.
    """
    return _start(variance)


def _look_up(table: SkellamTable, words: npt.NDArray[np.uint64], random: RandomBytes) -> npt.NDArray[np.int32]:
    cells = (words >> np.uint64(_UPPER_BITS - table.guide_bits)).view(np.int64)
    values = table.guide.take(cells, mode="clip")
    open_ = np.flatnonzero(values == _SEARCH)
    searched = words[open_]
    upper = searched & np.uint64((1 << _UPPER_BITS) - 1)
    magnitudes = np.searchsorted(table.upper, upper)  # thresholds whose upper bits are smaller
    ties = np.flatnonzero(table.upper.take(magnitudes, mode="clip") == upper)
    if ties.size:
        lower = np.frombuffer(random(8 * ties.size), "<u8")
        for tie, low in zip(ties, lower, strict=True):
            first, last = magnitudes[tie], np.searchsorted(table.upper, upper[tie], "right")
            magnitudes[tie] = first + np.searchsorted(table.lower[first:last], low, "right")
    values[open_] = np.where(searched >> np.uint64(_UPPER_BITS), -magnitudes, magnitudes)
    return values


def _thresholds(variance: float, start: int) -> npt.NDArray[np.uint64]:
    """``T_k`` for k = 0 .. start - 1 as rows of two words, low word first."""
    numerator, denominator = variance.as_integer_ratio()
    factor = 2 * denominator
    # Twice through the recurrence, for the sum and for the tails: kept in memory, the terms would take ten times the table.
    after, term, tail = 0, 1 << _START_BITS, 0
    for k in range(start, 0, -1):
        tail += term
        after, term = term, after + factor * k * term // numerator
    total = term + 2 * tail
    words = bytearray(16 * start)
    after, term, tail = 0, 1 << _START_BITS, 0
    for k in range(start, 0, -1):
        tail += term
        threshold = (1 << _U_BITS) - (tail << (_U_BITS + 1)) // total
        words[16 * k - 16 : 16 * k] = threshold.to_bytes(16, "little")
        after, term = term, after + factor * k * term // numerator
    return np.frombuffer(words, "<u8").reshape(start, 2)


def _start(variance: float) -> int:
    """The smallest magnitude that Chernoff's bound gives less than 2^-160: ``exp(sqrt(v^2 + k^2) - v - k asinh(k / v))``."""
    if not (math.isfinite(variance) and variance > 0):
        raise Refused(f"the variance of Skellam noise must be a positive number, got {variance}")

    def unlikely(k: int) -> bool:
        # sqrt(v^2 + k^2) - v, without cancellation
        return k * k / (math.hypot(variance, k) + variance) - k * math.asinh(k / variance) < -_START_BITS * math.log(2)

    high = 1
    while not unlikely(high) and high <= LARGEST_TABLE:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if unlikely(middle) else (middle, high)
    if high > LARGEST_TABLE:
        raise Refused(
            f"Skellam noise of variance {variance:.4g} needs a table of more than {LARGEST_TABLE} entries; "
            "use fewer bits, or a larger cohort that shares the noise"
        )
    return high
