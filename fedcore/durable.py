"""Files that are whole after a crash or a power failure at any moment."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync", "write"]


def write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Make or replace a file: the old one or the new one is on the disk, never half of one. One process writes it at a time.

    Raises:
        OSError: as the system has it; the old file is intact.
    """
    fresh = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """When this returns, a file's content, or a directory's names, are on the disk.

    Raises:
        OSError: as the system has it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
