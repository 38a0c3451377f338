"""The flatbuffer of a LiteRT model, operator by operator; see `litert`."""

from __future__ import annotations

import json
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from fedcore.errors import Refused
from fedcore.export.artefact import Facts
from fedcore.export.litert_metadata import metadata_bytes
from fedcore.quantization.integer import (
    Convolution,
    Dense,
    Elementwise,
    Flatten,
    GroupNorm,
    IntegerModel,
    Pool,
    Step,
    Weights,
)  # fmt: skip
from fedcore.quantization.wire import ActivationRange

__all__ = ["FACTS", "IDENTIFIER", "LiteRTWriter", "fixed_point_bias"]

FACTS, IDENTIFIER = "fedcore", b"TFL3"
_SMALL = 7  # the largest integer of weights in four bits
_TASK_METADATA = "TFLITE_METADATA"
_OPS, _TYPES = schema.BuiltinOperator, schema.TensorType
_KINDS = {
    np.dtype(np.int8): _TYPES.INT8,
    np.dtype(np.int32): _TYPES.INT32,
    np.dtype(np.int64): _TYPES.INT64,
    np.dtype(np.float32): _TYPES.FLOAT32,
}
_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "MAX_POOL_2D": 2, "AVERAGE_POOL_2D": 2, "ADD": 2,
             "QUANTIZE": 2, "DEQUANTIZE": 3, "MEAN": 2, "PAD": 2, "PADV2": 2, "TRANSPOSE": 2}  # fmt: skip
_HEADROOM = 1.5  # logits on the device may be larger than those of the representative examples
_FLOATS = {"relu": "RELU", "tanh": "TANH", "sigmoid": "LOGISTIC", "add": "ADD"}

Array = npt.NDArray[Any]


class _Buffer(schema.BufferT):  # type: ignore[misc]  # generated code without types
    """A buffer at 16 bytes, as the schema asks: a microcontroller reads int32 in place."""

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - of the generated code
        """See the generated code."""
        data = bytes(self.data or b"")
        builder.StartVector(1, len(data), 16)
        builder.head = builder.Head() - len(data)
        builder.Bytes[builder.Head() : builder.Head() + len(data)] = data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return int(schema.BufferEnd(builder))


