"""Many clients at once: torch.func.vmap over the clients of a chunk, for accelerators.

Clients of different sizes run in lockstep: a client that has no batch left in a step, or a shorter one, computes on masked
rows, which reach neither its loss, its gradient nor its optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from fedcore.training.plan import ClientData, LocalPlan, LocalResult, batch_order

__all__ = ["VmapTrainer"]

Tensors = dict[str, Tensor]


class VmapTrainer:
    """Trains ``chunk`` clients at a time; the result does not depend on ``chunk`` beyond the last bits of a float."""

    def __init__(self, model: nn.Module, chunk: int = 64) -> None:
        self.model = model.train()
        self.chunk = chunk
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.shapes = [p.shape for p in model.parameters() if p.requires_grad]
        self.fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def train(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[LocalResult]:
        """See `plan.LocalTrainer`."""
        for first in range(0, len(clients), self.chunk):
            yield from self._train_chunk(start, clients[first : first + self.chunk], plan)

    def _train_chunk(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> list[LocalResult]:
        x, y, steps, masks = _schedule(clients, plan)
        values = start.expand(len(clients), -1).clone()
        velocity: Tensor | None = None
        total = torch.zeros(len(clients), dtype=torch.float64)
        gradients = vmap(grad_and_value(self._loss))
        rows = torch.arange(len(clients), device=start.device)[:, None]
        for index, mask in zip(steps, masks, strict=True):
            gradient, loss = gradients(values, x[rows, index], y[rows, index], mask)
            count = mask.sum(1)
            total += (loss.detach() * count).double().cpu()
            if plan.weight_decay:
                gradient = gradient.add(values, alpha=plan.weight_decay)
            if plan.proximal_mu:
                gradient = gradient.add(values - start, alpha=plan.proximal_mu)
            active = (count > 0)[:, None]
            if plan.momentum:
                moved = gradient if velocity is None else velocity.mul(plan.momentum).add(gradient)
                velocity = torch.where(active, moved, torch.zeros_like(moved) if velocity is None else velocity)
                gradient = velocity
            values = torch.where(active, values.add(gradient, alpha=-plan.lr), values)
        results = zip(clients, values - start, total.tolist(), strict=True)
        return [
            LocalResult(c.client, update, len(c.y), loss / (len(c.y) * plan.epochs) if len(c.y) else float("nan"))
            for c, update, loss in results
        ]

    def _loss(self, values: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        parts = values.split([shape.numel() for shape in self.shapes])
        parameters: Tensors = {n: part.view(s) for n, part, s in zip(self.names, parts, self.shapes, strict=True)}
        logits = functional_call(self.model, (parameters, self.fixed), (x,))
        losses = F.cross_entropy(logits, y, reduction="none")
        return torch.where(mask > 0, losses, torch.zeros_like(losses)).sum() / mask.sum().clamp(min=1)


def _schedule(clients: Sequence[ClientData], plan: LocalPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded examples x [c, n, ...], y [c, n]; and per step and client the rows of its batch [steps, c, b] with their mask.

    Epochs begin together, so that a step is the same epoch for every client.
    """
    longest = max(len(data.y) for data in clients)
    batches = -(-longest // plan.batch_size)
    x = torch.stack([F.pad(d.x, (0, 0) * (d.x.dim() - 1) + (0, longest - len(d.y))) for d in clients])
    y = torch.stack([F.pad(d.y, (0, longest - len(d.y))) for d in clients])
    shape = (plan.epochs, len(clients), batches * plan.batch_size)
    index, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=x.dtype)
    for column, data in enumerate(clients):
        for epoch, permutation in enumerate(batch_order(len(data.y), plan, data.rng)):
            index[epoch, column, : len(permutation)] = torch.from_numpy(permutation)
            mask[epoch, column, : len(permutation)] = 1

    def by_step(table: Tensor) -> Tensor:
        return table.reshape(plan.epochs, len(clients), batches, plan.batch_size).transpose(1, 2).flatten(0, 1).to(x.device)

    return x, y, by_step(index), by_step(mask)
