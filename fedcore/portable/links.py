"""Layers without products: what each writes into the graph on the way forward, and on the way back.

Pixels come first and channels last: a value is [n, pixels, channels], or [n, features] behind a flattening.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import nn

from fedcore.errors import Refused
from fedcore.portable.nodes import Nodes, Value
from fedcore.portable.parts import Part, Rows
from fedcore.portable.windows import extent_of, inverse, pooling_matrix, pooling_table

__all__ = [
    "Average", "Flatten", "Frame", "Largest", "Link", "Normalise", "Parameters", "Ramp", "Relu", "Relu6", "Round", "Sigmoid",
    "Tanh", "over_pixels", "refuse",
]  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """What a value is of one example: ``channels`` over pixels of ``extent``, or as many features where that is None."""

    channels: int
    extent: tuple[int, ...] | None

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return prod(self.extent or ())


class Parameters:
    """The model's parameters in the graph, in their own shapes."""

    def __init__(self, values: dict[str, Value], trained: frozenset[str]) -> None:
        self._values, self.trained = values, trained

    def of(self, layer: str, name: str) -> Value:
        """Parameter ``name`` of a layer."""
        return self._values[f"{layer}.{name}"]

    def target(self, layer: str, name: str) -> str | None:
        """Its name in the model if it is trained."""
        return full if (full := f"{layer}.{name}") in self.trained else None


class Link(ABC):
    """A layer by name; `parts` and `back` follow `forward` and take the loss's gradient at the output, ``errors``."""

    frame: Frame  # of the output

    @abstractmethod
    def forward(self, nodes: Nodes, x: Value) -> Value:
        """The layer's output."""

    @abstractmethod
    def back(self, nodes: Nodes, errors: Value) -> Value:
        """The loss's gradient at the input."""

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:  # noqa: ARG002 - of a layer without parameters
        """The per-example gradients of the parameters that are trained."""
        return []


class _Pointwise(Link):
    def __init__(self, frame: Frame) -> None:
        self.frame = frame


class Relu(_Pointwise):
    """max(x, 0); at zero no gradient passes, as in torch."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._output = nodes.binary("Max", x, nodes.constant(0))
        return self._output

    def back(self, nodes: Nodes, errors: Value) -> Value:
        return nodes.masked(errors, nodes.binary("Greater", self._output, nodes.constant(0)))


class Ramp(_Pointwise):
    """Adds ``step`` times the number of the pixel, from one; see `graph.step_graph`."""

    def __init__(self, frame: Frame, step: float) -> None:
        super().__init__(frame)
        self._step = step

    def forward(self, nodes: Nodes, x: Value) -> Value:
        places = self.frame.channels if self.frame.extent is None else self.frame.pixels
        ramp = nodes.constant(self._step * np.arange(1, places + 1))
        return nodes.binary("Add", x, ramp if self.frame.extent is None else nodes.reshape(ramp, places, 1))

    def back(self, nodes: Nodes, errors: Value) -> Value:  # noqa: ARG002 - nothing is left to write
        return errors


class Relu6(_Pointwise):
    """min(max(x, 0), 6); at both ends no gradient passes, as in torch."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._input = x
        return self._between(nodes, nodes.dtype.type(0), nodes.dtype.type(6))

    def back(self, nodes: Nodes, errors: Value) -> Value:
        zero, six = nodes.dtype.type(0), nodes.dtype.type(6)
        within = self._between(nodes, np.nextafter(zero, six), np.nextafter(six, zero))
        return nodes.masked(errors, nodes.binary("Equal", self._input, within))

    def _between(self, nodes: Nodes, low: Any, high: Any) -> Value:
        return nodes.write("Clip", [self._input, nodes.constant(low), nodes.constant(high)], self._input.shape)[0]


class Tanh(_Pointwise):
    """The hyperbolic tangent."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._output = nodes.unary("Tanh", x)
        return self._output

    def back(self, nodes: Nodes, errors: Value) -> Value:
        square = nodes.binary("Mul", self._output, self._output)
        return nodes.binary("Mul", errors, nodes.binary("Sub", nodes.constant(1), square))


class Sigmoid(_Pointwise):
    """The logistic function."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._output = nodes.unary("Sigmoid", x)
        return self._output

    def back(self, nodes: Nodes, errors: Value) -> Value:
        slope = nodes.binary("Mul", self._output, nodes.binary("Sub", nodes.constant(1), self._output))
        return nodes.binary("Mul", errors, slope)


class Round(_Pointwise):
    """An activation's int8 grid, given at run time (`form.range_values`); the gradient passes where it does not saturate."""

    def __init__(self, frame: Frame, grid: list[Value]) -> None:
        super().__init__(frame)
        self._grid = grid

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._input = x
        scale, inverted, low, high = self._grid[:4]
        whole = nodes.unary("Round", nodes.binary("Mul", x, inverted))
        return nodes.binary("Mul", self._between(nodes, whole, low, high), scale)

    def back(self, nodes: Nodes, errors: Value) -> Value:
        passing = nodes.binary("Equal", self._input, self._between(nodes, self._input, *self._grid[4:]))
        return nodes.masked(errors, passing)

    @staticmethod
    def _between(nodes: Nodes, x: Value, low: Value, high: Value) -> Value:
        return nodes.write("Clip", [x, nodes.reshape(low), nodes.reshape(high)], x.shape)[0]


