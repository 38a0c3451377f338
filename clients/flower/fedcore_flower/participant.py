"""A node's part in secure aggregation: its identity in a directory, and the key of its visit in the SuperNode's memory.

Flower takes over what a ClientApp changed in that memory only after its reply has gone. That a visit's key is used is therefore
noted in the node's directory, durably, before anything is trained: a process that dies in between leaves no key that masks again.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context

from fedcore.errors import Refused
from fedcore.secagg.participant import Accepted, Demands, Participant, Visit, claim_visit, enrolled_participant
from fedcore.secagg.sums import Summation

__all__ = ["NodeParticipants"]

_STATE = "secagg"


class NodeParticipants:
    """The one client of a node. Its key of a visit lives in Flower's state of the node, which ends with the SuperNode's process."""

    def __init__(self, context: Context, demands: Demands) -> None:
        self._context, self._demands = context, demands

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
        accepted = self._participant().accept(bytes(record["key"]), visit, invitation, model_hash, summation)  # type: ignore[arg-type]
        claim_visit(self._directory / "used", visit)
        return accepted

    def _participant(self) -> Participant:
        return enrolled_participant(self._directory, self._demands)

    @property
    def _directory(self) -> Path:
        directory = self._context.node_config.get("enrolment")
        if not isinstance(directory, str):
            raise Refused("this SuperNode is not enrolled; start it with --node-config 'partition-id=0 enrolment=\"DIR\"'")
        return Path(directory)
