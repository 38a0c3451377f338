import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import Refused
from fedcore.export.onnx import onnx_bytes, onnx_logits
from fedcore.models import ZOO
from fedcore.quantization.integer import Convolution, Dense, integer_logits, interpret, with_float_head, with_logit_peak
from fedcore.quantization.layers import FakeQuantize, calibrate, make_quantization_aware, set_activation_ranges
from fedcore.quantization.lower import lower
from fedcore.quantization.wire import ActivationRange, quantize_rows

SHAPES = {"mlp": (1, 28, 28), "cnn": (1, 28, 28), "lenet": (1, 28, 28), "dscnn": (1, 28, 28), "imu_cnn": (6, 100)}


def quantized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    calibrate(make_quantization_aware(model).eval(), [x])
    return model


@pytest.mark.parametrize("name", ZOO)
def test_the_interpreter_gives_the_bits_of_onnx_runtimes_integer_kernels(name):
    torch.manual_seed(0)
    x = torch.randn(200, *SHAPES[name])
    model = lower(quantized(ZOO[name](SHAPES[name], 10), x), SHAPES[name])
    on_grid = interpret(model, x.numpy())[1].real()  # the runtime divides by the scale, training multiplies by the reciprocal
    np.testing.assert_array_equal(integer_logits(model, on_grid), onnx_logits(onnx_bytes(model, {}), on_grid))


@pytest.mark.parametrize("name", ZOO)
def test_it_labels_as_the_fake_quantized_model(name):
    torch.manual_seed(1)
    x = torch.randn(300, *SHAPES[name])
    network = quantized(ZOO[name](SHAPES[name], 10), x)
    model = lower(network, SHAPES[name])
    with torch.no_grad():
        expected = network(x).numpy()
    assert (integer_logits(model, x.numpy()).argmax(1) == expected.argmax(1)).mean() >= 0.99
    assert model.integer_layers == sum(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) for m in network.modules())
    assert all(w.values.dtype == np.int8 and w.bias.dtype == np.int32 for w in model.weights())


