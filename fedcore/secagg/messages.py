"""Every message of the protocol. Clients are named by their index in the cohort, members by their point 1..m.

Signatures cover a domain tag and the message's `content`; the tag stands in the constant beside the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.secagg.crypto import KEY_LENGTHS, digest
from fedcore.secagg.encoding import F64, TEXT, U8, U16, U32, U64, Message, array, blob, coded, fixed, nested, sequence
from fedcore.secagg.shamir import SHARE_LENGTH

__all__ = [
    "APPROVAL", "CERTIFICATE", "CERTIFICATION", "CHECK_IN", "LARGEST_COHORT", "OFFER", "RELEASE", "SCREENING", "STATEMENT",
    "TRUST", "Approval", "Certificate", "Certification", "CertifyRequest", "CheckIn", "DealerShares", "Deposit", "Entry",
    "Header", "Invitation", "Link", "MetricBlock", "Offer", "OfferRequest", "Plan", "Proposal", "Refusal", "Release",
    "ReleaseRequest", "ScreenRequest", "Screening", "Statement", "Survivor", "Survivors", "TrustBundle", "UploadHead",
]  # fmt: skip

LARGEST_COHORT = 1 << 16
_MEMBERS = 255
_HASH = fixed(32)
_KEY = fixed(32)
_SIGNATURE = fixed(64)

# Domain tags of signatures.
TRUST, CERTIFICATE, CHECK_IN, OFFER, APPROVAL = "trust bundle", "certificate", "client check-in", "offer", "plan"
STATEMENT, SCREENING, CERTIFICATION, RELEASE = "upload", "screening", "survivors", "release"

_IDENTITY_KEY = blob(max(KEY_LENGTHS.values()))


@dataclass(frozen=True, slots=True)
class TrustBundle(Message):
    """What a device pins at enrolment, signed offline: the committee's keys (member a's is the a-th), t, c, and who enrols."""

    TAG: ClassVar[int] = 1
    population: str = coded(TEXT)
    enrolment_key: bytes = coded(_KEY)
    threshold: int = coded(U8)
    corrupt_members: int = coded(U8)
    member_keys: tuple[bytes, ...] = coded(array(32, _MEMBERS))
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class Certificate(Message):
    """The enrolment key's word that an identity belongs to a population until ``not_after`` (Unix seconds)."""

    TAG: ClassVar[int] = 2
    population: str = coded(TEXT)
    algorithm: int = coded(U8)
    public_key: bytes = coded(_IDENTITY_KEY)
    not_after: int = coded(U64)
    signature: bytes = coded(_SIGNATURE)

    @property
    def name(self) -> str:
        """How reports and errors name the identity: the start of a hash of its key."""
        return digest("identity", bytes([self.algorithm]), self.public_key)[:8].hex()


@dataclass(frozen=True, slots=True)
class CheckIn(Message):
    """A client's fresh X25519 key for one plan of a task's epoch, signed by its identity, valid until ``expiry``."""

    TAG: ClassVar[int] = 3
    certificate: Certificate = coded(nested(Certificate))
    task: str = coded(TEXT)
    epoch: int = coded(U64)
    expiry: int = coded(U64)
    key: bytes = coded(_KEY)
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class Entry(Message):
    """A leaf of the cohort's tree."""

    TAG: ClassVar[int] = 4
    index: int = coded(U32)
    check_in: CheckIn = coded(nested(CheckIn))


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """A member's readiness for one round: a fresh HPKE key, and H(rho) for its part of the seed."""

    TAG: ClassVar[int] = 5
    member: int = coded(U8)
    task: str = coded(TEXT)
    round: int = coded(U64)
    epoch: int = coded(U64)
    expiry: int = coded(U64)
    box_key: bytes = coded(_KEY)
    commitment: bytes = coded(_HASH)
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class MetricBlock(Message):
    """A named run of coordinates; the blocks are, in order, the last coordinates of the vector."""

    TAG: ClassVar[int] = 6
    name: str = coded(TEXT)
    count: int = coded(U32)


