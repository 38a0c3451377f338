"""Per-example gradients at the price of one forward and one backward pass, for the layers whose gradients we can write down.

A layer's gradient for one example is a product of what went into the layer and of the loss's gradient at its output. Both are
there after one backward pass that stops at the layers' outputs; norms follow without one gradient per example where that is
cheaper (ghost norms: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2022, arXiv:2205.10683), and the clipped sum is the same
product with each example's output gradient scaled.

What went into a quantized layer is its rounded input; the rounded weight's gradient is the float weight's (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fedcore.quantization.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear

__all__ = ["Factored", "GhostGradients", "Materialised", "Part", "PerExample", "why_not_ghost"]


class Materialised:
    """The per-example gradients of one parameter, as rows [n, d], in the order of ``target``, a view of the parameter's grad."""

    def __init__(self, target: Tensor, rows: Tensor) -> None:
        self.target, self.rows = target, rows

    def norms(self) -> Tensor:
        """L2 norms [n]."""
        return _norms(self.rows)

    def add(self, factors: Tensor) -> None:
        """Add the sum of the examples' gradients times ``factors`` [n] to the target."""
        if self.target.dim() == 1:
            self.target.addmv_(self.rows.t(), factors)
        else:
            self.target.add_((factors @ self.rows).view(self.target.shape))


class Factored:
    """The per-example gradients of a weight with target [o, i], each a product errors^T @ inputs.

    errors [n, p, o] and inputs [n, p, i]; where p is 1 both come without it.
    """

    def __init__(self, target: Tensor, inputs: Tensor, errors: Tensor) -> None:
        self.target, self.inputs, self.errors = target, inputs, errors

    def norms(self) -> Tensor:
        """L2 norms [n]: from the inner product of both factors' Gram matrices, which for p = 1 are squared norms.

        Where positions cancel, rounding can take that inner product to zero or below: its error bound is added, so that an
        example is clipped too much rather than not at all.
        """
        if self.inputs.dim() == 2:
            return _norms(self.inputs).mul_(_norms(self.errors))
        grams = [torch.bmm(side, side.mT) for side in (self.inputs, self.errors)]
        lengths = [gram.diagonal(dim1=1, dim2=2).sum(1) for gram in grams]
        error = lengths[0].mul_(lengths[1]).mul_(4 * torch.finfo(lengths[0].dtype).eps)
        return (grams[0] * grams[1]).sum((1, 2)).clamp_(min=0).add_(error).sqrt_()

    def add(self, factors: Tensor) -> None:
        """As `Materialised.add`."""
        if self.inputs.dim() == 2:
            self.target.addmm_((self.errors * factors[:, None]).t(), self.inputs)
        else:
            scaled = self.errors * factors[:, None, None]
            self.target.addmm_(scaled.flatten(0, 1).t(), self.inputs.flatten(0, 1))


Part = Materialised | Factored
Rule = Callable[[Tensor, Tensor], Iterator[Part]]


@dataclass(frozen=True)
class PerExample:
    """The sum of a batch's losses and the per-example gradients of every trainable parameter, in the module's order."""

    loss: Tensor
    parts: list[Part]

    def norms(self) -> Tensor:
        """L2 norms [n] over all parameters together."""
        return _norms(torch.stack([part.norms() for part in self.parts], 1))

    def add(self, factors: Tensor) -> None:
        """Add the sum of the examples' gradients times ``factors`` [n] to every parameter's ``grad``."""
        for part in self.parts:
            part.add(factors)


