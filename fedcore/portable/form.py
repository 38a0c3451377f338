"""What coordinator and device agree on about received graphs: their inputs, outputs, operators and sizes. Neither torch nor onnx.

A step is an ONNX file that computes, for the first rows of a batch that ``mask`` counts, the sum of their gradients:

    (parameters [d], frozen [f], ranges [6 q], x [b, ...], y [b, classes], mask [b], clip []) -> (gradient [d], count [], loss [])

``y`` is one-hot, ``mask`` is 1 or 0. In a step that clips, every row's gradient is scaled to an L2 norm of at most ``clip`` over
all parameters together before the sum (Abadi et al. 2016, arXiv:1607.00133); in one that does not, ``clip`` changes nothing.
``frozen`` and ``ranges`` are inputs only where the model has frozen parameters or rounds activations, so that a step is a
function of the architecture and the loss alone: it can be signed before a run starts, and stays the same whatever is learnt or
calibrated. Which loss it is, cross-entropy or the squared error, is what the graph computes; the form does not name it.

An evaluation graph is held to the same rules, takes the same inputs but for ``clip``, and gives three numbers about those rows: how
many there are, how many of them the model labels as y does (of equal logits the first counts), and the sum of their losses:

    (parameters [d], frozen [f], ranges [6 q], x [b, ...], y [b, classes], mask [b]) -> (count [], correct [], loss [])
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.quantization.wire import ActivationRange

__all__ = [
    "FORM_KEY", "IR_VERSION", "OPERATORS", "OPSET", "RANGE_VALUES", "SIZE_LIMIT", "EvaluationForm", "GraphForm", "StepForm",
    "range_values",
]  # fmt: skip

FORM_KEY = "fedcore.step"  # the metadata property that holds a step's form
OPSET, IR_VERSION = 17, 8
SIZE_LIMIT = 16 * 1024 * 1024  # bytes of a step; the zoo's are below 200 kB
RANGE_VALUES = 6
OPERATORS = frozenset((
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Equal", "Exp", "Gather", "Gemm", "Greater", "Identity", "LogSoftmax", "MatMul",
    "Max", "Min", "Mul", "Neg", "Pad", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Reshape", "Round",
    "Sigmoid", "Split", "Sqrt", "Sub", "Sum", "Tanh", "Transpose",
))  # fmt: skip
_VERSION = 1
_MOST = 2**28  # values of one input


@dataclass(frozen=True)
class GraphForm:
    """Sizes of a graph's inputs, as in this module's head: d, f, the q quantizers' names, one example's shape, classes and b."""

    parameters: int
    frozen: int
    quantizers: tuple[str, ...]
    input_shape: tuple[int, ...]
    classes: int
    batch: int

    KEY: ClassVar[str]  # the metadata property that holds the form
    WHAT: ClassVar[str]  # for people

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input that the graph has, in order."""
        return {
            "parameters": (self.parameters,),
            **({"frozen": (self.frozen,)} if self.frozen else {}),
            **({"ranges": (RANGE_VALUES * len(self.quantizers),)} if self.quantizers else {}),
            "x": (self.batch, *self.input_shape),
            "y": (self.batch, self.classes),
            "mask": (self.batch,),
        }

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of every output, in order."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Canonical text; the inverse of `from_json`."""
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The form that a graph states.

        Raises:
            Refused: not a form of this version, or sizes that no graph has.
        """
        try:
            found = json.loads(text)
            version = found.pop("version")
            fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
            form = cls(**fields)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise Refused(f"{cls.WHAT}: its form is not readable") from error
        if version != _VERSION:
            raise Refused(f"{cls.WHAT}: form version {version!r} is not {_VERSION}, the one known here")
        form._validate()
        return form

    def _validate(self) -> None:
        numbers = {"parameters": self.parameters, "classes": self.classes, "batch": self.batch, "frozen": self.frozen}
        if not isinstance(self.input_shape, tuple) or not isinstance(self.quantizers, tuple):
            raise Refused(f"{self.WHAT}: input_shape and quantizers must be lists; quantizers a list of names")
        numbers |= {f"input_shape[{i}]": size for i, size in enumerate(self.input_shape)}
        for name, value in numbers.items():
            if type(value) is not int or not (name != "frozen") <= value < _MOST:
                raise Refused(f"{self.WHAT}: {name} must be an integer from {int(name != 'frozen')}, got {value!r}")
        if not all(isinstance(name, str) for name in self.quantizers):
            raise Refused(f"{self.WHAT}: input_shape and quantizers must be lists; quantizers a list of names")
        if self.batch * max(self.classes, math.prod(self.input_shape)) >= _MOST:
            raise Refused(f"{self.WHAT}: one of its inputs has {_MOST} values or more")


@dataclass(frozen=True)
class StepForm(GraphForm):
    """The form of a training step, and whether it clips."""

    clips: bool

    KEY: ClassVar[str] = FORM_KEY
    WHAT: ClassVar[str] = "training step"

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input that the graph has, in order."""
        return {**super().inputs(), "clip": ()}

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of every output, in order."""
        return {"gradient": (self.parameters,), "count": (), "loss": ()}

    def _validate(self) -> None:
        super()._validate()
        if type(self.clips) is not bool:
            raise Refused(f"{self.WHAT}: clips must be true or false")


@dataclass(frozen=True)
class EvaluationForm(GraphForm):
    """The form of an evaluation graph."""

    KEY: ClassVar[str] = "fedcore.evaluation"
    WHAT: ClassVar[str] = "evaluation graph"

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of every output, in order."""
        return {"count": (), "correct": (), "loss": ()}


def range_values(ranges: Mapping[str, ActivationRange], quantizers: tuple[str, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """The input ``ranges`` of a step: for each quantizer scale, inverse, lowest and highest integer less the zero point, and the
    least and the greatest value through which a gradient passes.

    Raises:
        Refused: a quantizer has no range.
    """
    missing = [name for name in quantizers if name not in ranges]
    if missing:
        raise Refused(f"training step: no activation range is given for quantizer {missing[0]}")
    return np.array([value for name in quantizers for value in _values(ranges[name], dtype)], dtype).reshape(-1)


def _values(grid: ActivationRange, dtype: Any) -> list[Any]:
    inverse = np.float32(1) / np.float32(grid.scale)  # float32 in every precision, as the runtimes have it
    low, high = -128 - grid.zero_point, 127 - grid.zero_point
    ends = [dtype(end * grid.scale) for end in (low - 0.5, high + 0.5)]
    # At the ends themselves the gradient is zero: the passing values begin with their neighbours.
    return [grid.scale, inverse, low, high, np.nextafter(ends[0], dtype(np.inf)), np.nextafter(ends[1], dtype(-np.inf))]
