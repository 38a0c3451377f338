"""Per-example gradients of one layer, from what went into it and the loss's gradient at its output.

A layer's gradient for one example is a product of the two. Norms follow without one gradient per example where that is cheaper
(ghost norms: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2022, arXiv:2205.10683), and the clipped sum is the same product with
each example's output gradient scaled.

What went into a quantized layer is its rounded input; the rounded weight's gradient is the float weight's (straight-through).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.quantization.layers import QuantConv1d, QuantConv2d, QuantLinear

__all__ = [
    "RULES", "Factored", "Materialised", "Part", "PerExample", "Rule", "column_order", "columns", "gradient_of", "padded",
    "product_parts",
]  # fmt: skip


class Materialised:
    """The per-example gradients of one parameter, as rows [n, d], in the order of ``target``, a view of the parameter's grad."""

    def __init__(self, target: Tensor, rows: Tensor) -> None:
        self.target, self.rows = target, rows

    def norms(self) -> Tensor:
        """L2 norms [n]."""
        return _norms(self.rows)

    def add(self, factors: Tensor) -> None:
        """Add the sum of the examples' gradients times ``factors`` [n] to the target."""
        if self.target.is_contiguous():
            self.target.view(-1).addmv_(self.rows.t(), factors)
        else:
            self.target.add_((factors @ self.rows).view(self.target.shape))


class Factored:
    """The per-example gradients of a weight with target [o, ...], o i elements, each a product errors^T @ inputs.

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
        inputs, errors = self.inputs, self.errors * factors.view(-1, *[1] * (self.errors.dim() - 1))
        if inputs.dim() == 3:
            inputs, errors = inputs.flatten(0, 1), errors.flatten(0, 1)
        if self.target.dim() == 2:
            self.target.addmm_(errors.t(), inputs)
        else:
            self.target.add_((errors.t() @ inputs).view(self.target.shape))


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


def gradient_of(parameter: Tensor | None) -> Tensor | None:
    """What a parameter's gradient is added to; None where it is not trained."""
    return parameter.grad if parameter is not None and parameter.requires_grad else None


