"""The delta of two models in the wire format: what is left of each integer once the change of its scale is known, by planes.

The payload is a byte, 1 if values are predicted to stay and 0 if integers are, and a list of parts, each a length (uint32, the
highest bit set if it is stored as it is) and a zstandard frame:

1. the header, up to the first tensor, with the base's as dictionary;
2. scales (float32), halves (fp16) and floats of all tensors as differences of their bit patterns modulo 2^32, folded so that small
   ones of both signs are small (zigzag), as four planes of bytes;
3. one bit for every int8 value: whether a residual is left; 4. of those, one bit: whether it is negative;
5. of those, one bit: whether it is larger than 1 in size; 6. of those, size - 2 as a byte.

A residual is the integer minus the base's integer, or minus what that becomes under the new scale in float32, ``round(integer *
(base scale / new scale))``, ties to even, within [-127, 127]; modulo 256. Bits are packed from the highest down. Planes make
zstandard's byte-wise coding worth a bit-wise one: residuals are mostly zero.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.quantization.wire import INTEGERS, Section, model_sections
from fedcore.registry.frames import compress, decompress

__all__ = ["decode_planes", "encode_planes"]

_STORED = 1 << 31
_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint32]


def encode_planes(base: bytes, result: bytes) -> bytes | None:
    """The payload; None where the two are not models with the same tensors."""
    try:
        before, after = model_sections(base), model_sections(result)
    except Refused:
        return None
    if _kinds(before) != _kinds(after) or not after:
        return None
    words = _fold(_patterns(result, after) - _patterns(base, before))
    header = _part(result[: after[0].offset], base[: before[0].offset])
    halves = _part(words.astype("<u4").view(np.uint8).reshape(-1, 4).T.tobytes())
    integers, scales = _integers(result, after), _scales(result, after)
    found = []
    for flag, guess in enumerate((_integers(base, before), _predicted(base, before, scales))):
        found.append(bytes([flag]) + header + halves + _residual_parts(integers - guess))
    return min(found, key=len)


def _residual_parts(residual: npt.NDArray[np.int8]) -> bytes:
    left = residual != 0
    size = np.abs(residual[left].astype(np.int16))
    planes = (
        np.packbits(left).tobytes(),
        np.packbits(residual[left] < 0).tobytes(),
        np.packbits(size > 1).tobytes(),
        (size[size > 1] - 2).astype(np.uint8).tobytes(),
    )
    return b"".join(_part(plane) for plane in planes)


def decode_planes(base: bytes, payload: bytes, length: int) -> bytes:
    """Inverse of `encode_planes`: the model of ``length`` bytes.

    Raises:
        ValueError, Refused: the base is no model, or the payload does not fit it.
    """
    before = model_sections(base)
    if payload[0] > 1:
        raise ValueError("neither integers nor values are predicted")
    reader = _Parts(payload[1:])
    header = reader.next(length, base[: before[0].offset])
    after = model_sections(header + bytes(max(length - len(header), 0)))
    if _kinds(before) != _kinds(after):
        raise ValueError("other tensors than the base's")
    count = sum(_halves(one) for one in after)
    words = np.frombuffer(reader.next(4 * count), np.uint8).reshape(4, count).T.copy().view("<u4").reshape(-1)
    patterns = _patterns(base, before) + _unfold(words)
    residual = _residual(reader, sum(_values(one) for one in after if one.encoding in INTEGERS))
    reader.end()
    result = np.zeros(length, np.uint8)
    result[: len(header)] = np.frombuffer(header, np.uint8)
    _put_patterns(result, after, patterns)
    scales = _scales(result.tobytes(), after)
    integers = (_predicted(base, before, scales) if payload[0] else _integers(base, before)) + residual
    at = 0
    for one in after:
        if one.encoding in INTEGERS:
            start, n = one.offset + 4 * one.shape[0], _values(one)
            result[start : start + n] = integers[at : at + n].view(np.uint8)
            at += n
    return result.tobytes()


def _residual(reader: _Parts, count: int) -> npt.NDArray[np.int8]:
    residual = np.zeros(count, np.int8)
    left = _bits(reader, count)
    negative = _bits(reader, int(left.sum()))
    large = _bits(reader, len(negative))
    size = np.ones(len(negative), np.int16)
    size[large] = np.frombuffer(reader.next(int(large.sum())), np.uint8).astype(np.int16) + 2
    residual[left] = np.where(negative, -size, size).astype(np.int8)
    return residual


def _bits(reader: _Parts, count: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(reader.next(-(-count // 8)), np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


def _kinds(sections: Sequence[Section]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(one.name, one.shape, one.encoding) for one in sections]


def _values(one: Section) -> int:
    return one.length - 4 * one.shape[0] if one.encoding in INTEGERS else one.length // (2 if one.encoding == "fp16" else 4)


def _halves(one: Section) -> int:
    """Numbers of a tensor that are no int8."""
    return one.shape[0] if one.encoding in INTEGERS else _values(one)


def _patterns(data: bytes, sections: Sequence[Section]) -> _Words:
    """Bit patterns of all scales, halves and floats."""
    found = [
        np.frombuffer(data, "<u2" if one.encoding == "fp16" else "<u4", _halves(one), one.offset).astype(np.uint32)
        for one in sections
    ]
    return np.concatenate(found)


def _put_patterns(result: _Bytes, sections: Sequence[Section], patterns: _Words) -> None:
    at = 0
    for one in sections:
        n = _halves(one)
        raw = patterns[at : at + n].astype("<u2" if one.encoding == "fp16" else "<u4").view(np.uint8)
        result[one.offset : one.offset + len(raw)] = raw
        at += n


def _scales(data: bytes, sections: Sequence[Section]) -> list[npt.NDArray[np.float32]]:
    return [np.frombuffer(data, "<f4", one.shape[0], one.offset) for one in sections if one.encoding in INTEGERS]


def _integers(data: bytes, sections: Sequence[Section]) -> npt.NDArray[np.int8]:
    found = [
        np.frombuffer(data, np.int8, _values(one), one.offset + 4 * one.shape[0]) for one in sections if one.encoding in INTEGERS
    ]
    return np.concatenate([np.zeros(0, np.int8), *found])


def _predicted(base: bytes, sections: Sequence[Section], scales: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.int8]:
    """What the base's integers become under new scales."""
    found = [np.zeros(0, np.int8)]
    integral = [one for one in sections if one.encoding in INTEGERS]
    for one, old, new in zip(integral, _scales(base, sections), scales, strict=True):
        values = np.frombuffer(base, np.int8, _values(one), one.offset + 4 * one.shape[0]).reshape(one.shape[0], -1)
        with np.errstate(all="ignore"):  # a hostile file's scales may be anything: its result is not the one promised
            ratio = np.nan_to_num(old / new, nan=1.0, posinf=1.0, neginf=1.0).astype(np.float32)
            moved = np.rint(values.astype(np.float32) * ratio[:, None])
        found.append(np.clip(moved, -127, 127).astype(np.int8).reshape(-1))
    return np.concatenate(found)


