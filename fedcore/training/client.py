"""One client's round, wherever the client lives: received parameters in, a screened and encoded update out.

The simulated grid's workers and the Flower ClientApp run this same code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedcore.config import LOSSES
from fedcore.data import FederatedData
from fedcore.errors import Refused
from fedcore.native.build import BuildFailed
from fedcore.native.cohort import Board, Cohort
from fedcore.native.trainer import NativeTrainer, Worker
from fedcore.privacy.randomness import RandomBytes, RootKey, keystream
from fedcore.privacy.release import Contribution
from fedcore.quantization.layers import set_activation_ranges
from fedcore.quantization.wire import ActivationRange, Update, decode_update, encode_update, update_length
from fedcore.secagg.sums import ScoreSum, Summation, sum_from_table
from fedcore.training.engine import Engine, make_trainer
from fedcore.training.evaluation import Score, evaluate, load_flat
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, LocalResult, client_rng, keyed_rng

__all__ = [
    "AFTERWARDS", "CHECK_IN", "DATA_ORDER", "SCORE_BYTES", "WORK", "AddedUp", "ClientReply", "Clients", "RoundTask", "why_unusable",
]  # fmt: skip

Floats = npt.NDArray[np.float32]
SCORE_BYTES = 24  # a client's evaluation: examples and correct predictions as uint64, loss as float64
DATA_ORDER, _ROUNDING, _VANISHING = 1, 2, 3  # purposes of a client's generators
CHECK_IN, WORK, AFTERWARDS = "check-in", "work", "afterwards"
_VANISHED = "vanished (cohort.dropout)"
_OF_STEPS = ("batches", "steps")  # purposes of what DP-SGD draws
_OF_EXAMPLES = ("example-clipping-norm", "example-noise-multiplier", "example-batches")
_RATES = ("lr", "momentum", "weight_decay", "proximal_mu")


@dataclass(frozen=True)
class RoundTask:
    """What the coordinator asks of every client in a round; travels as a flat table of scalars and lists.

    ``max_update_norm``: L2 norm above which an update counts as exploded. ``ranges``: frozen activation ranges by quantizer
    name, empty before calibration. ``release``: how contributions are summed where nothing but their sum may be seen.
    """

    round_number: int
    plan: LocalPlan
    max_update_norm: float
    ranges: Mapping[str, ActivationRange] = field(default_factory=dict)
    release: Summation | None = None

    def to_table(self) -> dict[str, Any]:
        """The task as Flower ConfigRecord values, under the names that strategies may read and change."""
        plan, dp = self.plan, self.plan.dp
        private = dict(zip(_OF_EXAMPLES, (dp.clipping_norm, dp.noise_multiplier, dp.batches), strict=True)) if dp else {}
        return {
            "epochs": plan.epochs,
            "batch-size": plan.batch_size,
            **{key.replace("_", "-"): getattr(plan, key) for key in _RATES},
            **({} if plan.loss == LOSSES[0] else {"loss": plan.loss}),
            **private,
            **(self.release.to_table() if self.release else {}),
            "server-round": self.round_number,
            "max-update-norm": self.max_update_norm,
            "activation-names": list(self.ranges),
            "activation-scales": [span.scale for span in self.ranges.values()],
            "activation-zero-points": [span.zero_point for span in self.ranges.values()],
        }

    @property
    def private(self) -> bool:
        """Whether exact numbers about a client's examples must stay on it."""
        return self.release is not None or self.plan.dp is not None

    def guarded(self) -> dict[str, Any]:
        """The part of the table on which a privacy guarantee rests; empty without one. A strategy must leave it alone."""
        keys = ["server-round"] if self.private else []  # noise is drawn anew for every round
        keys += ["epochs", "batch-size", *_OF_EXAMPLES] if self.plan.dp else []
        table = self.to_table()
        return {key: table[key] for key in keys} | (self.release.to_table() if self.release else {})

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> RoundTask:
        """Inverse of `to_table`; a strategy may have changed the values.

        Raises:
            Refused: a key is missing or has a value that training cannot use.
        """
        try:
            norm, noise, batches = _OF_EXAMPLES
            private = any(key in table for key in _OF_EXAMPLES)
            dp = DpSgdPlan(_number(table, norm), _number(table, noise), _positive(table, batches)) if private else None
            plan = LocalPlan(
                epochs=_positive(table, "epochs"),
                batch_size=_positive(table, "batch-size"),
                dp=dp,
                loss=_loss(table),
                **{key: _number(table, key.replace("_", "-")) for key in _RATES},
            )
            columns = (table["activation-names"], table["activation-scales"], table["activation-zero-points"])
            ranges = {str(name): ActivationRange(float(s), int(z)) for name, s, z in zip(*columns, strict=True)}
            number, limit = _positive(table, "server-round"), _number(table, "max-update-norm")
            return cls(number, plan, limit, ranges, sum_from_table(table))
        except KeyError as error:
            raise Refused(
                f"training configuration: key {error} is missing; the strategy must pass on the one it was given"
            ) from error
        except (TypeError, ValueError) as error:
            raise Refused("training configuration: the activation lists do not fit; the strategy must leave them alone") from error


