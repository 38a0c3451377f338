"""Per-example gradients of layers in a row, without a graph of the whole model.

A chain needs neither hooks nor a graph: layer by layer forward, layer by layer back, and every product of a convolution (forward,
and its weight's gradients) works on the same copy of what its windows saw. The layers of the usual networks are written out; any
other without parameters, or with those that `rules` knows, is differentiated by autograd on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.quantization.layers import FakeQuantize, QuantLayer, fake_quantize_weight
from fedcore.training.loss import summed_with_errors
from fedcore.training.rules import RULES, Part, PerExample, Rule, column_order, columns, gradient_of, padded, product_parts

__all__ = ["ChainGradients", "why_not_chain"]

_aten: Any = torch.ops.aten


class ChainGradients:
    """Takes per-example gradients of ``model`` within a ``with`` block; `why_not_chain` must have nothing against the model.

    Every trainable parameter has a ``grad``, which stays the same tensor within the block. Hooks of the layers written out do
    not run. A convolution keeps its input once for every weight of a kernel, from its forward to its backward pass.

    Raises (when called):
        RuntimeError: a layer gave another number of rows than there are examples.
    """

    def __init__(self, model: nn.Module, loss: str = "cross_entropy") -> None:
        self.model, self.loss = model, loss
        self._links: list[_Link] = []

    def __enter__(self) -> ChainGradients:
        self._links = _links(cast("nn.Sequential", self.model))
        return self

    def __exit__(self, *_: object) -> None:
        self._links = []

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> PerExample:
        """Per-example gradients of the loss of x [n, ...], y [n]."""
        for link in self._links:
            x = link.forward(x)
            if len(x) != len(y):
                raise RuntimeError(f"a layer gave {len(x)} rows for {len(y)} examples")
        loss, errors = summed_with_errors(x, y, self.loss)
        parts: list[Part] = []
        first = next(i for i, link in enumerate(self._links) if link.trained)
        for i in range(len(self._links) - 1, first - 1, -1):
            parts[:0] = self._links[i].parts(errors)
            if i > first:
                errors = self._links[i].back(errors)
        return PerExample(loss, parts)


class _Link(ABC):
    """A layer; `parts` and `back` follow `forward` and take ``errors``, the loss's gradient at its output."""

    trained = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""

    @abstractmethod
    def back(self, errors: Tensor) -> Tensor:
        """The loss's gradient at the input."""

    def parts(self, errors: Tensor) -> Iterator[Part]:  # noqa: ARG002 - of a layer without parameters
        """The per-example gradients of the parameters."""
        return iter(())


class _Any(_Link):
    """A layer that autograd differentiates."""

    def __init__(self, layer: Callable[[Tensor], Tensor], rule: Rule | None = None) -> None:
        self.layer, self.rule, self.trained = layer, rule, rule is not None

    def forward(self, x: Tensor) -> Tensor:
        self.input = x.detach().requires_grad_(x.is_floating_point())
        with torch.enable_grad():
            self.output = self.layer(self.input)
        return self.output.detach()

    def parts(self, errors: Tensor) -> Iterator[Part]:
        return self.rule(self.input.detach(), errors) if self.rule else iter(())

    def back(self, errors: Tensor) -> Tensor:
        return torch.autograd.grad(self.output, self.input, errors)[0]


class _Relu(_Link):
    def forward(self, x: Tensor) -> Tensor:
        self.output = x.relu()  # in place it might change what others hold, the caller's x first of all
        return self.output

    def back(self, errors: Tensor) -> Tensor:
        return cast("Tensor", _aten.threshold_backward(errors, self.output, 0))


class _MaxPool(_Link):
    def __init__(self, layer: nn.MaxPool2d) -> None:
        sides = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.settings = [*([side] * 2 if isinstance(side, int) else side for side in sides), layer.ceil_mode]

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        output, self.chosen = _aten.max_pool2d_with_indices(x, *self.settings)
        return cast("Tensor", output)

    def back(self, errors: Tensor) -> Tensor:
        found = _aten.max_pool2d_with_indices_backward(errors, self.input, *self.settings, self.chosen)
        return cast("Tensor", found)


class _Flatten(_Link):
    def __init__(self, layer: nn.Flatten) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        return x.flatten(self.layer.start_dim, self.layer.end_dim)

    def back(self, errors: Tensor) -> Tensor:
        return torch.empty_like(self.input).copy_(errors.view(self.input.shape))  # in the input's memory format


class _Round(_Link):
    """The gradient passes where the input is not saturated, as `FakeQuantize` has it."""

    def __init__(self, layer: FakeQuantize) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        return cast("Tensor", self.layer(x))

    def back(self, errors: Tensor) -> Tensor:
        grid = self.layer.frozen
        if grid is None or not self.layer.enabled:
            return errors
        ends = [(end - grid.zero_point) * grid.scale for end in (-128.5, 127.5)]
        return cast("Tensor", _aten.hardtanh_backward(errors, self.input, *ends))


