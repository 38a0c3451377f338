"""Per-example gradients of one parameter inside a graph: their norms, and their sum with a factor for every example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fedcore.portable.nodes import Nodes, Value

__all__ = ["Part", "Product", "Rows", "as_it_is"]

Finish = Callable[[Nodes, Value], Value]  # from a sum in the order of the graph to the parameter's own order


def as_it_is(_: Nodes, total: Value) -> Value:
    """For a sum that is in the parameter's order already."""
    return total


class Part(Protocol):
    """The gradients of one parameter, whose name in the model is ``target``."""

    target: str

    def squared_norms(self, nodes: Nodes) -> Value:
        """Squared L2 norms [n, 1]."""
        ...

    def total(self, nodes: Nodes, factors: Value | None) -> Value:
        """The sum over examples times ``factors`` [n, 1], of as many elements as the parameter has, in its order."""
        ...


@dataclass
class Rows:
    """Gradients that are rows [n, d]."""

    target: str
    rows: Value
    finish: Finish = as_it_is

    def squared_norms(self, nodes: Nodes) -> Value:
        """See `Part`."""
        return nodes.reduce("ReduceSumSquare", self.rows, 1)

    def total(self, nodes: Nodes, factors: Value | None) -> Value:
        """See `Part`."""
        if factors is None:
            return self.finish(nodes, nodes.reduce("ReduceSum", self.rows, 0))
        return self.finish(nodes, nodes.product(factors, self.rows, left=True))


@dataclass
class Product:
    """Gradients errors^T @ inputs [o, i] of a weight; inputs [n, i] and errors [n, o], or [n, p, i] and [n, p, o].

    With one position the norm is the product of both factors' norms, and no example's gradient is ever written out (Goodfellow
    2015, arXiv:1510.01799); with more, they are: sums over few positions of small kernels.
    """

    target: str
    inputs: Value
    errors: Value
    finish: Finish = as_it_is

    def squared_norms(self, nodes: Nodes) -> Value:
        """See `Part`."""
        if len(self.inputs.shape) == 2:
            return nodes.binary("Mul", *(nodes.reduce("ReduceSumSquare", side, 1) for side in (self.inputs, self.errors)))
        self._rows = Rows(self.target, self._each(nodes), self.finish)
        return self._rows.squared_norms(nodes)

    def total(self, nodes: Nodes, factors: Value | None) -> Value:
        """See `Part`; with factors, after `squared_norms`."""
        if factors is not None and len(self.inputs.shape) > 2:
            return self._rows.total(nodes, factors)
        errors = self.errors if factors is None else nodes.binary("Mul", self.errors, factors)
        flat = [nodes.reshape(side, side.size // side.shape[-1], side.shape[-1]) for side in (errors, self.inputs)]
        return self.finish(nodes, nodes.product(flat[0], flat[1], left=True))

    def _each(self, nodes: Nodes) -> Value:
        n, _, outputs = self.errors.shape
        each = nodes.matmul(nodes.transpose(self.errors, 0, 2, 1), self.inputs)
        return nodes.reshape(each, n, outputs * self.inputs.shape[-1])
