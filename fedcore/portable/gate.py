"""What a training step must show before anyone may train with it: it gives the gradients that torch gives.

The reference is the definition: one backward pass of autograd for each example, clipped on its own. In double precision the two
agree to the last bits, with rounding and without it. Single precision is compared where nothing is rounded: rounding turns one
unit in the last place into a step of a grid, here as in torch, so that two correct implementations drift apart.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

from fedcore.errors import Refused
from fedcore.portable.form import StepForm, range_values
from fedcore.portable.graph import step_graph
from fedcore.quantization.layers import FakeQuantize, QuantLayer, activation_ranges, float_arithmetic

__all__ = ["DOUBLE", "ROUNDED_SINGLE", "SINGLE", "check_parity"]

Array = npt.NDArray[Any]
DOUBLE = 1e-9  # on a sum of gradients in double precision, relative to its largest coordinate where that is over one
SINGLE = 1e-6  # on a mean gradient in single precision without rounding, likewise
ROUNDED_SINGLE = 0.05  # on a sum with rounding in single precision, in L2 norm and relative: only that it is the same graph


def check_parity(model: nn.Module, data: bytes, form: StepForm) -> None:
    """Compare the step ``data`` of ``model``, and its twin in double precision, with autograd on random examples.

    Raises:
        Refused: the step misses the gate; the line names the model and the layer nearest to the loss that differs.
    """
    model = copy.deepcopy(model).cpu().double()
    x, y, mask = _examples(form)
    rounds = any(isinstance(layer, QuantLayer | FakeQuantize) for layer in model.modules())
    for rounding in (True, False) if rounds else (False,):
        with contextlib.nullcontext() if rounding else float_arithmetic(model):
            rows, losses = _reference(model, x, y)
            double, shape = step_graph(model, form.input_shape, batch=form.batch, clips=form.clips, dtype=np.float64)
            _judge(model, _Step(model, double, shape, np.float64, x, y, mask), rows, losses, mask, DOUBLE)
            if rounding:
                _judge_rounded(model, _Step(model, data, form, np.float32, x, y, mask), rows, mask)
            else:
                plain = data if not rounds else step_graph(model, form.input_shape, batch=form.batch, clips=form.clips)[0]
                _judge(model, _Step(model, plain, shape, np.float32, x, y, mask), rows, losses, mask, SINGLE)


class _Step:
    """A step in ONNX Runtime on one batch, for any clipping norm."""

    def __init__(self, model: nn.Module, data: bytes, form: StepForm, dtype: Any, x: Array, y: Array, mask: Array) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.single, self.clips = dtype is np.float32, form.clips
        given = {"x": x, "y": np.eye(form.classes)[y], "mask": mask}
        given |= {name: _flat(model, wanted) for name, wanted in (("parameters", True), ("frozen", False))}
        given["ranges"] = range_values(activation_ranges(model), form.quantizers, dtype)
        self._given = {name: np.asarray(given[name], dtype) for name in form.inputs() if name in given}
        self._dtype = dtype

    def run(self, clip: float) -> tuple[Array, float, float]:
        """Gradient [d], count and loss."""
        gradient, count, loss = self._session.run(None, self._given | {"clip": np.asarray(clip, self._dtype)})
        return gradient, float(count), float(loss)


def _examples(form: StepForm) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((form.batch, *form.input_shape))
    mask = np.ones(form.batch)
    mask[form.batch - form.batch // 3 :] = 0
    return x.astype(np.float32).astype(np.float64), rng.integers(0, form.classes, form.batch), mask


def _reference(model: nn.Module, x: Array, y: Array) -> tuple[Array, Array]:
    """Gradient [n, d] and loss [n] of every example, one backward pass each."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows, losses = [], []
    for one, label in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
        loss = F.cross_entropy(model(one[None]), label[None])
        found = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in found]).numpy())
        losses.append(float(loss.detach()))
    return np.stack(rows), np.array(losses)


def _judge(model: nn.Module, step: _Step, rows: Array, losses: Array, mask: Array, allowed: float) -> None:
    norms, total = np.linalg.norm(rows, axis=1), float(np.dot(losses, mask))
    # Without clipping first: a wrong norm would change every layer, and hide which one is wrong.
    for clip in (np.inf, float(np.median(norms[mask > 0]))) if step.clips else (np.inf,):
        expected: Array = _clipped_sum(rows, norms, mask, clip)
        found, count, loss = step.run(clip)
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


def _judge_rounded(model: nn.Module, step: _Step, rows: Array, mask: Array) -> None:
    expected: Array = mask @ rows
    found, count, _ = step.run(np.inf)
    distance = np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-6)
    if not (distance <= ROUNDED_SINGLE and count == mask.sum()):
        raise _misses(model, "rounding in single precision", f"differs by {distance:.2g} of the norm", ROUNDED_SINGLE)


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