@dataclass(frozen=True, slots=True)
class Header(Message):
    """A round's public numbers: n, k, D, m, t, c, C, n_min, b, d, clip, z, g, the norm bound in units of g, and the rest.

    ``planned`` clients, n or more, are those for whom width and noise were planned before anyone checked in.
    ``noise_multiplier`` 0 is a round without noise; its ``squared_norm_bound`` is 0 and g is the quantization step.
    """

    TAG: ClassVar[int] = 7
    task: str = coded(TEXT)
    round: int = coded(U64)
    epoch: int = coded(U64)
    expiry: int = coded(U64)
    clients: int = coded(U32)
    planned: int = coded(U32)
    degree: int = coded(U32)
    window_survivors: int = coded(U32)
    members: int = coded(U8)
    threshold: int = coded(U8)
    corrupt_members: int = coded(U8)
    corrupt_clients: int = coded(U32)
    minimum_survivors: int = coded(U32)
    bits: int = coded(U8)
    dimension: int = coded(U32)
    clipping_norm: float = coded(F64)
    noise_multiplier: float = coded(F64)
    granularity: float = coded(F64)
    squared_norm_bound: int = coded(U64)
    layout: tuple[MetricBlock, ...] = coded(sequence(nested(MetricBlock), 1024))
    suite: int = coded(U16)
    model_hash: bytes = coded(_HASH)
    offers: tuple[Offer, ...] = coded(sequence(nested(Offer), _MEMBERS))
    signers: tuple[int, ...] = coded(sequence(U8, _MEMBERS))

    @property
    def length(self) -> int:
        """Coordinates of the masked vector: d, or with noise the power of two at or above it (its rotation needs one)."""
        return 1 << (self.dimension - 1).bit_length() if self.noise_multiplier else self.dimension

    @property
    def points(self) -> tuple[int, ...]:
        """The members that made an offer: the order of boxes, roots and shares."""
        return tuple(offer.member for offer in self.offers)


@dataclass(frozen=True, slots=True)
class Approval(Message):
    """A signer's signature on the plan, with its part of the seed."""

    TAG: ClassVar[int] = 8
    member: int = coded(U8)
    plan_hash: bytes = coded(_HASH)
    reveal: bytes = coded(fixed(32))
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class Plan(Message):
    """What everybody acts on: header, root of the cohort, and the approvals of all of S in its order."""

    TAG: ClassVar[int] = 9
    header: Header = coded(nested(Header))
    root: bytes = coded(_HASH)
    approvals: tuple[Approval, ...] = coded(sequence(nested(Approval), _MEMBERS))


@dataclass(frozen=True, slots=True)
class Proposal(Message):
    """To each member of S: the header and all check-ins, by index."""

    TAG: ClassVar[int] = 10
    header: Header = coded(nested(Header))
    check_ins: tuple[CheckIn, ...] = coded(sequence(nested(CheckIn), LARGEST_COHORT))


@dataclass(frozen=True, slots=True)
class Link(Message):
    """An entry, as the bytes that the tree is over, with its path to the root."""

    TAG: ClassVar[int] = 11
    entry: bytes = coded(blob(1024))
    path: tuple[bytes, ...] = coded(array(32, 32))


@dataclass(frozen=True, slots=True)
class Invitation(Message):
    """To one client: the plan, its own entry, and its neighbours' in ascending order."""

    TAG: ClassVar[int] = 12
    plan: Plan = coded(nested(Plan))
    own: Link = coded(nested(Link))
    neighbours: tuple[Link, ...] = coded(sequence(nested(Link), LARGEST_COHORT))


@dataclass(frozen=True, slots=True)
class Statement(Message):
    """What a client signs about its upload: one box hash and share-tree root for each offer, one commitment for each slot.

    Slot 0 is its own mask b_i, slot 1 + r the mask with its r-th neighbour.
    """

    TAG: ClassVar[int] = 13
    plan_hash: bytes = coded(_HASH)
    index: int = coded(U32)
    vector_hash: bytes = coded(_HASH)
    box_hashes: tuple[bytes, ...] = coded(array(32, _MEMBERS))
    roots: tuple[bytes, ...] = coded(array(32, _MEMBERS))
    commitments: tuple[bytes, ...] = coded(array(32, LARGEST_COHORT))
    signature: bytes = coded(_SIGNATURE)

    @property
    def hash(self) -> bytes:
        """How the survivors' list names this statement."""
        return digest("statement", self.encode())


@dataclass(frozen=True, slots=True)
class UploadHead(Message):
    """An upload without its vector."""

    TAG: ClassVar[int] = 14
    statement: Statement = coded(nested(Statement))
    boxes: tuple[bytes, ...] = coded(sequence(blob(1 << 22), _MEMBERS))


