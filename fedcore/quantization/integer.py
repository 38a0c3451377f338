"""The integer model: what leaves training and what every exporter writes; with its reference interpreter. numpy only.

A model is a list of steps. A step's result lies on an int8 grid (`ActivationRange`) or is float32; weights are int8 with one
scale per output channel, biases int32 on the grid of the accumulator, ``input scale * weight scale`` (Jacob et al. 2018,
arXiv:1712.05877). Requantization is ``round(accumulator * (input scale * weight scale / output scale)) + zero point``, half to
even, with the factor in float32: the arithmetic of ONNX Runtime, which divides by the scale where a float becomes an integer and
otherwise gives the same bits. Runtimes that use fixed-point factors differ by one step at a tie.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedcore.quantization.wire import ActivationRange

__all__ = [
    "Convolution", "Dense", "Elementwise", "Flatten", "GroupNorm", "IntegerModel", "Operation", "Pool", "Step", "Value", "Weights",
    "as_images", "integer_logits", "interpret", "with_float_head", "with_logit_peak", "with_ranges",
]  # fmt: skip

Floats = npt.NDArray[np.float32]
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights [out, in / groups, *kernel] (int8, or float32 where ``scale`` is None), bias [out] (int32, or float32 where
    ``input_scale`` is None: the bias of an accumulator needs the scale of the input, too), scale float32 [out]. ``exact_bias`` is
    an int32 bias before it was rounded, for runtimes that add it in float or round otherwise."""

    values: npt.NDArray[Any]
    bias: npt.NDArray[Any]
    scale: Floats | None = None
    input_scale: float | None = None
    exact_bias: Floats | None = None

    @property
    def integer(self) -> bool:
        """Whether the layer adds up integers."""
        return self.scale is not None and self.input_scale is not None

    @property
    def accumulator_scale(self) -> Floats:
        """What one step of the accumulator is worth, float32 [out]."""
        assert self.scale is not None
        assert self.input_scale is not None
        return np.float32(self.input_scale) * self.scale

    def real(self) -> tuple[Floats, Floats]:
        """Weights and bias as the real numbers that they stand for; the bias as it was before it was rounded, where known."""
        values, bias = self.values.astype(np.float32), self.bias.astype(np.float32)
        if self.scale is not None:
            values = values * self.scale.reshape(-1, *[1] * (values.ndim - 1))
        if self.exact_bias is not None:
            bias = self.exact_bias
        elif self.integer:
            bias = bias * self.accumulator_scale
        return values, bias


