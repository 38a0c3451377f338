"""From a torch module to the flat list of layers that the generator knows, with static shapes.

Shapes are [channels, height, width]; a window of sensor data [channels, steps] has height 1, a vector [n] is [n, 1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedcore.errors import Refused
from fedcore.models.residual import Residual
from fedcore.quantization.layers import FakeQuantize, QuantConv1d, QuantConv2d, QuantLinear

__all__ = [
    "Activation",
    "Convolution",
    "FullyConnected",
    "Layer",
    "Network",
    "Normalisation",
    "Pool",
    "Quantizer",
    "Shape",
    "Sum",
    "Unsupported",
    "leaves",
    "lower",
]

Shape = tuple[int, int, int]
Pair = tuple[int, int]


class Unsupported(Refused):
    """The generator cannot do a model; the text names the layer."""


@dataclass(frozen=True)
class Convolution:
    """Cross-correlation with zero padding; ``depthwise``: one filter per channel, else every filter sees all channels."""

    name: str
    source: Shape
    shape: Shape
    kernel: Pair
    stride: Pair
    padding: Pair
    depthwise: bool
    bias: bool
    rounded: bool  # weights are fake-quantized


@dataclass(frozen=True)
class FullyConnected:
    """A linear layer; where ``source`` is an image, its inputs are those of the flattened image."""

    name: str
    source: Shape
    shape: Shape
    bias: bool
    rounded: bool


@dataclass(frozen=True)
class Activation:
    """ReLU, or with ``limit`` ReLU6."""

    name: str
    shape: Shape
    limit: float = math.inf


@dataclass(frozen=True)
class Pool:
    """Maximum or (``average``) mean over windows; the maximum's gradient goes to its first position."""

    name: str
    source: Shape
    shape: Shape
    kernel: Pair
    stride: Pair
    padding: Pair
    average: bool
    count_padding: bool = True


@dataclass(frozen=True)
class Quantizer:
    """A fake quantizer of activations; ``name`` is the one under which its range travels."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Normalisation:
    """Group normalisation (Wu and He 2018, arXiv:1803.08494): mean 0 and variance 1 over a group's channels and all pixels.

    ``scale``, ``bias``: the parameters that it has; they stay in float where other weights are rounded.
    """

    name: str
    shape: Shape
    groups: int
    epsilon: float
    scale: bool
    bias: bool


@dataclass(frozen=True)
class Sum:
    """The end of a residual block: what its last layer gives plus what its first one got, ``body`` layers before."""

    name: str
    shape: Shape
    body: int


Layer = Convolution | FullyConnected | Activation | Pool | Quantizer | Normalisation | Sum


@dataclass(frozen=True)
class Network:
    """Layers in order, from ``source`` to logits."""

    source: Shape
    layers: tuple[Layer, ...]
    classes: int


def lower(model: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """The layers of ``model`` for one example of ``input_shape`` ([n], [channels, steps] or [channels, height, width]).

    Raises:
        Unsupported: a layer, a shape or a setting that the generator does not know; the text names the layer.
    """
    if not 1 <= len(input_shape) <= 3:
        raise Unsupported(f"inputs of shape {list(input_shape)} are neither vectors, windows nor images")
    source = _shape(input_shape)
    lowering = _Lowering(source, len(input_shape))
    lowering.module("", model)
    _check(model, lowering.layers, lowering.shape, lowering.flat)
    return Network(source, tuple(lowering.layers), lowering.shape[0] if lowering.shape[1:] == (1, 1) else 0)


class _Lowering:
    """The layers so far, with the shape of what the last one gives and whether that is a flat vector."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.layers: list[Layer] = []
        self.shape, self.rank, self.flat = shape, rank, rank == 1
        self.opened: set[int] = set()  # numbers of layers in front of which a residual block begins

    def module(self, name: str, module: nn.Module) -> None:
        if type(module) is nn.Sequential:
            self._children(name, module)
        elif module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"layer {name} has forward hooks")
        elif type(module) is Residual:
            self._residual(name, module)
        elif isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) not in {(1, -1), (1, self.rank)}:
                raise Unsupported(f"layer {name} (Flatten) does not flatten all of an example")
            self.flat = True
        else:
            self._layer(name, module)

    def _children(self, name: str, module: nn.Module) -> None:
        for key, child in module._modules.items():
            if child is not None:
                self.module(f"{name}.{key}".lstrip("."), child)

    def _residual(self, name: str, module: Residual) -> None:
        begin, shape, flat = len(self.layers), self.shape, self.flat
        self.opened.add(begin)
        self._children(name, module)
        if begin == len(self.layers):
            raise Unsupported(f"layer {name} (Residual) has no layers inside")
        if (self.shape, self.flat) != (shape, flat):
            raise Unsupported(f"layer {name} (Residual) adds shapes that differ, {list(shape)} and {list(self.shape)}")
        self.layers.append(Sum(name, shape, len(self.layers) - begin))

    def _layer(self, name: str, module: nn.Module) -> None:
        rule = _RULES.get(type(module))
        if rule is None:
            raise Unsupported(f"layer {name or 'model'} ({type(module).__name__}) is not one that the generator knows")
        if isinstance(module, _VECTOR_LAYERS) != self.flat and not isinstance(module, _ANY):
            wanted = "a flat vector" if isinstance(module, _VECTOR_LAYERS) else "an image or a window"
            raise Unsupported(f"layer {name} ({type(module).__name__}) does not get {wanted}")
        if getattr(module, "inplace", False) and len(self.layers) in self.opened:
            raise Unsupported(f"layer {name} ({type(module).__name__}) changes in place what its residual block adds")
        if isinstance(module, nn.GroupNorm) and self.flat and self.shape[1:] != (1, 1):
            raise Unsupported(f"layer {name} (GroupNorm) gets a flattened image; only images and vectors are known")
        for layer in rule(name, module, self.shape, self.rank):
            self.layers.append(layer)
            self.shape = layer.shape


