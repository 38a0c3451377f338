"""Opening a model through the first delegate that can: accelerators in turn, then the CPU. Those that failed are remembered.

What failed for which file is kept in ``delegates.json`` of the model's directory, and before a delegate is tried at all: a driver
that takes the process with it is not tried by the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedcore.errors import FedcoreError, Refused
from fedcore_device.runtime_artefact import CPU, Opened, open_artefact
from fedcore_device.runtime_health import HealthFile
from fedcore_device.state import write_durably

__all__ = ["finite", "give_up_delegate", "one_line", "open_through"]

_LOG = logging.getLogger(__name__)
_FILE = "delegates.json"

Floats = npt.NDArray[np.float32]


def open_through(place: Path, path: Path, runtime: str, delegates: Sequence[str], threads: int, health: HealthFile) -> Opened:
    """The file at ``path``, opened through the first of ``delegates``, then the CPU, that runs an example of zeros.

    Args:
        place: the model's directory. runtime: what the file is made for.

    Raises:
        Refused: not even the CPU does, or the model's own words about its input do not fit it.
        FileNotFoundError: the file is not there.
    """
    for delegate in (one for one in delegates if one != CPU):
        if delegate in _failed(place, path.name):
            continue
        _remember(place, path.name, delegate, "a process did not survive it")
        try:
            opened = _tried(open_artefact(path, runtime, delegate, threads))
        except Refused as error:
            give_up_delegate(place, path.name, delegate, str(error), health)
            continue
        _remember(place, path.name, delegate, "")
        return opened
    return _tried(open_artefact(path, runtime, CPU, threads))


def give_up_delegate(place: Path, digest: str, delegate: str, reason: str, health: HealthFile) -> None:
    """Note that a delegate failed for a file, for good."""
    _remember(place, digest, delegate, reason)
    health.add(delegate_failures=1)
    _LOG.warning("%s of %s: %s; the next delegate is tried", digest[:16], place.name, reason)


def _tried(opened: Opened) -> Opened:
    """The same, after one example of zeros: memory is taken, and a delegate shows that it can.

    Raises:
        Refused: it cannot, or the model's own words about its input do not fit it.
    """
    facts = opened.facts
    if any(len(values) not in (1, opened.shape[0]) for values in (facts.mean, facts.std)) or 0.0 in facts.std:
        raise Refused(f"{opened.delegate}: the release's mean and deviation do not fit {opened.shape[0]} channels")
    try:
        finite(opened.logits(np.zeros((1, *opened.shape), np.float32)))
    except Exception as error:  # whatever a runtime or a driver says
        raise Refused(f"{opened.delegate} cannot run it: {one_line(error)}") from error
    return opened


def finite(logits: Floats) -> Floats:
    """The same.

    Raises:
        Refused: there is a value among them that is no number.
    """
    if not np.isfinite(logits).all():
        raise Refused("its logits are not finite")
    return logits


def _failed(place: Path, digest: str) -> dict[str, str]:
    """Delegates that failed for a file, and why."""
    try:
        return dict(json.loads((place / _FILE).read_bytes()).get(digest, {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(place: Path, digest: str, delegate: str, reason: str) -> None:
    """Keep why a delegate failed for a file, of which there are two at most; an empty reason takes it back."""
    files = {path.name for path in (place / "files").iterdir()}
    try:
        known = {name: dict(held) for name, held in json.loads((place / _FILE).read_bytes()).items() if name in files}
    except (OSError, ValueError, AttributeError, TypeError):
        known = {}
    known[digest] = {name: why for name, why in (known.get(digest, {}) | {delegate: reason}).items() if why}
    with contextlib.suppress(FedcoreError):  # a full disk: it is tried again by the next process
        write_durably(place / _FILE, json.dumps(known).encode())


def one_line(error: Exception) -> str:
    """What an error says, whoever raised it."""
    return str(error) if isinstance(error, FedcoreError) else " ".join(f"{type(error).__name__}: {error}".split())[:200]
