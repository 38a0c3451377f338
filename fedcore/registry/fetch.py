"""Reading a repository's files over a network that may be slow, hostile or gone: bounded in bytes and in time, and resumable.

A fetcher says where its bytes begin; everything else, every bound and every check, is here and holds for all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from fedcore.errors import Refused, TryAgain

__all__ = ["Deadline", "DirectoryFetcher", "Fetcher", "HttpFetcher", "Missing", "Reply", "fetch_bytes", "fetch_file"]

Clock = Callable[[], float]
_PIECE = 1 << 16
_ABSENT = (403, 404)  # object stores answer 403 to those who may not list


@dataclass(frozen=True)
class Reply:
    """A file's bytes from ``start`` on, which may be 0 where another offset was asked for, in pieces as the network gives them."""

    start: int
    pieces: Iterator[bytes]


class Missing(TryAgain):
    """The repository does not have a file that it names."""


class Fetcher(Protocol):
    """Where a repository's files are read. It need not be trusted."""

    def open(self, name: str, offset: int, seconds: float) -> AbstractContextManager[Reply | None]:
        """The file's bytes from ``offset`` on; None where there is no such file.

        A piece comes, or an error is raised, before ``seconds`` have passed since the call.

        Raises:
            TryAgain: there is no connection, or it broke.
        """


class Deadline:
    """An end for a whole piece of work, by a clock that is never set back."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._seconds = seconds

    def left(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            TryAgain: none are.
        """
        left = self._end - self._clock()
        if left <= 0:
            raise TryAgain(f"the repository's answer took longer than the {self._seconds:g} s it was given")
        return left


def fetch_bytes(fetcher: Fetcher, name: str, limit: int, deadline: Deadline) -> bytes | None:
    """A whole file in memory; None where there is none.

    Raises:
        Refused: it has more than ``limit`` bytes.
        TryAgain: no connection, or the deadline passed.
    """
    with fetcher.open(name, 0, deadline.left()) as reply:
        if reply is None:
            return None
        if reply.start:
            raise Refused(f"{name}: the answer does not begin at the beginning")
        parts, size = [], 0
        for piece in reply.pieces:
            deadline.left()
            size += len(piece)
            if size > limit:
                raise Refused(f"{name}: more than the {limit} bytes that are allowed")
            parts.append(piece)
        deadline.left()  # a connection that was cut at the deadline also ends
    return b"".join(parts)


def fetch_file(fetcher: Fetcher, name: str, path: Path, size: int, digest: bytes, deadline: Deadline) -> None:
    """Have the file with this size and SHA-256 at ``path``; what an earlier attempt left there is continued, and kept on failure.

    Raises:
        Refused: other bytes than those; they are removed.
        TryAgain: no connection, a broken one, the deadline passed, or the disk is full.
    """
    try:
        held = path.stat().st_size if path.exists() else 0
        if held > size:
            path.unlink()
            held = 0
        if held < size:
            _fetch_rest(fetcher, name, path, size, held, deadline)
        found, held = _digest(path), path.stat().st_size
        if held < size:
            raise TryAgain(f"{name}: the answer ended after {held} of {size} bytes")
        if found != digest:
            path.unlink()
            raise Refused(f"{name}: not the bytes whose hash is signed")
    except OSError as error:
        raise TryAgain(f"{path} cannot be written ({error.strerror}); the installed model stays") from error


def _fetch_rest(fetcher: Fetcher, name: str, path: Path, size: int, held: int, deadline: Deadline) -> None:
    with fetcher.open(name, held, deadline.left()) as reply:
        if reply is None:
            raise Missing(f"{name}: the repository names it but does not have it")
        if reply.start not in (0, held):
            raise Refused(f"{name}: the answer begins at {reply.start}, asked for was {held}")
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(reply.start)
            file.seek(reply.start)
            held = reply.start
            try:
                for piece in reply.pieces:
                    held += len(piece)
                    if held > size:
                        file.truncate(0)
                        raise Refused(f"{name}: more than the {size} bytes that are signed")
                    file.write(piece)
                    deadline.left()
            finally:
                file.flush()
                os.fsync(file.fileno())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class DirectoryFetcher:
    """A repository in a directory, as on a mounted disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def open(self, name: str, offset: int, seconds: float) -> Iterator[Reply | None]:  # noqa: ARG002 - a disk answers
        """See `Fetcher`."""
        try:
            file = (self._directory / name).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            yield None
            return
        except OSError as error:
            raise TryAgain(f"{self._directory / name} cannot be read ({error.strerror})") from error
        with file:
            yield Reply(offset, _read(file, offset))


def _read(file: BinaryIO, offset: int) -> Iterator[bytes]:
    try:
        file.seek(offset)
        while piece := file.read(_PIECE):
            yield piece
    except OSError as error:
        raise TryAgain(f"{file.name} cannot be read ({error.strerror})") from error


class HttpFetcher:
    """A repository behind an HTTP or HTTPS server or CDN, with ranges where it has them. Redirects are not followed.

    Args:
        url: what the repository's names are relative to. tls: for HTTPS; the system's authorities if None.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise Refused(f"{url}: a repository is at http://HOST/... or https://HOST/...")
        self._secure = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = tls

    @contextlib.contextmanager
    def open(self, name: str, offset: int, seconds: float) -> Iterator[Reply | None]:
        """See `Fetcher`."""
        connection = self._connection(seconds)
        # A server that drips headers keeps every single read short: only closing the socket ends them all in time.
        ended = threading.Timer(seconds, _shut, [connection])
        ended.daemon = True
        ended.start()
        try:
            yield self._answer(connection, name, offset)
        finally:
            ended.cancel()
            connection.close()

    def _answer(self, connection: http.client.HTTPConnection, name: str, offset: int) -> Reply | None:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
        try:
            connection.request("GET", f"{self._path}/{urllib.parse.quote(name)}", headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"{self._host}: no answer for {name} ({type(error).__name__})") from error
        if response.status in _ABSENT:
            return None
        if response.status == http.client.OK:
            return Reply(0, _pieces(response, name))
        if response.status == http.client.PARTIAL_CONTENT:
            return Reply(_start(response.headers.get("Content-Range", ""), name), _pieces(response, name))
        raise TryAgain(f"{name}: the server answers {response.status}")

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        if self._secure:
            context = self._tls or ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=seconds)


def _pieces(response: http.client.HTTPResponse, name: str) -> Iterator[bytes]:
    while True:
        try:
            piece = response.read1(_PIECE)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise TryAgain(f"{name}: the connection broke ({type(error).__name__})") from error
        if not piece:
            if response.length:
                raise TryAgain(f"{name}: the connection broke {response.length} bytes before the end")
            return
        yield piece


def _start(content_range: str, name: str) -> int:
    unit, _, rest = content_range.partition(" ")
    first = rest.partition("-")[0]
    if unit != "bytes" or not (first.isascii() and first.isdigit() and len(first) < 16):
        raise Refused(f"{name}: the server does not say where its answer begins")
    return int(first)


def _shut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)
