"""How calls come in and how refusals go out: nothing of a request is read before there is room for it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from fedcore.errors import FedcoreError, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.limits import ReadingRoom
from fedcore.gateway.metrics import Meter
from fedcore.gateway.refusals import FAILURE_KEY, STATUS, GatewayRefusal
from fedcore.secagg.committee_wire import one_line

__all__ = ["streaming", "unary"]

_TEXT = 300
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
    room: ReadingRoom, meter: Meter, method: str, kind: type[Message], answer: Callable[[Any], AsyncIterator[Message]]
) -> Callable[..., AsyncIterator[bytes]]:
    """The behaviour of a call with many replies, for a stream_stream handler."""

    async def serve(_: Any, context: Any) -> AsyncIterator[bytes]:
        with meter.call(method):
            try:
                async for one in answer(await _read(room, meter, method, kind, context)):
                    data = one.SerializeToString()
                    meter.told(method, one, len(data))
                    yield data
            except Exception as error:  # noqa: BLE001 - a defect is told apart below
                problem = error
            else:
                return
            await _refuse(context, meter, method, problem)

    return serve


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