class LiteRTWriter:
    """Appends operators for the steps of an integer model. A value is the index of its tensor, always channels last."""

    def __init__(self, model: IntegerModel, *, micro: bool) -> None:
        self._model, self._micro = model, micro
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [_Buffer()]
        self._operators: list[Any] = []
        self._codes: list[str] = []
        self._grids: list[ActivationRange | None] = []
        self._columns: dict[int, Array] = {}  # of flattened values: where each feature, channels last, stands channels first
        first = model.steps[0]
        taken = first.grid if _requantizes(first) and len(list(model.users(0))) == 1 else None
        self._begins_on_grid = taken is not None
        self._input = self._tensor("input", _last(model.input_shape, flat=True), taken)
        given = self._input
        if len(model.input_shape) == 2:
            given = self._reshape("input.window", self._input, _last(model.input_shape))
        self._values = [given]

    def add(self, step: Step, position: int) -> None:
        """Write one step; its result is put on the step's grid."""
        inputs, operation = [self._values[place] for place in step.inputs], step.operation
        if _requantizes(step):
            skip = position == 1 and self._begins_on_grid
            value = inputs[0] if skip else self._on_grid(step.name, inputs[0], step.grid)
        elif isinstance(operation, Convolution | Dense):
            value = self._weighted(step, operation, inputs[0])
        elif isinstance(operation, Pool):
            value = self._pool(step, operation, inputs[0])
        elif isinstance(operation, Flatten):
            value = self._flatten(step, position, inputs[0])
        elif isinstance(operation, GroupNorm):
            value = self._group_norm(step, operation, self._on_grid(step.name, inputs[0], None))
        elif isinstance(operation, Elementwise) and operation.kind == "add" and step.grid and all(map(self._grid, inputs)):
            value = self._operator("ADD", step.name, inputs, _last(step.shape), step.grid, schema.AddOptionsT())
        else:
            floats = [self._on_grid(step.name, value, None) for value in inputs]
            options = schema.AddOptionsT() if len(floats) == 2 else None
            value = self._operator(_FLOATS[operation.kind], step.name, floats, _last(step.shape), None, options)
        self._values.append(self._on_grid(step.name, value, step.grid))

    def finish(self, facts: Facts) -> bytes:
        """The file, with the facts where task libraries and `describe` look for them."""
        grid = self._grid(self._values[-1])
        self._tensors[self._values[-1]].name = "logits"
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        graph.inputs, graph.outputs = [self._input], [self._values[-1]]
        model = schema.ModelT()
        model.version, model.description, model.subgraphs = 3, "fedcore", [graph]
        model.operatorCodes = [_code(name) for name in self._codes]
        model.metadata = [
            self._entry(_TASK_METADATA, metadata_bytes(facts, self._model.input_shape, grid)),
            self._entry(FACTS, json.dumps(facts.texts()).encode()),
        ]
        model.buffers = self._buffers
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _grid(self, value: int) -> ActivationRange | None:
        return self._grids[value]

    def _weighted(self, step: Step, operation: Convolution | Dense, x: int) -> int:
        weights, relu = operation.weights, schema.ActivationFunctionType.RELU if operation.relu else 0
        if not weights.integer:
            raise Refused(f"export: layer {step.name} has no activation range: calibrate the model before it is exported")
        if isinstance(operation, Dense) and step is self._model.steps[-1] and step.grid is None and self._model.logit_peak:
            return self._head(step, operation, x)
        if isinstance(operation, Dense):
            values = weights.values[:, self._columns[x]] if x in self._columns else weights.values
            dense = schema.FullyConnectedOptionsT()
            dense.fusedActivationFunction = relu
            operands = self._operands(step, operation, x, values, 0)
            return self._operator("FULLY_CONNECTED", step.name, operands, _last(step.shape), step.grid, dense)
        lanes = 2 - len(operation.stride)
        kernel = weights.values.reshape(*weights.values.shape[:2], *[1] * lanes, *weights.values.shape[2:])
        stride, dilation, padding = ((*[usual] * lanes, *given) for usual, given in (
            (1, operation.stride), (1, operation.dilation), (0, operation.padding)))  # fmt: skip
        x, same = self._padded(
            step, x, [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)], stride, padding, 0
        )
        depthwise = operation.groups > 1 and kernel.shape[1] == 1
        conv = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
        conv.padding = schema.Padding.SAME if same else schema.Padding.VALID
        (conv.strideH, conv.strideW), (conv.dilationHFactor, conv.dilationWFactor) = stride, dilation
        conv.fusedActivationFunction = relu
        if depthwise:
            conv.depthMultiplier = len(kernel) // operation.groups
        op = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        values, axis = (np.moveaxis(kernel[:, 0], 0, -1)[None], 3) if depthwise else (np.moveaxis(kernel, 1, -1), 0)
        operands = self._operands(step, operation, x, values, axis)
        return self._operator(op, step.name, operands, _last(step.shape), step.grid, conv)

    def _head(self, step: Step, operation: Dense, x: int) -> int:
        """The layer of logits in 16x8: the input less its zero point and the logits are int16, the bias is int64."""
        weights, grid = operation.weights, self._grid(x)
        assert grid is not None
        values = weights.values[:, self._columns[x]] if x in self._columns else weights.values
        wide = self._wide(f"{step.name}.wide", tuple(self._tensors[x].shape), grid.scale)
        self._append("QUANTIZE", [x], [wide], None)
        bias = self._constant(f"{step.name}.bias", weights.bias.astype(np.int64), weights.accumulator_scale)
        result = self._wide(f"{step.name}.logits", _last(step.shape), _HEADROOM * self._model.logit_peak / 32767)
        dense = schema.FullyConnectedOptionsT()
        dense.fusedActivationFunction = schema.ActivationFunctionType.RELU if operation.relu else 0
        self._append("FULLY_CONNECTED", [wide, self._weight(step.name, values, weights, 0), bias], [result], dense)
        logits = self._tensor(step.name, _last(step.shape), None)
        self._append("DEQUANTIZE", [result], [logits], None)
        return logits

    def _wide(self, name: str, shape: tuple[int, ...], scale: float) -> int:
        """An int16 tensor, symmetric as the runtime asks."""
        index = self._tensor(name, shape, None)
        tensor = self._tensors[index]
        tensor.type, tensor.quantization = _TYPES.INT16, _quantization([scale], [0], 0)
        return index

    def _operands(self, step: Step, operation: Convolution | Dense, x: int, values: Array, axis: int) -> list[int]:
        """Input, weights and bias of a layer: integers where its result lies on a grid, else floats on the same grids."""
        weights, name = operation.weights, step.name
        if step.grid is not None:
            return [x, self._weight(name, values, weights, axis), self._bias(name, operation, step.grid)]
        assert weights.scale is not None
        x, bias = self._on_grid(name, x, None), self._constant(f"{name}.bias", weights.real()[1])
        if self._micro:
            scale = weights.scale.reshape([-1 if side == axis else 1 for side in range(values.ndim)])
            return [x, self._constant(f"{name}.weight", values * scale), bias]
        constant, weight = self._weight(name, values, weights, axis), self._tensor(f"{name}.float", tuple(values.shape), None)
        self._append("DEQUANTIZE", [constant], [weight], None)
        return [x, weight, bias]

    def _weight(self, name: str, values: Array, weights: Weights, axis: int) -> int:
        index = self._constant(f"{name}.weight", values, weights.scale, axis)
        if (values.ndim > 2 or not self._micro) and np.abs(values).max(initial=0) <= _SMALL:
            tensor = self._tensors[index]
            tensor.type, self._buffers[tensor.buffer].data = _TYPES.INT4, _nibbles(values)
        return index

    def _bias(self, name: str, operation: Convolution | Dense, grid: ActivationRange) -> int:
        weights = operation.weights
        values = fixed_point_bias(weights, grid) if self._micro and operation.relu else weights.bias
        return self._constant(f"{name}.bias", values, weights.accumulator_scale, 0)

    def _padded(
        self, step: Step, x: int, spans: list[int], stride: tuple[int, ...], padding: tuple[int, ...], filler: float
    ) -> tuple[int, bool]:  # fmt: skip
        """``x`` with the padding that the operator cannot do itself, and whether it does it (``SAME``)."""
        shape, out = self._tensors[x].shape[1:3], _last(step.shape)[1:3]
        sides = list(zip(shape, out, spans, stride, padding, strict=True))
        totals = [max((given - 1) * s + span - size, 0) for size, given, span, s, _ in sides]
        if not any(totals):
            return x, False
        same = all(
            given == -(-size // s) and total // 2 == p for (size, given, _, s, p), total in zip(sides, totals, strict=True)
        )  # fmt: skip
        if same:
            return x, True
        before, after = zip(*((p, max(total - p, 0)) for (*_, p), total in zip(sides, totals, strict=True)), strict=True)
        pads = np.array([[0, 0], *zip(before, after, strict=True), [0, 0]], np.int32)
        grid = self._grid(x)
        padded = (1, *(size + b + a for size, b, a in zip(shape, before, after, strict=True)), self._tensors[x].shape[3])
        constants = [self._constant(f"{step.name}.pads", pads)]
        if filler:
            worst = np.array([-128], np.int8) if grid else np.array([filler], np.float32)
            constants.append(self._constant(f"{step.name}.filler", worst))
            if grid:  # the operator refuses a filler on another grid than its input's
                self._tensors[constants[-1]].quantization = _quantization([grid.scale], [grid.zero_point], 0)
        return self._operator("PADV2" if filler else "PAD", step.name, [x, *constants], padded, grid, None), False

    def _pool(self, step: Step, operation: Pool, x: int) -> int:
        if operation.kind == "average" and step.grid is None:  # the operators cannot turn integers into floats
            x = self._on_grid(step.name, x, None)
        grid, lanes = self._grid(x), 2 - len(operation.kernel)
        kernel, stride, padding = ((*[usual] * lanes, *given) for usual, given in (
            (1, operation.kernel), (1, operation.stride), (0, operation.padding)))  # fmt: skip
        if operation.kind == "average" and not any(padding) and tuple(self._tensors[x].shape[1:3]) == kernel:
            axes, options = self._constant(f"{step.name}.axes", np.array([1, 2], np.int32)), schema.ReducerOptionsT()
            options.keepDims = True
            return self._operator("MEAN", step.name, [x, axes], _last(step.shape), step.grid if grid else None, options)
        average = operation.kind == "average"
        x, same = self._padded(step, x, list(kernel), stride, padding, 0 if average else -float(np.finfo(np.float32).max))
        if average and any(padding) and same == operation.count_padding:
            raise Refused(f"export: layer {step.name}: LiteRT has no such average over padding (count_include_pad)")
        pool = schema.Pool2DOptionsT()
        pool.padding = schema.Padding.SAME if same else schema.Padding.VALID
        (pool.filterHeight, pool.filterWidth), (pool.strideH, pool.strideW) = kernel, stride
        return self._operator("AVERAGE_POOL_2D" if average else "MAX_POOL_2D", step.name, [x], _last(step.shape), grid, pool)

    def _flatten(self, step: Step, position: int, x: int) -> int:
        shape = tuple(self._tensors[x].shape)
        if len(shape) == 4 and shape[3] > 1 and shape[1] * shape[2] > 1:
            users = list(self._model.users(position))
            if users and all(isinstance(user.operation, Dense) for user in users) and self._grid(x) == step.grid:
                result = self._reshape(step.name, x, (1, int(np.prod(shape))))
                self._columns[result] = np.moveaxis(np.arange(np.prod(shape)).reshape(shape[3], *shape[1:3]), 0, -1).reshape(-1)
                return result
            order = self._constant(f"{step.name}.order", np.array([0, 3, 1, 2], np.int32))
            x = self._operator("TRANSPOSE", step.name, [x, order], (1, shape[3], *shape[1:3]), self._grid(x), None)
        return self._reshape(step.name, x, (1, int(np.prod(shape))))

    def _group_norm(self, step: Step, operation: GroupNorm, x: int) -> int:
        shape = _last(step.shape)
        channels = shape[-1]
        grouped = (1, int(np.prod(shape)) // channels, operation.groups, channels // operation.groups)
        name, axes = step.name, self._constant(f"{step.name}.axes", np.array([1, 3], np.int32))
        few = (1, 1, operation.groups, 1)

        def operator(op: str, inputs: list[int], result: tuple[int, ...], options: Any = None) -> int:
            return self._operator(op, name, inputs, result, None, options)

        def mean(value: int) -> int:
            options = schema.ReducerOptionsT()
            options.keepDims = True
            return operator("MEAN", [value, axes], few, options)

        x = self._reshape(name, x, grouped)
        centre = mean(x)
        variance = mean(operator("SQUARED_DIFFERENCE", [x, centre], grouped, schema.SquaredDifferenceOptionsT()))
        epsilon = self._constant(f"{name}.epsilon", np.array([operation.epsilon], np.float32))
        inverse = operator("RSQRT", [operator("ADD", [variance, epsilon], few, schema.AddOptionsT())], few)
        centred = operator("SUB", [x, centre], grouped, schema.SubOptionsT())
        x = self._reshape(name, operator("MUL", [centred, inverse], grouped, schema.MulOptionsT()), shape)
        for op, vector, options in (("MUL", operation.weight, schema.MulOptionsT()), ("ADD", operation.bias, schema.AddOptionsT())):
            x = operator(op, [x, self._constant(f"{name}.{op}", vector)], shape, options)
        return x

    def _reshape(self, name: str, x: int, shape: tuple[int, ...]) -> int:
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        target = self._constant(f"{name}.shape", np.array(shape, np.int32))
        return self._operator("RESHAPE", name, [x, target], shape, self._grid(x), options)

    def _on_grid(self, name: str, x: int, grid: ActivationRange | None) -> int:
        if self._grid(x) == grid:
            return x
        result = self._tensor(f"{name}.grid", tuple(self._tensors[x].shape), grid)
        self._append("QUANTIZE" if grid else "DEQUANTIZE", [x], [result], None)
        return result

    def _operator(
        self, op: str, name: str, inputs: list[int], shape: tuple[int, ...], grid: ActivationRange | None, options: Any
    ) -> int:  # fmt: skip
        result = self._tensor(name, shape, grid)
        self._append(op, inputs, [result], options)
        return result

    def _append(self, op: str, inputs: list[int], outputs: list[int], options: Any) -> None:
        if op not in self._codes:
            self._codes.append(op)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self._codes.index(op), inputs, outputs
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, kind), options
        self._operators.append(operator)

    def _tensor(self, name: str, shape: tuple[int, ...], grid: ActivationRange | None) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = f"{name}.{len(self._tensors)}" if self._tensors else name, list(shape), 0
        tensor.type = _TYPES.INT8 if grid else _TYPES.FLOAT32
        tensor.quantization = _quantization([grid.scale], [grid.zero_point], 0) if grid else None
        self._tensors.append(tensor)
        self._grids.append(grid)
        return len(self._tensors) - 1

    def _constant(self, name: str, values: Array, scale: Array | None = None, axis: int = 0) -> int:
        index = self._tensor(name, tuple(values.shape), None)
        tensor = self._tensors[index]
        tensor.type, tensor.buffer = _KINDS[values.dtype], len(self._buffers)
        tensor.quantization = None if scale is None else _quantization(list(scale), [0] * len(scale), axis)
        self._buffers.append(_buffer(np.ascontiguousarray(values).tobytes()))
        return index

    def _entry(self, name: str, data: bytes) -> Any:
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, len(self._buffers)
        self._buffers.append(_buffer(data))
        return entry


def fixed_point_bias(weights: Weights, grid: ActivationRange) -> npt.NDArray[np.int32]:
    """Biases of a rectified layer for kernels that round twice: the accumulator times a mantissa in [0.5, 1), then the quotient by
    a power of two (TensorFlow Lite's reference kernels; gemmlowp, doc/quantization.md). The second rounds up what the first has
    brought to a half: in the mean the result is too large by half a unit of the first, by which these biases are smaller."""
    mantissa, exponent = np.frexp(weights.accumulator_scale.astype(np.float64) / grid.scale)
    half = np.where(exponent < 0, 0.5 / mantissa, 0.0)
    bias = np.rint(weights.real()[1] / weights.accumulator_scale.astype(np.float64) - half)
    return np.clip(bias, -(2**31), 2**31 - 1).astype(np.int32)


def _nibbles(values: Array) -> bytes:
    """Integers from -8 to 7 in two's complement, two a byte, the first in the low half."""
    flat = values.reshape(-1)
    low, high = np.concatenate([flat, np.zeros(len(flat) % 2, np.int8)]).reshape(-1, 2).T & 15
    return bytes((low | high << 4).astype(np.uint8).tobytes())


def _requantizes(step: Step) -> bool:
    return isinstance(step.operation, Elementwise) and step.operation.kind == "requantize"


def _last(shape: tuple[int, ...], *, flat: bool = False) -> tuple[int, ...]:
    """[channels, *space] of one example as [1, height, width, channels]; ``flat`` keeps windows [1, steps, channels]."""
    if len(shape) == 1:
        return (1, *shape)
    space = shape[1:] if len(shape) == 3 or flat else (1, *shape[1:])
    return (1, *space, shape[0])


def _quantization(scale: list[float], zero_point: list[int], axis: int) -> Any:
    quantization = schema.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint, quantization.quantizedDimension = scale, zero_point, axis
    return quantization


def _buffer(data: bytes) -> _Buffer:
    buffer = _Buffer()
    buffer.data = data
    return buffer


def _code(name: str) -> Any:
    code = schema.OperatorCodeT()
    number = getattr(_OPS, name)
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), _VERSIONS.get(name, 1)
    return code
