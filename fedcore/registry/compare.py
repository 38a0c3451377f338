"""Two releases side by side: what each signal is under A and under B, with intervals that hold however often one looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.registry.confidence import excess_evidence, histogram, mean_interval, median_interval, ratio_evidence
from fedcore.registry.rollout import Signal

__all__ = ["Row", "compare_releases"]

_STEPS = 200


@dataclass(frozen=True)
class Row:
    """One signal. Estimates and intervals of A and B: means of clipped rates, medians of amounts; None where nobody reported.

    ``difference`` is the interval of B's mean minus A's, or of B's median over A's. ``verdict`` is `A better`, `B better` or
    `no difference shown`; less is better.
    """

    signal: str
    counts: tuple[int, int]
    a: tuple[float, float, float] | None
    b: tuple[float, float, float] | None
    difference: tuple[float, float]
    verdict: str


def compare_releases(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], signals: Sequence[Signal], alpha: float = 0.05
) -> list[Row]:
    """A row for each signal, from one value an identity; all intervals hold together with probability 1 - ``alpha``."""
    each = alpha / (3 * len(signals))
    return [_row(signal, a.get(signal.name, ()), b.get(signal.name, ()), each) for signal in signals]


def _row(signal: Signal, a: Sequence[float], b: Sequence[float], alpha: float) -> Row:
    if signal.kind == "rate":
        difference, none = _difference(signal, a, b, alpha), 0.0
    else:
        difference, none = _ratio(a, b, alpha), 1.0
    verdict = "B better" if difference[1] < none else "A better" if difference[0] > none else "no difference shown"
    return Row(signal.name, (len(a), len(b)), _estimate(signal, a, alpha), _estimate(signal, b, alpha), difference, verdict)


def _estimate(signal: Signal, values: Sequence[float], alpha: float) -> tuple[float, float, float] | None:
    if not len(values):
        return None
    if signal.kind == "rate":
        votes = np.clip(np.asarray(values) / signal.clip, 0, 1)
        low, high = mean_interval(histogram(votes), alpha)
        return float(votes.mean()) * signal.clip, low * signal.clip, high * signal.clip
    return (float(np.median(values)), *median_interval(values, alpha))


def _difference(signal: Signal, a: Sequence[float], b: Sequence[float], alpha: float) -> tuple[float, float]:
    """Differences of clipped means that are not refuted, in steps of clip / 200, rounded outwards."""
    first, second = (histogram(np.asarray(values, np.float64) / signal.clip) for values in (a, b))
    wall = np.log(2 / alpha)
    low, high = -_STEPS, _STEPS
    while low < high and excess_evidence(second, first, 0, 0, (low + 1) / _STEPS) >= wall:
        low += 1
    while high > low and excess_evidence(first, second, 0, 0, -(high - 1) / _STEPS) >= wall:
        high -= 1
    return signal.clip * low / _STEPS, signal.clip * high / _STEPS


def _ratio(a: Sequence[float], b: Sequence[float], alpha: float) -> tuple[float, float]:
    """Ratios of medians that are not refuted, in steps of 2 %, rounded outwards; 0 and infinity beyond a factor of 50."""
    if not len(a) or not len(b):
        return 0.0, float("inf")
    wall = np.log(2 / alpha)
    steps = [1.02**n for n in range(-_STEPS, _STEPS + 1)]
    low = max((step for step in steps if ratio_evidence(b, a, 0, 0, step) >= wall), default=0.0)
    high = min((step for step in steps if ratio_evidence(a, b, 0, 0, 1 / step) >= wall), default=float("inf"))
    return low, high
