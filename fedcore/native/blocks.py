"""Layers fused into blocks, with the place of every value: activations as padded planes, parameters in one blob.

An activation plane is [height, width, channels] with channels padded to a vector's lanes and a halo of zeros as wide as the next
convolution pads. Padding lanes stay exactly zero: their weights, and so their gradients, are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import nn

from fedcore.native.layers import (
    Activation,
    Convolution,
    FullyConnected,
    Layer,
    Network,
    Normalisation,
    Pair,
    Pool,
    Quantizer,
    Sum,
    Unsupported,
)

__all__ = [
    "Addition",
    "Block",
    "Blocks",
    "Conv",
    "Depthwise",
    "Input",
    "Linear",
    "Normal",
    "Parameter",
    "Plane",
    "Pointwise",
    "Pooling",
    "lanes_of",
    "padded",
    "plan",
]

LANES = 16
_SLACK = 32  # values behind a plane that vector loads may touch


def padded(size: int, multiple: int = LANES) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def lanes_of(size: int) -> int:
    """The narrowest vector (4, 8 or 16 lanes) that holds ``size`` values, 16 for more."""
    return next((lanes for lanes in (4, 8) if size <= lanes), LANES)


@dataclass(frozen=True)
class Plane:
    """One example's activation: pixel (h, w), channel c is at origin + h * row + w * depth + c of ``size`` values."""

    height: int
    width: int
    channels: int
    depth: int
    halo: Pair = (0, 0)

    @property
    def row(self) -> int:
        """Values from one row to the next."""
        return (self.width + 2 * self.halo[1]) * self.depth

    @property
    def origin(self) -> int:
        """Where pixel (0, 0) is; a convolution's first window begins at 0."""
        return self.halo[0] * self.row + self.halo[1] * self.depth

    @property
    def length(self) -> int:
        """Values of the plane proper."""
        return (self.height + 2 * self.halo[0]) * self.row

    @property
    def size(self) -> int:
        """Values from one example to the next."""
        return padded(self.length) + _SLACK

    @property
    def dense(self) -> bool:
        """Whether pixels follow each other without a gap."""
        return self.halo == (0, 0)


@dataclass(frozen=True)
class Parameter:
    """A tensor of ``dims`` (outermost first, as torch has it) at ``offset`` of the blob, with a stride per dimension."""

    name: str
    offset: int
    size: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    trainable: bool

    def positions(self) -> npt.NDArray[np.int64]:
        """Where in the blob each value of the flattened tensor is."""
        places = np.full((1,) * len(self.dims), self.offset, np.int64)
        for axis, (count, stride) in enumerate(zip(self.dims, self.strides, strict=True)):
            shape = [1] * len(self.dims)
            shape[axis] = count
            places = places + (np.arange(count) * stride).reshape(shape)
        return places.reshape(-1)


@dataclass(frozen=True)
class Input:
    """What copies an example into the workspace."""

    target: Plane
    quantizer: int | None = None


@dataclass(frozen=True)
class Pointwise:
    """An activation or a quantizer that could not join the block before."""

    source: Plane
    target: Plane
    limit: float | None = None
    quantizer: int | None = None


@dataclass(frozen=True)
class Pooling:
    """A pool that does not belong to a convolution."""

    layer: Pool
    source: Plane
    target: Plane
    limit: float | None = None
    quantizer: int | None = None


@dataclass(frozen=True)
class Conv:
    """A convolution over all channels and what follows: activation (``limit``, inf for ReLU), maximum over ``window``, quantizer.

    ``by_tap``: weights lie as [kh, kw, channels in, channels out], else as [channels out, kh, run] with ``run`` the padded
    length of a kernel row in the source plane.
    """

    layer: Convolution
    source: Plane
    target: Plane
    by_tap: bool
    weight: Parameter
    bias: Parameter | None
    window: Pair = (1, 1)
    limit: float | None = None
    quantizer: int | None = None

    @property
    def span(self) -> int:
        """Length of a kernel row in the source plane."""
        return self.layer.kernel[1] * self.source.depth

    @property
    def run(self) -> int:
        """That length, padded to whole vectors."""
        return padded(self.span, lanes_of(self.span))

    @property
    def taps(self) -> int:
        """Inputs of one output."""
        return math.prod(self.layer.kernel) * self.source.channels

    @property
    def members(self) -> int:
        """Positions of the maximum's window."""
        return math.prod(self.window)


