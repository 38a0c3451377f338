"""What a training step must show before anyone may train with it: it gives the gradients that torch gives; an evaluation graph, the
same predictions and losses.

The reference is the definition: one backward pass of autograd for each example, clipped on its own. In double precision the two
agree to the last bits, with rounding and without it. Single precision is compared where nothing is rounded: rounding turns one
unit in the last place into a step of a grid, here as in torch, so that two correct implementations drift apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from fedcore.errors import Refused
from fedcore.portable.form import EvaluationForm, GraphForm, StepForm, range_values
from fedcore.portable.graph import evaluation_graph, kinked_layers, step_graph
from fedcore.quantization.layers import FakeQuantize, QuantLayer, activation_ranges, float_arithmetic
from fedcore.training.loss import loss_of

__all__ = ["DOUBLE", "ROUNDED_SINGLE", "SINGLE", "check_evaluation", "check_parity"]

Array = npt.NDArray[Any]
DOUBLE = 1e-9  # on a sum of gradients in double precision, relative to its largest coordinate where that is over one
SINGLE = 1e-6  # on a mean gradient in single precision without rounding, likewise
ROUNDED_SINGLE = 0.05  # on a sum with rounding in single precision, in L2 norm and relative: only that it is the same graph
_RAMP = 1e-9  # far above the rounding errors of double precision; where values are rounded, breaks ties alike on both sides
_TRIALS = 3  # of single precision: two pixels that are equal but for its rounding errors are rare, and not in every trial


@dataclass(frozen=True)
class _Trial:
    """Random examples x [n, ...], y [n], mask [n], and what autograd says of each: gradient [n, d] and loss [n]."""

    x: Array
    y: Array
    mask: Array
    rows: Array
    losses: Array


def check_parity(model: nn.Module, data: bytes, form: StepForm, loss: str = "cross_entropy") -> None:
    """Compare the step ``data`` of ``model`` for a loss, and its twin in double precision, with autograd on random examples.

    Raises:
        Refused: the step misses the gate; the line names the model and the layer nearest to the loss that differs.
    """
    model = copy.deepcopy(model).cpu().double()
    rounds = any(isinstance(layer, QuantLayer | FakeQuantize) for layer in model.modules())
    export = functools.partial(step_graph, model, form.input_shape, batch=form.batch, clips=form.clips, loss=loss)
    for rounding in (True, False) if rounds else (False,):
        with contextlib.nullcontext() if rounding else float_arithmetic(model):
            ramp = _RAMP if rounding else 0.0
            first = _trial(model, form, loss, ramp, 0)
            double = export(dtype=np.float64, ramp=ramp)
            _judge(model, _Step(model, *double, np.float64), first, DOUBLE)
            single = (data, form) if rounding or not rounds else export()
            judge = functools.partial(_judge_rounded if rounding else _judge, model, _Step(model, *single, np.float32))
            _judge_single(judge, first, lambda seed: _trial(model, form, loss, 0.0, seed))


def check_evaluation(model: nn.Module, data: bytes, form: EvaluationForm, loss: str = "cross_entropy") -> None:
    """Compare the evaluation graph ``data`` of ``model``, and its twin in double precision, with torch on random examples.

    Raises:
        Refused: the graph misses the gate; the line names the model and the number that differs.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    rounds = any(isinstance(layer, QuantLayer | FakeQuantize) for layer in model.modules())
    export = functools.partial(evaluation_graph, model, form.input_shape, batch=form.batch, loss=loss)
    for rounding in (True, False) if rounds else (False,):
        with contextlib.nullcontext() if rounding else float_arithmetic(model):
            first = _scored(model, form, loss, 0)
            _judge_scores(model, _Step(model, *export(dtype=np.float64), np.float64), first, DOUBLE)
            single = (data, form) if rounding or not rounds else export()
            step, allowed = _Step(model, *single, np.float32), ROUNDED_SINGLE if rounding else SINGLE
            judge = functools.partial(_judge_scores, model, step)
            _judge_single(judge, first, lambda seed: _scored(model, form, loss, seed), allowed)


