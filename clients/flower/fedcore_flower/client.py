"""The ClientApp: one client, whose data is the part of its SuperNode's partition-id.

Flower starts a process for every message, which builds data and model anew from the scenario. Scenario, seed and so the partition
are the same on every node, and a node uses its own part only; the README says what changes where nodes hold data of their own.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.errors import Refused
from fedcore.flower import only_record
from fedcore.grids.cohort import CohortGrid
from fedcore.grids.superlink import identity_content
from fedcore.training.client import RoundTask
from fedcore_flower.scenario import load_scenario

__all__ = ["app"]

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    return Message(identity_content(_client(context)), reply_to=message)


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Do what a simulated client does, as a cohort of one: receive Q(master), train or evaluate, reply update and metrics."""
    assembly = assemble(load_scenario(context))
    task = RoundTask.from_table(only_record(message, ConfigRecord))
    assembly.protection.check_task(task, trains=message.metadata.message_type == MessageType.TRAIN)
    clients, released = build_clients(assembly, real=True), assembly.protection.released
    cohort = CohortGrid(clients, assembly.layout, mean=False, workers=1, updates=True, released=released)
    (reply,) = cohort.send_and_receive([Message(message.content, _client(context), message.metadata.message_type)])
    return Message(reply.content, reply_to=message)


def _client(context: Context) -> int:
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int):
        raise Refused("this SuperNode has no partition-id; start it with --node-config 'partition-id=0' (1, 2, ...)")
    return partition
