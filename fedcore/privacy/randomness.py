"""Where mechanisms take their random bytes from: the operating system on devices, a derived key in simulation.

Every mechanism that must run on a device reads bytes through one function type, so that the same code is secure with
`os.urandom` and repeatable with `keystream`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

__all__ = ["RandomBytes", "RootKey", "derive_key", "keystream"]

RandomBytes = Callable[[int], bytes]
_DOMAIN = b"fedcore derived key 1"


def derive_key(*parts: int | bytes | str) -> bytes:
    """A 32-byte key that is a function of the parts, their types and their order.

    SHA-256 over a domain tag and, for each part, a type tag, its length (8 bytes, little-endian) and its content (integers
    in decimal, text in UTF-8): no two lists of parts have the same encoding.

    Raises:
        TypeError: a part is of another type.
    """
    digest = hashlib.sha256(_DOMAIN)
    for part in parts:
        tag, content = _encoded(part)
        digest.update(tag + len(content).to_bytes(8, "little") + content)
    return digest.digest()


def keystream(key: bytes) -> RandomBytes:
    """Random bytes that depend on the key alone: the ChaCha20 keystream with a zero nonce, continued from call to call.

    For simulation, and for what must be public and equal everywhere. A key serves one purpose: derive another for the next.
    The stream ends after 256 GiB.

    Raises:
        ValueError: the key is not 32 bytes long.
    """
    if len(key) != 32:
        raise ValueError(f"a keystream takes a key of 32 bytes, got {len(key)}")
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda size: encryptor.update(bytes(size))


@dataclass(frozen=True)
class RootKey:
    """What all that protects the clients of a simulated run is derived from: noise, Poisson batches and secret coins.

    ``secret``: it comes from a key that stands in none of the run's files; else from the seed, which does.
    """

    secret: bool
    _parts: tuple[int | bytes | str, ...] = field(repr=False)

    @classmethod
    def of_seed(cls, seed: int, run: str = "") -> RootKey:
        """Repeats to the bit for whoever knows the seed; ``run`` keeps apart the noise of runs that share a ledger."""
        return cls(False, (seed, run))

    @classmethod
    def of_key(cls, key: bytes, run: str) -> RootKey:
        """Repeats for whoever holds the secret ``key``, in the run of the id ``run`` and in no other."""
        return cls(True, (key, run))

    def derive(self, purpose: str, *place: int) -> bytes:
        """The key (32 bytes) of one purpose at one place: a round, or a round and a client."""
        return derive_key(purpose, *self._parts, *place)

    @property
    def fingerprint(self) -> str:
        """What a checkpoint remembers a secret key by, salted with the run's id; empty where there is none."""
        return self.derive("fingerprint").hex() if self.secret else ""


def _encoded(part: int | bytes | str) -> tuple[bytes, bytes]:
    match part:
        case bool():
            raise TypeError("a key is derived from integers, bytes and text, not from a truth value")
        case int():
            return b"i", str(part).encode()
        case bytes():
            return b"b", part
        case str():
            return b"s", part.encode()
    raise TypeError(f"a key is derived from integers, bytes and text, not from {type(part).__name__}")
