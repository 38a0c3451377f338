"""Who is a device: enrolment tokens, enrolments, signed requests, the gateways' clock, and tokens of a round. No I/O, no clock.

One scheme covers every request of an enrolled device: its identity key signs `RequestHead`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
from dataclasses import dataclass, field

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.messages import (
    ENROLMENT,
    ENROLMENT_REQUEST,
    REQUEST,
    TIME,
    Enrolment,
    EnrolmentRequest,
    FleetTrust,
    RequestHead,
    RoundToken,
    TimeStatement,
)
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import ED25519, Signer, digest, domain, verify
from fedcore.secagg.messages import CERTIFICATE
from fedcore.secagg.trust import about

__all__ = [
    "PROTOCOL",
    "WINDOW",
    "EnrolmentToken",
    "check_enrolment",
    "check_proof",
    "check_request",
    "check_server_time",
    "enrolment_request",
    "issue_token",
    "mac_key",
    "read_device",
    "read_token",
    "server_time",
    "sign_request",
    "spell",
]  # fmt: skip

PROTOCOL = 1
WINDOW = 300_000  # milliseconds that a device's clock may differ, and that its requests are good for
_PREFIX = "fedcore1."
_ID, _SECRET = 16, 32


def spell(device: int) -> str:
    """A device's id as people see it: 16 hexadecimal digits."""
    return f"{device:016x}"


def read_device(text: str) -> int:
    """Inverse of `spell`.

    Raises:
        Refused: this is no device's id.
    """
    if len(text) != 16 or set(text.lower()) - set("0123456789abcdef"):
        raise Refused(f"a device's id has 16 hexadecimal digits, got {text!r}")
    return int(text, 16)


@dataclass(frozen=True)
class EnrolmentToken:
    """One device's invitation: what it is called, what proves it, and the SHA-256 of the trust bundle that the device will pin."""

    id: bytes
    secret: bytes = field(repr=False)
    trust_hash: bytes

    @classmethod
    def fresh(cls, trust: FleetTrust, random: RandomBytes) -> EnrolmentToken:
        """A token that was never used."""
        return cls(random(_ID), random(_SECRET), hashlib.sha256(trust.encode()).digest())

    def encode(self) -> str:
        """One word, for a configuration file, an environment variable or a printed code."""
        return _PREFIX + base64.urlsafe_b64encode(self.id + self.secret + self.trust_hash).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> EnrolmentToken:
        """Inverse of `encode`; the error does not show the text.

        Raises:
            Refused: it is no token.
        """
        word = text.strip()
        coded = word.removeprefix(_PREFIX)
        try:
            data = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if not word.startswith(_PREFIX) or len(data) != _ID + _SECRET + 32:
            raise Refused(f"an enrolment token is {_PREFIX} and 107 letters, digits, dashes and underscores; was it cut off?")
        return cls(data[:_ID], data[_ID : _ID + _SECRET], data[_ID + _SECRET :])

    def check_trust(self, trust: bytes) -> FleetTrust:
        """The trust bundle of these bytes, if it is the one that this token was made for.

        Raises:
            Refused: it is another one.
        """
        if not hmac.compare_digest(hashlib.sha256(trust).digest(), self.trust_hash):
            raise Refused("the gateway shows another trust bundle than the enrolment token names; nothing was sent to it")
        return FleetTrust.decode(trust)


def mac_key(secret: bytes) -> bytes:
    """What the signer keeps of a token's secret: enough to check a proof, not to print the token again."""
    return digest("enrolment secret", secret)


def enrolment_request(token: EnrolmentToken, key: Signer, nonce: bytes) -> pb.EnrollRequest:
    """A device's request to be enrolled: its key signs, and the token's secret proves it without travelling.

    The proof covers the key, so that whoever carries the request cannot enrol a key of its own.
    """
    content = EnrolmentRequest(token.id, key.algorithm, key.public).encode()
    return pb.EnrollRequest(
        protocol=PROTOCOL, token_id=token.id, algorithm=key.algorithm, public_key=key.public,
        possession=key.sign(ENROLMENT_REQUEST, content), proof=_proof(mac_key(token.secret), content), nonce=nonce,
    )  # fmt: skip