@dataclass(frozen=True)
class Depthwise:
    """One filter per channel, weights [kh, kw, channels]."""

    layer: Convolution
    source: Plane
    target: Plane
    weight: Parameter
    bias: Parameter | None
    limit: float | None = None
    quantizer: int | None = None


@dataclass(frozen=True)
class Linear:
    """A fully connected layer, weights [outputs, padded inputs]."""

    layer: FullyConnected
    source: Plane
    target: Plane
    weight: Parameter
    bias: Parameter | None
    limit: float | None = None
    quantizer: int | None = None

    @property
    def inputs(self) -> int:
        """Inputs, padded to whole vectors."""
        return padded(self.source.length)


@dataclass(frozen=True)
class Normal:
    """A group normalisation; scale (``weight``) and bias by channel."""

    layer: Normalisation
    source: Plane
    target: Plane
    weight: Parameter | None
    bias: Parameter | None
    limit: float | None = None
    quantizer: int | None = None


@dataclass(frozen=True)
class Addition:
    """The sum of the block before and of block ``skip`` (-1: the network's input), whose plane is ``other``."""

    layer: Sum
    source: Plane
    skip: int
    other: Plane
    target: Plane
    limit: float | None = None
    quantizer: int | None = None


Block = Pointwise | Pooling | Conv | Depthwise | Linear | Normal | Addition


@dataclass(frozen=True)
class Blocks:
    """The whole network. ``parameters`` in the module's order; ``first`` is the first block that has trainable ones."""

    network: Network
    input: Input
    blocks: tuple[Block, ...]
    parameters: tuple[Parameter, ...]
    quantizers: tuple[str, ...]
    first: int

    @property
    def blob(self) -> int:
        """Values of all parameters with their padding."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def trainable(self) -> int:
        """Values of the trainable parameters as they travel."""
        return sum(math.prod(parameter.dims) for parameter in self.parameters if parameter.trainable)

    @property
    def flat(self) -> int:
        """The first fully connected block; from it on all examples of a part are worked on together."""
        return next((i for i, block in enumerate(self.blocks) if isinstance(block, Linear)), len(self.blocks))

    @property
    def rounded(self) -> bool:
        """Whether weights are fake-quantized."""
        return any(isinstance(block, (Conv, Depthwise, Linear)) and block.layer.rounded for block in self.blocks)


def plan(network: Network, model: nn.Module) -> Blocks:
    """Fuse the layers and give every value its place; which parameters train is taken from ``model``.

    Raises:
        Unsupported: an order of layers that the generator does not know.
    """
    groups = list(_fuse(network.layers))
    quantizers = tuple(layer.name for layer in network.layers if isinstance(layer, Quantizer))
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    learns = [any(on for name, on in trainable.items() if name in _own(group[0])) for group in groups]
    if True not in learns:
        raise Unsupported("no parameter is trainable")
    first = learns.index(True)
    head = next((i for i, group in enumerate(groups) if not isinstance(group[0], Quantizer)), 0)
    entry = _entry_quantizer(groups[:head], quantizers) if 0 not in _opened(network.layers) else None
    rest = groups[head if entry is not None else 0 :]
    first -= len(groups) - len(rest)
    source = _input_plane(network, rest[0][0])
    blocks: list[Block] = []
    parameters: list[Parameter] = []
    offset, current = 0, source
    for number, group in enumerate(rest):
        follower = rest[number + 1][0] if number + 1 < len(rest) else None
        halo = _halo(follower)
        if isinstance(group[0], Sum):
            skip = _skip(rest[:number], group[0].body)
            block: Block = _addition(group, current, halo, skip, blocks[skip].target if skip >= 0 else source, quantizers)
        else:
            block = _block(group, current, halo, trainable, quantizers, offset, number <= first)
        own = [p for p in (getattr(block, "weight", None), getattr(block, "bias", None)) if p is not None]
        blocks.append(block)
        parameters += own
        offset += sum(parameter.size for parameter in own)
        current = block.target
    order = list(trainable)
    parameters.sort(key=lambda p: order.index(p.name))
    return Blocks(network, Input(source, entry), tuple(blocks), tuple(parameters), quantizers, first)


def _fuse(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Groups of a leading layer and what its block does to its output, in the order activation, pool, quantizer."""
    group: list[Layer] = []
    opened = _opened(layers)
    for number, layer in enumerate(layers):
        if group and number not in opened and _joins(group, layer):
            group.append(layer)
            continue
        if group:
            yield group
        group = [layer]
    if group:
        yield group


