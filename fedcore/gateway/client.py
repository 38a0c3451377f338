"""A device's side of the protocol: `Requests` signs and checks without any I/O, `GatewayClient` speaks gRPC, `enrol` begins it all.

It needs no more than numpy-free Python, grpcio, protobuf and cryptography, and serves agents, load generators and tests alike.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.identity import (
    EnrolmentToken,
    check_enrolment,
    check_server_time,
    enrolment_request,
    sign_request,
)
from fedcore.gateway.messages import NONCE, Enrolment, FleetTrust
from fedcore.gateway.plan import check_plan
from fedcore.gateway.refusals import FAILURE_KEY, PASSING, GatewayRefusal
from fedcore.gateway.repository import RepositoryFetcher
from fedcore.gateway.tls import GATEWAY_NAME, is_loopback
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.committee_wire import endpoint_of, one_line
from fedcore.secagg.crypto import Signer

__all__ = ["SERVICE", "Enrolled", "GatewayClient", "Requests", "Sent", "channel_to", "enrol", "failure_of", "may_pass"]

SERVICE = "fedcore.gateway.v1.Gateway"
LARGEST_UPLOAD = 3_900_000  # of one message; what is longer goes in pieces
_PIECE = 1 << 20
_HELD = 40.0  # seconds: a check-in is held for thirty
_REPLIES: dict[str, Any] = {
    "Enroll": pb.EnrollReply, "Renew": pb.RenewReply, "CheckIn": pb.CheckInReply, "Fetch": pb.FetchReply, "Stage": pb.StageReply,
    "Upload": pb.UploadReply, "Report": pb.ReportReply, "Forget": pb.ForgetReply, "Release": pb.ReleaseReply,
}  # fmt: skip


@dataclass(frozen=True)
class Enrolled:
    """A device's identity: its key, what the enrolment signer said of it, and what it pins."""

    key: Signer = field(repr=False)
    enrolment: Enrolment
    trust: FleetTrust

    @property
    def device(self) -> int:
        """The device's id."""
        return self.enrolment.device


@dataclass(frozen=True)
class Sent:
    """A signed request and what its answer is checked by."""

    method: str
    request: pb.SignedRequest


class Requests:
    """Signs a device's requests and checks what comes back. No I/O.

    ``counter`` gives a number that is higher than any before, also after a restart, and that was durable before it is given.
    ``clock`` is the device's, in Unix seconds. ``floor`` is the highest server time seen (Unix milliseconds), which only rises:
    whoever keeps it hands it in again.
    """

    def __init__(
        self, enrolled: Enrolled, counter: Callable[[], int], *, clock: Callable[[], float] = time.time, floor: int = 0,
        random: RandomBytes = os.urandom,
    ) -> None:  # fmt: skip
        self.enrolled, self.floor = enrolled, floor
        self._counter, self._clock, self._random = counter, clock, random
        self._offset = 0  # milliseconds that the gateways' clock is ahead of the device's

    def sign(self, method: str, body: bytes) -> Sent:
        """A new request."""
        one = self.enrolled
        return Sent(method, sign_request(
            one.key, one.trust.deployment, method, body, device=one.device, counter=self._counter(),
            time=int(1000 * self._clock()) + self._offset, nonce=self._random(NONCE),
        ))  # fmt: skip

    def check_time(self, sent: Sent, told: pb.ServerTime) -> None:
        """Take over the gateway's clock.

        Raises:
            Refused: it is not signed over this request, or it is before a time that was seen.
        """
        now = check_server_time(told, self.enrolled.trust, sent.request.nonce)
        if now < self.floor - 1000:  # replicas' clocks differ a little
            raise Refused("the gateway's clock has gone back; nothing is done by it")
        self.floor = max(self.floor, now)

    def set_clock(self, sent: Sent, told: pb.ServerTime) -> None:
        """Use the gateway's clock for what is signed from now on, after it refused the device's own."""
        self.check_time(sent, told)
        self._offset = told.time_ms - int(1000 * self._clock())

    @property
    def now(self) -> int:
        """Unix milliseconds by the device's clock, as the gateways set it right, and never before a time that was seen."""
        return max(self.floor, int(1000 * self._clock()) + self._offset)

    def check_plan(self, assignment: pb.Assignment, last_round: int = 0) -> pb.Plan:
        """See `plan.check_plan`, by the highest time that is known."""
        return check_plan(assignment.plan, self.enrolled.trust, self.now, last_round)

    def renewed(self, reply: pb.RenewReply) -> Enrolled:
        """The identity with its new certificate, which is used from now on.

        Raises:
            Refused: it is not this device's.
        """
        enrolment = _check_enrolment(reply.enrolment, self.enrolled.trust, self.enrolled.key)
        if enrolment.device != self.enrolled.device:
            raise Refused("the renewed enrolment has another device id")
        self.enrolled = Enrolled(self.enrolled.key, enrolment, self.enrolled.trust)
        return self.enrolled


