"""Why a gateway refuses a call: one exception for both sides, and the gRPC status that each reason travels with."""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.secagg.committee_wire import one_line

__all__ = ["FAILURE_KEY", "PASSING", "STATUS", "GatewayRefusal"]

FAILURE_KEY = "fedcore-failure-bin"
_LONGEST = 300
STATUS = {
    pb.MALFORMED: "INVALID_ARGUMENT",
    pb.TOKEN_REFUSED: "UNAUTHENTICATED",
    pb.UNKNOWN_DEVICE: "UNAUTHENTICATED",
    pb.BAD_SIGNATURE: "UNAUTHENTICATED",
    pb.CLOCK: "UNAUTHENTICATED",
    pb.REPLAYED: "UNAUTHENTICATED",
    pb.REVOKED: "PERMISSION_DENIED",
    pb.QUARANTINED: "PERMISSION_DENIED",
    pb.TOO_FAST: "RESOURCE_EXHAUSTED",
    pb.NO_SUCH_ROUND: "NOT_FOUND",
    pb.LATE: "FAILED_PRECONDITION",
    pb.OTHER_UPLOAD: "ALREADY_EXISTS",
    pb.UNUSABLE: "INVALID_ARGUMENT",
    pb.NO_SUCH_BLOB: "NOT_FOUND",
    pb.PROTOCOL: "FAILED_PRECONDITION",
    pb.BUSY: "UNAVAILABLE",
    pb.ENROLMENT_CLOSED: "UNAVAILABLE",
    pb.EXPIRED: "UNAUTHENTICATED",
}
PASSING = frozenset({pb.TOO_FAST, pb.BUSY, pb.ENROLMENT_CLOSED, pb.REPLAYED})
"""Reasons after which a new request may succeed without anything else having changed."""


class GatewayRefusal(Refused):
    """A gateway refused a call for ``reason``; waiting ``retry_after`` milliseconds may help."""

    def __init__(
        self, reason: pb.Reason, text: str, *, retry_after: int = 0, time: pb.ServerTime | None = None, lacks: Sequence[str] = ()
    ) -> None:  # fmt: skip
        super().__init__(text)
        self.reason, self.retry_after, self.time, self.lacks = reason, retry_after, time, tuple(lacks)

    @classmethod
    def received(cls, failure: pb.Failure, gateway: str) -> GatewayRefusal:
        """What a gateway said, which can be anything, as one line."""
        text = one_line(failure.text)[:_LONGEST]
        named = f"{gateway} refuses ({pb.Reason.Name(failure.reason) if failure.reason in STATUS else failure.reason}): {text}"
        time = failure.server_time if failure.HasField("server_time") else None
        return cls(failure.reason, named, retry_after=failure.retry_after_ms, time=time, lacks=list(failure.lacks))

    def failure(self) -> pb.Failure:
        """As it travels."""
        text = one_line(str(self))[:_LONGEST]
        return pb.Failure(
            reason=self.reason, text=text, retry_after_ms=self.retry_after, server_time=self.time, lacks=self.lacks
        )  # fmt: skip
