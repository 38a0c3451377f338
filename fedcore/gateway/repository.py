"""The release repository's files, as a gateway hands them out and a device reads them. Nothing here is trusted: metadata is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from fedcore.errors import TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.registry.fetch import Reply

__all__ = ["RepositoryFetcher", "check_name"]

_NAME = re.compile(r"(?:metadata|targets)(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,199}){1,8}", re.ASCII)


def check_name(name: str) -> None:
    """See that a name is one of a repository's file, which no word in it can leave.

    Raises:
        GatewayRefusal: it is not.
    """
    if not _NAME.fullmatch(name):
        raise GatewayRefusal(pb.NO_SUCH_BLOB, "the release repository has no file of such a name")


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
