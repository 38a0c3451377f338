"""Many clients at once: torch.func.vmap over the clients of a chunk, for accelerators.

Clients of different sizes run in lockstep: a client that has no batch left in a step, or a shorter one, computes on masked
rows, which reach neither its loss, its gradient nor its optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from fedcore.training.dpsgd import clipping_factors, noise_of
from fedcore.training.loss import loss_of
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, LocalResult, batch_order, poisson_batches

__all__ = ["VmapTrainer"]

Tensors = dict[str, Tensor]
# Of c clients: gradients [c, d], sums of losses [c], numbers of examples [c], who takes part in the step [c, 1].
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Step = Callable[[Tensor], Gradients]  # from the clients' values [c, d]


class VmapTrainer:
    """Trains ``chunk`` clients at a time; the result does not depend on ``chunk`` beyond the last bits of a float.

    ``budget``: values of per-example gradients held at a time in DP-SGD; larger batches are accumulated in pieces.
    """

    def __init__(self, model: nn.Module, chunk: int = 64, budget: int = 1 << 27) -> None:
        self.model = model.train()
        self.chunk, self.budget = chunk, budget
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.shapes = [p.shape for p in model.parameters() if p.requires_grad]
        self.dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
        self.fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def train(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[LocalResult]:
        """See `plan.LocalTrainer`."""
        for first in range(0, len(clients), self.chunk):
            yield from self._train_chunk(start, clients[first : first + self.chunk], plan)

    def _train_chunk(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> list[LocalResult]:
        values = start.expand(len(clients), -1).clone()
        velocity: Tensor | None = None
        total, trained = torch.zeros(2, len(clients), dtype=torch.float64)
        for step in self._private_steps(clients, plan, plan.dp) if plan.dp else self._steps(clients, plan):
            gradient, loss, count, active = step(values)
            total += loss.double().cpu()
            trained += count.double().cpu()
            if plan.weight_decay:
                gradient = gradient.add(values, alpha=plan.weight_decay)
            if plan.proximal_mu:
                gradient = gradient.add(values - start, alpha=plan.proximal_mu)
            if plan.momentum:
                moved = gradient if velocity is None else velocity.mul(plan.momentum).add(gradient)
                velocity = torch.where(active, moved, torch.zeros_like(moved) if velocity is None else velocity)
                gradient = velocity
            values = torch.where(active, values.add(gradient, alpha=-plan.lr), values)
        losses = (total / trained).tolist()  # nan where nothing was trained on
        return [
            LocalResult(c.client, update, len(c.y), loss) for c, update, loss in zip(clients, values - start, losses, strict=True)
        ]

    def _steps(self, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[Step]:
        x, y = _padded(clients)
        for index, mask in zip(*_schedule(clients, plan, x), strict=True):
            yield partial(self._mean_gradients, x, y, index, mask, plan.loss)

    def _mean_gradients(self, x: Tensor, y: Tensor, index: Tensor, mask: Tensor, kind: str, values: Tensor) -> Gradients:
        who = torch.arange(len(values), device=x.device)[:, None]
        gradient, loss = vmap(grad_and_value(partial(self._loss, kind)))(values, x[who, index], y[who, index], mask)
        count = mask.sum(1)
        return gradient, loss.detach() * count, count, (count > 0)[:, None]

    def _private_steps(self, clients: Sequence[ClientData], plan: LocalPlan, dp: DpSgdPlan) -> Iterator[Step]:
        """The steps of DP-SGD. Poisson batches are padded to the longest of a step; an empty one still makes a noisy step."""
        x, y = _padded(clients)
        batches = [poisson_batches(len(data.y), plan, data.rng) for data in clients]
        noises = [noise_of(data) for data in clients]
        for number in range(max(map(len, batches))):
            drawn = [of[number] if number < len(of) else None for of in batches]
            index, mask = _columns(drawn, x.device)
            noise = torch.zeros(len(clients), sum(shape.numel() for shape in self.shapes), dtype=self.dtype)
            for row, stream, batch in zip(noise, noises, drawn, strict=True):
                if batch is not None:
                    stream.fill(row, dp.noise_multiplier * dp.clipping_norm / plan.batch_size)
            active = torch.tensor([[batch is not None] for batch in drawn], device=x.device)
            scales = (dp.clipping_norm, plan.batch_size)
            yield partial(self._private_gradients, x, y, index, mask, noise.to(x.device), active, scales, plan.loss)

    def _private_gradients(
        self, x: Tensor, y: Tensor, index: Tensor, mask: Tensor, noise: Tensor, active: Tensor, scales: tuple[float, int],
        kind: str, values: Tensor,
    ) -> Gradients:  # fmt: skip
        """``noise`` [c, d] plus the sums of clipped gradients over the batch size; `dpsgd.add_clipped` for many clients."""
        bound, divisor = scales
        who = torch.arange(len(values), device=x.device)[:, None]
        losses = values.new_zeros(len(values))
        width = max(1, self.budget // values.numel())
        for rows, chosen in zip(index.split(width, 1), mask.split(width, 1), strict=True) if index.shape[1] else ():
            each = vmap(vmap(grad_and_value(partial(self._example_loss, kind)), (None, 0, 0)))
            gradients, loss = each(values, x[who, rows], y[who, rows])
            norms = torch.linalg.vector_norm(gradients, dim=2)
            chosen_finite = chosen & torch.isfinite(norms)
            factors = torch.where(chosen_finite, clipping_factors(norms, bound) / divisor, 0)
            gradients = gradients.masked_fill(~chosen_finite[..., None], 0)
            noise = torch.baddbmm(noise[:, None], factors[:, None], gradients)[:, 0]
            losses = losses + torch.where(chosen, loss.detach(), 0).sum(1)
        return noise, losses, mask.sum(1), active

    def _logits(self, values: Tensor, x: Tensor) -> Tensor:
        parts = values.split([shape.numel() for shape in self.shapes])
        parameters: Tensors = {n: part.view(s) for n, part, s in zip(self.names, parts, self.shapes, strict=True)}
        return cast("Tensor", functional_call(self.model, (parameters, self.fixed), (x,)))

    def _loss(self, kind: str, values: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        losses = loss_of(self._logits(values, x), y, kind, "none")
        return torch.where(mask > 0, losses, torch.zeros_like(losses)).sum() / mask.sum().clamp(min=1)

    def _example_loss(self, kind: str, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(self._logits(values, x[None]), y[None], kind)


def _padded(clients: Sequence[ClientData]) -> tuple[Tensor, Tensor]:
    """Examples x [c, n, ...], y [c, n], n those of the largest client."""
    longest = max(len(data.y) for data in clients)
    x = torch.stack([F.pad(d.x, (0, 0) * (d.x.dim() - 1) + (0, longest - len(d.y))) for d in clients])
    return x, torch.stack([F.pad(d.y, (0, longest - len(d.y))) for d in clients])


def _schedule(clients: Sequence[ClientData], plan: LocalPlan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Per step and client the rows of its batch [steps, c, b], with their mask in x's dtype.

    Epochs begin together, so that a step is the same epoch for every client.
    """
    batches = -(-x.shape[1] // plan.batch_size)
    shape = (plan.epochs, len(clients), batches * plan.batch_size)
    index, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=x.dtype)
    for column, data in enumerate(clients):
        for epoch, permutation in enumerate(batch_order(len(data.y), plan, data.rng)):
            index[epoch, column, : len(permutation)] = torch.from_numpy(permutation)
            mask[epoch, column, : len(permutation)] = 1

    def by_step(table: Tensor) -> Tensor:
        return table.reshape(plan.epochs, len(clients), batches, plan.batch_size).transpose(1, 2).flatten(0, 1).to(x.device)

    return by_step(index), by_step(mask)


def _columns(drawn: Sequence[npt.NDArray[np.int64] | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """The drawn rows [c, b] of a step, b those of the longest batch, and which of them are real."""
    lengths = [0 if batch is None else len(batch) for batch in drawn]
    index = torch.zeros(len(drawn), max(lengths), dtype=torch.int64)
    for row, batch in zip(index, drawn, strict=True):
        if batch is not None:
            row[: len(batch)] = torch.from_numpy(batch)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return index.to(device), mask.to(device)
