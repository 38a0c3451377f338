"""Deltas: what went in comes out, for any pair; nothing else comes out; memory is bounded by what is allowed."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import bsdiff4
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.quantization.wire import ModelTensor, encode_model
from fedcore.registry.delta import CODECS, Edge, apply_delta, make_delta, route
from fedcore.registry.frames import compress, decompress

VECTORS = Path(__file__).parents[2] / "vectors" / "delta" / "deltas.json"


def sha(data):
    return hashlib.sha256(data).digest()


def model(seed, move=0.0, shapes=((16, 8, 3, 3), (10, 40)), header="a"):
    rng = np.random.default_rng(seed)
    tensors = []
    for n, shape in enumerate(shapes):
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        values += np.float32(move) * np.random.default_rng([seed, n, 9]).normal(0, 0.1, shape).astype(np.float32)
        tensors.append(ModelTensor(f"weight{n}", values, "int8"))
        tensors.append(ModelTensor(f"bias{n}", values.reshape(shape[0], -1)[:, 0] * 2, "fp16"))
    tensors.append(ModelTensor("norm", rng.normal(1, 0.1, 5).astype(np.float32) + np.float32(move), "fp32"))
    return encode_model(tensors, {}, {"round": header})


def both(base, result, codecs=CODECS):
    delta = make_delta(base, result, codecs)
    assert apply_delta(base, delta, sha(result), len(result)) == result
    return delta


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_pair_of_files(base, result):
    both(base, result)
    both(base, result, ["patch"])
    if len(base) == len(result):
        both(base, result, ["difference"])


@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 99), st.floats(-2, 2), st.text(max_size=5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_pair_of_models(shapes, seed, move, header):
    base, result = model(seed, 0, shapes), model(seed, move, shapes, header)
    both(base, result, ["model"])
    both(result, base, ["model"])


def test_consecutive_models_take_a_fraction_and_less_than_general_tools():
    big = ((64, 32, 3, 3), (10, 400))
    base, result = model(1, 0, big), model(1, 0.03, big)
    delta = both(base, result)
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patch = zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(result)
    assert CODECS[delta[4] - 1] == "model"
    assert len(delta) < min(len(patch), len(bsdiff4.diff(base, result)), len(result) / 3)


def test_scales_that_stay_make_deltas_smaller():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 400)).astype(np.float32)
    moved = values + rng.normal(0, 0.03, values.shape).astype(np.float32)
    size = {}
    for encoding in ("int8", "int8po2"):
        pair = [encode_model([ModelTensor("w", v, encoding)]) for v in (values, moved)]
        size[encoding] = len(both(*pair, ["model"]))
    assert size["int8po2"] < size["int8"] / 1.3


def test_extreme_models_and_changes():
    """Scales near zero, saturated values, weights that change sign, and residuals beyond a byte's range."""
    for values in (np.zeros((3, 4)), np.full((3, 4), 1e30), np.full((3, 4), -1e-38), np.array([[1.0, -1], [1e-9, 5]])):
        for other in (np.ones(values.shape), -values, values * 1e3, np.where(values > 0, -1.0, 127.0)):
            pair = [encode_model([ModelTensor("w", np.asarray(v, np.float32), "int8")]) for v in (values, other)]
            both(*pair, ["model"])


