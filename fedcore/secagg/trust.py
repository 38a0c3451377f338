"""Who takes part: certificates from the enrolment key, the pinned committee, and check-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg.crypto import ED25519, KEY_LENGTHS, Signer, agree, verify
from fedcore.secagg.messages import CERTIFICATE, CHECK_IN, OFFER, TRUST, Certificate, CheckIn, Header, Offer, TrustBundle

__all__ = [
    "about", "blaming", "check_check_in", "check_cohort", "check_offer", "check_trust", "issue_certificate",
    "member_key", "sign_trust",
]  # fmt: skip

_PROBE = X25519PrivateKey.from_private_bytes(b"\x40" * 32)  # no secret: any scalar shows a point of small order


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Say what a refusal inside is about."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{what}: {error}") from None


@contextlib.contextmanager
def blaming(party: str) -> Iterator[None]:
    """Name ``party`` as the sender of whatever is refused inside."""
    try:
        yield
    except Misbehaviour:
        raise
    except Refused as error:
        raise Misbehaviour(party, str(error)) from None


def sign_trust(
    root: Signer, population: str, enrolment_key: bytes, threshold: int, corrupt: int, member_keys: Sequence[bytes]
) -> TrustBundle:  # fmt: skip
    """A trust bundle, signed with the Ed25519 key that devices know beforehand.

    Raises:
        Refused: a population without a name, or a committee that `check_trust` refuses.
    """
    if not 1 <= len(population.encode()) <= 64:
        raise Refused(f"a population has a name of 1 to 64 bytes, got {population!r}")
    _check_committee(member_keys, threshold, corrupt)
    _check_roles(root.public, enrolment_key, member_keys)
    parts = (population, enrolment_key, threshold, corrupt, tuple(member_keys))
    return TrustBundle(*parts, root.sign(TRUST, TrustBundle(*parts, bytes(64)).content()))


def check_trust(trust: TrustBundle, root_key: bytes) -> None:
    """Check a trust bundle against the Ed25519 key that signs them offline.

    Raises:
        Refused: another signature, or a committee whose threshold does not suffice: 0 <= c < t <= m, 2 t > m + c.
    """
    verify(ED25519, root_key, trust.signature, TRUST, trust.content())
    _check_committee(trust.member_keys, trust.threshold, trust.corrupt_members)
    _check_roles(root_key, trust.enrolment_key, trust.member_keys)


def _check_committee(keys: Sequence[bytes], t: int, c: int) -> None:
    m = len(keys)
    if not (0 <= c < t <= m <= 255 and 2 * t > m + c):
        raise Refused(f"a committee of m={m}, t={t}, c={c} is not safe: it takes 0 <= c < t <= m <= 255 and 2 t > m + c")
    if len(set(keys)) != m:
        raise Refused("two members of the committee have one key")


def _check_roles(root: bytes, enrolment: bytes, members: Sequence[bytes]) -> None:
    if root == enrolment:
        raise Refused("the key that signs trust bundles must not enrol clients: use another enrolment key")
    if root in members or enrolment in members:
        raise Refused("a member's key is the one that signs trust bundles or enrols clients: every role has a key of its own")


def issue_certificate(enrolment: Signer, population: str, algorithm: int, public_key: bytes, not_after: int) -> Certificate:
    """The enrolment key's certificate for an identity, good until ``not_after`` (Unix seconds).

    Raises:
        Refused: the identity is the enrolment key itself.
    """
    if public_key == enrolment.public:
        raise Refused("a client's identity is a key of its own, not the key that enrols")
    parts = (population, algorithm, public_key, not_after)
    return Certificate(*parts, enrolment.sign(CERTIFICATE, Certificate(*parts, bytes(64)).content()))


def check_check_in(check_in: CheckIn, trust: TrustBundle, task: str, epoch: int, until: int) -> None:
    """Check a client's check-in for a round of this task and epoch that ends at ``until`` (Unix seconds).

    Raises:
        Refused: an identity that is not enrolled, a signature that is not its own, another task or epoch, a key that expires
            before the round or is of small order.
    """
    certificate = check_in.certificate
    with about(f"identity {certificate.name}"):
        if certificate.population != trust.population:
            raise Refused(f"it is enrolled in {certificate.population!r}, not in {trust.population!r}")
        if KEY_LENGTHS.get(certificate.algorithm) != len(certificate.public_key):
            raise Refused(f"algorithm {certificate.algorithm} with a key of {len(certificate.public_key)} bytes is unknown")
        if min(certificate.not_after, check_in.expiry) < until:
            raise Refused("its certificate or its key expires before the round does")
        if (check_in.task, check_in.epoch) != (task, epoch):
            raise Refused(f"it checked in for epoch {check_in.epoch} of {check_in.task!r}, not for epoch {epoch} of {task!r}")
        verify(ED25519, trust.enrolment_key, certificate.signature, CERTIFICATE, certificate.content())
        verify(certificate.algorithm, certificate.public_key, check_in.signature, CHECK_IN, check_in.content())
        agree(_PROBE, check_in.key)


def check_cohort(check_ins: Sequence[CheckIn], header: Header, trust: TrustBundle) -> None:
    """Check all check-ins of a round: as many as it has clients, each one good, no identity and no key twice.

    Raises:
        Refused: one is not.
    """
    if len(check_ins) != header.clients:
        raise Refused(f"the header is for {header.clients} clients, the cohort has {len(check_ins)}")
    identities: dict[bytes, int] = {}
    keys: dict[bytes, int] = {}
    for index, check_in in enumerate(check_ins):
        with about(f"client {index}"):
            check_check_in(check_in, trust, header.task, header.epoch, header.expiry)
            for seen, value, what in (
                (identities, check_in.certificate.public_key, "identity"),
                (keys, check_in.key, "key"),
            ):
                if (earlier := seen.setdefault(value, index)) != index:
                    raise Refused(f"it has the {what} of client {earlier}")


def member_key(trust: TrustBundle, member: int) -> bytes:
    """The pinned key of member 1..m.

    Raises:
        Refused: the committee has no such member.
    """
    if not 1 <= member <= len(trust.member_keys):
        raise Refused(f"there is no member {member}; the committee has members 1 to {len(trust.member_keys)}")
    return trust.member_keys[member - 1]


def check_offer(offer: Offer, trust: TrustBundle, member: int) -> None:
    """Check a member's signature on its offer.

    Raises:
        Refused: there is no such member, or the signature is not its own.
    """
    if offer.member != member:
        raise Refused(f"the offer is from member {offer.member}, not {member}")
    with about(f"the offer of member {member}"):
        verify(ED25519, member_key(trust, member), offer.signature, OFFER, offer.content())
        agree(_PROBE, offer.box_key)
