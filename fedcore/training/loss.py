"""The losses that training can be asked for, of one definition for every engine in torch and for every evaluation.

``cross_entropy`` is that of the softmax of the outputs, in nats. ``squared`` is the squared error between the outputs and the
one-hot target, the mean over the classes (``F.mse_loss`` on one-hot targets): an example's is ``sum_c (z_c - t_c)^2 / C``, its
gradient at the outputs ``2 (z - t) / C``. There is no softmax in it (Hui and Belkin 2021, "Evaluation of Neural Architectures
Trained with Square Loss vs Cross-Entropy in Classification Tasks", arXiv:2006.07322). Their rescaling of the true class's target
and weight is for data with many classes, ImageNet's thousand among theirs, and is left out: with few classes they use the plain
form too.

Gradients of the squared error are smaller, by about the number of classes: it wants a larger learning rate, and in DP-SGD a smaller
clipping norm.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["loss_of", "summed_with_errors"]


def loss_of(outputs: Tensor, labels: Tensor, loss: str, reduction: Literal["none", "mean", "sum"] = "mean") -> Tensor:
    """The loss of outputs [n, classes] for labels [n]: of each example [n] with "none", or their mean or sum.

    Raises:
        IndexError, RuntimeError: a label is no class.
    """
    if loss == "squared":
        return _reduced(_errors(outputs, labels).square().mean(1), reduction)
    return F.cross_entropy(outputs, labels, reduction=reduction)


def summed_with_errors(outputs: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """The sum of the losses and its gradient at the outputs [n, classes], for a backward pass that is no autograd's.

    Raises:
        IndexError, RuntimeError: a label is no class.
    """
    if loss == "squared":
        errors = _errors(outputs, labels)
        return errors.square().mean(1).sum(), errors.mul_(2 / outputs.shape[1])
    logarithms = outputs.log_softmax(1)
    found = F.nll_loss(logarithms, labels, reduction="sum")
    return found, logarithms.exp_().sub_(F.one_hot(labels, outputs.shape[1]))


def _errors(outputs: Tensor, labels: Tensor) -> Tensor:
    # F.one_hot looks at the labels' values, which vmap does not allow.
    return outputs - torch.zeros_like(outputs).scatter(1, labels[:, None], 1.0)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
