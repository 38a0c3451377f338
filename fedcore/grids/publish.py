"""The one reply that a release gives the strategy: its mean, and nothing that tells who took part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message

from fedcore.flower import Answer, Facts, from_record, only_record, to_record
from fedcore.models import ParameterLayout
from fedcore.privacy.randomness import RandomBytes
from fedcore.privacy.release import Release

__all__ = ["CONTRIBUTION", "publish"]

CONTRIBUTION = "contribution"
"""Name of the array in which a real client sends its contribution."""


def publish(
    message: Message, layout: ParameterLayout, release: Release, total: npt.NDArray[np.float64], survivors: int, random: RandomBytes
) -> Answer:
    """The answer to ``message`` from the sum [size] of ``survivors`` contributions, also where there are none.

    The number of survivors is told only where the guarantee takes it to be public; the traffic is that of the planned cohort
    where not.

    Raises:
        RoundFailed: fewer survivors than the noise is sized for.
    """
    means = release.publish(total, survivors, random)
    master = from_record(layout, only_record(message, ArrayRecord))
    metrics = {"num-examples": release.cohort} | ({} if means.loss is None else {"train_loss": means.loss})
    counted = survivors if release.shares else None
    facts = Facts(
        bytes_up=release.bytes * (release.cohort if counted is None else counted), survivors=counted, unclipped=means.unclipped
    )
    return Answer(message, to_record(layout, (master + means.update).astype(np.float32)), metrics, facts)
