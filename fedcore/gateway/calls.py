"""How calls come in and how refusals go out: nothing of a request is read before there is room for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from fedcore.errors import FedcoreError, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.limits import Limits, ReadingRoom
from fedcore.gateway.metrics import Meter
from fedcore.gateway.refusals import FAILURE_KEY, STATUS, GatewayRefusal
from fedcore.secagg.committee_wire import one_line

__all__ = ["streaming", "unary"]

_TEXT = 300
_FAREWELL = 1.0  # seconds to tell a reader why its stream ends
_LOG = logging.getLogger(__name__)


def unary(
    room: ReadingRoom, meter: Meter, method: str, kind: type[Message], answer: Callable[[Any], Awaitable[Message]]
) -> Callable[..., Awaitable[bytes]]:
    """The behaviour of a call with one reply, for a stream_unary handler: only so is nothing read before there is a seat."""

    async def serve(_: Any, context: Any) -> bytes:
        with meter.call(method):
            try:
                reply = await answer(await _read(room, meter, method, kind, context))
                data = bytes(reply.SerializeToString())
            except Exception as error:  # noqa: BLE001 - a defect is told apart below
                problem = error
            else:
                meter.told(method, reply, len(data))
                return data
            await _refuse(context, meter, method, problem)
        raise AssertionError  # it has raised

    return serve


def streaming(
    room: ReadingRoom, meter: Meter, method: str, kind: type[Message], answer: Callable[[Any], AsyncGenerator[Message, None]],
    limits: Limits,
) -> Callable[..., Awaitable[None]]:  # fmt: skip
    """The behaviour of a call with many replies, for a stream_stream handler.

    A reader has ``limits.grace`` seconds, and one more for every ``limits.slowest`` bytes, whether it reads them or not; then the
    call ends as busy, and the file that it reads out is let go. What was read stays good: downloads go on from any byte. gRPC
    itself keeps what it has buffered until the connection ends, which is at most ``limits.age`` and a minute later.
    """

    async def serve(_: Any, context: Any) -> None:
        with meter.call(method):
            try:
                request = await _read(room, meter, method, kind, context)
                began, sent = time.monotonic(), 0
                async with contextlib.aclosing(answer(request)) as replies:
                    async for one in replies:
                        data = one.SerializeToString()
                        left = began + limits.grace + (sent + len(data)) / limits.slowest - time.monotonic()
                        await _written(context, data, left, method, sent, meter)
                        sent += len(data)
                        meter.told(method, one, len(data))
            except Exception as error:  # noqa: BLE001 - a defect is told apart below
                problem = error
            else:
                return
            # The word waits behind what was not read; the call is given up whether it arrives or not.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    await _refuse(context, meter, method, problem)

    return serve


async def _written(context: Any, data: bytes, seconds: float, method: str, sent: int, meter: Meter) -> None:
    """Write a piece, for which there is room once the reader has taken enough of those before.

    Raises:
        GatewayRefusal: it has not, for too long.
    """
    try:
        async with asyncio.timeout(seconds):
            await context.write(data)
    except TimeoutError:
        meter.slow[method] += 1
        _LOG.warning("%s: a reader took no more than %d bytes in its time; the call was ended", method, sent)
        raise GatewayRefusal(pb.BUSY, "it was read too slowly; go on where it stopped", retry_after=1000) from None


async def _read(room: ReadingRoom, meter: Meter, method: str, kind: type[Message], context: Any) -> Any:
    import grpc

    async with room.seat(_address(context.peer())):
        data = await context.read()
    if data is grpc.aio.EOF:
        raise GatewayRefusal(pb.MALFORMED, "the call holds no request")
    try:
        request = kind.FromString(data)
    except DecodeError:
        raise GatewayRefusal(pb.MALFORMED, "the request cannot be read") from None
    meter.asked(method, request, len(data))
    return request


async def _refuse(context: Any, meter: Meter, method: str, error: Exception) -> None:
    """End the call with what the error means. A defect's text could hold anything: only its kind and place are told, to the log."""
    import grpc

    if isinstance(error, GatewayRefusal):
        refusal = error
    elif isinstance(error, FedcoreError) and not isinstance(error, TryAgain):
        refusal = GatewayRefusal(pb.MALFORMED, one_line(str(error))[:_TEXT])
    else:
        _LOG.warning("%s", one_line(str(error)) if isinstance(error, TryAgain) else f"failed: {_place(error)}")
        refusal = GatewayRefusal(pb.BUSY, "the gateway cannot do this now", retry_after=1000)
    meter.refused(method, refusal.reason)
    metadata = ((FAILURE_KEY, refusal.failure().SerializeToString()),)
    await context.abort(getattr(grpc.StatusCode, STATUS[refusal.reason]), one_line(str(refusal))[:_TEXT], metadata)


def _address(peer: str) -> str:
    """The network address of a peer such as ipv4:127.0.0.1:4711, without its port."""
    return peer.rpartition(":")[0]


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__} at {where}"
