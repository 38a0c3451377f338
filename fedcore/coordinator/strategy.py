"""From a scenario's [strategy] to a Flower strategy, and what it may be given: one mean reply, or one reply per client."""

from __future__ import annotations

import inspect

from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)  # fmt: skip
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedcore.config import RunConfig
from fedcore.config.sections import DRAWN_HERE
from fedcore.errors import Refused
from fedcore.flower import encode_state
from fedcore.references import resolve

__all__ = ["STRATEGIES", "accepts_mean", "build_strategy"]

STRATEGIES: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg, "fedprox": FedProx, "fedavgm": FedAvgM, "fedadagrad": FedAdagrad, "fedadam": FedAdam, "fedyogi": FedYogi,
    "fedmedian": FedMedian, "fedtrimmedavg": FedTrimmedAvg, "krum": Krum, "multikrum": MultiKrum, "bulyan": Bulyan,
    "qfedavg": QFedAvg,
}  # fmt: skip

# By exact type: a subclass may aggregate in its own way. Each is tested to give the same model from one mean reply as from
# one reply per client; the others accept a mean without complaint and return a wrong model.
_ACCEPTS_MEAN = frozenset({FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad})
_DP_WRAPPERS = (
    DifferentialPrivacyClientSideAdaptiveClipping, DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping, DifferentialPrivacyServerSideFixedClipping,
)  # fmt: skip


def accepts_mean(strategy: Strategy) -> bool:
    """Whether the strategy may be given one reply that already is the example-weighted mean.

    True for the types of the table with Flower's default metric functions, and for a class that says ``accepts_mean = True``.
    """
    if type(strategy) in _ACCEPTS_MEAN and isinstance(strategy, FedAvg):
        defaults = (strategy.train_metrics_aggr_fn, strategy.evaluate_metrics_aggr_fn)
        return all(function is aggregate_metricrecords for function in defaults)
    return vars(type(strategy)).get("accepts_mean") is True


def build_strategy(config: RunConfig) -> Strategy:
    """The strategy of a scenario, set to use every node it is shown: the coordinator draws the cohort.

    Raises:
        Refused: not a strategy, wrong parameters, one that brings its own round loop or DP, or whose state cannot be saved.
    """
    name = config.strategy.name
    kind = STRATEGIES.get(name) or resolve(name, config.folder, "strategy.name")
    if not isinstance(kind, type) or not issubclass(kind, Strategy):
        raise Refused(f"strategy.name {name}: must be a class derived from flwr.serverapp.strategy.Strategy")
    if issubclass(kind, _DP_WRAPPERS):
        raise Refused(f"strategy.name {name}: Flower's DP wrappers are not supported; fedcore has its own accounting of privacy")
    if kind.start is not Strategy.start:
        raise Refused(
            f"strategy.name {name}: overrides start(); fedcore runs the rounds and calls the configure and aggregate methods"
        )
    try:
        strategy = kind(**config.strategy.params)
    except Refused:
        raise
    except Exception as error:  # a user's own constructor may raise anything
        takes = ", ".join(p for p in inspect.signature(kind).parameters if p not in DRAWN_HERE)
        raise Refused(f"strategy.params: {name}: {error}; it takes: {takes or 'nothing'}") from error
    if isinstance(strategy, FedAvg):
        strategy.fraction_train = strategy.fraction_evaluate = 1.0
        strategy.min_train_nodes = strategy.min_evaluate_nodes = strategy.min_available_nodes = 0
    encode_state(strategy)
    return strategy
