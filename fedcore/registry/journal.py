"""Audit records of rollouts: JSON lines, each with the hash of the one before, on the disk before what they tell of is done.

A record that is changed, removed or put in breaks the chain. That the end was cut off shows only to who kept the last hash, so
publish it now and then. The hash is SHA-256 over the line's JSON without `hash`, keys sorted, no spaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedcore.errors import Refused, TryAgain

__all__ = ["GENESIS", "Journal", "check_chain", "held", "plain"]

GENESIS = "0" * 64
_TURN = 0.05  # seconds between two tries


class Journal:
    """One file of records, one writer. A last line that a kill left torn is removed; anything else that is wrong is refused.

    Raises:
        Refused: the chain is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.records, self.head = check_chain(whole, str(path))
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def append(self, record: Mapping[str, Any]) -> str:
        """Make a record durable; its hash.

        Raises:
            TryAgain: the disk is full or cannot be written; nothing was recorded, and what the record tells of must not be done.
        """
        content = {**record, "number": self.records, "before": self.head}
        digest = hashlib.sha256(_canonical(content)).hexdigest()
        line = _canonical({**content, "hash": digest}) + b"\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, size)
            raise TryAgain(f"{self._path} cannot be written ({error.strerror}); nothing was recorded") from error
        self.records, self.head = self.records + 1, digest
        return digest


@contextlib.contextmanager
def held(path: Path, seconds: float) -> Iterator[None]:
    """While no other process writes to this journal; the system lets go of it when this one dies.

    Raises:
        TryAgain: another one does, for longer than ``seconds``, or there can be no lock beside the file.
    """
    end = time.monotonic() + seconds
    try:
        handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise TryAgain(f"{path} cannot be held ({error.strerror})") from error
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TryAgain(f"{path}: somebody else decides at this moment") from None
                time.sleep(_TURN)
        yield
    finally:
        os.close(handle)


def check_chain(data: bytes, where: str = "records") -> tuple[int, str]:
    """Number of records and the last hash.

    Raises:
        Refused: a record is damaged, or does not follow the one before it.
    """
    head = GENESIS
    lines = data.splitlines()
    for number, line in enumerate(lines):
        try:
            content = json.loads(line)
            digest = content.pop("hash")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise Refused(f"{where}: line {number + 1} is no audit record") from None
        follows = content.get("before") == head and content.get("number") == number
        if not follows or hashlib.sha256(_canonical(content)).hexdigest() != digest:
            raise Refused(f"{where}: line {number + 1} was changed, or one before it was removed or put in")
        head = digest
    return len(lines), head


def plain(value: Any) -> Any:
    """The same for JSON, which has neither infinity nor what is no number: None stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
