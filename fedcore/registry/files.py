"""Where a repository lies: a directory, or anything that fsspec knows by URL. Reading, whole writes, names; nothing else is needed.

A write is there completely or not at all: a directory by fsync and rename, an object store by nature.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fedcore import durable
from fedcore.errors import Refused, TryAgain

__all__ = ["Files", "LocalFiles", "RemoteFiles", "open_files"]

_LOCK = ".lock"


class Files(Protocol):
    """Files by relative name with forward slashes."""

    def read(self, name: str) -> bytes | None:
        """The content; None where there is no such file."""

    def part(self, name: str, offset: int, most: int) -> tuple[int, bytes] | None:
        """The file's size, and its bytes from ``offset`` on, at most so many; None where there is no such file."""

    def write(self, name: str, data: bytes) -> None:
        """Make the content durable under ``name``, over what was there."""

    def names(self) -> list[str]:
        """Every file, sorted."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """While nobody else publishes here, as far as the place can tell."""


class LocalFiles:
    """Files below a directory, one publisher at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> bytes | None:
        """See `Files`."""
        try:
            return (self._directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise TryAgain(f"{self._directory / name} cannot be read ({error.strerror})") from error

    def part(self, name: str, offset: int, most: int) -> tuple[int, bytes] | None:
        """See `Files`."""
        try:
            with (self._directory / name).open("rb") as file:
                file.seek(offset)
                return os.fstat(file.fileno()).st_size, file.read(most)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise TryAgain(f"{self._directory / name} cannot be read ({error.strerror})") from error

    def write(self, name: str, data: bytes) -> None:
        """See `Files`.

        Raises:
            TryAgain: the disk is full or cannot be written; what was there is intact.
        """
        path = self._directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(path, data)
        except OSError as error:
            raise TryAgain(f"{path} cannot be written ({error.strerror})") from error

    def names(self) -> list[str]:
        """See `Files`; the lock is left out, what a killed write left is not."""
        found = (path.relative_to(self._directory).as_posix() for path in self._directory.rglob("*") if path.is_file())
        return sorted(name for name in found if name != _LOCK)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Files`; the system lets go of it when this process dies.

        Raises:
            TryAgain: somebody else holds it.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Refused(f"{self._directory} cannot hold a repository ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise TryAgain(f"{self._directory}: somebody else publishes there at this moment") from error
        finally:
            os.close(handle)


class RemoteFiles:
    """Files below a URL of fsspec. Object stores have no locks: run one publisher."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise Refused(f"{url}: {error}") from error
        self._url = url

    def read(self, name: str) -> bytes | None:
        """See `Files`."""
        try:
            found: Any = self._system.cat_file(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise TryAgain(f"{self._url}/{name} cannot be read ({error})") from error
        return bytes(found)

    def part(self, name: str, offset: int, most: int) -> tuple[int, bytes] | None:
        """See `Files`."""
        path = f"{self._root}/{name}"
        try:
            size = int(self._system.size(path))
            end = min(size, offset + most)
            found: Any = self._system.cat_file(path, start=offset, end=end) if end > offset else b""
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise TryAgain(f"{self._url}/{name} cannot be read ({error})") from error
        return size, bytes(found)

    def write(self, name: str, data: bytes) -> None:
        """See `Files`."""
        path = f"{self._root}/{name}"
        try:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(path, data)
        except OSError as error:
            raise TryAgain(f"{self._url}/{name} cannot be written ({error})") from error

    def names(self) -> list[str]:
        """See `Files`."""
        self._system.invalidate_cache()
        prefix = self._root.rstrip("/") + "/"
        return sorted(path.removeprefix(prefix) for path in self._system.find(self._root))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Files`; nothing is held."""
        yield


def open_files(place: str) -> Files:
    """The files at a path or a URL."""
    return RemoteFiles(place) if "://" in place else LocalFiles(Path(place))
