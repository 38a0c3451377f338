"""Which engine trains, decided by rule: never by a measurement, which could differ between two runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedcore.config import EngineConfig
from fedcore.errors import Refused
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import LocalTrainer
from fedcore.training.vmap import VmapTrainer

__all__ = ["Engine", "choose_engine", "make_trainer"]


@dataclass(frozen=True)
class Engine:
    """The engine of a run, where it computes, and the rule that chose it."""

    name: str
    device: str
    reason: str


def choose_engine(config: EngineConfig, model: nn.Module) -> Engine:
    """Apply the rule: a GPU trains many clients at once unless the model draws random numbers; a CPU trains one by one.

    Raises:
        Refused: the device or engine asked for cannot do it.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise Refused('engine.device = "cuda": torch sees no CUDA device; use "auto" or "cpu"')
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    random_layer = next((name for name, layer in model.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd)), None)
    if config.name == "vmap" and random_layer is not None:
        raise Refused(f'engine.name = "vmap": layer {random_layer} draws random numbers, which differ between engines; use "loop"')
    ruled = _rule(device, random_layer)
    return ruled if config.name in ("auto", ruled.name) else Engine(config.name, device, "named in the scenario")


def _rule(device: str, random_layer: str | None) -> Engine:
    if device == "cpu":
        return Engine("loop", device, "cpu: one client at a time, one torch thread per worker")
    if random_layer is not None:
        return Engine("loop", device, f"cuda, but layer {random_layer} draws random numbers")
    return Engine("vmap", device, "cuda: many clients at once")


def make_trainer(engine: Engine, model: nn.Module) -> LocalTrainer:
    """The trainer of an engine around ``model``, which must be on the engine's device."""
    return VmapTrainer(model) if engine.name == "vmap" else LoopTrainer(model)
