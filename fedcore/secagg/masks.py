"""Vectors modulo 2^b: masks expanded from seeds in place, and the packed form that travels.

A vector is held in words: uint16 for b = 16, uint32 for b in {20, 24, 32}; 2^b divides the words' modulus, so sums are reduced
once, at the end. PRG(seed) is the AES-256-CTR keystream with a zero counter block, read as little-endian words.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher, CipherContext, algorithms, modes

from fedcore.errors import Refused

__all__ = ["WIDTHS", "Words", "add_masks", "add_packed", "pack", "packed_length", "reduce", "subtract_masks", "word_type", "zeros"]

Words = npt.NDArray[np.unsignedinteger[Any]]
WIDTHS = (16, 20, 24, 32)
_BLOCK = 1 << 17  # bytes: expanded and added while it is in the core's cache
_ZEROS = bytes(_BLOCK)
_STREAMS = 256  # ciphers open at a time
_GCM_STARTS = 32  # bytes of the keystream before those of GCM


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
    head = _GCM_STARTS // vector.itemsize if vector.nbytes > _BLOCK and _gcm_is_faster() else len(vector)
    for start in range(0, len(seeds), _STREAMS):
        some = seeds[start : start + _STREAMS]
        _run([_ctr(seed) for seed in some], vector, 0, head, operation)
        if head < len(vector):
            _run([_gcm(seed) for seed in some], vector, head, len(vector), operation)


def _run(
    streams: Sequence[AEADEncryptionContext | CipherContext], vector: Words, begin: int, end: int, operation: np.ufunc
) -> None:
    """The next keystream of every stream into ``vector[begin:end]``; blocks end where they would if ``begin`` were 0."""
    buffer = bytearray(_BLOCK)
    words = np.frombuffer(buffer, vector.dtype)
    for first in range(0, end, len(words)):
        part = vector[max(first, begin) : min(first + len(words), end)]
        blank, mask = memoryview(_ZEROS)[: part.nbytes], words[: len(part)]
        for stream in streams:
            stream.update_into(blank, buffer)
            operation(part, mask, out=part)


def _ctr(seed: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()


def _gcm(seed: bytes) -> AEADEncryptionContext:
    """The keystream of `_ctr` from its byte `_GCM_STARTS` on, up to 2^32 blocks.

    GCM encrypts in counter mode, from counter block 2 if the nonce is zero (SP 800-38D, 7.1). Its tag is not wanted here: what
    is, is that OpenSSL has faster code for it than for counter mode alone, on processors with vector AES.
    """
    return Cipher(algorithms.AES256(seed), modes.GCM(bytes(12))).encryptor()


@functools.cache
def _gcm_is_faster() -> bool:
    """Whether this processor expands masks faster by `_gcm`; a millisecond's trial. Only the speed depends on the answer."""
    buffer = bytearray(_BLOCK)
    seconds = []
    for stream in (_gcm(bytes(32)), _ctr(bytes(32))):
        stream.update_into(_ZEROS, buffer)
        seconds.append(min(timeit.repeat(lambda: stream.update_into(_ZEROS, buffer), number=1, repeat=10)))  # noqa: B023 - used at once
    return seconds[0] < seconds[1]
