"""Blobs by content, in a directory that coordinator and gateways share: what plans name, and uploads that come in pieces."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedcore.errors import Refused, TryAgain

__all__ = ["Blobs"]

_PIECE = 1 << 18


class Blobs:
    """Blobs below ``directory``, by SHA-256. What is there under a digest is complete, and on the disk."""

    def __init__(self, directory: Path) -> None:
        self._blobs, self._staged = directory / "blobs", directory / "staged"
        try:
            for one in (self._blobs, self._staged):
                one.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{directory} cannot hold blobs ({error.strerror})") from error

    def put(self, data: bytes) -> bytes:
        """Keep ``data``; its digest.

        Raises:
            TryAgain: the disk is full or cannot be written.
        """
        digest = hashlib.sha256(data).digest()
        path = self._blobs / digest.hex()
        if path.exists():
            return digest
        try:
            handle, name = tempfile.mkstemp(dir=self._blobs, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._sync()
        except OSError as error:
            raise TryAgain(f"{self._blobs} cannot be written ({error.strerror})") from error
        return digest

    def size(self, digest: bytes) -> int:
        """Bytes of a blob.

        Raises:
            Refused: there is none.
        """
        try:
            return (self._blobs / digest.hex()).stat().st_size
        except OSError as error:
            raise Refused(f"there is no blob {digest.hex()[:16]}") from error

    def read(self, digest: bytes, offset: int = 0, length: int = 0) -> Iterator[bytes]:
        """A blob's bytes from ``offset`` on, at most ``length`` (all of them if 0), in pieces of 256 KiB.

        Raises:
            Refused: there is none.
        """
        left = length or (1 << 62)
        try:
            with (self._blobs / digest.hex()).open("rb") as file:
                file.seek(offset)
                while left > 0 and (piece := file.read(min(_PIECE, left))):
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise Refused(f"there is no blob {digest.hex()[:16]}") from error

    def get(self, digest: bytes) -> bytes:
        """A whole blob.

        Raises:
            Refused: there is none, or its bytes have changed.
        """
        data = b"".join(self.read(digest))
        if hashlib.sha256(data).digest() != digest:
            raise Refused(f"blob {digest.hex()[:16]} is damaged")
        return data

    def remove(self, digest: bytes) -> None:
        """Forget a blob."""
        (self._blobs / digest.hex()).unlink(missing_ok=True)

    def stage(self, name: str, digest: bytes, offset: int, data: bytes) -> int:
        """Append to the one upload of this name, where ``offset`` is its end; bytes that are there now. One of another digest (32
        bytes, kept at the start of the file) gives way.

        Raises:
            TryAgain: the disk is full or cannot be written.
        """
        path = self._staged / name
        try:
            with path.open("ab+") as file:
                file.seek(0)
                if file.read(len(digest)) != digest:
                    file.truncate(0)
                    file.write(digest)
                    file.flush()
                file.seek(0, os.SEEK_END)
                if file.tell() == len(digest) + offset:
                    file.write(data)
                return file.tell() - len(digest)
        except OSError as error:
            raise TryAgain(f"{self._staged} cannot be written ({error.strerror})") from error

    def take_staged(self, name: str, digest: bytes) -> bytes:
        """All that is there of an upload of this name and digest."""
        try:
            data = (self._staged / name).read_bytes()
        except OSError:
            return b""
        return data[len(digest) :] if data.startswith(digest) else b""

    def discard_staged(self, name: str) -> None:
        """Forget an upload."""
        (self._staged / name).unlink(missing_ok=True)

    def sweep(self, seconds: float) -> None:
        """Forget uploads whose last piece is older than ``seconds``."""
        for path in self._staged.iterdir():
            try:
                if path.stat().st_mtime < time.time() - seconds:
                    path.unlink(missing_ok=True)
            except OSError:  # another gateway was faster
                continue

    def _sync(self) -> None:
        handle = os.open(self._blobs, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