def _fold(words: _Words) -> _Words:
    folded: _Words = (words << np.uint32(1)) ^ (np.uint32(0) - (words >> np.uint32(31)))
    return folded


def _unfold(words: _Words) -> _Words:
    plain: _Words = (words >> np.uint32(1)) ^ (np.uint32(0) - (words & np.uint32(1)))
    return plain


def _part(data: bytes, base: bytes = b"") -> bytes:
    frame = compress(data, base)
    if len(frame) < len(data):
        return struct.pack("<I", len(frame)) + frame
    return struct.pack("<I", len(data) | _STORED) + data


class _Parts:
    """The parts of a payload, in order."""

    def __init__(self, payload: bytes) -> None:
        self._payload, self._at = payload, 0

    def next(self, limit: int, base: bytes = b"") -> bytes:
        """The next part: exactly ``limit`` bytes, or at most as many where a ``base`` says that only the part itself knows."""
        (head,) = struct.unpack_from("<I", self._payload, self._at)
        size = head & ~_STORED
        data = self._payload[self._at + 4 : self._at + 4 + size]
        if len(data) != size:
            raise ValueError("a part is cut off")
        self._at += 4 + size
        found = data if head & _STORED else decompress(data, limit, base)
        if len(found) > limit or (not base and len(found) != limit):
            raise ValueError("a part of another length")
        return found

    def end(self) -> None:
        if self._at != len(self._payload):
            raise ValueError("something follows the last part")
