"""What a device is told to do in a round of training: the numbers of `fedcore.training.plan`, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = ["ExamplePrivacy", "TrainingPlan", "batches", "number_of_steps"]


@dataclass(frozen=True)
class ExamplePrivacy:
    """DP-SGD with one example as the unit: clipping norm, noise multiplier, and the fewest batches that are charged for.

    Raises:
        Refused: a number out of range.
    """

    clipping_norm: float
    noise_multiplier: float
    batches: int = 1

    def __post_init__(self) -> None:
        for name, value in (("clipping_norm", self.clipping_norm), ("noise_multiplier", self.noise_multiplier)):
            if not (math.isfinite(value) and value > 0):
                raise Refused(f"training plan: {name} must be a finite number above 0, got {value!r}")
        if self.batches < 1:
            raise Refused(f"training plan: batches must be an integer >= 1, got {self.batches!r}")


@dataclass(frozen=True)
class TrainingPlan:
    """SGD on the mean of the loss that the step computes, as `fedcore.training.plan.LocalPlan` defines it.

    Raises:
        Refused: a number out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    privacy: ExamplePrivacy | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise Refused(f"training plan: {name} must be an integer >= 1, got {getattr(self, name)!r}")
        for name in ("lr", "momentum", "weight_decay", "proximal_mu"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise Refused(f"training plan: {name} must be a finite number >= 0, got {getattr(self, name)!r}")


def number_of_steps(examples: int, plan: TrainingPlan) -> int:
    """Steps of a round: every epoch has as many as it takes batches to see all examples."""
    return plan.epochs * -(-examples // plan.batch_size)


def batches(examples: int, plan: TrainingPlan, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """The examples of every step, drawn from ``rng`` as `fedcore.training.plan` draws them, one epoch or step at a time.

    Under privacy every example is drawn independently with one over the number of batches in an epoch; a batch may then be empty
    or larger than the plan's, and is never truncated.

    Raises:
        Refused: fewer batches than the round is charged for.
    """
    own, least = -(-examples // plan.batch_size), plan.privacy.batches if plan.privacy else 0
    if plan.privacy is None:
        for _ in range(plan.epochs):
            order = rng.permutation(examples)
            yield from (order[first : first + plan.batch_size] for first in range(0, examples, plan.batch_size))
        return
    if 0 < own < least:
        raise Refused(f"training plan: {examples} examples are {own} batches an epoch, and it is charged for {least} or more")
    for _ in range(plan.epochs * own):
        yield np.flatnonzero(rng.random(examples) < 1 / own)
