"""Which way per-example gradients are taken, and the proof that the way taken is right for the model at hand.

Opacus's hooks, the reference, serve any model that they serve at all; `ghost` is faster for known layers, `chain` for known
layers in a row. All can be wrong without any error (a parameter that is used outside its own layer's call, a rounding that
autograd does not see): so each is compared with one backward pass per example before a model trains privately.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fedcore.errors import Refused
from fedcore.training.chain import ChainGradients, why_not_chain
from fedcore.training.ghost import GhostGradients, why_not_ghost
from fedcore.training.loss import loss_of
from fedcore.training.rules import Materialised, Part, PerExample

__all__ = ["GradientChoice", "OpacusGradients", "check_per_example", "choose_gradients"]

_AGREES = "every trainable layer is known, and one backward pass per example gives the same"
PerExampleGradients = Callable[[Tensor, Tensor], PerExample]


class OpacusGradients:
    """Takes per-example gradients of ``model`` within a ``with`` block by Opacus's hooks; the reference.

    Opacus copies layers that it has no rule for (ours, among them) when it is attached: what is frozen or switched in the
    model later would not reach the gradients. Enter anew after such a change.

    Raises (when called):
        Refused: a trainable parameter got no per-example gradients.
    """

    def __init__(self, model: nn.Module, loss: str = "cross_entropy") -> None:
        self.model, self.loss = model, loss
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def __enter__(self) -> OpacusGradients:
        from opacus import GradSampleModule

        self.targets = [cast("Tensor", p.grad).view(-1) for _, p in self.trainable]
        self.hooked = GradSampleModule(self.model, loss_reduction="sum")
        return self

    def __exit__(self, *_: object) -> None:
        self.hooked.to_standard_module()
        for module in self.model.modules():
            for leftover in ("activations", "max_batch_len"):  # of a pass that was not completed
                module.__dict__.pop(leftover, None)

    def __call__(self, x: Tensor, y: Tensor) -> PerExample:
        """Per-example gradients of the loss of x [n, ...], y [n]."""
        self.hooked.set_grad_sample_to_none()
        loss = loss_of(self.hooked(x), y, self.loss, "sum")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the first layer's input needs no gradient
            torch.autograd.grad(loss, [p for _, p in self.trainable], allow_unused=True)
        parts: list[Part] = []
        for (name, parameter), target in zip(self.trainable, self.targets, strict=True):
            rows: Tensor | None = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus puts it there
            if rows is None:
                raise Refused(f"parameter {name} gets no per-example gradient; freeze it or use it in its own layer")
            if rows.shape != (len(y), *parameter.shape):
                raise Refused(f"parameter {name} has {len(rows)} per-example gradients for {len(y)} examples")
            parts.append(Materialised(target, rows.reshape(len(rows), -1)))
        return PerExample(loss.detach(), parts)


_PATHS: dict[str, Callable[[nn.Module, str], AbstractContextManager[PerExampleGradients]]] = {
    "chain": ChainGradients,
    "ghost-channels-last": partial(GhostGradients, channels_last=True),
    "ghost": partial(GhostGradients, channels_last=False),
    "opacus": OpacusGradients,
}


@dataclass(frozen=True)
class GradientChoice:
    """The way per-example gradients are taken ("chain", "ghost-channels-last", "ghost" or "opacus") and the rule that chose it."""

    path: str
    reason: str

    def open(self, model: nn.Module, loss: str = "cross_entropy") -> AbstractContextManager[PerExampleGradients]:
        """What takes ``model``'s per-example gradients of a loss within a ``with`` block."""
        return _PATHS[self.path](model, loss)


def choose_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> GradientChoice:
    """The fastest way that agrees with one backward pass per example of x [n, ...], y [n]; Opacus's where no other does.

    Ghost norms run in channels-last format where the model has a 2d convolution and its forward pass can do with it.
    """
    against = why_not_ghost(model)
    if against:
        return GradientChoice("opacus", against)
    if not why_not_chain(model) and not _fault("chain", model, x, y, loss):
        return GradientChoice("chain", _AGREES)
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()) and not _fault("ghost-channels-last", model, x, y, loss):
        return GradientChoice("ghost-channels-last", _AGREES)
    against = _fault("ghost", model, x, y, loss)
    return GradientChoice("opacus", against) if against else GradientChoice("ghost", _AGREES)


