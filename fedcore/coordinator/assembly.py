"""Everything that a scenario determines, built once and checked: data, model, engine, strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedcore.config import RunConfig
from fedcore.coordinator.privacy import Protection, protect
from fedcore.coordinator.secure import Secured, secure
from fedcore.coordinator.strategy import build_strategy
from fedcore.data import FederatedData, federate, load_dataset, normalised_by_test
from fedcore.errors import FedcoreError, Refused
from fedcore.models import ParameterLayout, build_model, check_model, layout_of
from fedcore.privacy.randomness import RootKey
from fedcore.training.client import Clients
from fedcore.training.engine import Engine, choose_engine
from fedcore.training.per_example import check_per_example

__all__ = ["Assembly", "assemble", "build_clients", "naming_the_model"]


@dataclass(frozen=True)
class Assembly:
    """``config`` is resolved: engine and device are the ones chosen. ``model`` is the coordinator's own, on the CPU. ``keyed``
    is this run's own root key, where its simulated noise must not be that of other runs of the seed."""

    config: RunConfig
    data: FederatedData
    model: nn.Module
    engine: Engine
    strategy: Strategy
    protection: Protection = Protection()
    secured: Secured | None = None
    keyed: RootKey | None = None

    @property
    def root(self) -> RootKey:
        """What noise and coins of a simulation are derived from."""
        return self.keyed or RootKey.of_seed(self.config.run.seed)

    def origin(self) -> dict[str, list[float]]:
        """What data and initial model look like, to notice that a run is continued with others.

        The mean of every 8th feature over the examples, and the initial model's logits of a few of the coordinator's; to be
        compared with a tolerance, since processors differ in last bits. Where anything is private, over the coordinator's test
        examples alone.
        """
        dataset, start = self.data.dataset, _model(self.config, self.data).eval()
        train = dataset.test if self.config.privacy else dataset.train
        sample = torch.from_numpy(dataset.train.take(self.data.calibration[:4]).x)
        with torch.no_grad(), naming_the_model(self.config):
            logits = start(sample).reshape(-1).tolist()
        sums = sum(part.x.reshape(len(part), -1)[:, ::8].sum(0, dtype=np.float64) for part in train.pieces())
        return {"data": (sums / len(train)).tolist(), "model": logits}

    @property
    def layout(self) -> ParameterLayout:
        """The parameters that train and travel, on a grid that stays from round to round."""
        return layout_of(self.model, trainable=True, weights="int8po2")


@contextmanager
def naming_the_model(config: RunConfig) -> Iterator[None]:
    """For the coordinator's own use of a model, which may be a user's and raise anything.

    Raises:
        Refused: it raised in the block; names the model and the error.
    """
    try:
        yield
    except FedcoreError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}".rstrip(": ")
        raise Refused(f"model {config.model.name} failed on the coordinator's own examples: {text}") from error


def assemble(config: RunConfig) -> Assembly:
    """Build and check all parts.

    Raises:
        Refused: whatever the scenario asks for cannot be had; one line.
    """
    strategy = build_strategy(config)
    dataset = load_dataset(config.data, config.folder, config.run.seed)
    dataset = normalised_by_test(dataset) if config.privacy else dataset
    data = federate(config.data, dataset, config.run.seed)
    for key, size in (("size", config.cohort.size), ("evaluate_size", config.cohort.evaluate_size)):
        if size > len(data.clients):
            raise Refused(f"cohort.{key} = {size} is more than the {len(data.clients)} clients of the partition")
    model = _model(config, data)
    sample = dataset.train.take(data.calibration[:4])
    check_model(model, torch.from_numpy(sample.x), len(dataset.labels))
    engine = choose_engine(
        config.engine, model, sample.shape, private=config.unit_privacy("example") is not None, loss=config.training.loss
    )
    resolved = config.replace("engine", name=engine.name, device=engine.device)
    if config.unit_privacy("example"):
        check_per_example(model, torch.from_numpy(sample.x), torch.from_numpy(sample.y), config.training.loss)
    dimension = layout_of(model, trainable=True).size
    protection = protect(config, data, strategy, dimension)
    secured = secure(config, data, strategy, protection, dimension)
    return Assembly(resolved, data, model, engine, strategy, protection, secured)


def build_clients(assembly: Assembly, *, real: bool = False) -> Clients:
    """The clients of an assembled scenario, with a model of their own; ``real`` ones are not simulated."""
    config = assembly.config
    model = _model(config, assembly.data)
    return Clients(
        model, assembly.data, assembly.engine, seed=config.run.seed, encoding=config.wire.update, real=real, root=assembly.root,
        dropout=0.0 if real else config.cohort.dropout,
    )  # fmt: skip


def _model(config: RunConfig, data: FederatedData) -> nn.Module:
    return build_model(
        config.model, quantized=config.quantization.enabled, input_shape=data.dataset.train.shape,
        classes=len(data.dataset.labels), seed=config.run.seed, folder=config.folder,
    )  # fmt: skip
