"""The only module that touches Flower's private parts; also the conversions between its records and ours.

Checked against flwr 1.41: a Message can be built only where ``TaskIdentity`` is set, which Flower does in its own processes.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import math
import os
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

for _name in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np  # noqa: E402 - flwr reads its environment when imported
import numpy.lib.format as npy  # noqa: E402
import numpy.typing as npt  # noqa: E402
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.common.constant import SType  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.serverapp.strategy import Strategy  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedcore.errors import Refused, RoundFailed  # noqa: E402
from fedcore.models import ParameterLayout  # noqa: E402
from fedcore.privacy.exposure import ClientId  # noqa: E402
from fedcore.privacy.release import Release  # noqa: E402

__all__ = [
    "METRICS",
    "NOBODY",
    "Answer",
    "ClientGrid",
    "Facts",
    "Gathering",
    "Roster",
    "answer_all",
    "assume_identity",
    "check_addressees",
    "check_one_content",
    "decode_state",
    "encode_state",
    "facts_of",
    "from_record",
    "kind_of",
    "only_record",
    "seed_strategies",
    "to_nobody",
    "to_record",
]  # fmt: skip

# Flower logs every round at INFO; what matters of it is in our metrics and errors.
logging.getLogger("flwr").setLevel(logging.ERROR)

Floats = npt.NDArray[np.float32]
Record = TypeVar("Record", ArrayRecord, ConfigRecord)
_FACTS = "fedcore-facts"
_HEADER = 512  # bytes that hold the header of a stored array
_HEADERS = 1024  # that are remembered
_MAGIC = npy.magic(1, 0)
NOBODY = -1
"""The node of a message about a cohort that happens to be empty."""
METRICS = {MessageType.TRAIN: ("num-examples", "train_loss"), MessageType.EVALUATE: ("num-examples", "accuracy", "loss")}
"""What a client reports to the strategy, by the type of the message that it answers; the strategy weights by the first.

