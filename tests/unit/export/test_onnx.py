import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedcore.errors import Refused
from fedcore.export.onnx import integer_operators, onnx_logits, to_onnx
from fedcore.models import ZOO
from fedcore.quantization.layers import calibrate, make_quantization_aware

SHAPES = {"mlp": (1, 28, 28), "cnn": (1, 28, 28), "lenet": (1, 28, 28), "dscnn": (1, 28, 28), "imu_cnn": (6, 100)}


def quantized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    calibrate(make_quantization_aware(model).eval(), [x])
    return model


def agreement(model: nn.Module, data: bytes, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = model(x).numpy()
    found = onnx_logits(data, x.numpy())
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    return float((found.argmax(1) == expected.argmax(1)).mean())


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_runs_as_integer_kernels_only(name):
    torch.manual_seed(0)
    x = torch.randn(600, *SHAPES[name])
    model = quantized(ZOO[name](SHAPES[name], 10), x)
    data = to_onnx(model, SHAPES[name], {"labels": "[]"})
    layers = sum(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) for m in model.modules())
    operators = integer_operators(data)
    assert operators.get("QGemm", 0) + operators.get("QLinearConv", 0) == layers
    assert not {"Conv", "Gemm", "MatMul", "Relu", "DequantizeLinear", "AveragePool"} & set(operators)
    assert agreement(model, data, x) >= 0.99
    assert {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props} == {"labels": "[]"}


def test_a_float_model_is_exported_in_float():
    torch.manual_seed(0)
    model, x = ZOO["cnn"]((1, 8, 8), 10), torch.randn(64, 1, 8, 8)
    data = to_onnx(model, (1, 8, 8), {})
    with torch.no_grad():
        np.testing.assert_allclose(onnx_logits(data, x.numpy()), model(x).numpy(), atol=1e-5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.pool, self.head = nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.inner(x))
        return self.head(torch.flatten(self.pool(x), 1))


def test_a_residual_network_with_group_norm():
    torch.manual_seed(0)
    x = torch.randn(200, 1, 12, 12)
    model = quantized(Residual(), x)
    assert agreement(model, to_onnx(model, (1, 12, 12), {}), x) >= 0.98


class Shared(nn.Module):
    """One activation, one pooling and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.input, self.pool, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
        self.inner, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 9, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.input(x)))
        x = self.relu(self.inner(x))
        return self.head(torch.flatten(self.pool(self.relu(self.inner(x))), 1))


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8 * 18, 16)
        self.flat, self.last = nn.GroupNorm(4, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(torch.relu(self.flat(self.head(torch.flatten(x, 1)))))


@pytest.mark.parametrize(("model", "shape"), [(Shared, (1, 12, 12)), (Windows, (3, 20))])
@pytest.mark.parametrize("batch", [1, 8, 100])
def test_shared_layers_and_norms_of_every_rank(model, shape, batch):
    torch.manual_seed(0)
    network, x = model(), torch.randn(100, *shape)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    data = to_onnx(network, shape, {})
    with torch.no_grad():
        np.testing.assert_allclose(onnx_logits(data, x.numpy(), batch), network(x).numpy(), atol=1e-4)
    quantized(network, x)
    assert agreement(network, to_onnx(network, shape, {}), x) >= 0.97


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Scaled(nn.Module):
    def forward(self, x):
        return torch.add(x, x, alpha=-3).flatten(1)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[0].register_forward_hook(lambda module, arguments, output: output * 2)
    return model


class Unknown(nn.Module):
    def forward(self, x):
        return torch.cumsum(x.flatten(1), 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Softplus(), nn.Linear(8, 10)), "layer 2 is a Softplus"),
        (Branching(), "cannot be traced"),
        (Unknown(), "operator .*cumsum"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten()), "layer 0: only explicit zero padding"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), "adaptive pooling"),
        (nn.Sequential(nn.Linear(8, 3), nn.Flatten()), "layer 0: Linear on 4 dimensions"),
        (nn.Sequential(nn.Flatten(1, 2), nn.Flatten()), r"layer 0: only Flatten\(1, -1\)"),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2), nn.Flatten()), "layer 0: pooling with dilation"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3), nn.Flatten()), "layer 0: pooling with dilation or divisor_override"),
        (Scaled(), "keyword arguments"),
        (hooked(), "layer 0 has hooks"),
    ],
)
def test_what_cannot_be_exported_is_named(model, reason):
    with pytest.raises(Refused, match=reason):
        to_onnx(model, (1, 8, 8), {})


def test_the_batch_is_free():
    model = ZOO["mlp"]((1, 8, 8), 10)
    data = to_onnx(model, (1, 8, 8), {})
    x = np.random.default_rng(0).standard_normal((7, 1, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(onnx_logits(data, x, batch=3), onnx_logits(data, x, batch=7), atol=1e-6)
