"""Which engine trains, decided by rule: never by a measurement, which could differ between two runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedcore.config import EngineConfig
from fedcore.errors import Refused
from fedcore.native.trainer import NativeTrainer, prepare
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


def choose_engine(
    config: EngineConfig, model: nn.Module, input_shape: tuple[int, ...] | None = None, *, private: bool = False,
    loss: str = "cross_entropy",
) -> Engine:  # fmt: skip
    """Apply the rule: a GPU trains many clients at once unless the model draws random numbers; a CPU runs a trainer compiled for
    the model where one can be had, else the loop.

    ``input_shape``, that of one example, is what a compiled trainer needs; its first use takes some seconds to compile. It
    is made ready for ``loss``, and with ``private`` for DP-SGD.

    Raises:
        Refused: the device or engine asked for cannot do it.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise Refused('engine.device = "cuda": torch sees no CUDA device; use "auto" or "cpu"')
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    random_layer = next((name for name, layer in model.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd)), None)
    if config.name == "vmap" and random_layer is not None:
        raise Refused(f'engine.name = "vmap": layer {random_layer} draws random numbers, which differ between engines; use "loop"')
    if config.name == "native":
        return _named_native(config, model, input_shape, private, loss)
    if config.name == "auto":
        return _rule(device, random_layer, model, input_shape, private, loss)
    ruled = _rule(device, random_layer, model, None, private, loss)
    return ruled if config.name == ruled.name else Engine(config.name, device, "named in the scenario")


def _named_native(
    config: EngineConfig, model: nn.Module, input_shape: tuple[int, ...] | None, private: bool, loss: str
) -> Engine:  # fmt: skip
    if config.device == "cuda":
        raise Refused('engine.name = "native" computes on the CPU; set engine.device = "cpu"')
    if input_shape is None:
        raise Refused('engine.name = "native": the shape of the examples is not known here; use "loop"')
    try:
        kind = prepare(model, input_shape, private=private, loss=loss)
        return Engine("native", "cpu", f"named in the scenario; compiled for {kind}")
    except Refused as error:
        raise Refused(f'engine.name = "native": {error}; use "loop" or "auto"') from error


def _rule(
    device: str, random_layer: str | None, model: nn.Module, input_shape: tuple[int, ...] | None, private: bool, loss: str
) -> Engine:  # fmt: skip
    if device == "cpu":
        loop = "cpu: one client at a time, one torch thread per worker"
        if input_shape is None:
            return Engine("loop", device, loop)
        try:
            kind = prepare(model, input_shape, private=private, loss=loss)
            return Engine("native", device, f"cpu: compiled for the model and {kind}")
        except Refused as error:
            return Engine("loop", device, f"{loop}; not compiled: {error}")
    if random_layer is not None:
        return Engine("loop", device, f"cuda, but layer {random_layer} draws random numbers")
    return Engine("vmap", device, "cuda: many clients at once")


def make_trainer(engine: Engine, model: nn.Module) -> LocalTrainer:
    """The trainer of an engine around ``model``, which must be on the engine's device."""
    if engine.name == "native":
        return NativeTrainer(model, compared=True)
    return VmapTrainer(model) if engine.name == "vmap" else LoopTrainer(model)
