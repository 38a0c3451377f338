"""ONNX with explicit quantization (QDQ), which ONNX Runtime turns into integer kernels.

Operators and their quantization: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html. A quantized
value is written as QuantizeLinear and DequantizeLinear after the operator that makes it, and again after every operator that
only moves values (pooling by maximum, flatten), so that no float operator is left between two integer kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fedcore.export.artefact import Contents, Facts, Logits, Tensor
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

if TYPE_CHECKING:
    from torch import nn

__all__ = ["describe", "integer_operators", "load", "onnx_bytes", "onnx_logits", "to_onnx", "write"]

_OPSET, _IR = 17, 8
_LAYERS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul")
_INTEGER = ("QLinear", *_LAYERS)  # with sums, averages and activations
_CONVERTING = (
    "QuantizeLinear", "DequantizeLinear", "Flatten", "Reshape", "Identity", "Shape", "MaxPool", "NhwcMaxPool", "Transpose",
    "Squeeze", "Unsqueeze", "ReorderInput", "ReorderOutput",
)  # fmt: skip
_KINDS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "add": "Add", "requantize": "Identity"}
_FILE = "model.onnx"


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.onnx``: float input and logits, integers between them."""
    path = folder / _FILE
    path.write_bytes(onnx_bytes(model, facts.texts()))
    return path


def load(path: Path, threads: int) -> Logits:
    """Open the file in ONNX Runtime."""
    session = _session(path.read_bytes(), threads)
    return lambda x: np.asarray(session.run(None, {"input": x})[0])


def describe(path: Path) -> Contents:
    """What the file holds; operators are those of the graph that ONNX Runtime executes, integer ones are convolutions and dense
    layers."""
    data = path.read_bytes()
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto)
    operators = integer_operators(data)
    integer = sum(count for kind, count in operators.items() if kind.startswith(_LAYERS))
    floating = sum(count for kind, count in operators.items() if not kind.startswith(_INTEGER) and kind not in _CONVERTING)
    stored = [TensorProto.DataType.Name(constant.data_type).lower() for constant in proto.graph.initializer]
    kinds = ", ".join(f"{stored.count(kind)} {kind}" for kind in sorted(set(stored)))
    return Contents(
        "onnx", len(data), tuple(map(_tensor, proto.graph.input)), tuple(map(_tensor, proto.graph.output)), operators, integer,
        floating, f"QDQ, constants: {kinds}",
        {entry.key: entry.value for entry in proto.metadata_props},
    )  # fmt: skip


def to_onnx(model: nn.Module, input_shape: tuple[int, ...], metadata: Mapping[str, str]) -> bytes:
    """The model, with its current parameters and frozen ranges, as an ONNX file; input [batch, *input_shape], output logits.

    Raises:
        Refused: control flow, or an operator that this exporter does not know; the line names it and its layer.
    """
    from fedcore.quantization.lower import lower  # not for those who only run files: it imports torch

    return onnx_bytes(lower(model, input_shape), metadata)


def onnx_bytes(
    model: IntegerModel, metadata: Mapping[str, str], batch: int | str = "batch", *, in_float: bool = False
) -> bytes:  # fmt: skip
    """The integer model as an ONNX file; input [batch, *input_shape], output logits, both float32.

    With ``in_float`` the weights are the rounded ones as floats, and values are clipped to the ends of their grids but not rounded.
    """
    writer = _Writer(in_float)
    for position, step in enumerate(model.steps, 1):
        writer.add(step, position)
    writer.emit("Identity", [writer.values[-1]], "logits")
    shape: list[str | int | None] = [batch, *model.input_shape]
    body = helper.make_graph(
        writer.nodes, "fedcore",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, model.classes])],
        writer.constants,
    )  # fmt: skip
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="fedcore")
    helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def onnx_logits(data: bytes, x: npt.NDArray[np.float32], batch: int = 256) -> npt.NDArray[np.float32]:
    """Run the file in ONNX Runtime on one thread; logits [n, classes] of x [n, ...]."""
    session = _session(data, 1)
    return np.concatenate([session.run(None, {"input": x[i : i + batch]})[0] for i in range(0, len(x), batch)])


