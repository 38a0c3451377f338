"""A smaller model for a tier: whole channels are removed or weights have fewer bits, and what is left learns to answer as the
model it came from."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fedcore.errors import Refused
from fedcore.export.source import quantized_afterwards
from fedcore.quantization.layers import FakeQuantize, QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, calibrate
from fedcore.quantization.lower import narrow_rows

__all__ = ["compress", "distill", "narrow_weights", "plain", "prune"]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {QuantLinear: nn.Linear, QuantConv1d: nn.Conv1d, QuantConv2d: nn.Conv2d}
_BATCH, _RATE, _MOMENTUM, _TEMPERATURE = 32, 0.02, 0.9, 2.0


def compress(
    model: nn.Module, x: npt.NDArray[np.float32], *, share: float, classes: int, epochs: int, seed: int, weight_bits: int = 8,
    loss: str = "cross_entropy",
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` without ``share`` of its channels, fine-tuned for weights of ``weight_bits`` on x [n, *shape] and
    calibrated on it.

    Raises:
        Refused: torch-pruning is missing, or cannot take channels out of this model; no examples.
    """
    if not len(x):
        raise Refused("tiers: a smaller model is distilled on calibration examples: set data.calibration above 0")
    examples = torch.from_numpy(x)
    if share:
        student = quantized_afterwards(prune(plain(model), examples[:1], share=share, classes=classes), x)
    else:
        student = copy.deepcopy(model)
    with narrow_weights(student, weight_bits) if weight_bits < 8 else contextlib.nullcontext():
        distill(student, model, examples, epochs=epochs, seed=seed, loss=loss)
        calibrate(student.eval(), examples.split(_BATCH))
    return student


class _OnGrid(nn.Module):
    """Weights [out, ...] on symmetric grids with one scale per row; the gradient passes as if nothing had been rounded (Bengio et
    al. 2013, arXiv:1308.3432)."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        integers, scale = narrow_rows(weight.detach().numpy(), self._bits)
        rounded = torch.from_numpy(integers * scale.reshape(-1, *[1] * (integers.ndim - 1)))
        return weight + (rounded - weight).detach()


@contextlib.contextmanager
def narrow_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """Within this context the weights of ``model``'s quantized layers are used as integers of ``bits``."""
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _OnGrid(bits))
        layer.weight_enabled = False  # eight bits would not hold the narrower grid exactly
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            layer.weight_enabled = True


def plain(model: nn.Module) -> nn.Module:
    """A float copy: the layers as torch has them, rounding of activations left out."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if type(module) in _PLAIN:
            del module.input
            module.__class__ = _PLAIN[type(module)]
        elif isinstance(module, FakeQuantize):
            module.frozen = None
    return result


def prune(model: nn.Module, example: Tensor, *, share: float, classes: int) -> nn.Module:
    """``model`` with ``share`` of the channels of each layer removed, those of the smallest L2 norm (Li et al. 2017,
    arXiv:1608.08710; groups of dependent layers as in Fang et al. 2023, arXiv:2301.12900). The layer of logits keeps its outputs.

    Raises:
        Refused: torch-pruning is not installed, or the model cannot be pruned.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise Refused("tiers: prune needs the package torch-pruning: pip install 'fedcore[export]'")
    import torch_pruning as tp

    kept = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]
    try:
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=share, ignored_layers=kept[-1:]
        )
        pruner.step()
        with torch.no_grad():
            outputs = model(example)
    except Exception as error:  # of torch-pruning, which knows not every model
        raise Refused(f"tiers: the model cannot be pruned: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if outputs.shape != (1, classes):
        raise Refused(f"tiers: pruning changed the outputs to {list(outputs.shape)}")
    return model


def distill(
    student: nn.Module, teacher: nn.Module, x: Tensor, *, epochs: int, seed: int, loss: str = "cross_entropy"
) -> None:  # fmt: skip
    """Train ``student`` in place to give the teacher's distribution on x [n, *shape] and on mixtures of them (Hinton et al. 2015,
    arXiv:1503.02531; mixtures as in mixup, Zhang et al. 2018, arXiv:1710.09412: the coordinator has few examples). No labels. A
    teacher of the squared ``loss`` gives no logarithms of a distribution: its outputs are what the student is to give."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // _BATCH)
    optimizer = torch.optim.SGD(student.parameters(), lr=_RATE, momentum=_MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    student.train()
    teacher.eval()
    for _ in range(steps):
        first, second = (x[torch.randint(len(x), (_BATCH,), generator=generator)] for _ in range(2))
        share = torch.rand((_BATCH, *[1] * (x.dim() - 1)), generator=generator) ** 2  # mostly near one of the two
        mixed = first * (1 - share) + second * share
        with torch.no_grad():
            wanted = teacher(mixed)
        optimizer.zero_grad()
        (_divergence if loss == "cross_entropy" else _distance)(student(mixed), wanted).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    student.eval()


def _divergence(given: Tensor, wanted: Tensor) -> Tensor:
    given, wanted = (F.log_softmax(logits / _TEMPERATURE, 1) for logits in (given, wanted))
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * _TEMPERATURE**2


def _distance(given: Tensor, wanted: Tensor) -> Tensor:
    return (given - wanted).square().sum(1).mean()
