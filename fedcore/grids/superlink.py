"""SuperLinkGrid: clients behind a Flower SuperLink, each a SuperNode that was started with its partition id."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.flower import METRICS, Answer, ClientGrid, Facts, answer_all, assume_identity, facts_of, from_record, kind_of, only_record
from fedcore.models import ParameterLayout
from fedcore.training.client import RoundTask, why_unusable

__all__ = ["SuperLinkGrid", "identity_content"]

_IDENTITY = "partition-id"
_POLL = 0.5  # seconds between two looks for answers
_NEWCOMER = 60.0  # seconds that a node which connects during the run is given to say who it is


def identity_content(partition: int) -> RecordDict:
    """A SuperNode's answer to a query: the client whose data it holds."""
    return RecordDict({_IDENTITY: MetricRecord({_IDENTITY: partition})})


class SuperLinkGrid(ClientGrid):
    """The clients 0 to ``clients`` - 1 behind ``grid``, Flower's own; ``nodes`` are those drawn for a round.

    Flower draws node ids at random, so every connected node is asked once for its partition id, which is the client's. A client
    whose node has gone is served by the next node that has its partition id, as after a restart. The strategy gets one reply per
    client, in the order of clients and screened: a node is believed in nothing that could harm more than its own reply.

    Raises:
        RoundFailed: a client has no node ``wait`` seconds after the construction.
        Refused: a node has a partition id that does not exist, or that of another connected node.
    """

    mean = False

    def __init__(self, grid: Grid, clients: int, layout: ParameterLayout, *, wait: float) -> None:
        assume_identity()
        self.nodes: Sequence[int] = range(clients)
        self.place = f"{clients} SuperNodes"
        self._grid, self._layout = grid, layout
        self._claims: dict[int, int | str] = {}  # by node: its partition id, or why it gave none
        self._node_of: dict[int, int] = {}
        self._call_roll(range(clients), wait)

    def close(self) -> None:
        """Nothing to do: Flower closes its grid."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the clients that take part."""
        connected = self._ask_newcomers(time.monotonic() + _NEWCOMER)
        for client in self.nodes:
            if self._node_of[client] not in connected:
                self._node_of[client] = next(self._claimants(client, connected), self._node_of[client])
        return [self._node_of[client] for client in self.nodes]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Let each message's client do its work. Only good replies come back; failures are facts of the first of them.

        Raises:
            RoundFailed: no client gave a usable reply within ``timeout`` seconds.
        """
        sent = list(messages)
        replies = {reply.metadata.reply_to_message_id: reply for reply in self._grid.send_and_receive(sent, timeout=timeout)}
        clients = {node: client for client, node in self._node_of.items()}
        answers: list[Answer] = []
        dropped: list[tuple[int, str]] = []
        for client, message in sorted(((clients[m.metadata.dst_node_id], m) for m in sent), key=lambda pair: pair[0]):
            try:
                answers.append(self._answer(client, message, replies.get(message.metadata.message_id)))
            except ClientFailure as failure:
                dropped.append((client, str(failure)))
        return answer_all(answers, Facts(dropped=tuple(dropped)))

    def _call_roll(self, clients: range, wait: float) -> None:
        """Find the node of every client."""
        deadline = time.monotonic() + wait
        while True:
            connected = self._ask_newcomers(deadline)
            for node, claim in self._claims.items():
                if isinstance(claim, int) and claim not in clients:
                    raise Refused(f"node {node} has partition-id {claim}, but the scenario has {len(clients)} clients, from 0")
            for client in clients:
                claimants = list(self._claimants(client, connected))
                if len(claimants) > 1:
                    raise Refused(f"nodes {claimants[0]} and {claimants[1]} both have partition-id {client}")
                self._node_of.update({client: node for node in claimants})
            missing = [client for client in clients if client not in self._node_of]
            if not missing:
                return
            if time.monotonic() >= deadline:
                raise RoundFailed(self._absence(missing, wait))
            time.sleep(_POLL)

    def _ask_newcomers(self, deadline: float) -> set[int]:
        """The connected nodes; those not met before are asked for their partition id, and waited for until ``deadline``."""
        connected = set(self._grid.get_node_ids())
        new = sorted(connected - self._claims.keys())
        if not new:
            return connected
        self._claims.update(dict.fromkeys(new, "has not answered"))
        ids = self._grid.push_messages([Message(RecordDict(), node, MessageType.QUERY) for node in new])
        pending = dict(zip(ids, new, strict=True))
        while pending:
            for reply in self._grid.pull_messages(list(pending)):
                self._claims[pending.pop(reply.metadata.reply_to_message_id)] = _identity(reply)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL if pending else 0)
        return connected

    def _claimants(self, client: int, connected: set[int]) -> Iterator[int]:
        return (node for node, claim in self._claims.items() if claim == client and node in connected)

    def _absence(self, missing: Sequence[int], wait: float) -> str:
        silent = [f"node {node}: {claim}" for node, claim in self._claims.items() if isinstance(claim, str)]
        which = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        return f"no SuperNode has partition-id {which} after {wait:.0f} s of waiting{'; ' if silent else ''}{'; '.join(silent)}"

    def _answer(self, client: int, message: Message, reply: Message | None) -> Answer:
        kind = kind_of(message)
        if reply is None:
            raise ClientFailure("no reply within cohort.timeout")
        if reply.has_error():
            raise ClientFailure(f"its node failed: {reply.error.reason}")
        try:
            metrics = _metrics(reply, METRICS[kind])
            told = facts_of(reply)
            arrays = self._arrays(reply) if kind == MessageType.TRAIN else None
            local = None if arrays is None else from_record(self._layout, arrays)
        except Exception as error:  # a client may send anything, and harms nobody else by it
            raise ClientFailure(f"its reply cannot be used: {type(error).__name__}: {error}") from error
        if local is not None:
            reason = self._why_unusable(message, local, metrics["train_loss"])
            if reason:
                raise ClientFailure(reason)
        seen = () if local is not None else ((client, metrics["accuracy"], int(metrics["num-examples"])),)
        return Answer(message, arrays, metrics, Facts((client,), (), told.bytes_up, told.bytes_down, seen))