def _opened(layers: Sequence[Layer]) -> set[int]:
    """The layers whose input is needed again, by a sum."""
    return {number - layer.body for number, layer in enumerate(layers) if isinstance(layer, Sum)}


def _joins(group: list[Layer], layer: Layer) -> bool:
    last, head = group[-1], group[0]
    if isinstance(head, Quantizer) or isinstance(last, Quantizer):
        return False
    if isinstance(layer, Quantizer):
        return True
    pooled = any(isinstance(member, Pool) for member in group[1:])
    if isinstance(layer, Activation):
        return not any(isinstance(member, Activation) for member in group) and not isinstance(head, Activation)
    if isinstance(layer, Pool) and isinstance(head, Convolution):
        fits = layer.kernel == layer.stride and layer.padding == (0, 0) and math.prod(layer.kernel) <= 9
        return fits and not layer.average and not head.depthwise and not pooled
    return False


def _own(layer: Layer) -> tuple[str, ...]:
    return tuple(f"{layer.name}.{key}".lstrip(".") for key in ("weight", "bias"))


def _entry_quantizer(groups: Sequence[list[Layer]], quantizers: Sequence[str]) -> int | None:
    """The quantizer of the network's inputs, where there is exactly one in front."""
    return quantizers.index(groups[0][0].name) if len(groups) == 1 else None


def _input_plane(network: Network, consumer: Layer) -> Plane:
    channels, height, width = network.source
    exact = isinstance(consumer, FullyConnected) or (isinstance(consumer, Convolution) and not consumer.depthwise)
    depth = channels if exact else padded(channels, lanes_of(channels))
    return Plane(height, width, channels, depth, _halo(consumer))


def _halo(consumer: Layer | None) -> Pair:
    return consumer.padding if isinstance(consumer, Convolution) else (0, 0)


def _after(group: list[Layer], quantizers: Sequence[str]) -> tuple[float | None, int | None]:
    """The activation's limit and the number of the quantizer among the layers of a group."""
    limit = next((layer.limit for layer in group if isinstance(layer, Activation)), None)
    return limit, next((quantizers.index(layer.name) for layer in group if isinstance(layer, Quantizer)), None)


def _skip(before: Sequence[list[Layer]], body: int) -> int:
    """The block whose output is added after ``body`` layers, the last of the groups ``before``; -1 for the network's input."""
    number = len(before)
    while body:
        number -= 1
        body -= len(before[number])
    return number - 1


def _addition(
    group: list[Layer], source: Plane, halo: Pair, skip: int, other: Plane, quantizers: Sequence[str]
) -> Addition:  # fmt: skip
    head = group[0]
    assert isinstance(head, Sum)
    channels, height, width = head.shape
    target = Plane(height, width, channels, padded(channels, lanes_of(channels)), halo)
    return Addition(head, source, skip, other, target, *_after(group, quantizers))


