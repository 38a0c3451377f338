"""Canaries in the privacy code itself: each unit and mechanism with one client, or one example, as bad as it may be.

All else is known to the adversary. What it sees (the released means, or a client's update) comes out of the code that runs in
production and is projected on the canary. Noise is repeatable: a trial is a function of its number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import nn

from fedcore.coordinator.selection import toss_coins
from fedcore.data import Dataset, Examples, FederatedData
from fedcore.flower import from_record, to_record
from fedcore.grids.cohort import CohortGrid
from fedcore.models import layout_of
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import DpSgd, Event, GaussianRelease, SkellamRelease
from fedcore.privacy.mechanisms import Means
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.privacy.release import Release, plan_release
from fedcore.training.client import Clients, RoundTask
from fedcore.training.engine import Engine
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, client_rng

__all__ = ["DELTA", "QUIET", "Case", "Doubles", "cases", "central", "distributed", "example", "grid", "poisson"]

Doubles = npt.NDArray[np.float64]
DELTA = 1e-5
QUIET = 1e-9
"""A noise multiplier that is next to none."""
CLIPPING_NORM, DIMENSION = 0.7, 60
_ORDER, _NOISE = 1, 2  # purposes of a trial's randomness


@dataclass(frozen=True)
class Case:
    """What is audited. ``event`` happens ``times`` to the canary by the report; ``scores(present, trials)`` gives one number a
    trial, higher where the canary seems to be there. ``step`` is the Gaussian step that it truly consists of, ``steps`` how many.
    ``broken`` says what was done so that the report is wrong."""

    unit: str
    mechanism: str
    event: Event
    scores: Callable[[bool, Sequence[int]], Doubles]
    step: GaussianRelease
    steps: int = 1
    times: int = 1
    broken: str = ""

    @property
    def epsilon(self) -> float:
        """What the accountant reports."""
        return epsilon({self.event: self.times}, DELTA)


def central(noise: float = 1.0, *, adaptive: bool = False, drawn_noise: float | None = None) -> Case:
    """One release with the noise of a trusted coordinator, a cohort of ten; ``adaptive``: with the clipping bit and the loss."""
    extra = {"bit_noise": 2.0, "loss_cap": 5.0} if adaptive else {}
    planned = plan_release(DIMENSION, CLIPPING_NORM, noise, 10, **extra)
    drawn = planned if drawn_noise is None else dataclasses.replace(planned, noise_multiplier=drawn_noise)
    others = np.sum([_accepted(drawn, _member(number)) for number in range(1, 10)], axis=0)

    def scores(present: bool, trials: Sequence[int]) -> Doubles:
        total = others + _accepted(drawn, _canary()) if present else others
        keys = (derive_key("audit", "central", int(present), trial) for trial in trials)
        return np.array([_projected(drawn, drawn.publish(total, 9 + present, keystream(key)), drawn.cohort) for key in keys])

    name = f"Gaussian, noise {noise:g}" + (", with clipping bit and loss" if adaptive else "")
    event = GaussianRelease(noise)
    return Case("client, central", name, event, scores, event, broken=_broken(noise, drawn_noise))


def poisson(noise: float = 1.5, rate: float = 0.25, rounds: int = 8, *, drawn_noise: float | None = None) -> Case:
    """Releases in which the canary takes part by its secret coin. The adversary sees them all, and not who took part."""
    planned, population = plan_release(DIMENSION, CLIPPING_NORM, noise, round(20 * rate)), 20
    drawn = planned if drawn_noise is None else dataclasses.replace(planned, noise_multiplier=drawn_noise)
    nobody = np.zeros(drawn.size)

    def loss(present: bool, trial: int, number: int) -> float:
        """The privacy loss of a round: the logarithm of how much likelier its release is with the canary."""
        cohort = toss_coins(derive_key("coins", int(present), trial, number), population, rate)
        total = _accepted(drawn, _canary()) if present and 0 in cohort else nobody
        random = keystream(derive_key("audit", "poisson", int(present), trial, number))
        seen = _projected(drawn, drawn.publish(total, len(cohort), random), drawn.cohort) / planned.joint.norm_bound
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + (seen - 0.5) / noise**2))

    def scores(present: bool, trials: Sequence[int]) -> Doubles:
        return np.array([sum(loss(present, trial, number) for number in range(rounds)) for trial in trials])

    event, name = GaussianRelease(noise, rate), f"Gaussian, noise {noise:g}, {rounds} rounds, coins of bias {rate:g}"
    return Case("client, central", name, event, scores, event, rounds, rounds, broken=_broken(noise, drawn_noise))


def distributed(noise: float = 1.0, survivors: int = 3, corrupt: int = 0, *, sized_for: int = 0) -> Case:
    """One release of Skellam shares from the fewest ``survivors`` of twelve, ``corrupt`` of which add no noise.

    ``sized_for``: clients that each share is sized for in truth, where that is not what the report says.
    """
    release = plan_release(DIMENSION, CLIPPING_NORM, noise, 12, shares=(survivors, corrupt, bytes(range(32))))
    plan = release.shares
    assert plan is not None
    shares = dataclasses.replace(plan, noise_variance=plan.mu / sized_for) if sized_for else plan
    drawn = dataclasses.replace(release, shares=shares)

    def one(present: bool, trial: int) -> float:
        total = np.zeros(drawn.size)
        for client in range(survivors - corrupt):  # what corrupt clients send is known, and taken off
            random = keystream(derive_key("audit", "share", survivors, int(present), trial, client))
            update = _canary() if present and client == 0 else np.zeros(DIMENSION)
            total += drawn.accept(drawn.contribution(update, 1, 0.0, random))
        return _projected(drawn, drawn.publish(total, survivors, keystream(bytes(32))), survivors)

    def scores(present: bool, trials: Sequence[int]) -> Doubles:
        return np.array([one(present, trial) for trial in trials])

    event = SkellamRelease(noise, plan.l2, plan.l1, plan.mu, plan.total_variation)
    name = f"Skellam, noise {noise:g}, {survivors} of 12 reply" + (f", {corrupt} of them corrupt" if corrupt else "")
    broken = f"shares sized for {sized_for}" if sized_for else ""
    return Case("client, distributed", name, event, scores, GaussianRelease(noise), broken=broken)


def example(noise: float = 2.0, batches: int = 1, epochs: int = 2, *, drawn_noise: float | None = None) -> Case:
    """A round of DP-SGD on one client, of which the update is seen; batches of eight, of whose examples only the canary has
    a gradient."""
    model = nn.Linear(16, 8, bias=False)
    start = torch.zeros(128)
    trainer = LoopTrainer(model)
    plan = LocalPlan(epochs, 8, lr=1e-6, dp=DpSgdPlan(CLIPPING_NORM, noise if drawn_noise is None else drawn_noise))
    x, y = torch.zeros(8 * batches, 16), torch.zeros(8 * batches, dtype=torch.int64)
    x[0] = torch.arange(16) + 1  # clipped: its gradient is longer than the norm
    direction = torch.outer(1 / 8 - nn.functional.one_hot(y[0], 8).float(), x[0]).reshape(-1)
    direction /= torch.linalg.vector_norm(direction)

    def client(present: bool, trial: int) -> ClientData:
        order, noise_rng = (client_rng(int(present), trial, 0, purpose) for purpose in (_ORDER, _NOISE))
        first = 0 if present else 1
        return ClientData(0, x[first:], y[first:], order, noise_rng)

    def scores(present: bool, trials: Sequence[int]) -> Doubles:
        results = trainer.train(start, [client(present, trial) for trial in trials], plan)
        return np.array([-float(result.update @ direction) for result in results])

    event = DpSgd(noise, batches, epochs)
    name = f"DP-SGD, noise {noise:g}, {epochs * batches} steps of rate {1 / batches:g}"
    step = GaussianRelease(noise, 1 / batches)
    return Case("example", name, event, scores, step, epochs * batches, broken=_broken(noise, drawn_noise))


def grid(noise: float = 1.0, *, drawn_noise: float | None = None) -> Case:
    """One release of a whole CohortGrid: messages, local training, workers' sums and the reply that the strategy is given."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    layout, examples = layout_of(model, trainable=True), _examples()
    clients = Clients(model, examples, Engine("loop", "cpu", "audit"), seed=0, encoding="float32")
    planned = plan_release(layout.size, CLIPPING_NORM, noise, 3)
    drawn = planned if drawn_noise is None else dataclasses.replace(planned, noise_multiplier=drawn_noise)
    task = RoundTask(1, LocalPlan(1, 4, lr=10.0), 1e6, release=drawn)
    simulated = CohortGrid(clients, layout, mean=True, workers=1, released=drawn.size)
    (canary,) = clients.train(torch.zeros(layout.size), [0], task)
    assert canary.contribution is not None
    direction = canary.contribution / np.linalg.norm(canary.contribution)
    arrays = to_record(layout, np.zeros(layout.size, np.float32))

    def one(present: bool, trial: int) -> float:
        numbered = dataclasses.replace(task, round_number=2 * trial + 1 + present)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(numbered.to_table())})
        simulated.nodes = [0, 1, 2] if present else [1, 2]
        (reply,) = simulated.send_and_receive([Message(content, node, MessageType.TRAIN) for node in simulated.nodes])
        (mean,) = reply.content.array_records.values()
        return float(from_record(layout, mean) @ direction) * drawn.cohort

    def scores(present: bool, trials: Sequence[int]) -> Doubles:
        return np.array([one(present, trial) for trial in trials])

    event, name = GaussianRelease(noise), f"Gaussian, noise {noise:g}, a CohortGrid"
    return Case("client, central", name, event, scores, event, broken=_broken(noise, drawn_noise))


