import numpy as np
import pytest
import torch
from torch import nn

from fedcore.quantization.layers import (
    FakeQuantize,
    QuantConv2d,
    QuantLinear,
    activation_ranges,
    calibrate,
    fake_quantize_weight,
    float_arithmetic,
    make_quantization_aware,
    set_activation_ranges,
)  # fmt: skip
from fedcore.quantization.wire import ActivationRange, ModelTensor, decode_model, encode_model


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("shape", [(3, 7), (4, 2, 5), (8, 1, 3, 3), (2, 1)])
def test_rounding_a_weight_equals_the_wire_format(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, shape[0]).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    received = decode_model(encode_model([ModelTensor("w", weight.numpy(), "int8")])).tensors["w"]
    assert (fake_quantize_weight(weight).numpy() == received).all()


def test_what_was_received_does_not_change_in_the_first_forward_pass():
    weight = torch.randn(16, 50, generator=torch.Generator().manual_seed(1))
    received = torch.from_numpy(decode_model(encode_model([ModelTensor("w", weight.numpy(), "int8")])).tensors["w"])
    torch.testing.assert_close(fake_quantize_weight(received), received, rtol=3e-7, atol=0)


def test_an_activation_is_rounded_as_runtimes_do():
    quantizer = FakeQuantize()
    span = ActivationRange.spanning(-0.7, 2.3)
    quantizer.frozen = span
    x = torch.linspace(-2, 4, 10_001)
    inverse = np.float32(1) / np.float32(span.scale)
    integers = np.clip(np.rint(x.numpy() * inverse) + span.zero_point, -128, 127)
    expected = (integers - span.zero_point).astype(np.float32) * np.float32(span.scale)
    assert (quantizer(x).numpy() == expected).all()


def test_the_gradient_passes_straight_through_inside_the_range_only():
    quantizer = FakeQuantize()
    quantizer.frozen = ActivationRange.spanning(0.0, 1.0)
    x = torch.tensor([-0.5, 0.2, 0.9, 1.5], requires_grad=True)
    quantizer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    weight = torch.randn(3, 4, requires_grad=True)
    (fake_quantize_weight(weight) * 2).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((3, 4), 2.0))


def test_conversion_keeps_parameters_and_names():
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    converted = make_quantization_aware(model)
    assert isinstance(converted[0], QuantConv2d)
    assert isinstance(converted[3], QuantLinear)
    assert dict.fromkeys(before, True) == {name: torch.equal(before[name], p) for name, p in converted.named_parameters()}


def test_calibration_spans_what_it_saw_and_freezes_it():
    model = make_quantization_aware(network())
    batches = [torch.randn(10, 1, 8, 8) for _ in range(3)]
    ranges = calibrate(model, batches)
    seen = torch.cat(batches)
    span = ranges["0.input"]
    assert span == ActivationRange.spanning(float(seen.min()), float(seen.max()))
    assert ranges["3.input"].zero_point == -128  # behind a ReLU nothing is negative
    model(torch.full((1, 1, 8, 8), 100.0))
    assert activation_ranges(model) == ranges
    other = make_quantization_aware(network())
    set_activation_ranges(other, ranges)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x), other(x))


def test_float_arithmetic_switches_all_rounding_off_and_on_again():
    plain, model = network(), make_quantization_aware(network())
    x = torch.randn(6, 1, 8, 8)
    calibrate(model, [x])
    rounded = model(x)
    with float_arithmetic(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), rounded)
    assert not torch.equal(rounded, plain(x))


def test_without_calibration_only_weights_are_rounded():
    model, plain = make_quantization_aware(network()), network()
    with torch.no_grad():
        for layer in (plain[0], plain[3]):
            layer.weight.copy_(fake_quantize_weight(layer.weight))
    x = torch.randn(6, 1, 8, 8)
    assert torch.equal(model(x), plain(x))
