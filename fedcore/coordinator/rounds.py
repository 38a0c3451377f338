"""The round loop over Flower's public strategy methods: numbered steps, one atomic commit each.

A simulated round is a pure function of (configuration, seed, round, clients), so a run that was killed and resumed ends with
the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedcore.config import LOSSES
from fedcore.coordinator.assembly import Assembly, naming_the_model
from fedcore.coordinator.budget import Budget
from fedcore.coordinator.checkpoint import Origin, Pending, Progress, from_checkpoint, to_checkpoint
from fedcore.coordinator.scores import by_client, tell_scores
from fedcore.coordinator.selection import EVALUATE, TRAIN, draw_cohort, toss_coins
from fedcore.data.fleet import draw_fleet
from fedcore.errors import BudgetSpent, FedcoreError, Refused, RoundFailed
from fedcore.flower import Facts, Gathering, Roster, facts_of, from_record, only_record, seed_strategies, to_nobody, to_record
from fedcore.models import layout_of
from fedcore.quantization.layers import calibrate, float_arithmetic, set_activation_ranges
from fedcore.quantization.wire import ActivationRange, decode_model, encode_model
from fedcore.secagg.sums import Summation, UpdateSum
from fedcore.state.sqlite import RunStore
from fedcore.training.client import RoundTask
from fedcore.training.evaluation import evaluate, load_flat
from fedcore.training.plan import LocalPlan

__all__ = ["Coordinator", "DrawnGrid", "Metrics", "Seen", "Work"]

Floats = npt.NDArray[np.float32]
Metrics = dict[str, Any]
Result = TypeVar("Result")


class DrawnGrid(Protocol):
    """A Flower Grid that shows only the clients drawn, ``nodes``; node ids in facts are client ids.

    ``observed``: who took part in a release, which its reply does not tell. ``simulated``: a round that is repeated gives the same
    bits; else it draws new noise. ``blind``: no client's contribution can be seen. ``gathering`` stands where clients come by
    themselves; then nobody is drawn.
    """

    simulated: bool
    blind: bool
    nodes: Sequence[int]
    observed: Facts

    @property
    def gathering(self) -> Gathering | None:
        """See `flower.Gathering`."""
        ...

    def get_node_ids(self) -> Iterable[int]:
        """As flwr.serverapp.Grid."""
        ...

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As flwr.serverapp.Grid."""
        ...


