"""A node's part in secure aggregation: its identity in a directory, and the key of its visit in the SuperNode's memory."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context

from fedcore.errors import Refused
from fedcore.secagg.participant import Accepted, Participant, Visit, enrolled_participant
from fedcore.secagg.plan import Policy
from fedcore.secagg.sums import Summation

__all__ = ["NodeParticipants"]

_STATE = "secagg"


class NodeParticipants:
    """The one client of a node. Its key of a visit lives in Flower's state of the node, which ends with the SuperNode's process,
    and is gone from it before anything is trained."""

    def __init__(self, context: Context, policy: Policy) -> None:
        self._context, self._policy = context, policy

    def check_in(self, client: int, visit: Visit) -> bytes:  # noqa: ARG002 - as of grids with several clients
        """See `Participants`; whatever an earlier check-in left behind is gone."""
        key = os.urandom(32)
        self._context.state[_STATE] = ConfigRecord({"key": key, "task": visit.task, "epoch": visit.epoch})
        return self._participant().check_in(key, visit)

    def accept(
        self, client: int, visit: Visit, invitation: bytes, model_hash: bytes, summation: Summation  # noqa: ARG002
    ) -> Accepted:  # fmt: skip
        """See `Participants`."""
        record = self._context.state.pop(_STATE, None)
        if not isinstance(record, ConfigRecord) or (record["task"], record["epoch"]) != (visit.task, visit.epoch):
            raise Refused("this node has not checked in for this round, or has uploaded already; its SuperNode may have restarted")
        return self._participant().accept(bytes(record["key"]), visit, invitation, model_hash, summation)  # type: ignore[arg-type]

    def _participant(self) -> Participant:
        directory = self._context.node_config.get("enrolment")
        if not isinstance(directory, str):
            raise Refused("this SuperNode is not enrolled; start it with --node-config 'partition-id=0 enrolment=\"DIR\"'")
        return enrolled_participant(Path(directory), self._policy)
