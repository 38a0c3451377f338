"""Buffered asynchronous rounds: the coordinator's side, which is the same over a virtual fleet and over devices.

A round is a server step. It begins by configuring the present version of the model, goes on while updates arrive, from this version
and older ones, and ends when the buffer is full: the strategy then gets one reply that is the master plus the buffer's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.budget import Budget
from fedcore.coordinator.buffered import Buffer
from fedcore.coordinator.checkpoint import Pending, Progress
from fedcore.coordinator.rounds import Coordinator, DrawnGrid, Metrics, Seen, Work
from fedcore.coordinator.strategy import accepts_mean
from fedcore.errors import Refused
from fedcore.flower import METRICS, Facts, check_one_content, from_record, only_record, to_record
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.state.sqlite import RunStore
from fedcore.training.client import RoundTask

__all__ = ["Arrivals", "BufferedCoordinator", "Collected", "Given"]


@dataclass(frozen=True)
class Given:
    """A version of the model as clients are given it: ``blob`` is what they download, ``start`` [d] what it decodes to, ``config``
    what the strategy asks of them."""

    version: int
    blob: bytes
    start: npt.NDArray[np.float32]
    config: ConfigRecord

    @property
    def task(self) -> RoundTask:
        """What the clients are asked."""
        return RoundTask.from_table(self.config)


@dataclass(frozen=True)
class Collected:
    """A full buffer, whose updates are those of the clients in ``facts``; how much work was ``discarded`` as too stale; and what
    goes on after it. ``virtual_seconds`` have passed on the clock of a virtual fleet."""

    buffer: Buffer
    facts: Facts
    discarded: int
    pending: Pending
    virtual_seconds: float = 0.0


class Arrivals(Protocol):
    """Where updates come from."""

    def collect(self, given: Given, pending: Pending | None, pay: Callable[[Sequence[int]], None]) -> Collected:
        """Give clients the present version while others still train, until the buffer is full.

        ``pending`` is what the last call left, None before the first. ``pay`` is called with the clients that are given this
        version, before anything can be learnt from what they send for it.

        Raises:
            RoundFailed: the buffer cannot be filled.
        """
        ...


class BufferedCoordinator(Coordinator):
    """Runs an assembled scenario with [asynchronous] over ``arrivals``; ``grid`` is shown to the strategy, and evaluates.

    Raises:
        Refused: the strategy looks at replies one by one.
    """

    def __init__(
        self, assembly: Assembly, grid: DrawnGrid, store: RunStore, budget: Budget | None, arrivals: Arrivals
    ) -> None:  # fmt: skip
        if not accepts_mean(assembly.strategy):
            raise Refused(
                f"[asynchronous] gives the strategy one weighted mean, which {assembly.config.strategy.name} does not say that it "
                "accepts; a class does with accepts_mean = True"
            )
        super().__init__(assembly, grid, store, budget)
        self._arrivals = arrivals

    def _attempt_to_train(self, number: int, progress: Progress) -> Work:
        """Fill the buffer of server step ``number``; paid for by who is given the version before it."""
        # The strategy is shown as many clients as a step takes, since who will train is not known yet.
        self._grid.nodes = shown = range(self.config.asynchronous.buffer)
        messages = self._configure(self._task(number, progress), progress, shown)
        check_one_content(messages)
        given, master = self._give(progress, messages[0])

        def pay(clients: Sequence[int]) -> None:
            if self._budget:
                self._budget.charge(number, sorted(clients), None)

        found = self._arrivals.collect(given, progress.pending, pay)
        self.observed = [Seen(number, found.facts.clients, found.facts)]
        reply = self._reply(messages[0], master, found.buffer, private=given.task.private)
        seconds = found.virtual_seconds - progress.virtual_seconds if self._fleet else 0.0
        return Work(found.facts.clients, None, [reply], found.facts, [], _metrics(found), seconds, found.pending)

    def _give(self, progress: Progress, message: Message) -> tuple[Given, npt.NDArray[np.float32]]:
        """What the strategy has clients given, and its master."""
        config, master = only_record(message, ConfigRecord), from_record(self.layout, only_record(message, ArrayRecord))
        blob = encode_model(self.layout.wire_tensors(master), RoundTask.from_table(config).ranges)
        return Given(progress.round_number, blob, self.layout.join(decode_model(blob).tensors), config), master

    def _reply(self, message: Message, master: npt.NDArray[np.float32], buffer: Buffer, *, private: bool) -> Message:
        """What the strategy aggregates."""
        values = [buffer.examples, *([] if private else [buffer.loss / buffer.examples])]
        metrics = MetricRecord(dict(zip(METRICS[message.metadata.message_type], values, strict=not private)))
        arrays = to_record(self.layout, (master + buffer.mean).astype(np.float32))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _metrics(found: Collected) -> Metrics:
    ages = found.buffer.ages
    return {"staleness_mean": sum(ages) / len(ages), "staleness_max": max(ages), "discarded": found.discarded}
