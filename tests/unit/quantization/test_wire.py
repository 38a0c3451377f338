import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcore.errors import Refused
from fedcore.quantization.wire import (
    BLOCK,
    INTEGERS,
    ActivationRange,
    ModelTensor,
    Update,
    decode_model,
    decode_update,
    encode_model,
    encode_update,
    quantize_rows,
    quantize_rows_po2,
    update_length,
)  # fmt: skip

finite = st.floats(-1e4, 1e4, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=finite)


def example() -> bytes:
    rng = np.random.default_rng(0)
    tensors = [
        ModelTensor("conv.weight", rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "int8"),
        ModelTensor("conv.bias", rng.standard_normal(4).astype(np.float32), "fp16"),
        ModelTensor("raw", rng.standard_normal((2, 5)).astype(np.float32), "fp32"),
    ]
    return encode_model(tensors, {"conv.input": ActivationRange(0.1, -3)}, {"name": "x"})


@given(matrices, st.sampled_from([*INTEGERS, "fp16", "fp32"]))
def test_a_model_comes_back_within_its_encodings_rounding(values, encoding):
    decoded = decode_model(encode_model([ModelTensor("w", values, encoding)])).tensors["w"]
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    if encoding == "int8":
        peaks = np.abs(values.reshape(len(values), -1)).max(1)
        errors = np.abs(decoded - values).reshape(len(values), -1).max(1)
        assert (errors <= peaks / 127 * 0.5001 + 1e-30).all()
    elif encoding == "int8po2":
        peaks = np.abs(values.reshape(len(values), -1)).max(1)
        errors = np.abs(decoded - values).reshape(len(values), -1).max(1)
        assert (errors <= peaks / 64 * np.sqrt(0.5) * 1.0001 + 2.0**-127).all()
    else:
        tolerance = 1e-3 if encoding == "fp16" else 0
        np.testing.assert_allclose(decoded, values, rtol=tolerance, atol=tolerance * 1e-4)


@given(matrices)
def test_po2_scales_are_the_powers_of_two_nearest_to_a_64th_of_the_peak(values):
    integers, scale = quantize_rows_po2(values)
    assert (np.frexp(scale)[0] == 0.5).all()
    largest = np.abs(integers.astype(int).reshape(len(values), -1)).max(1)
    assert (largest <= 91).all()
    assert (largest >= 45)[np.abs(values.reshape(len(values), -1)).max(1) > 2.0**-119].all()


def test_po2_scales_outlast_a_small_move():
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.9, 0.9, (50, 40)).astype(np.float32)
    moved = values + rng.normal(0, 0.002, values.shape).astype(np.float32)
    (before, scale), (after, same) = quantize_rows_po2(values), quantize_rows_po2(moved)
    assert (scale == same).all()
    assert (before != after).mean() < 0.2
    assert (quantize_rows(values)[1] != quantize_rows(moved)[1]).all()


@given(matrices)
def test_quantizing_what_was_quantized_changes_nothing(values):
    once = decode_model(encode_model([ModelTensor("w", values, "int8")])).tensors["w"]
    integers, _ = quantize_rows(values)
    again, _ = quantize_rows(once)
    assert (integers == again).all()


def test_a_row_of_zeros_stays_zero():
    integers, scale = quantize_rows(np.zeros((2, 3), np.float32))
    assert not integers.any()
    assert np.isfinite(1 / scale).all()


def test_int8_takes_a_quarter_and_the_length_is_exact():
    values = np.ones((64, 100), np.float32)
    assert len(encode_model([ModelTensor("w", values, "int8")])) < values.nbytes / 4 + 64 * 4 + 200


@pytest.mark.parametrize("cut", [0, 3, 4, 7, 8, 40, -1, -4])
def test_a_truncated_model_is_refused(cut):
    with pytest.raises(Refused):
        decode_model(example()[:cut])


