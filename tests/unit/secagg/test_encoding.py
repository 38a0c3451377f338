import dataclasses
import tracemalloc
from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.secagg import encoding, member, messages
from fedcore.secagg.client import split_upload
from fedcore.secagg.encoding import F64, LONGEST, TEXT, U8, U16, U32, U64, Message, array, blob, coded, fixed, nested, sequence

TYPES = [
    value for module in (messages, member) for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Message) and value is not Message
]  # fmt: skip
TYPES = list(dict.fromkeys(TYPES))


@dataclass(frozen=True, slots=True)
class Inner(Message):
    TAG: ClassVar[int] = 200
    number: int = coded(U16)


@dataclass(frozen=True, slots=True)
class Outer(Message):
    TAG: ClassVar[int] = 201
    name: str = coded(TEXT)
    small: int = coded(U8)
    large: int = coded(U64)
    weight: float = coded(F64)
    key: bytes = coded(fixed(4))
    data: bytes = coded(blob(10))
    hashes: tuple[bytes, ...] = coded(array(2, 3))
    inner: tuple[Inner, ...] = coded(sequence(nested(Inner), 2))
    secret: int = coded(U32, secret=True)
    signature: bytes = coded(fixed(2))


EXAMPLE = Outer("\u00e9", 7, 2**64 - 1, 0.5, b"keyk", b"xyz", (b"ab", b"cd"), (Inner(1), Inner(2)), 99, b"ss")


def values_of(codec):
    """Values that a field can hold, from its codec: found by what the codec is."""
    simple = {
        id(U8): st.integers(0, 2**8 - 1), id(U16): st.integers(0, 2**16 - 1), id(U32): st.integers(0, 2**32 - 1),
        id(U64): st.integers(0, 2**64 - 1), id(TEXT): st.text(st.characters(codec="utf-8"), min_size=1, max_size=16),
        id(F64): st.floats(0, 1e300).map(abs),
    }  # fmt: skip
    if id(codec) in simple:
        return simple[id(codec)]
    if isinstance(codec.read, MethodType):
        return messages_of(codec.read.__self__)
    cells = dict(zip(codec.write.__code__.co_freevars, (c.cell_contents for c in codec.write.__closure__), strict=True))
    kind = codec.write.__qualname__.split(".")[0]
    if kind == "fixed":
        return st.binary(min_size=cells["size"], max_size=cells["size"])
    if kind == "blob":
        return st.binary(max_size=min(cells["limit"], 80))
    if kind == "array":
        return st.lists(st.binary(min_size=cells["size"], max_size=cells["size"]), max_size=3).map(tuple)
    assert kind == "sequence"
    return st.lists(values_of(cells["item"]), max_size=2).map(tuple)


def messages_of(cls):
    return st.builds(cls, *(values_of(field.metadata["codec"]) for field in dataclasses.fields(cls)))


def test_the_layout_is_the_documented_one():
    parts = [
        b"\x01\xc9", b"\x02\xc3\xa9", b"\x07", b"\xff" * 8, b"\x3f\xe0\0\0\0\0\0\0", b"keyk", b"\0\0\0\x03xyz",
        b"\0\0\0\x02abcd", b"\0\0\0\x02", b"\x01\xc8\0\x01", b"\x01\xc8\0\x02", b"\0\0\0\x63", b"ss",
    ]  # fmt: skip
    assert EXAMPLE.encode() == b"".join(parts)
    assert EXAMPLE.content() == EXAMPLE.encode()[:-2]
    assert Outer.decode(EXAMPLE.encode()) == EXAMPLE
    assert "99" not in repr(EXAMPLE)
    assert "secret" not in repr(EXAMPLE)


def test_every_type_has_a_tag_of_its_own():
    assert len({cls.TAG for cls in TYPES}) == len(TYPES) == 29


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TYPES).flatmap(messages_of))
def test_every_message_comes_back(message):
    data = message.encode()
    assert type(message).decode(data) == message
    assert len(data) >= type(message).least()


