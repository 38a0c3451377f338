"""The event queue of simulated asynchronous rounds: who trains from which version of the model, and who is done next. Pure.

Time is virtual, in seconds since the run began. A client trains at most once from each version: (version, client) names its work,
whose randomness is a function of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedcore.errors import RoundFailed

__all__ = ["Flight", "Flights", "draw_order"]

_PURPOSE = 0x627566  # separates this draw from others of the seed


@dataclass(frozen=True, order=True)
class Flight:
    """A client's work, which ``arrives`` at a virtual time; of several at one time the older version comes first."""

    arrives: float
    version: int
    client: int


@dataclass(frozen=True)
class Flights:
    """The work in progress at a virtual time ``now``, while the model is at ``version``; ``given`` are the clients that have been
    given it."""

    now: float = 0.0
    version: int = 0
    going: tuple[Flight, ...] = ()
    given: frozenset[int] = frozenset()

    def fill(self, order: Iterable[int], concurrency: int, seconds: Callable[[int, int], float]) -> Flights:
        """Give the present version to as many clients as may train at once, the first in ``order`` that are free and have not had
        it; ``seconds`` (version, client) is how long each takes."""
        busy = {flight.client for flight in self.going} | self.given
        free = concurrency - len(self.going)
        chosen = [client for client, _ in zip((one for one in order if one not in busy), range(free), strict=False)]
        begun = [Flight(self.now + seconds(self.version, client), self.version, client) for client in chosen]
        return replace(self, going=tuple(sorted((*self.going, *begun))), given=self.given | set(chosen))

    def land(self) -> tuple[Flight, Flights]:
        """The next work to arrive, and what is left then.

        Raises:
            RoundFailed: nobody trains.
        """
        if not self.going:
            raise RoundFailed(f"nobody trains any more: every client was given version {self.version} of the model")
        first, *others = self.going
        return first, replace(self, now=first.arrives, going=tuple(others))

    @property
    def landing(self) -> bool:
        """Whether work arrives at this very moment: it comes before anybody is given a model."""
        return bool(self.going) and self.going[0].arrives <= self.now

    def step(self) -> Flights:
        """After a server step: there is a new version, which nobody has been given."""
        return replace(self, version=self.version + 1, given=frozenset())

    def arrivals(
        self, order: Iterable[int], concurrency: int, seconds: Callable[[int, int], float]
    ) -> Iterator[tuple[Flight, Flights]]:
        """Let time pass: each work as it arrives, and the state after it; whoever is done makes room for the next of ``order``."""
        known, state = tuple(order), self.fill(order, concurrency, seconds)
        while True:
            if not state.landing:
                state = state.fill(known, concurrency, seconds)
            flight, state = state.land()
            yield flight, state


def draw_order(seed: int, version: int, population: int) -> tuple[int, ...]:
    """All clients in the order in which they are asked to train from a version; uniform, a pure function of its arguments."""
    return tuple(np.random.default_rng([seed, version, _PURPOSE]).permutation(population).tolist())