def check_per_example(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> GradientChoice:
    """The way to take ``model``'s per-example gradients, in the state (activation ranges, rounding) that it is in now.

    Compared in float64 on a copy whose parameters are moved a little, so that a layer that starts at zero hides nothing;
    dropout layers are off. A handful of examples is enough.

    Raises:
        Refused: a trainable parameter gets no per-example gradient or a wrong one on either path.
    """
    choice = choose_gradients(model, x, y, loss)
    if choice.path == "opacus" and (fault := _fault("opacus", model, x, y, loss)):
        also = "" if fault == choice.reason else f" ({choice.reason})"
        raise Refused(f"DP-SGD: model: {fault}{also}")
    return choice


def _fault(path: str, model: nn.Module, x: Tensor, y: Tensor, loss: str) -> str:
    """What is wrong with the per-example gradients of ``path``; empty when they are right."""
    try:
        twin, x, truth, tolerance = _one_by_one(model, x, y, loss)
        with GradientChoice(path, "").open(twin, loss) as gradients:
            found = gradients(x, y)
        for part, (name, rows) in zip(found.parts, truth.items(), strict=True):
            if not _agree(part, twin.get_parameter(name), rows, tolerance):
                return f"parameter {name} gets a wrong per-example gradient"
    except Refused as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a user's model may raise anything, and so does Opacus where it gives up
        return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:200]}"
    return ""


def _one_by_one(
    model: nn.Module, x: Tensor, y: Tensor, loss: str
) -> tuple[nn.Module, Tensor, dict[str, Tensor], float]:  # fmt: skip
    """A copy of ``model`` to compare on, its input, the true gradients [n, ...] by parameter, and the relative tolerance."""
    try:
        twin, inputs = _moved(model).double(), x.double() if x.is_floating_point() else x
        return twin, inputs, _truth(twin, inputs, y, loss), 1e-7
    except RuntimeError:  # a forward pass that insists on float32
        twin = _moved(model)
        return twin, x, _truth(twin, x, y, loss), 1e-2


def _moved(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        fan_in = parameter.numel() // max(1, len(parameter)) if parameter.dim() else 1
        step = torch.randn(parameter.shape, generator=generator) / max(1, fan_in) ** 0.5
        parameter.data = parameter.data + 0.1 * step.to(parameter)  # out of place: a copy may share memory with others
    return twin


def _truth(twin: nn.Module, x: Tensor, y: Tensor, loss: str) -> dict[str, Tensor]:
    """One backward pass per example. Leaves zeros in every trainable parameter's ``grad``."""
    with torch.no_grad():
        if not torch.equal(twin(x), twin(x)):
            raise Refused("the forward pass draws random numbers outside dropout layers")
    trainable = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(y)):
        one = loss_of(twin(x[i : i + 1]), y[i : i + 1], loss)
        rows.append(torch.autograd.grad(one, list(trainable.values()), allow_unused=True, materialize_grads=True))
    for parameter in trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    return {name: torch.stack(column) for name, column in zip(trainable, zip(*rows, strict=True), strict=True)}


def _agree(part: Part, parameter: nn.Parameter, truth: Tensor, tolerance: float) -> bool:
    norms = torch.linalg.vector_norm(truth.reshape(len(truth), -1), dim=1)
    close = torch.allclose(part.norms(), norms, rtol=tolerance, atol=tolerance * float(norms.max()))
    sums = cast("Tensor", parameter.grad)
    for factors, row in zip(torch.eye(len(truth)).to(truth), truth, strict=True):
        sums.zero_()
        part.add(factors)
        close = close and torch.allclose(sums, row, rtol=tolerance, atol=tolerance * float(truth.abs().max()))
    return close
