"""What the device's owner lets the federation do. Strictest by default; only a file on the device, policy.toml, loosens it.

Its sections and keys are the classes below and their fields: [plan] is `PlanPolicy`, [conditions] `Eligibility`, [limits] `Limits`,
[device] `DeviceFacts` and [updates] `UpdatePolicy`.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore_device.environment import Conditions
from fedcore_device.state import Participation

__all__ = ["DeviceFacts", "Eligibility", "Limits", "PlanPolicy", "Policy", "UpdatePolicy", "own_noise", "read_policy"]

_DAY = 24 * 3600 * 1000
_MINUTES = 24 * 60


@dataclass(frozen=True)
class PlanPolicy:
    """The least that is demanded of a plan, and how often the device takes part.

    ``noise_multiplier``: of the device's own DP-SGD, or of the noise that clients under secure aggregation add together; noise
    that a coordinator promises to add does not count. ``evaluation``: the device tells how well a model does on its held-out
    examples, where nothing but a sum of several devices' scores is seen, which has no noise; in the clear only where neither secure
    aggregation nor noise is demanded. ``minimum_devices``: contributions without which a round's result is thrown
    away; ``corrupt_devices``: those of them that may be in league with the coordinator. ``participations`` are those in one task.
    """

    secure_aggregation: bool = True
    noise_multiplier: float = 1.0
    minimum_devices: int = 100
    corrupt_devices: int = 33
    participations: int = 100
    evaluation: bool = False

    def check(self, plan: pb.Plan, settings: Mapping[str, Any], before: Participation, now: int) -> None:
        """Refuse a plan that is weaker; ``now`` in Unix milliseconds. Its signature, task and round are checked elsewhere.

        Raises:
            Refused: it is; the line names the key of policy.toml.
        """
        masked = plan.aggregation == pb.MASKED
        if self.secure_aggregation and not masked:
            raise Refused("the plan shows the update in the clear; [plan] secure_aggregation = true demands secure aggregation")
        if plan.expires_ms - plan.issued_ms > _DAY or plan.issued_ms > now + 600_000:
            raise Refused("the plan is good for more than a day, or was signed in the future")
        if plan.minimum_uploads < self.minimum_devices:
            raise Refused(
                f"the plan is content with {plan.minimum_uploads} devices; [plan] minimum_devices = {self.minimum_devices}"
            )
        if plan.kind == pb.EVALUATE and not self.evaluation:
            raise Refused("the plan asks for an evaluation; [plan] evaluation = true lets the device take part in one")
        own = own_noise(settings) if plan.kind == pb.TRAIN else 0.0  # a score has no noise
        if not masked and not own >= self.noise_multiplier:
            raise Refused(
                f"the plan's noise multiplier on the device is {own:g}; [plan] noise_multiplier = {self.noise_multiplier:g}"
            )
        if before.times >= self.participations:
            raise Refused(
                f"the device took part in {plan.task!r} {before.times} times; [plan] participations = {self.participations}"
            )


@dataclass(frozen=True)
class Eligibility:
    """When the device works. ``battery_percent``: the least charge; ``temperature``: the most degrees Celsius; ``free_storage``:
    the least bytes; ``windows``: spans of local time, all day where there is none. A span may go over midnight, and is judged by
    the wall clock of the moment, so that a change of clocks moves it along."""

    charging: bool = True
    unmetered: bool = True
    idle: bool = True
    battery_percent: int = 50
    temperature: float = 70.0
    free_storage: int = 200_000_000
    windows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for window in self.windows:
            _span(window)

    def why_not(self, found: Conditions, now: float) -> str:
        """Why the device does not work at ``now`` (Unix seconds); empty where it does."""
        for name, words in (("charging", "not charging"), ("unmetered", "on a metered network"), ("idle", "in use")):
            if getattr(self, name) and not getattr(found, name):
                return words
        if found.battery_percent is not None and found.battery_percent < self.battery_percent:
            return f"battery at {found.battery_percent} %, below {self.battery_percent}"
        if found.temperature is not None and found.temperature > self.temperature:
            return f"at {found.temperature:g} degrees, above {self.temperature:g}"
        if found.free_storage < self.free_storage:
            return f"{found.free_storage} bytes of storage free, below {self.free_storage}"
        local = time.localtime(now)
        minute = 60 * local.tm_hour + local.tm_min
        if self.windows and not any(_within(minute, *_span(window)) for window in self.windows):
            return f"outside of {', '.join(self.windows)}"
        return ""


@dataclass(frozen=True)
class Limits:
    """Of the child that trains: ``memory`` in bytes, ``seconds`` of a round's training; ``blob_bytes``: the largest download."""

    memory: int = 600_000_000
    seconds: int = 3600
    blob_bytes: int = 64_000_000


