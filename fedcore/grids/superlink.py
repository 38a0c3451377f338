"""SuperLinkGrid: clients behind a Flower SuperLink, each a SuperNode that was started with its partition id."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.flower import (
    METRICS,
    NOBODY,
    Answer,
    ClientGrid,
    Facts,
    answer_all,
    assume_identity,
    check_addressees,
    check_one_content,
    facts_of,
    from_record,
    kind_of,
    only_record,
    to_record,
)
from fedcore.grids.protocol import visit_of
from fedcore.grids.publish import CONTRIBUTION, publish
from fedcore.models import ParameterLayout
from fedcore.privacy.release import Release
from fedcore.training.client import RoundTask, why_unusable

__all__ = ["SuperLinkGrid", "identity_content"]

_IDENTITY = "partition-id"
_POLL = 0.5  # seconds between two looks for answers
_NEWCOMER = 60.0  # seconds that a node which connects during the run is given to say who it is


def identity_content(partition: int) -> RecordDict:
    """A SuperNode's answer to a query: the client whose data it holds."""
    return RecordDict({_IDENTITY: MetricRecord({_IDENTITY: partition})})


@dataclass(frozen=True)
class _Part:
    """A client's usable reply to ``message``; ``update`` [d] where it trained, or its summand [size] under a release."""

    message: Message
    metrics: Mapping[str, float]
    facts: Facts
    update: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def examples(self) -> int:
        return int(self.metrics["num-examples"])


