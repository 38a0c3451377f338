"""A device's part in secure aggregation; imported only where a round asks for it.

The device's enrolment is its identity towards the committee as well: the trust bundle of the fleet carries the committee's. A
visit's key is 32 bytes that the agent keeps with the round; `used/` remembers visits that were masked for, so that none is twice.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.errors import Refused
from fedcore.gateway.client import Enrolled
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.participant import Accepted, Demands, Participant, Visit, claim_visit, hash_work
from fedcore.secagg.plan import Policy as SecurePolicy
from fedcore.secagg.sums import sum_from_table
from fedcore_device.policy import PlanPolicy, own_noise

__all__ = ["Masking"]


class Masking:
    """One device's visit: ``key`` [32 bytes] is drawn for it and for no other."""

    def __init__(self, enrolled: Enrolled, policy: PlanPolicy, key: bytes, visit: Visit) -> None:
        if not enrolled.trust.committee:
            raise Refused("the fleet's trust bundle names no committee; this device takes part in no secure aggregation")
        self._enrolled, self._policy, self._trust = enrolled, policy, TrustBundle.decode(enrolled.trust.committee)
        self._key, self._visit = key, visit

    def _participant(self, own_noise: float = 0.0) -> Participant:
        """``own_noise``: multiplier of the noise that the device adds by itself; where it suffices, none is asked of the sum. None
        is asked of a sum of scores where the policy lets the device evaluate."""
        policy = self._policy
        asked = 0.0 if own_noise >= policy.noise_multiplier else policy.noise_multiplier
        floor = SecurePolicy(policy.minimum_devices, policy.corrupt_devices, asked)
        scores = replace(floor, noise_multiplier=0.0 if policy.evaluation else policy.noise_multiplier)
        return Participant(self._enrolled.key, self._enrolled.enrolment.certificate, self._trust, Demands(floor, scores))

    def check_in(self) -> bytes:
        """The round key that the gateway is shown."""
        return self._participant().check_in(self._key, self._visit)

    def accept(self, invitation: bytes, model: bytes, settings: Mapping[str, Any]) -> Accepted:
        """Check what the committee approved, before anything is trained.

        Raises:
            Refused: it is not what this device's policy and the training configuration ask for.
        """
        summation = sum_from_table(settings)
        if summation is None:
            raise Refused("the plan asks for secure aggregation and names no sum")
        participant = self._participant(own_noise(settings))
        return participant.accept(self._key, self._visit, invitation, hash_work(model, settings), summation)

    def upload(self, accepted: Accepted, vector: bytes, directory: Path) -> bytes:
        """The masked contribution of a vector in numpy's format; once for a visit, however often the agent is killed.

        Raises:
            Refused: this visit's key was used before.
        """
        integers = np.load(io.BytesIO(vector), allow_pickle=False)
        claim_visit(directory / "used", self._visit)
        return accepted.upload(integers)
