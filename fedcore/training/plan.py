"""What local training is told and what it answers; shared by all engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["ClientData", "LocalPlan", "LocalResult", "LocalTrainer", "batch_order", "client_rng"]


@dataclass(frozen=True)
class LocalPlan:
    """One round's local work, the same for every client: SGD on mean cross-entropy.

    ``proximal_mu`` weighs FedProx's term mu / 2 * ||w - w_start||^2 (Li et al. 2020, arXiv:1812.06127). Momentum and weight
    decay are those of torch.optim.SGD.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class ClientData:
    """A client's examples, x [n, ...] and y [n], and the generator that orders them."""

    client: int
    x: Tensor
    y: Tensor
    rng: np.random.Generator


@dataclass(frozen=True)
class LocalResult:
    """``update`` [d] = local minus received trainable parameters; ``loss`` is the mean over all examples trained on."""

    client: int
    update: Tensor
    examples: int
    loss: float


class LocalTrainer(Protocol):
    """An engine: trains some clients from the same flat trainable parameters ``start`` [d], ``chunk`` of them together."""

    chunk: int

    def train(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[LocalResult]:
        """One result per client, in the clients' order."""
        ...


def client_rng(seed: int, round_number: int, client: int, purpose: int) -> np.random.Generator:
    """The generator of one client in one round: a pure function of its arguments; ``purpose`` separates uses."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, round_number, client, purpose])))


def batch_order(examples: int, plan: LocalPlan, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The order of examples, one permutation [n] per epoch; a batch is the next ``batch_size`` of them, the last may be short."""
    return [rng.permutation(examples) for _ in range(plan.epochs)]
