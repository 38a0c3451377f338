"""What gateways and the deciders of rollouts share: rollouts, who joined which arm when, what devices report, and what they run.

It lies in the same file or server as the rest of a `fedcore.state.gateway.GatewayStore`, which gives it as ``releases``. A row for
each device, never one document for all: a check-in costs the same in a fleet of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Holding", "Membership", "Outcome", "ReleaseStore", "RolloutEntry", "Visit", "Worst"]


@dataclass(frozen=True)
class RolloutEntry:
    """A rollout: the ``number``-th of its model (from 1, the highest is the current one). ``revision`` (from 1) rises with every
    change of ``document``, which is JSON."""

    name: str
    model: str
    number: int
    revision: int
    document: str


@dataclass(frozen=True)
class Membership:
    """A device's part in a rollout. ``values`` holds the highest of each that it reported before ``closes`` (Unix seconds); None:
    it said nothing."""

    device: int
    arm: str
    hardware: str
    joined: float
    closes: float
    values: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Worst:
    """What a device reports of a rollout, counted only where it is in this ``arm``."""

    rollout: str
    arm: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Holding:
    """What a device runs of a model; ``note`` is why it refused another release, if it did. A store keeps the note of an earlier
    visit until there is another one, or the device runs another version."""

    device: int
    model: str
    version: int
    tier: str = ""
    runtime: str = ""
    hardware: str = ""
    labels: tuple[str, ...] = ()
    seen: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Visit:
    """A device that asks which release it should have. ``known``: the current rollout of the model and its revision, as the gateway
    knows it (None: no rollout). ``joining``: how the device takes part, if it does not yet and its arm has fewer than ``most``."""

    holding: Holding
    known: tuple[str, int] | None = None
    joining: Membership | None = None
    most: int = 0
    reports: tuple[Worst, ...] = field(default=())


@dataclass(frozen=True)
class Outcome:
    """``current``: whether the gateway's knowledge was; nobody joined if not. ``member``: the device's part in the current rollout.

    ``sequence`` is above that of every outcome before for the device, and not below the milliseconds of the visit.
    """

    current: bool
    member: Membership | None
    sequence: int


class ReleaseStore(Protocol):
    """Part of a `GatewayStore`; the same promises hold: what a method says it did is on the disk when it returns."""

    def rollouts(self) -> list[RolloutEntry]:
        """All rollouts, by model and number."""
        ...

    def advance_rollout(self, change: RolloutEntry) -> bool:
        """Add a rollout (revision 1; its number follows the last of its model), or replace revision - 1 of it; False, without
        effect, where that is not what is there."""
        ...

    def visit(self, visit: Visit) -> Outcome:
        """Keep what a device says, and let it join, in one commit."""
        ...

    def prune_rollouts(self, model: str, keep: int) -> None:
        """Forget a model's rollouts but the last ``keep`` (at least 1), with everybody in them."""
        ...

    def members(self, rollout: str) -> list[Membership]:
        """Everybody in a rollout, by device. Devices that were forgotten are left out, but count among an arm's ``most``."""
        ...

    def holdings(self, model: str) -> list[Holding]:
        """What devices run of a model, by device."""
        ...
