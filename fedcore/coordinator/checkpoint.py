"""What a commit holds: everything that the next round depends on, and by what a continuation recognises its scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import Strategy

from fedcore.errors import Refused
from fedcore.flower import decode_state, encode_state
from fedcore.quantization.wire import ActivationRange
from fedcore.state.sqlite import Checkpoint

__all__ = ["Origin", "Pending", "Progress", "from_checkpoint", "to_checkpoint"]

_STRATEGY, _PENDING = "strategy/", "pending/"


@dataclass(frozen=True)
class Pending:
    """Asynchronous work that was begun and has not arrived, as its source of arrivals writes it: ``facts`` that are JSON, and
    arrays by name."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Progress:
    """The state after a round: ``master`` [d] fp32, frozen activation ranges, and ``seen``: which clients already hold the
    frozen parameters. ``clipping_norm`` is that of the next release, ``scores`` are the clients' of the last open evaluation.
    ``virtual_seconds`` have passed since the run began where a virtual fleet has a clock."""

    round_number: int
    master: npt.NDArray[np.float32]
    ranges: dict[str, ActivationRange]
    seen: npt.NDArray[np.bool_]
    clipping_norm: float = 0.0
    scores: Mapping[str, Any] | None = None
    virtual_seconds: float = 0.0
    pending: Pending | None = None


@dataclass(frozen=True)
class Origin:
    """What a run began with: ``parts``, numbers that summarise its data and its first model; the root key's fingerprint."""

    parts: Mapping[str, Sequence[float]]
    key: str

    def check(self, recorded: Mapping[str, Any]) -> None:
        """Raises:
        Refused: the facts of a commit are of other data, another model or another key.
        """
        for part, values in recorded["origin"].items():
            now = self.parts[part]
            if len(now) != len(values) or not np.allclose(values, now, rtol=1e-3, atol=1e-4):
                raise Refused(f"--resume: the {part} behind the run has changed since it began")
        if recorded.get("key", "") != self.key:
            raise Refused("--resume: privacy.key holds another key than the one that the run began with")


def to_checkpoint(progress: Progress, strategy: Strategy, origin: Origin) -> Checkpoint:
    """The commit of ``progress`` and the strategy's state."""
    text, arrays = encode_state(strategy)
    facts = {
        "strategy": text,
        "ranges": {name: [span.scale, span.zero_point] for name, span in progress.ranges.items()},
        "clients": progress.scores,
        "origin": origin.parts,
        "clipping_norm": progress.clipping_norm,
        "key": origin.key,
        "virtual_seconds": progress.virtual_seconds,
        "pending": progress.pending.facts if progress.pending else None,
    }
    held = {f"{_STRATEGY}{key}": array for key, array in arrays.items()} | {"master": progress.master, "seen": progress.seen}
    held |= {f"{_PENDING}{key}": array for key, array in progress.pending.arrays.items()} if progress.pending else {}
    return Checkpoint(progress.round_number, held, facts)


def from_checkpoint(checkpoint: Checkpoint, strategy: Strategy, origin: Origin, size: int, clients: int) -> Progress:
    """Inverse of `to_checkpoint`: restores the strategy, and gives the progress of a model of ``size`` values.

    Raises:
        Refused: the commit is of another model, other data, another number of clients or another key.
    """
    decode_state(strategy, checkpoint.facts["strategy"], _below(_STRATEGY, checkpoint))
    master, seen = checkpoint.arrays["master"], checkpoint.arrays["seen"]
    if master.size != size or seen.size != clients:
        raise Refused("--resume: the last commit is of another model or another number of clients than the scenario's")
    origin.check(checkpoint.facts)
    ranges = {name: ActivationRange(scale, zero) for name, (scale, zero) in checkpoint.facts["ranges"].items()}
    facts = checkpoint.facts
    pending = Pending(facts["pending"], _below(_PENDING, checkpoint)) if facts.get("pending") else None
    return Progress(
        checkpoint.round_number, master, ranges, seen, facts["clipping_norm"], facts["clients"], facts.get("virtual_seconds", 0.0),
        pending,
    )  # fmt: skip


def _below(prefix: str, checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    return {key.removeprefix(prefix): array for key, array in checkpoint.arrays.items() if key.startswith(prefix)}