def integer_operators(data: bytes) -> dict[str, int]:
    """How often each operator stands in the graph that ONNX Runtime really executes, after its optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3  # the file holds kernels of this processor, which is what is asked for
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    kinds = [node.op_type for node in optimized.graph.node]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _session(data: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(side.dim_param or side.dim_value for side in kind.shape.dim)
    return Tensor(value.name, shape, TensorProto.DataType.Name(kind.elem_type).lower())


class _Writer:
    """Appends ONNX nodes for the steps of an integer model; ``values`` are names by position."""

    def __init__(self, in_float: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.values = ["input"]
        self._in_float = in_float

    def add(self, step: Step, position: int) -> None:
        """Write one step; its result is put on the step's grid."""
        name, inputs, operation = f"{position}.{step.name}", [self.values[place] for place in step.inputs], step.operation
        if isinstance(operation, Convolution | Dense):
            value = self._weighted(inputs[0], operation, name)
        elif isinstance(operation, Pool):
            value = self._pool(inputs[0], operation, name)
        elif isinstance(operation, Flatten):
            value = self.emit("Flatten", inputs, name, axis=1)
        elif isinstance(operation, GroupNorm):
            value = self._group_norm(inputs[0], operation, name, step.shape)
        elif isinstance(operation, Elementwise) and operation.kind == "requantize":
            (value,) = inputs
        else:
            value = self.emit(_KINDS[operation.kind], inputs, name)
        self.values.append(self._quantized(value, step.grid, name) if step.grid else value)

    def emit(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes))
        return output

    def _weighted(self, x: str, operation: Convolution | Dense, name: str) -> str:
        weights = operation.weights
        operands = [x, self._weight(weights, name), self._bias(weights, name)]
        output = f"{name}.before" if operation.relu else name
        if isinstance(operation, Dense):
            self.emit("Gemm", operands, output, transB=1)
        else:
            self.emit(
                "Conv", operands, output, strides=operation.stride, dilations=operation.dilation, group=operation.groups,
                kernel_shape=weights.values.shape[2:], pads=[*operation.padding, *operation.padding],
            )  # fmt: skip
        return self.emit("Relu", [output], name) if operation.relu else output

    def _weight(self, weights: Weights, name: str) -> str:
        if weights.scale is None or self._in_float:
            return self._constant(f"{name}.weight", weights.real()[0])
        return self._dequantized(f"{name}.weight", weights.values, weights.scale)

    def _bias(self, weights: Weights, name: str) -> str:
        if not weights.integer or self._in_float:
            return self._constant(f"{name}.bias", weights.real()[1])
        return self._dequantized(f"{name}.bias", weights.bias, weights.accumulator_scale)

    def _pool(self, x: str, operation: Pool, name: str) -> str:
        attributes: dict[str, Any] = {
            "kernel_shape": operation.kernel, "strides": operation.stride, "pads": [*operation.padding, *operation.padding],
            "ceil_mode": int(operation.ceil),
        }  # fmt: skip
        if operation.kind == "max":
            return self.emit("MaxPool", [x], name, **attributes)
        return self.emit("AveragePool", [x], name, count_include_pad=int(operation.count_padding), **attributes)

    def _group_norm(self, x: str, operation: GroupNorm, name: str, shape: tuple[int, ...]) -> str:
        """Normalise [batch, groups, rest], then scale and shift per channel; stays in float."""
        restored = self._constant(f"{name}.shape", np.array([0, *shape], np.int64))  # 0 keeps the batch
        groups = self._constant(f"{name}.groups", np.array([0, operation.groups, -1], np.int64))
        grouped = self.emit("Reshape", [x, groups], f"{name}.grouped")
        ones, zeros = (
            self._constant(f"{name}.{k}", np.full(operation.groups, v, np.float32)) for k, v in (("ones", 1), ("zeros", 0))
        )
        normal = self.emit("InstanceNormalization", [grouped, ones, zeros], f"{name}.normal", epsilon=operation.epsilon)
        value = self.emit("Reshape", [normal, restored], f"{name}.restored")
        for op, parameter in (("Mul", operation.weight), ("Add", operation.bias)):
            per_channel = parameter.reshape(-1, *[1] * (len(shape) - 1))
            value = self.emit(op, [value, self._constant(f"{name}.{op}", per_channel)], f"{name}.{op}.out")
        return value

    def _quantized(self, value: str, grid: ActivationRange, name: str) -> str:
        if self._in_float:
            ends = ((end - grid.zero_point) * grid.scale for end in (-128, 127))
            limits = [self._constant(f"{name}.{k}", np.array(v, np.float32)) for k, v in zip(("low", "high"), ends, strict=True)]
            return self.emit("Clip", [value, *limits], f"{name}.clipped")
        scale = self._constant(f"{name}.scale", np.array(grid.scale, np.float32))
        zero = self._constant(f"{name}.zero_point", np.array(grid.zero_point, np.int8))
        quantized = self.emit("QuantizeLinear", [value, scale, zero], f"{name}.q")
        return self.emit("DequantizeLinear", [quantized, scale, zero], f"{name}.dq")

    def _dequantized(self, name: str, integers: npt.NDArray[Any], scale: npt.NDArray[Any]) -> str:
        zeros = np.zeros(len(scale), integers.dtype)
        parts = [self._constant(f"{name}.{k}", v) for k, v in (("int", integers), ("scale", scale), ("zero_point", zeros))]
        return self.emit("DequantizeLinear", parts, f"{name}.dq", axis=0)

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name
