"""Run directories: what one holds, read and checked once.

`fedcore.report.page` draws one run, `fedcore.report.compare` puts several side by side; this module needs neither of them
nor a template engine, so listing runs stays cheap.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedcore.config import RunConfig, load_config
from fedcore.errors import Refused

__all__ = ["Run", "RunSummary", "list_runs", "number", "read_run"]

_MARKERS = ("config.toml", "metrics.jsonl", "result.json")


@dataclass(frozen=True)
class Run:
    """One run directory in memory. ``rounds`` are the lines of metrics.jsonl by ascending round number; ``partition``,
    ``clients`` and ``result`` are None while their files do not exist."""

    directory: Path
    config: RunConfig
    rounds: list[dict[str, Any]]
    partition: dict[str, Any] | None
    clients: dict[str, Any] | None
    result: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """A run writes its result last."""
        return self.result is not None

    @property
    def done(self) -> int:
        """The last round on record; 0 before the first."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def accuracy(self) -> float | None:
        """Of the fp32 master: the final one, or the latest of an unfinished run."""
        return self._latest("accuracy", "accuracy")

    @property
    def int8_accuracy(self) -> float | None:
        """Of the shipped int8 model; of an unfinished run the latest of the same model simulated in float."""
        return self._latest("int8_accuracy", "fake_quant_accuracy")

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of the run; of an unfinished one the sum over its rounds."""
        return self._sum("seconds", [timing.get("seconds") for timing in self._timings()])

    @property
    def clients_per_second(self) -> float | None:
        """Of the whole run; of an unfinished one the mean over its rounds, weighted by their time."""
        timed = [(number(timing, "clients_per_second"), number(timing, "seconds")) for timing in self._timings()]
        known = [(rate, seconds) for rate, seconds in timed if rate is not None and seconds]
        total = sum(seconds for _, seconds in known)
        mean = sum(rate * seconds for rate, seconds in known) / total if total else None
        return number(self.result, "clients_per_second") if self.finished else mean

    @property
    def bytes_up(self) -> float | None:
        """From clients to the coordinator, in the whole run or in the rounds so far."""
        return self._sum("bytes_up", [record.get("bytes_up") for record in self.rounds])

    @property
    def bytes_down(self) -> float | None:
        """From the coordinator to clients, in the whole run or in the rounds so far."""
        return self._sum("bytes_down", [record.get("bytes_down") for record in self.rounds])

    def _latest(self, key: str, round_key: str) -> float | None:
        if self.finished:
            return number(self.result, key)
        return next((value for record in reversed(self.rounds) if (value := number(record, round_key)) is not None), None)

    def _sum(self, key: str, parts: list[Any]) -> float | None:
        known = [value for part in parts if (value := number({key: part}, key)) is not None]
        return number(self.result, key) if self.finished else sum(known) if known else None

    def _timings(self) -> list[dict[str, Any]]:
        return [record.get("timing", {}) for record in self.rounds]


@dataclass(frozen=True)
class RunSummary:
    """One line of ``fedcore runs``. ``problem`` says why a damaged run cannot be read; its counts and accuracies are empty."""

    name: str
    directory: Path
    state: Literal["finished", "unfinished", "damaged"]
    done: int
    planned: int
    accuracy: float | None
    int8_accuracy: float | None
    size_bytes: int
    modified: datetime
    problem: str = ""


def read_run(directory: Path) -> Run:
    """Read a run directory. A torn last line of metrics.jsonl (its writer died, or is still writing) is left out.

    Raises:
        Refused: not a run directory, or a damaged file; one line that names the file (and line).
    """
    if not (directory / "config.toml").is_file():
        raise Refused(f"{directory}: not a run directory (it has no config.toml)")
    run = Run(
        directory=directory,
        config=load_config(directory / "config.toml"),
        rounds=_read_rounds(directory / "metrics.jsonl"),
        partition=_read_object(directory / "partition.json"),
        clients=_read_object(directory / "clients.json"),
        result=_read_object(directory / "result.json"),
    )
    _check_shapes(run)
    return run


def list_runs(root: Path) -> list[RunSummary]:
    """Every run directory directly below ``root``, the newest first; damaged ones are listed as damaged.

    Raises:
        Refused: ``root`` cannot be listed.
    """
    try:
        entries = [entry for entry in root.iterdir() if any((entry / marker).is_file() for marker in _MARKERS)]
    except OSError as error:
        raise Refused(f"{root}: cannot be listed: {error.strerror}") from error
    return sorted((_summary(entry) for entry in entries), key=lambda run: (run.modified, run.name), reverse=True)


def number(record: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number of a record; None where it is absent, null, NaN or infinite (a diverged loss)."""
    value = record.get(key) if record else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _summary(directory: Path) -> RunSummary:
    files = [status for path in directory.rglob("*") if (status := _file_status(path))]
    size = sum(size for size, _ in files)
    modified = datetime.fromtimestamp(max((time for _, time in files), default=0.0), UTC)
    try:
        run = read_run(directory)
    except Refused as error:
        return RunSummary(directory.name, directory, "damaged", 0, 0, None, None, size, modified, str(error))
    state: Literal["finished", "unfinished"] = "finished" if run.finished else "unfinished"
    planned = run.config.run.rounds
    return RunSummary(directory.name, directory, state, run.done, planned, run.accuracy, run.int8_accuracy, size, modified)


def _file_status(path: Path) -> tuple[int, float] | None:
    """Size and time of a regular file; None for anything else, and for a file that a live run has just replaced."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime) if path.is_file() and not path.is_symlink() else None


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    content = _read_bytes(path)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError as error:
        raise Refused(f"{path}: damaged: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path}: damaged: not a JSON object")
    return value


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    """Lines by round number. A round that was repeated after a crash counts once, as it went the last time."""
    *lines, tail = (_read_bytes(path) or b"").split(b"\n")
    records = [_read_line(line, f"{path}, line {count}") for count, line in enumerate(lines, 1)]
    with contextlib.suppress(Refused):  # no line end after it: the write was cut off
        records += [_read_line(tail, str(path))] if tail else []
    return [record for _, record in sorted({record["round"]: record for record in records}.items())]


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise Refused(f"{where}: damaged: not a JSON object") from error
    if not isinstance(record, dict) or type(record.get("round")) is not int:
        raise Refused(f'{where}: damaged: not an object with an integer "round"')
    for key, kind in {"dropped": list, "federated": dict, "timing": dict}.items():
        if not isinstance(record.get(key, kind()), kind):
            raise Refused(f"{where}: damaged: {key} is not a {kind.__name__}")
    if not all(isinstance(item, dict) for item in record.get("dropped", [])):
        raise Refused(f"{where}: damaged: dropped is not a list of objects")
    return record


def _check_shapes(run: Run) -> None:
    if run.partition is not None:
        labels, counts = run.partition.get("labels"), run.partition.get("label_counts")
        if not isinstance(labels, list) or not isinstance(counts, list) or not all(_is_counts(row, len(labels)) for row in counts):
            path = run.directory / "partition.json"
            raise Refused(f"{path}: damaged: label_counts must hold a row for each client with a count for each label")
    if run.clients is not None:
        accuracy, examples = run.clients.get("accuracy"), run.clients.get("examples")
        if not isinstance(accuracy, list) or not isinstance(examples, list) or len(accuracy) != len(examples):
            raise Refused(f"{run.directory / 'clients.json'}: damaged: accuracy and examples must be lists of one length")


def _is_counts(row: Any, length: int) -> bool:
    return isinstance(row, list) and len(row) == length and all(type(count) is int and count >= 0 for count in row)
