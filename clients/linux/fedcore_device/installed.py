"""Where installed models lie below an agent's directory, and what trying them showed. For the agent, its commands and apps.

``models/NAME/`` holds the slots of `fedcore.registry.slots`, ``trials.json`` (what the releases' self-tests measured here) and
``health/VERSION.bin`` (`runtime_health`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedcore.errors import Refused
from fedcore.registry.names import check_model
from fedcore.registry.slots import Pointer, read_pointer
from fedcore_device.state import write_durably

__all__ = ["TIERS", "Trial", "damaged", "health_path", "installed", "keep_trial", "model_directory", "names", "read_trials"]

TIERS = ("flagship", "entry", "wearable")
"""fedcore's own tiers, the largest first."""
_KEPT = 3  # trials: of both slots, and of one that was found unfit


@dataclass(frozen=True)
class Trial:
    """What a release's self-test showed on this device: the share of the batch that the worst of its files labels otherwise than
    expected (None without a batch), milliseconds of one example, the most memory that the process held, the bytes that each file,
    by its SHA-256, takes when it is loaded, and joules of one example (None where nothing measures them)."""

    disagreement: float | None = None
    p95_ms: float = 0.0
    peak_bytes: int = 0
    loaded_bytes: Mapping[str, int] = field(default_factory=dict)
    joules: float | None = None


def model_directory(directory: Path, model: str) -> Path:
    """Where a model's files are.

    Raises:
        Refused: a name that no model has.
    """
    return directory / "models" / check_model(model)


def installed(directory: Path) -> dict[str, Pointer]:
    """What every model's pointer says, by name; one that is damaged is left out, and `damaged` tells of it."""
    found = {}
    for name in names(directory):
        with contextlib.suppress(Refused):
            found[name] = read_pointer(directory / "models" / name)
    return found


def damaged(directory: Path) -> dict[str, str]:
    """Models whose pointer cannot be read, and what to do about it."""
    found = {}
    for name in names(directory):
        try:
            read_pointer(directory / "models" / name)
        except Refused as error:
            found[name] = str(error)
    return found


def names(directory: Path) -> list[str]:
    """Models that have a pointer, whole or not."""
    return [path.parent.name for path in sorted((directory / "models").glob("*/pointer.json"))]


def health_path(place: Path, version: int) -> Path:
    """The counters of a release in a model's directory."""
    return place / "health" / f"{version}.bin"


def read_trials(place: Path) -> dict[int, Trial]:
    """What self-tests in a model's directory showed, by version; nothing where it cannot be read."""
    try:
        return {int(version): Trial(**held) for version, held in json.loads((place / "trials.json").read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep_trial(place: Path, version: int, trial: Trial) -> None:
    """Keep one, and the newest of the others.

    Raises:
        TryAgain: the disk is full.
    """
    known = {**read_trials(place), version: trial}
    newest = sorted(known)[-_KEPT:]
    write_durably(place / "trials.json", json.dumps({str(one): asdict(known[one]) for one in newest}).encode())
