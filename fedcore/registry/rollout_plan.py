"""What is fixed before a rollout begins: its signals and what harm they may show, its stages, whom it compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedcore.errors import Refused

__all__ = ["SIGNALS", "SILENCE", "Plan", "Signal"]

SILENCE = "silence"


@dataclass(frozen=True)
class Signal:
    """Something that devices report, the less the better.

    Args:
        kind: a `rate` is in [0, 1] and compared by means; an `amount` is positive and compared by medians.
        limit: the harm that is still acceptable: an absolute difference of rates, or a share more of an amount.
        tolerance: harm beyond which a release is aborted as soon as it is shown; in the same units.
        ceiling: a rate that is too much whatever the control does; of an amount, the share of devices on which it may be above
            ``budget``; 1 for none.
        clip: rates above it count as it: the lower, the fewer votes show a small difference of rates that are small.
        required: whether promotion needs it. One that is not, as energy, counts where it is reported.
    """

    name: str
    limit: float
    kind: Literal["rate", "amount"] = "rate"
    tolerance: float = 0.0
    ceiling: float = 1.0
    clip: float = 1.0
    required: bool = True
    budget: float = 0.0


SIGNALS = (
    Signal("disagreement", 0.02, clip=0.2),  # with the labels of the self-test batch in the release
    Signal("errors", 0.02, clip=0.2),
    Signal("crash", 0.02),  # of a load
    Signal("p95_ms", 0.25, "amount"),
    Signal("peak_bytes", 0.25, "amount"),
    Signal("joules", 0.25, "amount", required=False),
    Signal("celsius", 0.1, "amount", required=False),
    Signal(SILENCE, 0.05),
)


@dataclass(frozen=True)
class Plan:
    """What was decided before a rollout began. ``baseline`` is the release that the control keeps, 0 if this is the model's first;
    ``fleet`` counts devices. With ``rest``, two releases are compared side by side (A/B): devices in neither arm keep that one, and
    nothing is promoted without a person. With a ``group``, only devices of that label take part in the first stage, half of them
    in each arm.

    ``stages`` are shares of the fleet; ``control`` is the share that stays at the last of them, and less before; ``enough`` is the
    part of a stage whose votes a promotion waits for. ``corrupt`` is the share of devices that may lie. ``hardware`` models are
    judged apart, all others as one.
    """

    name: str
    model: str
    version: int
    baseline: int
    fleet: int
    stages: tuple[float, ...] = (0.05, 0.2, 0.5)
    control: float = 0.4
    window: float = 86400.0
    signals: tuple[Signal, ...] = SIGNALS
    hardware: tuple[str, ...] = ()
    corrupt: float = 0.05
    alpha: float = 0.05
    enough: float = 0.5
    group: str = ""
    rest: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages and rising and self.control > 0 and self.stages[0] > 0 and self.stages[-1] + self.control <= 1):
            raise Refused(f"stages rise from above 0 and leave room for the control, got {self.stages} and {self.control}")
        nobody = min(math.floor(self.stages[0] * self.fleet), math.floor(self.control_at(0) * self.fleet)) < 1
        if nobody and self.baseline:
            raise Refused(f"of {self.fleet} devices, a canary of {self.stages[0]:g} or a control of {self.control:g} is nobody")
        if not (self.version > self.baseline >= 0 and 0 < self.window < math.inf and 0 < self.alpha < 1 and 0 < self.enough <= 1):
            raise Refused("a rollout's version is above its baseline, its window positive, alpha and enough between 0 and 1")
        if self.rest is not None and not 0 <= self.rest < self.baseline:
            raise Refused(f"what the rest keeps is below both that are compared, got {self.rest} and {self.baseline}")
        if not 0 <= self.corrupt < 0.5:
            raise Refused(f"a share of liars is below one half, got {self.corrupt:g}")
        if len({one.name for one in self.signals}) < len(self.signals) or any(one.limit <= one.tolerance for one in self.signals):
            raise Refused("every signal is named once, and its limit is above its tolerance")
        if any(not 0 < one.clip <= 1 or (one.ceiling < 1 and one.ceiling >= one.clip) for one in self.signals):
            raise Refused("a signal's clip is in (0, 1] and above its ceiling")
        if any((one.kind == "amount" and one.ceiling < 1) != (0 < one.budget < math.inf) for one in self.signals):
            raise Refused("a budget is of an amount that has a ceiling")

    @property
    def outside(self) -> int:
        """What devices in neither arm keep: it went to all of them before. In an A/B comparison that is neither of the two."""
        return self.baseline if self.rest is None else self.rest

    def control_at(self, stage: int) -> float:
        """The share of the fleet that is the control at a stage."""
        return self.control * self.stages[stage] / self.stages[-1]
