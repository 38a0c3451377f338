"""What is signed between a fleet's parties, in the canonical encoding of `secagg.encoding`; types 80 to 99 are the gateway's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.secagg.encoding import TEXT, U8, U64, Message, array, blob, coded, fixed, nested
from fedcore.secagg.messages import Certificate

__all__ = [
    "ENROLMENT", "ENROLMENT_REQUEST", "NONCE", "PLAN", "REQUEST", "TIME", "Enrolment", "EnrolmentRequest", "FleetTrust",
    "RequestHead", "RoundToken", "TimeStatement",
]  # fmt: skip

# Domain tags of signatures.
REQUEST, TIME, ENROLMENT_REQUEST, ENROLMENT, PLAN = (
    "device request", "server time", "enrolment request", "enrolment", "device plan",
)  # fmt: skip
NONCE = 16
_KEYS = 16
_LONGEST_DOCUMENT = 1 << 16


@dataclass(frozen=True, slots=True)
class RequestHead(Message):
    """What the signature of a `SignedRequest` covers; ``time`` in Unix milliseconds."""

    TAG: ClassVar[int] = 80
    deployment: str = coded(TEXT)
    method: str = coded(TEXT)
    device: int = coded(U64)
    counter: int = coded(U64)
    time: int = coded(U64)
    nonce: bytes = coded(fixed(NONCE))
    body_hash: bytes = coded(fixed(32))


@dataclass(frozen=True, slots=True)
class TimeStatement(Message):
    """A gateway's clock, in Unix milliseconds, for whoever sent this nonce."""

    TAG: ClassVar[int] = 81
    deployment: str = coded(TEXT)
    nonce: bytes = coded(fixed(NONCE))
    time: int = coded(U64)


@dataclass(frozen=True, slots=True)
class EnrolmentRequest(Message):
    """What a device signs and proves when it enrols."""

    TAG: ClassVar[int] = 82
    token: bytes = coded(fixed(16))
    algorithm: int = coded(U8)
    public_key: bytes = coded(blob(64))


@dataclass(frozen=True, slots=True)
class Enrolment(Message):
    """The enrolment key's word that the key in ``certificate`` is the device of this id."""

    TAG: ClassVar[int] = 83
    device: int = coded(U64)
    certificate: Certificate = coded(nested(Certificate))
    signature: bytes = coded(fixed(64))


@dataclass(frozen=True, slots=True)
class FleetTrust(Message):
    """What a device pins at enrolment: its digest is in the enrolment token, so it needs no signature.

    ``tls_authority``: certificate (PEM) that signs the gateways' ones; empty where public authorities do. ``plan_keys`` sign
    plans, ``time_keys`` the gateways' clocks and assignments of releases, ``publisher_keys`` training steps. ``committee``: the
    `TrustBundle` of secure aggregation, empty without one; ``update_root``: root of the release repository, empty without one.
    """

    TAG: ClassVar[int] = 84
    deployment: str = coded(TEXT)
    enrolment_key: bytes = coded(fixed(32))
    plan_keys: tuple[bytes, ...] = coded(array(32, _KEYS))
    time_keys: tuple[bytes, ...] = coded(array(32, _KEYS))
    publisher_keys: tuple[bytes, ...] = coded(array(32, _KEYS))
    tls_authority: bytes = coded(blob(_LONGEST_DOCUMENT))
    committee: bytes = coded(blob(_LONGEST_DOCUMENT))
    update_root: bytes = coded(blob(_LONGEST_DOCUMENT))


@dataclass(frozen=True, slots=True)
class RoundToken(Message):
    """A device's right to a round's blobs and to one upload, until ``expiry`` (Unix milliseconds); ``mac`` is the gateways'."""

    TAG: ClassVar[int] = 85
    device: int = coded(U64)
    round_key: str = coded(TEXT)
    expiry: int = coded(U64)
    mac: bytes = coded(fixed(32))
