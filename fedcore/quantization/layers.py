"""Quantization-aware layers: straight-through fake quantization that vmap, Opacus and autograd all see as plain operators.

Weights are symmetric per output channel in [-127, 127] with scale ``max|w| / 127``; activations are affine per tensor in
[-128, 127] with a range that is measured once and then frozen (Jacob et al. 2018, arXiv:1712.05877). Rounding is
``round(x * (1 / scale))``, half to even, as the runtimes do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.quantization.wire import ActivationRange

__all__ = [
    "FakeQuantize", "QuantConv1d", "QuantConv2d", "QuantLinear", "activation_ranges", "calibrate", "fake_quantize_weight",
    "float_arithmetic", "make_quantization_aware", "quantizers", "set_activation_ranges",
]  # fmt: skip


class _RoundWeight(torch.autograd.Function):
    """The weight's nearest int8 grid points; the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        peak = weight.flatten(1).abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny * 127)
        scale = (peak / 127).reshape(-1, *[1] * (weight.dim() - 1))
        return (weight * scale.reciprocal()).round_().mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is needed for the gradient."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _RoundActivation(torch.autograd.Function):
    """The activation's nearest grid points ``scale * i``, low <= i <= high; the gradient passes straight through where rounding
    alone stays on the grid, and is zero where the activation saturates, as in torch.fake_quantize_per_tensor_affine.

    One operator each way: written out in operators of torch it takes 2.4 times as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float, inverse: float, low: int, high: int) -> Tensor:
        # The zero point cancels: (round(x / s) + z clamped to int8, minus z) * s.
        return (x * inverse).round_().clamp(low, high).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float, int, int], output: Tensor) -> None:
        x, scale, _, low, high = inputs
        ctx.save_for_backward(x)
        ctx.ends = ((low - 0.5) * scale, (high + 0.5) * scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.ends), None, None, None, None


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """``weight`` [out, ...] rounded to its int8 grid, one scale per output channel. The scale carries no gradient."""
    return cast("Tensor", _RoundWeight.apply(weight))  # type: ignore[no-untyped-call]  # of torch's


class FakeQuantize(nn.Module):
    """Rounds an activation tensor to an int8 grid, once its range is frozen; before that it passes the tensor on.

    Put one where an exporter should place an integer boundary that no quantized layer's input gives by itself, for instance
    in front of an average pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: ActivationRange | None = None
        self.enabled = True
        self.observed: tuple[float, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observed is not None:
            low, high = torch.aminmax(x.detach())
            self.observed = (min(self.observed[0], float(low)), max(self.observed[1], float(high)))
        if self.frozen is None or not self.enabled:
            return x
        scale, zero = self.frozen.scale, self.frozen.zero_point
        inverse = float(np.float32(1) / np.float32(scale))  # the runtimes multiply by the float32 reciprocal
        rounded = _RoundActivation.apply(x, scale, inverse, -128 - zero, 127 - zero)  # type: ignore[no-untyped-call]  # of torch's
        return cast("Tensor", rounded)


class QuantLinear(nn.Linear):
    """Linear with int8 weights and int8 input, simulated in float."""

    input: FakeQuantize
    weight_enabled: bool

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return F.linear(self.input(input), _weight(self), self.bias)


class QuantConv1d(nn.Conv1d):
    """Conv1d with int8 weights and int8 input, simulated in float."""

    input: FakeQuantize
    weight_enabled: bool

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return cast("Tensor", self._conv_forward(self.input(input), _weight(self), self.bias))


class QuantConv2d(nn.Conv2d):
    """Conv2d with int8 weights and int8 input, simulated in float."""

    input: FakeQuantize
    weight_enabled: bool

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return cast("Tensor", self._conv_forward(self.input(input), _weight(self), self.bias))


QuantLayer = QuantLinear | QuantConv1d | QuantConv2d
_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}


def _weight(layer: QuantLayer) -> Tensor:
    return fake_quantize_weight(layer.weight) if layer.weight_enabled else layer.weight


def make_quantization_aware(model: nn.Module) -> nn.Module:
    """Turn every Linear, Conv1d and Conv2d of ``model`` into its quantization-aware form, in place; parameters keep their
    names and values. Other layers (GroupNorm, for instance) stay in float."""
    for module in model.modules():
        if type(module) in _QUANTIZED:
            # The subclasses add no constructor state of torch's, so changing the class keeps every parameter where it is.
            module.__class__ = _QUANTIZED[type(module)]
            layer = cast("QuantLayer", module)
            layer.weight_enabled = True
            layer.input = FakeQuantize()
    return model


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """The model's activation quantizers by name, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize))


class float_arithmetic:  # noqa: N801 - reads as a statement: with float_arithmetic(model)
    """Within this context the model computes in plain float: neither weights nor activations are rounded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _switch(self, on: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, QuantLayer):
                module.weight_enabled = on
            elif isinstance(module, FakeQuantize):
                module.enabled = on

    def __enter__(self) -> None:
        self._switch(False)

    def __exit__(self, *_: object) -> None:
        self._switch(True)


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, ActivationRange]:
    """Measure each activation's minimum and maximum over ``batches`` of inputs, and freeze the ranges found.

    Weights are rounded while measuring, as they are in training. Returns the ranges by quantizer name.
    """
    found = dict(quantizers(model))
    for quantizer in found.values():
        quantizer.frozen = None
        quantizer.observed = (0.0, 0.0)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    ranges = {name: ActivationRange.spanning(*(quantizer.observed or (0.0, 0.0))) for name, quantizer in found.items()}
    for quantizer in found.values():
        quantizer.observed = None
    set_activation_ranges(model, ranges)
    return ranges


def activation_ranges(model: nn.Module) -> dict[str, ActivationRange]:
    """The frozen ranges by quantizer name; empty before calibration."""
    return {name: quantizer.frozen for name, quantizer in quantizers(model) if quantizer.frozen is not None}


def set_activation_ranges(model: nn.Module, ranges: dict[str, ActivationRange]) -> None:
    """Freeze the ranges given; quantizers that are not named pass their tensors on."""
    for name, quantizer in quantizers(model):
        quantizer.frozen = ranges.get(name)