def _linear(layer: nn.Linear) -> Rule:
    weight, bias = gradient_of(layer.weight), gradient_of(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if inputs.dim() > 2:
            inputs, errors = inputs.flatten(1, -2), errors.flatten(1, -2)
        return product_parts(weight, bias, inputs, errors)

    return rule


def product_parts(weight: Tensor | None, bias: Tensor | None, inputs: Tensor, errors: Tensor) -> Iterator[Part]:
    """The parts of a layer ``inputs @ weight^T + bias`` whose gradients are ``weight`` [o, ...] and ``bias`` [o], None if frozen.

    inputs [n, i] and errors [n, o], or [n, p, i] and [n, p, o]. The weight's part keeps two factors where their Gram matrices
    are smaller than itself: 2 p^2 < o i (Bu et al. 2022, section 3).
    """
    single = inputs.dim() == 2
    if weight is not None:
        if single or 2 * inputs.shape[1] ** 2 < weight.numel():
            yield Factored(weight, inputs, errors)
        else:
            yield Materialised(weight, torch.bmm(errors.mT, inputs).flatten(1))
    if bias is not None:
        yield Materialised(bias, errors if single else errors.sum(1))


def _convolution(layer: nn.Conv1d | nn.Conv2d) -> Rule:
    weight, bias = gradient_of(layer.weight), gradient_of(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        inputs, errors = padded(layer, inputs), errors.flatten(2).mT  # [n, positions, output channels]
        if weight is not None and layer.groups > 1:
            yield Materialised(weight.flatten(), _grouped(layer, inputs, errors))
            yield from product_parts(None, bias, inputs, errors)
        elif weight is not None:
            yield from product_parts(column_order(weight, inputs), bias, columns(layer, inputs).flatten(1, -2), errors)
        else:
            yield from product_parts(None, bias, inputs, errors)

    return rule


def padded(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """The inputs [n, c, ...] with the margin that the layer adds to them."""
    pads = layer._reversed_padding_repeated_twice
    if not any(pads):
        return inputs
    return F.pad(inputs, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


@lru_cache(maxsize=1024)
def _windows(
    kernel: tuple[int, ...], step: tuple[int, ...], gap: tuple[int, ...], shape: torch.Size, strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Positions of a kernel on padded inputs of ``shape`` [n, c, ...], and the strides of kernel elements and of positions."""
    spans = [g * (k - 1) for k, g in zip(kernel, gap, strict=True)]
    positions = tuple((size - span - 1) // s + 1 for size, span, s in zip(shape[2:], spans, step, strict=True))
    return positions, tuple(map(operator.mul, strides[2:], gap)), tuple(map(operator.mul, strides[2:], step))


def columns(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What every output position sees of the padded inputs [n, c, ...]: [n, ..., i], with i in the order of `column_order`.

    Copied by strides in the longest runs that memory has, which takes half of torch.nn.functional.unfold's time or less.
    """
    n, channels = inputs.shape[:2]
    (first, pixel, *_), kernel = inputs.stride(), layer.kernel_size
    positions, gaps, steps = _windows(kernel, layer.stride, layer.dilation, inputs.shape, inputs.stride())
    if _has_whole_pixels(inputs):
        seen = inputs.as_strided((n, *positions, *kernel, channels), (first, *steps, *gaps, 1))
        return seen.reshape(n, *positions, -1)
    seen = inputs.as_strided((channels, *kernel, n, *positions), (pixel, *gaps, first, *steps))
    return seen.reshape(-1, n, *positions).movedim(0, -1)


def column_order(weight: Tensor, inputs: Tensor) -> Tensor:
    """A convolution's weight, or its gradient, [o, ...] with its elements in the order of the last dimension of `columns`."""
    return weight.movedim(1, -1) if _has_whole_pixels(inputs) else weight.flatten(1)


def _has_whole_pixels(inputs: Tensor) -> bool:
    return inputs.stride(1) == 1 < inputs.shape[1]  # channels last: a pixel's channels are neighbours


def _grouped(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, errors: Tensor) -> Tensor:
    """The weight's gradients [n, d] of a convolution in groups, from padded inputs [n, c, ...] and errors [n, p, o]."""
    n, channels = inputs.shape[:2]
    (first, pixel, *_), kernel = inputs.stride(), layer.kernel_size
    positions, gaps, steps = _windows(kernel, layer.stride, layer.dilation, inputs.shape, inputs.stride())
    if layer.groups == channels:  # depthwise: products of numbers, for which bmm takes four times as long
        seen = inputs.as_strided((*kernel, n, *positions, channels, 1), (*gaps, first, *steps, pixel, 1))
        errors = errors.view(n, *positions, channels, -1)
        space = tuple(range(1, len(positions) + 1))
        return torch.stack([(seen[at] * errors).sum(space) for at in itertools.product(*map(range, kernel))], -1).flatten(1)
    seen = inputs.as_strided((n, channels, *kernel, *positions), (first, pixel, *gaps, *steps))
    rows = seen.reshape(n * layer.groups, -1, errors.shape[1])
    return torch.bmm(errors.mT.reshape(n * layer.groups, -1, errors.shape[1]), rows.mT).view(n, -1)


def _group_norm(layer: nn.GroupNorm) -> Rule:
    weight, bias = gradient_of(layer.weight), gradient_of(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if weight is not None:
            normalised = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
            yield Materialised(weight, (errors * normalised).flatten(2).sum(2))
        if bias is not None:
            yield Materialised(bias, errors.flatten(2).sum(2))

    return rule


def _layer_norm(layer: nn.LayerNorm) -> Rule:
    weight, bias = gradient_of(layer.weight), gradient_of(layer.bias)

    def rule(inputs: Tensor, errors: Tensor) -> Iterator[Part]:
        if weight is not None:
            normalised = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
            yield Materialised(weight.flatten(), (errors * normalised).reshape(len(errors), -1, weight.numel()).sum(1))
        if bias is not None:
            yield Materialised(bias.flatten(), errors.reshape(len(errors), -1, bias.numel()).sum(1))

    return rule


RULES: dict[type[nn.Module], Callable[[Any], Rule]] = {
    nn.Linear: _linear, QuantLinear: _linear,
    nn.Conv1d: _convolution, QuantConv1d: _convolution, nn.Conv2d: _convolution, QuantConv2d: _convolution,
    nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm,
}  # fmt: skip


def _norms(rows: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(rows, dim=1))