def test_models_of_other_tensors_take_another_codec():
    base, result = model(1), model(1, shapes=((16, 8, 3, 3), (11, 40)))
    with pytest.raises(Refused, match="none of the codecs model applies"):
        make_delta(base, result, ["model"])
    assert CODECS[both(base, result)[4] - 1] == "patch"
    assert both(b"", b"") is not None


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_delta_is_refused(codec):
    base, result = model(3), model(3, 0.1)
    delta = make_delta(base, result, [codec])
    rng = np.random.default_rng(0)
    for _ in range(150):
        place = int(rng.integers(len(delta)))
        broken = bytearray(delta)
        broken[place] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(Refused):  # a bit that a frame does not use may change nothing
            assert apply_delta(base, bytes(broken), sha(result), len(result)) == result
    for end in (0, 3, 20, len(delta) // 2, len(delta) - 1):
        with pytest.raises(Refused):
            apply_delta(base, delta[:end], sha(result), len(result))
    with pytest.raises(Refused):
        apply_delta(base, delta + b"\0" * 9, sha(result), len(result))


def test_what_a_delta_promises_is_held_against_it():
    base, result = model(1), model(1, 0.1)
    delta = make_delta(base, result)
    with pytest.raises(Refused, match="for another file"):
        apply_delta(result, delta, sha(result), len(result))
    with pytest.raises(Refused, match="at most"):
        apply_delta(base, delta, sha(result), len(result) - 1)
    with pytest.raises(Refused, match="promised"):
        apply_delta(base, delta, sha(base), len(result))
    with pytest.raises(Refused, match="codec 9"):
        apply_delta(base, delta[:4] + b"\x09" + delta[5:], sha(result), len(result))
    with pytest.raises(Refused, match="FCD1"):
        apply_delta(base, b"", sha(result), len(result))


def test_hostile_bases_crash_nothing():
    base, result = model(1), model(1, 0.1)
    payload = make_delta(base, result, ["model"])[17:]
    rng = np.random.default_rng(1)
    for _ in range(100):
        broken = bytearray(base)
        broken[int(rng.integers(len(base)))] = int(rng.integers(256))
        head = b"FCD1\x03" + sha(bytes(broken))[:8] + len(result).to_bytes(4, "little")
        with pytest.raises(Refused):
            apply_delta(bytes(broken), head + payload, sha(base), len(result))


def bombs():
    plain = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 30))  # tells the truth about a gigabyte
    silent = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(bytes(1 << 30))
    return plain, silent


@pytest.mark.slow
def test_a_bomb_costs_what_is_allowed():
    """In a process whose memory may not grow by more than 200 MB."""
    code = (
        "import sys, base64, hashlib, resource\n"
        "from fedcore.registry.delta import apply_delta\n"
        "from fedcore.errors import Refused\n"
        "base = b'base'\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for line in sys.stdin:\n"
        "    frame = base64.b64decode(line)\n"
        "    for code in (1, 2):\n"
        "        delta = b'FCD1' + bytes([code]) + hashlib.sha256(base).digest()[:8] + (4096).to_bytes(4, 'little') + frame\n"
        "        try:\n"
        "            apply_delta(base, delta, bytes(32), 4096)\n"
        "            print('taken')\n"
        "        except Refused:\n"
        "            pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    given_ = "".join(base64.b64encode(frame).decode() + "\n" for frame in bombs())
    done = subprocess.run([sys.executable, "-c", code], input=given_, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000, done.stdout


def test_frames_are_bounded():
    frame = compress(bytes(100_000))
    assert decompress(frame, 100_000) == bytes(100_000)
    with pytest.raises(ValueError, match="more than"):
        decompress(frame, 99_999)


def test_the_way_with_the_fewest_bytes():
    a, b, c, d = (bytes([n]) * 32 for n in range(4))
    edges = [Edge(a, b, 10), Edge(b, c, 10), Edge(c, d, 10), Edge(a, d, 50), Edge(b, d, 15), Edge(d, a, 1)]
    assert route([a], d, edges, 100) == (Edge(a, b, 10), Edge(b, d, 15))
    assert route([a], d, edges, 25) is None
    assert route([c, a], d, edges, 100) == (Edge(c, d, 10),)
    assert route([d], d, edges, 100) == ()
    assert route([b"x" * 32], d, edges, 100) is None
    assert route([], d, edges, 100) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)), max_size=20), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_the_way_is_the_shortest_of_all(drawn, full):
    edges = [Edge(bytes([a]), bytes([b]), size) for a, b, size in drawn]
    best = {bytes([0]): 0}
    for _ in range(6):  # Bellman and Ford
        for edge in edges:
            if edge.base in best:
                best[edge.result] = min(best.get(edge.result, 10**9), best[edge.base] + edge.size)
    found, cost = route([bytes([0])], bytes([5]), edges, full), best.get(bytes([5]), 10**9)
    assert (found is None) == (cost >= full)
    if found is not None:
        assert sum(edge.size for edge in found) == cost


def test_vectors():
    """Bytes that other implementations must take; a delta made today may differ, its result may not."""
    for case in json.loads(VECTORS.read_text()):
        base, delta = (base64.b64decode(case[key]) for key in ("base", "delta"))
        result = apply_delta(base, delta, bytes.fromhex(case["sha256"]), case["length"])
        assert zlib.crc32(result) == case["crc32"]
    assert {case["codec"] for case in json.loads(VECTORS.read_text())} == set(CODECS)