@dataclass(frozen=True, eq=False)
class Convolution:
    """Cross-correlation in one or two dimensions over [channels, *space], zero padding on both sides."""

    weights: Weights
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Dense:
    """Fully connected layer on a vector."""

    weights: Weights
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Pool:
    """Maximum or average over windows; padding never wins a maximum, and counts as zeros in an average if ``count_padding``."""

    kind: Literal["max", "average"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil: bool = False
    count_padding: bool = True


@dataclass(frozen=True, eq=False)
class Flatten:
    """[channels, *space] to one vector, channels slowest."""


@dataclass(frozen=True, eq=False)
class Elementwise:
    """``requantize`` only puts its input on the step's grid."""

    kind: Literal["requantize", "relu", "tanh", "sigmoid", "add"]


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """Group normalisation (Wu and He 2018, arXiv:1803.08494); weight and bias float32 [channels]. Computed in float."""

    groups: int
    epsilon: float
    weight: Floats
    bias: Floats


Operation = Convolution | Dense | Pool | Flatten | Elementwise | GroupNorm


@dataclass(frozen=True, eq=False)
class Step:
    """One operation. ``inputs`` are positions of values: 0 is the model's input, i + 1 the result of step i. ``shape`` is the
    result's for one example; ``grid`` the int8 grid it lies on, None for float32. ``name`` is the layer's, for people."""

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    grid: ActivationRange | None = None


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """Steps in order of execution; the input is float32 [n, *input_shape], the last step's result are the logits. ``logit_peak`` is
    the largest absolute logit that was seen, 0 where nobody looked."""

    input_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    logit_peak: float = 0.0

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.steps[-1].shape[0]

    def shape(self, position: int) -> tuple[int, ...]:
        """Shape of the value at ``position``, for one example."""
        return self.input_shape if position == 0 else self.steps[position - 1].shape

    def grid(self, position: int) -> ActivationRange | None:
        """Grid of the value at ``position``."""
        return None if position == 0 else self.steps[position - 1].grid

    def users(self, position: int) -> Iterator[Step]:
        """The steps that take the value at ``position``."""
        return (step for step in self.steps if position in step.inputs)

    @property
    def integer_layers(self) -> int:
        """Layers with weights that add up integers."""
        return sum(weights.integer for weights in self.weights())

    @property
    def float_results(self) -> tuple[str, ...]:
        """Names of the layers that add up integers and give floats, for want of a grid; the layer of logits aside."""
        layers = ((step.name, step.operation.weights) for step in self.steps[:-1]
                  if isinstance(step.operation, Convolution | Dense) and step.grid is None)  # fmt: skip
        return tuple(name for name, weights in layers if weights.integer)

    def weights(self) -> Iterator[Weights]:
        """Weights of all convolutions and dense layers, in order."""
        return (step.operation.weights for step in self.steps if isinstance(step.operation, Convolution | Dense))


@dataclass(frozen=True, eq=False)
class Value:
    """A batch of results, int8 on a grid or float32."""

    array: npt.NDArray[Any]
    grid: ActivationRange | None

    def real(self) -> Floats:
        """The real numbers that the integers stand for."""
        if self.grid is None:
            return self.array.astype(np.float32)
        return (self.array.astype(np.float32) - np.float32(self.grid.zero_point)) * np.float32(self.grid.scale)

    def centred(self) -> npt.NDArray[np.float64]:
        """Integers less the zero point, as doubles: their sums of products are exact up to 2^53, and BLAS adds them up."""
        assert self.grid is not None
        return self.array.astype(np.float64) - self.grid.zero_point


def interpret(model: IntegerModel, x: Floats) -> list[Value]:
    """All values for x [n, *input_shape], by position."""
    values = [Value(np.asarray(x, np.float32), None)]
    for step in model.steps:
        values.append(_run(step, [values[position] for position in step.inputs]))
    return values


def integer_logits(model: IntegerModel, x: Floats) -> Floats:
    """Logits float32 [n, classes] of x [n, *input_shape]."""
    if not len(x):
        return np.zeros((0, model.classes), np.float32)
    return np.concatenate([interpret(model, x[i : i + _BATCH])[-1].real() for i in range(0, len(x), _BATCH)])


def as_images(model: IntegerModel) -> IntegerModel:
    """The model with windows [channels, steps] as images [channels, 1, steps], for runtimes without one-dimensional kernels."""
    if len(model.input_shape) != 2:
        return model

    def lifted(step: Step) -> Step:
        operation = step.operation
        if isinstance(operation, Convolution):
            weights = dataclasses.replace(operation.weights, values=operation.weights.values[:, :, None])
            operation = dataclasses.replace(
                operation, weights=weights, stride=(1, *operation.stride), padding=(0, *operation.padding),
                dilation=(1, *operation.dilation),
            )  # fmt: skip
        elif isinstance(operation, Pool):
            operation = dataclasses.replace(
                operation, kernel=(1, *operation.kernel), stride=(1, *operation.stride), padding=(0, *operation.padding)
            )
        return dataclasses.replace(step, operation=operation, shape=_image(step.shape))

    return dataclasses.replace(model, input_shape=_image(model.input_shape), steps=tuple(map(lifted, model.steps)))


def _image(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1, shape[1]) if len(shape) == 2 else shape


def with_logit_peak(model: IntegerModel, x: Floats) -> IntegerModel:
    """The model with the largest absolute logit of the representative examples x [n, *input_shape], for runtimes whose logits are
    integers."""
    return dataclasses.replace(model, logit_peak=float(np.abs(integer_logits(model, x)).max(initial=0.0)))


def with_ranges(model: IntegerModel, x: Floats) -> IntegerModel:
    """The model with a grid for every result in `IntegerModel.float_results`, spanning what the representative examples
    x [n, *input_shape] give there: in training nothing asked for one, but without it most runtimes calculate the layer in float."""
    missing = set(model.float_results)
    ends = dict.fromkeys(missing, (0.0, 0.0))
    for start in range(0, len(x), _BATCH):
        values = interpret(model, x[start : start + _BATCH])
        for step, value in zip(model.steps, values[1:], strict=True):
            if step.name in missing and step.grid is None:
                low, high = ends[step.name]
                ends[step.name] = (min(low, float(value.array.min())), max(high, float(value.array.max())))
    return dataclasses.replace(model, steps=tuple(
        dataclasses.replace(step, grid=ActivationRange.spanning(*ends[step.name]))
        if step.name in missing and step.grid is None and len(x) else step
        for step in model.steps
    ))  # fmt: skip


def with_float_head(model: IntegerModel) -> IntegerModel:
    """The model with its last layer of integers, dense or a convolution, on rounded weights in float, for runtimes whose integer
    layers give no more than eight bits: too few to tell close logits apart. It has one integer layer less, whatever follows."""
    steps = list(model.steps)
    for place in reversed(range(len(steps))):
        operation = steps[place].operation
        if isinstance(operation, Convolution | Dense) and operation.weights.integer:
            head = dataclasses.replace(operation, weights=Weights(*operation.weights.real()))
            steps[place] = dataclasses.replace(steps[place], operation=head)
            break
    return dataclasses.replace(model, steps=tuple(steps))


def _run(step: Step, inputs: Sequence[Value]) -> Value:
    operation, x = step.operation, inputs[0]
    if isinstance(operation, Convolution | Dense):
        return _weighted(operation, x, step.grid)
    if isinstance(operation, Pool):
        return _maximum(operation, x, step.grid) if operation.kind == "max" else _average(operation, x, step.grid)
    if isinstance(operation, Flatten):
        return _on_grid(Value(x.array.reshape(len(x.array), -1), x.grid), step.grid)
    if isinstance(operation, GroupNorm):
        return _on_grid(Value(_group_norm(operation, x.real()), None), step.grid)
    if operation.kind == "requantize":
        return _on_grid(x, step.grid)
    real = x.real()
    if operation.kind == "add":
        return _on_grid(Value(real + inputs[1].real(), None), step.grid)
    return _on_grid(Value(_ACTIVATIONS[operation.kind](real), None), step.grid)


def _on_grid(value: Value, grid: ActivationRange | None) -> Value:
    if value.grid == grid:
        return value
    real = value.real()
    return Value(real, None) if grid is None else _rounded(real * (np.float32(1) / np.float32(grid.scale)), grid)


def _rounded(steps: npt.NDArray[Any], grid: ActivationRange) -> Value:
    """``steps`` real multiples of the grid's scale, to integers."""
    return Value(np.clip(np.rint(steps) + grid.zero_point, -128, 127).astype(np.int8), grid)


def _weighted(operation: Convolution | Dense, x: Value, grid: ActivationRange | None) -> Value:
    weights = operation.weights
    if not weights.integer:
        values, bias = weights.real()
        result = _per_channel(bias, _products(operation, x.real(), values), np.add)
        return _on_grid(Value(np.maximum(result, 0) if operation.relu else result, None), grid)
    accumulator = _per_channel(weights.bias, _products(operation, x.centred(), weights.values.astype(np.float64)), np.add)
    accumulator = np.maximum(accumulator, 0) if operation.relu else accumulator
    scale = weights.accumulator_scale
    factor = scale if grid is None else (scale / np.float32(grid.scale)).astype(np.float32)
    scaled = _per_channel(factor, accumulator.astype(np.float32), np.multiply)
    return Value(scaled, None) if grid is None else _rounded(scaled, grid)


def _per_channel(vector: npt.NDArray[Any], array: npt.NDArray[Any], ufunc: np.ufunc) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = ufunc(array, vector.reshape(1, -1, *[1] * (array.ndim - 2)))
    return result


def _products(operation: Convolution | Dense, x: npt.NDArray[Any], weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums of products [n, out, *space]."""
    if isinstance(operation, Dense):
        return np.asarray(x @ weight.T)
    groups, rank = operation.groups, x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in operation.padding)])
    windows = _windows(x, weight.shape[2:], operation.stride, operation.dilation)  # [n, c, *space, *kernel]
    n, space = len(x), windows.shape[2 : 2 + rank]
    grouped = windows.reshape(n, groups, -1, math.prod(space), math.prod(weight.shape[2:]))  # [n, g, c/g, space, kernel]
    columns = np.moveaxis(grouped, 2, 3).reshape(n, groups, math.prod(space), -1)
    result = columns @ np.swapaxes(weight.reshape(groups, len(weight) // groups, -1), 1, 2)  # [n, g, space, out/g]
    return np.swapaxes(result, 2, 3).reshape(n, len(weight), *space)


def _windows(
    x: npt.NDArray[Any], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> npt.NDArray[Any]:  # fmt: skip
    """Views [n, c, *space, *kernel] of x [n, c, *padded space]."""
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, x.ndim)))
    return views[(slice(None), slice(None), *(slice(None, None, s) for s in stride), *(slice(None, None, d) for d in dilation))]


def _padded(operation: Pool, x: npt.NDArray[Any], filler: float) -> npt.NDArray[Any]:
    """``x`` with its padding, and with what a rounded-up window reaches beyond it."""
    pads = []
    for size, k, s, p in zip(x.shape[2:], operation.kernel, operation.stride, operation.padding, strict=True):
        beyond = -(size + 2 * p - k) % s if operation.ceil else 0
        windows = (size + 2 * p - k + beyond) // s + 1
        if beyond and (windows - 1) * s >= size + p:  # a window that begins in the padding does not count
            beyond = 0
        pads.append((p, p + beyond))
    return np.pad(x, [(0, 0), (0, 0), *pads], constant_values=filler)


def _maximum(operation: Pool, x: Value, grid: ActivationRange | None) -> Value:
    padded = _padded(operation, x.array, -128 if x.grid else -math.inf)
    rank = len(operation.kernel)
    windows = _windows(padded, operation.kernel, operation.stride, (1,) * rank)
    return _on_grid(Value(windows.max(axis=tuple(range(-rank, 0))), x.grid), grid)


def _average(operation: Pool, x: Value, grid: ActivationRange | None) -> Value:
    rank = len(operation.kernel)
    ones = (1,) * rank

    def sums(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        windows = _windows(_padded(operation, array, 0), operation.kernel, operation.stride, ones)
        return np.asarray(windows.sum(axis=tuple(range(-rank, 0))))

    count = np.float32(math.prod(operation.kernel)) if operation.count_padding else sums(np.ones_like(x.array[:1], np.float32))
    if x.grid is None or grid is None:
        return _on_grid(Value(sums(x.real()) / count, None), grid)
    factor = np.float32(x.grid.scale) / (np.float32(grid.scale) * count)
    return _rounded(sums(x.centred()).astype(np.float32) * factor, grid)


def _group_norm(operation: GroupNorm, x: Floats) -> Floats:
    grouped = x.reshape(len(x), operation.groups, -1).astype(np.float64)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    normal = (centred / np.sqrt(grouped.var(axis=2, keepdims=True) + operation.epsilon)).reshape(x.shape).astype(np.float32)
    scaled = _per_channel(operation.weight, normal, np.multiply)
    return _per_channel(operation.bias, scaled, np.add)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (np.tanh(0.5 * x) + 1), np.float32)


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "sigmoid": _sigmoid}