class GatewayClient:
    """A device's connection to a gateway at HOST:PORT; every call may be repeated.

    Raises:
        Refused: the address is none, or is not loopback and ``plain`` is asked for.
    """

    def __init__(self, address: str, requests: Requests, *, plain: bool = False, timeout: float = 60.0) -> None:
        self._address, self._requests, self._timeout = address, requests, timeout
        self._channel = channel_to(address, requests.enrolled.trust, plain=plain)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def check_in(self, body: pb.CheckInBody) -> pb.CheckInReply:
        """Ask for work; may take half a minute.

        Raises:
            GatewayRefusal: it was refused. TryAgain: the gateway cannot be reached, or cannot answer now.
        """
        sent, reply = self._signed("CheckIn", body, _HELD)
        self._requests.check_time(sent, reply.server_time)
        return reply  # type: ignore[no-any-return]

    def renew(self) -> Enrolled:
        """A new certificate. Raises as `check_in`."""
        body = pb.RenewBody(enrolment=self._requests.enrolled.enrolment.encode())
        sent, reply = self._signed("Renew", body, self._timeout)
        self._requests.check_time(sent, reply.server_time)
        return self._requests.renewed(reply)

    def release(self, body: pb.ReleaseBody) -> pb.ReleaseReply:
        """Tell how releases did, and ask which one the device should have. Raises as `check_in`.

        The assignment is the caller's to check: `fedcore.registry.assignment.check_assignment`, with the trust bundle's time keys.
        """
        sent, reply = self._signed("Release", body, self._timeout)
        self._requests.check_time(sent, reply.server_time)
        return reply  # type: ignore[no-any-return]

    def repository(self, token: bytes) -> RepositoryFetcher:
        """The files of the release repository, for `fedcore.registry.client.Client`; ``token`` is that of a reply to `release`."""
        return RepositoryFetcher(self, token)

    def fetch(self, token: bytes, digest: bytes, offset: int = 0, length: int = 0) -> Iterator[bytes]:
        """A blob's bytes from ``offset`` on; whoever puts them together checks the digest. Raises as `check_in`."""
        request = pb.FetchRequest(token=token, digest=digest, offset=offset, length=length)
        for reply in self.replies(request, self._timeout):
            if reply.data:
                yield reply.data

    def replies(self, request: pb.FetchRequest, seconds: float) -> Iterator[pb.FetchReply]:
        """The answers to ``Fetch``, all of them within ``seconds``; closing the iterator ends the call. Raises as `check_in`."""
        import grpc

        call = self._channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, pb.FetchReply.FromString)
        answers = call(request, timeout=seconds)
        try:
            yield from answers
        except grpc.RpcError as error:
            raise failure_of(error, self._address) from None
        finally:
            answers.cancel()

    def fetch_whole(self, token: bytes, blob: pb.Blob, have: bytes = b"") -> bytes:
        """A whole blob, of which the first bytes may be there. Raises as `check_in`.

        Raises:
            Refused: what came is not what the plan names.
        """
        data = have + b"".join(self.fetch(token, blob.digest, len(have)))
        if len(data) != blob.size or hashlib.sha256(data).digest() != blob.digest:
            raise Refused(f"blob {blob.name}: the bytes are not those that the plan names")
        return data

    def upload(self, token: bytes, data: bytes) -> bool:
        """Send a contribution, in pieces where it is long; whether it was counted before. Raises as `check_in`."""
        digest = hashlib.sha256(data).digest()
        body = pb.UploadBody(token=token, digest=digest, data=data)
        if len(data) > LARGEST_UPLOAD:
            body = pb.UploadBody(token=token, digest=digest)
            try:
                self._stage(token, digest, data)
            except GatewayRefusal as refusal:
                if refusal.reason != pb.LATE:  # the final message tells whether it was counted before the round was over
                    raise
        return bool(self._signed("Upload", body, self._timeout)[1].repeated)

    def report(self, body: pb.ReportBody) -> pb.ReportReply:
        """Say how it goes. Raises as `check_in`."""
        return self._signed("Report", body, self._timeout)[1]  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Withdraw the device for good. Raises as `check_in`."""
        self._signed("Forget", None, self._timeout)

    def _stage(self, token: bytes, digest: bytes, data: bytes) -> None:
        have, before = self._staged(token, digest, data, 0, b""), -1
        while have < len(data):
            if have <= before:
                raise TryAgain("the gateway does not take the next piece of the upload")
            before = have
            have = self._staged(token, digest, data, have, data[have : have + _PIECE])

    def _staged(self, token: bytes, digest: bytes, data: bytes, offset: int, piece: bytes) -> int:
        request = pb.StageRequest(token=token, digest=digest, total=len(data), offset=offset, data=piece)
        return int(_call(self._channel, self._address, "Stage", request, self._timeout).staged)

    def _signed(self, method: str, body: Any, timeout: float) -> tuple[Sent, Any]:
        """Send a signed request; once more, where the device's clock was wrong and the gateway told the time."""
        data = body.SerializeToString() if body is not None else b""
        sent = self._requests.sign(method, data)
        try:
            return sent, _call(self._channel, self._address, method, sent.request, timeout)
        except GatewayRefusal as refusal:
            if refusal.reason != pb.CLOCK or refusal.time is None:
                raise
            self._requests.set_clock(sent, refusal.time)
        sent = self._requests.sign(method, data)
        return sent, _call(self._channel, self._address, method, sent.request, timeout)


