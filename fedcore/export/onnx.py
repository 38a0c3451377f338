"""ONNX with explicit quantization (QDQ), which ONNX Runtime turns into integer kernels.

Operators and their quantization: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html. A quantized
value is written as QuantizeLinear and DequantizeLinear after the operator that makes it, and again after every operator that
only moves values (pooling by maximum, flatten), so that no float operator is left between two integer kernels.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fedcore.errors import Refused
from fedcore.quantization.layers import FakeQuantize, QuantLayer
from fedcore.quantization.wire import ActivationRange, quantize_rows

__all__ = ["integer_operators", "onnx_logits", "to_onnx"]

_OPSET, _IR = 17, 8
_MOVING = (nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity)
_INTEGER = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "QuantizeLinear", "DequantizeLinear")


def to_onnx(model: nn.Module, input_shape: tuple[int, ...], metadata: Mapping[str, str]) -> bytes:
    """The model, with its current parameters and frozen ranges, as an ONNX file; input [batch, *input_shape], output logits.

    Raises:
        Refused: control flow, or an operator that this exporter does not know; the line names it and its layer.
    """
    graph = _trace(model, input_shape)
    writer = _Writer(model, _demanded_ranges(graph, model))
    for node in graph.nodes:
        writer.add(node)
    batch: list[str | int | None] = ["batch", *input_shape]
    body = helper.make_graph(
        writer.nodes, "fedcore",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, batch)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
        writer.constants,
    )  # fmt: skip
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="fedcore")
    helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def onnx_logits(data: bytes, x: npt.NDArray[np.float32], batch: int = 256) -> npt.NDArray[np.float32]:
    """Run the file in ONNX Runtime on one thread; logits [n, classes] of x [n, ...]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantLayer, FakeQuantize)) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.Graph:
    """The model's graph, with the shape of every value for a batch of two in ``meta``."""
    training = model.training
    try:
        graph = _Tracer().trace(model.eval())
        with torch.no_grad():
            ShapeProp(fx.GraphModule(model, graph)).propagate(torch.zeros(2, *input_shape))
        return graph
    except Exception as error:  # torch.fx raises its own and the model's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"ONNX export: the model cannot be traced (control flow on values?): {reason}") from error
    finally:
        model.train(training)


def _demanded_ranges(graph: fx.Graph, model: nn.Module) -> dict[fx.Node, ActivationRange]:
    """The grid on which each value is wanted, where all its users agree on one; users come later, so walk backwards."""
    modules = dict(model.named_modules())
    wanted: dict[fx.Node, ActivationRange] = {}
    for node in reversed(list(graph.nodes)):
        asked = [_asked(user, modules, wanted) for user in node.users]
        if asked and asked[0] is not None and all(span == asked[0] for span in asked):
            wanted[node] = asked[0]
    return wanted


def _asked(user: fx.Node, modules: Mapping[str, nn.Module], wanted: Mapping[fx.Node, ActivationRange]) -> ActivationRange | None:
    module = modules.get(str(user.target)) if user.op == "call_module" else None
    if isinstance(module, QuantLayer):
        return module.input.frozen
    if isinstance(module, FakeQuantize):
        return module.frozen
    moves = isinstance(module, _MOVING) or (user.op == "call_function" and user.target is torch.flatten)
    return wanted.get(user) if moves else None


@dataclass(frozen=True)
class _Value:
    """An ONNX value, and the grid it lies on, if it was quantized."""

    name: str
    span: ActivationRange | None = None