def _block(
    group: list[Layer], source: Plane, halo: Pair, trainable: dict[str, bool], quantizers: Sequence[str], offset: int, bottom: bool
) -> Block:  # fmt: skip
    head, shape = group[0], group[-1].shape
    limit, quantizer = _after(group, quantizers)
    window = next((layer.kernel for layer in group[1:] if isinstance(layer, Pool)), (1, 1))
    depth = padded(shape[0], lanes_of(shape[0])) if not isinstance(head, FullyConnected) else padded(shape[0])
    target = Plane(shape[1], shape[2], shape[0], depth, halo)
    if isinstance(head, FullyConnected):
        places = _linear_weight(head, source, offset, trainable)
        return Linear(head, source, target, *_with_bias(head, places, depth, trainable), limit, quantizer)
    if isinstance(head, Convolution) and head.depthwise:
        kh, kw = head.kernel
        name = f"{head.name}.weight".lstrip(".")
        strides = (1, 0, kw * depth, depth)
        places = Parameter(name, offset, padded(kh * kw * depth), (shape[0], 1, kh, kw), strides, trainable[name])
        return Depthwise(head, source, target, *_with_bias(head, places, depth, trainable), limit, quantizer)
    if isinstance(head, Convolution):
        block = Conv(head, source, target, False, *_conv_parameters(head, source, depth, offset, trainable, by_tap=False),
                     window, limit, quantizer)  # fmt: skip
        if not bottom or not _taps_cheaper(block):
            return block
        weight, bias = _conv_parameters(head, source, depth, offset, trainable, by_tap=True)
        return replace(block, by_tap=True, weight=weight, bias=bias)
    if isinstance(head, Normalisation):
        return Normal(head, source, target, *_normal_parameters(head, padded(depth), offset, trainable), limit, quantizer)
    if isinstance(head, Pool):
        return Pooling(head, source, target, limit, quantizer)
    return Pointwise(source, target, limit, quantizer)


def _with_bias(
    layer: Convolution | FullyConnected, weight: Parameter, depth: int, trainable: dict[str, bool]
) -> tuple[Parameter, Parameter | None]:  # fmt: skip
    if not layer.bias:
        return weight, None
    name = f"{layer.name}.bias".lstrip(".")
    return weight, Parameter(name, weight.offset + weight.size, padded(depth), (layer.shape[0],), (1,), trainable[name])


def _conv_parameters(
    layer: Convolution, source: Plane, depth: int, offset: int, trainable: dict[str, bool], *, by_tap: bool
) -> tuple[Parameter, Parameter | None]:  # fmt: skip
    (kh, kw), inputs, outputs = layer.kernel, source.channels, layer.shape[0]
    dims, name = (outputs, inputs, kh, kw), f"{layer.name}.weight".lstrip(".")
    if by_tap:
        strides, size = (1, depth, kw * inputs * depth, inputs * depth), kh * kw * inputs * depth
    else:
        run = padded(kw * source.depth, lanes_of(kw * source.depth))
        strides, size = (kh * run, 1, run, source.depth), outputs * kh * run
    weight = Parameter(name, offset, padded(size) + LANES, dims, strides, trainable[name])
    return _with_bias(layer, weight, depth, trainable)


def _normal_parameters(
    layer: Normalisation, size: int, offset: int, trainable: dict[str, bool]
) -> tuple[Parameter | None, Parameter | None]:  # fmt: skip
    weight, bias = (f"{layer.name}.{key}".lstrip(".") for key in ("weight", "bias"))
    dims, after = (layer.shape[0],), offset + size * layer.scale
    return (
        Parameter(weight, offset, size, dims, (1,), trainable[weight]) if layer.scale else None,
        Parameter(bias, after, size, dims, (1,), trainable[bias]) if layer.bias else None,
    )


def _linear_weight(layer: FullyConnected, source: Plane, offset: int, trainable: dict[str, bool]) -> Parameter:
    inputs, name = padded(source.length), f"{layer.name}.weight".lstrip(".")
    dims = (layer.shape[0], source.channels, source.height, source.width)
    return Parameter(name, offset, layer.shape[0] * inputs, dims, (inputs, 1, source.row, source.depth), trainable[name])


def _taps_cheaper(block: Conv) -> bool:
    """Whether the weight gradient costs less with outputs in the lanes than with kernel rows in them; cycles a position."""
    vectors = padded(block.target.channels, lanes_of(block.target.channels)) / LANES
    by_tap = block.members * block.taps * max(vectors, 0.5) / 2
    rows = block.layer.kernel[0] * block.run // lanes_of(block.span)
    by_row = block.target.channels * (rows + 2) / 2
    return by_tap < by_row