class Coordinator:
    """Runs the rounds of an assembled scenario over a grid; ``progress`` is the state after the last finished round.

    ``budget`` stands where the scenario protects anything. ``ended`` says why the rounds ended before the last one planned.
    """

    def __init__(self, assembly: Assembly, grid: DrawnGrid, store: RunStore, budget: Budget | None = None) -> None:
        self.assembly, self.config, self.strategy = assembly, assembly.config, assembly.strategy
        self.layout = assembly.layout
        self.observed: list[Seen] = []  # of the current round, one for each attempt
        self.ended = ""
        self._budget, self._client_unit = budget, assembly.protection.client
        if self._client_unit and self._client_unit.config.mechanism == "skellam" and not (grid.simulated or grid.blind):
            raise Refused(
                'privacy.mechanism = "skellam" protects only where the coordinator sees nothing but the sum; this grid shows it '
                'every contribution: use [secagg] enabled = true, "gaussian", or simulate'
            )
        self._grid, self._store, self._model, self._gathering = grid, store, assembly.model, grid.gathering
        if self._gathering:
            if self._client_unit and self._client_unit.config.sampling == "poisson":
                raise Refused('privacy.sampling = "poisson": no secret coin says who takes part, whoever comes does; leave it out')
            self._gathering.numbers, self._gathering.pay = store.numbers, budget.charge if budget else None
        self._fleet = draw_fleet(self.config.fleet, len(assembly.data.clients), self.config.run.seed) if grid.simulated else None
        # Strategies of Flower call no more of a Grid than a DrawnGrid has; where anything is private, none may ask clients itself.
        self._shown = Roster(grid) if assembly.config.privacy or assembly.secured else cast("Grid", grid)
        frozen = layout_of(self._model, trainable=False)
        values = {name: p.detach().numpy() for name, p in self._model.named_parameters() if not p.requires_grad}
        self._frozen_bytes = len(encode_model(frozen.wire_tensors(frozen.join(values)))) if values else 0
        self._origin = Origin(assembly.origin(), assembly.root.fingerprint)
        self.progress = self._restore() or self._begin()

    def rounds(self) -> Iterator[Metrics]:
        """Run the rounds that are left; yields each round's metrics once it is committed (with ``checkpoint.every`` = 1).

        Raises:
            RoundFailed: a round gave no usable model; the last commit holds the last good one.
            TryAgain: a commit could not be written.
            BudgetSpent: not even the first round can be paid for.
        """
        uncommitted: list[Metrics] = []
        config = self.config
        while self.progress.round_number < config.run.rounds:
            try:
                progress, metrics = self._round(self.progress)
            except BudgetSpent as spent:
                if not self.progress.round_number:
                    raise
                self.ended = str(spent)  # with [privacy] every round is committed: nothing is left to write
                return
            uncommitted.append(metrics)
            due = progress.round_number % config.checkpoint.every == 0 or progress.round_number == config.run.rounds
            if due:
                checkpoint = to_checkpoint(progress, self.strategy, self._origin)
                self._store.commit(checkpoint, uncommitted, config.checkpoint.keep)
                uncommitted = []
            self.progress = progress
            yield metrics

    def received(self, progress: Progress) -> tuple[bytes, Floats]:
        """What a device downloads after ``progress``: the encoded model, and the parameters [d] that it decodes to."""
        blob = encode_model(self.layout.wire_tensors(progress.master), progress.ranges)
        return blob, self.layout.join(decode_model(blob).tensors)

    def _round(self, progress: Progress) -> tuple[Progress, Metrics]:
        number, config, clock = progress.round_number + 1, self.config, _Clock()
        # 1. Everything drawn in this round is a function of (seed, round).
        seed_strategies(config.run.seed, number)
        if config.quantization.enabled and number == config.quantization.calibrate_round:
            progress = dataclasses.replace(progress, ranges=self._calibrate(progress))
        # 2. Who takes part, and what it costs: paid before anything else happens. The cohort trains as the strategy configures it.
        work = self._attempt_to_train(number, progress)
        release, trained = work.release, work.facts
        # 3. The strategy aggregates.
        master, aggregated = self._aggregate(number, work.replies)
        clock.lap("train")
        # 4. Evaluate on the coordinator's test part, and on the clients.
        norm = self._client_unit.next_norm(progress.clipping_norm, trained.unclipped) if self._client_unit else 0.0
        seconds = progress.virtual_seconds + work.virtual_seconds
        new = dataclasses.replace(
            progress, round_number=number, master=master, clipping_norm=norm, virtual_seconds=seconds, pending=work.pending
        )
        last = number == config.run.rounds
        central = self.evaluate(new) if last or (config.evaluation.every and number % config.evaluation.every == 0) else {}
        federated: Metrics = {}
        evaluated = Facts()
        if config.evaluation.federated_every and (last or number % config.evaluation.federated_every == 0):
            federated, evaluated = self._evaluate_on_clients(new)  # which may lack clients, and costs no round
            scores = by_client(evaluated, number, len(self.assembly.data.clients)) or progress.scores
            new = dataclasses.replace(new, scores=scores)
        clock.lap("evaluate")
        # 5. Account for clients and traffic.
        seen, counted = self._count(progress.seen, release, trained, evaluated)
        worked = counted["cohort"] if counted["replies"] is None else counted["replies"]
        metrics: Metrics = {
            "round": number,
            **counted,
            **({"virtual_seconds": seconds} if self._fleet else {}),
            **work.metrics,
            **aggregated,
            "update_norm": _norm(master.astype(np.float64) - progress.master),
            "quantized": bool(progress.ranges),
            **central,
            **federated,
            **({"hint": hint} if (hint := self._hint(work, progress)) else {}),
            **({"failed_attempts": work.failures} if work.failures else {}),
            **({"secure": [dict(one) for one in trained.secure]} if trained.secure else {}),
            **({"privacy": self._budget.spent(progress.clipping_norm, trained.unclipped)} if self._budget else {}),
            "timing": clock.laps | {"seconds": sum(clock.laps.values()), "clients_per_second": worked / clock.laps["train"]},
        }
        return dataclasses.replace(new, seen=seen), _finite(metrics)

    def _draw(self, number: int) -> tuple[int, ...]:
        """The clients that are asked in a round."""
        seed, population = self.config.run.seed, len(self.assembly.data.clients)
        size = min(population, math.ceil(round(self.config.cohort.size * self.config.fleet.over_selection, 9)))
        resting = {int(client) for client in self._budget.resting(number)} if self._budget else ()
        if self._client_unit and 0 < self._client_unit.rate < 1:
            key = self.assembly.root.derive("coins", number) if self._grid.simulated else secrets.token_bytes(32)
            return toss_coins(key, population, self._client_unit.rate, resting)
        cohort = draw_cohort(seed, number, population, size, TRAIN, resting)
        if len(cohort) < (size or population) and self._client_unit:
            raise BudgetSpent(
                f"round {number}: only {len(cohort)} of {size or population} clients may still take part; the others have reached "
                "privacy.max_participations, or privacy.min_separation keeps them out"
            )
        return cohort

    def _task(self, number: int, progress: Progress, release: Summation | None = None) -> RoundTask:
        training, example = self.config.training, self.assembly.protection.example
        plan = LocalPlan(
            training.epochs, training.batch_size, training.lr * training.lr_decay ** (number - 1), training.momentum,
            training.weight_decay, dp=example.plan if example else None, loss=training.loss,
        )  # fmt: skip
        # Noise makes an update long, and clipping short: neither is a sign of training that has exploded.
        norm = _norm(progress.master)
        usual = float(np.finfo(np.float32).max) if example or self._client_unit else 10 * max(1.0, norm)
        return RoundTask(number, plan, training.max_update_norm or usual, progress.ranges, release)

    def _wait(self, number: int, asked: tuple[int, ...]) -> tuple[tuple[int, ...], float, Metrics]:
        """Of the clients asked those whose work is waited for, and how long that takes on a virtual clock: until the last of them
        would be done, whether it vanishes or not."""
        if not self._fleet:
            return asked, 0.0, {}
        kept, seconds = self._fleet.fastest(number, asked, self.config.cohort.size or len(asked))
        return kept, seconds, {"discarded": len(asked) - len(kept)} if self.config.fleet.over_selection > 1 else {}

    def _recruit(self, number: int) -> tuple[tuple[int, ...], float, Metrics]:
        """Who is asked in a round: whoever was gathered, or those drawn; and what the wait for them comes to.

        Raises:
            RoundFailed, BudgetSpent: see `flower.Gathering`.
        """
        if self._gathering:
            return self._gathering.gather(MessageType.TRAIN, number, self._budget.resting(number) if self._budget else ()), 0.0, {}
        cohort, seconds, waited = self._wait(number, self._draw(number))
        self._grid.nodes = cohort
        return cohort, seconds, waited

    def _attempt_to_train(self, number: int, progress: Progress) -> Work:
        """A cohort's work, paid for. Real clients come and go: with them a round whose replies do not suffice is tried again,
        with a cohort of its own and a charge of its own."""
        failures: list[str] = []
        self.observed = []
        secured = self.assembly.secured
        while True:
            try:
                cohort, seconds, waited = self._recruit(number)
            except (RoundFailed, BudgetSpent) as failure:
                if not self._gathering:
                    raise
                self._give_up(number, (), failure, failures)
                continue
            noised = self._client_unit.release(number, progress.clipping_norm) if self._client_unit else None
            if self._budget and not self._gathering:  # which has those charged who will get a plan, just before they do
                self._budget.charge(number, cohort, noised)
            release = noised or (secured.updates if secured else None)
            messages = self._configure(self._task(number, progress, release), progress, cohort)
            try:
                replies, facts = self._exchange(messages)
            except RoundFailed as failure:
                self._give_up(number, cohort, failure, failures)
            else:
                self.observed.append(Seen(number, tuple(cohort), self._grid.observed))
                return Work(tuple(cohort), release, replies, facts, failures, waited, seconds)

    def _give_up(self, number: int, cohort: Sequence[int], failure: FedcoreError, failures: list[str]) -> None:
        """Note an attempt at a round that failed; raises it where there is no other."""
        failures.append(str(failure))
        seen = self._grid.observed
        self.observed.append(Seen(number, tuple(cohort), seen, str(failure)))
        if self._grid.simulated:
            one = f"; one of the clients: {seen.dropped[0][1]}" if seen.dropped else ""
            raise RoundFailed(f"{failure}{one}") from failure
        if len(failures) >= self.config.cohort.attempts:
            raise failure

    def _hint(self, work: Work, progress: Progress) -> str:
        """What a person might want to change about how updates are summed."""
        if not isinstance(work.release, UpdateSum) or len(work.replies) != 1:
            return ""
        found = from_record(self.layout, only_record(work.replies[0], ArrayRecord))
        return work.release.why_unfit(found.astype(np.float64) - progress.master, work.facts.survivors or 1)

    def _configure(self, task: RoundTask, progress: Progress, cohort: Sequence[int]) -> Sequence[Message]:
        """What the strategy asks of the cohort."""
        number, arrays, record = task.round_number, to_record(self.layout, progress.master), _record(task)
        messages = self._call(
            "configure_train", lambda: list(self.strategy.configure_train(number, arrays, record, self._shown))
        )  # fmt: skip
        if not messages and (cohort or not task.release):
            raise RoundFailed(f"strategy {self.config.strategy.name} asked no client to train")
        self.assembly.protection.check_messages(messages, task, cohort)
        _check_loss(messages, task.plan)
        return messages or [to_nobody(arrays, record)]

    def _exchange(self, messages: Sequence[Message]) -> tuple[list[Message], Facts]:
        replies = list(self._grid.send_and_receive(messages, timeout=self.config.cohort.timeout))
        return replies, Facts.merge(facts_of(reply) for reply in replies)

    def _aggregate(self, number: int, replies: list[Message]) -> tuple[Floats, Metrics]:
        result = self._call("aggregate_train", lambda: self.strategy.aggregate_train(number, replies))
        if not isinstance(result, tuple) or len(result) != 2:
            raise RoundFailed(f"strategy {self.config.strategy.name}: aggregate_train must return (ArrayRecord, MetricRecord)")
        arrays, metrics = result
        if not isinstance(arrays, ArrayRecord):
            raise RoundFailed(f"strategy {self.config.strategy.name} gave no model for {len(replies)} replies (too few for it?)")
        master = from_record(self.layout, arrays)
        if not np.isfinite(master).all():
            raise RoundFailed(f"strategy {self.config.strategy.name} gave a model that is not finite; the last commit is intact")
        found = self._metrics("aggregate_train", metrics)
        return master, {"train_loss": found.pop("train_loss", None)} | ({"strategy": found} if found else {})

    def _calibrate(self, progress: Progress) -> dict[str, ActivationRange]:
        examples = self.assembly.data.dataset.train.take(self.assembly.data.calibration)
        load_flat(self._model, torch.from_numpy(progress.master))
        with naming_the_model(self.config):
            return calibrate(self._model.eval(), torch.from_numpy(examples.x).split(256))

    def evaluate(self, progress: Progress) -> Metrics:
        """Score the master in float, and the model that devices receive, on the coordinator's test part."""
        test = self.assembly.data.dataset.test
        x, y = torch.from_numpy(test.x), torch.from_numpy(test.y)
        load_flat(self._model, torch.from_numpy(progress.master))
        with naming_the_model(self.config), float_arithmetic(self._model):
            score = evaluate(self._model, x, y, self.config.training.loss)
        if not self.config.quantization.enabled:
            return {"accuracy": score.accuracy, "loss": score.loss}
        set_activation_ranges(self._model, progress.ranges)
        load_flat(self._model, torch.from_numpy(self.received(progress)[1]))
        with naming_the_model(self.config):
            quantized = evaluate(self._model, x, y, self.config.training.loss)
        return {
            "accuracy": score.accuracy, "loss": score.loss,
            "fake_quant_accuracy": quantized.accuracy, "fake_quant_loss": quantized.loss,
        }  # fmt: skip

    def _evaluate_on_clients(self, progress: Progress) -> tuple[Metrics, Facts]:
        number, config = progress.round_number, self.config
        try:
            if self._gathering:
                self._gathering.gather(MessageType.EVALUATE, number, ())
            else:
                population, size = len(self.assembly.data.clients), config.cohort.evaluate_size
                self._grid.nodes = draw_cohort(config.run.seed, number, population, size, EVALUATE)
        except RoundFailed as failure:  # clients that come by themselves
            return {"federated_failed": str(failure)}, Facts()
        scores = self.assembly.secured.scores if self.assembly.secured else None
        arrays, record = to_record(self.layout, progress.master), _record(self._task(number, progress, scores))
        messages = self._call(
            "configure_evaluate", lambda: list(self.strategy.configure_evaluate(number, arrays, record, self._shown) or ())
        )  # fmt: skip
        if not messages:
            return {}, Facts()
        if scores:
            self.assembly.protection.check_sum(messages, self._task(number, progress, scores))
        _check_loss(messages, self._task(number, progress).plan)
        try:
            replies, facts = self._exchange(messages)
        except RoundFailed as failure:
            if not (self.assembly.secured or self._gathering):
                raise
            return {"federated_failed": str(failure)}, Facts()
        found = self._metrics(
            "aggregate_evaluate", self._call("aggregate_evaluate", lambda: self.strategy.aggregate_evaluate(number, replies))
        )
        return {"federated": found | tell_scores(facts)}, facts

    def _count(
        self, seen: npt.NDArray[np.bool_], release: Summation | None, trained: Facts, evaluated: Facts
    ) -> tuple[npt.NDArray[np.bool_], Metrics]:
        """Clients and bytes of a round for its metrics, and who now holds the frozen parameters, which a client downloads once.

        Of sums nothing tells who took part: numbers are those of the planned cohort, as if nobody held them yet.
        """
        met = [client for part in (trained, evaluated) for client in (*part.clients, *(c for c, _ in part.dropped))]
        now = np.zeros(max(len(seen), 1 + max(met, default=-1)), np.bool_)  # more devices may come than the scenario counts
        now[: len(seen)], now[met] = seen, True
        planned = release.cohort * self.config.secagg.shards if release else 0
        downloads = planned if release else int(now.sum() - seen.sum())
        return now, {
            "cohort": planned if release else len(trained.clients) + len(trained.dropped),
            "replies": trained.survivors if release else len(trained.clients),
            **({} if trained.failed is None else {"failed": trained.failed}),
            "dropped": [{"client": client, "reason": reason} for client, reason in trained.dropped],
            "bytes_up": trained.bytes_up + evaluated.bytes_up,
            "bytes_down": trained.bytes_down + evaluated.bytes_down + self._frozen_bytes * downloads,
        }

    def _metrics(self, name: str, metrics: Any) -> Metrics:
        """A strategy's metrics as plain numbers."""
        if metrics is not None and not isinstance(metrics, Mapping):
            raise RoundFailed(
                f"strategy {self.config.strategy.name}: {name} must give a MetricRecord, it gave a {type(metrics).__name__}"
            )
        return self._call(
            name, lambda: {k: np.asarray(v, np.float64).tolist() for k, v in (metrics or {}).items() if k != "num-examples"}
        )

    def _call(self, name: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except FedcoreError:
            raise
        except Exception as error:  # a researcher's own strategy may raise anything
            raise RoundFailed(f"strategy {self.config.strategy.name} failed in {name}: {type(error).__name__}: {error}") from error

    def _begin(self) -> Progress:
        values = {name: p.detach().numpy() for name, p in self._model.named_parameters() if p.requires_grad}
        norm = self._client_unit.config.clipping_norm if self._client_unit else 0.0
        return Progress(0, self.layout.join(values), {}, np.zeros(len(self.assembly.data.clients), np.bool_), norm)

    def _restore(self) -> Progress | None:
        checkpoint = self._store.latest()
        if checkpoint is None:
            return None
        size, clients = self.layout.size, len(self.assembly.data.clients)
        if not self._grid.simulated:  # more of them may have come
            clients = checkpoint.arrays["seen"].size
        progress = self._call(
            "load_state_dict", lambda: from_checkpoint(checkpoint, self.strategy, self._origin, size, clients)
        )  # fmt: skip
        if self._budget:
            self._budget.check_paid(progress.round_number)
        return progress


@dataclass(frozen=True)
class Seen:
    """An attempt at a round as the operator may see it: its cohort, what the grid saw of it, and why it was given up."""

    round_number: int
    cohort: tuple[int, ...]
    facts: Facts
    failure: str = ""


@dataclass(frozen=True)
class Work:
    """What a cohort was asked for (``release``) and replied, and why earlier cohorts of the round did not suffice.

    ``metrics`` are the round's own, ``virtual_seconds`` what it took on the clock of a virtual fleet, ``pending`` the work that
    goes on after it.
    """

    cohort: tuple[int, ...]
    release: Summation | None
    replies: list[Message]
    facts: Facts
    failures: list[str]
    metrics: Metrics = dataclasses.field(default_factory=dict)
    virtual_seconds: float = 0.0
    pending: Pending | None = None


def _check_loss(messages: Sequence[Message], plan: LocalPlan) -> None:
    """A configuration without a loss means cross-entropy: a strategy that drops the key would change it unseen."""
    if plan.loss == LOSSES[0]:
        return
    for one in {id(message.content): message for message in messages if isinstance(message, Message)}.values():
        if "loss" not in only_record(one, ConfigRecord):
            raise Refused("training configuration: key 'loss' is missing; the strategy must pass on the one it was given")


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(task: RoundTask) -> ConfigRecord:
    return ConfigRecord(task.to_table())


def _norm(values: npt.NDArray[Any]) -> float:
    """The L2 norm, in float64. numpy's own wakes the threads of its BLAS, which take milliseconds beside busy workers."""
    return math.sqrt(float(np.square(values, dtype=np.float64).sum()))
