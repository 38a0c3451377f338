"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedcore.privacy.randomness import keystream

__all__ = ["EVALUATE", "TRAIN", "draw_cohort", "toss_coins"]

TRAIN, EVALUATE = 0x636F68, 0x657661  # purposes: the two draws of a round are independent


def draw_cohort(
    seed: int, round_number: int, population: int, size: int, purpose: int, resting: Collection[int] = ()
) -> tuple[int, ...]:
    """``size`` distinct clients of ``population`` (all when 0), ascending; a pure function of its arguments.

    Clients that are ``resting`` are left out; where fewer than ``size`` others exist, all of those are taken.
    """
    eligible = sorted(set(range(population)) - set(resting))
    if size == 0 or size >= len(eligible):
        return tuple(eligible)
    rng = np.random.default_rng([seed, round_number, purpose])
    return tuple(sorted(rng.choice(eligible, size, replace=False).tolist()))


def toss_coins(key: bytes, population: int, rate: float, resting: Collection[int] = ()) -> tuple[int, ...]:
    """Poisson sampling: one coin for every registered client, from the 32 byte secret ``key`` of this round.

    A client's bias is at most ``rate``, to 2^-64; one that is ``resting`` has its coin tossed and stays out all the same, so
    that its rest tells nothing about the others. The cohort may be empty.
    """
    words = np.frombuffer(keystream(key)(8 * population), "<u8")
    heads = np.flatnonzero(words < np.uint64(min(int(rate * 2.0**64), 2**64 - 1))) if rate < 1 else np.arange(population)
    return tuple(sorted(set(heads.tolist()) - set(resting)))