def _judge_single(
    judge: Callable[[_Trial, float], None], trial: _Trial, another: Callable[[int], _Trial], allowed: float = SINGLE
) -> None:  # fmt: skip
    for seed in range(1, _TRIALS):
        try:
            return judge(trial, allowed)
        except Refused:
            trial = another(seed)
    return judge(trial, allowed)


class _Step:
    """A step or an evaluation in ONNX Runtime on one batch, for any clipping norm."""

    def __init__(self, model: nn.Module, data: bytes, form: GraphForm, dtype: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.form, self.single, self._dtype = form, dtype is np.float32, dtype
        self._given = {name: _flat(model, wanted) for name, wanted in (("parameters", True), ("frozen", False))}
        self._given["ranges"] = range_values(activation_ranges(model), form.quantizers, dtype)

    def run(self, trial: _Trial, clip: float = np.inf) -> tuple[Any, float, float]:
        """Gradient [d], count and loss; or count, correct predictions and loss."""
        given = self._given | {"x": trial.x, "y": np.eye(self.form.classes)[trial.y], "mask": trial.mask, "clip": clip}
        wanted = {name: np.asarray(given[name], self._dtype) for name in self.form.inputs()}
        first, second, loss = self._session.run(None, wanted)
        return first, float(second), float(loss)


def _trial(model: nn.Module, form: StepForm, loss: str, ramp: float, seed: int) -> _Trial:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((form.batch, *form.input_shape)).astype(np.float32).astype(np.float64)
    y = rng.integers(0, form.classes, form.batch)
    mask = np.ones(form.batch)
    mask[form.batch - form.batch // 3 :] = 0
    return _Trial(x, y, mask, *_reference(model, x, y, loss, ramp))


def _reference(model: nn.Module, x: Array, y: Array, loss: str, ramp: float) -> tuple[Array, Array]:
    """Gradient [n, d] and loss [n] of every example, one backward pass each, with ``ramp`` as in `graph.step_graph`."""
    kinked = set(kinked_layers(model)) if ramp else ()
    hooks = [layer.register_forward_pre_hook(lambda _, given: (_ramped(given[0], ramp),)) for layer in kinked]
    try:
        return _each_gradient(model, x, y, loss)
    finally:
        for hook in hooks:
            hook.remove()


def _ramped(x: Tensor, ramp: float) -> Tensor:
    places = x.shape[2:] if x.dim() > 2 else x.shape[1:]
    return x + ramp * torch.arange(1, 1 + places.numel(), dtype=x.dtype).view(places)


def _each_gradient(model: nn.Module, x: Array, y: Array, loss: str) -> tuple[Array, Array]:
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows, losses = [], []
    for one, label in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
        own = loss_of(model(one[None]), label[None], loss)
        found = torch.autograd.grad(own, chosen, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in found]).numpy())
        losses.append(float(own.detach()))
    return np.stack(rows), np.array(losses)


def _judge(model: nn.Module, step: _Step, trial: _Trial, allowed: float) -> None:
    mask = trial.mask
    norms, total = np.linalg.norm(trial.rows, axis=1), float(np.dot(trial.losses, mask))
    # Without clipping first: a wrong norm would change every layer, and hide which one is wrong.
    clips = isinstance(step.form, StepForm) and step.form.clips
    for clip in (np.inf, float(np.median(norms[mask > 0]))) if clips else (np.inf,):
        expected: Array = _clipped_sum(trial.rows, norms, mask, clip)
        found, count, loss = step.run(trial, clip)
        share = float(mask.sum()) if step.single else 1.0
        differences = np.abs(found - expected) / share
        limit = allowed * max(1.0, float(np.max(np.abs(expected))) / share)
        if not (np.isfinite(found).all() and differences.max() <= limit):
            place = _layer_of(model, ~(differences <= limit)) if np.isinf(clip) else "clipping"
            raise _misses(model, place, f"differs by {differences.max():.2g}", limit)
        if count != mask.sum():
            raise _misses(model, "count", f"is {count} for {mask.sum():.0f} examples", 0)
        if not abs(loss - total) <= allowed * max(1.0, total):
            raise _misses(model, "loss", f"differs by {abs(loss - total):.2g}", allowed * max(1.0, total))