@dataclass(frozen=True)
class DeviceFacts:
    """What the device tells when it checks in; ``tell_examples``: report how many examples it trained on and their loss, where the
    plan protects nothing or single examples."""

    population: str = ""
    tier: str = ""
    labels: tuple[str, ...] = ()
    tell_examples: bool = False


@dataclass(frozen=True)
class UpdatePolicy(Eligibility):
    """Which released models the agent installs, and when; the conditions are an update's own. None without ``models``.

    ``runtime``: whose files; ``repository``: https://... to fetch them from, the gateway where it is empty; ``minimum_version``:
    no release below it; ``largest_bytes``: of a file. ``agreement``, ``p95_ms`` (0: any), ``memory`` and ``seconds`` are what a
    release has to keep in its self-test. After ``probation`` seconds without trouble it is there to stay.
    """

    charging: bool = False
    idle: bool = False
    battery_percent: int = 20
    models: tuple[str, ...] = ()
    runtime: str = "onnx"
    repository: str = ""
    minimum_version: int = 1
    largest_bytes: int = 256_000_000
    agreement: float = 0.8
    p95_ms: float = 0.0
    memory: int = 600_000_000
    seconds: int = 120
    probation: int = 3600


@dataclass(frozen=True)
class Policy:
    """The owner's policy."""

    plan: PlanPolicy = field(default_factory=PlanPolicy)
    conditions: Eligibility = field(default_factory=Eligibility)
    limits: Limits = field(default_factory=Limits)
    device: DeviceFacts = field(default_factory=DeviceFacts)
    updates: UpdatePolicy = field(default_factory=UpdatePolicy)


def own_noise(settings: Mapping[str, Any]) -> float:
    """The multiplier of the noise that a device adds by itself under a plan's settings; 0 where they name none, or no number."""
    named = settings.get("example-noise-multiplier", 0.0)
    return float(named) if isinstance(named, int | float) else 0.0


def read_policy(file: Path) -> Policy:
    """The policy in a file; the strictest where there is none.

    Raises:
        Refused: a key is unknown, or a value is of another kind.
    """
    try:
        table = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return Policy()
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read ({error})") from error
    kinds = {"plan": PlanPolicy, "conditions": Eligibility, "limits": Limits, "device": DeviceFacts, "updates": UpdatePolicy}
    for name in table:
        if name not in kinds:
            raise Refused(f"{file}: unknown section [{name}]; allowed: {', '.join(kinds)}")
    return Policy(**{name: _section(file, name, kinds[name], found) for name, found in table.items()})


def _section(file: Path, name: str, kind: type[Any], table: Any) -> Any:
    defaults = {one.name: getattr(kind(), one.name) for one in fields(kind)}
    given = {}
    for key, value in dict(table).items():
        if key not in defaults:
            raise Refused(f"{file}: [{name}] has no key {key}; allowed: {', '.join(defaults)}")
        like = defaults[key]
        if not _fits(value, like):
            raise Refused(f"{file}: [{name}] {key} = {value!r}; it is like {like!r}")
        given[key] = tuple(value) if isinstance(like, tuple) else type(like)(value)
    try:
        return kind(**given)
    except Refused as error:
        raise Refused(f"{file}: [{name}]: {error}") from None


def _fits(value: Any, like: Any) -> bool:
    """Whether a value of the file is of the kind of a default, and not negative."""
    if isinstance(like, tuple):
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if isinstance(like, bool | str):
        return isinstance(value, type(like))
    kinds = (int, float) if isinstance(like, float) else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0


def _span(window: str) -> tuple[int, int]:
    """Minutes since midnight of "22:00-06:00"."""
    try:
        first, last = (60 * int(part[:2]) + int(part[3:]) for part in window.split("-") if len(part) == 5 and part[2] == ":")
    except ValueError:
        first = last = -1
    if not (0 <= first < _MINUTES and 0 <= last <= _MINUTES and first != last):
        raise Refused(f'a window of local time is like "22:00-06:00", got {window!r}')
    return first, last


def _within(minute: int, first: int, last: int) -> bool:
    return first <= minute < last if first < last else minute >= first or minute < last