class GhostGradients:
    """Takes per-example gradients of ``model`` within a ``with`` block; `why_not_ghost` must have nothing against the model.

    Every trainable parameter has a ``grad``, which stays the same tensor within the block. ``channels_last`` gives 2d
    convolutions their input in that memory format, the fastest on a CPU (pooling: eight times); a forward pass that calls
    ``view`` behind a convolution needs the other.

    Raises (when called):
        RuntimeError: a layer ran not once, or not on the batch.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool) -> None:
        self.model, self.channels_last = model, channels_last
        self.layers = {layer: name for name, layer in _trainable_layers(model)}
        self._rules: dict[nn.Module, Rule] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, GradientEdge] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GhostGradients:
        for layer in self.layers:
            self._rules[layer] = _RULES[type(layer)](layer)
            if isinstance(layer, QuantLayer):
                self._handles.append(layer.input.register_forward_hook(self._rounded_input(layer)))
            elif isinstance(layer, nn.Conv2d) and self.channels_last:
                self._handles.append(layer.register_forward_pre_hook(_reformat))
            self._handles.append(layer.register_forward_hook(self._ran))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for table in (self._rules, self._inputs, self._outputs):
            table.clear()

    def __call__(self, x: Tensor, y: Tensor) -> PerExample:
        """Per-example gradients of the cross-entropy of x [n, ...], y [n]."""
        self._inputs.clear()
        self._outputs.clear()
        loss = F.cross_entropy(self.model(x), y, reduction="sum")
        for layer, name in self.layers.items():
            if layer not in self._outputs:
                raise RuntimeError(f"layer {name} did not run")
            if len(self._inputs[layer]) != len(y):
                raise RuntimeError(f"layer {name} ran on {len(self._inputs[layer])} rows for {len(y)} examples")
        errors = dict(zip(self._outputs, torch.autograd.grad(loss, list(self._outputs.values())), strict=True))
        with torch.no_grad():
            parts = [part for layer, rule in self._rules.items() for part in rule(self._inputs[layer], errors[layer])]
        return PerExample(loss.detach(), parts)

    def _rounded_input(self, layer: QuantLayer) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if self.channels_last and isinstance(layer, nn.Conv2d):
                output = _channels_last(output)
            self._inputs[layer] = output.detach()
            return output

        return keep

    def _ran(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if layer in self._outputs:
            raise RuntimeError(f"layer {self.layers[layer]} ran twice")
        if not arguments:
            raise RuntimeError(f"layer {self.layers[layer]} got its input by keyword")
        if not isinstance(layer, QuantLayer):
            self._inputs[layer] = arguments[0].detach()
        # The edge, not the tensor: an operator in place on the output would move the tensor to another place in the graph.
        self._outputs[layer] = get_gradient_edge(output)


def why_not_ghost(model: nn.Module) -> str:
    """Which layer of ``model`` is not one that `GhostGradients` knows; empty when all trainable ones are."""
    owners: dict[int, str] = {}
    for name, layer in _trainable_layers(model):
        if type(layer) not in _RULES:
            return f"layer {name or 'model'} ({type(layer).__name__}) has no rule for ghost norms"
        for key, parameter in _trainable(layer):
            owner = owners.setdefault(id(parameter), f"{name}.{key}")
            if owner != f"{name}.{key}":
                return f"parameter {name}.{key} is {owner} too"
    return ""


def _norms(rows: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(rows, dim=1))


def _trainable(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in layer.named_parameters(recurse=False) if p.requires_grad)


def _trainable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if any(_trainable(layer)))


def _channels_last(x: Tensor) -> Tensor:
    _, channels, height, width = x.shape
    if channels > 1:
        return x.contiguous(memory_format=torch.channels_last)
    # torch takes one channel for both formats and would keep on with the other one.
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))


def _reformat(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_channels_last(arguments[0]), *arguments[1:]) if arguments else arguments


def _grad(parameter: Tensor | None) -> Tensor | None:
    return parameter.grad if parameter is not None and parameter.requires_grad else None


def _linear(layer: nn.Linear) -> Rule:
    weight, bias = _grad(layer.weight), _grad(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if inputs.dim() > 2:
            inputs, errors = inputs.flatten(1, -2), errors.flatten(1, -2)
        if weight is not None:
            yield _product(weight, inputs, errors)
        if bias is not None:
            yield Materialised(bias, errors if errors.dim() == 2 else errors.sum(1))

    return rule


def _convolution(layer: nn.Conv1d | nn.Conv2d) -> Rule:
    weight, bias = _grad(layer.weight), _grad(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        errors = errors.flatten(2)  # [n, output channels, positions]
        if weight is not None:
            yield _kernel(layer, weight, _padded(layer, inputs), errors)
        if bias is not None:
            yield Materialised(bias, errors.sum(2))

    return rule


def _padded(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    pads = layer._reversed_padding_repeated_twice
    if not any(pads):
        return inputs
    return F.pad(inputs, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _kernel(layer: nn.Conv1d | nn.Conv2d, gradient: Tensor, inputs: Tensor, errors: Tensor) -> Part:
    """The weight's part: errors [n, o, p] times what every output position sees of the padded inputs [n, c, ...].

    Windows are copied by strides, which takes half of torch.nn.functional.unfold's time.
    """
    n, channels, *sizes = inputs.shape
    space = inputs.stride()[2:]
    spans = [gap * (size - 1) for size, gap in zip(layer.kernel_size, layer.dilation, strict=True)]
    positions = [(size - span - 1) // step + 1 for size, span, step in zip(sizes, spans, layer.stride, strict=True)]
    steps = [stride * step for stride, step in zip(space, layer.stride, strict=True)]
    gaps = [stride * gap for stride, gap in zip(space, layer.dilation, strict=True)]
    if layer.groups == 1 and inputs.stride(1) == 1 < channels:  # channels last: whole pixels are copied
        rows = inputs.as_strided((n, *positions, *layer.kernel_size, channels), (inputs.stride(0), *steps, *gaps, 1))
        rows = torch.bmm(errors, rows.reshape(n, errors.shape[2], -1)).flatten(1)
        return Materialised(gradient.movedim(1, -1), rows)
    patches = inputs.as_strided((n, channels, *layer.kernel_size, *positions), (*inputs.stride()[:2], *gaps, *steps))
    if layer.groups == 1 and channels == 1:  # few rows: twice as fast this way round
        rows = torch.bmm(patches.reshape(n, -1, errors.shape[2]), errors.mT).flatten(1)
        return Materialised(gradient.movedim(0, -1), rows)
    if layer.groups == 1:
        return _product(gradient.flatten(1), patches.reshape(n, -1, errors.shape[2]).mT, errors.mT)
    by_group = [side.reshape(n * layer.groups, -1, errors.shape[2]) for side in (errors, patches)]
    return Materialised(gradient.flatten(), torch.bmm(by_group[0], by_group[1].mT).view(n, -1))


def _product(gradient: Tensor, inputs: Tensor, errors: Tensor) -> Part:
    """Two factors where their Gram matrices are smaller than the gradient: 2 p^2 < o i (Bu et al. 2022, section 3)."""
    if inputs.dim() == 2 or 2 * inputs.shape[1] ** 2 < gradient.numel():
        return Factored(gradient, inputs, errors)
    return Materialised(gradient.flatten(), torch.bmm(errors.mT, inputs).flatten(1))


def _group_norm(layer: nn.GroupNorm) -> Rule:
    weight, bias = _grad(layer.weight), _grad(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if weight is not None:
            normalised = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
            yield Materialised(weight, (errors * normalised).flatten(2).sum(2))
        if bias is not None:
            yield Materialised(bias, errors.flatten(2).sum(2))

    return rule


def _layer_norm(layer: nn.LayerNorm) -> Rule:
    weight, bias = _grad(layer.weight), _grad(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if weight is not None:
            normalised = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
            yield Materialised(weight.flatten(), (errors * normalised).reshape(len(errors), -1, weight.numel()).sum(1))
        if bias is not None:
            yield Materialised(bias.flatten(), errors.reshape(len(errors), -1, bias.numel()).sum(1))

    return rule


_RULES: dict[type[nn.Module], Callable[[Any], Rule]] = {
    nn.Linear: _linear, QuantLinear: _linear,
    nn.Conv1d: _convolution, QuantConv1d: _convolution, nn.Conv2d: _convolution, QuantConv2d: _convolution,
    nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm,
}  # fmt: skip
