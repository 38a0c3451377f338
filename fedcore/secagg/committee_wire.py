"""What travels between a coordinator and an operator's member beside the protocol: a greeting, failures, and how long a message is.

The service ``fedcore.committee.v1`` has one method a step (`STEPS`) and ``greet``, all with canonical bytes in and out. A
request that fails ends with a gRPC status, and a `Failure` in the trailing metadata `FAILURE_KEY`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedcore.errors import FedcoreError, Misbehaviour, Refused, TryAgain
from fedcore.secagg.crypto import BOX_OVERHEAD, ED25519, KEY_LENGTHS, Signer, digest, verify
from fedcore.secagg.encoding import LONGEST, U8, U64, Message, blob, coded, fixed
from fedcore.secagg.messages import (
    Approval,
    Certification,
    Deposit,
    Entry,
    MetricBlock,
    Offer,
    ReleaseRequest,
    Survivor,
    TrustBundle,
)
from fedcore.secagg.shamir import SHARE_LENGTH
from fedcore.secagg.trust import about, member_key

__all__ = [
    "FAILURE_KEY", "GREET", "SERVICE", "STATUS", "Failure", "Greeting", "Limits", "Welcome", "check_welcome", "endpoint_of",
    "longest_message",
    "one_line", "welcome",
]  # fmt: skip

SERVICE = "fedcore.committee.v1"
GREET = "greet"
FAILURE_KEY = "fedcore-failure-bin"
STATUS = {TryAgain: "UNAVAILABLE", Misbehaviour: "FAILED_PRECONDITION", Refused: "INVALID_ARGUMENT"}  # of gRPC
_KINDS = tuple(STATUS)
_WELCOME = "committee welcome"
_TEXT = 1000  # bytes of a failure's text


@dataclass(frozen=True, slots=True)
class Greeting(Message):
    """Who is there?"""

    TAG: ClassVar[int] = 70
    nonce: bytes = coded(fixed(32))


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Member ``member`` under the trust bundle of this hash, who takes messages of up to ``longest`` bytes."""

    TAG: ClassVar[int] = 71
    member: int = coded(U8)
    trust_hash: bytes = coded(fixed(32))
    longest: int = coded(U64)
    nonce: bytes = coded(fixed(32))
    signature: bytes = coded(fixed(64))


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """Why there is no answer: ``kind`` is the place of the error's class in `STATUS`, ``party`` the one to blame, or nobody."""

    TAG: ClassVar[int] = 72
    kind: int = coded(U8)
    party: bytes = coded(blob(256))
    text: bytes = coded(blob(_TEXT))

    @classmethod
    def of(cls, error: FedcoreError) -> Failure:
        """The failure that stands for an error."""
        kind = next((place for place, one in enumerate(_KINDS) if isinstance(error, one)), 0)
        party = error.party if isinstance(error, Misbehaviour) else ""
        text = one_line(str(error).removeprefix(f"{party}: "))
        return cls(kind, one_line(party).encode()[:256], text.encode()[:_TEXT])

    def error(self, source: str) -> FedcoreError:
        """The error again, with ``source``, who says so. A lying source can name anybody."""
        party, text = (one_line(part.decode(errors="replace")) for part in (self.party, self.text))
        kind = _KINDS[self.kind] if self.kind < len(_KINDS) else Refused
        return Misbehaviour(party, f"{text} (says {source})") if kind is Misbehaviour else kind(f"{source}: {text}")


def welcome(greeting: bytes, identity: Signer, point: int, trust: TrustBundle, longest: int) -> bytes:
    """A member's answer to a `Greeting`: it holds its key, here and now."""
    unsigned = Welcome(point, digest("trust", trust.encode()), longest, Greeting.decode(greeting).nonce, bytes(64))
    return replace(unsigned, signature=identity.sign(_WELCOME, unsigned.content())).encode()


def check_welcome(answer: bytes, nonce: bytes, point: int, trust: TrustBundle) -> int:
    """Check who answered; the most bytes that it takes.

    Raises:
        Refused: it is not the member of the pinned key, or it goes by another trust bundle.
    """
    message = Welcome.decode(answer)
    if message.member != point:
        raise Refused(f"member {message.member} answers in the place of member {point}")
    with about("it does not hold the key that the trust bundle names"):
        verify(ED25519, member_key(trust, point), message.signature, _WELCOME, message.content())
    if message.nonce != nonce:
        raise Refused("it answers another greeting")
    if message.trust_hash != digest("trust", trust.encode()):
        raise Refused("it goes by another trust bundle")
    return message.longest


@dataclass(frozen=True)
class Limits:
    """The largest cohorts a member serves: clients of a round, and neighbours of a client (n - 1 in a complete graph)."""

    clients: int = 1000
    neighbours: int = 128


def longest_message(limits: Limits, members: int) -> int:
    """Bytes of the longest message of a round within ``limits`` with as many committee members, in either direction.

    That is a release request over all clients: each client's entry and path in the cohort's tree, its statement with a box hash
    and a root a member and a commitment a slot, and a box with a share a slot. A proposal, the uploads' screening and a release
    (a leaf and a share a slot) take less for each client.

    Raises:
        Refused: it is more than a message may have.
    """
    text, slots, depth = 63, limits.neighbours + 1, (limits.clients - 1).bit_length()  # text: the longest beyond the shortest
    client = (
        Survivor.least() + Deposit.least() + Entry.least() + 2 * text + max(KEY_LENGTHS.values())
        + 32 * (depth + 2 * members + slots) + BOX_OVERHEAD + SHARE_LENGTH * slots
    )  # fmt: skip
    header = text + 1024 * (MetricBlock.least() + text) + members * (Offer.least() + Certification.least() + 2 * text + 1)
    longest = ReleaseRequest.least() + header + members * Approval.least() + limits.clients * client
    if longest > LONGEST:
        raise Refused(
            f"{limits.clients} clients with {limits.neighbours} neighbours make messages of {longest} bytes; at most {LONGEST}"
        )
    return longest


def endpoint_of(address: str, *, least: int = 1) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host is in brackets there, and without here. ``least`` is the lowest port allowed.

    Raises:
        Refused: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not least <= int(port) < 65536:
        raise Refused(f"an address is HOST:PORT with a port from {least} to 65535, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def one_line(text: str) -> str:
    """Printable, and no second line: for a log or a terminal that shows what another party wrote."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
