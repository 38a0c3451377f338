"""CohortGrid: simulated clients, trained by worker processes of this machine (or on its accelerator)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedcore.errors import Refused, RoundFailed
from fedcore.flower import Facts, assume_identity, from_record, reply_content, to_record
from fedcore.grids.pool import Doubles, WorkerPool
from fedcore.models import ParameterLayout
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.training.client import SCORE_BYTES, Clients, RoundTask

__all__ = ["CohortGrid"]

_UNITS = 32  # work units of a round: a constant, so that the order of summation does not depend on the number of workers
Record = TypeVar("Record", ArrayRecord, ConfigRecord)


@dataclass(frozen=True)
class _Job:
    """A work unit: some clients that train, or that evaluate."""

    kind: str
    clients: tuple[int, ...]
    task: RoundTask


@dataclass(frozen=True)
class _Sum:
    """What clients add up to, beside the vector of example-weighted updates: sums over the examples of usable clients."""

    facts: Facts
    examples: int
    loss: float
    correct: int = 0

    @classmethod
    def of(cls, parts: Sequence[_Sum]) -> _Sum:
        """The sum of sums, in their order."""
        facts = Facts.merge(part.facts for part in parts)
        return cls(facts, sum(p.examples for p in parts), sum(p.loss for p in parts), sum(p.correct for p in parts))


class CohortGrid(Grid):
    """Simulated clients behind Flower's Grid interface; node ids are client ids.

    Hands the strategy one reply that is the example-weighted mean (``mean``), with memory that does not grow with the cohort;
    else one reply per client. A strategy hands in the fp32 master and gets back master + (local - received), where
    received = Q(master) is what a device would have decoded. ``nodes`` are the clients drawn for a round, ``clients_done``
    counts those whose work is finished.
    """

    def __init__(self, clients: Clients, layout: ParameterLayout, *, mean: bool, workers: int) -> None:
        assume_identity()
        self.nodes: Sequence[int] = range(len(clients.data.clients))
        self.clients_done = 0
        self._mean, self._layout, self._clients = mean, layout, clients
        self._pool = WorkerPool(workers, self._work, layout.size, layout.size)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def get_node_ids(self) -> Iterable[int]:
        """The clients that take part."""
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Let each message's client do its work. Only good replies come back; failures are facts of the first of them.

        Raises:
            RoundFailed: no client gave a usable reply, a worker died, or ``timeout`` seconds passed.
            Refused: messages that a mean cannot be taken over.
        """
        self.clients_done = 0
        groups: dict[int, list[Message]] = {}
        for message in messages:
            groups.setdefault(id(message.content), []).append(message)
        if self._mean and len(groups) > 1:
            raise Refused("this strategy sends clients different content, so it needs one reply per client, not their mean")
        return [reply for group in groups.values() for reply in self._answer(sorted(group, key=_node), timeout)]

    def _answer(self, messages: Sequence[Message], timeout: float | None) -> list[Message]:
        kind = messages[0].metadata.message_type
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            raise Refused(f"simulated clients train and evaluate; the strategy sent a message of type {kind!r}")
        master = from_record(self._layout, _only(messages[0], ArrayRecord))
        task = RoundTask.from_table(_only(messages[0], ConfigRecord))
        blob = encode_model(self._layout.wire_tensors(master), task.ranges)
        self._pool.shared[:] = self._layout.join(decode_model(blob).tensors)

        clients = [_node(message) for message in messages]
        units = _units(clients) if self._mean else [(client,) for client in clients]
        replies: list[tuple[Message, ArrayRecord | None, _Sum]] = []
        dropped: list[Facts] = []
        for message, total, vector in self._sums(messages, [_Job(kind, unit, task) for unit in units], timeout):
            if not total.examples:
                dropped.append(total.facts)
                continue
            local = to_record(self._layout, (master + vector / total.examples).astype(np.float32))
            replies.append((message, local if kind == MessageType.TRAIN else None, total))
        if not replies:
            raise _all_failed(Facts.merge(dropped))
        # What concerns the cohort as a whole rides with the first reply.
        cohort = Facts.merge([Facts(bytes_down=len(blob) * len(messages)), *dropped])
        return [
            Message(
                reply_content(arrays, _metrics(kind, total), Facts.merge([total.facts, *([] if i else [cohort])])), reply_to=message
            )
            for i, (message, arrays, total) in enumerate(replies)
        ]

    def _sums(
        self, messages: Sequence[Message], jobs: Sequence[_Job], timeout: float | None
    ) -> Iterator[tuple[Message, _Sum, Doubles]]:
        """Per reply the message it answers, its sums and its vector: one in all for a mean, else one per job."""
        results = self._pool.map(jobs, timeout)
        if not self._mean:
            for message, (part, vector) in zip(messages, results, strict=True):
                self.clients_done += 1
                yield message, part, vector
            return
        total, parts = np.zeros(self._layout.size), []
        for job, (part, vector) in zip(jobs, results, strict=True):
            total += vector
            parts.append(part)
            self.clients_done += len(job.clients)
        yield messages[0], _Sum.of(parts), total

    def _work(self, job: _Job, shared: Doubles, out: Doubles) -> _Sum:
        """Runs in a worker."""
        torch.set_num_threads(1)
        out.fill(0)
        values = torch.from_numpy(shared).float()
        if job.kind == MessageType.EVALUATE:
            scores = list(self._clients.evaluate(values, job.clients, job.task))
            accuracies = tuple((client, score.accuracy, score.examples) for client, score in scores)
            facts = Facts(job.clients, bytes_up=SCORE_BYTES * len(scores), accuracies=accuracies)
            found = [score for _, score in scores]
            return _Sum(facts, sum(s.examples for s in found), sum(s.loss_sum for s in found), sum(s.correct for s in found))
        weighted = torch.from_numpy(out)
        good, dropped, examples, loss, up = [], [], 0, 0.0, 0
        for reply in self._clients.train(values, job.clients, job.task):
            up += reply.bytes_up
            if reply.update is None:
                dropped.append((reply.client, reply.reason))
                continue
            weighted.add_(reply.update.cpu(), alpha=reply.examples)
            examples += reply.examples
            loss += reply.loss * reply.examples
            good.append(reply.client)
        return _Sum(Facts(tuple(good), tuple(dropped), up), examples, loss)

    # What Flower's own strategies never call.

    def set_run(self, run: Run) -> None:
        """A simulated cohort belongs to no Flower run."""

    @property
    def run(self) -> Run:
        """Not available: a simulated cohort belongs to no Flower run."""
        return _send_and_receive_only()

    def create_message(self, *_: object, **__: object) -> Message:
        """Not available: build a Message itself."""
        return _send_and_receive_only()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: ARG002 - the name is Flower's
        """Not available: simulated clients answer at once."""
        return _send_and_receive_only()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: ARG002 - the name is Flower's
        """Not available: simulated clients answer at once."""
        return _send_and_receive_only()


