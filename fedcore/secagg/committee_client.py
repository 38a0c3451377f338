"""An operator's member, seen from the coordinator: `CommitteeMember` over gRPC and TLS.

The member's self-signed certificate, as key files have it, is pinned by its fingerprint, so the address proves nothing and needs
no name; the answers are signed by the key in the trust bundle all the same. Requests may be repeated, so what fails on the way is
sent again until patience ends.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError, Misbehaviour, Refused, TryAgain
from fedcore.secagg.committee_wire import (
    FAILURE_KEY,
    GREET,
    SERVICE,
    Failure,
    Greeting,
    Limits,
    check_welcome,
    endpoint_of,
    longest_message,
    one_line,
)
from fedcore.secagg.keys import TLS_NAME, fingerprint_of, read_certificate, read_private_key
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.trust import blaming, member_key

__all__ = ["RemoteMember"]

_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between attempts, doubled each time
_SPARE = 1 << 28  # bytes


@dataclass
class _Connection:
    channel: Any = field(repr=False)
    longest: int  # bytes that the member takes


class RemoteMember:
    """Member ``point`` at ``address`` (HOST:PORT), who shows the certificate of this fingerprint (SHA-256, hexadecimal).

    ``limits`` bound what is taken from it (256 MiB if not given); every request ends after ``patience`` seconds, attempts
    and waiting included. ``credentials`` is the directory of the coordinator's own TLS key, for members that demand one.

    Raises:
        Refused: a malformed address or fingerprint, or a point that the committee does not have.
    """

    def __init__(
        self, point: int, address: str, fingerprint: str, trust: TrustBundle, *,
        limits: Limits | None = None, patience: float = 60.0, credentials: Path | None = None,
    ) -> None:  # fmt: skip
        member_key(trust, point)
        self.point = point
        self._address, self._endpoint = address, endpoint_of(address)
        self._fingerprint = fingerprint.lower().replace(":", "")
        if len(self._fingerprint) != 64 or set(self._fingerprint) - set("0123456789abcdef"):
            raise Refused(f"the fingerprint of member {point} must be 64 hexadecimal digits, got {fingerprint!r}")
        self._trust, self._patience = trust, patience
        self._longest = longest_message(limits, len(trust.member_keys)) if limits else _SPARE
        self._own: tuple[bytes | None, bytes | None] = (None, None)
        if credentials:
            self._own = read_private_key(credentials / "tls.key"), read_certificate(credentials / "tls.pem")
        self._connection: _Connection | None = None
        self._given_up = False
        self._connecting = threading.Lock()

    def offer(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._ask("offer", request)

    def approve(self, proposal: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._ask("approve", proposal)

    def screen(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._ask("screen", request)

    def certify(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._ask("certify", request)

    def release(self, request: bytes) -> bytes:
        """See `CommitteeMember`."""
        return self._ask("release", request)

    def close(self) -> None:
        """See `CommitteeMember`."""
        with self._connecting:
            self._drop()

    def _ask(self, step: str, request: bytes) -> bytes:
        """Repeat what fails on the way, at growing intervals; a member once given up gets one attempt until it answers again."""
        end, pause = time.monotonic() + self._patience, _PAUSE
        while True:
            try:
                answer = self._attempt(step, request, end)
                self._given_up = False
                return answer
            except TryAgain as error:
                if self._given_up:
                    raise TryAgain(f"{self._name}: {error}") from None
                if time.monotonic() + pause >= end:
                    self._given_up = True
                    raise TryAgain(f"{self._name}: {error}; gave up after {self._patience:g} s") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt(self, step: str, request: bytes, end: float) -> bytes:
        import grpc

        with self._connecting:
            if self._connection is None:
                self._connection = self._connect(end)
            connection = self._connection
        if len(request) > connection.longest:
            raise Refused(
                f"{self._name} takes messages of at most {connection.longest} bytes, this {step} request has {len(request)}; "
                "the cohort is larger than its operator allows"
            )
        try:
            return self._call(connection.channel, step, request, end)
        except grpc.RpcError as error:
            told, problem = _failure_in(error), self._problem(error)
        except ValueError:  # another thread closed this channel
            told, problem = None, TryAgain("the connection was given up")
        if told is None:
            with self._connecting:
                if self._connection is connection:
                    self._drop()  # what listens there afterwards must show the pinned certificate again
        raise problem

    def _connect(self, end: float) -> _Connection:
        import grpc

        credentials = grpc.ssl_channel_credentials(self._shown_certificate(end), *self._own)
        options = (
            ("grpc.ssl_target_name_override", TLS_NAME),
            ("grpc.max_receive_message_length", self._longest),
            ("grpc.max_send_message_length", -1),  # the member says how much it takes
            ("grpc.per_message_decompression", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),  # no other connection's pauses
        )
        channel = grpc.secure_channel(self._address, credentials, options)
        nonce = os.urandom(32)
        try:
            answer = self._call(channel, GREET, Greeting(nonce).encode(), end)
            with blaming(self._name):
                return _Connection(channel, check_welcome(answer, nonce, self.point, self._trust))
        except grpc.RpcError as error:
            channel.close()
            raise self._problem(error) from None
        except FedcoreError:
            channel.close()
            raise

    def _shown_certificate(self, end: float) -> bytes:
        """The certificate at the address, in PEM, if it is the pinned one. Nothing is sent, and whoever it is must then own it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the comparison below is the check
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection(self._endpoint, _remaining(end)) as plain,
                context.wrap_socket(plain) as secured,
            ):
                shown = ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"").encode()
        except OSError as error:
            raise TryAgain(f"cannot be reached ({one_line(error.strerror or str(error))})") from None
        if (fingerprint := fingerprint_of(shown)) != self._fingerprint:
            raise Refused(f"{self._name} shows a certificate with fingerprint {fingerprint}, pinned is {self._fingerprint}")
        return shown

    def _problem(self, error: Any) -> FedcoreError:
        """What a status of gRPC means; a member's own words come in a `Failure`."""
        code, details, told = error.code().name, one_line(error.details() or ""), _failure_in(error)
        if told is not None:
            try:
                with blaming(self._name):
                    return Failure.decode(told).error(f"member {self.point}")
            except Misbehaviour as misbehaviour:
                return misbehaviour
        if code == "UNIMPLEMENTED":
            return Refused(f"{self._name} does not speak {SERVICE}")
        if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
            return Misbehaviour(self._name, f"its answer is longer than the {self._longest} bytes that are taken")
        return TryAgain(f"{code}: {details}"[:300])

    def _call(self, channel: Any, method: str, request: bytes, end: float) -> bytes:
        return bytes(channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=_remaining(end)))

    def _drop(self) -> None:
        if self._connection:
            self._connection.channel.close()
            self._connection = None

    @property
    def _name(self) -> str:
        return f"member {self.point} at {self._address}"


def _failure_in(error: Any) -> bytes | None:
    return next((value for key, value in error.trailing_metadata() or () if key == FAILURE_KEY), None)


def _remaining(end: float) -> float:
    return max(0.01, end - time.monotonic())
