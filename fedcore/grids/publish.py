"""The one reply that a sum gives the strategy: its mean, and nothing that tells who took part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message

from fedcore.errors import Refused
from fedcore.flower import Answer, Facts, from_record, only_record, to_record
from fedcore.models import ParameterLayout
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.sums import ScoreSum
from fedcore.training.client import RoundTask

__all__ = ["CONTRIBUTION", "publish"]

CONTRIBUTION = "contribution"
"""Name of the array in which a real client sends its contribution."""


def publish(
    message: Message, layout: ParameterLayout, task: RoundTask, total: npt.NDArray[np.float64], survivors: int, random: RandomBytes
) -> Answer:
    """The answer to ``message`` from the sum [size] of ``survivors`` contributions, also where there are none.

    The number of survivors is told only where the guarantee takes it to be public; the traffic is that of the planned cohort
    where not.

    Raises:
        RoundFailed: fewer survivors than the sum is planned for.
    """
    summation = task.release
    if summation is None:
        raise Refused("the training configuration says nothing of a sum")
    if isinstance(summation, ScoreSum):
        scores = summation.publish(total, survivors)
        metrics = {"num-examples": scores.examples, "accuracy": scores.accuracy, "loss": scores.loss}
        told = Facts(bytes_up=summation.bytes * survivors, survivors=survivors, histogram=scores.histogram)
        return Answer(message, None, metrics, told)
    means = summation.publish(total, survivors, random)
    master = from_record(layout, only_record(message, ArrayRecord))
    loss = {} if means.loss is None or task.plan.dp else {"train_loss": means.loss}
    facts = Facts(
        bytes_up=summation.bytes * (survivors if summation.counted else summation.cohort),
        survivors=survivors if summation.counted else None,
        unclipped=means.unclipped,
        failed=None if task.plan.dp else means.failed,
    )
    examples = summation.cohort if means.examples is None else means.examples
    return Answer(message, to_record(layout, (master + means.update).astype(np.float32)), {"num-examples": examples} | loss, facts)
