"""What an artefact must show before it may leave: pure decisions on what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.config import TierConfig
from fedcore.export.targets import Target

__all__ = ["AGREEMENT", "Measured", "Row", "agreement", "judge", "quantile"]

AGREEMENT = 0.995
"""Share of held-out examples that an artefact has to label as the fake-quantized model."""


@dataclass(frozen=True)
class Measured:
    """An artefact on this machine: ``accuracy_loss`` in points (hundredths) against the fp32 master, milliseconds of one example on
    the tier's number of threads, ``peak_bytes`` of the process that ran it (of the arena for micro). None where it cannot run.
    ``integer_ops`` are convolutions and dense layers that add up integers, nothing else: an average or a sum in integers must not
    stand in for a layer in float. ``float_ops`` are of every kind that calculates."""

    bytes: int
    integer_ops: int
    float_ops: int
    agreement: float | None = None
    accuracy: float | None = None
    accuracy_loss: float | None = None
    latency_ms: float | None = None
    p95_ms: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """A line of export.json. ``status``: exported, missing (its converter), failed, not run (no runtime here). ``gate``: pass,
    fail, or not judged."""

    target: str
    tier: str
    status: str
    bytes: int | None = None
    agreement: float | None = None
    accuracy: float | None = None
    accuracy_loss: float | None = None
    latency_ms: float | None = None
    p95_ms: float | None = None
    peak_bytes: int | None = None
    integer_ops: int | None = None
    float_ops: int | None = None
    gate: str = "not judged"
    reason: str = ""


def judge(
    measured: Measured, tier: TierConfig, target: Target, integer_layers: int, float_results: Sequence[str] = ()
) -> Iterator[str]:  # fmt: skip
    """Why the artefact fails its gate, one line each; nothing where it passes. ``integer_layers`` were promised in integers;
    results of those in ``float_results`` were not rounded in training."""
    if target.integer and measured.integer_ops < integer_layers:
        yield f"only {measured.integer_ops} of {integer_layers} convolutions and dense layers add up integers: the rest is float"
    if measured.agreement is not None and measured.agreement < AGREEMENT:
        yield f"agreement {measured.agreement:.4f} is below {AGREEMENT}"
        if float_results:
            yield f"in training nothing rounded what layer {', '.join(float_results)} gives: put a FakeQuantize behind it"
    if measured.accuracy_loss is not None and measured.accuracy_loss > tier.accuracy_loss:
        yield f"accuracy loss of {measured.accuracy_loss:.2f} points is above {tier.accuracy_loss:g}"
    limits: list[tuple[str, float | None, float]] = [
        ("bytes", measured.bytes, tier.bytes), ("latency_ms", measured.latency_ms, tier.latency_ms),
        ("p95_ms", measured.p95_ms, tier.p95_ms),
        ("arena bytes" if target.name == "micro" else "peak_bytes", measured.peak_bytes,
         tier.arena_bytes if target.name == "micro" else tier.memory_bytes),
    ]  # fmt: skip
    for name, value, most in limits:
        if value is not None and most and value > most:
            yield f"{name} {value:.6g} is above the tier's {most:.6g}"


def agreement(logits: npt.NDArray[Any], expected: npt.NDArray[np.int64]) -> float:
    """Share of examples whose largest logit [n, classes] is the ``expected`` [n] one."""
    return float((logits.argmax(axis=1) == expected).mean())


def quantile(milliseconds: list[float], share: float) -> float | None:
    """The ``share`` quantile; None of nothing."""
    return float(np.quantile(milliseconds, share)) if milliseconds else None
