"""Layers with products: fully connected ones and convolutions, as products of a matrix with what each window sees."""

from __future__ import annotations

from math import prod

import numpy as np
from torch import nn

from fedcore.portable.links import Frame, Link, Parameters, over_pixels
from fedcore.portable.nodes import Nodes, Value
from fedcore.portable.parts import Part, Product, Rows
from fedcore.portable.windows import convolution_table, inverse

__all__ = ["Convolution", "Dense", "Depthwise", "Grouped", "convolution"]


class _Weighted(Link):
    """``rounded``: the weight is rounded to its int8 grid on the way forward; its gradient passes straight through."""

    def __init__(self, name: str, parameters: Parameters, *, bias: bool, rounded: bool) -> None:
        self.name, self._parameters, self._rounded = name, parameters, rounded
        self._has_bias = bias

    def _weight(self, nodes: Nodes) -> Value:
        """The weight [outputs, rest] that the products see."""
        weight = self._parameters.of(self.name, "weight")
        weight = nodes.reshape(weight, weight.shape[0], prod(weight.shape[1:]))
        if not self._rounded:
            return weight
        peak = nodes.reduce("ReduceMax", nodes.unary("Abs", weight), 1)
        least = nodes.constant(float(np.finfo(nodes.dtype).tiny) * 127)
        scale = nodes.binary("Div", nodes.binary("Max", peak, least), nodes.constant(127))
        whole = nodes.unary("Round", nodes.binary("Mul", weight, nodes.unary("Reciprocal", scale)))
        return nodes.binary("Mul", whole, scale)

    def _bias(self) -> Value | None:
        return self._parameters.of(self.name, "bias") if self._has_bias else None

    def _bias_part(self, nodes: Nodes, errors: Value) -> list[Part]:
        target = self._parameters.target(self.name, "bias")
        return [Rows(target, over_pixels(nodes, errors))] if target else []


class Dense(_Weighted):
    """x @ weight^T + bias."""

    def __init__(self, name: str, layer: nn.Linear, parameters: Parameters, *, rounded: bool) -> None:
        super().__init__(name, parameters, bias=layer.bias is not None, rounded=rounded)
        self.frame = Frame(layer.out_features, None)

    def forward(self, nodes: Nodes, x: Value) -> Value:
        self._input, self._matrix = x, self._weight(nodes)
        return nodes.product(x, self._matrix, self._bias(), right=True)

    def back(self, nodes: Nodes, errors: Value) -> Value:
        return nodes.product(errors, self._matrix)

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:
        target = self._parameters.target(self.name, "weight")
        weight: list[Part] = [Product(target, self._input, errors)] if target else []
        return weight + self._bias_part(nodes, errors)


class _Windowed(_Weighted):
    """A convolution's windows: ``self._table`` [positions, elements], and for each pixel the windows that see it."""

    def __init__(self, name: str, layer: nn.Conv1d | nn.Conv2d, before: Frame, parameters: Parameters, *, rounded: bool) -> None:
        super().__init__(name, parameters, bias=layer.bias is not None, rounded=rounded)
        assert before.extent is not None
        self._table, extent = convolution_table(layer, before.extent)
        self.frame = Frame(layer.out_channels, extent)
        self._elements = self._table.shape[1]
        self._before, self._groups = before, layer.groups


