"""What a committee member must not forget, and what it must: records that are durable before it answers, and erased for good."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Protocol

from fedcore import durable
from fedcore.errors import Refused, TryAgain

__all__ = ["FileJournal", "Journal", "MemoryJournal"]


class Journal(Protocol):
    """Records by name. A call returns when its effect will survive a crash; a crash before leaves the old state."""

    def read(self) -> dict[str, bytes]:
        """All records."""
        ...

    def write(self, name: str, record: bytes) -> None:
        """Put ``record`` in the place of the one of that name, if any, whose content is gone afterwards."""
        ...

    def erase(self, name: str) -> None:
        """Remove the record, if there is one; its content is gone afterwards."""
        ...


class MemoryJournal:
    """A journal for members that live no longer than the process: simulation on one machine."""

    def __init__(self) -> None:
        self._records: dict[str, bytes] = {}

    def read(self) -> dict[str, bytes]:
        """See `Journal`."""
        return dict(self._records)

    def write(self, name: str, record: bytes) -> None:
        """See `Journal`."""
        self._records[name] = record

    def erase(self, name: str) -> None:
        """See `Journal`."""
        self._records.pop(name, None)


class FileJournal:
    """One file a record, mode 0600, in a directory that one process holds at a time.

    A record is written to a file beside, synced, and renamed over the old one; the directory is synced. What is replaced or
    removed is then overwritten with zeros: file systems that copy on write and flash may keep older blocks all the same.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in directory.glob("*.tmp"):
                self._destroy(unfinished)
        except BlockingIOError:
            os.close(self._lock)
            raise TryAgain(f"{directory}: another process keeps its journal there") from None
        except OSError as error:
            raise Refused(f"{directory}: the journal cannot be opened ({error.strerror})") from error

    def close(self) -> None:
        """Let another process hold the journal."""
        os.close(self._lock)

    def read(self) -> dict[str, bytes]:
        """See `Journal`.

        Raises:
            Refused: a record is damaged; without it the member could contradict what it signed.
        """
        records = {}
        for path in sorted(self._directory.glob("*.record")):
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise Refused(f"{path}: this record of the journal is damaged; the member must not sign without it")
            records[path.stem] = data[32:]
        return records

    def write(self, name: str, record: bytes) -> None:
        """See `Journal`.

        Raises:
            TryAgain: the disk is full or cannot be written; the old record is intact.
        """
        path, unfinished = self._directory / f"{name}.record", self._directory / f"{name}.tmp"
        try:
            handle = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(handle, "wb") as file:  # noqa: PTH123 - from a descriptor, so that the mode is set from the start
                file.write(hashlib.sha256(record).digest() + record)
                file.flush()
                os.fsync(handle)
            old = os.open(path, os.O_RDWR) if path.exists() else None
            unfinished.replace(path)
            durable.sync(self._directory)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise TryAgain(f"{self._directory}: the journal cannot be written ({error.strerror})") from error
        if old is not None:
            _overwrite(old)

    def erase(self, name: str) -> None:
        """See `Journal`."""
        self._destroy(self._directory / f"{name}.record")

    def _destroy(self, path: Path) -> None:
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return
        path.unlink()  # first: what is half overwritten must not be found again
        durable.sync(self._directory)
        _overwrite(handle)


def _overwrite(handle: int) -> None:
    try:
        os.pwrite(handle, bytes(os.fstat(handle).st_size), 0)
        os.fsync(handle)
    finally:
        os.close(handle)
