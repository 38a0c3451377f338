"""The directory of a run that begins: taken before any other process does, and gone again where nothing came of it."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import Refused

__all__ = ["Claim", "claim"]

_CHECKPOINTS = "checkpoints"
_FILES = ("config.toml*", "partition.json*", "metrics.jsonl*", "state.sqlite*", "ledger.sqlite*")  # with journals and temporaries


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
