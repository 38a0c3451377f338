"""Blobs by content, in a directory that coordinator and gateways share: what plans name, and uploads that come in pieces."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from fedcore import durable
from fedcore.errors import Refused, TryAgain

__all__ = ["Blobs"]

_PIECE = 1 << 18
_HEX = 2 * hashlib.sha256().digest_size
_LOOKS = 8  # looks in the time that an unnamed blob is kept: a named one is renewed long before it could be too old


class Blobs:
    """Blobs below ``directory``, by SHA-256. What is there under a digest is complete, and on the disk."""

    def __init__(self, directory: Path) -> None:
        self._blobs, self._staged, self._turns = directory / "blobs", directory / "staged", directory / "blobs.lock"
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
        if self._renewed(path):
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
            durable.sync(self._blobs)
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

    def collect(self, named: Collection[bytes], seconds: float) -> int:
        """Forget the blobs that are not ``named``, and were neither named nor put for ``seconds``; how many.

        A blob's time is when it was put last, or found to be named: who puts one is sure to have it for so long before a plan
        names it. What is killed here, or in another gateway, leaves blobs for the next call.
        """
        now, removed = time.time(), 0
        for path in self._blobs.iterdir():
            digest = path.name if len(path.name) == _HEX else ""
            with self._turn(), contextlib.suppress(OSError):  # another gateway was faster
                age = now - path.stat().st_mtime
                if digest and bytes.fromhex(digest) in named:
                    if age > seconds / _LOOKS:
                        os.utime(path)
                elif age > seconds:
                    path.unlink()
                    removed += 1
        return removed

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

    def _renewed(self, path: Path) -> bool:
        """Whether a blob is there, which is as new as one that is put now."""
        if not path.exists():
            return False
        with self._turn(), contextlib.suppress(OSError):  # it was forgotten at this moment, or the disk does not let it be renewed
            os.utime(path)
            return True
        return False

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """While nobody else decides whether a blob stays."""
        handle = os.open(self._turns, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
