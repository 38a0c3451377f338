"""What each step of `simulations.all` costs: simulated runs of the same scenario, each with one step more, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedcore.state.sqlite import RunStore
from simulations.all.fleet import fedcore
from simulations.all.people import PEOPLE

__all__ = ["SIMULATED", "Row", "Step", "equal_bits", "of_run", "shown", "simulate"]

_PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5")
_SUMMED = ("secagg.enabled=true", "secagg.minimum_survivors=6")


@dataclass(frozen=True)
class Step:
    """A simulated run: the scenario with ``settings``; ``against`` names the step that it is compared with."""

    name: str
    against: str
    settings: tuple[str, ...]


SIMULATED = (
    Step("fp32", "", ("quantization.enabled=false",)),
    Step("+ QAT, int8", "fp32", ()),
    Step("+ DP-SGD", "+ QAT, int8", _PRIVATE),
    Step("+ integers of a sum", "+ DP-SGD", (*_PRIVATE, *_SUMMED, "secagg.simulate=arithmetic")),
    Step("+ masks", "+ integers of a sum", (*_PRIVATE, *_SUMMED)),
)
"""From the plain mean of fp32 models to all that the devices do. The last two differ in the masks alone."""


@dataclass(frozen=True)
class Row:
    """A line of the table. ``accuracy`` is over all held-out windows, of the model that a device would be given (of ``fp32``, the
    float one); ``points`` are hundredths more than ``against``; ``up`` and ``down`` are a device's bytes in one round, ``seconds``
    those of all rounds."""

    name: str
    against: str
    accuracy: float
    points: float | None
    up: float | None
    down: float | None
    seconds: float | None
    note: str


def simulate(step: Step, folder: Path, scenario: str) -> dict[str, Any]:
    """Run it in ``folder``/TWIN; its result, with ``directory``."""
    place = f"twin-{SIMULATED.index(step)}"
    settings = [part for one in step.settings for part in ("--set", one)]
    said = fedcore(folder, "simulate", scenario, "--out", place, "--json", *settings).splitlines()
    return dict(json.loads(said[-1])) | {"directory": str(folder / place)}


def of_run(name: str, against: Row | None, result: Mapping[str, Any], note: str) -> Row:
    """The line of a run, simulated or not."""
    accuracy = float(result["accuracy"] if result["int8_accuracy"] is None else result["int8_accuracy"])
    share = PEOPLE * int(result["rounds"])
    points = 100 * (accuracy - against.accuracy) if against else None
    up, down = float(result["bytes_up"]) / share, float(result["bytes_down"]) / share
    return Row(name, against.name if against else "", accuracy, points, up, down, float(result["seconds"]), note)


def equal_bits(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same master and the same int8 model, to the bit."""
    masters = [_master(one) for one in (a, b)]
    files = [(one / "model" / "model.fcm").read_bytes() for one in (a, b)]
    return bool(np.array_equal(masters[0].view(np.uint32), masters[1].view(np.uint32))) and files[0] == files[1]


def _master(directory: Path) -> np.ndarray:
    store = RunStore(directory)
    try:
        last = store.latest()
    finally:
        store.close()
    if last is None:
        raise SystemExit(f"{directory} has no committed round")
    return np.ascontiguousarray(last.arrays["master"], np.float32)


def shown(rows: Sequence[Row]) -> Table:
    """The table, for a terminal."""
    table = Table("step", "against", "accuracy", "points", "up", "down", "seconds", "what is compared", box=None, padding=(0, 2))
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield (
            row.name, row.against, f"{row.accuracy:.4f}", "" if row.points is None else f"{row.points:+.2f}",
            *("" if size is None else f"{size / 1000:.1f} kB" for size in (row.up, row.down)),
            "" if row.seconds is None else f"{row.seconds:.1f}", row.note,
        )  # fmt: skip
