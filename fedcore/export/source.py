"""What is exported: the last model of a run, with the data that the coordinator may test and calibrate with."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedcore.config import RunConfig, load_config
from fedcore.data import Dataset, federate, load_dataset, normalised_by_test
from fedcore.errors import Refused
from fedcore.export.artefact import Facts
from fedcore.models import build_model
from fedcore.quantization.layers import calibrate, make_quantization_aware, set_activation_ranges
from fedcore.quantization.wire import decode_model

__all__ = ["Source", "load_run", "quantized_afterwards", "require_finished"]

_BLOB, _RESULT = Path("model/model.fcm"), "result.json"
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Source:
    """``model`` is quantization-aware, with the weights that devices receive and frozen ranges; ``representative`` are the examples
    [n, *shape] that the coordinator calibrates with, ``accuracy`` is the fp32 master's on ``dataset.test``."""

    model: nn.Module
    config: RunConfig
    dataset: Dataset
    representative: npt.NDArray[np.float32]
    accuracy: float
    facts: Facts

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.dataset.test.shape)


def require_finished(directory: Path) -> None:
    """Whether ``directory`` can be exported.

    Raises:
        Refused: it holds no run, or one that is not finished.
    """
    if not (directory / "config.toml").exists():
        raise Refused(f"{directory}: holds no run")
    if not (directory / _BLOB).exists() or not (directory / _RESULT).exists():
        raise Refused(
            f"{directory}: the run is not finished; continue it with: fedcore simulate SCENARIO.toml --out {directory} --resume"
        )


def load_run(directory: Path, run_id: str = "") -> Source:
    """The finished run in ``directory``. A model that was trained in float is quantized with the representative examples.

    Raises:
        Refused: no finished run, or its model is damaged or of another shape than the scenario's.
    """
    require_finished(directory)
    blob, result = directory / _BLOB, directory / _RESULT
    config = load_config(directory / "config.toml")
    dataset = load_dataset(config.data, config.folder, config.run.seed)
    dataset = normalised_by_test(dataset) if config.privacy else dataset
    calibration = federate(config.data, dataset, config.run.seed).calibration
    representative = dataset.train.take(calibration).x
    received = decode_model(blob.read_bytes())
    model = build_model(
        config.model, quantized=config.quantization.enabled, input_shape=dataset.train.shape, classes=len(dataset.labels),
        seed=config.run.seed, folder=config.folder,
    )  # fmt: skip
    _load(model, received.tensors, blob)
    if received.ranges:
        set_activation_ranges(model, received.ranges)
    else:
        model = quantized_afterwards(model, representative)
    facts = Facts.of_texts({key: str(value) for key, value in received.metadata.items()}, run=run_id)
    accuracy = float(json.loads(result.read_text())["accuracy"])
    return Source(model.eval(), config, dataset, representative, accuracy, facts)


def quantized_afterwards(model: nn.Module, representative: npt.NDArray[np.float32]) -> nn.Module:
    """A quantization-aware copy of a float model, its ranges those of the ``representative`` examples [n, *shape] (post-training
    quantization, Jacob et al. 2018, section 3, without the training).

    Raises:
        Refused: no examples.
    """
    if not len(representative):
        raise Refused("export: a model that was trained in float needs representative examples to be quantized")
    quantized = make_quantization_aware(copy.deepcopy(model)).eval()
    calibrate(quantized, torch.from_numpy(representative).split(_CHUNK))
    return quantized


def _load(model: nn.Module, tensors: dict[str, Any], blob: Path) -> None:
    own = dict(model.named_parameters())
    for name in {*own, *tensors}:
        if name not in own or name not in tensors or tuple(own[name].shape) != tensors[name].shape:
            raise Refused(f"{blob}: parameter {name} is not the scenario's")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
