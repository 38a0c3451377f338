"""What devices remember of their uploads, so that nobody has to take the gateways' word for what was acknowledged.

A journal is JSON lines; `read_journal` reads the logs of `fedcore-device` as well, which say the same in words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import Refused

__all__ = ["ACKNOWLEDGED", "ENDED", "MADE", "REFUSED", "Entry", "append", "read_journal"]

MADE, ACKNOWLEDGED, REFUSED, ENDED = "made", "acknowledged", "refused", "ended"
_WORDS = re.compile(r"upload acknowledged: round (\d+) of (\S+), sha256 ([0-9a-f]{64})")  # as the agent's log has it


@dataclass(frozen=True)
class Entry:
    """``event`` is "made" (before the first attempt to send), "acknowledged", "refused", or "ended" (the identity is not wanted any
    more). ``round`` is the plan's; ``digest`` the SHA-256 of the upload; ``text`` why."""

    event: str
    task: str = ""
    round: int = 0
    digest: str = ""
    text: str = ""


def append(journal: Path, entry: Entry) -> None:
    """Add an entry; it is on the disk when this returns. What a crash left half written is ended first."""
    with journal.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(asdict(entry)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> list[Entry]:
    """The entries of a journal, or of an agent's log. A line that a crash left half written is none.

    Raises:
        Refused: the file cannot be read.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    found = [_read(line) for line in lines]
    return [one for one in found if one is not None]


def _read(line: str) -> Entry | None:
    if words := _WORDS.search(line):
        return Entry(ACKNOWLEDGED, words[2], int(words[1]), words[3])
    try:
        table: Any = json.loads(line)
        return Entry(**table) if isinstance(table, Mapping) and "event" in table else None
    except (ValueError, TypeError):
        return None
