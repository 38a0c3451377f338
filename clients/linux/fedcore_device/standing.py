"""Where a device stands with the releases of a model: what was agreed with the gateway, and how the current one does. Decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedcore.errors import Refused
from fedcore.registry.slots import Pointer
from fedcore_device.installed import Trial, damaged, health_path, installed, model_directory, read_trials
from fedcore_device.runtime_health import Health, read_health
from fedcore_device.state import State

__all__ = ["STANDINGS", "Standing", "judge", "model_table", "read_standings", "signals_of"]

STANDINGS = "updates.json"
_ENOUGH_CALLS, _ERRORS, _CRASHES = 20, 0.05, 2  # of a release on probation


@dataclass(frozen=True)
class Standing:
    """Where the device stands with a model. ``sequence``: of the last assignment; ``rollouts``: by version, as it named them;
    ``told``: versions whose failure the gateway knows; ``due``: when to ask again, ``switched``: when the current release was
    installed (Unix seconds, by the device's clock); ``failures`` in a row; ``problem``: the last one, empty where there is none."""

    sequence: int = 0
    rollouts: Mapping[str, str] = field(default_factory=dict)
    told: tuple[int, ...] = ()
    due: float = 0.0
    switched: float = 0.0
    failures: int = 0
    problem: str = ""


def read_standings(state: State) -> dict[str, Standing]:
    """By model.

    Raises:
        Refused: the file is damaged.
    """
    if not (state.directory / STANDINGS).exists():
        return {}
    try:
        held = json.loads(state.kept(STANDINGS))
        return {model: Standing(**(one | {"told": tuple(one["told"])})) for model, one in held.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Refused(f"{state.directory / STANDINGS} is damaged; remove it to begin anew with the next assignment") from None


def judge(health: Health, seconds: float, probation: float) -> tuple[str, str]:
    """ "well", "ill" or "wait", and why, for a release that was switched to ``seconds`` ago.

    It is ill if apps crashed twice when they loaded it, or one call in twenty fails; well after enough calls, or after
    ``probation`` seconds in which nobody may have used it.
    """
    calls, errors = health.counters["calls"], health.counters["errors"]
    if health.crashes >= _CRASHES:
        return "ill", f"apps did not survive loading it {health.crashes} times"
    if errors >= _CRASHES and errors > _ERRORS * calls:
        return "ill", f"{errors} of {calls} calls failed"
    if health.loading:
        return "wait", ""
    well = health.crashes == 0 and calls >= _ENOUGH_CALLS
    return ("well", "") if well or not 0 <= seconds < probation else ("wait", "")


def signals_of(trial: Trial | None, health: Health) -> dict[str, float]:
    """What a rollout is told of a release: what apps saw, and the self-test where none has run it yet."""
    found: dict[str, float] = {"errors": 0.0, "crash": 0.0}
    if trial is not None:
        found |= {"p95_ms": trial.p95_ms, "peak_bytes": float(trial.peak_bytes)}
        optional = {"disagreement": trial.disagreement, "joules": trial.joules}
        found |= {name: value for name, value in optional.items() if value is not None}
    seen = health.signals()
    if "peak_bytes" in seen and "peak_bytes" in found:
        seen["peak_bytes"] = max(seen["peak_bytes"], found["peak_bytes"])
    return found | seen


def model_table(state: State) -> dict[str, dict[str, Any]]:
    """What people are shown of every model that is installed, or was asked for: versions, probation, health, the last problem."""
    standings, pointers, broken = read_standings(state), installed(state.directory), damaged(state.directory)
    found = {}
    for model in sorted({*standings, *pointers, *broken}):
        pointer = pointers.get(model, Pointer())
        version = pointer.current.version if pointer.current else 0
        place = model_directory(state.directory, model)
        health = read_health(health_path(place, version)) if version else Health()
        found[model] = {
            "version": version, "previous": pointer.previous.version if pointer.previous else 0,
            "files": sorted(pointer.current.files) if pointer.current else [],
            "probation": pointer.current is not None and pointer.starts is not None, "unfit": dict(pointer.unfit),
            "signals": signals_of(read_trials(place).get(version), health) if version else {},
            "problem": broken.get(model) or standings.get(model, Standing()).problem,
        }  # fmt: skip
    return found
