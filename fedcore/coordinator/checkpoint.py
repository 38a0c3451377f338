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

__all__ = ["Origin", "Progress", "from_checkpoint", "to_checkpoint"]

_STRATEGY = "strategy/"


@dataclass(frozen=True)
class Progress:
    """The state after a round: ``master`` [d] fp32, frozen activation ranges, and ``seen``: which clients already hold the
    frozen parameters. ``clipping_norm`` is that of the next release, ``scores`` are the clients' of the last open evaluation."""

    round_number: int
    master: npt.NDArray[np.float32]
    ranges: dict[str, ActivationRange]
    seen: npt.NDArray[np.bool_]
    clipping_norm: float = 0.0
    scores: Mapping[str, Any] | None = None


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
    }
    held = {f"{_STRATEGY}{key}": array for key, array in arrays.items()} | {"master": progress.master, "seen": progress.seen}
    return Checkpoint(progress.round_number, held, facts)


def from_checkpoint(checkpoint: Checkpoint, strategy: Strategy, origin: Origin, size: int, clients: int) -> Progress:
    """Inverse of `to_checkpoint`: restores the strategy, and gives the progress of a model of ``size`` values.

    Raises:
        Refused: the commit is of another model, other data, another number of clients or another key.
    """
    arrays = {key.removeprefix(_STRATEGY): array for key, array in checkpoint.arrays.items() if key.startswith(_STRATEGY)}
    decode_state(strategy, checkpoint.facts["strategy"], arrays)
    master, seen = checkpoint.arrays["master"], checkpoint.arrays["seen"]
    if master.size != size or seen.size != clients:
        raise Refused("--resume: the last commit is of another model or another number of clients than the scenario's")
    origin.check(checkpoint.facts)
    ranges = {name: ActivationRange(scale, zero) for name, (scale, zero) in checkpoint.facts["ranges"].items()}
    return Progress(checkpoint.round_number, master, ranges, seen, checkpoint.facts["clipping_norm"], checkpoint.facts["clients"])