def _check(model: nn.Module, layers: list[Layer], shape: Shape, flat: bool) -> None:
    if not flat or (shape[1:] != (1, 1)):
        raise Unsupported(f"the output of shape {list(shape)} is not a vector of logits")
    if not any(isinstance(layer, (Convolution, FullyConnected)) for layer in layers):
        raise Unsupported("the model has no convolution and no linear layer")
    known = {f"{layer.name}.{key}".lstrip(".") for layer in layers for key in ("weight", "bias")}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in known:
            raise Unsupported(f"parameter {name} belongs to no layer of the list")
    if len(list(model.named_parameters(remove_duplicate=False))) != len(list(model.parameters())):
        raise Unsupported("two layers share a parameter")


def leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested Sequentials, by name, in the order in which they run; a Residual comes where it adds."""
    if isinstance(module, (nn.Sequential, Residual)):
        for key, child in module._modules.items():
            if child is not None:
                yield from leaves(child, f"{name}.{key}".lstrip("."))
    if type(module) is not nn.Sequential:
        yield name, module


def _shape(sizes: tuple[int, ...]) -> Shape:
    if len(sizes) == 3:
        return (sizes[0], sizes[1], sizes[2])
    return (sizes[0], 1, sizes[1]) if len(sizes) == 2 else (sizes[0], 1, 1)


def _pair(value: Any, dims: int) -> Pair:
    """A setting of a layer in one or two dimensions, as (height, width); heights of one-dimensional layers are (1, k)."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    return (sizes[0], sizes[1]) if dims == 2 else (1, sizes[0])