class _Writer:
    """Appends ONNX nodes for the nodes of a traced model."""

    def __init__(self, model: nn.Module, wanted: Mapping[fx.Node, ActivationRange]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._modules, self._wanted = dict(model.named_modules()), wanted
        self._values: dict[fx.Node, _Value] = {}

    def add(self, node: fx.Node) -> None:
        """Write one node; its result is put on the grid that its users want."""
        if node.op == "output":
            (result,) = node.args
            if not isinstance(result, fx.Node):
                raise Refused("ONNX export: the model must return one tensor")
            self._emit("Identity", [self._values[result].name], "logits")
            return
        if node.op == "placeholder":
            value = _Value("input")
        elif node.op == "call_module":
            value = self._module(node, self._modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            value = self._function(node)
        else:
            raise Refused(f"ONNX export: {node.target}: parameters used outside of a layer cannot be exported")
        self._values[node] = self._on_grid(value, self._wanted[node]) if node in self._wanted else value

    def _module(self, node: fx.Node, module: nn.Module) -> _Value:
        x, name, rank = self._values[_first(node)], f"{node.name}.value", len(_first(node).meta["tensor_meta"].shape)
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(f"ONNX export: layer {node.target} has hooks, which no exporter sees")
        if isinstance(module, FakeQuantize):
            return self._on_grid(x, module.frozen) if module.frozen else x
        if isinstance(module, nn.Dropout | nn.Identity):
            return x
        if isinstance(module, nn.Conv1d | nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            raise Refused(f"ONNX export: layer {node.target}: only explicit zero padding is supported")
        if isinstance(module, QuantLayer | nn.Linear | nn.Conv1d | nn.Conv2d):
            if isinstance(module, nn.Linear) and rank != 2:
                raise Refused(f"ONNX export: layer {node.target}: Linear on {rank} dimensions is not supported; flatten before it")
            return self._weighted(x, module, name)
        if isinstance(module, nn.GroupNorm):
            return self._group_norm(x, module, name, rank)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) not in ((1, -1), (1, rank - 1)):
            raise Refused(f"ONNX export: layer {node.target}: only Flatten(1, -1) is supported")
        if getattr(module, "dilation", 1) not in (1, (1, 1)) or getattr(module, "divisor_override", None) is not None:
            raise Refused(f"ONNX export: layer {node.target}: pooling with dilation or divisor_override is not supported")
        for kind, write in _SIMPLE.items():
            if isinstance(module, kind):
                op, attributes = write(module)
                return self._emit(op, [x.name], name, **attributes)
        raise Refused(f"ONNX export: layer {node.target} is a {type(module).__name__}, which this exporter does not know")

    def _function(self, node: fx.Node) -> _Value:
        inputs = [self._values[argument] for argument in node.args if isinstance(argument, fx.Node)]
        if node.kwargs:
            raise Refused(
                f"ONNX export: operator {node.target} ({node.name}) has keyword arguments, which this exporter does not know"
            )
        if node.target in (torch.flatten, "flatten") and node.args[1:] == (1,):
            return self._emit("Flatten", [inputs[0].name], node.name, axis=1)
        if node.target in (torch.relu, nn.functional.relu, "relu"):
            return self._emit("Relu", [inputs[0].name], node.name)
        if node.target in (operator.add, torch.add) and len(inputs) == 2:
            return self._emit("Add", [value.name for value in inputs], node.name)
        raise Refused(f"ONNX export: operator {node.target} ({node.name}) is one that this exporter does not know")

    def _weighted(self, x: _Value, layer: nn.Module, name: str) -> _Value:
        weight = _numpy(layer.weight)
        bias = _numpy(layer.bias) if isinstance(layer.bias, nn.Parameter) else np.zeros(len(weight), np.float32)
        if isinstance(layer, QuantLayer):
            integers, scale = quantize_rows(weight)
            if layer.input.frozen:
                x = self._on_grid(x, layer.input.frozen)
            operands = [x.name, self._dequantized(f"{name}.weight", integers, scale), self._bias(name, bias, scale, x.span)]
        else:
            operands = [x.name, self._constant(f"{name}.weight", weight), self._constant(f"{name}.bias", bias)]
        if isinstance(layer, nn.Linear):
            return self._emit("Gemm", operands, name, transB=1)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        return self._emit(
            "Conv", operands, name, strides=layer.stride, dilations=layer.dilation, group=layer.groups,
            kernel_shape=layer.kernel_size, pads=[*layer.padding, *layer.padding],
        )  # fmt: skip

    def _bias(self, name: str, bias: npt.NDArray[Any], scale: npt.NDArray[Any], span: ActivationRange | None) -> str:
        if span is None:
            return self._constant(f"{name}.bias", bias)
        product = (np.float32(span.scale) * scale).astype(np.float32)
        integers = np.clip(np.rint(bias / product.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
        return self._dequantized(f"{name}.bias", integers, product)

    def _group_norm(self, x: _Value, layer: nn.GroupNorm, name: str, rank: int) -> _Value:
        """Normalise [batch, groups, rest], then scale and shift per channel; stays in float."""
        shape = self._emit("Shape", [x.name], f"{name}.shape")
        groups = self._constant(f"{name}.groups", np.array([0, layer.num_groups, -1], np.int64))
        grouped = self._emit("Reshape", [x.name, groups], f"{name}.grouped")
        ones, zeros = (
            self._constant(f"{name}.{k}", np.full(layer.num_groups, v, np.float32)) for k, v in (("ones", 1), ("zeros", 0))
        )
        normal = self._emit("InstanceNormalization", [grouped.name, ones, zeros], f"{name}.normal", epsilon=layer.eps)
        value = self._emit("Reshape", [normal.name, shape.name], f"{name}.restored")
        for op, parameter in (("Mul", layer.weight), ("Add", layer.bias)) if layer.affine else ():
            per_channel = _numpy(parameter).reshape(-1, *[1] * (rank - 2))
            value = self._emit(op, [value.name, self._constant(f"{name}.{op}", per_channel)], f"{name}.{op}.out")
        return value

    def _on_grid(self, value: _Value, span: ActivationRange) -> _Value:
        if value.span == span:
            return value
        name = f"{value.name}.{len(self.nodes)}"
        scale = self._constant(f"{name}.scale", np.array(span.scale, np.float32))
        zero = self._constant(f"{name}.zero_point", np.array(span.zero_point, np.int8))
        quantized = self._emit("QuantizeLinear", [value.name, scale, zero], f"{name}.q")
        return _Value(self._emit("DequantizeLinear", [quantized.name, scale, zero], f"{name}.dq").name, span)

    def _dequantized(self, name: str, integers: npt.NDArray[Any], scale: npt.NDArray[Any]) -> str:
        zeros = np.zeros(len(scale), integers.dtype)
        parts = [self._constant(f"{name}.{k}", v) for k, v in (("int", integers), ("scale", scale), ("zero_point", zeros))]
        return self._emit("DequantizeLinear", parts, f"{name}.dq", axis=0).name

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def _emit(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> _Value:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes))
        return _Value(output)


def _pool(kind: str) -> Callable[[Any], tuple[str, dict[str, Any]]]:
    def write(layer: Any) -> tuple[str, dict[str, Any]]:
        rank = 1 if isinstance(layer, nn.MaxPool1d | nn.AvgPool1d) else 2
        kernel, stride, padding = (_tuple(v, rank) for v in (layer.kernel_size, layer.stride, layer.padding))
        attributes = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding], "ceil_mode": int(layer.ceil_mode)}
        if kind == "AveragePool":
            attributes["count_include_pad"] = int(layer.count_include_pad)
        return kind, attributes

    return write


def _global_pool(layer: Any) -> tuple[str, dict[str, Any]]:
    if set(_tuple(layer.output_size, 1)) != {1}:
        raise Refused("ONNX export: adaptive pooling is supported to one value per channel only")
    return "GlobalAveragePool", {}


_SIMPLE: dict[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    nn.ReLU: lambda _: ("Relu", {}),
    nn.Tanh: lambda _: ("Tanh", {}),
    nn.Sigmoid: lambda _: ("Sigmoid", {}),
    nn.Flatten: lambda layer: ("Flatten", {"axis": layer.start_dim}),
    (nn.MaxPool1d, nn.MaxPool2d): _pool("MaxPool"),
    (nn.AvgPool1d, nn.AvgPool2d): _pool("AveragePool"),
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d): _global_pool,
}


def _tuple(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * rank


def _first(node: fx.Node) -> fx.Node:
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise Refused(f"ONNX export: layer {node.target} is called without a tensor")
    return node.args[0]


def _numpy(parameter: Any) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(parameter.detach().cpu().numpy(), np.float32)
