"""What is written beside a library for a device, so that the device's agent can see which training steps it computes."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from fedcore.errors import Refused
from fedcore.native.blocks import LANES, Blocks, Parameter
from fedcore.native.memory import Memory
from fedcore.native.tiles import Target
from fedcore.portable.checks import CHECKED, Checked, checked_inputs, sketch
from fedcore.portable.form import StepForm, range_values
from fedcore.portable.graph import step_graph
from fedcore.portable.judge import open_session, read_step
from fedcore.portable.library import Check, Library, Place
from fedcore.quantization.layers import quantizers
from fedcore.quantization.wire import ActivationRange

__all__ = ["BATCHES", "describe"]

BATCHES = (1, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128)
"""Batch sizes whose steps are always named: a step is of one batch size, a library of any."""
_RUNS_ON: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "avx2": ("x86_64", ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe")),
    "neon": ("aarch64", ()),
}
_EXACT, _ROUNDED = 1e-4, 0.05  # relative; where values are rounded, the order of additions decides some of them
_ANY = ActivationRange(1.0, 0)
Floats = npt.NDArray[np.float32]


def describe(
    model: nn.Module, input_shape: tuple[int, ...], blocks: Blocks, memory: Memory, library: Path, processor: Target,
    batches: Iterable[int] = (), loss: str = "cross_entropy",
) -> Library:  # fmt: skip
    """Of the trainer of ``model`` for ``loss`` in the file ``library``: the steps of ``batches`` and of `BATCHES`, that clip or do
    not, before and after activations are rounded.

    Raises:
        Refused: a layer that has no portable step, or a processor that no agent runs on.
    """
    if processor.name not in _RUNS_ON:
        raise Refused(f"no device's agent runs on {processor.name}")
    machine, features = _RUNS_ON[processor.name]
    models = list(_models(model))
    sizes = sorted({*BATCHES, *batches})
    steps = [
        hashlib.sha256(step_graph(one, input_shape, batch=batch, clips=clips, loss=loss)[0]).hexdigest()
        for one in models for clips in (False, True) for batch in sizes
    ]  # fmt: skip
    found = Library(
        library.name, hashlib.sha256(library.read_bytes()).hexdigest(), machine, features, input_shape, blocks.network.classes,
        tuple(_place(p) for p in blocks.parameters if p.trainable), tuple(_place(p) for p in blocks.parameters if not p.trainable),
        blocks.quantizers, blocks.blob + LANES, memory.numbers, memory.bytes, tuple(steps),
        _ROUNDED if blocks.rounded else _EXACT, (), loss=loss,
    )  # fmt: skip
    inputs = checked_inputs(found)
    checks = [check for one in models for check in _checks(one, input_shape, inputs, loss)]
    return Library(**{**vars(found), "checks": tuple(checks)})


def _models(model: nn.Module) -> Iterator[nn.Module]:
    """The model before its activations' ranges are frozen, and after, where it has any."""
    for frozen in (None, _ANY):
        one = copy.deepcopy(model).eval()
        for _, quantizer in quantizers(one):
            quantizer.frozen = frozen
        if frozen is None or any(True for _ in quantizers(one)):
            yield one


def _place(parameter: Parameter) -> Place:
    fan = math.prod(parameter.dims[1:])
    return Place(parameter.dims, 1.0 / math.sqrt(fan) if fan > 1 else 0.5, parameter.offset, parameter.strides)


def _checks(model: nn.Module, input_shape: tuple[int, ...], inputs: Checked, kind: str) -> Iterator[Check]:
    """The answers of the step without clipping, and of the one that clips to the middle of the examples' norms."""
    norms = [float(np.linalg.norm(_answer(model, input_shape, inputs, kind, 0.0, slice(i, i + 1))[1])) for i in range(CHECKED)]
    for clip in (0.0, sorted(norms)[CHECKED // 2]):
        loss, gradient, rounds = _answer(model, input_shape, inputs, kind, clip, slice(None))
        yield Check(clip, rounds, loss, tuple(sketch(gradient).tolist()))


def _answer(
    model: nn.Module, input_shape: tuple[int, ...], inputs: Checked, kind: str, clip: float, rows: slice
) -> tuple[float, Floats, bool]:
    """Loss and gradient of ``rows`` in ONNX Runtime, and whether activations are rounded."""
    x, labels = inputs.x[rows], inputs.labels[rows]
    data, form = step_graph(model, input_shape, batch=len(x), clips=clip > 0, loss=kind)
    session = open_session(read_step(data), 1)
    gradient, _, loss = session.run(list(form.outputs()), _given(form, inputs, x, labels, clip))
    return float(loss), gradient, bool(form.quantizers)


def _given(
    form: StepForm, inputs: Checked, x: Floats, labels: npt.NDArray[np.int64], clip: float
) -> dict[str, Floats]:  # fmt: skip
    given: dict[str, Floats] = {
        "parameters": inputs.parameters, "x": x, "y": np.eye(form.classes, dtype=np.float32)[labels],
        "mask": np.ones(len(x), np.float32), "clip": np.asarray(clip, np.float32),
    }  # fmt: skip
    given |= {"frozen": inputs.frozen} if form.frozen else {}
    return given | ({"ranges": range_values(inputs.ranges, form.quantizers)} if form.quantizers else {})
