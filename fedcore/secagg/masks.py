"""Vectors modulo 2^b: masks expanded from seeds in place, and the packed form that travels.

A vector is held in words: uint16 for b = 16, uint32 for b in {20, 24, 32}; 2^b divides the words' modulus, so sums are reduced
once, at the end. PRG(seed) is the AES-256-CTR keystream with a zero counter block, read as little-endian words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedcore.errors import Refused

__all__ = ["WIDTHS", "Words", "add_masks", "add_packed", "pack", "packed_length", "reduce", "subtract_masks", "word_type", "zeros"]

Words = npt.NDArray[np.unsignedinteger[Any]]
WIDTHS = (16, 20, 24, 32)
_BLOCK = 1 << 16  # bytes: expanded and added while it is in the core's cache
_ZEROS = bytes(_BLOCK)
_STREAMS = 256  # ciphers open at a time


def word_type(bits: int) -> np.dtype[Any]:
    """The little-endian word that holds a coordinate of ``bits`` bits."""
    return np.dtype("<u2" if bits == 16 else "<u4")


def zeros(length: int, bits: int) -> Words:
    """A vector [length] of zeros in words."""
    return np.zeros(length, word_type(bits))


def add_masks(vector: Words, seeds: Sequence[bytes]) -> None:
    """Add PRG(seed) of each seed to ``vector``, in place."""
    _expand_into(vector, seeds, np.add)


def subtract_masks(vector: Words, seeds: Sequence[bytes]) -> None:
    """Subtract PRG(seed) of each seed from ``vector``, in place."""
    _expand_into(vector, seeds, np.subtract)


def reduce(vector: Words, bits: int) -> None:
    """Reduce words modulo 2^b, in place."""
    if bits < 8 * vector.itemsize:
        np.bitwise_and(vector, vector.dtype.type((1 << bits) - 1), out=vector)


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed vector [length]."""
    return -(-length * bits // 8)


def pack(vector: Words, bits: int) -> bytes:
    """Words below 2^b as a little-endian bit string: value i takes the bits from ``i b``, the last byte is filled with zeros."""
    if bits in {16, 32}:
        return vector.tobytes()
    if bits == 24:
        return vector.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    pairs = np.zeros(-(-len(vector) // 2), "<u8")
    pairs |= vector[::2]
    pairs[: len(vector) // 2] |= vector[1::2].astype("<u8") << np.uint64(20)
    return pairs.view(np.uint8).reshape(-1, 8)[:, :5].tobytes()[: packed_length(len(vector), bits)]


def add_packed(total: Words, packed: bytes | memoryview, bits: int) -> None:
    """Add a packed vector to ``total`` [length] in words, in place.

    Raises:
        Refused: another length, or bits set behind the last value.
    """
    if len(packed) != packed_length(len(total), bits):
        raise Refused(f"a vector of {len(total)} values has {packed_length(len(total), bits)} bytes, got {len(packed)}")
    if bits in {16, 32}:
        np.add(total, np.frombuffer(packed, total.dtype), out=total)
    elif bits == 24:
        columns = np.zeros((len(total), 4), np.uint8)
        columns[:, :3] = np.frombuffer(packed, np.uint8).reshape(-1, 3)
        np.add(total, columns.reshape(-1).view("<u4"), out=total)
    else:
        _add_pairs(total, packed)


def _add_pairs(total: Words, packed: bytes | memoryview) -> None:
    """Two values of 20 bits take 5 bytes; an odd last one leaves 4 bits over."""
    whole = len(total) // 2
    columns = np.zeros((whole, 8), np.uint8)
    columns[:, :5] = np.frombuffer(packed, np.uint8, 5 * whole).reshape(-1, 5)
    words = columns.reshape(-1).view("<u8")
    last = int.from_bytes(packed[5 * whole :], "little")
    if last >> 20:
        raise Refused("a packed vector has bits set behind its last value")
    total[: 2 * whole : 2] += (words & np.uint64(0xFFFFF)).astype("<u4")
    total[1 : 2 * whole : 2] += (words >> np.uint64(20)).astype("<u4")
    if len(total) % 2:
        total[-1:] += np.uint32(last)


def _expand_into(vector: Words, seeds: Sequence[bytes], operation: np.ufunc) -> None:
    """All masks of one block before the next block, so that the block of the vector stays in the cache too."""
    buffer = bytearray(_BLOCK)
    words = np.frombuffer(buffer, vector.dtype)
    for start in range(0, len(seeds), _STREAMS):
        streams = [Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor() for seed in seeds[start : start + _STREAMS]]
        for first in range(0, len(vector), len(words)):
            part = vector[first : first + len(words)]
            blank, mask = memoryview(_ZEROS)[: part.nbytes], words[: len(part)]
            for stream in streams:
                stream.update_into(blank, buffer)
                operation(part, mask, out=part)
