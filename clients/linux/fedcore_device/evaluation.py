"""A device's part in an evaluation: how well the model that it was sent labels the examples that it holds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.portable.form import EvaluationForm
from fedcore.quantization.wire import ActivationRange
from fedcore_device.step import Evaluation, Step
from fedcore_device.trainer import check_examples

__all__ = ["Scored", "score_examples"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Sums over ``examples`` examples: ``correct`` top-1 predictions, and ``loss``, what the graph computes, not always finite."""

    examples: int
    correct: int
    loss: float


def score_examples(
    step: Step[EvaluationForm], values: Floats, x: Floats, labels: npt.NDArray[np.int64], *, frozen: Floats | None = None,
    ranges: Mapping[str, ActivationRange] | None = None,
) -> Scored:  # fmt: skip
    """Score the parameters ``values`` [d] on x [n, ...] with labels [n], as `fedcore.training.evaluation.evaluate` does.

    Raises:
        Refused: examples or parameters that do not fit the graph, or a graph that gives what no honest one gives.
    """
    if not len(labels):
        return Scored(0, 0, 0.0)
    check_examples(step.form, x, labels)
    correct, loss = Evaluation(step, frozen=frozen, ranges=ranges)(values, np.ascontiguousarray(x, np.float32), labels)
    return Scored(len(labels), correct, loss)
