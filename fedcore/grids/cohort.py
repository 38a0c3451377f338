"""CohortGrid: simulated clients, trained by worker processes of this machine (or on its accelerator), or of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType

from fedcore.errors import Refused
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
    from_record,
    kind_of,
    only_record,
    to_record,
)
from fedcore.grids.pool import Doubles, WorkerPool
from fedcore.grids.protocol import check_in_reply, invitation_of, upload_reply, visit_of, without_protocol
from fedcore.grids.publish import CONTRIBUTION, publish
from fedcore.grids.ray_pool import RayPool
from fedcore.grids.work import Job, Sum, Work
from fedcore.models import ParameterLayout
from fedcore.native.cohort import units_of
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.secagg.participant import Participants, hash_work
from fedcore.training.client import CHECK_IN, Clients, RoundTask

__all__ = ["Begun", "CohortGrid", "Trained"]


@dataclass(frozen=True)
class Begun:
    """``clients`` that train from the parameters ``start`` [d], which they received with ``task``."""

    start: npt.NDArray[np.float32]
    task: RoundTask
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """What became of a `Begun`: ``weighted`` [d] is the sum of examples x update over the clients in ``facts``, ``loss`` that over
    their ``examples``."""

    facts: Facts
    weighted: Doubles
    examples: int
    loss: float


class CohortGrid(ClientGrid):
    """Simulated clients behind Flower's Grid interface; node ids are client ids.

    Hands the strategy one reply that is the example-weighted mean (``mean``), with memory that does not grow with the cohort;
    else one reply per client. A strategy hands in the fp32 master and gets back master + (local - received), where
    received = Q(master) is what a device would have decoded. ``nodes`` are the clients drawn for a round, ``clients_done``
    counts those whose work is finished, ``place`` says for the user where. With ``updates`` the arrays in a reply are
    local - received alone, or a client's contribution where a task has a release.

    A sum of up to ``released`` numbers has one reply, which says nothing of who took part; ``observed`` does, to the operator.
    ``participants`` take part in secure aggregation: asked by `grids.protocol`, clients check in, and reply masked contributions.
    With ``versions`` clients may train from that many different models at once (`train`). ``workers`` are processes of this
    machine, or "ray": those of the cluster that it belongs to.
    """

    blind = False

    def __init__(
        self, clients: Clients, layout: ParameterLayout, *, mean: bool, workers: int | Literal["ray"], updates: bool = False,
        released: int = 0, participants: Participants | None = None, versions: int = 1,
    ) -> None:  # fmt: skip
        assume_identity()
        self._participants = participants
        self.nodes: Sequence[int] = range(len(clients.data.clients))
        self.observed, self.simulated = Facts(), not clients.real
        self.mean, self._updates, self._layout, self._clients = mean, updates, layout, clients
        self._size = max(layout.size, released)
        self._versions, self._done = versions, 0
        self._board = clients.board(len(clients.data.clients), 1 if workers == "ray" else workers)
        work = Work(clients, layout, participants, None if workers == "ray" else self._board)
        self._pool: WorkerPool | RayPool
        if workers == "ray":
            self._pool = RayPool(work, versions * layout.size, self._size)
        else:
            self._pool = WorkerPool(workers, work, versions * layout.size, self._size)
        self.place = self._pool.place

    @property
    def clients_done(self) -> int:
        """Clients whose work in this round is finished."""
        return self._done + self._board.finished

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def get_node_ids(self) -> Iterable[int]:
        """The clients that take part."""
        return list(self.nodes)

    def client_of(self, node: int) -> int:
        """The client behind a node."""
        return node

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Let each message's client do its work. Only good replies come back; failures are facts of the first of them.

        Raises:
            RoundFailed: no client gave a usable reply, a worker died, or ``timeout`` seconds passed.
            Refused: messages that a mean cannot be taken over.
        """
        self._done, self.observed = 0, Facts()
        self._board.begin()
        sent = list(messages)
        check_addressees(sent, self.nodes or [NOBODY])
        if sent and visit_of(sent[0]):
            return self._in_protocol(sent, timeout)
        if self.mean:
            check_one_content(sent)
        groups: dict[int, list[Message]] = {}
        for message in sent:
            groups.setdefault(id(message.content), []).append(message)
        found = [self._answer(sorted(group, key=_node), timeout) for group in groups.values()]
        return answer_all([answer for answers, _ in found for answer in answers], Facts.merge(facts for _, facts in found))

    def train(self, begun: Sequence[Begun], timeout: float | None = None) -> list[Trained]:
        """Train clients from the models that each was given, in parallel over all of them; one result for each ``begun``.

        Raises:
            RoundFailed: a worker died, or ``timeout`` seconds passed.
        """
        self._done, found = 0, []
        self._board.begin()
        for first in range(0, len(begun), self._versions):
            found += self._train_some(begun[first : first + self._versions], timeout)
        return found

    def _train_some(self, begun: Sequence[Begun], timeout: float | None) -> list[Trained]:
        """As many as the workers see parameters of."""
        size, chunk, jobs = self._layout.size, self._clients.trainer.chunk, []
        for slot, one in enumerate(begun):
            self._pool.shared[slot * size : (slot + 1) * size] = one.start
            groups = [one.clients[first : first + chunk] for first in range(0, len(one.clients), chunk)]
            jobs += [Job(MessageType.TRAIN, group, one.task, slot) for group in groups]
        vectors = [np.zeros(size) for _ in begun]
        parts: list[list[Sum]] = [[] for _ in begun]
        for job, (part, vector) in zip(jobs, self._pool.map(jobs, timeout), strict=True):
            vectors[job.slot] += vector[:size]
            parts[job.slot].append(part)
            self._done += len(job.clients)
        totals = map(Sum.of, parts)
        return [Trained(one.facts, vector, one.examples, one.loss) for one, vector in zip(totals, vectors, strict=True)]

    def _answer(self, messages: Sequence[Message], timeout: float | None) -> tuple[list[Answer], Facts]:
        """The usable answers to messages of one content, and what concerns them all."""
        kind, task = kind_of(messages[0]), _task(messages[0])
        master, blob = self._receive(messages[0], task)
        clients = [node for message in messages if (node := _node(message)) != NOBODY]
        units = _units(clients) if self.mean else [(client,) for client in clients]
        answers: list[Answer] = []
        dropped: list[Facts] = []
        for message, total, vector in self._sums(messages, [Job(kind, unit, task) for unit in units], timeout):
            if task.release and not self._updates:
                self.observed = Facts.merge([self.observed, total.facts])
                summed, survivors = vector[: task.release.size], len(total.facts.clients)
                answers.append(publish(message, self._layout, task, summed, survivors, self._clients.noise(task)))
                continue
            if not total.examples:
                dropped.append(total.facts)
                continue
            arrays = self._arrays(task, master, vector, total.examples) if kind == MessageType.TRAIN else None
            answers.append(Answer(message, arrays, _metrics(kind, total, private=task.private), total.facts))
        asked = task.release.cohort if task.release else len(messages)
        return answers, Facts.merge([Facts(bytes_down=len(blob) * asked), *dropped])

    def _receive(self, message: Message, task: RoundTask) -> tuple[npt.NDArray[np.float32], bytes]:
        """The master in a message, and the encoded model that clients receive, whose values the workers see from now on."""
        master = from_record(self._layout, only_record(message, ArrayRecord))
        blob = encode_model(self._layout.wire_tensors(master), task.ranges)
        self._pool.shared[: self._layout.size] = self._layout.join(decode_model(blob).tensors)
        return master, blob

    def _in_protocol(self, messages: Sequence[Message], timeout: float | None) -> list[Message]:
        """Check-ins, or masked contributions; a client that has none to give does not reply."""
        if self._participants is None:
            raise Refused("these clients do not take part in secure aggregation: the scenario lacks [secagg] enabled = true")
        task = _task(messages[0])
        by_client = {_node(message): message for message in messages}
        if messages[0].metadata.message_type == MessageType.QUERY:
            asked = [(client, visit_of(message)) for client, message in by_client.items()]
            return [
                check_in_reply(by_client[client], self._participants.check_in(client, visit))
                for client, visit in asked
                if visit and self._clients.vanishes(client, task.round_number) != CHECK_IN
            ]
        _, blob = self._receive(messages[0], task)
        invited = {client: found for client, message in by_client.items() if (found := invitation_of(message))}
        kind, work_hash = kind_of(messages[0]), hash_work(blob, _configuration(messages[0]))
        jobs = [
            Job(kind, unit, task, 0, {client: invited[client] for client in unit}, work_hash) for unit in _units(sorted(invited))
        ]  # fmt: skip
        parts = []
        for job, (part, _) in zip(jobs, self._pool.map(jobs, timeout), strict=True):
            parts.append(part)
            self._done += len(job.clients)
        total = Sum.of(parts)
        self.observed = total.facts
        return [upload_reply(by_client[client], upload, taken) for client, upload, taken in total.uploads]

    def _arrays(self, task: RoundTask, master: npt.NDArray[np.float32], vector: Doubles, examples: int) -> ArrayRecord:
        """What a reply holds: the local model, or what the clients' own reply to a grid of a coordinator elsewhere holds."""
        if task.release:
            return ArrayRecord({CONTRIBUTION: Array(vector[: task.release.size])})
        update = vector[: self._layout.size] / examples
        return to_record(self._layout, (update if self._updates else master + update).astype(np.float32))

    def _sums(
        self, messages: Sequence[Message], jobs: Sequence[Job], timeout: float | None
    ) -> Iterator[tuple[Message, Sum, Doubles]]:
        """Per reply the message it answers, its sums and its vector: one in all for a mean, else one per job."""
        if self.mean and jobs and jobs[0].kind == MessageType.TRAIN and self._clients.adds_up(jobs[0].task):
            yield messages[0], self._shared_out(jobs, timeout), self._board.total
            return
        results = self._pool.map(jobs, timeout)
        if not self.mean:
            for message, (part, vector) in zip(messages, results, strict=True):
                self._done += 1
                yield message, part, vector
            return
        total, parts = np.zeros(self._size), []
        for job, (part, vector) in zip(jobs, results, strict=True):
            total += vector
            parts.append(part)
            self._done += len(job.clients)
        yield messages[0], Sum.of(parts), total

    def _shared_out(self, jobs: Sequence[Job], timeout: float | None) -> Sum:
        """The sums of clients that the engine adds up; their vector is the board's."""
        task, clients = jobs[0].task, tuple(client for job in jobs for client in job.clients)
        if isinstance(self._pool, WorkerPool):  # whose workers take units from the board themselves
            for _ in self._pool.map([Job(jobs[0].kind, clients, task, whole=True)] * self._pool.workers, timeout):
                pass
        else:
            self._fill_board(_units(self._clients.arriving(clients, task)), task, timeout)
        added = self._clients.added(clients, task, self._board)
        facts = Facts(added.clients, tuple((reply.client, reply.reason) for reply in added.others), added.bytes_up)
        return Sum(facts, int(added.examples.sum()), float((added.losses * added.examples).sum()))

    def _fill_board(self, units: Sequence[tuple[int, ...]], task: RoundTask, timeout: float | None) -> None:
        """What workers that share the board would leave on it, from units that are added up elsewhere."""
        first, jobs = 0, [Job(MessageType.TRAIN, unit, task, whole=True) for unit in units]
        for job, (added, vector) in zip(jobs, self._pool.map(jobs, timeout), strict=True):
            last = first + len(job.clients)
            self._board.total += vector[: self._layout.size]
            self._board.norms[first:last], self._board.losses[first:last] = added.norms, added.losses
            self._done += len(job.clients)
            first = last


def _task(message: Message) -> RoundTask:
    return RoundTask.from_table(_configuration(message))


def _configuration(message: Message) -> ConfigRecord:
    """The training configuration of a message, beside which one of secure aggregation may lie."""
    return only_record(without_protocol(message), ConfigRecord)


def _node(message: Message) -> int:
    return message.metadata.dst_node_id


def _units(clients: Sequence[int]) -> list[tuple[int, ...]]:
    """At most 32 runs of consecutive clients, of sizes that differ by at most one."""
    return [tuple(clients[start:end]) for start, end in pairwise([0, *units_of(len(clients))])]


def _metrics(kind: str, total: Sum, *, private: bool) -> dict[str, float]:
    sums = [] if private else [total.loss] if kind == MessageType.TRAIN else [total.correct, total.loss]
    return dict(zip(METRICS[kind], [total.examples, *(value / total.examples for value in sums)], strict=not private))