def check_proof(request: pb.EnrollRequest, key: bytes) -> None:
    """Check a request to enrol; ``key`` is what `mac_key` gave for its token.

    Raises:
        Refused: the key's signature or the token's proof is wrong.
    """
    content = EnrolmentRequest(request.token_id, request.algorithm, request.public_key).encode()
    if not hmac.compare_digest(_proof(key, content), request.proof):
        raise Refused("the proof is not the token's")
    verify(request.algorithm, request.public_key, request.possession, ENROLMENT_REQUEST, content)


def check_enrolment(enrolment: Enrolment, deployment: str, enrolment_key: bytes) -> None:
    """Check who enrolled a device; its certificate may have ended.

    Raises:
        Refused: another deployment, or not the enrolment key's signatures.
    """
    certificate = enrolment.certificate
    with about(f"device {spell(enrolment.device)}"):
        if certificate.population != deployment:
            raise Refused(f"it is enrolled in {certificate.population!r}, not in {deployment!r}")
        verify(ED25519, enrolment_key, enrolment.signature, ENROLMENT, enrolment.content())
        verify(ED25519, enrolment_key, certificate.signature, CERTIFICATE, certificate.content())


def sign_request(
    key: Signer, deployment: str, method: str, body: bytes, *, device: int, counter: int, time: int, nonce: bytes
) -> pb.SignedRequest:  # fmt: skip
    """A request of an enrolled device to call ``method``; ``time`` in Unix milliseconds."""
    head = RequestHead(deployment, method, device, counter, time, nonce, hashlib.sha256(body).digest())
    return pb.SignedRequest(
        protocol=PROTOCOL, deployment=deployment, device=device, counter=counter, time_ms=time, nonce=nonce, body=body,
        signature=key.sign(REQUEST, head.encode()),
    )  # fmt: skip


def check_request(request: pb.SignedRequest, method: str, algorithm: int, public_key: bytes) -> None:
    """Check that the request is the device's of this key, for this method.

    Raises:
        GatewayRefusal: it is not.
    """
    try:
        head = RequestHead(
            request.deployment, method, request.device, request.counter, request.time_ms, request.nonce,
            hashlib.sha256(request.body).digest(),
        )  # fmt: skip
        verify(algorithm, public_key, request.signature, REQUEST, head.encode())
    except Refused as error:
        raise GatewayRefusal(pb.BAD_SIGNATURE, f"device {spell(request.device)}: {error}") from None


def server_time(key: Signer, deployment: str, nonce: bytes, time: int) -> pb.ServerTime:
    """The gateway's clock, signed for the one who sent ``nonce``."""
    return pb.ServerTime(time_ms=time, signature=key.sign(TIME, TimeStatement(deployment, nonce, time).encode()))


def check_server_time(told: pb.ServerTime, trust: FleetTrust, nonce: bytes) -> int:
    """What time a gateway says it is, in Unix milliseconds.

    Raises:
        Refused: none of the pinned keys signed it over this nonce.
    """
    content = TimeStatement(trust.deployment, nonce, told.time_ms).encode()
    for key in trust.time_keys:
        try:
            verify(ED25519, key, told.signature, TIME, content)
        except Refused:
            continue
        return int(told.time_ms)
    raise Refused("the gateway's time carries no signature of a time key of the trust bundle")


def issue_token(secret: bytes, device: int, round_key: str, expiry: int) -> bytes:
    """A device's token for a round; ``secret`` is shared by all gateways, ``expiry`` in Unix milliseconds."""
    token = RoundToken(device, round_key, expiry, bytes(32))
    return dataclasses.replace(token, mac=_token_mac(secret, token)).encode()


def read_token(secret: bytes, token: bytes, now: int) -> RoundToken:
    """Inverse of `issue_token`; ``now`` in Unix milliseconds.

    Raises:
        GatewayRefusal: it is not one of ours, or over.
    """
    try:
        found = RoundToken.decode(token)
    except Refused:
        raise GatewayRefusal(pb.NO_SUCH_ROUND, "the round token cannot be read") from None
    if not hmac.compare_digest(_token_mac(secret, found), found.mac):
        raise GatewayRefusal(pb.NO_SUCH_ROUND, "the round token is not one of this fleet's gateways")
    if now > found.expiry:
        raise GatewayRefusal(pb.LATE, "the round is over")
    return found


def _token_mac(secret: bytes, token: RoundToken) -> bytes:
    content = dataclasses.replace(token, mac=bytes(32)).encode()
    return hmac.digest(secret, domain("round token") + content, "sha256")


def _proof(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, domain(ENROLMENT_REQUEST) + content, "sha256")