class SuperLinkGrid(ClientGrid):
    """The clients 0 to ``clients`` - 1 behind ``grid``, Flower's own; ``nodes`` are those drawn for a round.

    Flower draws node ids at random, so every connected node is asked once for its partition id, which is the client's. A client
    whose node has gone is served by another that connects with its partition id, as after a restart. Nodes reply with updates;
    the strategy gets master + update, as from a simulated cohort: the example-weighted mean (``mean``), or one reply per client.
    Replies are screened: what a node sends can spoil no more than its own part.

    Raises:
        RoundFailed: a client has no node ``wait`` seconds after the construction.
        Refused: a node has a partition id that does not exist, or that of another connected node.
    """

    blind = False

    def __init__(self, grid: Grid, clients: int, layout: ParameterLayout, *, mean: bool, wait: float) -> None:
        assume_identity()
        self.nodes: Sequence[int] = range(clients)
        self.place = f"{clients} SuperNodes"
        self.observed, self.simulated = Facts(), False
        self.mean, self._grid, self._layout = mean, grid, layout
        self._claims: dict[int, int | str] = {}  # by node: its partition id, or why it gave none
        self._node_of: dict[int, int] = {}
        self._call_roll(range(clients), wait)

    def close(self) -> None:
        """Nothing to do: Flower closes its grid."""

    def client_of(self, node: int) -> int:
        """The client behind a node."""
        return next((client for client, of in self._node_of.items() if of == node), -1)

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
        self.observed, sent = Facts(), list(messages)
        check_addressees(sent, [self._node_of[client] for client in self.nodes] or [NOBODY])
        if sent and visit_of(sent[0]):  # secure aggregation screens what comes back: all of it is opaque here
            return list(self._grid.send_and_receive(sent, timeout=timeout))
        if self.mean:
            check_one_content(sent)
        if sent and (task := _task(sent[0])).release and kind_of(sent[0]) == MessageType.TRAIN:
            return self._publish(sent, task, timeout)
        parts, dropped = self._parts(sent, timeout)
        groups = [parts] if self.mean and parts else [[part] for part in parts]
        return answer_all([self._together(group) for group in groups], Facts(dropped=dropped))

    def _publish(self, sent: Sequence[Message], task: RoundTask, timeout: float | None) -> list[Message]:
        """The one reply of a round in which each client is protected; the noise comes from the operating system."""
        release = task.release
        if not isinstance(release, Release):
            raise Refused("these nodes would show the coordinator every client's part of the sum; it takes secure aggregation")
        parts, dropped = self._parts([message for message in sent if message.metadata.dst_node_id != NOBODY], timeout)
        self.observed = Facts.merge([Facts(dropped=dropped), *(part.facts for part in parts)])
        total = np.zeros(release.size)
        for part in parts:
            total += part.update
        down = max((part.facts.bytes_down for part in parts), default=0)
        answer = publish(sent[0], self._layout, task, total, len(parts), os.urandom)
        return answer_all([answer], Facts(bytes_down=down * release.cohort))

    def _parts(self, sent: Sequence[Message], timeout: float | None) -> tuple[list[_Part], tuple[tuple[int, str], ...]]:
        """The usable replies in the order of clients, and the clients that gave none, with the reason."""
        replies = {reply.metadata.reply_to_message_id: reply for reply in self._grid.send_and_receive(sent, timeout=timeout)}
        clients = {node: client for client, node in self._node_of.items()}
        parts: list[_Part] = []
        dropped: list[tuple[int, str]] = []
        for message in sorted(sent, key=lambda one: clients[one.metadata.dst_node_id]):
            client = clients[message.metadata.dst_node_id]
            try:
                parts.append(self._part(client, message, replies.get(message.metadata.message_id)))
            except ClientFailure as failure:
                dropped.append((client, str(failure)))
        return parts, tuple(dropped)

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
                if claimants:
                    self._node_of[client] = claimants[0]
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
            if not pending or time.monotonic() >= deadline:
                break
            time.sleep(_POLL)
        return connected

    def _claimants(self, client: int, connected: set[int]) -> Iterator[int]:
        return (node for node, claim in self._claims.items() if claim == client and node in connected)

    def _absence(self, missing: Sequence[int], wait: float) -> str:
        silent = [f"node {node}: {claim}" for node, claim in self._claims.items() if isinstance(claim, str)]
        which = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        return f"no SuperNode has partition-id {which} after {wait:.0f} s of waiting{'; ' if silent else ''}{'; '.join(silent)}"

    def _part(self, client: int, message: Message, reply: Message | None) -> _Part:
        """What a client's reply contributes.

        Raises:
            ClientFailure: there is none, or it cannot be used.
        """
        kind, task = kind_of(message), _task(message)
        if reply is None:
            raise ClientFailure("no reply within cohort.timeout")
        if reply.has_error():
            raise ClientFailure(f"its node failed: {reply.error.reason}")
        try:
            metrics, told = _metrics(reply, METRICS[kind][: 1 if task.private else None]), facts_of(reply)
            if kind == MessageType.EVALUATE:
                seen = (client, float(metrics["accuracy"]), int(metrics["num-examples"]))
                return _Part(message, metrics, Facts((client,), (), told.bytes_up, told.bytes_down, (seen,)))
            (arrays,) = reply.content.array_records.values()
            facts = Facts((client,), (), told.bytes_up, told.bytes_down)
            if isinstance(task.release, Release):
                return _Part(message, metrics, facts, task.release.accept(arrays[CONTRIBUTION].numpy()))
            update = from_record(self._layout, arrays)
        except Exception as error:  # a client may send anything, and harms nobody else by it
            raise ClientFailure(f"its reply cannot be used: {error}") from error
        reason = why_unusable(
            float(np.linalg.norm(update.astype(np.float64))), metrics.get("train_loss", 0.0), task.max_update_norm
        )
        if reason:
            raise ClientFailure(reason)
        return _Part(message, metrics, facts, update)

    def _together(self, parts: Sequence[_Part]) -> Answer:
        """One answer for several clients: sums in float64 and in the order of clients give the bits of a simulation."""
        message, examples = parts[0].message, sum(part.examples for part in parts)
        kind, master = kind_of(message), from_record(self._layout, only_record(message, ArrayRecord))
        metrics = {name: sum(part.examples * part.metrics[name] for part in parts) / examples for name in parts[0].metrics}
        metrics["num-examples"] = examples
        arrays = None
        if kind == MessageType.TRAIN:
            total = np.zeros(self._layout.size)
            for part in parts:
                total += part.examples * part.update.astype(np.float64)
            arrays = to_record(self._layout, (master + total / examples).astype(np.float32))
        return Answer(message, arrays, metrics, Facts.merge(part.facts for part in parts))


def _task(message: Message) -> RoundTask:
    return RoundTask.from_table(only_record(message, ConfigRecord))


def _identity(reply: Message) -> int | str:
    """The partition id in an answer to a query, or why there is none."""
    if reply.has_error():
        return reply.error.reason or "failed without a reason"
    record = reply.content.metric_records.get(_IDENTITY, MetricRecord())
    partition = record.get(_IDENTITY)
    return partition if isinstance(partition, int) else "answered without a partition-id"


def _metrics(reply: Message, names: Sequence[str]) -> dict[str, int | float]:
    """The metrics that belong to a reply, and no others: Flower's strategies fail on replies with different ones."""
    (record,) = reply.content.metric_records.values()
    metrics = {}
    for name in names:
        value = record[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ClientFailure(f"{name} is not a finite number")
        metrics[name] = value
    if not isinstance(metrics["num-examples"], int) or metrics["num-examples"] < 1:
        raise ClientFailure("num-examples is not a whole number above 0")
    return metrics
