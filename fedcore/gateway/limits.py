"""What a stranger may cost: how many requests are read at once, for how long, and how many a device may send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.refusals import GatewayRefusal

__all__ = ["Buckets", "Limits", "Places", "ReadingRoom"]

_QUEUE = 4  # times the patience for one request that others wait for a seat


@dataclass(frozen=True)
class Limits:
    """``message``: bytes of a request. At most ``reading`` of them are read at a time, ``from_one`` of them from one address, each
    within ``patience`` seconds: their product bounds the memory that strangers can claim. ``calls``: at work or held at a time;
    ``streams``: of one connection. A device may make ``burst`` calls at once and ``rate`` a second; enrolments together
    ``enrolments`` a second. Who reads a stream has ``grace`` seconds, and takes at least ``slowest`` bytes a second; a device reads
    ``downloads`` of them at once. A connection that says nothing for ``idle`` seconds is closed, one of ``age`` seconds renewed.
    """

    message: int = 4_000_000 + 65_536
    reading: int = 64
    from_one: int = 48
    patience: float = 15.0
    calls: int = 20_000
    streams: int = 8
    burst: float = 20.0
    rate: float = 2.0
    enrolments: float = 50.0
    handshake: float = 10.0
    idle: float = 120.0
    age: float = 3600.0
    grace: float = 60.0
    slowest: float = 4096.0
    downloads: int = 16


class Buckets:
    """Token buckets by key: ``burst`` at once, ``rate`` a second; the least recently used of more than ``most`` are forgotten."""

    def __init__(self, rate: float, burst: float, most: int = 100_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._most, self._clock = rate, burst, most, clock
        self._left: OrderedDict[object, tuple[float, float]] = OrderedDict()

    def take(self, key: object) -> None:
        """Take one.

        Raises:
            GatewayRefusal: there is none left; the refusal says how long to wait.
        """
        now = self._clock()
        left, then = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        taken = left >= 1
        self._left[key] = (left - 1 if taken else left, now)
        if len(self._left) > self._most:
            self._left.popitem(last=False)
        if not taken:
            raise GatewayRefusal(pb.TOO_FAST, "too many requests", retry_after=int(1000 * (1 - left) / self._rate) + 1)


class Places:
    """At most ``most`` places at a time for each key."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, Counter[object]()

    @contextlib.contextmanager
    def hold(self, key: object) -> Iterator[None]:
        """One of them while the block runs.

        Raises:
            GatewayRefusal: all are taken.
        """
        if self._taken[key] >= self._most:
            raise GatewayRefusal(pb.TOO_FAST, f"{self._most} downloads at once are enough", retry_after=1000)
        self._taken[key] += 1
        try:
            yield
        finally:
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]


class ReadingRoom:
    """Where requests are read: so many at a time, so many of them from one address, for so long. The others wait their turn."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._seats = asyncio.Semaphore(limits.reading)
        self._of: dict[str, list[asyncio.Semaphore]] = {}  # an address's semaphore, once for everybody who uses it

    @contextlib.asynccontextmanager
    async def seat(self, address: str) -> AsyncIterator[None]:
        """A seat, until what is inside is done.

        Raises:
            GatewayRefusal: it takes too long.
        """
        users = self._of.setdefault(address, [])
        own = users[0] if users else asyncio.Semaphore(self._limits.from_one)
        users.append(own)
        try:
            await self._sit(own)
            try:
                async with asyncio.timeout(self._limits.patience):
                    yield
            finally:
                own.release()
                self._seats.release()
        except TimeoutError:
            raise GatewayRefusal(pb.BUSY, "the request did not arrive in time", retry_after=1000) from None
        finally:
            users.pop()
            if not users:
                del self._of[address]

    async def _sit(self, own: asyncio.Semaphore) -> None:
        """Take a place of the address and a seat, or neither."""
        if not own.locked() and not self._seats.locked():  # nobody to wait for, so no clock either
            await own.acquire()
            await self._seats.acquire()
            return
        async with asyncio.timeout(_QUEUE * self._limits.patience):
            await own.acquire()
            try:
                await self._seats.acquire()
            except BaseException:
                own.release()
                raise
