"""The graphs that devices train and evaluate with: exported, judged once, and known by their content from then on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeVar

import onnxruntime
from torch import nn

from fedcore.errors import Refused, TryAgain
from fedcore.portable.form import SIZE_LIMIT, EvaluationForm, GraphForm, StepForm
from fedcore.portable.gate import check_evaluation, check_parity
from fedcore.portable.graph import evaluation_graph, step_graph
from fedcore.portable.judge import judge_graph

__all__ = ["PortableStep", "portable_evaluation", "portable_step"]

Form = TypeVar("Form", bound=GraphForm)


@dataclass(frozen=True)
class PortableStep(Generic[Form]):
    """The bytes of an ONNX file, and what they say of themselves: a `StepForm`, or an `EvaluationForm`."""

    data: bytes
    form: Form

    @cached_property
    def sha256(self) -> str:
        """What it is named by, in hexadecimal digits: who has checked the name needs to trust nobody for the bytes."""
        return hashlib.sha256(self.data).hexdigest()


def portable_step(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int, unit: str, loss: str = "cross_entropy", cache: Path | None = None
) -> PortableStep[StepForm]:  # fmt: skip
    """The step of ``model``, whose trainable parameters are those that require gradients, for ``batch`` examples in one call.

    ``unit``: what privacy protects. With "example" the step clips every example's gradient; with "client" or "" it does not.
    ``loss``: one of `config.LOSSES`.
    ``cache``: directory where steps that passed the gate lie under their hash. Neither parameters' values nor activation ranges
    change a step: it is another one only before the ranges are frozen, when activations are not rounded.

    Raises:
        Refused: a layer that has no form for devices, a step that misses the gate (`gate.check_parity`) or is too large.
        TryAgain: the cache cannot be written.
    """
    if unit not in ("example", "client", ""):
        raise Refused(f'training step: unit must be "example", "client" or empty, got {unit!r}')
    if batch < 1:
        raise Refused(f"training step: batch must be >= 1, got {batch}")
    step = PortableStep(*step_graph(model, input_shape, batch=batch, clips=unit == "example", loss=loss))
    return _judged(step, partial(check_parity, model, step.data, step.form, loss), cache)


def portable_evaluation(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int, loss: str = "cross_entropy", cache: Path | None = None
) -> PortableStep[EvaluationForm]:  # fmt: skip
    """The evaluation graph of ``model`` for ``batch`` examples in one call, as `portable_step` gives its step.

    Raises:
        Refused: as `portable_step`; the gate is `gate.check_evaluation`.
        TryAgain: the cache cannot be written.
    """
    if batch < 1:
        raise Refused(f"evaluation graph: batch must be >= 1, got {batch}")
    step = PortableStep(*evaluation_graph(model, input_shape, batch=batch, loss=loss))
    return _judged(step, partial(check_evaluation, model, step.data, step.form, loss), cache)


def _judged(step: PortableStep[Form], judge: Callable[[], None], cache: Path | None) -> PortableStep[Form]:
    # Another runtime may compute otherwise, and has to pass the gate on its own.
    place = cache / f"onnxruntime-{onnxruntime.__version__}" / f"{step.sha256}.onnx" if cache else None
    if place is None or not _holds(place, step.sha256):
        judge()
        judge_graph(step.data, SIZE_LIMIT)
        if place:
            _keep(place, step.data)
    return step


def _holds(place: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(place.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _keep(place: Path, data: bytes) -> None:
    """Write the file whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TryAgain(f"training step: {place} cannot be written: {error}") from error
