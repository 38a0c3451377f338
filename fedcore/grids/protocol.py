"""Secure aggregation inside Flower messages: a query that asks for a check-in, and work that carries an invitation.

What a client answers is its check-in, or its masked contribution; nothing of it is a metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedcore.errors import ClientFailure, Refused
from fedcore.secagg.participant import Visit

__all__ = [
    "Invited", "ask_check_in", "check_in_of", "check_in_reply", "invitation_of", "invite", "upload_of", "upload_reply",
    "visit_of", "without_protocol",
]  # fmt: skip

_RECORD = "secagg"
_LONGEST = 3.6e6  # milliseconds that a client can have taken


@dataclass(frozen=True)
class Invited:
    """What a client needs beside its work: the visit that it checked in for, and its `Invitation`."""

    visit: Visit
    invitation: bytes


def ask_check_in(work: Message, visit: Visit) -> Message:
    """The query for a node's check-in; it shows the training configuration of the work that will follow."""
    content = RecordDict({**work.content.config_records, _RECORD: ConfigRecord(_fields(visit))})
    return Message(content, work.metadata.dst_node_id, MessageType.QUERY)


def without_protocol(message: Message) -> Message:
    """The message of the strategy inside."""
    content = RecordDict({name: record for name, record in message.content.items() if name != _RECORD})
    return Message(content, message.metadata.dst_node_id, message.metadata.message_type)


def visit_of(message: Message) -> Visit | None:
    """The visit that a message is about; None where it is not one of secure aggregation.

    Raises:
        Refused: its fields cannot be read.
    """
    record = message.content.config_records.get(_RECORD)
    if record is None:
        return None
    try:
        task, epoch, expiry = record["task"], record["epoch"], record["expiry"]
    except KeyError as error:
        raise Refused(f"secure aggregation: the message lacks {error}") from None
    if not (isinstance(task, str) and isinstance(epoch, int) and isinstance(expiry, int)):
        raise Refused("secure aggregation: task, epoch and expiry are a string and two integers")
    return Visit(task, epoch, expiry)


def check_in_reply(message: Message, check_in: bytes) -> Message:
    """The answer to `ask_check_in`."""
    return Message(RecordDict({_RECORD: ConfigRecord({"check-in": check_in})}), reply_to=message)


def check_in_of(reply: Message) -> bytes:
    """The check-in in a reply.

    Raises:
        ClientFailure: there is none.
    """
    return _bytes(reply, "check-in")


def invite(work: Message, visit: Visit, invitation: bytes) -> Message:
    """The message of a strategy with the invitation of the node that it is for."""
    content = RecordDict({**work.content, _RECORD: ConfigRecord({**_fields(visit), "invitation": invitation})})
    return Message(content, work.metadata.dst_node_id, work.metadata.message_type)


def invitation_of(message: Message) -> Invited | None:
    """What `invite` put into a message; None where nothing did."""
    visit = visit_of(message)
    if visit is None:
        return None
    invitation = message.content.config_records[_RECORD].get("invitation")
    if not isinstance(invitation, bytes):
        raise Refused("secure aggregation: the message holds no invitation")
    return Invited(visit, invitation)


def upload_reply(message: Message, upload: bytes, milliseconds: float) -> Message:
    """A client's masked contribution, and how long its cryptography took, which does not depend on its data."""
    content = RecordDict({
        "upload": ArrayRecord({"upload": Array(np.frombuffer(upload, np.uint8))}),
        _RECORD: ConfigRecord({"milliseconds": milliseconds}),
    })  # fmt: skip
    return Message(content, reply_to=message)


def upload_of(reply: Message) -> tuple[bytes, float]:
    """The upload in a reply, and the milliseconds that the client says it took.

    Raises:
        ClientFailure: there is none.
    """
    try:
        values = reply.content.array_records["upload"]["upload"].numpy()
        milliseconds = reply.content.config_records[_RECORD]["milliseconds"]
    except Exception as error:  # a client may send anything
        raise ClientFailure("its reply holds no upload") from error
    if values.dtype != np.uint8 or not isinstance(milliseconds, float):
        raise ClientFailure("its reply holds no upload")
    return values.tobytes(), milliseconds if 0 <= milliseconds < _LONGEST else _LONGEST


def _fields(visit: Visit) -> dict[str, Any]:
    return {"task": visit.task, "epoch": visit.epoch, "expiry": visit.expiry}


def _bytes(reply: Message, name: str) -> bytes:
    record = reply.content.config_records.get(_RECORD, ConfigRecord())
    value = record.get(name)
    if not isinstance(value, bytes):
        raise ClientFailure(f"its reply holds no {name}")
    return value
