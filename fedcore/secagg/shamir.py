"""Shamir's secret sharing (1979) of 32-byte secrets over the field of the prime 2^257 - 93."""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes

__all__ = ["PRIME", "SHARE_LENGTH", "combine", "is_share", "lagrange_at_zero", "split"]

PRIME = 2**257 - 93
SHARE_LENGTH = 33
_SECRETS = 1 << 256


def split(secrets: Sequence[bytes], threshold: int, points: Sequence[int], random: RandomBytes) -> list[list[bytes]]:
    """Shares of every secret (32 bytes, big-endian) for each point: one list [secrets] of 33 bytes a point.

    Any ``threshold`` of a secret's shares determine it, fewer are independent of it. Points lie in 1..255.
    """
    shares: list[list[bytes]] = [[] for _ in points]
    for secret in secrets:
        coefficients = [_field_element(random) for _ in range(threshold - 1)]
        constant = int.from_bytes(secret, "big")
        for point, column in zip(points, shares, strict=True):
            value = 0
            for coefficient in coefficients:
                value = (value + coefficient) * point
            column.append(((value + constant) % PRIME).to_bytes(SHARE_LENGTH, "big"))
    return shares


def lagrange_at_zero(points: Sequence[int]) -> list[int]:
    """Coefficients c with ``f(0) = sum c_a f(a)`` mod p for every polynomial f of degree below the number of points."""
    coefficients = []
    for a in points:
        above = below = 1
        for other in points:
            if other != a:
                above, below = above * -other % PRIME, below * (a - other) % PRIME
        coefficients.append(above * pow(below, -1, PRIME) % PRIME)
    return coefficients


def combine(coefficients: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret from as many shares as it was split with the threshold for, in the order of `lagrange_at_zero`.

    Raises:
        Refused: the shares are not those of a 32-byte secret.
    """
    pairs = zip(coefficients, shares, strict=True)
    value = sum(coefficient * int.from_bytes(share, "big") for coefficient, share in pairs) % PRIME
    if value >= _SECRETS:
        raise Refused("the shares do not determine a secret of 32 bytes")
    return value.to_bytes(32, "big")


def is_share(share: bytes) -> bool:
    """Whether ``share`` is 33 bytes that encode an element of the field."""
    return len(share) == SHARE_LENGTH and int.from_bytes(share, "big") < PRIME


def _field_element(random: RandomBytes) -> int:
    """Uniform: 257 random bits, drawn again in the 93 of 2^257 cases that lie beyond the field."""
    while True:
        value = int.from_bytes(random(SHARE_LENGTH), "big") >> 7
        if value < PRIME:
            return value