def test_extra_bytes_are_refused():
    with pytest.raises(Refused, match="promises"):
        decode_model(example() + b"\0\0\0\0")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["tensors"][0].update(shape=[4, 3, 3, -3]),
        lambda h: h["tensors"][0].update(shape=[10**9, 10**9]),
        lambda h: h["tensors"][0].update(encoding="int4"),
        lambda h: h["tensors"][0].update(shape=[]),
        lambda h: h["tensors"][1].update(name="conv.weight"),
        lambda h: h["tensors"].append({"name": "more", "shape": [9], "encoding": "fp32"}),
        lambda h: h["ranges"].update({"conv.input": [0.0, 0]}),
        lambda h: h["ranges"].update({"conv.input": [float("nan"), 0]}),
        lambda h: h["ranges"].update({"conv.input": [0.1, 300]}),
        lambda h: h.pop("ranges"),
        lambda h: h.update(tensors=3),
    ],
)
def test_a_header_that_lies_is_refused(change):
    data = example()
    (length,) = struct.unpack_from("<I", data, 4)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    with pytest.raises(Refused):
        decode_model(data[:4] + struct.pack("<I", len(text)) + text + data[8 + length :])


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused_without_another_error(noise):
    for data in (noise, b"FCM1" + noise, b"FCU1" + noise):
        for decode in (decode_model, decode_update):
            with pytest.raises(Refused):
                decode(data)


def test_values_that_cannot_be_encoded_name_their_tensor():
    with pytest.raises(Refused, match=r"parameter layer\.bias holds values beyond the range of fp16"):
        encode_model([ModelTensor("layer.bias", np.array([1e5], np.float32), "fp16")])
    with pytest.raises(Refused, match=r"parameter layer\.bias holds values that are not finite"):
        encode_model([ModelTensor("layer.bias", np.array([np.nan], np.float32), "fp32")])
    with pytest.raises(Refused, match=r"layer\.weight holds values beyond the range of int8po2"):
        encode_model([ModelTensor("layer.weight", np.full((1, 1), 3e38, np.float32), "int8po2")])


@given(
    hnp.arrays(np.float32, st.integers(0, 3 * BLOCK), elements=finite), st.integers(0, 2**40), st.sampled_from(["float32", "int8"])
)
def test_an_update_comes_back(values, examples, encoding):
    data = encode_update(Update(values, examples, 0.25), encoding, np.random.default_rng(0))
    assert len(data) == update_length(values.size, encoding)
    update = decode_update(data)
    assert (update.examples, update.loss) == (examples, 0.25)
    if encoding == "float32":
        assert (update.values == values).all()
    else:
        step = np.repeat([np.abs(values[i : i + BLOCK]).max() / 127 for i in range(0, values.size, BLOCK)], BLOCK)[: values.size]
        assert (np.abs(update.values - values) <= step * 1.001 + 1e-30).all()


def test_stochastic_rounding_is_unbiased():
    values = np.random.default_rng(1).standard_normal(BLOCK).astype(np.float32)
    rng = np.random.default_rng(2)
    draws = [decode_update(encode_update(Update(values, 1, 0.0), "int8", rng)).values for _ in range(2000)]
    step = np.abs(values).max() / 127
    # The mean of 2000 roundings has a standard deviation of at most step / 2 / sqrt(2000).
    assert np.abs(np.mean(draws, axis=0) - values).max() < 5 * step / 2 / np.sqrt(2000)


def test_a_truncated_update_is_refused():
    data = encode_update(Update(np.ones(9, np.float32), 1, 0.0), "int8", np.random.default_rng(0))
    for cut in range(len(data)):
        with pytest.raises(Refused):
            decode_update(data[:cut])


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_range_holds_zero_and_its_ends(a, b):
    low, high = min(a, b), max(a, b)
    span = ActivationRange.spanning(low, high)
    assert -128 <= span.zero_point <= 127
    reach = [span.scale * (-128 - span.zero_point), span.scale * (127 - span.zero_point)]
    assert reach[0] - span.scale <= min(low, 0)
    assert reach[1] + span.scale >= max(high, 0)
