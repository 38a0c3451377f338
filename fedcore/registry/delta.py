"""Deltas: the bytes of a file from those of another that the device holds. numpy and zstandard only.

A delta (little-endian): ``FCD1`` | codec, uint8 | first 8 bytes of the base's SHA-256 | bytes of the result, uint32 | payload.

- codec 1, ``difference``: the zstandard frame of result - base, byte by byte modulo 256; both have one length.
- codec 2, ``patch``: a zstandard frame with the base as raw dictionary (``zstd --patch-from``).
- codec 3, ``model``: two models in the wire format (`fedcore.quantization.wire`) with the same tensors; see `registry.planes`.

Every codec that applies is tried, and the smallest delta wins. Who applies one knows the result's hash from a signed place, and
takes the whole file where anything is wrong.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from fedcore.errors import Refused
from fedcore.registry.frames import compress, decompress
from fedcore.registry.planes import decode_planes, encode_planes

__all__ = ["CODECS", "Edge", "apply_delta", "make_delta", "route"]

MAGIC = b"FCD1"
CODECS = ("difference", "patch", "model")
_HEADER = struct.Struct("<4sB8sI")
_LONGEST = 1 << 31  # bytes of a file


@dataclass(frozen=True)
class Edge:
    """A delta that is offered: digests of base and result (SHA-256), and its bytes."""

    base: bytes
    result: bytes
    size: int


def make_delta(base: bytes, result: bytes, codecs: Sequence[str] = CODECS) -> bytes:
    """The smallest delta among ``codecs``; each one is applied before it counts.

    Raises:
        Refused: a file is longer than 2 GiB, or none of the codecs applies.
    """
    if max(len(base), len(result)) > _LONGEST:
        raise Refused(f"a delta is between files of at most {_LONGEST} bytes, got {len(base)} and {len(result)}")
    found = []
    for code, name in enumerate(CODECS, 1):
        if name in codecs and (payload := _ENCODE[name](base, result)) is not None:
            found.append(_HEADER.pack(MAGIC, code, hashlib.sha256(base).digest()[:8], len(result)) + payload)
    wanted = hashlib.sha256(result).digest()
    for delta in sorted(found, key=len):
        try:
            apply_delta(base, delta, wanted, len(result))
        except Refused:  # a file that only resembles a model in the wire format
            continue
        return delta
    raise Refused(f"none of the codecs {', '.join(codecs)} applies to these files")


def apply_delta(base: bytes, delta: bytes, digest: bytes, limit: int) -> bytes:
    """The file whose SHA-256 is ``digest``. Memory stays within a few times base, delta and ``limit``, the result's longest length.

    Raises:
        Refused: the delta is damaged, for another base, longer than allowed, or does not give that file.
    """
    if len(delta) < _HEADER.size or delta[:4] != MAGIC:
        raise Refused("not a fedcore delta: it does not begin with FCD1")
    _, code, start, length = _HEADER.unpack_from(delta)
    if not 1 <= code <= len(CODECS):
        raise Refused(f"a delta of codec {code}; known are 1 to {len(CODECS)}")
    if start != hashlib.sha256(base).digest()[:8]:
        raise Refused("the delta is for another file than the one that is there")
    if length > limit:
        raise Refused(f"the delta gives {length} bytes; at most {limit} are allowed")
    try:
        result = _DECODE[CODECS[code - 1]](base, delta[_HEADER.size :], length)
    except (zstandard.ZstdError, ValueError, IndexError, OverflowError, struct.error):
        raise Refused(f"damaged delta ({CODECS[code - 1]})") from None
    if len(result) != length or hashlib.sha256(result).digest() != digest:
        raise Refused("the delta does not give the file that was promised")
    return result


def route(held: Iterable[bytes], wanted: bytes, edges: Iterable[Edge], full: int) -> tuple[Edge, ...] | None:
    """The deltas from any file that is held to the wanted one with the fewest bytes; None where the whole file is no longer.

    Args:
        held: digests of the files on the device. wanted: the digest to reach.
        edges: the deltas that are offered. full: bytes of the whole file.
    """
    by_base: dict[bytes, list[Edge]] = {}
    for edge in edges:
        by_base.setdefault(edge.base, []).append(edge)
    waiting: list[tuple[int, int, bytes, tuple[Edge, ...]]] = [(0, n, digest, ()) for n, digest in enumerate(sorted(held))]
    heapq.heapify(waiting)
    count, done = len(waiting), set[bytes]()
    while waiting:
        cost, _, digest, path = heapq.heappop(waiting)
        if digest == wanted:
            return path
        if digest in done:
            continue
        done.add(digest)
        for edge in by_base.get(digest, ()):
            if cost + edge.size < full:
                count += 1
                heapq.heappush(waiting, (cost + edge.size, count, edge.result, (*path, edge)))
    return None


def _encode_difference(base: bytes, result: bytes) -> bytes | None:
    if len(base) != len(result):
        return None
    return compress((np.frombuffer(result, np.uint8) - np.frombuffer(base, np.uint8)).tobytes())


def _decode_difference(base: bytes, payload: bytes, length: int) -> bytes:
    change = decompress(payload, length)
    return (np.frombuffer(base, np.uint8) + np.frombuffer(change, np.uint8)).tobytes()


def _encode_patch(base: bytes, result: bytes) -> bytes:
    return compress(result, base)


def _decode_patch(base: bytes, payload: bytes, length: int) -> bytes:
    return decompress(payload, length, base)


_ENCODE: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "difference": _encode_difference, "patch": _encode_patch, "model": encode_planes,
}  # fmt: skip
_DECODE: dict[str, Callable[[bytes, bytes, int], bytes]] = {
    "difference": _decode_difference, "patch": _decode_patch, "model": decode_planes,
}  # fmt: skip
