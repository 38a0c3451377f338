"""Primitives of the protocol: hashing by domain, signatures, key agreement, boxes. All of them come from `cryptography`.

Suite 1: SHA-256, Ed25519 or ECDSA P-256 signatures, X25519 with HKDF-SHA256, HPKE base mode (RFC 9180) with DHKEM(X25519,
HKDF-SHA256), HKDF-SHA256 and AES-256-GCM. No post-quantum claim is made.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.errors import Refused

__all__ = [
    "BOX_OVERHEAD", "ED25519", "KEY_LENGTHS", "P256", "SUITE", "EcdsaKey", "Ed25519Key", "Signer", "agree", "digest", "domain",
    "open_box", "pair_seed", "seal_box", "verify",
]  # fmt: skip

SUITE = 1
ED25519, P256 = 1, 2
KEY_LENGTHS = {ED25519: 32, P256: 33}  # P-256 keys are compressed points (X9.62)
BOX_OVERHEAD = 48  # an encapsulated key of 32 bytes before, a tag of 16 behind
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PREFIX = b"fedcore secagg 1 "


def domain(name: str) -> bytes:
    """The tag that begins whatever is hashed, signed or derived for one purpose; no tag is the start of another."""
    return _PREFIX + name.encode("ascii") + b"\0"


def digest(purpose: str, *parts: bytes) -> bytes:
    """SHA-256 over the purpose's domain tag and the parts.

    Parts before the last have one length, or tell it themselves, so that no two lists of parts run together.
    """
    hasher = hashlib.sha256(domain(purpose))
    for part in parts:
        hasher.update(part)
    return hasher.digest()


class Signer(Protocol):
    """A long-term signature key, wherever it is held (a phone's keystore keeps the private half)."""

    algorithm: int
    public: bytes

    def sign(self, purpose: str, content: bytes) -> bytes:
        """64 bytes over the purpose's domain tag and the content."""
        ...


class Ed25519Key:
    """An Ed25519 key (RFC 8032) from its 32-byte seed."""

    algorithm = ED25519

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    def sign(self, purpose: str, content: bytes) -> bytes:
        """See `Signer`."""
        return self._key.sign(domain(purpose) + content)


class EcdsaKey:
    """An ECDSA P-256 key with SHA-256, nonces by RFC 6979; signatures are r and s, 32 bytes each, big-endian."""

    algorithm = P256

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        if not isinstance(key.curve, ec.SECP256R1):
            raise Refused(f"an ECDSA identity is a key on P-256, got one on {key.curve.name}")
        self._key = key
        numbers = key.public_key().public_numbers()
        self.public = bytes([2 + numbers.y % 2]) + numbers.x.to_bytes(32, "big")

    def sign(self, purpose: str, content: bytes) -> bytes:
        """See `Signer`."""
        scheme = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        r, s = decode_dss_signature(self._key.sign(domain(purpose) + content, scheme))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def verify(algorithm: int, public: bytes, signature: bytes, purpose: str, content: bytes) -> None:
    """Check a signature made by a `Signer`.

    Raises:
        Refused: the signature is not that key's over this content, the key is none, or the algorithm is unknown.
    """
    message = domain(purpose) + content
    try:
        if algorithm == ED25519:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        elif algorithm == P256 and len(signature) == 64:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public)
            pair = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            point.verify(encode_dss_signature(*pair), message, ec.ECDSA(hashes.SHA256()))
        else:
            raise ValueError
    except (InvalidSignature, ValueError):
        raise Refused(f"the signature ({purpose}) is not valid") from None


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """X25519 (RFC 7748), 32 bytes.

    Raises:
        Refused: the result is all zero, as it is for every public key of small order.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused("a key of small order: the X25519 exchange is all zero") from None


def pair_seed(shared: bytes, plan_hash: bytes, i: int, j: int) -> bytes:
    """The 32-byte mask seed of clients i and j: HKDF-SHA256 without salt, info = domain | plan hash | lower | higher index."""
    low, high = sorted((i, j))
    info = domain("pair seed") + plan_hash + low.to_bytes(4, "big") + high.to_bytes(4, "big")
    return HKDF(hashes.SHA256(), 32, None, info).derive(shared)


def seal_box(public: bytes, plan_hash: bytes, client: int, member: int, content: bytes) -> bytes:
    """HPKE single-shot encryption to a member's key of this round: encapsulated key, ciphertext, tag.

    What the box is bound to (plan hash, client, member) goes into HPKE's ``info``: `cryptography` offers no associated data
    there, and the key schedule binds ``info`` as strongly.
    """
    return _HPKE.encrypt(content, X25519PublicKey.from_public_bytes(public), info=_box_info(plan_hash, client, member))


def open_box(private: X25519PrivateKey, plan_hash: bytes, client: int, member: int, box: bytes) -> bytes:
    """Inverse of `seal_box`.

    Raises:
        Refused: the box is not one sealed for this key, plan, client and member.
    """
    try:
        return _HPKE.decrypt(box, private, info=_box_info(plan_hash, client, member))
    except (InvalidTag, ValueError):
        raise Refused("the box does not open") from None


def _box_info(plan_hash: bytes, client: int, member: int) -> bytes:
    return domain("box") + plan_hash + client.to_bytes(4, "big") + bytes([member])