@dataclass(frozen=True)
class ClientReply:
    """A client's answer as the coordinator decoded it; ``reason`` says why it is unusable (then ``update`` is None).

    Where the task has a release, ``contribution`` is all that the client sends; the rest never leaves it.
    """

    client: int
    examples: int
    loss: float
    update: Tensor | None
    reason: str
    bytes_up: int
    contribution: Contribution | None = None


@dataclass(frozen=True)
class AddedUp:
    """What became of clients that the engine added up: of those in the sum [n] the examples and mean losses, and how many bytes
    their updates would be; the replies of the ``others``, with the reasons why they are not in it."""

    clients: tuple[int, ...]
    examples: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    bytes_up: int
    others: tuple[ClientReply, ...]


class Clients:
    """The work of clients that hold ``data``; owns one model, on the engine's device.

    Simulated clients draw all that is random from ``seed``, round and client, and what protects them from ``root`` instead of the
    seed; a share ``dropout`` of them vanishes in a round. ``real`` ones draw what protects them from the operating system.
    """

    def __init__(
        self, model: nn.Module, data: FederatedData, engine: Engine, *, seed: int, encoding: str, real: bool = False,
        root: RootKey | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        self.model = model.to(engine.device)
        self.trainer = make_trainer(engine, self.model)
        self.engine = engine
        self.device = torch.device(engine.device)
        self.data, self.seed, self.encoding, self.real = data, seed, encoding, real
        self.root = root or RootKey.of_seed(seed)
        self.dropout = dropout
        self._sizes = np.array([len(one) for one in data.clients], np.int64)
        self._ranges: Mapping[str, ActivationRange] = {}

    def train(self, start: Tensor, clients: Sequence[int], task: RoundTask) -> Iterator[ClientReply]:
        """Train ``clients`` from the parameters ``start`` [d] that they received; one reply each, in order.

        A client whose training raises, or whose update `why_unusable` refuses, gives a reply with a reason; so does one with fewer
        batches than a round of DP-SGD is charged for, which does not train.

        Raises:
            BuildFailed: this machine cannot compile or load the trainer, which is no client's fault.
        """
        self._freeze(task.ranges)
        start = start.to(self.device)
        absent = {reply.client: reply for reply in self._absent(clients, task)}
        yield from absent.values()
        clients = [client for client in clients if client not in absent]
        for first in range(0, len(clients), self.trainer.chunk):
            group = clients[first : first + self.trainer.chunk]
            try:
                results = list(self.trainer.train(start, [self._examples(client, task) for client in group], task.plan))
            except BuildFailed:
                raise
            except Exception as error:  # noqa: BLE001 - a user's model may raise anything; the other clients go on
                if len(group) > 1:  # one of them failed, and costs nobody else its part
                    yield from (reply for client in group for reply in self.train(start, [client], task))
                else:
                    yield self._failed(group[0], f"training failed: {_first_line(error)}", task)
                continue
            yield from (self._reply(result, task) for result in results)

    def adds_up(self, task: RoundTask) -> bool:
        """Whether the engine trains whole cohorts: then `add_up` and `added` give what `train` and a sum would. Noise that is to
        protect somebody is drawn client by client."""
        able = isinstance(self.trainer, NativeTrainer) and self.encoding == "float32" and task.release is None
        return able and (task.plan.dp is None or self._open)

    def board(self, clients: int, workers: int) -> Board:
        """What so many ``workers`` share for a round of at most ``clients``."""
        size = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        trainer, shape = self.trainer, self.data.dataset.train.shape
        return Board(clients, size, trainer.blob(shape) if isinstance(trainer, NativeTrainer) else 0, workers)

    def add_up(
        self, start: Tensor, clients: Sequence[int], task: RoundTask, board: Board, *, one_unit: bool = False
    ) -> None:  # fmt: skip
        """Help to train ``clients``; all processes that share ``board`` call this with the same arguments. With ``one_unit`` they
        are one of a round's units and not the round."""
        self._freeze(task.ranges)
        train, clients = self.data.dataset.train, self.arriving(clients, task)
        rows = [self.data.clients[client] for client in clients]
        batches, steps = (self.root.derive(purpose, task.round_number) for purpose in _OF_STEPS)
        keys = (batches, steps) if task.plan.dp and self._open else None
        cohort = Cohort(clients, rows, self.seed, task.round_number, DATA_ORDER, task.max_update_norm, keys)
        cohort.train(self._native(task), start, train, task.plan, board, one_unit=one_unit)

    def added(self, clients: Sequence[int], task: RoundTask, board: Board) -> AddedUp:
        """What became of the clients that `add_up` trained."""
        others = list(self._absent(clients, task))
        absent = {reply.client for reply in others}
        trained = np.array([client for client in clients if client not in absent], np.int64)
        norms, losses = board.norms[: len(trained)], board.losses[: len(trained)]
        good = (norms >= 0) & (norms <= task.max_update_norm) & np.isfinite(losses)
        for position in np.flatnonzero(~good).tolist():
            client, norm, loss = int(trained[position]), float(norms[position]), float(losses[position])
            reason = why_unusable(norm, loss, task.max_update_norm)
            if norm < 0:
                reason = f"training failed: Refused: {self._native(task).no_class(client)}"
            others.append(self._failed(client, reason, task))
        trained, losses = trained[good], losses[good]
        length = update_length(len(board.total), self.encoding)
        return AddedUp(tuple(trained.tolist()), self._sizes[trained], losses, len(trained) * length, tuple(others))

    def arriving(self, clients: Sequence[int], task: RoundTask) -> list[int]:
        """Those of ``clients`` that train in a round and whose work arrives."""
        absent = {reply.client for reply in self._absent(clients, task)}
        return [client for client in clients if client not in absent]

    def _absent(self, clients: Sequence[int], task: RoundTask) -> Iterator[ClientReply]:
        """The replies of clients that vanish, then of those that must not train."""
        if not self.dropout and task.plan.dp is None:
            return
        gone = {client: None for client in clients if not self.arrives(client, task.round_number)}
        yield from (ClientReply(client, 0, math.nan, None, _VANISHED, 0) for client in gone)
        refusing = {client: reason for client in clients if client not in gone and (reason := self._refuses(client, task.plan))}
        yield from (self._failed(client, reason, task, telling=False) for client, reason in refusing.items())

    def _native(self, task: RoundTask) -> Worker:
        assert isinstance(self.trainer, NativeTrainer)
        return self.trainer.worker_for(self.data.dataset.train.shape, task.plan)

    def _refuses(self, client: int, plan: LocalPlan) -> str:
        return plan.dp.why_not(len(self.data.clients[client]), plan.batch_size) if plan.dp else ""

    def evaluate(self, values: Tensor, clients: Iterable[int], task: RoundTask) -> Iterator[tuple[int, Score, str]]:
        """Score the parameters ``values`` [d] on each client's own held-out examples. One whose evaluation raises has no examples
        and a reason, which may quote them."""
        self._freeze(task.ranges)
        load_flat(self.model, values.to(self.device))
        for client in clients:
            examples = self.data.dataset.train.take(self.data.holdout[client])
            try:
                yield client, evaluate(self.model, self._tensor(examples.x), self._tensor(examples.y), task.plan.loss), ""
            except Exception as error:  # noqa: BLE001 - a user's model may raise anything; the other clients go on
                yield client, Score(0, 0, 0.0), f"evaluation failed: {_first_line(error)}"

    def vanishes(self, client: int, round_number: int) -> str:
        """The step of a round at which a simulated client is lost: `CHECK_IN`, `WORK` or `AFTERWARDS`; empty if it stays."""
        if not self.dropout:
            return ""
        rng = client_rng(self.seed, round_number, client, _VANISHING)
        return str(rng.choice((CHECK_IN, WORK, AFTERWARDS))) if rng.random() < self.dropout else ""

    def arrives(self, client: int, round_number: int) -> bool:
        """Whether what the client sends in a round arrives."""
        return self.vanishes(client, round_number) not in {CHECK_IN, WORK}

    def _freeze(self, ranges: Mapping[str, ActivationRange]) -> None:
        if ranges != self._ranges:
            set_activation_ranges(self.model, dict(ranges))
            self._ranges = dict(ranges)

    def _examples(self, client: int, task: RoundTask) -> ClientData:
        examples = self.data.dataset.train.take(self.data.clients[client])
        x, y = self._tensor(examples.x), self._tensor(examples.y)
        if task.plan.dp is None:
            return ClientData(client, x, y, client_rng(self.seed, task.round_number, client, DATA_ORDER))
        coins, noise = (self._generator(purpose, client, task) for purpose in _OF_STEPS)
        return ClientData(client, x, y, coins, noise, self._open)

    def coins(self, client: int, task: RoundTask) -> np.random.Generator:
        """What a client's Poisson batches of a round are drawn with."""
        return self._generator(_OF_STEPS[0], client, task)

    def noise(self, task: RoundTask) -> RandomBytes:
        """Where the noise comes from that a trusted coordinator adds to the sum of a round."""
        return self._random("sum", -1, task)

    def _random(self, purpose: str, client: int, task: RoundTask) -> RandomBytes:
        """What protects a client: of the operating system, or a function of run, round, client and purpose."""
        return os.urandom if self.real else keystream(self.root.derive(purpose, task.round_number, client))

    @property
    def _open(self) -> bool:
        """Whether what protects these clients is a function of a seed that the run's files show: it need not be a cipher's."""
        return not self.real and not self.root.secret

    def _generator(self, purpose: str, client: int, task: RoundTask) -> np.random.Generator:
        if self._open:
            return keyed_rng(self.root.derive(purpose, task.round_number), client)
        return np.random.default_rng(int.from_bytes(self._random(purpose, client, task)(32), "little"))

    def _reply(self, result: LocalResult, task: RoundTask) -> ClientReply:
        # Under DP-SGD the loss stays on the client: it is exact, and also nan for a client that happened to draw no example.
        loss = 0.0 if task.plan.dp else result.loss
        reason = why_unusable(float(torch.linalg.vector_norm(result.update)), loss, task.max_update_norm)
        if reason:
            return self._failed(result.client, reason, task)
        if task.release and not isinstance(task.release, ScoreSum):
            random = self._random("share", result.client, task)
            contribution = task.release.contribution(result.update.cpu().numpy(), result.examples, loss, random)
            return ClientReply(result.client, result.examples, loss, result.update, "", task.release.bytes, contribution)
        update, length = result.update, update_length(result.update.numel(), self.encoding)
        if self.encoding != "float32":
            rng = client_rng(self.seed, task.round_number, result.client, _ROUNDING)
            sent = encode_update(Update(update.cpu().numpy(), result.examples, loss), self.encoding, rng)
            update, length = torch.from_numpy(decode_update(sent).values), len(sent)
        return ClientReply(result.client, result.examples, loss, update, "", length)

    def _failed(self, client: int, reason: str, task: RoundTask, *, telling: bool = True) -> ClientReply:
        """Under a release a client whose training fails contributes nothing, as zeros: who drops must not depend on its data.
        Under DP-SGD a ``telling`` reason, which may quote an example, stays on the client."""
        examples = len(self.data.clients[client])
        if task.release and not isinstance(task.release, ScoreSum):
            sent = task.release.nothing(self._random("share", client, task))
            return ClientReply(client, examples, math.nan, None, reason, task.release.bytes, sent)
        return ClientReply(client, examples, math.nan, None, "training failed" if task.plan.dp and telling else reason, 0)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def why_unusable(norm: float, loss: float, limit: float) -> str:
    """Why an update of L2 norm ``norm`` must not reach the sum; empty when it may."""
    if not math.isfinite(norm):
        return "update is not finite"
    if not math.isfinite(loss):
        return "training loss is not finite"
    return f"update exploded: its norm {norm:.3g} is over the limit {limit:.3g}" if norm > limit else ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _positive(table: Mapping[str, Any], key: str) -> int:
    value = table[key]
    if not isinstance(value, int) or value < 1:
        raise Refused(f"training configuration: {key} must be an integer >= 1, the strategy set {value!r}")
    return value


def _number(table: Mapping[str, Any], key: str) -> float:
    value = table[key]
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise Refused(f"training configuration: {key} must be a number >= 0, the strategy set {value!r}")
    return float(value)


def _loss(table: Mapping[str, Any]) -> str:
    """A table without one is of the first loss, as all were before there were others."""
    value = table.get("loss", LOSSES[0])
    if value not in LOSSES:
        raise Refused(f"training configuration: loss must be one of {', '.join(LOSSES)}, the strategy set {value!r}")
    return str(value)
