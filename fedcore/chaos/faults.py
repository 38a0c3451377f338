"""What goes wrong and when: pure draws from a seed, so that a run that failed can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self

from fedcore.errors import Refused

__all__ = ["Blow", "Fate", "Faults", "blows", "mangled"]

_DISK = "disk"


class Fate(StrEnum):
    """What becomes of a piece of a stream, or of a message."""

    DROP = "drop"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    REORDER = "reorder"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"


@dataclass(frozen=True)
class Faults:
    """Chances (0 to 1, together at most 1) of each `Fate` for a piece or message; a delay takes at most ``seconds``.

    Raises:
        Refused: they are no such chances.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    seconds: float = 0.5

    def __post_init__(self) -> None:
        chances = [getattr(self, fate) for fate in Fate]
        if not all(0 <= one <= 1 for one in chances) or sum(chances) > 1 or not 0 <= self.seconds <= 3600:
            raise Refused("faults: chances lie between 0 and 1, together at most 1, and seconds between 0 and 3600")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Self:
        """From texts such as "drop=0.01" and "seconds=2".

        Raises:
            Refused: a name or value is wrong.
        """
        names, found = [one.name for one in fields(cls)], {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                found[name] = float(value)
            except ValueError:
                name = ""
            if name not in names:
                raise Refused(f"faults: NAME=NUMBER with one of {', '.join(names)}; got {text!r}")
        return cls(**found)

    def draw(self, rng: random.Random) -> Fate | None:
        """The fate of the next piece; None: it passes. Takes one number of ``rng``."""
        left = rng.random()
        for fate in Fate:
            left -= getattr(self, fate)
            if left < 0:
                return fate
        return None


def mangled(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one bit turned over."""
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


@dataclass(frozen=True)
class Blow:
    """A fault of a process: ``pause`` seconds after the one before, ``target`` is killed with signal 9 ("kill"), or can write
    nothing to any file ("disk"), for ``seconds``."""

    pause: float
    kind: str
    target: str
    seconds: float


def blows(seed: int, kills: Sequence[str], disks: Sequence[str], every: float) -> Iterator[Blow]:
    """An endless series of blows, one in ``every`` seconds in the mean, to the named processes. Every process gets its first blow
    before any has its second of the same kind.

    Raises:
        Refused: there is nobody to hit.
    """
    rng = random.Random(f"blows {seed}")  # noqa: S311 - no secret
    targets = [("kill", one) for one in kills] + [(_DISK, one) for one in disks]
    if not targets:
        raise Refused("faults: there is no process to kill and no disk to fill")
    while True:
        for kind, target in rng.sample(targets, len(targets)):
            yield Blow(rng.uniform(0.5, 1.5) * every, kind, target, rng.uniform(0.1, 1.5))
