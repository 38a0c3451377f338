"""A received training step or evaluation graph at work: what must hold of every answer that it gives.

The file was judged before (`fedcore.portable.judge`), by the rules of those who sign it. Here every answer is held against the
clipping norm, which bounds what any graph can carry out of a step; an evaluation gives no more than three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedcore.errors import ClientFailure, Refused
from fedcore.portable.form import EvaluationForm, GraphForm, StepForm, range_values
from fedcore.portable.judge import Step, open_session, read_evaluation, read_step
from fedcore.quantization.wire import ActivationRange

__all__ = ["Accumulate", "Engine", "Evaluation", "Step", "read_evaluation", "read_step"]

Floats = npt.NDArray[np.float32]
Form = TypeVar("Form", bound=GraphForm)
_SLACK = 1e-4  # relative rounding error that single precision is allowed in the norm of a sum


class Engine(Protocol):
    """What computes a step's answers: no more than ``most`` examples in one call. ``name`` is for people, ``fault`` the error that
    an answer is which no step gives."""

    @property
    def name(self) -> str: ...  # noqa: D102 - the class says it
    @property
    def most(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def fault(self) -> type[Refused]: ...  # noqa: D102 - the class says it

    def answer(
        self, parameters: Floats, x: Floats, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], clip: float
    ) -> tuple[Floats, float, float]:
        """Gradient, count and loss for the examples ``rows`` of x and labels, as the step's outputs."""
        ...


class _Session(Generic[Form]):
    """A graph in ONNX Runtime, for one round's frozen parameters [f] and activation ranges.

    Raises:
        Refused: ONNX Runtime cannot run the file, or what it needs is not given.
    """

    fault = Refused

    def __init__(
        self, step: Step[Form], *, frozen: Floats | None, ranges: Mapping[str, ActivationRange] | None, threads: int
    ) -> None:
        self.step, form = step, step.form
        self.name, self.most = f"{form.WHAT} {step.sha256[:16]}", form.batch
        self._session = open_session(step, threads)
        self.given: dict[str, npt.NDArray[Any]] = {name: np.zeros(form.inputs()[name], np.float32) for name in ("x", "y", "mask")}
        if form.frozen:
            if frozen is None or frozen.shape != (form.frozen,) or not np.isfinite(frozen).all():
                raise Refused(f"{form.WHAT}: it needs {form.frozen} finite frozen parameters")
            self.given["frozen"] = np.ascontiguousarray(frozen, np.float32)
        if form.quantizers:
            self.given["ranges"] = range_values(ranges or {}, form.quantizers)
        self._inputs, self._names = form.inputs(), list(form.outputs())

    def answer(
        self, parameters: Floats, x: Floats, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], clip: float = math.inf
    ) -> tuple[Floats, float, float]:
        """The three outputs for the examples ``rows`` of x and labels, of which there are no more than the graph's batch."""
        given, used = self.given, len(rows)
        if "clip" in self._inputs:
            given["clip"] = np.asarray(clip, np.float32)
        given["parameters"] = parameters
        np.take(x, rows, axis=0, out=given["x"][:used], mode="clip")
        given["x"][used:] = 0
        given["y"][:] = 0
        given["y"][np.arange(used), labels[rows]] = 1
        given["mask"][:used], given["mask"][used:] = 1, 0
        try:
            answer = self._session.run(self._names, given)
        except Exception as error:  # ONNX Runtime has a tree of errors of its own
            raise Refused(f"{self.name}: ONNX Runtime cannot run it ({type(error).__name__})") from error
        shapes = self.step.form.outputs()
        for name, value in zip(self._names, answer, strict=True):
            if value.shape != shapes[name] or value.dtype != np.float32:
                raise Refused(f"{self.name}: output {name} is {value.dtype} {list(value.shape)}, not as its form states")
        return answer[0], float(answer[1]), float(answer[2])


