"""What a device must not forget: one directory, in which every file is replaced whole and durably.

``identity.key`` (0600), ``enrolment.bin``, ``trust.bin``, ``gateway.json``; ``numbers.json`` (how far requests are numbered, the
highest server time), ``history.json`` (participations by task), ``round.json`` and ``round/`` (the round in progress), ``blobs/``
(what plans name, by SHA-256), ``problem.txt`` (what went wrong last). Nothing here imports more than the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedcore import durable
from fedcore.errors import Refused, TryAgain

__all__ = ["Participation", "State", "Work", "write_durably"]

_BLOCK = 256  # numbers of requests that are reserved with one write


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file: after a crash at any moment it is the old one or the new one, whole.

    Raises:
        TryAgain: the disk is full or cannot be written.
    """
    try:
        durable.write(path, data, mode)
    except OSError as error:
        raise TryAgain(f"{path} cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class Participation:
    """How often the device took part in a task, and in which round (attempt) last."""

    times: int = 0
    last_round: int = 0


@dataclass(frozen=True)
class Work:
    """A round in progress: the signed plan and the round's token, as they came; ``randomness`` is what the round's draws come from,
    and ``phase`` "accepted" or "trained" (then round/upload.bin is what is sent). The rest is what is reported at its end."""

    task: str
    round: int
    plan: bytes = field(repr=False)
    token: bytes = field(repr=False)
    randomness: Mapping[str, Any] = field(repr=False)
    invitation: bytes = field(default=b"", repr=False)
    phase: str = "accepted"
    fetch_ms: int = 0
    train_ms: int = 0
    told: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As JSON."""
        found = asdict(self)
        return json.dumps(found | {name: found[name].hex() for name in ("plan", "token", "invitation")}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Work:
        """Inverse of `encode`.

        Raises:
            Refused: it is no such document.
        """
        try:
            found = json.loads(data)
            return cls(**(found | {name: bytes.fromhex(found[name]) for name in ("plan", "token", "invitation")}))
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f"the round in progress cannot be read ({type(error).__name__})") from None


class State:
    """A device's directory, made if it is missing; not by those who only look at it (``make`` = False), who see a new one then.

    Raises:
        Refused: it cannot be made, or others may enter it.
    """

    def __init__(self, directory: Path, *, make: bool = True) -> None:
        self.directory = directory
        self.round, self.blobs = directory / "round", directory / "blobs"
        try:
            if make:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (make or directory.exists()) and directory.stat().st_mode & 0o077:
                raise Refused(f"{directory} holds keys and may be entered by others; its mode must be 0700")
            for one in (self.round, self.blobs) if make else ():
                one.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Refused(f"{directory} cannot be used ({error.strerror})") from error
        self._next = self._reserved = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the state.

        Raises:
            TryAgain: one uses it already.
        """
        with (self.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TryAgain(f"another fedcore-device uses {self.directory}") from None
            yield

    # Numbers

    def next_number(self) -> int:
        """A number that no request had before, also after a crash; it is durable before it is given."""
        if self._next >= self._reserved:
            known = self._numbers()
            self._next, self._reserved = known["reserved"], known["reserved"] + _BLOCK
            self._write("numbers.json", known | {"reserved": self._reserved})
        self._next += 1
        return self._next

    @property
    def floor(self) -> int:
        """The highest server time that was kept, Unix milliseconds."""
        return int(self._numbers()["floor"])

    def raise_floor(self, time: int) -> None:
        """Keep a server time, if it is higher."""
        known = self._numbers()
        if time > known["floor"]:
            self._write("numbers.json", known | {"floor": time})

    def _numbers(self) -> dict[str, int]:
        return {"reserved": 0, "floor": 0} | self._read("numbers.json")

    # Identity

    def keep(self, name: str, data: bytes) -> None:
        """Keep a file of the identity."""
        write_durably(self.directory / name, data)

    def kept(self, name: str) -> bytes:
        """A file of the identity; empty where there is none.

        Raises:
            Refused: it is there and cannot be read, which is no reason to begin as a new device.
        """
        path = self.directory / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise Refused(f"{path} cannot be read ({error.strerror}); its owner must be the user of the agent") from error

    # Participation

    def participation(self, task: str) -> Participation:
        """What is known of a task."""
        return Participation(**self._read("history.json").get(task, {}))

    def participate(self, task: str, number: int) -> None:
        """Note, before anything is trained, that the device takes part in a round."""
        before = self.participation(task)
        now = Participation(before.times + (number > before.last_round), max(number, before.last_round))
        self._write("history.json", self._read("history.json") | {task: asdict(now)})

    def history(self) -> dict[str, Participation]:
        """Participations by task."""
        return {task: Participation(**found) for task, found in self._read("history.json").items()}

    # The round

    def work(self) -> Work | None:
        """The round in progress; one that cannot be read is given up."""
        data = self.kept("round.json")
        try:
            return Work.decode(data) if data else None
        except Refused:
            self.end_work()
            return None

    def keep_work(self, work: Work) -> None:
        """Keep the round in progress."""
        self.keep("round.json", work.encode())

    def end_work(self) -> None:
        """Forget the round in progress and all that it left, its secrets first."""
        (self.directory / "round.json").unlink(missing_ok=True)
        for path in self.round.glob("*"):
            path.unlink()
        durable.sync(self.directory)

    def blob(self, digest: bytes) -> Path:
        """Where a blob lies, or will."""
        return self.blobs / digest.hex()

    def keep_blobs(self, digests: set[str]) -> None:
        """Forget the other blobs."""
        for path in self.blobs.iterdir():
            if path.name.split(".")[0] not in digests:
                path.unlink()

    # Problems, and the end

    @property
    def problem(self) -> str:
        """What went wrong last; empty where nothing did."""
        return self.kept("problem.txt").decode(errors="replace")

    @problem.setter
    def problem(self, text: str) -> None:
        if text != self.problem:
            with contextlib.suppress(TryAgain):  # a full disk is a problem itself
                self.keep("problem.txt", text.encode())

    def erase(self) -> None:
        """Delete keys, checkpoints, blobs and history; policy.toml, which the owner wrote, stays."""
        for path in sorted(self.directory.iterdir(), key=lambda path: path.name != "identity.key"):
            if path.name in {"policy.toml", "lock"}:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        durable.sync(self.directory)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        data = self.kept(name)
        if not data and not path.exists():
            return {}
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            raise Refused(f"{self.directory / name} is damaged; `fedcore-device forget` and a new enrolment begin anew") from None

    def _write(self, name: str, table: Mapping[str, Any]) -> None:
        write_durably(self.directory / name, json.dumps(table).encode())