def read_or_refused(cls, data: bytes) -> bool:
    """Whether ``data`` is the one encoding of what it is read as, or is refused in one line that names the type."""
    try:
        found = cls.decode(data)
    except Refused as error:
        return "\n" not in str(error) and cls.__name__ in str(error)
    return found.encode() == data


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TYPES).flatmap(messages_of), st.data())
def test_what_a_decoder_accepts_encodes_to_the_same_bytes(message, data):
    """Bytes changed, cut, doubled and appended: refused, or read as the one message that has this encoding."""
    encoded = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(encoded) - 1)) if encoded else 0
        match data.draw(st.sampled_from(["flip", "cut", "insert", "append", "count"])):
            case "flip" if encoded:
                encoded[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del encoded[at : at + data.draw(st.integers(1, 5))]
            case "insert":
                encoded[at:at] = data.draw(st.binary(min_size=1, max_size=5))
            case "append":
                encoded += data.draw(st.binary(min_size=1, max_size=5))
            case "count":
                encoded[at : at + 4] = b"\xff\xff\xff\xff"
    for cls in {type(message), data.draw(st.sampled_from(TYPES))}:
        assert read_or_refused(cls, bytes(encoded))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TYPES), st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_one_line(cls, data):
    for attempt in (data, bytes([encoding.VERSION, cls.TAG]) + data):
        assert read_or_refused(cls, attempt)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: b"\x02" + data[1:], "version"),
        (lambda data: b"\x01\xc8" + data[2:], "version, type"),
        (lambda data: data + b"\0", "1 bytes too many"),
        (lambda data: data[:-1], "ends 1 bytes early"),
        (lambda data: data.replace(b"\x02\xc3\xa9", b"\x02\xff\xff"), "not UTF-8"),
        (lambda data: data.replace(b"\x02\xc3\xa9", b"\0"), "1 to 64 bytes of text"),
        (lambda data: data.replace(b"\x3f\xe0\0\0", b"\x7f\xf8\0\0"), "finite"),
        (lambda data: data.replace(b"\x3f\xe0\0\0", b"\xbf\xe0\0\0"), "at least 0"),
        (lambda data: data.replace(b"\x3f\xe0" + bytes(6), b"\x80" + bytes(7)), "at least 0"),
        (lambda data: data.replace(b"\0\0\0\x03xyz", b"\0\0\0\x0bxyz"), "at most 10"),
        (lambda data: data.replace(b"\0\0\0\x02abcd", b"\0\0\0\x04abcd"), "at most 3"),
        (lambda data: data.replace(b"\0\0\0\x02\x01\xc8", b"\0\0\0\x03\x01\xc8"), "at most 2"),
        (lambda data: data[: data.index(b"\x01\xc8") + 4], "ends before the 2"),
    ],
)
def test_what_is_wrong_is_said(change, expected):
    data = change(EXAMPLE.encode())
    assert data != EXAMPLE.encode()
    with pytest.raises(Refused, match=expected):
        Outer.decode(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""}, {"name": "x" * 65}, {"small": 256}, {"small": -1}, {"weight": -0.0}, {"weight": float("nan")},
        {"weight": float("inf")}, {"key": b"abc"}, {"data": b"x" * 11}, {"hashes": (b"a",)}, {"hashes": (b"ab",) * 4},
        {"inner": (Inner(1),) * 3}, {"inner": (Inner(65536),)},
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_not_written(changes):
    with pytest.raises(Refused, match="cannot be written"):
        dataclasses.replace(EXAMPLE, **changes).encode()


LISTS = [(cls, name) for cls in TYPES for name, codec in encoding._codecs(cls) if codec.least == 4 and codec is not U32]


@pytest.mark.parametrize(("cls", "name"), LISTS)
def test_a_huge_count_takes_no_memory(cls, name):
    """A count that what follows cannot hold is refused before a list is begun."""
    codec = dict(encoding._codecs(cls))[name]
    tracemalloc.start()
    for count in (b"\0\x00\x00\xff", b"\0\x00\xff\xff", b"\xff\xff\xff\xff"):
        with pytest.raises(Refused):
            codec.read(encoding.Reader(count + bytes(254)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000


def test_a_message_beyond_the_limit_is_not_read(monkeypatch):
    monkeypatch.setattr(encoding, "LONGEST", 10)
    with pytest.raises(Refused, match="at most 10"):
        Outer.decode(EXAMPLE.encode())
    assert LONGEST == 1 << 30


def test_an_upload_splits_without_a_copy():
    head, vector = split_upload(b"\0\0\0\x02hdvector")
    assert (head, bytes(vector)) == (b"hd", b"vector")
    for data in (b"\0\0\0\x05head", b"\xff\xff\xff\xffhead", b"", b"\0\0"):
        with pytest.raises(Refused, match="ends within"):
            split_upload(data)
