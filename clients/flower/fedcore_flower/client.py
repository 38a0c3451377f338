"""The ClientApp: one client, whose data is the part of its SuperNode's partition-id.

Flower starts a process for every message, which builds data and model anew from the scenario. Scenario, seed and so the partition
are the same on every node, and a node uses its own part only; the README says what changes where nodes hold data of their own.
"""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp

from fedcore.coordinator.assembly import Assembly, assemble, build_clients
from fedcore.errors import ClientFailure, Refused
from fedcore.flower import only_record
from fedcore.grids.cohort import CohortGrid
from fedcore.grids.protocol import check_in_reply, visit_of, without_protocol
from fedcore.grids.superlink import identity_content
from fedcore.training.client import RoundTask
from fedcore_flower.participant import NodeParticipants
from fedcore_flower.scenario import load_scenario

__all__ = ["app"]

app = ClientApp()
_LOG = logging.getLogger(__name__)


@app.query()
def answer(message: Message, context: Context) -> Message:
    """Say which client this node is, or check in for a round of secure aggregation."""
    visit = visit_of(message)
    if visit is None:
        return Message(identity_content(_client(context)), reply_to=message)
    assembly = assemble(load_scenario(context))
    return check_in_reply(message, _participants(assembly, context).check_in(_client(context), visit))


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Do what a simulated client does, as a cohort of one: receive Q(master), train or evaluate, reply update and metrics.

    Under secure aggregation the reply is its masked contribution, and nothing else.
    """
    assembly = assemble(load_scenario(context))
    trains = message.metadata.message_type == MessageType.TRAIN
    task = RoundTask.from_table(only_record(without_protocol(message), ConfigRecord))
    assembly.protection.check_task(task, trains=trains)
    if assembly.secured:
        assembly.secured.check_task(task, trains=trains, invited=visit_of(message) is not None)
    size = max(assembly.protection.released, assembly.secured.largest if assembly.secured else 0)
    cohort = CohortGrid(
        build_clients(assembly, real=True), assembly.layout, mean=False, workers=1, updates=True, released=size,
        participants=_participants(assembly, context) if assembly.secured else None,
    )  # fmt: skip
    replies = cohort.send_and_receive([Message(message.content, _client(context), message.metadata.message_type)])
    for _, reason in cohort.observed.dropped:  # which may tell of the data, and stays here
        _LOG.warning("this client contributes nothing: %s", reason)
    if not replies:
        raise ClientFailure("secure aggregation: this node made no upload; its log says why")
    return Message(replies[0].content, reply_to=message)


def _participants(assembly: Assembly, context: Context) -> NodeParticipants:
    if assembly.secured is None:
        raise Refused("secure aggregation: this node's scenario lacks [secagg] enabled = true")
    return NodeParticipants(context, assembly.secured.demands)


def _client(context: Context) -> int:
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int):
        raise Refused("this SuperNode has no partition-id; start it with --node-config 'partition-id=0' (1, 2, ...)")
    return partition
