"""The file operations of an installation, one by one, so that each can be made to fail."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedcore import durable
from fedcore.errors import TryAgain

__all__ = ["Disk", "alone"]


class Disk:
    """The real one."""

    def write(self, path: Path, data: bytes) -> None:
        """Make or replace a file; it may be lost, or half of it, until `sync`."""
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """A file's content, or a directory's names, are on the disk when this returns."""
        durable.sync(path)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically; durable after the directory's `sync`."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        path.unlink(missing_ok=True)

    def put(self, path: Path, data: bytes) -> None:
        """A file that is whole and on the disk, or as it was before.

        Raises:
            OSError: as the system has it.
        """
        fresh = path.with_name(f".{path.name}.new")
        try:
            self.write(fresh, data)
            self.sync(fresh)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(fresh)  # on a full disk, half a file is in the way
            raise
        self.move(fresh, path)

    def move(self, old: Path, new: Path) -> None:
        """Rename a file that is on the disk, durably."""
        self.rename(old, new)
        self.sync(new.parent)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """While no other process is in this block for the directory; the system lets go when this one dies.

    Raises:
        TryAgain: another one is.
    """
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(f"{directory}: another agent works in this directory") from None
        yield
    finally:
        os.close(handle)