def _send_and_receive_only() -> NoReturn:
    raise Refused("a simulated cohort offers get_node_ids and send_and_receive only; the strategy uses another call of Grid")


def _node(message: Message) -> int:
    return message.metadata.dst_node_id


def _only(message: Message, kind: type[Record]) -> Record:
    found = [record for record in message.content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise Refused(f"the strategy's message must hold exactly one {kind.__name__}, it holds {len(found)}")
    return found[0]


def _units(clients: Sequence[int]) -> list[tuple[int, ...]]:
    """At most `_UNITS` runs of consecutive clients, of sizes that differ by at most one."""
    ends = [round(i * len(clients) / min(_UNITS, len(clients))) for i in range(min(_UNITS, len(clients)) + 1)]
    return [tuple(clients[start:end]) for start, end in pairwise(ends)]


def _metrics(kind: str, total: _Sum) -> dict[str, float]:
    mean_loss = total.loss / total.examples
    if kind == MessageType.TRAIN:
        return {"num-examples": total.examples, "train_loss": mean_loss}
    return {"num-examples": total.examples, "accuracy": total.correct / total.examples, "loss": mean_loss}


def _all_failed(facts: Facts) -> RoundFailed:
    client, reason = facts.dropped[0]
    return RoundFailed(f"all {len(facts.dropped)} clients of the round failed; client {client}: {reason}")