class Flatten(Link):
    """Features in torch's order, channel by channel."""

    def __init__(self, frame: Frame) -> None:
        self.before, self.frame = frame, Frame(frame.channels * (1 if frame.extent is None else frame.pixels), None)

    def forward(self, nodes: Nodes, x: Value) -> Value:
        turned = x if self.before.extent is None else nodes.transpose(x, 0, 2, 1)
        return nodes.reshape(turned, x.shape[0], self.frame.channels)

    def back(self, nodes: Nodes, errors: Value) -> Value:
        if self.before.extent is None:
            return errors
        return nodes.transpose(nodes.reshape(errors, errors.shape[0], self.before.channels, self.before.pixels), 0, 2, 1)


class Largest(Link):
    """Pooling by maximum; among equal ones the first gets the gradient, as in torch."""

    def __init__(self, layer: nn.MaxPool1d | nn.MaxPool2d, before: Frame) -> None:
        assert before.extent is not None
        self.frame = Frame(before.channels, extent_of(layer, before.extent))
        assert self.frame.extent is not None
        self._table = pooling_table(layer, before.extent, self.frame.extent).T  # elements of the kernel outside
        self._inverse = inverse(self._table, before.pixels)

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._seen = nodes.gather(x, self._table)
        self._top = nodes.reduce("ReduceMax", self._seen, 1)
        return nodes.reshape(self._top, x.shape[0], self.frame.pixels, x.shape[2])

    def back(self, nodes: Nodes, errors: Value) -> Value:
        n, pixels, channels = errors.shape
        elements = len(self._table)
        rest, shares = nodes.reshape(errors, n, 1, pixels, channels), []
        if elements > 1:
            chosen = nodes.unary("Cast", nodes.binary("Equal", self._seen, self._top), to=nodes.kind)
            sizes = nodes.constant([1] * elements, np.int64)
            *earlier, _ = nodes.write("Split", [chosen, sizes], *[rest.shape] * elements, axis=1)
            for one in earlier:  # each takes what is left if it is the maximum; the last one takes the rest
                shares.append(nodes.binary("Mul", one, rest))
                rest = nodes.binary("Sub", rest, shares[-1])
        spread = nodes.reshape(nodes.concat([*shares, rest], 1), n, elements * pixels, channels)
        return nodes.gather_sum(spread, self._inverse)


class Average(Link):
    """Pooling by mean, or any other layer that is linear in the pixels of a channel, as one matrix."""

    def __init__(self, layer: nn.Module, before: Frame) -> None:
        assert before.extent is not None
        self.frame = Frame(before.channels, extent_of(layer, before.extent))
        self._matrix = pooling_matrix(layer, before.extent)

    def forward(self, nodes: Nodes, x: Value) -> Value:
        return nodes.matmul(nodes.constant(self._matrix), x)

    def back(self, nodes: Nodes, errors: Value) -> Value:
        return nodes.matmul(nodes.constant(self._matrix.T), errors)


class Normalise(Link):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494), and LayerNorm over features as one group with one pixel."""

    def __init__(
        self, name: str, groups: int, epsilon: float, frame: Frame, parameters: Parameters, *, weight: bool, bias: bool
    ) -> None:  # fmt: skip
        self.name, self.frame = name, frame
        self._groups, self._epsilon = groups, epsilon
        self._parameters, self._has_weight, self._has_bias = parameters, weight, bias

    def forward(self, nodes: Nodes, x: Value) -> Value:
        n, channels = x.shape[0], x.shape[-1]
        self._shape = x.shape
        grouped = nodes.reshape(x, n, x.size // (n * channels), self._groups, channels // self._groups)
        centred = nodes.binary("Sub", grouped, self._mean(nodes, grouped))
        variance = self._mean(nodes, nodes.binary("Mul", centred, centred))
        deviation = nodes.unary("Sqrt", nodes.binary("Add", variance, nodes.constant(self._epsilon)))
        self._inverse = nodes.unary("Reciprocal", deviation)
        self._normal = nodes.binary("Mul", centred, self._inverse)
        y = nodes.reshape(self._normal, *x.shape)
        if self._has_weight:
            y = nodes.binary("Mul", y, self._parameters.of(self.name, "weight"))
        if self._has_bias:
            y = nodes.binary("Add", y, self._parameters.of(self.name, "bias"))
        return y

    def back(self, nodes: Nodes, errors: Value) -> Value:
        if self._has_weight:
            errors = nodes.binary("Mul", errors, self._parameters.of(self.name, "weight"))
        slope = nodes.reshape(errors, *self._normal.shape)
        along = nodes.binary("Mul", self._normal, self._mean(nodes, nodes.binary("Mul", slope, self._normal)))
        rest = nodes.binary("Sub", nodes.binary("Sub", slope, self._mean(nodes, slope)), along)
        return nodes.reshape(nodes.binary("Mul", rest, self._inverse), *self._shape)

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:
        found: list[Part] = []
        if target := self._parameters.target(self.name, "weight"):
            normal = nodes.reshape(self._normal, *self._shape)
            found.append(Rows(target, over_pixels(nodes, nodes.binary("Mul", errors, normal))))
        if target := self._parameters.target(self.name, "bias"):
            found.append(Rows(target, over_pixels(nodes, errors)))
        return found

    @staticmethod
    def _mean(nodes: Nodes, x: Value) -> Value:
        return nodes.reduce("ReduceMean", x, 1, 3)


def over_pixels(nodes: Nodes, x: Value) -> Value:
    """The sum over the pixels of each channel: [n, channels]."""
    if len(x.shape) == 2:
        return x
    return nodes.reshape(nodes.reduce("ReduceSum", x, 1), x.shape[0], x.shape[2])


def refuse(name: str, layer: Any, why: str) -> Refused:
    """The error of a layer that cannot be exported."""
    return Refused(f"training step: layer {name} ({type(layer).__name__}) {why}")
