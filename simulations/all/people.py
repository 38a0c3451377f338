"""The watches of `simulations.all`: eight people's recordings, each on a device of its own, whole recordings held out.

It is copied beside the scenario that names it, so that every process of the demonstration finds it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.data.datasets import STRIDE, WINDOW, Dataset, Examples, _smartwatch_recordings, _test_recordings

__all__ = ["PEOPLE", "Windows", "eight_watches", "held_out", "windows"]

PEOPLE = 8
_SEED, _TEST_SHARE = 0x5EA7, 0.25
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """Raw windows ``x`` float32 [n, 6, 100] as a watch measures them, exercises ``y`` [n], wearers ``person`` [n] from 0 to 7."""

    x: npt.NDArray[np.float32]
    y: Ints
    person: Ints


def windows(*, test: bool) -> Windows:
    """Of the first eight people of the smartwatch recordings (see `fedcore.data.datasets`): those of the recordings that are held
    out, or of all others. Windows of one recording overlap; no recording is on both sides."""
    recordings: dict[str, Any] = _smartwatch_recordings()
    labels, people = np.asarray(recordings["y"], np.int64), np.asarray(recordings["subject"], np.int64)
    chosen = np.unique(people)[:PEOPLE]
    kept = np.flatnonzero(np.isin(people, chosen))
    of_test = kept[_test_recordings(labels[kept], people[kept], _TEST_SHARE, np.random.default_rng(_SEED))]
    wanted = np.sort(of_test) if test else np.setdiff1d(kept, of_test)
    slides = [np.lib.stride_tricks.sliding_window_view(recordings["X"][one], WINDOW, axis=0)[::STRIDE] for one in wanted]
    counts = [len(one) for one in slides]
    person = np.searchsorted(chosen, people[wanted])
    return Windows(np.concatenate(slides).astype(np.float32), np.repeat(labels[wanted], counts), np.repeat(person, counts))


def held_out(person: int) -> tuple[npt.NDArray[np.float32], Ints]:
    """Raw windows [n, 6, 100] and exercises [n] of one person's recordings that nothing was trained on."""
    test = windows(test=True)
    return test.x[test.person == person], test.y[test.person == person]


def eight_watches() -> Dataset:
    """All of them, natural owners, normalised by what the coordinator holds: the clients' moments would tell about examples."""
    train, test = windows(test=False), windows(test=True)
    mean, std = Examples(test.x, test.y).moments()
    parts = [Examples(part.x, part.y).scaled(mean.astype(np.float32), std.astype(np.float32)) for part in (train, test)]
    labels = tuple(str(one) for one in _smartwatch_recordings()["y_labels"])
    return Dataset("eight watches", labels, parts[0], parts[1], train.person, tuple(mean.tolist()), tuple(std.tolist()))
