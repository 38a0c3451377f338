import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.privacy.randomness import RandomBytes, derive_key, keystream

parts = st.lists(st.one_of(st.integers(), st.binary(max_size=9), st.text(max_size=9)), max_size=4)


@given(st.lists(st.integers(0, 300), max_size=8))
def test_calls_of_any_length_continue_one_stream(lengths):
    stream, whole = keystream(b"k" * 32), keystream(b"k" * 32)(sum(lengths))
    assert b"".join(stream(length) for length in lengths) == whole


def test_the_stream_is_chacha20_of_rfc_8439():
    """Appendix A.1, test vector 1: zero key, zero nonce, block counter 0."""
    assert keystream(bytes(32))(16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_a_key_decides_the_stream_and_two_keys_share_nothing():
    one, same, other = (np.frombuffer(keystream(key)(4096), np.uint8) for key in (b"a" * 32, b"a" * 32, b"b" * 32))
    assert (one == same).all()
    assert (one == other).mean() < 0.02  # 1 / 256 by chance


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33])
def test_a_key_of_another_length_is_refused(key):
    with pytest.raises(ValueError, match="32 bytes"):
        keystream(key)


@settings(max_examples=50)
@given(parts, parts)
def test_keys_are_equal_only_for_equal_parts(one, other):
    typed = [[(type(part), part) for part in each] for each in (one, other)]
    assert (derive_key(*one) == derive_key(*other)) == (typed[0] == typed[1])


def test_parts_do_not_run_into_each_other():
    keys = [derive_key(*p) for p in [("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (1, 23), (12, 3), ("1", 23), (), ("",), (b"",)]]
    assert len(set(keys)) == len(keys)


def test_the_encoding_is_the_documented_one():
    two = (2).to_bytes(8, "little")
    text = b"fedcore derived key 1" + b"i" + two + b"-7" + b"s" + two + b"\xc3\xa9"
    assert derive_key(-7, "\u00e9") == hashlib.sha256(text).digest()


@pytest.mark.parametrize("part", [1.0, None, True, np.int64(3)])
def test_other_types_are_refused(part):
    with pytest.raises(TypeError, match="integers, bytes and text"):
        derive_key(part)


def test_the_operating_system_is_such_a_source():
    source: RandomBytes = os.urandom
    assert len(source(5)) == 5
