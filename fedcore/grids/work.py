"""What a worker does with a unit of clients, wherever the worker runs: train or evaluate them, and add up what they send."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import MessageType

from fedcore.errors import Refused, RoundFailed
from fedcore.flower import Facts
from fedcore.grids.pool import Doubles
from fedcore.grids.protocol import Invited
from fedcore.grids.travel import Luggage, pack
from fedcore.models import ParameterLayout
from fedcore.native.cohort import Board
from fedcore.secagg.participant import Accepted, Participants
from fedcore.secagg.sums import ScoreSum
from fedcore.training.client import SCORE_BYTES, Clients, RoundTask

__all__ = ["Added", "Job", "Sum", "Work"]


@dataclass(frozen=True)
class Job:
    """A work unit: some clients that train, or that evaluate; masked, where they have invitations to a plan for this work.

    ``slot``: which of the parameters that the workers see they begin with. With ``whole`` the engine adds the clients up itself:
    on the board that workers share, each of which has this same job, or as a unit of its own.
    """

    kind: str
    clients: tuple[int, ...]
    task: RoundTask
    slot: int = 0
    invited: Mapping[int, Invited] = field(default_factory=dict)
    work_hash: bytes = b""
    whole: bool = False


@dataclass(frozen=True)
class Sum:
    """What clients add up to, beside the vector of example-weighted updates: sums over the examples of usable clients.

    ``uploads``: by client its masked contribution, and the milliseconds of its cryptography.
    """

    facts: Facts
    examples: int
    loss: float
    correct: int = 0
    uploads: tuple[tuple[int, bytes, float], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Sum]) -> Sum:
        """The sum of sums, in their order."""
        facts = Facts.merge(part.facts for part in parts)
        uploads = tuple(upload for part in parts for upload in part.uploads)
        return cls(facts, sum(p.examples for p in parts), sum(p.loss for p in parts), sum(p.correct for p in parts), uploads)


@dataclass(frozen=True)
class Added:
    """Of the clients of a unit that the engine added up: what `Board` holds of them."""

    norms: Doubles
    losses: Doubles


class Work:
    """The handler of a pool: the clients, and what their sums are made of.

    ``board``: what workers of this machine share; without one (elsewhere) a unit is added up alone.
    """

    def __init__(
        self, clients: Clients, layout: ParameterLayout, participants: Participants | None = None, board: Board | None = None
    ) -> None:
        self.clients, self._layout, self._participants, self._board = clients, layout, participants, board
        self._own: Board | None = None

    def packed(self, *, files: bool) -> Callable[[], Work]:
        """What makes this work on another machine; with ``files``, data in mapped files is named instead of copied.

        Raises:
            Refused: clients whose secrets must not leave this process.
        """
        if self._participants is not None:
            raise Refused("the keys of simulated clients do not travel to other processes")
        return _Packed(pack(self.clients, files=files), self._layout)

    def __call__(self, job: Job, shared: Doubles, out: Doubles) -> Sum | Added | None:
        """See `pool.Handler`: a sum and its vector; for a ``whole`` job None with a board, else `Added` and its vector."""
        torch.set_num_threads(1)
        size = self._layout.size
        values = torch.from_numpy(shared[job.slot * size : (job.slot + 1) * size]).float()
        if job.whole:
            return self._add_up(job, values, out)
        out.fill(0)
        if job.kind == MessageType.EVALUATE:
            return self._evaluate(job, values, out)
        return self._train(job, values, out)

    def _add_up(self, job: Job, values: torch.Tensor, out: Doubles) -> Added | None:
        if self._board is not None:
            self.clients.add_up(values, job.clients, job.task, self._board)
            return None
        count = len(job.clients)
        if self._own is None or len(self._own.norms) < count:
            self._own = self.clients.board(count, 1)
        self._own.begin()
        self.clients.add_up(values, job.clients, job.task, self._own, one_unit=True)
        out.fill(0)
        out[: self._layout.size] = self._own.total
        return Added(self._own.norms[:count].copy(), self._own.losses[:count].copy())

    def _train(self, job: Job, values: torch.Tensor, out: Doubles) -> Sum:
        weighted, release = torch.from_numpy(out), job.task.release
        accepted, dropped = self._accept(job)
        good, examples, loss, up = [], 0, 0.0, 0
        uploads = []
        for reply in self.clients.train(values, list(accepted) if job.invited else job.clients, job.task):
            up += reply.bytes_up
            if reply.reason:
                dropped.append((reply.client, reply.reason))
            if release and reply.contribution is not None:
                if not job.invited:
                    out[: release.size] += release.accept(reply.contribution)
                else:
                    uploads.append(_mask(reply.client, accepted[reply.client], reply.contribution))
                good.append(reply.client)
                examples += 1
                continue
            if reply.update is None:
                continue
            good.append(reply.client)
            weighted[: self._layout.size].add_(reply.update.cpu(), alpha=reply.examples)
            examples += reply.examples
            loss += reply.loss * reply.examples
        return Sum(Facts(tuple(good), tuple(dropped), up), examples, loss, uploads=tuple(uploads))

    def _evaluate(self, job: Job, values: torch.Tensor, out: Doubles) -> Sum:
        """The scores of a unit's clients: in the clear, or as a contribution each."""
        release = job.task.release
        accepted, dropped = self._accept(job)
        clients = [client for client in job.clients if self.clients.arrives(client, job.task.round_number)]
        clients = [client for client in clients if not job.invited or client in accepted]
        found = list(self.clients.evaluate(values, clients, job.task))
        failed = [(client, reason) for client, _, reason in found if reason]
        scores = [(client, score) for client, score, _ in found]
        if isinstance(release, ScoreSum):
            sent = [
                (client, release.contribution(score.examples, score.correct, score.loss_sum)) for client, score in scores
            ]  # fmt: skip
            if not job.invited:
                for _, contribution in sent:
                    out[: release.size] += release.accept(contribution)
                facts = Facts(tuple(clients), tuple(failed), bytes_up=release.bytes * len(clients))
                return Sum(facts, len(clients), 0.0)
            uploads = tuple(_mask(client, accepted[client], contribution) for client, contribution in sent)
            return Sum(Facts(tuple(clients), (*dropped, *failed)), len(uploads), 0.0, uploads=uploads)
        good = [(client, score) for client, score, reason in found if not reason]
        accuracies = tuple((client, score.accuracy, score.examples) for client, score in good)
        facts = Facts(tuple(client for client, _ in good), tuple(failed), bytes_up=SCORE_BYTES * len(good), accuracies=accuracies)
        sums = [(score.examples, score.loss_sum, score.correct) for _, score in good]
        examples, loss, correct = (sum(column) for column in zip(*sums, strict=True)) if sums else (0, 0.0, 0)
        return Sum(facts, int(examples), float(loss), int(correct))

    def _accept(self, job: Job) -> tuple[dict[int, tuple[Accepted, float]], list[tuple[int, str]]]:
        """The invited clients that accept their plan, with the milliseconds it took, and why the others do not."""
        accepted: dict[int, tuple[Accepted, float]] = {}
        dropped = []
        if job.invited and (self._participants is None or job.task.release is None):
            raise RoundFailed("an invitation without participants")
        for client, invited in job.invited.items():
            if not self.clients.arrives(client, job.task.round_number) or self._participants is None or job.task.release is None:
                continue
            begun = time.perf_counter()
            try:
                found = self._participants.accept(client, invited.visit, invited.invitation, job.work_hash, job.task.release)
            except Refused as error:
                dropped.append((client, str(error)))
                continue
            accepted[client] = found, 1000 * (time.perf_counter() - begun)
        return accepted, dropped


@dataclass(frozen=True)
class _Packed:
    """`Work` on its way."""

    luggage: Luggage
    layout: ParameterLayout

    def __call__(self) -> Work:
        return Work(self.luggage.unpack(), self.layout)


def _mask(client: int, accepted: tuple[Accepted, float], contribution: npt.NDArray[Any]) -> tuple[int, bytes, float]:
    """A client's upload, and the milliseconds that its cryptography took in all."""
    begun, (plan, before) = time.perf_counter(), accepted
    upload = plan.upload(contribution)
    return client, upload, before + 1000 * (time.perf_counter() - begun)
