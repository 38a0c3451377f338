"""Slow twins: each primitive written out from its standard, in the plainest way. No test lives here."""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def hkdf_extract(salt: bytes, ikm: bytes) -> bytes:
    """RFC 5869, section 2.2."""
    return hmac.digest(salt or bytes(32), ikm, "sha256")


def hkdf_expand(prk: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3."""
    output, block = b"", b""
    while len(output) < length:
        block = hmac.digest(prk, block + info + bytes([len(output) // 32 + 1]), "sha256")
        output += block
    return output[:length]


def aes_ctr_words(key: bytes, count: int, size: int) -> list[int]:
    """AES-256 of the big-endian block counter from 0, read as ``count`` little-endian words of ``size`` bytes (SP 800-38A, 6.5)."""
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    stream = b"".join(ecb.update(counter.to_bytes(16, "big")) for counter in range(-(-count * size // 16)))
    return [int.from_bytes(stream[at : at + size], "little") for at in range(0, count * size, size)]


def merkle_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, over leaf contents."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:k]) + merkle_root(leaves[k:])).digest()


def merkle_path(leaves: list[bytes], m: int) -> list[bytes]:
    """RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if m < k:
        return [*merkle_path(leaves[:k], m), merkle_root(leaves[k:])]
    return [*merkle_path(leaves[k:], m - k), merkle_root(leaves[:k])]


def hpke_seal(public: bytes, info: bytes, aad: bytes, plaintext: bytes, ephemeral: bytes, aead: int = 2) -> bytes:
    """RFC 9180 base mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-GCM (``aead`` 1: 128 bits, 2: 256 bits)."""
    secret = X25519PrivateKey.from_private_bytes(ephemeral)
    encapsulated = secret.public_key().public_bytes_raw()
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01" + aead.to_bytes(2, "big")

    def extract(of: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + of + label + ikm)

    def expand(of: bytes, prk: bytes, label: bytes, context: bytes, length: int) -> bytes:
        return hkdf_expand(prk, length.to_bytes(2, "big") + b"HPKE-v1" + of + label + context, length)

    eae = extract(kem, b"", b"eae_prk", secret.exchange(X25519PublicKey.from_public_bytes(public)))
    shared = expand(kem, eae, b"shared_secret", encapsulated + public, 32)
    context = b"\x00" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    schedule = extract(suite, shared, b"secret", b"")
    key = expand(suite, schedule, b"key", context, 16 * aead)
    return encapsulated + AESGCM(key).encrypt(expand(suite, schedule, b"base_nonce", context, 12), plaintext, aad)


def shamir_at_zero(shares: dict[int, int], prime: int) -> int:
    """Lagrange interpolation at 0, term by term."""
    total = 0
    for a, value in shares.items():
        term = value
        for other in shares:
            if other != a:
                term = term * -other * pow(a - other, prime - 2, prime) % prime
        total += term
    return total % prime


def packed_bits(values: list[int], bits: int) -> bytes:
    """Little-endian bit string, value i from bit ``i * bits``."""
    whole = sum(value << (bits * i) for i, value in enumerate(values))
    return whole.to_bytes(-(-len(values) * bits // 8), "little")