class _Linear(_Link):
    trained = True

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.rule = layer, RULES[nn.Linear](layer)

    def forward(self, x: Tensor) -> Tensor:
        self.input, self.weight = x, _weight(self.layer)
        return F.linear(x, self.weight, self.layer.bias)

    def parts(self, errors: Tensor) -> Iterator[Part]:
        return self.rule(self.input, errors)

    def back(self, errors: Tensor) -> Tensor:
        return errors @ self.weight


class _Convolution(_Link):
    """With as many zeros on either side; what it gives is in channels-last format, the fastest on a CPU."""

    trained = True

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        self.layer, self.bias, self.rule = layer, layer.bias, RULES[type(layer)](layer)
        self.gradients = gradient_of(layer.weight), gradient_of(layer.bias)
        pads = layer._reversed_padding_repeated_twice[-2::-2]
        self.settings = (layer.stride, pads, layer.dilation, False, [0] * len(pads), layer.groups, [True, False, False])
        self.pointwise = layer.groups == 1 and not any(pads) and {*layer.stride, *layer.kernel_size} == {1}

    def forward(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1 < x.shape[1]:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        self.input, self.weight = x, _weight(self.layer)
        if self.layer.groups > 1:
            return cast("Tensor", self.layer._conv_forward(self.input, self.weight, self.bias))
        self.padded = padded(self.layer, self.input)
        self.columns = columns(self.layer, self.padded)
        rows, self.matrix = self.columns.flatten(0, -2), column_order(self.weight, self.padded).flatten(1)
        output = rows @ self.matrix.t() if self.bias is None else torch.addmm(self.bias, rows, self.matrix.t())
        return output.view(*self.columns.shape[:-1], -1).movedim(-1, 1)

    def parts(self, errors: Tensor) -> Iterator[Part]:
        if self.layer.groups > 1:
            return self.rule(self.input, errors)
        weight, bias = self.gradients
        weight = None if weight is None else column_order(weight, self.padded)
        return product_parts(weight, bias, self.columns.flatten(1, -2), errors.flatten(2).mT)

    def back(self, errors: Tensor) -> Tensor:
        if self.pointwise:
            return (errors.movedim(1, -1) @ self.matrix).movedim(-1, 1)
        return cast("Tensor", _aten.convolution_backward(errors, self.input, self.weight, None, *self.settings)[0])


def _weight(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Tensor:
    return fake_quantize_weight(layer.weight) if isinstance(layer, QuantLayer) and layer.weight_enabled else layer.weight


def _links(model: nn.Sequential) -> list[_Link]:
    links: list[_Link] = []
    for layer in _layers(model):
        if _is_trained(layer):
            if isinstance(layer, QuantLayer):
                links.append(_Round(layer.input))
            links.append(_trained_link(layer))
        elif type(layer) is nn.MaxPool2d:
            behind_relu = bool(links) and isinstance(links[-1], _Relu)
            links.insert(len(links) - behind_relu, _MaxPool(layer))  # in front of it: the same, and less to rectify
        elif type(layer) is FakeQuantize:
            links.append(_Round(layer))
        elif type(layer) is nn.ReLU:
            links.append(_Relu())
        elif type(layer) is nn.Flatten:
            links.append(_Flatten(layer))
        else:
            links.append(_Any(layer))
    return links


def _trained_link(layer: Any) -> _Link:
    if isinstance(layer, nn.Linear):
        return _Linear(layer)
    rule = RULES[type(layer)](layer)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return _Any(layer, rule)
    pads = layer._reversed_padding_repeated_twice
    if layer.padding_mode == "zeros" and pads[::2] == pads[1::2]:
        return _Convolution(layer)
    return _Any(lambda x: layer._conv_forward(x, _weight(layer), layer.bias), rule)


def _layers(model: nn.Sequential) -> Iterator[nn.Module]:
    for layer in model:
        if type(layer) is nn.Sequential:
            yield from _layers(layer)
        else:
            yield layer


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def why_not_chain(model: nn.Module) -> str:
    """Why `ChainGradients` cannot take ``model``'s gradients even where `GhostGradients` can; empty when it can."""
    if type(model) is not nn.Sequential:
        return "the model is not a Sequential"
    trained = [layer for layer in _layers(model) if _is_trained(layer)]
    for layer in trained:
        if type(layer) not in RULES:
            return f"a {type(layer).__name__} is not one layer"
        if trained.count(layer) > 1:
            return "a layer runs twice"
    return ""
