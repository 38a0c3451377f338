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


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


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
