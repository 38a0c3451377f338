"""What happens to devices that check in, and to a round that they work on. Pure: facts in, decisions out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Self

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.privacy.randomness import RandomBytes

__all__ = ["HOLD", "Progress", "Selection", "Told", "choose", "judge_round", "lacking", "why_ineligible", "why_resting"]

HOLD = 30.0
"""Seconds that a check-in is held at most."""
_LONGEST_TEXT, _MOST_TEXTS = 64, 32


@dataclass(frozen=True)
class Told:
    """What a device says of itself when it checks in."""

    population: str = ""
    model_version: int = 0
    tier: str = ""
    runtime: str = ""
    capabilities: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    agent_version: str = ""

    @classmethod
    def of(cls, body: pb.CheckInBody) -> Self:
        """From a check-in.

        Raises:
            Refused: texts that are too long or too many.
        """
        values = {name: getattr(body, name) for name in cls.__dataclass_fields__}
        values |= {name: tuple(values[name]) for name in ("capabilities", "labels")}
        texts = [part for value in values.values() for part in (value if isinstance(value, tuple) else (value,))]
        if len(texts) > _MOST_TEXTS or any(isinstance(one, str) and len(one) > _LONGEST_TEXT for one in texts):
            raise Refused(f"a check-in holds at most {_MOST_TEXTS} texts of {_LONGEST_TEXT} characters")
        return cls(**values)

    def encode(self) -> str:
        """As JSON, for the store."""
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Inverse of `encode`."""
        found = json.loads(text)
        return cls(**(found | {name: tuple(found[name]) for name in ("capabilities", "labels")}))


@dataclass(frozen=True)
class Selection:
    """Who may take part in a round and when it ends.

    ``goal`` uploads end it well, and ``over_selection`` times as many devices are asked; at the ``deadline`` (seconds after the
    plans are out) ``minimum`` will do. Devices are collected for at most ``window`` seconds. Empty sets exclude nobody; a device
    has one of ``tiers`` and all of ``labels`` and ``capabilities``. ``most_participations`` (0: any number) and ``separation``
    (rounds between two participations) hold per task.
    """

    goal: int
    minimum: int
    deadline: float
    window: float
    over_selection: float = 1.3
    population: str = ""
    tiers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    least_model: int = 0
    most_participations: int = 0
    separation: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.minimum <= self.goal and 1 <= self.over_selection <= 10 and self.deadline > 0 and self.window > 0):
            raise Refused(
                "a round takes 1 <= minimum <= goal, an over-selection of 1 to 10, and a deadline and window above 0 seconds; got "
                f"{self.minimum}, {self.goal}, {self.over_selection:g}, {self.deadline:g} and {self.window:g}"
            )

    @property
    def asked(self) -> int:
        """Devices that are given work."""
        return math.ceil(round(self.goal * self.over_selection, 9))

    def to_table(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Inverse of `to_table`."""
        return cls(**(dict(table) | {name: tuple(table[name]) for name in ("tiers", "labels", "capabilities")}))


def lacking(told: Told, selection: Selection) -> list[str]:
    """Capabilities that a round needs and the device did not state."""
    return [one for one in selection.capabilities if one not in told.capabilities]


def why_ineligible(told: Told, participations: tuple[int, int] | None, selection: Selection, number: int) -> str:
    """Why a device cannot take part in round ``number`` of a task; empty where it can.

    ``participations``: how often it took part in the task, and in which round last; None if never.
    """
    if selection.population and told.population and told.population != selection.population:
        return f"the round is for {selection.population!r}"
    if selection.tiers and told.tier not in selection.tiers:
        return f"the round is for devices of tier {', '.join(selection.tiers)}"
    if missing := [one for one in selection.labels if one not in told.labels]:
        return f"the round is for devices labelled {', '.join(missing)}"
    if missing := lacking(told, selection):
        return f"the device lacks {', '.join(missing)}"
    if told.model_version < selection.least_model:
        return f"the round needs model version {selection.least_model}, the device holds {told.model_version}"
    return why_resting(participations, selection, number)


def why_resting(participations: tuple[int, int] | None, selection: Selection, number: int) -> str:
    """The part of `why_ineligible` that is about earlier rounds."""
    if participations is not None:
        times, last = participations
        if selection.most_participations and times >= selection.most_participations:
            return "the device has taken part as often as it may"
        if number - last < selection.separation:
            return f"the device took part in round {last}; {selection.separation} rounds lie between two"
    return ""


def choose(present: Sequence[int], selection: Selection, random: RandomBytes) -> list[int]:
    """The devices that are given work: `Selection.asked` of those present, drawn without replacement, ascending."""
    pool = sorted(set(present))
    for i in range(min(selection.asked, len(pool))):
        j = i + _below(len(pool) - i, random)
        pool[i], pool[j] = pool[j], pool[i]
    return sorted(pool[: selection.asked])


def _below(bound: int, random: RandomBytes) -> int:
    """A uniform integer below ``bound``; the bias of 2^-64 is nobody's gain."""
    return int.from_bytes(random(16), "big") % bound


class Progress(Enum):
    """Where a round stands."""

    GOING = "going on"
    DONE = "done"
    FAILED = "failed"


def judge_round(selection: Selection, asked: int, uploads: int, gone: int, elapsed: float) -> Progress:
    """What to do ``elapsed`` seconds after the plans went out to ``asked`` devices, of which ``gone`` said they give nothing."""
    if uploads >= min(selection.goal, asked):
        return Progress.DONE if uploads >= selection.minimum else Progress.FAILED
    if elapsed >= selection.deadline or uploads + gone >= asked:
        return Progress.DONE if uploads >= selection.minimum else Progress.FAILED
    return Progress.GOING
