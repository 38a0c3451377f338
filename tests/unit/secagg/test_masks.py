import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_reference import aes_ctr_words, packed_bits

from fedcore.errors import Refused
from fedcore.secagg import masks as masks_module
from fedcore.secagg.masks import WIDTHS, add_masks, add_packed, pack, packed_length, reduce, subtract_masks, word_type, zeros

seeds = st.binary(min_size=32, max_size=32)
widths = st.sampled_from(WIDTHS)


def test_the_block_cipher_is_that_of_sp_800_38a():
    """F.1.5, first block; the reference expands masks from it block by block."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    assert ecb.update(bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"


@settings(max_examples=40, deadline=None)
@given(seeds, widths, st.integers(1, 300))
def test_a_mask_is_the_reference_keystream(seed, bits, length):
    vector = zeros(length, bits)
    add_masks(vector, [seed])
    assert vector.tolist() == aes_ctr_words(seed, length, vector.itemsize)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [16_383, 16_384, 32_768, 32_769, 70_001])
def test_masks_longer_than_a_block(bits, length):
    seed = b"long" * 8
    vector = zeros(length, bits)
    add_masks(vector, [seed])
    size = vector.itemsize
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(length * size))
    assert (vector == np.frombuffer(stream, vector.dtype)).all()
    assert vector[:50].tolist() == aes_ctr_words(seed, 50, size)


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("length", [1, 8, 16, 17, 16_384, 16_385, 32_768, 32_769, 49_157, 70_001])
def test_both_ways_to_expand_a_mask_give_the_same_bytes(bits, length, monkeypatch):
    """Counter mode alone is the slow twin of GCM's keystream."""
    chosen = [bytes([i]) * 32 for i in range(3)]
    found = []
    for faster in (False, True):
        monkeypatch.setattr(masks_module, "_gcm_is_faster", lambda answer=faster: answer)
        found.append(zeros(length, bits))
        add_masks(found[-1], chosen[:2])
        subtract_masks(found[-1], chosen[2:])
    assert (found[0] == found[1]).all()
    streams = [
        np.frombuffer(
            Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(found[0].nbytes)), found[0].dtype
        )
        for seed in chosen
    ]
    assert (found[0] == streams[0] + streams[1] - streams[2]).all()


def test_the_faster_way_is_taken_for_long_vectors_only(monkeypatch):
    used = []
    gcm = masks_module._gcm
    monkeypatch.setattr(masks_module, "_gcm", lambda seed: (used.append(seed), gcm(seed))[1])
    monkeypatch.setattr(masks_module, "_gcm_is_faster", lambda: True)
    add_masks(zeros(masks_module._BLOCK // 2, 16), [bytes(32)])
    assert used == []
    add_masks(zeros(masks_module._BLOCK // 2 + 1, 16), [bytes(32)])
    assert used == [bytes(32)]


@settings(max_examples=40, deadline=None)
@given(st.lists(seeds, max_size=4), widths, st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_masks_cancel_modulo_two_to_the_b(chosen, bits, length, seed):
    values = np.random.default_rng(seed).integers(0, 1 << bits, length).astype(word_type(bits))
    vector = values.copy()
    for one in chosen:
        add_masks(vector, [one])
    reduce(vector, bits)  # as the sender packs it
    for one in reversed(chosen):
        subtract_masks(vector, [one])
    reduce(vector, bits)
    assert (vector == values).all()


@pytest.mark.parametrize("bits", [16, 24])
def test_many_masks_at_once_are_one_after_another(bits, monkeypatch):
    """More seeds than ciphers open at a time, over more than a block."""
    monkeypatch.setattr(masks_module, "_STREAMS", 3)
    chosen = [bytes([i]) * 32 for i in range(8)]
    together, single = zeros(40_000, bits), zeros(40_000, bits)
    add_masks(together, chosen[:7])
    subtract_masks(together, chosen[5:])
    for i, seed in enumerate(chosen):
        if i < 7:
            add_masks(single, [seed])
        if i >= 5:
            subtract_masks(single, [seed])
    assert (together == single).all()
    slow = [aes_ctr_words(seed, 30, together.itemsize) for seed in (*chosen[:5], chosen[7])]
    modulus = 1 << 8 * together.itemsize
    expected = [(sum(column[:5]) - column[5]) % modulus for column in zip(*slow, strict=True)]
    assert together[:30].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(widths, st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_packed_vectors_add_up(bits, length, seed, count):
    rng = np.random.default_rng(seed)
    vectors = [rng.integers(0, 1 << bits, length).astype(word_type(bits)) for _ in range(count)]
    total = zeros(length, bits)
    for vector in vectors:
        data = pack(vector, bits)
        assert data == packed_bits(vector.tolist(), bits)
        assert len(data) == packed_length(length, bits)
        add_packed(total, memoryview(data), bits)
    reduce(total, bits)
    assert total.tolist() == [sum(column) % (1 << bits) for column in zip(*(v.tolist() for v in vectors), strict=True)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_vectors_of_another_length_are_refused(bits):
    total = zeros(5, bits)
    for data in (b"", bytes(packed_length(5, bits) - 1), bytes(packed_length(5, bits) + 1)):
        with pytest.raises(Refused, match="5 values"):
            add_packed(total, data, bits)
    assert not total.any()


def test_bits_behind_the_last_value_are_refused():
    total = zeros(5, 20)
    with pytest.raises(Refused, match="behind its last value"):
        add_packed(total, bytes(12) + b"\x10", 20)
    assert not total.any()


@pytest.mark.parametrize("bits", [16, 32])
def test_a_mask_never_becomes_an_array(bits):
    vector = zeros(1_000_000, bits)
    tracemalloc.start()
    add_masks(vector, [b"s" * 32])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("bits", [16, 32])
def test_a_mask_is_uniform_and_two_have_nothing_in_common(bits):
    """Chi-square over bytes, bit balance, and correlation, each within 5 standard deviations; the seeds are fixed."""
    length = 200_000
    one, other = zeros(length, bits), zeros(length, bits)
    add_masks(one, [b"1" * 32])
    add_masks(other, [b"2" * 32])
    octets = np.bincount(one.view(np.uint8), minlength=256)
    expected = one.nbytes / 256
    chi_square = float(((octets - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    ones = np.unpackbits(one.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(8 * one.nbytes)
    correlation = np.corrcoef(one.astype(float), other.astype(float))[0, 1]
    serial = np.corrcoef(one[1:].astype(float), one[:-1].astype(float))[0, 1]
    assert max(abs(correlation), abs(serial)) < 5 / np.sqrt(length)