class Everything(nn.Module):
    """Strides, dilation, groups, padding of every sort, on scales that are powers of two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2)
        self.pool, self.last = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.last(torch.flatten(self.pool(torch.relu(self.b(torch.relu(self.a(x))))), 1))


def powers_of_two(network: nn.Module, rng: np.random.Generator) -> None:
    """Parameters and ranges for which float32 arithmetic is exact: integers times a power of two, peaks of 127."""
    make_quantization_aware(network).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                integers = rng.integers(-127, 128, module.weight.shape)
                integers.reshape(len(integers), -1)[:, 0] = 127
                module.weight.copy_(torch.from_numpy(integers / 128))
                module.bias.copy_(torch.from_numpy(rng.integers(-200, 200, len(integers)) / 128 / 64))
    scales = {"a": (1 / 64, 3), "b": (1 / 16, -128), "last": (1 / 4, -128)}
    for name, (scale, _) in scales.items():
        bias, step = network.get_submodule(name).bias, scale / 128
        with torch.no_grad():
            bias.copy_(torch.round(bias / step) * step)
    set_activation_ranges(network, {f"{name}.input": ActivationRange(*grid) for name, grid in scales.items()})


def test_where_float_is_exact_the_two_are_equal_to_the_bit():
    rng = np.random.default_rng(0)
    network = Everything()
    powers_of_two(network, rng)
    x = rng.standard_normal((50, 2, 13, 13)).astype(np.float32)
    model = lower(network, (2, 13, 13))
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(integer_logits(model, x), expected)
    assert np.ptp(expected) > 1


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d((3, 2), (2, 1), padding=1), nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, padding=1), nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(2, 3, ceil_mode=True), nn.MaxPool2d(2, 2, padding=1, ceil_mode=True),
    ],
)  # fmt: skip
def test_pooling_equals_torch_in_float_and_on_a_grid(pool):
    x = torch.randn(5, 3, 10, 9, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(FakeQuantize(), pool, FakeQuantize(), nn.Flatten())
    np.testing.assert_allclose(interpret(lower(network, (3, 10, 9)), x.numpy())[-1].real(), network(x).numpy(), atol=1e-6)
    set_activation_ranges(network, {"0": ActivationRange(1 / 32, -7), "2": ActivationRange(1 / 32, -7)})
    found = interpret(lower(network, (3, 10, 9)), x.numpy())[-1]
    assert found.array.dtype == np.int8
    difference = np.abs(found.real() - network(x).numpy())
    assert difference.max() <= 1 / 32 + 1e-6  # a tie may fall the other way
    assert (difference > 1e-6).mean() < 0.01


def test_normalisation_activations_and_sums_equal_torch():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.tanh, self.sigmoid = nn.Conv1d(2, 6, 3), nn.GroupNorm(3, 6), nn.Tanh(), nn.Sigmoid()
            nn.init.normal_(self.norm.weight)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return torch.flatten(self.tanh(y) + self.sigmoid(y) + torch.relu(y), 1)

    torch.manual_seed(0)
    network, x = Network(), torch.randn(4, 2, 12)
    with torch.no_grad():
        np.testing.assert_allclose(integer_logits(lower(network, (2, 12)), x.numpy()), network(x).numpy(), atol=1e-5)


def test_a_rectifier_is_part_of_its_layer_unless_the_layer_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            return torch.relu(x) + torch.relu(self.b(x))

    x = torch.randn(50, 4)
    network = quantized(Twice(), x)
    steps = lower(network, (4,)).steps
    assert [step.operation.relu for step in steps if isinstance(step.operation, Dense)] == [False, True]
    with torch.no_grad():
        np.testing.assert_allclose(integer_logits(lower(network, (4,)), x.numpy()), network(x).numpy(), atol=0.05)


def test_the_peak_is_that_of_the_logits_and_a_float_head_changes_nothing_else():
    torch.manual_seed(0)
    x = torch.randn(100, 1, 8, 8)
    model = lower(quantized(ZOO["cnn"]((1, 8, 8), 10), x), (1, 8, 8))
    expected = integer_logits(model, x.numpy())
    assert model.logit_peak == 0 and with_logit_peak(model, x.numpy()).logit_peak == np.abs(expected).max()
    head = with_float_head(model)
    assert head.integer_layers == model.integer_layers - 1 and head.steps[:-1] == model.steps[:-1]
    np.testing.assert_allclose(integer_logits(head, x.numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("weight", "bias"), [(0.0, 1.5), (0.0, -1e4), (0.0, 0.0), (1e-12, 1.5), (1e-30, -3.0)])
def test_a_dead_channel_keeps_its_bias(weight, bias, bits):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), torch.randn(50, 1, 8, 8)
    with torch.no_grad():
        network[0].weight[1] = weight
        network[0].bias[1] = bias
    model = lower(quantized(network, x), (1, 8, 8), weight_bits=bits)
    weights = next(model.weights())
    assert weights.bias[1] * float(weights.accumulator_scale[1]) == pytest.approx(bias, rel=1e-3, abs=1e-9)
    assert abs(int(weights.bias[1])) <= 2**30 and (weights.accumulator_scale > np.finfo(np.float32).tiny).all()
    assert np.abs(weights.values[1].astype(np.float32) * weights.scale[1]).max() <= weight + weights.scale[1] / 2
    with torch.no_grad():
        if bits == 8:
            expected = network(x).numpy()
            assert np.abs(integer_logits(model, x.numpy()) - expected).max() <= 0.01 * np.abs(expected).max()


def test_rows_that_can_hold_their_bias_keep_their_integers_and_scales():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.randn(50, 1, 8, 8)
    with torch.no_grad():
        network[1].weight[3] = 0
    (weights,) = lower(quantized(network, x), (1, 8, 8)).weights()
    integers, scale = quantize_rows(network[1].weight.detach().numpy())
    np.testing.assert_array_equal(weights.values, integers)
    others = np.arange(10) != 3
    np.testing.assert_array_equal(weights.scale[others], scale[others])
    assert weights.scale[3] >= scale[others].min()


@pytest.mark.parametrize(
    ("shape", "head", "dense"),
    [
        ((4, 6, 6), nn.Conv2d(4, 10, 6), True),
        ((4, 6, 5), nn.Conv2d(4, 10, (6, 5), stride=2), True),
        ((3, 12), nn.Conv1d(3, 10, 12), True),
        ((4, 6, 6), nn.Conv2d(4, 10, 5), False),
        ((4, 6, 6), nn.Conv2d(4, 8, 6, groups=2), False),
        ((4, 3, 3), nn.Conv2d(4, 10, 3, padding=1), False),
    ],
)
def test_a_convolution_over_its_whole_input_is_a_dense_head(shape, head, dense):
    torch.manual_seed(0)
    x = torch.randn(40, *shape)
    network = quantized(nn.Sequential(head, nn.Flatten()), x)
    model = lower(network, shape)
    assert [isinstance(step.operation, Dense) for step in model.steps][-1] == dense
    assert model.float_results == (() if dense else ("0",))
    assert with_float_head(model).integer_layers == model.integer_layers - 1 == 0
    with torch.no_grad():
        expected = network(x).numpy()
    for found in (model, with_float_head(model)):
        np.testing.assert_allclose(integer_logits(found, x.numpy()), expected, atol=1e-3 * np.abs(expected).max())


def test_weights_and_biases_stand_for_those_of_the_layer():
    torch.manual_seed(0)
    x = torch.randn(50, 1, 8, 8)
    network = quantized(ZOO["cnn"]((1, 8, 8), 10), x)
    step = next(step for step in lower(network, (1, 8, 8)).steps if isinstance(step.operation, Convolution))
    values, bias = step.operation.weights.real()
    layer = network[0]
    assert np.abs(values - layer.weight.detach().numpy()).max() <= 0.51 * step.operation.weights.scale.max()
    assert np.abs(bias - layer.bias.detach().numpy()).max() <= 0.51 * step.operation.weights.accumulator_scale.max()


def test_nothing_of_the_model_is_changed():
    x = torch.randn(20, 1, 8, 8)
    network = quantized(ZOO["cnn"]((1, 8, 8), 10), x).train()
    before = {name: value.clone() for name, value in network.named_parameters()}
    model = lower(network, (1, 8, 8))
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())
    assert dataclasses.is_dataclass(model) and integer_logits(model, np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 10)


class TwoResults(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Hardswish(), nn.Flatten()), "layer 1 is a Hardswish"),
        (TwoResults(), "must return one tensor"),
        (nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Flatten()), "layer 0: average pooling with ceil_mode"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "logits"),
    ],
)
def test_what_the_integer_model_does_not_have_is_named(network, reason):
    with pytest.raises(Refused, match=reason):
        lower(network, (1, 8, 8))
