"""From a torch model with frozen ranges to the integer model that every exporter writes."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fedcore.errors import Refused
from fedcore.quantization.integer import (
    Convolution,
    Dense,
    Elementwise,
    Flatten,
    GroupNorm,
    IntegerModel,
    Operation,
    Pool,
    Step,
    Weights,
)  # fmt: skip
from fedcore.quantization.layers import FakeQuantize, QuantLayer
from fedcore.quantization.wire import ActivationRange, quantize_rows

__all__ = ["lower", "narrow_rows"]

_MOST = 2.0**30  # steps of the accumulator in a bias: int32 with room for the sums
_FINE = 2.0**15  # and as many as a row of zeros has use for
_MOVING = (nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity)
_PASSING = (nn.Dropout, nn.Identity)
_ACTIVATIONS: dict[type[nn.Module], Literal["relu", "tanh", "sigmoid"]] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)
_KNOWN = "Linear, Conv1d, Conv2d, ReLU, Tanh, Sigmoid, MaxPool, AvgPool, AdaptiveAvgPool, GroupNorm, Flatten, Dropout, Identity"


def lower(model: nn.Module, input_shape: tuple[int, ...], *, weight_bits: int = 8) -> IntegerModel:
    """The model, with its current parameters and frozen ranges, for inputs [n, *input_shape].

    A value is put on the grid that its users ask for as early as possible: values that pooling by maximum or a flattening only
    moves are int8 already. A rectifier behind a layer with weights becomes part of it. Layers without ranges stay in float.
    Weights of ``weight_bits`` = 4 take the integers from -7 to 7. A convolution that gives the logits and covers its whole input
    is a dense layer, of which runtimes give more than eight bits. A row of weights that could not hold its bias in int32 has a
    larger scale than the fake-quantized layer's; zeros stay zeros, other weights are small against such a bias.

    Raises:
        Refused: control flow, or an operator that the integer model does not have; the line names it and its layer.
    """
    graph = _trace(model, input_shape)
    writer = _Steps(model, weight_bits, _demanded_ranges(graph, dict(model.named_modules())))
    for node in graph.nodes:
        writer.add(node)
    return _with_dense_head(IntegerModel(input_shape, tuple(writer.steps)))


def _with_dense_head(model: IntegerModel) -> IntegerModel:
    """The model with a last convolution over its whole input, then flattened, as a flattening and a dense layer: the same sums."""
    layer, last = (None, None, *model.steps)[-2:]
    if layer is None or last is None or not isinstance(last.operation, Flatten) or last.inputs != (len(model.steps) - 1,):
        return model
    operation, shape = layer.operation, model.shape(layer.inputs[0])
    if not isinstance(operation, Convolution) or operation.groups > 1 or any(operation.padding) or layer.grid != last.grid:
        return model
    values = operation.weights.values
    if values.shape[2:] != shape[1:]:
        return model
    weights = dataclasses.replace(operation.weights, values=values.reshape(len(values), -1))
    flat = Step(last.name, Flatten(), layer.inputs, (math.prod(shape),), model.grid(layer.inputs[0]))
    dense = Step(layer.name, Dense(weights, operation.relu), last.inputs, last.shape, last.grid)
    return dataclasses.replace(model, steps=(*model.steps[:-2], flat, dense))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantLayer, FakeQuantize)) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor; torch's own ShapeProp imports sympy for it, half a second at the end of each run."""

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter has it, and ``n.meta["shape"]``."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value


def _trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.Graph:
    """The model's graph, with the shape of every value for a batch of two in ``meta``."""
    training = model.training
    try:
        graph = _Tracer().trace(model.eval())
        with torch.no_grad():
            _Shapes(fx.GraphModule(model, graph)).run(torch.zeros(2, *input_shape))
        return graph
    except Exception as error:  # torch.fx raises its own and the model's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"export: the model cannot be traced (control flow on values?): {reason}") from error
    finally:
        model.train(training)


def _demanded_ranges(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, ActivationRange]:
    """The grid on which each value is wanted, where all its users agree on one; users come later, so walk backwards."""
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


