"""How long simulated clients take: a virtual fleet with a slow tail. Results depend on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.config import FleetConfig

__all__ = ["VirtualFleet", "draw_fleet"]

_SPEEDS, _TASKS = 0x666C74, 0x74736B  # purposes: independent draws of one seed


@dataclass(frozen=True)
class VirtualFleet:
    """``usual`` [clients]: the seconds that each client's work usually takes, download and upload included; one task's are these
    times exp(``jitter`` z), z standard normal."""

    usual: npt.NDArray[np.float64]
    jitter: float
    seed: int

    def seconds(self, round_number: int, client: int) -> float:
        """How long the client's work of a round takes: a pure function of seed, round and client."""
        if not self.jitter:
            return float(self.usual[client])
        z = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, round_number, client, _TASKS]))
        ).standard_normal()
        return float(self.usual[client] * np.exp(self.jitter * z))

    def fastest(self, round_number: int, asked: Iterable[int], wanted: int) -> tuple[tuple[int, ...], float]:
        """The ``wanted`` of the clients ``asked`` that are done first, ascending, and the seconds until the last of them is."""
        timed = sorted((self.seconds(round_number, client), client) for client in asked)[:wanted]
        return tuple(sorted(client for _, client in timed)), max((seconds for seconds, _ in timed), default=0.0)


def draw_fleet(config: FleetConfig, population: int, seed: int) -> VirtualFleet | None:
    """The fleet of a scenario's [fleet]: speeds are log-normal around the median, and a share of the clients, drawn by ``seed``, is
    slower by a factor. None where there is no virtual clock."""
    if not config.median_seconds:
        return None
    rng = np.random.default_rng([seed, _SPEEDS])
    usual = config.median_seconds * np.exp(config.spread * rng.standard_normal(population))
    slow = rng.permutation(population)[: round(config.slow_share * population)]
    usual[slow] *= config.slow_factor
    return VirtualFleet(usual, config.jitter, seed)
