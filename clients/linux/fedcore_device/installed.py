"""Where installed models lie below an agent's directory, and what trying them showed. For the agent, its commands and apps.

``models/NAME/`` holds the slots of `fedcore.registry.slots`, ``trials.json`` (what the releases' self-tests measured here) and
``health/VERSION.bin`` (`runtime_health`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedcore.errors import Refused
from fedcore.registry.slots import Pointer, read_pointer
from fedcore_device.state import write_durably

__all__ = ["TIERS", "Trial", "health_path", "installed", "keep_trial", "model_directory", "read_trials"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
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
    if not _NAME.fullmatch(model):
        raise Refused(f"{model!r} names no model: 1 to 64 letters, digits, dots, dashes and underscores, no dash or dot first")
    return directory / "models" / model


def installed(directory: Path) -> dict[str, Pointer]:
    """What every model's pointer says, by name; one that is damaged is left out."""
    found = {}
    for path in sorted((directory / "models").glob("*/pointer.json")):
        with contextlib.suppress(Refused, OSError):
            found[path.parent.name] = read_pointer(path.parent)
    return found


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
