"""The reference engine: one client after another in a plain torch loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedcore.training.dpsgd import PrivateSteps
from fedcore.training.loss import loss_of
from fedcore.training.plan import ClientData, LocalPlan, LocalResult, batch_order, poisson_batches

__all__ = ["FlatParameters", "LoopTrainer"]


class FlatParameters:
    """A module's trainable parameters as views of one vector, and their gradients as views of another.

    Loading a client's start, an optimizer step and the update are then one operator each instead of one per parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        chosen = [p for p in model.parameters() if p.requires_grad]
        self.values = torch.cat([p.detach().reshape(-1) for p in chosen])
        self.gradient = torch.zeros_like(self.values)
        offset = 0
        for parameter in chosen:
            end = offset + parameter.numel()
            parameter.data = self.values[offset:end].view_as(parameter)
            parameter.grad = self.gradient[offset:end].view_as(parameter)
            offset = end


class LoopTrainer:
    """Trains clients one at a time with the model given, whose trainable parameters it takes over.

    ``microbatch``: examples in one forward pass of DP-SGD; the result does not depend on it beyond the last bits of a float.
    """

    chunk = 1

    def __init__(self, model: nn.Module, microbatch: int = 64) -> None:
        self.model = model.train()
        self.flat = FlatParameters(model)
        self.private = PrivateSteps(self.model, self.flat.gradient, microbatch)

    def train(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[LocalResult]:
        """See `plan.LocalTrainer`."""
        return (self._train_one(start, client, plan) for client in clients)

    def _train_one(self, start: Tensor, data: ClientData, plan: LocalPlan) -> LocalResult:
        values, gradient = self.flat.values, self.flat.gradient
        values.copy_(start)
        order = (poisson_batches if plan.dp else batch_order)(len(data.y), plan, data.rng)
        # Layers of a user's model that draw (dropout) do so from torch's generator.
        torch.default_generator.manual_seed(int(data.rng.integers(2**63)))
        velocity: Tensor | None = None
        total, trained = torch.zeros((), dtype=torch.float64), 0
        for loss, examples in (self.private.steps if plan.dp else self._steps)(data, plan, order):
            total += loss
            trained += examples
            if plan.weight_decay:
                gradient.add_(values, alpha=plan.weight_decay)
            if plan.proximal_mu:
                gradient.add_(values - start, alpha=plan.proximal_mu)
            if plan.momentum:
                velocity = gradient.clone() if velocity is None else velocity.mul_(plan.momentum).add_(gradient)
            values.add_(gradient if velocity is None else velocity, alpha=-plan.lr)
        return LocalResult(data.client, values - start, len(data.y), float(total) / trained if trained else math.nan)

    def _steps(
        self, data: ClientData, plan: LocalPlan, order: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
        """Leave each batch's mean gradient in the flat gradient; yields the sum of the batch's losses and its size."""
        for permutation in order:
            index = torch.from_numpy(permutation).to(data.y.device)
            x, y = data.x[index], data.y[index]
            for first in range(0, len(y), plan.batch_size):
                batch = y[first : first + plan.batch_size]
                loss = loss_of(self.model(x[first : first + plan.batch_size]), batch, plan.loss)
                self.flat.gradient.zero_()
                loss.backward()
                yield loss.detach().cpu() * len(batch), len(batch)