def enrol(address: str, token: str, key: Signer, *, plain: bool = False, timeout: float = 30.0) -> Enrolled:
    """Enrol a device. The trust bundle is compared with the token's digest before anything is proven.

    Raises:
        Refused: the token is none, or the gateway shows another trust bundle.
        GatewayRefusal: the enrolment is refused.
        TryAgain: the gateway cannot be reached.
    """
    held = EnrolmentToken.decode(token)
    shown = b"" if plain else _shown_authority(address, timeout)
    first = channel_to(address, FleetTrust("?", bytes(32), (), (), (), shown, b"", b""), plain=plain)
    try:
        trust = held.check_trust(_call(first, address, "Enroll", pb.EnrollRequest(token_id=held.id), timeout).trust)
    finally:
        first.close()
    channel = channel_to(address, trust, plain=plain)
    try:
        request = enrolment_request(held, key, os.urandom(NONCE))
        reply = _call(channel, address, "Enroll", request, timeout)
    finally:
        channel.close()
    check_server_time(reply.server_time, trust, request.nonce)
    return Enrolled(key, _check_enrolment(reply.enrolment, trust, key), trust)


def channel_to(address: str, trust: FleetTrust, *, plain: bool = False, aio: bool = False) -> Any:
    """A gRPC channel to a gateway that shows a certificate of the fleet's authority, or of a public one where it has none.

    Raises:
        Refused: without TLS (``plain``) only loopback is spoken to.
    """
    import grpc

    host, _ = endpoint_of(address)
    options = [("grpc.max_receive_message_length", 8 << 20), ("grpc.use_local_subchannel_pool", 1)]
    where = grpc.aio if aio else grpc
    if plain:
        if not is_loopback(host):
            raise Refused(f"{address} is not this machine: it is only spoken to over TLS")
        return where.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)])
    if trust.tls_authority:
        options.append(("grpc.ssl_target_name_override", GATEWAY_NAME))  # type: ignore[arg-type]
    return where.secure_channel(address, grpc.ssl_channel_credentials(trust.tls_authority or None), options)


def failure_of(error: Any, address: str) -> GatewayRefusal | TryAgain:
    """What a gRPC error means."""
    told = next((value for key, value in error.trailing_metadata() or () if key == FAILURE_KEY), None)
    if told is not None:
        try:
            return GatewayRefusal.received(pb.Failure.FromString(told), f"the gateway at {address}")
        except DecodeError:
            return TryAgain(f"the gateway at {address} answers what cannot be read")
    return TryAgain(f"the gateway at {address} cannot be reached ({error.code().name}: {one_line(error.details() or '')[:200]})")


def may_pass(error: Exception) -> bool:
    """Whether the same call, signed anew, may succeed later."""
    return error.reason in PASSING if isinstance(error, GatewayRefusal) else isinstance(error, TryAgain)


def _call(channel: Any, address: str, method: str, request: Any, timeout: float) -> Any:
    import grpc

    call = channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, _REPLIES[method].FromString)
    try:
        return call(request, timeout=timeout)
    except grpc.RpcError as error:
        raise failure_of(error, address) from None


def _check_enrolment(data: bytes, trust: FleetTrust, key: Signer) -> Enrolment:
    enrolment = Enrolment.decode(data)
    check_enrolment(enrolment, trust.deployment, trust.enrolment_key)
    certificate = enrolment.certificate
    if (certificate.algorithm, certificate.public_key) != (key.algorithm, key.public):
        raise Refused("the enrolment is for another key")
    return enrolment


def _shown_authority(address: str, timeout: float) -> bytes:
    """The certificate that an unknown gateway shows, good for fetching the trust bundle, which is checked by its digest."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(endpoint_of(address), timeout) as plain,
            context.wrap_socket(plain, server_hostname=GATEWAY_NAME) as secured,
        ):
            return ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"").encode()
    except OSError as error:
        raise TryAgain(f"the gateway at {address} cannot be reached ({one_line(error.strerror or str(error))})") from None
