"""The integer model as a torch module of explicit quantize and dequantize operators, from which compilers make integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # registers torch.ops.quantized_decomposed; private, so a test guards it
from torch.nn import functional as F

from fedcore.quantization.integer import Convolution, Dense, Flatten, GroupNorm, IntegerModel, Pool, Step, as_images
from fedcore.quantization.wire import ActivationRange

__all__ = ["QuantizedGraph"]

_OPS: Any = torch.ops.quantized_decomposed
_LIBRARY = _decomposed.quantized_decomposed_lib  # named, so that an import that registers nothing fails here


class QuantizedGraph(nn.Module):
    """The steps with constant scales: weights are int8 buffers that are dequantized per channel, each value on a grid is quantized
    and dequantized after the operator that makes it. Windows are images of one row inside. Input float32 [n, *input_shape], output
    float32 logits."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self._windows, self._model = len(model.input_shape) == 2, as_images(model)
        for position, step in enumerate(self._model.steps):
            for name, array in _constants(step).items():
                self.register_buffer(f"{name}_{position}", torch.from_numpy(np.ascontiguousarray(array)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        values = [x.unsqueeze(2) if self._windows else x]
        for position, step in enumerate(self._model.steps):
            value = self._run(step, position, [values[place] for place in step.inputs])
            values.append(_on_grid(value, step.grid) if step.grid else value)
        return values[-1]

    def _run(self, step: Step, position: int, inputs: list[Tensor]) -> Tensor:
        operation, x = step.operation, inputs[0]
        if isinstance(operation, Convolution | Dense):
            weight, bias = self._weight(operation, position), self.get_buffer(f"bias_{position}")
            if isinstance(operation, Dense):
                y = F.linear(x, weight, bias)
            else:
                y = F.conv2d(x, weight, bias, operation.stride, operation.padding, operation.dilation, operation.groups)
            return F.relu(y) if operation.relu else y
        if isinstance(operation, Pool):
            return _pool(operation, x)
        if isinstance(operation, Flatten):
            return torch.flatten(x, 1)
        if isinstance(operation, GroupNorm):
            return F.group_norm(
                x, operation.groups, self.get_buffer(f"weight_{position}"), self.get_buffer(f"bias_{position}"), operation.epsilon
            )
        if operation.kind == "add":
            return x + inputs[1]
        kinds: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
        return x if operation.kind == "requantize" else kinds[operation.kind](x)

    def _weight(self, operation: Convolution | Dense, position: int) -> Tensor:
        weight = self.get_buffer(f"weight_{position}")
        if operation.weights.scale is None:
            return weight
        scale, zero = self.get_buffer(f"scale_{position}"), self.get_buffer(f"zero_{position}")
        dequantized: Tensor = _OPS.dequantize_per_channel(weight, scale, zero, 0, -127, 127, torch.int8)
        return dequantized


def _constants(step: Step) -> dict[str, Any]:
    operation = step.operation
    if isinstance(operation, GroupNorm):
        return {"weight": operation.weight, "bias": operation.bias}
    if not isinstance(operation, Convolution | Dense):
        return {}
    weights = operation.weights
    found: dict[str, Any] = {"weight": weights.values, "bias": weights.real()[1]}
    if weights.scale is not None:
        found |= {"scale": weights.scale, "zero": np.zeros(len(weights.scale), np.int64)}
    return found


def _on_grid(x: Tensor, grid: ActivationRange) -> Tensor:
    arguments = (grid.scale, grid.zero_point, -128, 127, torch.int8)
    result: Tensor = _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *arguments), *arguments)
    return result


def _pool(operation: Pool, x: Tensor) -> Tensor:
    kernel, stride, padding = operation.kernel, operation.stride, operation.padding
    if operation.kind == "max":
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=operation.ceil)
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=operation.count_padding)
