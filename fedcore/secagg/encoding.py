"""Canonical bytes: one encoding for every value, and decoders that take nothing else.

A message is a version byte, a tag byte and its fields in order. Integers are big-endian of a fixed size; text, bytes and lists
carry their length first. Whatever a decoder accepts encodes to the same bytes again, and memory stays in proportion to the
bytes received: a count is checked against what is left before anything is built.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fedcore.errors import Refused

__all__ = [
    "F64", "LONGEST", "TEXT", "U8", "U16", "U32", "U64", "VERSION", "Message", "Reader", "array", "blob", "coded", "fixed",
    "nested", "sequence",
]  # fmt: skip

VERSION = 1
LONGEST = 1 << 30  # bytes of a message, vectors apart
_FIELDS: dict[type[Any], tuple[tuple[str, Codec], ...]] = {}  # filled on a type's first use


class Reader:
    """Bytes and how far they are read."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        end = self.at + length
        if end > len(self.data):
            raise Refused(f"it ends {end - len(self.data)} bytes early")
        piece = self.data[self.at : end]
        self.at = end
        return piece


@dataclass(frozen=True, slots=True)
class Codec:
    """How a value is written and read; ``least`` is the fewest bytes it takes."""

    write: Callable[[Any], bytes]
    read: Callable[[Reader], Any]
    least: int


def _unsigned(size: int) -> Codec:
    return Codec(lambda value: value.to_bytes(size, "big"), lambda reader: int.from_bytes(reader.take(size), "big"), size)


def fixed(size: int) -> Codec:
    """Exactly ``size`` bytes."""

    def write(value: bytes) -> bytes:
        if len(value) != size:
            raise ValueError(f"{size} bytes are needed, got {len(value)}")
        return value

    return Codec(write, lambda reader: reader.take(size), size)


def blob(limit: int) -> Codec:
    """Up to ``limit`` bytes behind their length (4 bytes)."""

    def write(value: bytes) -> bytes:
        return _counted(len(value), limit) + value

    return Codec(write, lambda reader: reader.take(_count(reader, limit, 1)), 4)


def array(size: int, limit: int) -> Codec:
    """Up to ``limit`` strings of ``size`` bytes each, behind their number."""

    def write(values: tuple[bytes, ...]) -> bytes:
        if any(len(value) != size for value in values):
            raise ValueError(f"every item has {size} bytes")
        return _counted(len(values), limit) + b"".join(values)

    def read(reader: Reader) -> tuple[bytes, ...]:
        whole = reader.take(size * _count(reader, limit, size))
        return tuple([whole[at : at + size] for at in range(0, len(whole), size)])

    return Codec(write, read, 4)


def sequence(item: Codec, limit: int) -> Codec:
    """Up to ``limit`` values, behind their number."""

    def write(values: tuple[Any, ...]) -> bytes:
        return _counted(len(values), limit) + b"".join([item.write(value) for value in values])

    return Codec(write, lambda reader: tuple([item.read(reader) for _ in range(_count(reader, limit, item.least))]), 4)


def nested(message: type[Message]) -> Codec:
    """A message within another."""
    return Codec(lambda value: value.encode(), message.read, message.least())


def coded(codec: Codec, *, secret: bool = False) -> Any:
    """A dataclass field that travels; a secret one stays out of the text of the message."""
    return dataclasses.field(repr=not secret, metadata={"codec": codec})


class Message:
    """A frozen dataclass of `coded` fields that travels as bytes; ``TAG`` is its type.

    If its last field is ``signature``, that covers `content`, all that stands before.
    """

    TAG: ClassVar[int]

    def encode(self) -> bytes:
        """The canonical bytes.

        Raises:
            Refused: a value does not fit its field.
        """
        return self._written(_codecs(type(self)))

    def content(self) -> bytes:
        """The canonical bytes without the signature."""
        return self._written(_codecs(type(self))[:-1])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Inverse of `encode`.

        Raises:
            Refused: another version or type, a value or length out of bounds, or bytes missing or left over.
        """
        if len(data) > LONGEST:
            raise Refused(f"{_words(cls)} has {len(data)} bytes; at most {LONGEST} are read")
        reader = Reader(bytes(data))
        message = cls.read(reader)
        if reader.at != len(data):
            raise Refused(f"{_words(cls)} has {len(data) - reader.at} bytes too many")
        return message

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """Read one message and leave ``reader`` behind it. Raises what `decode` raises."""
        start = reader.data[reader.at : reader.at + 2]
        if start != bytes([VERSION, cls.TAG]):
            raise Refused(f"{_words(cls)} starts with {VERSION}, {cls.TAG} (version, type); this one with {list(start)}")
        reader.at += 2
        values = []
        for name, codec in _codecs(cls):
            try:
                values.append(codec.read(reader))
            except Refused as error:
                raise Refused(f"{_words(cls)} cannot be read at {name}: {error}") from None
        return cls(*values)

    @classmethod
    def least(cls) -> int:
        """The fewest bytes such a message takes."""
        return 2 + sum(codec.least for _, codec in _codecs(cls))

    def _written(self, codecs: tuple[tuple[str, Codec], ...]) -> bytes:
        pieces = [bytes([VERSION, self.TAG])]
        for name, codec in codecs:
            try:
                pieces.append(codec.write(getattr(self, name)))
            except (OverflowError, ValueError) as error:
                raise Refused(f"{_words(type(self))} cannot be written ({name}): {error}") from None
        return b"".join(pieces)


def _codecs(message: type[Any]) -> tuple[tuple[str, Codec], ...]:
    found = _FIELDS.get(message)
    if found is None:
        found = _FIELDS[message] = tuple((field.name, field.metadata["codec"]) for field in dataclasses.fields(message))
    return found


def _words(message: type[Message]) -> str:
    return f"a message of type {message.__name__}"


def _counted(count: int, limit: int) -> bytes:
    if count > limit:
        raise ValueError(f"at most {limit} are allowed, got {count}")
    return count.to_bytes(4, "big")


def _count(reader: Reader, limit: int, least: int) -> int:
    count = int.from_bytes(reader.take(4), "big")
    if count > limit:
        raise Refused(f"at most {limit} are allowed, got {count}")
    if count * least > len(reader.data) - reader.at:
        raise Refused(f"it ends before the {count} that it announces")
    return count


def _write_text(value: str) -> bytes:
    data = value.encode()
    if not 1 <= len(data) <= 64:
        raise ValueError(f"1 to 64 bytes of text are allowed, got {len(data)}")
    return bytes([len(data)]) + data


def _read_text(reader: Reader) -> str:
    (length,) = reader.take(1)
    if not 1 <= length <= 64:
        raise Refused(f"1 to 64 bytes of text are allowed, got {length}")
    try:
        return reader.take(length).decode()
    except UnicodeDecodeError:
        raise Refused("it is not UTF-8") from None


def _write_number(value: float) -> bytes:
    if not (math.isfinite(value) and math.copysign(1.0, value) > 0):
        raise ValueError(f"a finite number of at least 0 is needed, got {value}")
    return struct.pack(">d", value)


def _read_number(reader: Reader) -> float:
    (value,) = struct.unpack(">d", reader.take(8))
    if not (math.isfinite(value) and math.copysign(1.0, value) > 0):
        raise Refused(f"a finite number of at least 0 is needed, got {value}")
    return float(value)


U8, U16, U32, U64 = (_unsigned(size) for size in (1, 2, 4, 8))
F64 = Codec(_write_number, _read_number, 8)
TEXT = Codec(_write_text, _read_text, 2)
