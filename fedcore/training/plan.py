"""What local training is told and what it answers; shared by all engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedcore.config import LOSSES
from fedcore.errors import Refused

__all__ = [
    "ClientData", "DpSgdPlan", "LocalPlan", "LocalResult", "LocalTrainer", "batch_order", "client_rng", "keyed_rng",
    "poisson_batches", "poisson_schedule",
]  # fmt: skip


@dataclass(frozen=True)
class DpSgdPlan:
    """What DP-SGD adds to local training, with one example as the unit (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    Every example's gradient is clipped to the L2 norm ``clipping_norm`` over all trainable parameters together; the sum of a
    step receives Gaussian noise of standard deviation ``noise_multiplier * clipping_norm`` in every coordinate.

    ``batches``: the fewest batches an epoch has on any client, for which the round is charged; one with fewer must not train
    (`poisson_schedule`).

    Raises:
        Refused: norm or noise is not a finite number above zero, or there is less than one batch.
    """

    clipping_norm: float
    noise_multiplier: float
    batches: int = 1

    def __post_init__(self) -> None:
        for name, value in (("clipping_norm", self.clipping_norm), ("noise_multiplier", self.noise_multiplier)):
            if not (math.isfinite(value) and value > 0):
                raise Refused(f"DP-SGD: {name} must be a finite number above 0, got {value!r}")
        if self.batches < 1:
            raise Refused(f"DP-SGD: batches must be an integer >= 1, got {self.batches!r}")

    def why_not(self, examples: int, batch_size: int) -> str:
        """Why a client of so many examples must not train: its steps would cost more than is charged; empty when it may."""
        own = -(-examples // batch_size)
        if not 0 < own < self.batches:
            return ""
        return f"{examples} examples are {own} batches an epoch, and the round is charged for clients with {self.batches} or more"


@dataclass(frozen=True)
class LocalPlan:
    """One round's local work, the same for every client: SGD on the mean of the ``loss`` (`training.loss`).

    ``proximal_mu`` weighs FedProx's term mu / 2 * ||w - w_start||^2 (Li et al. 2020, arXiv:1812.06127). Momentum and weight
    decay are those of torch.optim.SGD. With ``dp`` every step draws a Poisson batch (`poisson_schedule`) and its gradient is
    the noised sum of clipped gradients divided by ``batch_size``; the rest of the step works on that gradient as before.

    Raises:
        Refused: a loss that is not known.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    dp: DpSgdPlan | None = None
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise Refused(f"training: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")


@dataclass(frozen=True)
class ClientData:
    """A client's examples, x [n, ...] and y [n], and the generator ``rng`` that orders them or tosses the Poisson coins.

    ``noise_rng`` keys the noise of DP-SGD. On a device both generators are seeded from the operating system's CSPRNG: whoever
    can guess either one's state undoes the privacy of the round. Where it is ``simulated``, as a function of a seed that the run's
    files show, the noise comes from a generator that is quicker than a cipher and no secret.
    """

    client: int
    x: Tensor
    y: Tensor
    rng: np.random.Generator
    noise_rng: np.random.Generator | None = None
    simulated: bool = False


@dataclass(frozen=True)
class LocalResult:
    """``update`` [d] = local minus received trainable parameters; ``loss`` is the mean over all examples trained on, nan if none.

    Under DP-SGD only ``update`` is private: ``loss`` is the exact loss of the drawn examples and must not leave the client.
    """

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


def keyed_rng(key: bytes, client: int) -> np.random.Generator:
    """The generator of one client in a simulation, a function of a key derived for one purpose in one round."""
    words = np.frombuffer(key, "<u4").tolist()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, client])))


def batch_order(examples: int, plan: LocalPlan, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The order of examples, one permutation [n] per epoch; a batch is the next ``batch_size`` of them, the last may be short."""
    return [rng.permutation(examples) for _ in range(plan.epochs)]


def poisson_schedule(examples: int, plan: LocalPlan) -> tuple[float, int]:
    """Sampling rate and number of steps of a client's round of DP-SGD: 1 / m and epochs * m, m = ceil(examples / batch_size).

    ``examples`` is taken to be public. Without examples there are no steps.

    Raises:
        Refused: fewer batches than the round is charged for.
    """
    if plan.dp and (reason := plan.dp.why_not(examples, plan.batch_size)):
        raise Refused(f"DP-SGD: {reason}")
    batches = -(-examples // plan.batch_size)
    return (1 / batches if batches else 0.0), plan.epochs * batches


def poisson_batches(examples: int, plan: LocalPlan, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The examples of every step of a round of DP-SGD, ascending: each is drawn with the rate of `poisson_schedule`, independently.

    A batch may be empty or larger than ``batch_size``; it is never truncated.
    """
    rate, steps = poisson_schedule(examples, plan)
    return [np.flatnonzero(rng.random(examples) < rate) for _ in range(steps)]