def _extent(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _convolution(name: str, module: Any, source: Shape, rank: int) -> Iterator[Layer]:
    dims = 2 if isinstance(module, nn.Conv2d) else 1
    label = f"layer {name} ({type(module).__name__})"
    if rank != dims + 1 or module.in_channels != source[0]:
        raise Unsupported(f"{label} does not fit an input of shape {list(source)}")
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise Unsupported(f"{label} has padding {module.padding!r}, {module.padding_mode}; only a number of zeros is known")
    if any(gap != 1 for gap in module.dilation):
        raise Unsupported(f"{label} has dilation {module.dilation}; only 1 is known")
    depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
    if module.groups != 1 and not depthwise:
        raise Unsupported(f"{label} has {module.groups} groups; only 1 or one for each channel is known")
    kernel, stride = _pair(module.kernel_size, dims), _pair(module.stride, dims)
    padding = _pair(module.padding, dims) if dims == 2 else (0, module.padding[0])
    height, width = (_extent(*sizes) for sizes in zip(source[1:], kernel, stride, padding, strict=True))
    if min(height, width) < 1:
        raise Unsupported(f"{label} has no output for an input of shape {list(source)}")
    rounded = isinstance(module, (QuantConv1d, QuantConv2d))
    if rounded:
        yield Quantizer(f"{name}.input".lstrip("."), source)
    shape = (module.out_channels, height, width)
    yield Convolution(name, source, shape, kernel, stride, padding, depthwise, module.bias is not None, rounded)


def _linear(name: str, module: Any, source: Shape, _: int) -> Iterator[Layer]:
    if math.prod(source) != module.in_features:
        raise Unsupported(f"layer {name} (Linear) wants {module.in_features} inputs and gets {math.prod(source)}")
    rounded = isinstance(module, QuantLinear)
    if rounded:
        yield Quantizer(f"{name}.input".lstrip("."), source)
    yield FullyConnected(name, source, (module.out_features, 1, 1), module.bias is not None, rounded)


def _pool(name: str, module: Any, source: Shape, rank: int) -> Iterator[Layer]:
    dims = 2 if type(module).__name__.endswith("2d") else 1
    average = "Avg" in type(module).__name__
    label = f"layer {name} ({type(module).__name__})"
    if rank != dims + 1:
        raise Unsupported(f"{label} does not fit an input of shape {list(source)}")
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)):
        sizes = module.output_size if isinstance(module.output_size, (tuple, list)) else [module.output_size] * dims
        if any(size != 1 for size in sizes) or getattr(module, "return_indices", False):
            raise Unsupported(f"{label} pools to {module.output_size}; only 1 is known")
        yield Pool(name, source, (source[0], 1, 1), source[1:], source[1:], (0, 0), average)
        return
    if module.ceil_mode or getattr(module, "return_indices", False) or getattr(module, "divisor_override", None):
        raise Unsupported(f"{label} sets ceil_mode, return_indices or divisor_override, which are not known")
    if any(gap != 1 for gap in _pair(getattr(module, "dilation", 1), dims)):
        raise Unsupported(f"{label} has dilation {module.dilation}; only 1 is known")
    kernel, stride = _pair(module.kernel_size, dims), _pair(module.stride, dims)
    padding = _pair(module.padding, dims) if dims == 2 else (0, _pair(module.padding, 1)[1])
    height, width = (_extent(*sizes) for sizes in zip(source[1:], kernel, stride, padding, strict=True))
    if min(height, width) < 1:
        raise Unsupported(f"{label} has no output for an input of shape {list(source)}")
    if math.prod(kernel) > 255:
        raise Unsupported(f"{label} has windows of {math.prod(kernel)} positions; at most 255 are known")
    counted = bool(getattr(module, "count_include_pad", True))
    yield Pool(name, source, (source[0], height, width), kernel, stride, padding, average, counted)


def _normalisation(name: str, module: Any, source: Shape, _: int) -> Iterator[Layer]:
    if module.num_channels != source[0]:
        raise Unsupported(f"layer {name} (GroupNorm) wants {module.num_channels} channels and gets {source[0]}")
    if module.num_channels // module.num_groups * math.prod(source[1:]) == 1:
        raise Unsupported(f"layer {name} (GroupNorm) has groups of one value, for which torch refuses batches of one example")
    scale, bias = module.weight is not None, module.bias is not None
    yield Normalisation(name, source, module.num_groups, module.eps, scale, bias)


def _activation(name: str, module: Any, source: Shape, _: int) -> Iterator[Layer]:
    yield Activation(name, source, 6.0 if isinstance(module, nn.ReLU6) else math.inf)


def _quantizer(name: str, _: Any, source: Shape, __: int) -> Iterator[Layer]:
    yield Quantizer(name, source)


def _nothing(*_: Any) -> Iterator[Layer]:
    return iter(())


_RULES: dict[type[nn.Module], Callable[[str, Any, Shape, int], Iterator[Layer]]] = {
    nn.Conv1d: _convolution, nn.Conv2d: _convolution, QuantConv1d: _convolution, QuantConv2d: _convolution,
    nn.Linear: _linear, QuantLinear: _linear, nn.GroupNorm: _normalisation,
    nn.MaxPool1d: _pool, nn.MaxPool2d: _pool, nn.AvgPool1d: _pool, nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool1d: _pool, nn.AdaptiveAvgPool2d: _pool, nn.AdaptiveMaxPool1d: _pool, nn.AdaptiveMaxPool2d: _pool,
    nn.ReLU: _activation, nn.ReLU6: _activation, FakeQuantize: _quantizer, nn.Identity: _nothing,
}  # fmt: skip
_VECTOR_LAYERS = (nn.Linear,)
_ANY = (nn.ReLU, nn.ReLU6, FakeQuantize, nn.Identity, nn.GroupNorm)