Where anything is private a client reports the first alone: the others are exact numbers about its examples.
"""


def assume_identity() -> None:
    """Let Messages be built in this process; does nothing in a process that Flower started."""
    for name in ("_task_id", "_run_id", "_node_id"):
        if getattr(TaskIdentity, name) is None:
            setattr(TaskIdentity, name, 0)


def seed_strategies(seed: int, round_number: int) -> None:
    """Flower's strategies draw from the global generators of random and numpy; make a round's draws a function of both."""
    word = int(np.random.SeedSequence([seed, round_number, 0x737472]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)


def to_record(layout: ParameterLayout, flat: Floats) -> ArrayRecord:
    """The flat parameters [d] as an ArrayRecord by name."""
    return ArrayRecord({name: to_array(values) for name, values in layout.split(flat).items()})


def from_record(layout: ParameterLayout, record: ArrayRecord) -> Floats:
    """The record's arrays as one flat float32 vector [d]; some strategies return float64.

    Raises:
        Refused: names or shapes are not the model's.
    """
    return layout.join({name: from_array(array) for name, array in record.items()})


def to_array(values: npt.NDArray[Any]) -> Array:
    """What ``Array(values)`` is, written with one copy of the values."""
    values = np.asarray(values, order="C")
    header = _header_of(values.dtype, values.shape)
    return Array(str(values.dtype), values.shape, SType.NUMPY, b"".join((header, values.data)))


def from_array(array: Array) -> npt.NDArray[Any]:
    """What ``array.numpy()`` is, read-only and without a copy where the array is stored as `to_array` stores it."""
    begin = len(_MAGIC) + 2 + int.from_bytes(array.data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    if array.stype != SType.NUMPY or array.data[: len(_MAGIC)] != _MAGIC or begin > _HEADER:
        return array.numpy()
    shape, columns_first, dtype = _read_header(array.data[len(_MAGIC) : begin])
    if columns_first or dtype.hasobject:
        return array.numpy()
    return np.frombuffer(array.data, dtype, math.prod(shape), begin).reshape(shape)


# A model's arrays have the same few headers in every round.
@functools.lru_cache(_HEADERS)
def _header_of(kind: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape})
    return header.getvalue()


@functools.lru_cache(_HEADERS)
def _read_header(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return npy.read_array_header_1_0(io.BytesIO(text))


def only_record(message: Message, kind: type[Record]) -> Record:
    """The one record of its kind in a message of the strategy.

    Raises:
        Refused: there are none or several.
    """
    found = [record for record in message.content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise Refused(f"the strategy's message must hold exactly one {kind.__name__}, it holds {len(found)}")
    return found[0]


def kind_of(message: Message) -> str:
    """What the strategy asks of a client, a key of `METRICS`.

    Raises:
        Refused: neither to train nor to evaluate.
    """
    kind = message.metadata.message_type
    if kind not in METRICS:
        raise Refused(f"clients train and evaluate; the strategy sent a message of type {kind!r}")
    return kind


def to_nobody(arrays: ArrayRecord, config: ConfigRecord) -> Message:
    """The message about a cohort that happens to be empty, which is a round all the same."""
    return Message(RecordDict({"arrays": arrays, "config": config}), NOBODY, MessageType.TRAIN)


def check_addressees(messages: Sequence[Message], nodes: Sequence[int]) -> None:
    """Refuse what cannot be delivered.

    Raises:
        Refused: something that is no message, or a message to a node that does not take part or has one already.
    """
    drawn, seen = frozenset(nodes), set[int]()
    for message in messages:
        if not isinstance(message, Message):
            raise Refused(f"the strategy must give messages, it gave a {type(message).__name__}")
        node = message.metadata.dst_node_id
        if node not in drawn or node in seen:
            raise Refused(
                f"the strategy sent a message to node {node}, which {'has one already' if node in seen else 'was not drawn'}"
            )
        seen.add(node)


def check_one_content(messages: Sequence[Message]) -> None:
    """Refuse messages whose replies cannot be averaged before the strategy sees them.

    Raises:
        Refused: the strategy asks different things of different clients.
    """
    if len({id(message.content) for message in messages}) > 1:
        raise Refused("this strategy sends clients different content, so it needs one reply per client, not their mean")


@dataclass(frozen=True)
class Facts:
    """What a grid observed about the clients behind a reply; rides in the reply beside what the strategy reads.

    ``accuracies``: one per evaluated client with its number of examples. Bytes are lengths of encoded payloads. A sum names
    nobody: ``survivors`` counts contributions where that is public, ``failed`` those whose training gave nothing, ``unclipped`` is
    the noised share of them that needed no clipping, ``histogram`` counts clients by accuracy in bins of equal width. ``secure``:
    what secure aggregation did, one table a sum.
    """

    clients: tuple[int, ...] = ()
    dropped: tuple[tuple[int, str], ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    accuracies: tuple[tuple[int, float, int], ...] = field(default=())
    survivors: int | None = None
    unclipped: float | None = None
    failed: int | None = None
    histogram: tuple[int, ...] = ()
    secure: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def merge(cls, parts: Iterable[Facts]) -> Facts:
        """The facts of several replies together, by client; of several sums the totals, and the mean of ``unclipped``."""
        found = list(parts)
        survivors = [facts.survivors for facts in found if facts.survivors is not None]
        unclipped = [facts.unclipped for facts in found if facts.unclipped is not None]
        failed = [facts.failed for facts in found if facts.failed is not None]
        histograms = [facts.histogram for facts in found if facts.histogram]
        return cls(
            tuple(sorted(client for facts in found for client in facts.clients)),
            tuple(sorted(entry for facts in found for entry in facts.dropped)),
            sum(facts.bytes_up for facts in found),
            sum(facts.bytes_down for facts in found),
            tuple(sorted(entry for facts in found for entry in facts.accuracies)),
            sum(survivors) if survivors else None,
            sum(unclipped) / len(unclipped) if unclipped else None,
            sum(failed) if failed else None,
            tuple(map(sum, zip(*histograms, strict=True))),
            tuple(one for facts in found for one in facts.secure),
        )


@dataclass(frozen=True)
class Answer:
    """A usable reply to ``message``: arrays where it trained, `METRICS`, and what the grid observed."""

    message: Message
    arrays: ArrayRecord | None
    metrics: Mapping[str, float]
    facts: Facts


def answer_all(answers: Sequence[Answer], cohort: Facts) -> list[Message]:
    """The replies as Flower's strategies want them: at most one ArrayRecord, exactly one MetricRecord; and our facts.

    The facts of the ``cohort`` as a whole, such as who was dropped, ride with the first reply.

    Raises:
        RoundFailed: all clients were dropped.
    """
    if cohort.dropped and not answers:
        client, reason = cohort.dropped[0]
        raise RoundFailed(f"all {len(cohort.dropped)} clients of the round failed; client {client}: {reason}")
    replies = []
    for i, answer in enumerate(answers):
        facts = Facts.merge([answer.facts, *([] if i else [cohort])])
        content = RecordDict(
            {"metrics": MetricRecord(dict(answer.metrics)), _FACTS: ConfigRecord({"json": json.dumps(vars(facts))})}
        )
        if answer.arrays is not None:
            content["arrays"] = answer.arrays
        replies.append(Message(content, reply_to=answer.message))
    return replies


def facts_of(reply: Message) -> Facts:
    """The facts in a reply; empty where a foreign client sent none.

    Raises:
        Refused: facts that do not parse, from a client that is not ours.
    """
    record = reply.content.config_records.get(_FACTS)
    if record is None:
        return Facts()
    try:
        table = json.loads(str(record["json"]))
        return Facts(
            tuple(int(client) for client in table["clients"]),
            tuple((int(client), str(reason)) for client, reason in table["dropped"]),
            int(table["bytes_up"]),
            int(table["bytes_down"]),
            tuple((int(client), float(accuracy), int(examples)) for client, accuracy, examples in table["accuracies"]),
            None if table.get("survivors") is None else int(table["survivors"]),
            None if table.get("unclipped") is None else float(table["unclipped"]),
            None if table.get("failed") is None else int(table["failed"]),
            tuple(int(count) for count in table.get("histogram", ())),
            tuple(dict(one) for one in table.get("secure", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"node {reply.metadata.src_node_id} sent facts that cannot be read") from error


class Gathering(Protocol):
    """A grid whose clients come by themselves: nobody draws them, and they are charged when it is known who came.

    Clients have names, which are the same in all runs, and numbers, which are a run's own: ``numbers`` keeps those of names.
    ``pay`` is told the round, the names of the clients that are about to be given protected work, and how it is summed; where it
    raises, none is given. A grid that has no ``pay`` gives no such work.
    """

    numbers: Callable[[Sequence[str]], Sequence[int]] | None
    pay: Callable[[int, Sequence[str], Release | None], None] | None

    def gather(self, kind: str, round_number: int, resting: Collection[ClientId]) -> tuple[int, ...]:
        """Wait for clients of a round of training or evaluation; the numbers of those chosen, none of them ``resting`` (by name).

        Raises:
            RoundFailed: too few came.
            BudgetSpent: too few of those that may still take part.
        """
        ...


class ClientGrid(Grid):
    """A Grid with the calls that Flower's own strategies make: ``get_node_ids`` and ``send_and_receive``; it refuses the others."""

    @property
    def gathering(self) -> Gathering | None:
        """What gathers the clients; None where the coordinator draws them."""
        return None

    def set_run(self, run: Run) -> None:
        """Our grids are told nothing of Flower's runs."""

    @property
    def run(self) -> Run:
        """Not available."""
        return _send_and_receive_only()

    def create_message(self, *_: object, **__: object) -> Message:
        """Not available: build a Message itself."""
        return _send_and_receive_only()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: ARG002 - the name is Flower's
        """Not available: what comes back must be screened."""
        return _send_and_receive_only()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: ARG002 - the name is Flower's
        """Not available: what comes back must be screened."""
        return _send_and_receive_only()