class Convolution(_Windowed):
    """One group of channels. The columns [n, positions, elements x channels] serve the way forward and the weight's gradient."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        n, channels, outputs = x.shape[0], self._before.channels, self.frame.channels
        weight = nodes.reshape(self._weight(nodes), outputs, channels, self._elements)
        self._matrix = nodes.reshape(nodes.transpose(weight, 0, 2, 1), outputs, self._elements * channels)
        self._plain = self._elements == 1 and np.array_equal(self._table[:, 0], np.arange(self._before.pixels))
        seen = x if self._plain else nodes.gather(x, self._table)
        self._columns = nodes.reshape(seen, n, self.frame.pixels, self._elements * channels)
        rows = nodes.reshape(seen, n * self.frame.pixels, self._elements * channels)
        return nodes.reshape(nodes.product(rows, self._matrix, self._bias(), right=True), n, self.frame.pixels, outputs)

    def back(self, nodes: Nodes, errors: Value) -> Value:
        n, positions, outputs = errors.shape
        sources = inverse(self._table, self._before.pixels)
        if (sources < 0).any():  # a row of zeros here is a window of zeros below
            errors, sources = nodes.zero_row(errors), np.where(sources < 0, positions * self._elements, sources)
            positions += 1
        seen = nodes.product(nodes.reshape(errors, n * positions, outputs), self._matrix)
        seen = nodes.reshape(seen, n, positions * self._elements, self._before.channels)
        return seen if self._plain else nodes.gather_sum(seen, sources)

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:
        target = self._parameters.target(self.name, "weight")
        weight: list[Part] = [Product(target, self._columns, errors, self._ordered)] if target else []
        return weight + self._bias_part(nodes, errors)

    def _ordered(self, nodes: Nodes, total: Value) -> Value:
        kernel = nodes.reshape(total, self.frame.channels, self._elements, self._before.channels)
        return nodes.transpose(kernel, 0, 2, 1)


class Depthwise(_Windowed):
    """One kernel for each channel: sums of products of numbers, with the elements of the kernel outside."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        n, channels = x.shape[0], self._before.channels
        self._kernel = nodes.reshape(nodes.transpose(self._weight(nodes), 1, 0), self._elements, 1, channels)
        self._seen = nodes.gather(x, np.ascontiguousarray(self._table.T))
        y = self._times_kernel(nodes, self._seen)
        y = nodes.reshape(nodes.reduce("ReduceSum", y, 1), n, self.frame.pixels, channels)
        bias = self._bias()
        return nodes.binary("Add", y, bias) if bias else y

    def back(self, nodes: Nodes, errors: Value) -> Value:
        n, positions, channels = errors.shape
        table = np.ascontiguousarray(self._table.T)
        if (inverse(table, self._before.pixels) < 0).any():  # a position of zeros, for pixels that fewer windows see than others
            errors, table = nodes.zero_row(errors), np.pad(table, ((0, 0), (0, 1)), constant_values=-1)
        sources = inverse(table, self._before.pixels)
        seen = self._times_kernel(nodes, nodes.reshape(errors, n, 1, errors.shape[1], channels))
        seen = nodes.reshape(seen, n, self._elements * errors.shape[1], channels)
        return nodes.gather_sum(seen, np.where(sources < 0, positions, sources))

    def _times_kernel(self, nodes: Nodes, x: Value) -> Value:
        """``x`` [n, elements or 1, p, channels] times the kernel, as [n, elements, p x channels]: the kernel is written out for
        every pixel first, since runtimes broadcast long rows many times faster than short ones."""
        n, heads, pixels, channels = x.shape
        kernel = nodes.gather(self._kernel, np.zeros(pixels, np.int64))
        kernel = nodes.reshape(kernel, self._elements, pixels * channels)
        return nodes.binary("Mul", nodes.reshape(x, n, heads, pixels * channels), kernel)

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:
        n, positions, channels = errors.shape
        found: list[Part] = []
        if target := self._parameters.target(self.name, "weight"):
            products = nodes.binary("Mul", self._seen, nodes.reshape(errors, n, 1, positions, channels))
            rows = nodes.reshape(nodes.reduce("ReduceSum", products, 2), n, self._elements * channels)
            found.append(Rows(target, rows, self._ordered))
        return found + self._bias_part(nodes, errors)

    def _ordered(self, nodes: Nodes, total: Value) -> Value:
        return nodes.transpose(nodes.reshape(total, self._elements, self.frame.channels), 1, 0)


class Grouped(_Windowed):
    """Several groups of several channels: one product for each group of each example."""

    def forward(self, nodes: Nodes, x: Value) -> Value:
        n, groups, positions = x.shape[0], self._groups, self.frame.pixels
        self._inner, self._outer = self._before.channels // groups, self.frame.channels // groups
        weight = nodes.reshape(self._weight(nodes), groups, self._outer, self._inner, self._elements)
        self._matrix = nodes.reshape(nodes.transpose(weight, 0, 1, 3, 2), groups, self._outer, self._elements * self._inner)
        seen = nodes.reshape(nodes.gather(x, self._table), n, positions, self._elements, groups, self._inner)
        turned = nodes.transpose(seen, 0, 3, 1, 2, 4)
        self._columns = nodes.reshape(turned, n, groups, positions, self._elements * self._inner)
        y = nodes.matmul(self._columns, nodes.transpose(self._matrix, 0, 2, 1))
        y = nodes.reshape(nodes.transpose(y, 0, 2, 1, 3), n, positions, self.frame.channels)
        bias = self._bias()
        return nodes.binary("Add", y, bias) if bias else y

    def back(self, nodes: Nodes, errors: Value) -> Value:
        n, positions, _ = errors.shape
        seen = nodes.matmul(self._by_group(nodes, errors), self._matrix)
        seen = nodes.reshape(seen, n, self._groups, positions, self._elements, self._inner)
        seen = nodes.reshape(nodes.transpose(seen, 0, 2, 3, 1, 4), n, positions * self._elements, self._before.channels)
        return nodes.gather_sum(seen, inverse(self._table, self._before.pixels))

    def parts(self, nodes: Nodes, errors: Value) -> list[Part]:
        found: list[Part] = []
        if target := self._parameters.target(self.name, "weight"):
            each = nodes.matmul(nodes.transpose(self._by_group(nodes, errors), 0, 1, 3, 2), self._columns)
            found.append(Rows(target, nodes.reshape(each, each.shape[0], prod(each.shape[1:])), self._ordered))
        return found + self._bias_part(nodes, errors)

    def _by_group(self, nodes: Nodes, errors: Value) -> Value:
        n, positions, _ = errors.shape
        return nodes.transpose(nodes.reshape(errors, n, positions, self._groups, self._outer), 0, 2, 1, 3)

    def _ordered(self, nodes: Nodes, total: Value) -> Value:
        kernel = nodes.reshape(total, self.frame.channels, self._elements, self._inner)
        return nodes.transpose(kernel, 0, 2, 1)


def convolution(name: str, layer: nn.Conv1d | nn.Conv2d, before: Frame, parameters: Parameters, *, rounded: bool) -> Link:
    """The cheapest way to write a convolution."""
    if layer.groups == 1:
        return Convolution(name, layer, before, parameters, rounded=rounded)
    kind = Depthwise if layer.groups == layer.in_channels == layer.out_channels else Grouped
    return kind(name, layer, before, parameters, rounded=rounded)
