"""From a scenario's [model] to a checked module, and the order in which its parameters travel."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from fedcore.config import ModelConfig
from fedcore.errors import Refused
from fedcore.models.cnn import cnn
from fedcore.models.dscnn import dscnn
from fedcore.models.imu_cnn import imu_cnn
from fedcore.models.lenet import lenet
from fedcore.models.mlp import mlp
from fedcore.quantization.layers import QuantLayer, make_quantization_aware
from fedcore.quantization.wire import ModelTensor
from fedcore.references import resolve

__all__ = ["ZOO", "ParameterLayout", "build_model", "check_model", "layout_of"]

Floats = npt.NDArray[np.float32]
ZOO: dict[str, Callable[..., nn.Sequential]] = {"mlp": mlp, "cnn": cnn, "lenet": lenet, "dscnn": dscnn, "imu_cnn": imu_cnn}


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and wire encodings of some parameters, and their places in one flat vector [size]."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    encodings: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of values in the flat vector."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Values per parameter."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    def split(self, flat: Floats) -> dict[str, Floats]:
        """Views of ``flat`` [size] by parameter name."""
        ends = list(itertools.accumulate(self.counts))
        places = zip(self.names, self.shapes, [0, *ends], ends, strict=False)
        return {name: flat[start:end].reshape(shape) for name, shape, start, end in places}

    def join(self, tensors: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """The flat float32 vector of named tensors.

        Raises:
            Refused: a name or a shape is not the layout's.
        """
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = dict(zip(self.names, self.shapes, strict=True))
        if found != expected:
            wrong = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
            raise Refused(f"parameter {wrong}: expected shape {expected.get(wrong)}, got {found.get(wrong)}")
        if not self.names:
            return np.zeros(0, np.float32)
        return np.concatenate([np.asarray(tensors[name], np.float32).reshape(-1) for name in self.names])

    def wire_tensors(self, flat: Floats) -> list[ModelTensor]:
        """The parameters as `wire.encode_model` takes them."""
        return [ModelTensor(n, v, e) for (n, v), e in zip(self.split(flat).items(), self.encodings, strict=True)]


def layout_of(model: nn.Module, *, trainable: bool | None, weights: str = "int8") -> ParameterLayout:
    """The layout of the trainable, of the frozen or (None) of all parameters, in the module's order.

    Weights of quantized layers travel as ``weights``, int8 or int8po2, everything else as fp16; a model without quantized layers
    travels as fp32.
    """
    quantized = {f"{name}.weight".lstrip(".") for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    chosen = [(name, p) for name, p in model.named_parameters() if trainable in (None, p.requires_grad)]
    other = "fp16" if quantized else "fp32"
    return ParameterLayout(
        tuple(name for name, _ in chosen),
        tuple(tuple(p.shape) for _, p in chosen),
        tuple(weights if name in quantized else other for name, _ in chosen),
    )


def build_model(
    config: ModelConfig, *, quantized: bool, input_shape: tuple[int, ...], classes: int, seed: int, folder: Path
) -> nn.Module:
    """The model of a scenario: seeded or loaded parameters, quantization-aware if asked, frozen parts marked.

    Raises:
        Refused: unknown parameters, a constructor that fails, an ``init`` file that does not fit, patterns that match nothing.
    """
    constructor = ZOO.get(config.name) or resolve(config.name, folder, "model.name")
    if not callable(constructor):
        raise Refused(f"model.name {config.name}: is not a class or function")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(np.random.SeedSequence([seed, 0x6D6F64]).generate_state(1)[0].item())
        model = _construct(constructor, config, {"input_shape": input_shape, "classes": classes})
    if config.init:
        _load(model, folder / config.init)
    _freeze(model, config.trainable)
    return make_quantization_aware(model) if quantized else model


def check_model(model: nn.Module, x: Tensor, classes: int) -> None:
    """Refuse a model that federated, quantization-aware training cannot carry; ``x`` is a batch of a few real examples.

    Raises:
        Refused: one line that names the layer and says what to use instead.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and (module.track_running_stats or not name):
            raise Refused(
                f"model: layer {name} ({type(module).__name__}) keeps running statistics, which are private to a client and "
                "cannot be averaged; use GroupNorm or no normalisation"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            raise Refused(f"model: parameter {name} is {parameter.dtype}; only float32 parameters can be trained")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _forward(model, x)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise Refused(f"model: buffer {name} changes during training; only parameters are trained and aggregated")
    model.eval()
    with torch.no_grad():
        together, alone = _forward(model, x), torch.cat([_forward(model, one[None]) for one in x])
    model.train()
    if together.shape != (len(x), classes):
        raise Refused(f"model: output has shape {list(together.shape)}, expected logits {[len(x), classes]} (batch, classes)")
    if not torch.isfinite(together).all():
        raise Refused("model: output of the initial model is not finite")
    if not torch.allclose(together, alone, atol=1e-3, rtol=1e-3):
        raise Refused("model: the output for an example depends on the other examples in its batch (a batch statistic?)")


def _construct(constructor: Callable[..., Any], config: ModelConfig, offered: dict[str, Any]) -> nn.Module:
    accepted = inspect.signature(constructor).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = set(config.params) - set(accepted)
    if unknown and not takes_any:
        allowed = ", ".join(name for name in accepted if name not in offered) or "none"
        raise Refused(f"model.params.{min(unknown)}: {config.name} has no such parameter; it takes: {allowed}")
    arguments = {name: value for name, value in offered.items() if name in accepted or takes_any} | config.params
    try:
        model = constructor(**arguments)
    except Refused:
        raise
    except Exception as error:  # the user's own constructor may raise anything
        raise Refused(f"model {config.name}: its constructor failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise Refused(f"model {config.name}: must give a torch.nn.Module, got {type(model).__name__}")
    return model


def _load(model: nn.Module, path: Path) -> None:
    try:
        loaded = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise Refused(f"model.init: {path} does not exist") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise Refused(f"model.init: {path} is not a readable safetensors file: {error}") from error
    own = dict(model.named_parameters())
    for name in [*own, *loaded]:
        if name not in own or name not in loaded or own[name].shape != loaded[name].shape:
            expected = list(own[name].shape) if name in own else "no such parameter"
            found = list(loaded[name].shape) if name in loaded else "not in the file"
            raise Refused(f"model.init: {path}: parameter {name}: model has {expected}, file has {found}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(loaded[name])


def _freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise Refused(f"model.trainable: no parameter matches {pattern!r}; parameters are: {', '.join(names) or 'none'}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    try:
        output = model(x)
    except Exception as error:  # the user's own forward may raise anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise Refused(f"model: cannot process inputs of shape {list(x.shape)}: {type(error).__name__}: {reason}") from error
    if not isinstance(output, Tensor):
        raise Refused(f"model: output must be one tensor of logits, got {type(output).__name__}")
    return output
