"""How a release does on this device: counters and a histogram of latencies, in a small file that all app processes share.

One file of fixed size for each release, mapped into memory: what was counted survives a process that is killed, and the agent reads
it for its reports. It never holds an input, an output or a time of day. Increments are made under flock(2).

The file (little-endian uint64): magic, `_COUNTERS` in order, then buckets of latency. A load that began and never ended, while
nobody is loading, is a crash: the system gives up the lock of a process that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Health", "HealthFile", "bucket_of", "read_health"]

_MAGIC = 0x31484346  # "FCH1"
_COUNTERS = (
    "calls", "errors", "loads_begun", "loads_ended", "peak_bytes", "delegate_failures", "tier_switches", "server_asked",
    "server_answered", "decicelsius",
)  # fmt: skip
_BUCKETS = 208  # eighths of a power of two, from one microsecond to 18 minutes: each is 9 % wide
_SIZE = 8 * (1 + len(_COUNTERS) + _BUCKETS)
_FIRST = 1 + len(_COUNTERS)


def bucket_of(microseconds: float) -> int:
    """The bucket of a latency; its upper end is 2 ** ((bucket + 1) / 8) microseconds."""
    return min(max(int(8 * math.log2(max(microseconds, 1.0))), 0), _BUCKETS - 1)


@dataclass(frozen=True)
class Health:
    """What was counted. ``crashes`` are loads that a process did not survive, or that ended with an error; while ``loading``, when
    somebody loads at this moment, they are not known and 0."""

    counters: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0))
    buckets: tuple[int, ...] = (0,) * _BUCKETS
    crashes: int = 0
    loading: bool = False

    def quantile_ms(self, share: float) -> float | None:
        """An upper bound of the ``share`` quantile of latency in milliseconds, at most 9 % too high; None without calls."""
        total, seen = sum(self.buckets), 0
        for position, count in enumerate(self.buckets):
            seen += count
            if total and seen >= share * total:
                return float(2.0 ** ((position + 1) / 8) / 1000)
        return None

    def signals(self) -> dict[str, float]:
        """What a rollout is judged by, as far as it was seen: see `fedcore.registry.rollout.SIGNALS`."""
        found, counted = {}, self.counters
        if (latency := self.quantile_ms(0.95)) is not None:
            found["p95_ms"] = latency
        if counted["calls"]:
            found["errors"] = counted["errors"] / counted["calls"]
        if counted["loads_begun"] and not self.loading:
            found["crash"] = min(1.0, self.crashes / counted["loads_begun"])
        if counted["peak_bytes"]:
            found["peak_bytes"] = float(counted["peak_bytes"])
        if counted["decicelsius"]:
            found["celsius"] = counted["decicelsius"] / 10
        return found


def read_health(path: Path) -> Health:
    """What the file says now; nothing where there is none, or none that is whole."""
    with _nobody_loads(path) as quiet:
        try:
            data = path.read_bytes()
        except OSError:
            return Health()
    if len(data) != _SIZE or (numbers := struct.unpack(f"<{_SIZE // 8}Q", data))[0] != _MAGIC:
        return Health()
    counters = dict(zip(_COUNTERS, numbers[1:_FIRST], strict=True))
    crashes = max(0, counters["loads_begun"] - counters["loads_ended"]) if quiet else 0
    return Health(counters, numbers[_FIRST:], crashes, not quiet)


class HealthFile:
    """A release's counters, as an app's process keeps them. Where the disk is full or is not ours to write, nothing is counted."""

    def __init__(self, path: Path) -> None:
        self._path, self._threads = path, threading.Lock()
        self._map: mmap.mmap | None = None
        self._lock = -1
        with contextlib.suppress(OSError):
            self._open()

    def add(self, microseconds: float | None = None, highest: Mapping[str, int] | None = None, **counts: int) -> None:
        """Count a latency, and ``counts`` by name; of what is in ``highest`` the highest value stays."""
        with self._held() as counters:
            if counters is None:
                return
            for name, count in counts.items():
                counters[1 + _COUNTERS.index(name)] += count
            for name, value in (highest or {}).items():
                place = 1 + _COUNTERS.index(name)
                counters[place] = max(counters[place], value)
            if microseconds is not None:
                counters[_FIRST + bucket_of(microseconds)] += 1

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around a load: one that does not get to the end, for an error or because the process dies, is counted as a crash."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                slot = held.enter_context(_slot(self._path))
                fcntl.flock(slot, fcntl.LOCK_SH)
            self.add(loads_begun=1)
            yield
            self.add(loads_ended=1)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_size != _SIZE or os.pread(handle, 8, 0) != struct.pack("<Q", _MAGIC):
                os.ftruncate(handle, 0)
                os.posix_fallocate(handle, 0, _SIZE)  # a page that the disk has no room for would end the process later
                os.pwrite(handle, struct.pack("<Q", _MAGIC), 0)
            self._map = mmap.mmap(handle, _SIZE)
            fcntl.flock(handle, fcntl.LOCK_UN)
        except OSError:
            os.close(handle)
            raise
        self._lock, self._closing = handle, weakref.finalize(self, os.close, handle)

    @contextlib.contextmanager
    def _held(self) -> Iterator[memoryview | None]:
        with self._threads:
            if self._map is None:
                yield None
                return
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                with memoryview(self._map) as whole, whole.cast("Q") as counters:
                    yield counters
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; nothing is counted any more."""
        with self._threads:
            if self._map is not None:
                self._map.close()
                self._map = None
                self._closing()


@contextlib.contextmanager
def _slot(path: Path) -> Iterator[int]:
    """The file that is locked, shared, by everyone who loads."""
    handle = os.open(path.with_suffix(".loading"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _nobody_loads(path: Path) -> Iterator[bool]:
    """Whether it is so while the block runs."""
    with contextlib.ExitStack() as held:
        try:
            fcntl.flock(held.enter_context(_slot(path)), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield True
        else:
            yield True