class Roster(ClientGrid):
    """What a strategy sees of a grid whose clients are protected: who was drawn. It asks them by the messages it returns."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def get_node_ids(self) -> Iterable[int]:
        """The clients drawn."""
        return list(self._grid.get_node_ids())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        """Not available: what is not charged must not be asked."""
        raise Refused("with [privacy] or [secagg] a strategy asks clients by the messages it returns; it cannot send its own")


def _send_and_receive_only() -> NoReturn:
    raise Refused("a grid of clients offers get_node_ids and send_and_receive only; the strategy uses another call of Grid")


def encode_state(strategy: Strategy) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """A strategy's state as JSON text and the arrays it refers to by key; no pickle.

    Either what its own ``state_dict()`` gives, or all its attributes except functions.

    Raises:
        Refused: a value that is no scalar, array, ArrayRecord, dict or list; the line names the attribute.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    own = getattr(strategy, "state_dict", None)
    state = own() if callable(own) else {k: v for k, v in vars(strategy).items() if not callable(v)}
    return json.dumps(_encode(state, type(strategy).__name__, arrays)), arrays


def decode_state(strategy: Strategy, text: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Put the state of `encode_state` into a freshly built strategy of the same class."""
    state = _decode(json.loads(text), arrays)
    load = getattr(strategy, "load_state_dict", None)
    if callable(load):
        load(state)
    else:
        vars(strategy).update(state)


def _encode(value: Any, where: str, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    if isinstance(value, ArrayRecord):
        return {"record": {name: _encode(array.numpy(), f"{where}.{name}", arrays) for name, array in value.items()}}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        key = f"a{len(arrays)}"
        arrays[key] = np.ascontiguousarray(value)
        return {"array": key}
    if isinstance(value, np.generic) and value.dtype.kind in "fiub":
        return {"scalar": value.item(), "dtype": value.dtype.str}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{where}[{i}]", arrays) for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, f"{where}.{key}", arrays) for key, item in value.items()}}
    raise Refused(
        f"strategy state {where} is a {type(value).__name__}, which a checkpoint cannot hold; "
        "give the strategy state_dict() and load_state_dict() made of numbers, arrays, dicts and lists"
    )


def _decode(value: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "record":
        return ArrayRecord({name: Array(_decode(item, arrays)) for name, item in content.items()})
    if kind == "array":
        return arrays[content]
    if kind == "scalar":
        return np.dtype(value["dtype"]).type(content)
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {key: _decode(item, arrays) for key, item in content.items()}
    items = [_decode(item, arrays) for item in content]
    return items if kind == "list" else tuple(items)