class _Steps:
    """Appends steps for the nodes of a traced model."""

    def __init__(self, model: nn.Module, weight_bits: int, wanted: Mapping[fx.Node, ActivationRange]) -> None:
        self.steps: list[Step] = []
        self._bits = weight_bits
        self._modules, self._wanted = dict(model.named_modules()), wanted
        self._places: dict[fx.Node, int] = {}  # of values, as in Step.inputs

    def add(self, node: fx.Node) -> None:
        """Append one node; its result is put on the grid that its users want."""
        if node.op == "output":
            self._finish(node)
            return
        before = len(self.steps)
        if node.op == "placeholder":
            if self._places:
                raise Refused("export: the model must take one tensor")
            place = 0
        elif node.op == "call_module":
            place = self._module(node, self._modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            place = self._function(node)
        else:
            raise Refused(f"export: {node.target}: parameters used outside of a layer cannot be exported")
        span = self._wanted.get(node)
        if span and place == len(self.steps) > before and self._grid(place) is None:
            self.steps[-1] = dataclasses.replace(self.steps[-1], grid=span)
        elif span:
            place = self._on_grid(place, span, node)
        self._places[node] = place

    def _finish(self, node: fx.Node) -> None:
        (result,) = node.args
        if not isinstance(result, fx.Node) or self._places[result] != len(self.steps) or len(self.steps[-1].shape) != 1:
            raise Refused("export: the model must return one tensor of logits [batch, classes], its last result")

    def _grid(self, place: int) -> ActivationRange | None:
        return self.steps[place - 1].grid if place else None

    def _append(
        self, node: fx.Node, operation: Operation, places: tuple[int, ...], grid: ActivationRange | None = None
    ) -> int:  # fmt: skip
        name = str(node.target) if node.op == "call_module" else node.name
        self.steps.append(Step(name, operation, places, node.meta["shape"][1:], grid))
        return len(self.steps)

    def _on_grid(self, place: int, span: ActivationRange, node: fx.Node) -> int:
        if self._grid(place) == span:
            return place
        source = node if node.op == "placeholder" else _first(node)
        shape = self.steps[place - 1].shape if place else source.meta["shape"][1:]
        self.steps.append(Step(f"{node.name}.input", Elementwise("requantize"), (place,), shape, span))
        return len(self.steps)

    def _module(self, node: fx.Node, module: nn.Module) -> int:
        x, rank = self._places[_first(node)], len(_first(node).meta["shape"])
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(f"export: layer {node.target} has hooks, which no exporter sees")
        if isinstance(module, FakeQuantize):
            return self._on_grid(x, module.frozen, node) if module.frozen else x
        if isinstance(module, _PASSING):
            return x
        _check(node, module, rank)
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            if isinstance(module, QuantLayer) and module.input.frozen:
                x = self._on_grid(x, module.input.frozen, node)
            return self._append(node, _weighted(module, self._grid(x), self._bits), (x,))
        if isinstance(module, nn.ReLU):
            return self._relu(node, x)
        if type(module) in _ACTIVATIONS:
            return self._append(node, Elementwise(_ACTIVATIONS[type(module)]), (x,))
        if isinstance(module, nn.Flatten):
            return self._append(node, Flatten(), (x,), self._grid(x))
        if isinstance(module, nn.GroupNorm):
            return self._append(node, _group_norm(module), (x,))
        operation = _pool(module, _first(node).meta["shape"][2:])
        return self._append(node, operation, (x,), self._grid(x) if operation.kind == "max" else None)

    def _function(self, node: fx.Node) -> int:
        places = tuple(self._places[argument] for argument in node.args if isinstance(argument, fx.Node))
        if node.kwargs:
            raise Refused(f"export: operator {_operator(node)} ({node.name}) has keyword arguments, which no exporter knows")
        if node.target in (torch.flatten, "flatten") and node.args[1:] == (1,):
            return self._append(node, Flatten(), places, self._grid(places[0]))
        if node.target in (torch.relu, nn.functional.relu, "relu"):
            return self._relu(node, places[0])
        if node.target in (operator.add, torch.add) and len(places) == 2:
            shapes = {argument.meta["shape"] for argument in node.args if isinstance(argument, fx.Node)}
            if len(shapes) > 1:
                raise Refused(f"export: operator {_operator(node)} ({node.name}) on different shapes, which no exporter knows")
            return self._append(node, Elementwise("add"), places)
        raise Refused(f"export: operator {_operator(node)} ({node.name}) is one that the integer model does not have")

    def _relu(self, node: fx.Node, x: int) -> int:
        """Part of the layer before it, where nothing else uses that layer's result."""
        last = self.steps[-1] if self.steps else None
        alone = x == len(self.steps) and len(_first(node).users) == 1
        if last and alone and last.grid is None and isinstance(last.operation, Convolution | Dense):
            fused = dataclasses.replace(last.operation, relu=True)
            self.steps[-1] = dataclasses.replace(last, operation=fused, grid=self._wanted.get(node))
            return x
        return self._append(node, Elementwise("relu"), (x,))


def _check(node: fx.Node, module: nn.Module, rank: int) -> None:
    """Refuse what a known kind of layer can do and the integer model cannot say."""
    reason = None
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        reason = "only explicit zero padding is supported"
    elif isinstance(module, nn.Linear) and rank != 2:
        reason = f"Linear on {rank} dimensions is not supported; flatten before it"
    elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) not in ((1, -1), (1, rank - 1)):
        reason = "only Flatten(1, -1) is supported"
    elif isinstance(module, _POOLS) and (_dilated(module) or getattr(module, "divisor_override", None) is not None):
        reason = "pooling with dilation or divisor_override is not supported"
    elif isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and module.ceil_mode:
        reason = "average pooling with ceil_mode is not supported"
    elif isinstance(module, nn.MaxPool1d | nn.MaxPool2d) and module.return_indices:
        reason = "pooling that returns indices is not supported"
    elif isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d) and set(_tuple(module.output_size, 1)) != {1}:
        reason = "adaptive pooling is supported to one value per channel only"
    elif not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Flatten, nn.GroupNorm, *_ACTIVATIONS, *_POOLS,
                                 nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):  # fmt: skip
        raise Refused(f"export: layer {node.target} is a {type(module).__name__}, which the integer model does not have: {_KNOWN}")
    if reason:
        raise Refused(f"export: layer {node.target}: {reason}")