class Accumulate:
    """A training step, for one round's frozen parameters [f] and activation ranges; with ``engine`` that computes it, which was
    given these, and not ONNX Runtime.

    Raises:
        Refused: ONNX Runtime cannot run the file, or what it needs is not given.
    """

    def __init__(
        self, step: Step[StepForm], *, frozen: Floats | None = None, ranges: Mapping[str, ActivationRange] | None = None,
        threads: int = 1, engine: Engine | None = None,
    ) -> None:  # fmt: skip
        self.step = step
        self._engine: Engine = engine or _Session(step, frozen=frozen, ranges=ranges, threads=threads)
        self._squares = np.empty(step.form.parameters, np.float32)

    def __call__(
        self, parameters: Floats, x: Floats, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], clip: float = math.inf
    ) -> tuple[Floats, float]:  # fmt: skip
        """Sum of the gradients [d] of the examples ``rows`` of x [n, ...] and labels [n], and of their losses.

        With a finite ``clip`` every gradient is clipped to it, and an example whose gradient is not finite adds nothing, as in
        `fedcore.training.dpsgd`. Any number of rows: they are taken in pieces of as many as the engine takes.

        Raises:
            Refused: the step's answer cannot be one of a step that does what its form says.
            ClientFailure: without clipping, a gradient that is not finite.
        """
        total, loss = None, 0.0
        for first in range(0, len(rows), self._engine.most):
            piece = rows[first : first + self._engine.most]
            gradient, own = self._piece(parameters, x, labels, piece, clip)
            total, loss = (gradient if total is None else np.add(total, gradient, out=total)), loss + own
        return (np.zeros(self.step.form.parameters, np.float32) if total is None else total), loss

    def probe(self, parameters: Floats, clip: float = math.inf) -> None:
        """Run a full batch of zeros once: a step that fails on it is named before it sees an example.

        Raises:
            Refused: as in a call, or an answer that is not finite.
        """
        batch = self.step.form.batch
        zeros = np.zeros((1, *self.step.form.input_shape), np.float32)
        gradient, _, _ = self._run(parameters, zeros, np.zeros(1, np.int64), np.zeros(batch, np.int64), clip)
        if gradient is None:
            raise self._engine.fault(f"{self._engine.name}: for inputs of zeros its answer is not finite")

    def _piece(self, parameters: Floats, x: Floats, labels: Any, rows: Any, clip: float) -> tuple[Floats, float]:
        gradient, _, loss = self._run(parameters, x, labels, rows, clip)
        if gradient is not None:
            return gradient, loss
        if math.isinf(clip):
            raise ClientFailure("training failed: a gradient is not finite")
        if len(rows) == 1:
            return np.zeros(self.step.form.parameters, np.float32), 0.0
        found = [self._piece(parameters, x, labels, rows[i : i + 1], clip) for i in range(len(rows))]
        return np.sum([gradient for gradient, _ in found], axis=0, dtype=np.float32), sum(loss for _, loss in found)

    def _run(self, parameters: Floats, x: Floats, labels: Any, rows: Any, clip: float) -> tuple[Floats | None, float, float]:
        """Gradient, count and loss; no gradient where it is not finite."""
        used = len(rows)
        gradient, count, loss = self._engine.answer(parameters, x, labels, rows, clip)
        with np.errstate(over="ignore"):
            # Not a product of BLAS, whose threads wait for each other wherever other work is running.
            norm = math.sqrt(float(np.square(gradient, out=self._squares).sum()))
        if count != used:
            raise self._engine.fault(f"{self._engine.name}: it counts {count:g} examples where there are {used}")
        if not math.isfinite(norm):
            return None, count, loss
        if norm > used * clip * (1 + _SLACK):
            raise self._engine.fault(
                f"{self._engine.name}: the sum of {used} gradients has norm {norm:.6g}, more than {used} x {clip:.6g}"
            )
        return gradient, count, loss


class Evaluation:
    """An evaluation graph, for one round's frozen parameters [f] and activation ranges.

    Raises:
        Refused: as `Accumulate`.
    """

    def __init__(
        self, step: Step[EvaluationForm], *, frozen: Floats | None = None, ranges: Mapping[str, ActivationRange] | None = None,
        threads: int = 1,
    ) -> None:  # fmt: skip
        self._session = _Session(step, frozen=frozen, ranges=ranges, threads=threads)

    def __call__(self, parameters: Floats, x: Floats, labels: npt.NDArray[np.int64]) -> tuple[int, float]:
        """Correct predictions among x [n, ...] with labels [n], and the sum of their losses, which need not be finite.

        Raises:
            Refused: the graph's answer cannot be one of a graph that does what its form says.
        """
        batch, right, total = self._session.step.form.batch, 0, 0.0
        for first in range(0, len(labels), batch):
            rows = np.arange(first, min(first + batch, len(labels)))
            count, correct, loss = self._session.answer(parameters, x, labels, rows)
            if float(count) != len(rows) or correct not in range(len(rows) + 1) or loss < -_SLACK:
                raise Refused(
                    f"{self._session.name}: it says that {correct:g} of {float(count):g} examples are predicted correctly, with a "
                    f"loss of {loss:g}, where there are {len(rows)}"
                )
            right, total = right + int(correct), total + loss
        return right, total
