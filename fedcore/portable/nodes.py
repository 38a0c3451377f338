"""Writing ONNX nodes with static shapes: every value knows its shape, and only operators of the step's list can be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedcore.portable.form import OPERATORS
from fedcore.portable.windows import Table

__all__ = ["Nodes", "Value"]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Nodes:
    """The nodes and constants of a graph that computes in ``dtype``, float32 or float64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.kind = {4: TensorProto.FLOAT, 8: TensorProto.DOUBLE}[self.dtype.itemsize]
        self.nodes: list[NodeProto] = []
        self.constants: dict[tuple[Any, ...], TensorProto] = {}
        self._zero_rows: dict[str, Value] = {}

    def write(self, op: str, inputs: Sequence[Value], *shapes: tuple[int, ...], **attributes: Any) -> list[Value]:
        """Append a node with outputs of the shapes given."""
        if op not in OPERATORS:
            raise ValueError(f"operator {op} is not one of a training step's")
        number = len(self.nodes)
        outputs = [Value(f"v{number}" if len(shapes) == 1 else f"v{number}.{i}", shape) for i, shape in enumerate(shapes)]
        given, made = ([value.name for value in side] for side in (inputs, outputs))
        self.nodes.append(helper.make_node(op, given, made, **attributes))
        return outputs

    def constant(self, values: npt.ArrayLike, dtype: Any = None) -> Value:
        """A constant, in the graph's float type unless told otherwise; equal ones are stored once."""
        array = np.array(values, dtype or self.dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        return Value(self.constants[key].name, array.shape)

    def unary(self, op: str, x: Value, **attributes: Any) -> Value:
        """An operator element by element."""
        return self.write(op, [x], x.shape, **attributes)[0]

    def binary(self, op: str, a: Value, b: Value) -> Value:
        """An operator on two tensors that broadcast."""
        return self.write(op, [a, b], np.broadcast_shapes(a.shape, b.shape))[0]

    def scaled(self, x: Value, factor: float) -> Value:
        """``x`` times a number."""
        return self.binary("Mul", x, self.constant(factor))

    def reshape(self, x: Value, *shape: int) -> Value:
        """The same elements in another shape."""
        if x.shape == shape:
            return x
        if x.size != prod(shape):
            raise ValueError(f"{x.shape} has not as many elements as {shape}")
        return self.write("Reshape", [x, self.constant(shape, np.int64)], shape)[0]

    def transpose(self, x: Value, *order: int) -> Value:
        """Axes in another order; a mere reshape where only axes of length one move."""
        shape = tuple(x.shape[axis] for axis in order)
        if [axis for axis in order if x.shape[axis] > 1] == [axis for axis in range(len(order)) if x.shape[axis] > 1]:
            return self.reshape(x, *shape)
        return self.write("Transpose", [x], shape, perm=list(order))[0]

    def matmul(self, a: Value, b: Value) -> Value:
        """Matrix product over the last two axes, the others broadcast."""
        head = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.write("MatMul", [a, b], (*head, a.shape[-2], b.shape[-1]))[0]

    def product(self, a: Value, b: Value, bias: Value | None = None, *, left: bool = False, right: bool = False) -> Value:
        """Product of two matrices, the ``left`` or the ``right`` one transposed, plus ``bias`` in every row."""
        shape = (a.shape[1] if left else a.shape[0], b.shape[0] if right else b.shape[1])
        return self.write("Gemm", [a, b] + ([bias] if bias else []), shape, transA=int(left), transB=int(right))[0]

    def reduce(self, op: str, x: Value, *axes: int) -> Value:
        """A reduction that keeps the axes with length one."""
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        if op == "ReduceSum":  # takes its axes as an input since opset 13, the others since 18
            return self.write(op, [x, self.constant(axes, np.int64)], shape, keepdims=1)[0]
        return self.write(op, [x], shape, axes=list(axes), keepdims=1)[0]

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Pieces of a vector."""
        if len(sizes) == 1:
            return [x]
        return self.write("Split", [x, self.constant(sizes, np.int64)], *[(size,) for size in sizes], axis=0)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Tensors side by side along one axis."""
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.write("Concat", values, tuple(shape), axis=axis)[0]

    def zero_row(self, x: Value) -> Value:
        """``x`` [n, p, c] with a row of zeros behind: [n, p + 1, c]."""
        n, rows, channels = x.shape
        if x.name not in self._zero_rows:
            margin = self.constant([0, 0, 0, 0, 1, 0], np.int64)
            (self._zero_rows[x.name],) = self.write("Pad", [x, margin], (n, rows + 1, channels))
        return self._zero_rows[x.name]

    def gather(self, x: Value, table: Table) -> Value:
        """The pixels of ``x`` [n, p, c] that ``table`` names, -1 being zeros: [n, *table.shape, c]."""
        if (table < 0).any():
            table, x = np.where(table < 0, x.shape[1], table), self.zero_row(x)
        n, rows, channels = x.shape
        shape = (n, *table.shape, channels)
        if channels > 1:
            return self.write("Gather", [x, self.constant(table, np.int32)], shape, axis=1)[0]
        # Runtimes copy one block after another: with one channel, longer ones if the batch comes last.
        turned = self.transpose(self.reshape(x, n, rows), 1, 0)
        (chosen,) = self.write("Gather", [turned, self.constant(table.reshape(-1), np.int32)], (table.size, n), axis=0)
        return self.reshape(self.transpose(chosen, 1, 0), *shape)

    def gather_sum(self, x: Value, table: Table) -> Value:
        """For every row of ``table`` [r, m] the sum of the pixels of ``x`` [n, p, c] that it names: [n, r, c]."""
        n, _, channels = x.shape
        chosen = self.gather(x, np.ascontiguousarray(table.T))
        rows, most = table.shape
        if most == 1:
            return self.reshape(chosen, n, rows, channels)
        # With the summands outside and long rows inside; the other way round takes ten times as long in ONNX Runtime.
        return self.reshape(self.reduce("ReduceSum", self.reshape(chosen, n, most, rows * channels), 1), n, rows, channels)

    def masked(self, x: Value, keep: Value) -> Value:
        """``x`` where ``keep``, of truth values, holds, and zero elsewhere."""
        return self.binary("Mul", x, self.unary("Cast", keep, to=self.kind))
