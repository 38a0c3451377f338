"""Who takes part in a round."""

from __future__ import annotations

import numpy as np

__all__ = ["EVALUATE", "TRAIN", "draw_cohort"]

TRAIN, EVALUATE = 0x636F68, 0x657661  # purposes: the two draws of a round are independent


def draw_cohort(seed: int, round_number: int, population: int, size: int, purpose: int) -> tuple[int, ...]:
    """``size`` distinct clients of ``population`` (all when 0), ascending; a pure function of its arguments."""
    if size in (0, population):
        return tuple(range(population))
    rng = np.random.default_rng([seed, round_number, purpose])
    return tuple(sorted(rng.choice(population, size, replace=False).tolist()))
