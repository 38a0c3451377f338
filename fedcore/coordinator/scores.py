"""What an evaluation on the clients says of them together, and of each where that is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedcore.flower import Facts

__all__ = ["by_client", "tell_scores"]

_PERCENTILES = (5, 25, 50, 75, 95)


def tell_scores(facts: Facts) -> dict[str, Any]:
    """How many clients evaluated, and percentiles of their accuracies: from the accuracies, or from a sum's histogram."""
    if facts.histogram:  # all that a sum of scores tells
        secure = {"secure": [dict(one) for one in facts.secure]} if facts.secure else {}
        values = _quantiles(facts.histogram)
        found: dict[str, Any] = {"clients": sum(facts.histogram), "histogram": list(facts.histogram), **secure}
    else:
        accuracies = [accuracy for _, accuracy, _ in facts.accuracies]
        values = np.percentile(accuracies, _PERCENTILES).tolist() if accuracies else []
        found = {"clients": len(accuracies)}
    return found | ({"percentiles": dict(zip(map(str, _PERCENTILES), values, strict=True))} if values else {})


def by_client(facts: Facts, number: int, population: int) -> Mapping[str, Any] | None:
    """Accuracy and examples of each client after a round, null for those that did not evaluate; None where nobody's is known.
    There may be more clients than the ``population`` of the scenario, where devices come by themselves."""
    if not facts.accuracies:
        return None
    known = {client: (accuracy, examples) for client, accuracy, examples in facts.accuracies}
    everyone = [known.get(client, (None, None)) for client in range(max(population, 1 + max(known)))]
    return {
        "round": number, "accuracy": [accuracy for accuracy, _ in everyone], "examples": [count for _, count in everyone],
    }  # fmt: skip


def _quantiles(histogram: Sequence[int]) -> list[float]:
    """The `_PERCENTILES` of values in [0, 1] of which only a histogram is known, as if evenly spread within a bin."""
    ends = np.concatenate([[0], np.cumsum(histogram)]) / sum(histogram)
    places = np.linspace(0, 1, len(histogram) + 1)
    found: list[float] = np.interp([p / 100 for p in _PERCENTILES], ends, places).tolist()
    return found
