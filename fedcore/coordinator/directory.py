"""The directory of a run: taken before any other process does, gone again where nothing came of it, and found again by a
continuation, which may change little."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedcore import durable
from fedcore.config import RunConfig, load_config
from fedcore.errors import Refused

__all__ = ["Claim", "begun", "claim", "continued", "next_directory", "write"]

# What may differ between a run and its continuation: nothing that a committed round depended on.
_MAY_CHANGE = {"run": {"rounds", "name"}, "engine": {"workers"}, "checkpoint": {"every", "keep"}, "cohort": {"timeout", "attempts"}}
_CHECKPOINTS = "checkpoints"
_FILES = (
    "config.toml*",
    "partition.json*",
    "metrics.jsonl*",
    "state.sqlite*",
    "ledger.sqlite*",
    "operator.jsonl",
    "blamed.json",
)  # with journals and temporaries


@dataclass(frozen=True)
class Claim:
    """A directory that was empty, or missing: then ``made`` are those that had to be made, innermost first."""

    directory: Path
    made: tuple[Path, ...]

    def give_up(self) -> None:
        """Remove what a run leaves that has not begun; nothing that somebody else put there."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.directory / _CHECKPOINTS)
            for path in [path for pattern in _FILES for path in self.directory.glob(pattern)]:
                path.unlink()
            for one in self.made:
                one.rmdir()


def claim(directory: Path) -> Claim:
    """Take an empty or missing directory for a new run.

    Raises:
        Refused: another run began there in the meantime.
    """
    made = tuple(one for one in (directory, *directory.parents) if not one.exists())
    directory.mkdir(parents=True, exist_ok=True)
    try:
        (directory / _CHECKPOINTS).mkdir()  # of two processes only one succeeds
    except FileExistsError:
        raise Refused(f"--out {directory}: another run has just begun there; choose another directory") from None
    return Claim(directory, made)


def next_directory(root: Path, name: str) -> Path:
    """The first unused ``root/name-NNN``."""
    number = 1
    while (root / f"{name}-{number:03d}").exists():
        number += 1
    return root / f"{name}-{number:03d}"


def begun(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration of a run that begins in an empty or missing directory.

    Raises:
        Refused: the directory is neither.
    """
    if directory.exists() and not directory.is_dir():
        raise Refused(f"--out {directory}: is a file; a run needs a directory")
    if (directory / "config.toml").exists():
        raise Refused(
            f"--out {directory}: holds a run already; add --resume to continue it, delete it, or choose another directory"
        )
    if directory.exists() and any(directory.iterdir()):
        raise Refused(f"--out {directory}: is not empty; a new run needs a directory of its own")
    return config


def continued(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration of a continuation: the recorded one, with what may change taken from ``config``.

    Raises:
        Refused: there is no run, part of it is gone, or ``config`` is of another one.
    """
    if not (directory / "config.toml").exists():
        raise Refused(f"--resume: {directory} holds no run")
    if _size(directory / "metrics.jsonl") and not _size(directory / "state.sqlite"):
        raise Refused(f"--resume: {directory} has finished rounds, but its state.sqlite that holds them is gone or empty")
    recorded = load_config(directory / "config.toml")
    ours, theirs = config.settings(), recorded.settings()
    if ours.keys() != theirs.keys():
        raise Refused(f"--resume: the run in {directory} protects other units of [privacy] than the scenario")
    if ours["engine"]["name"] == "auto":
        ours["engine"]["name"] = theirs["engine"]["name"]
    if ours["engine"]["device"] == "auto":
        ours["engine"]["device"] = theirs["engine"]["device"]
    for section, keys in ours.items():
        for key, value in keys.items():
            if value != theirs[section][key] and key not in _MAY_CHANGE.get(section, ()):
                raise Refused(
                    f"--resume: {section}.{key} is {value!r}, the run in {directory} has {theirs[section][key]!r}; "
                    "a continued run may change only the number of rounds, workers, timeout, attempts and checkpoints"
                )
    if any(one.target_epsilon for one in recorded.privacy) and config.run.rounds != recorded.run.rounds:
        raise Refused(
            f"--resume: run.rounds = {config.run.rounds}, but privacy.target_epsilon was solved for {recorded.run.rounds} rounds"
        )
    changed = {section: {key: ours[section][key] for key in keys} for section, keys in _MAY_CHANGE.items()}
    for section, values in changed.items():
        recorded = recorded.replace(section, **values)
    return dataclasses.replace(recorded, folder=config.folder, release=config.release)


def write(path: Path, content: str | bytes) -> None:
    """Put a file in place durably and as a whole, folders included: whoever reads it finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, content.encode() if isinstance(content, str) else content)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
