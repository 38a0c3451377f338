"""One client's round, wherever the client lives: received parameters in, a screened and encoded update out.

The simulated grid's workers and the Flower ClientApp run this same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedcore.data import FederatedData
from fedcore.errors import Refused
from fedcore.quantization.layers import set_activation_ranges
from fedcore.quantization.wire import ActivationRange, Update, decode_update, encode_update, update_length
from fedcore.training.engine import Engine, make_trainer
from fedcore.training.evaluation import Score, evaluate, load_flat
from fedcore.training.plan import ClientData, LocalPlan, LocalResult, client_rng

__all__ = ["DATA_ORDER", "SCORE_BYTES", "ClientReply", "Clients", "RoundTask", "why_unusable"]

Floats = npt.NDArray[np.float32]
SCORE_BYTES = 24  # a client's evaluation: examples and correct predictions as uint64, loss as float64
DATA_ORDER, _ROUNDING = 1, 2  # purposes of a client's generators


@dataclass(frozen=True)
class RoundTask:
    """What the coordinator asks of every client in a round; travels as a flat table of scalars and lists.

    ``max_update_norm``: L2 norm above which an update counts as exploded. ``ranges``: frozen activation ranges by quantizer
    name, empty before calibration.
    """

    round_number: int
    plan: LocalPlan
    max_update_norm: float
    ranges: Mapping[str, ActivationRange] = field(default_factory=dict)

    def to_table(self) -> dict[str, Any]:
        """The task as Flower ConfigRecord values, under the names that strategies may read and change."""
        plan = {key.replace("_", "-"): value for key, value in asdict(self.plan).items()}
        return plan | {
            "server-round": self.round_number,
            "max-update-norm": self.max_update_norm,
            "activation-names": list(self.ranges),
            "activation-scales": [span.scale for span in self.ranges.values()],
            "activation-zero-points": [span.zero_point for span in self.ranges.values()],
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> RoundTask:
        """Inverse of `to_table`; a strategy may have changed the values.

        Raises:
            Refused: a key is missing or has a value that training cannot use.
        """
        try:
            plan = LocalPlan(
                epochs=_positive(table, "epochs"),
                batch_size=_positive(table, "batch-size"),
                **{name.replace("-", "_"): _number(table, name) for name in ("lr", "momentum", "weight-decay", "proximal-mu")},
            )
            columns = (table["activation-names"], table["activation-scales"], table["activation-zero-points"])
            ranges = {str(name): ActivationRange(float(s), int(z)) for name, s, z in zip(*columns, strict=True)}
            return cls(_positive(table, "server-round"), plan, _number(table, "max-update-norm"), ranges)
        except KeyError as error:
            raise Refused(
                f"training configuration: key {error} is missing; the strategy must pass on the one it was given"
            ) from error
        except (TypeError, ValueError) as error:
            raise Refused("training configuration: the activation lists do not fit; the strategy must leave them alone") from error


@dataclass(frozen=True)
class ClientReply:
    """A client's answer as the coordinator decoded it; ``reason`` says why it is unusable (then ``update`` is None)."""

    client: int
    examples: int
    loss: float
    update: Tensor | None
    reason: str
    bytes_up: int


class Clients:
    """The work of clients that hold ``data``; owns one model, on the engine's device."""

    def __init__(self, model: nn.Module, data: FederatedData, engine: Engine, *, seed: int, encoding: str) -> None:
        self.model = model.to(engine.device)
        self.trainer = make_trainer(engine, self.model)
        self.device = torch.device(engine.device)
        self.data, self.seed, self.encoding = data, seed, encoding
        self._ranges: Mapping[str, ActivationRange] = {}

    def train(self, start: Tensor, clients: Sequence[int], task: RoundTask) -> Iterator[ClientReply]:
        """Train ``clients`` from the parameters ``start`` [d] that they received; one reply each, in order.

        A client whose training raises, or whose update `why_unusable` refuses, gives a reply with a reason.
        """
        self._freeze(task.ranges)
        start = start.to(self.device)
        for first in range(0, len(clients), self.trainer.chunk):
            group = clients[first : first + self.trainer.chunk]
            try:
                results = list(self.trainer.train(start, [self._examples(client, task) for client in group], task.plan))
            except Exception as error:  # noqa: BLE001 - a user's model may raise anything; the other clients go on
                yield from (self._failed(client, f"training failed: {_first_line(error)}") for client in group)
                continue
            yield from (self._reply(result, task) for result in results)

    def evaluate(self, values: Tensor, clients: Iterable[int], task: RoundTask) -> Iterator[tuple[int, Score]]:
        """Score the parameters ``values`` [d] on each client's own held-out examples."""
        self._freeze(task.ranges)
        load_flat(self.model, values.to(self.device))
        for client in clients:
            examples = self.data.dataset.train.take(self.data.holdout[client])
            yield client, evaluate(self.model, self._tensor(examples.x), self._tensor(examples.y))

    def _freeze(self, ranges: Mapping[str, ActivationRange]) -> None:
        if ranges != self._ranges:
            set_activation_ranges(self.model, dict(ranges))
            self._ranges = dict(ranges)

    def _examples(self, client: int, task: RoundTask) -> ClientData:
        examples = self.data.dataset.train.take(self.data.clients[client])
        rng = client_rng(self.seed, task.round_number, client, DATA_ORDER)
        return ClientData(client, self._tensor(examples.x), self._tensor(examples.y), rng)

    def _reply(self, result: LocalResult, task: RoundTask) -> ClientReply:
        reason = why_unusable(float(torch.linalg.vector_norm(result.update)), result.loss, task.max_update_norm)
        if reason:
            return self._failed(result.client, reason)
        update, length = result.update, update_length(result.update.numel(), self.encoding)
        if self.encoding != "float32":
            rng = client_rng(self.seed, task.round_number, result.client, _ROUNDING)
            sent = encode_update(Update(update.cpu().numpy(), result.examples, result.loss), self.encoding, rng)
            update, length = torch.from_numpy(decode_update(sent).values), len(sent)
        return ClientReply(result.client, result.examples, result.loss, update, "", length)

    def _failed(self, client: int, reason: str) -> ClientReply:
        return ClientReply(client, len(self.data.clients[client]), math.nan, None, reason, 0)

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
