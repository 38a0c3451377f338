"""Per-example gradients of any forward pass that calls known layers, at the price of one forward and one backward pass.

Hooks note what went into each trainable layer; the backward pass stops at the layers' outputs, and `rules` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fedcore.quantization.layers import QuantLayer
from fedcore.training.loss import loss_of
from fedcore.training.rules import RULES, PerExample, Rule

__all__ = ["GhostGradients", "why_not_ghost"]


class GhostGradients:
    """Takes per-example gradients of ``model`` within a ``with`` block; `why_not_ghost` must have nothing against the model.

    Every trainable parameter has a ``grad``, which stays the same tensor within the block. ``channels_last`` gives 2d
    convolutions their input in that memory format, the fastest on a CPU (pooling: eight times); a forward pass that calls
    ``view`` behind a convolution needs the other.

    Raises (when called):
        RuntimeError: a layer ran not once, or not on the batch.
    """

    def __init__(self, model: nn.Module, loss: str = "cross_entropy", *, channels_last: bool) -> None:
        self.model, self.loss, self.channels_last = model, loss, channels_last
        self.layers = {layer: name for name, layer in _trainable_layers(model)}
        self._rules: dict[nn.Module, Rule] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, GradientEdge] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GhostGradients:
        for layer in self.layers:
            self._rules[layer] = RULES[type(layer)](layer)
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
        """Per-example gradients of the loss of x [n, ...], y [n]."""
        self._inputs.clear()
        self._outputs.clear()
        loss = loss_of(self.model(x), y, self.loss, "sum")
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
        if type(layer) not in RULES:
            return f"layer {name or 'model'} ({type(layer).__name__}) has no rule for ghost norms"
        for key, parameter in _trainable(layer):
            owner = owners.setdefault(id(parameter), f"{name}.{key}")
            if owner != f"{name}.{key}":
                return f"parameter {name}.{key} is {owner} too"
    return ""


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