def cases() -> Iterator[Case]:
    """The rows of the table."""
    yield from (central(1.0), central(2.0), central(1.0, adaptive=True), poisson(), grid())
    yield from (distributed(1.0), distributed(2.0), distributed(1.0, 8, 5))
    yield from (example(2.0), example(1.0, batches=4, epochs=1))
    yield from (central(drawn_noise=QUIET), poisson(drawn_noise=QUIET), grid(drawn_noise=QUIET), example(drawn_noise=QUIET))
    yield from (central(drawn_noise=0.6), distributed(sized_for=12))


def _member(number: int) -> Doubles:
    """The update of one of the others."""
    return np.random.default_rng(number).normal(size=DIMENSION)


def _canary() -> Doubles:
    """The worst update: longer than the clipping norm, in a direction of its own."""
    return 100 * np.cos(np.arange(DIMENSION, dtype=np.float64))


def _accepted(release: Release, update: Doubles) -> Doubles:
    """What the sum gets from a client with this update and the largest loss, where no client makes noise."""
    return release.accept(release.contribution(update, 1, 1e9, keystream(bytes(32))))


def _projected(release: Release, means: Means, clients: int) -> float:
    """The published sum along the canary's contribution, all coordinates of it."""
    joint, parts = release.joint, [means.update * release.cohort]
    if means.unclipped is not None:
        parts.append(np.array([(means.unclipped - 0.5) * joint.bit_scale * clients]))
    if means.loss is not None:
        parts.append(np.array([(2 * means.loss / joint.loss_cap - 1) * joint.loss_scale * clients]))
    return float(np.concatenate(parts) @ joint.encode(_canary(), 1e9)) / joint.norm_bound


def _examples() -> FederatedData:
    """Three clients of four random examples [16]."""
    rng = np.random.default_rng(0)
    train = Examples(rng.normal(size=(12, 16)).astype(np.float32), rng.integers(0, 4, 12))
    dataset = Dataset("synthetic", tuple("abcd"), train, train, None, 0.0, 1.0)
    nothing = np.arange(0)
    return FederatedData(dataset, tuple(np.split(np.arange(12), 3)), (nothing,) * 3, nothing)


def _broken(noise: float, drawn: float | None) -> str:
    return "" if drawn is None else "no noise" if drawn < noise / 1000 else f"noise {drawn:g} drawn"
