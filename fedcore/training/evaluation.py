"""Accuracy and loss of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.training.loss import loss_of

__all__ = ["Score", "evaluate", "load_flat"]

_BATCH = 256


@dataclass(frozen=True)
class Score:
    """Sums over ``examples`` examples: correct top-1 predictions and losses (`training.loss`)."""

    examples: int
    correct: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """Share of correct predictions; nan without examples."""
        return self.correct / self.examples if self.examples else float("nan")

    @property
    def loss(self) -> float:
        """Mean loss; nan without examples."""
        return self.loss_sum / self.examples if self.examples else float("nan")


def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> Score:
    """Score ``model``, whose ``loss`` is one of `config.LOSSES`, in evaluation mode on x [n, ...], y [n]; its mode is restored."""
    training = model.training
    model.eval()
    correct, total = 0, 0.0
    with torch.no_grad():
        for first in range(0, len(y), _BATCH):
            labels = y[first : first + _BATCH]
            logits = model(x[first : first + _BATCH])
            correct += int((logits.argmax(1) == labels).sum())
            total += float(loss_of(logits.double(), labels, loss, "sum"))
    model.train(training)
    return Score(len(y), correct, total)


def load_flat(model: nn.Module, values: Tensor) -> None:
    """Copy ``values`` [d] into the trainable parameters, in the module's order."""
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(values[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