def _weighted(layer: nn.Module, grid: ActivationRange | None, bits: int) -> Convolution | Dense:
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    values = _numpy(layer.weight)
    bias = _numpy(layer.bias) if isinstance(layer.bias, nn.Parameter) else np.zeros(len(values), np.float32)
    weights = Weights(values, bias)
    if isinstance(layer, QuantLayer):
        integers, scale = quantize_rows(values) if bits == 8 else narrow_rows(values, bits)
        weights = Weights(integers, bias, scale)
        if layer.input.frozen and grid:
            integers, scale = _holding(bias, values, integers, scale, grid.scale)
            step = (np.float32(grid.scale) * scale).astype(np.float64)
            on_grid = np.clip(np.rint(bias / step), -(2**31), 2**31 - 1).astype(np.int32)
            weights = Weights(integers, on_grid, scale, grid.scale, bias)
    if isinstance(layer, nn.Linear):
        return Dense(weights)
    padding = tuple(int(side) for side in layer.padding)
    return Convolution(weights, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)


def _holding(
    bias: npt.NDArray[np.float32], values: npt.NDArray[np.float32], integers: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32], input_scale: float,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:  # fmt: skip
    """``integers`` and ``scale`` of the rows of ``values`` [out, ...], with a larger scale where ``bias`` [out] over the scale of
    the accumulator would not fit int32, and an ordinary one for rows of zeros, whose own is the smallest float."""
    empty = ~integers.reshape(len(integers), -1).any(axis=1)
    least = np.abs(bias) / (input_scale * np.where(empty, _FINE, _MOST))
    usual = scale.min(where=~empty, initial=np.inf)
    if np.isinf(usual):
        usual = least.max(initial=0.0) or 1.0
    wanted = np.maximum(np.where(empty, usual, scale), least).astype(np.float32)
    rounded = np.rint(values / wanted.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
    raised = (wanted > scale).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(raised, rounded, integers), np.maximum(wanted, scale)


def narrow_rows(values: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric integers of ``bits`` (for 4: from -7 to 7) and their scales, one per row of ``values`` [out, ...]."""
    largest = 2 ** (bits - 1) - 1
    peak = np.maximum(np.abs(values.reshape(len(values), -1)).max(axis=1), np.finfo(np.float32).tiny * np.float32(largest))
    scale = (peak / np.float32(largest)).astype(np.float32)
    return np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8), scale


def _group_norm(layer: nn.GroupNorm) -> GroupNorm:
    ones, zeros = np.ones(layer.num_channels, np.float32), np.zeros(layer.num_channels, np.float32)
    weight, bias = (_numpy(layer.weight), _numpy(layer.bias)) if layer.affine else (ones, zeros)
    return GroupNorm(layer.num_groups, layer.eps, weight, bias)


def _pool(layer: nn.Module, space: tuple[int, ...]) -> Pool:
    rank, still = len(space), (0,) * len(space)
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        return Pool("average", space, space, still)
    assert isinstance(layer, nn.MaxPool1d | nn.MaxPool2d | nn.AvgPool1d | nn.AvgPool2d)
    kernel, stride, padding = (_tuple(v, rank) for v in (layer.kernel_size, layer.stride, layer.padding))
    if isinstance(layer, nn.MaxPool1d | nn.MaxPool2d):
        return Pool("max", kernel, stride, padding, layer.ceil_mode)
    return Pool("average", kernel, stride, padding, count_padding=layer.count_include_pad)


def _dilated(layer: nn.Module) -> bool:
    return set(_tuple(getattr(layer, "dilation", 1), 1)) != {1}


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * rank


def _operator(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _first(node: fx.Node) -> fx.Node:
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise Refused(f"export: layer {node.target} is called without a tensor")
    return node.args[0]


def _numpy(parameter: Any) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(parameter.detach().cpu().numpy(), np.float32)