def _judge_rounded(model: nn.Module, step: _Step, trial: _Trial, _: float) -> None:
    expected: Array = trial.mask @ trial.rows
    found, count, _loss = step.run(trial, np.inf)
    distance = np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-6)
    if not (distance <= ROUNDED_SINGLE and count == trial.mask.sum()):
        raise _misses(model, "rounding in single precision", f"differs by {distance:.2g} of the norm", ROUNDED_SINGLE)


def _scored(model: nn.Module, form: EvaluationForm, loss: str, seed: int) -> _Trial:
    """A trial whose ``rows`` [n, 1] are 1 where the prediction is right, which it is for half of the examples or more."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((form.batch, *form.input_shape)).astype(np.float32).astype(np.float64)
    y, mask = rng.integers(0, form.classes, form.batch), np.ones(form.batch)
    mask[form.batch - form.batch // 3 :] = 0
    with torch.no_grad():
        logits = model(torch.from_numpy(x))
    predicted = logits.argmax(1).numpy()
    y[::2] = predicted[::2]
    losses = loss_of(logits, torch.from_numpy(y), loss, "none").numpy()
    return _Trial(x, y, mask, (predicted == y)[:, None].astype(np.float64), losses)


def _judge_scores(model: nn.Module, step: _Step, trial: _Trial, allowed: float) -> None:
    expected, total = float(trial.mask @ trial.rows[:, 0]), float(np.dot(trial.losses, trial.mask))
    count, correct, loss = step.run(trial)
    slack = allowed * trial.mask.sum() if allowed == ROUNDED_SINGLE else 0.0  # rounding that goes the other way moves predictions
    for name, found, right, limit in (
        ("count", float(count), float(trial.mask.sum()), 0.0), ("correct predictions", correct, expected, slack),
        ("loss", loss, total, allowed * max(1.0, total)),
    ):  # fmt: skip
        if not abs(found - right) <= limit:
            raise Refused(
                f"evaluation graph of {type(model).__name__}: {name}: {found:.9g} where torch has {right:.9g} (allowed difference "
                f"{limit:.2g}); it is not handed out"
            )


def _clipped_sum(rows: Array, norms: Array, mask: Array, clip: float) -> Array:
    factors = np.minimum(1, clip / np.maximum(norms, np.finfo(np.float64).tiny))
    return np.asarray((mask * factors) @ rows)


def _layer_of(model: nn.Module, wrong: npt.NDArray[np.bool_]) -> str:
    """The layer nearest to the loss that has a wrong gradient: what lies in front of it is wrong because of it."""
    names = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    starts = itertools.accumulate((size for _, size in names), initial=0)
    bad = [name for (name, size), start in zip(names, starts, strict=False) if wrong[start : start + size].any()]
    layer, _, parameter = bad[-1].rpartition(".")
    return f"layer {layer} ({type(model.get_submodule(layer)).__name__}), {parameter}"


def _misses(model: nn.Module, place: str, how: str, allowed: float) -> Refused:
    found = f"training step of {type(model).__name__}: {place}: {how} from autograd's (allowed {allowed:.2g})"
    return Refused(f"{found}; it is not handed out")


def _flat(model: nn.Module, wanted: bool) -> Array:
    chosen = [p.detach().reshape(-1) for p in model.parameters() if p.requires_grad is wanted]
    return torch.cat(chosen).numpy() if chosen else np.zeros(0)
