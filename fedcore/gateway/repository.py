"""The release repository's files, as a gateway hands them out and a device reads them. Nothing here is trusted: metadata is."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fedcore.errors import TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.registry.fetch import Reply
from fedcore.registry.files import Files

__all__ = ["REPOSITORY", "RepositoryFetcher", "check_name", "read_out"]

REPOSITORY = "*release repository"
"""Stands in a token where a round's key would; no task's name begins so."""
_PIECE = 1 << 18
_NAME = re.compile(r"(?:metadata|targets)(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,199}){1,8}", re.ASCII)


def check_name(name: str) -> None:
    """See that a name is one of a repository's file, which no word in it can leave.

    Raises:
        GatewayRefusal: it is not.
    """
    if not _NAME.fullmatch(name):
        raise GatewayRefusal(pb.NO_SUCH_BLOB, "the release repository has no file of such a name")


async def read_out(files: Files, name: str, offset: int, length: int) -> AsyncIterator[pb.FetchReply]:
    """The answers to a ``Fetch`` of a repository's file: its size, then at most ``length`` bytes (0: all) from ``offset`` on.

    Raises:
        GatewayRefusal: there is no such file, or not so much of it.
        TryAgain: it cannot be read now, or was changed meanwhile.
    """
    check_name(name)
    left, total = length or 1 << 62, -1
    while left > 0:
        found = await asyncio.to_thread(files.part, name, offset, min(_PIECE, left))
        if found is None or offset > found[0]:
            raise GatewayRefusal(pb.NO_SUCH_BLOB, f"the release repository has no byte {offset} of a file of this name")
        size, data = found
        if total < 0:
            total = size
            yield pb.FetchReply(total=total)
        if size != total:
            raise TryAgain(f"{name} was changed while it was read")
        if not data:
            return
        yield pb.FetchReply(data=data)
        offset, left = offset + len(data), left - len(data)


class RepositoryFetcher:
    """`fedcore.registry.fetch.Fetcher` over ``Fetch``, as `GatewayClient.repository` gives it."""

    def __init__(self, client: Any, token: bytes) -> None:
        self._client, self._token = client, token

    @contextlib.contextmanager
    def open(self, name: str, offset: int, seconds: float) -> Iterator[Reply | None]:
        """See `Fetcher`."""
        replies = self._client.replies(pb.FetchRequest(token=self._token, name=name, offset=offset), seconds)
        with contextlib.closing(replies):
            pieces = _pieces(replies)
            try:
                next(pieces)  # the size, or that there is none
            except GatewayRefusal as refusal:
                if refusal.reason != pb.NO_SUCH_BLOB:
                    raise TryAgain(f"{name}: {refusal}") from None
                yield None
                return
            except StopIteration:
                raise TryAgain(f"{name}: the gateway gives no answer") from None
            yield Reply(offset, _calm(name, pieces))


def _pieces(replies: Iterator[pb.FetchReply]) -> Iterator[bytes]:
    for reply in replies:
        yield reply.data


def _calm(name: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What a gateway refuses is no finding about the file."""
    try:
        yield from pieces
    except GatewayRefusal as refusal:
        raise TryAgain(f"{name}: {refusal}") from None