@dataclass(frozen=True, slots=True)
class Deposit(Message):
    """To one member: who a client is, what it signed, and the box for this member."""

    TAG: ClassVar[int] = 15
    link: Link = coded(nested(Link))
    statement: Statement = coded(nested(Statement))
    box: bytes = coded(blob(1 << 22))


@dataclass(frozen=True, slots=True)
class ScreenRequest(Message):
    """Which of these uploads would you refuse?"""

    TAG: ClassVar[int] = 16
    plan: Plan = coded(nested(Plan))
    deposits: tuple[Deposit, ...] = coded(sequence(nested(Deposit), LARGEST_COHORT))


@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """A client whose box a member cannot use, and why."""

    TAG: ClassVar[int] = 17
    index: int = coded(U32)
    reason: str = coded(TEXT)


@dataclass(frozen=True, slots=True)
class Screening(Message):
    """A member's answer to a `ScreenRequest`; ``examined`` is the hash of the survivors' list with all clients it saw."""

    TAG: ClassVar[int] = 18
    member: int = coded(U8)
    plan_hash: bytes = coded(_HASH)
    examined: bytes = coded(_HASH)
    refused: tuple[Refusal, ...] = coded(sequence(nested(Refusal), LARGEST_COHORT))
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class Survivor(Message):
    """A client of U and the statement that counts for it."""

    TAG: ClassVar[int] = 19
    index: int = coded(U32)
    statement_hash: bytes = coded(_HASH)


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """U, in ascending order of the index."""

    TAG: ClassVar[int] = 20
    clients: tuple[Survivor, ...] = coded(sequence(nested(Survivor), LARGEST_COHORT))

    @property
    def hash(self) -> bytes:
        """H(U), which members record and sign."""
        return digest("survivors", self.encode())


@dataclass(frozen=True, slots=True)
class CertifyRequest(Message):
    """Sign this U."""

    TAG: ClassVar[int] = 21
    plan: Plan = coded(nested(Plan))
    survivors: Survivors = coded(nested(Survivors))


@dataclass(frozen=True, slots=True)
class Certification(Message):
    """A member's only signature on a U in this round."""

    TAG: ClassVar[int] = 22
    member: int = coded(U8)
    task: str = coded(TEXT)
    round: int = coded(U64)
    plan_hash: bytes = coded(_HASH)
    survivors_hash: bytes = coded(_HASH)
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class ReleaseRequest(Message):
    """U with t certifications, and the deposits of all of U in its order."""

    TAG: ClassVar[int] = 23
    plan: Plan = coded(nested(Plan))
    survivors: Survivors = coded(nested(Survivors))
    certifications: tuple[Certification, ...] = coded(sequence(nested(Certification), _MEMBERS))
    deposits: tuple[Deposit, ...] = coded(sequence(nested(Deposit), LARGEST_COHORT))


@dataclass(frozen=True, slots=True)
class DealerShares(Message):
    """What one client of U dealt to the member: all leaf hashes, and the shares of slot 0 and of the slots of dropped clients."""

    TAG: ClassVar[int] = 24
    index: int = coded(U32)
    leaves: tuple[bytes, ...] = coded(array(32, LARGEST_COHORT))
    shares: tuple[bytes, ...] = coded(array(SHARE_LENGTH, LARGEST_COHORT))


@dataclass(frozen=True, slots=True)
class Release(Message):
    """A member's only answer to a `ReleaseRequest` of this round; U is ``dealers`` and ``refused`` together."""

    TAG: ClassVar[int] = 25
    member: int = coded(U8)
    plan_hash: bytes = coded(_HASH)
    survivors_hash: bytes = coded(_HASH)
    dealers: tuple[DealerShares, ...] = coded(sequence(nested(DealerShares), LARGEST_COHORT))
    refused: tuple[Refusal, ...] = coded(sequence(nested(Refusal), LARGEST_COHORT))
    signature: bytes = coded(_SIGNATURE)


@dataclass(frozen=True, slots=True)
class OfferRequest(Message):
    """To a member: take part in this round, which ends at ``expiry``."""

    TAG: ClassVar[int] = 26
    task: str = coded(TEXT)
    round: int = coded(U64)
    epoch: int = coded(U64)
    expiry: int = coded(U64)
