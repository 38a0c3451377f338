"""What would void a privacy guarantee: refused with its reason, never a warning."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flwr.serverapp.strategy import QFedAvg, Strategy

from fedcore.config import PrivacyConfig, RunConfig
from fedcore.coordinator.strategy import accepts_mean
from fedcore.data import FederatedData

__all__ = ["what_voids"]


def what_voids(config: RunConfig, data: FederatedData, strategy: Strategy) -> Iterator[str]:
    """Every part of a scenario under which the guarantee would not hold, as a line for the user."""
    if config.privacy and config.evaluation.federated_every:
        yield (
            "evaluation.federated_every: clients' accuracies on their own examples would leave them without noise; "
            "evaluate on the coordinator's test part"
        )
    if example := config.unit_privacy("example"):
        yield from _voiding_example(example, data, strategy)
    if client := config.unit_privacy("client"):
        yield from _voiding_client(client, config, len(data.clients), strategy)


def _voiding_example(one: PrivacyConfig, data: FederatedData, strategy: Strategy) -> Iterator[str]:
    total = sum(len(part) for part in data.clients)
    if one.delta * total >= 1:
        yield f"privacy.delta = {one.delta:g} protects none of {total} examples; it must lie below {1 / total:.2g}"
    if isinstance(strategy, QFedAvg):
        yield "strategy.name qfedavg reads every client's training loss, which DP-SGD does not protect; choose another strategy"


def _voiding_client(one: PrivacyConfig, config: RunConfig, population: int, strategy: Strategy) -> Iterator[str]:
    name, cohort = config.strategy.name, config.cohort.size or population
    if one.delta * population >= 1:
        yield f"privacy.delta = {one.delta:g} protects none of {population} clients; it must lie below {1 / population:.2g}"
    if not accepts_mean(strategy) and config.secagg.shards == 1:  # sums of shards carry noise of their own
        yield (
            f"strategy.name {name} looks at clients one by one, which unit client forbids; it takes strategies that need only the "
            "mean: fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi with default metrics, or a class with accepts_mean = True"
        )
    if config.wire.update != "float32":
        yield f'wire.update = "{config.wire.update}" would round after clipping; unit client has its own encoding, leave it out'
    if one.loss_cap and config.unit_privacy("example"):
        yield "privacy.loss_cap: a training loss is not protected by DP-SGD; leave it out where unit example is protected too"
    if one.mechanism == "skellam":
        yield from _voiding_shares(one, cohort // config.secagg.shards)


def _voiding_shares(one: PrivacyConfig, cohort: int) -> Iterator[str]:
    survivors, corrupt = one.minimum_survivors or cohort, math.ceil(one.corrupt_fraction * cohort)
    if one.sampling == "poisson":
        yield 'privacy.sampling = "poisson" amplifies nothing with mechanism = "skellam": its cohort has a fixed size, leave it out'
    if survivors > cohort:
        yield f"privacy.minimum_survivors = {survivors} is more than the cohort of {cohort}"
    if corrupt >= survivors:
        yield (
            f"privacy.corrupt_fraction: {corrupt} of {cohort} clients might add no noise, and minimum_survivors = {survivors} "
            "leaves none that does"
        )
