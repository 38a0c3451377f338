"""A model's files on a device: by content, with one small pointer file that says which release is current and which was before.

Nothing that the pointer names is ever written to or removed, and the pointer changes by one rename, after everything it names is on
the disk. So a device that dies at any point has the old release or the new one. A release is tried before the switch; after it, it
is on probation until the device says that it is well (`Store.commit`), and too many starts without that go back to the one before.

Standard library only: an agent at rest and an app look here, and neither needs what reads a repository.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.registry.disk import Disk, alone

__all__ = ["POINTER", "Artefact", "Pointer", "Release", "Store", "clear_errors", "read_pointer"]

POINTER = "pointer.json"
_STARTS = 3  # of a release on probation, before the one before it is taken back


@dataclass(frozen=True)
class Artefact:
    """A file of a release: SHA-256 in hexadecimal, bytes, and `file` or `tar`."""

    digest: str
    size: int
    form: str


@dataclass(frozen=True)
class Release:
    """A version and its files by `TIER/RUNTIME`."""

    version: int
    files: Mapping[str, Artefact]


@dataclass(frozen=True)
class Pointer:
    """What is installed. ``highest`` is the highest version that was installed or found unfit; nothing below is taken again.

    ``starts`` counts starts of ``current`` since it was installed; None once it is committed.
    """

    current: Release | None = None
    previous: Release | None = None
    highest: int = 0
    starts: int | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """JSON."""

        def plain(release: Release | None) -> Any:
            return release and {"version": release.version, "files": {name: vars(one) for name, one in release.files.items()}}

        held = {"current": plain(self.current), "previous": plain(self.previous), "highest": self.highest, "starts": self.starts,
                "unfit": dict(self.unfit)}  # fmt: skip
        return json.dumps(held, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, where: Path) -> Pointer:
        """Raises Refused where the bytes are no pointer."""

        def release(held: Any) -> Release | None:
            return held and Release(int(held["version"]), {name: Artefact(**one) for name, one in held["files"].items()})

        try:
            held = json.loads(data)
            starts = None if held["starts"] is None else int(held["starts"])
            return cls(release(held["current"]), release(held["previous"]), int(held["highest"]), starts, dict(held["unfit"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(
                f"{where} is damaged, and says which release is installed: put a copy of it back, or remove it, and the agent "
                "installs the assigned release anew"
            ) from None


def read_pointer(directory: Path) -> Pointer:
    """What is installed; for the app, which needs no lock: the pointer is always whole, and its files stay while it names them.

    Raises:
        Refused: the pointer is there and is damaged, or cannot be read. It is never taken for one of nothing.
    """
    path = directory / POINTER
    try:
        return Pointer.decode(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return Pointer()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); its owner must be the user of the agent") from error


class Store:
    """One model's directory, held by one agent at a time.

    Raises:
        TryAgain: another agent holds it.
        Refused: the pointer is damaged.
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._directory, self._files, self._disk = directory, directory / "files", disk or Disk()
        self._files.mkdir(parents=True, exist_ok=True)
        self._held = contextlib.ExitStack()
        self._held.enter_context(alone(directory))
        try:
            self.pointer = read_pointer(directory)
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def path(self, digest: str) -> Path:
        """Where the file with this content is, or would be."""
        return self._files / digest

    def holds(self, digest: str) -> bool:
        """Whether it is there, and whole."""
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def held(self) -> list[bytes]:
        """Digests of all files that are there and whole."""
        return [bytes.fromhex(path.name) for path in self._files.iterdir() if len(path.name) == 64 and self.holds(path.name)]

    def adopt(self, source: Path, digest: str) -> None:
        """Take over a file that is verified and on the disk, in the same file system."""
        with clear_errors(self._directory):
            self._disk.move(source, self.path(digest))

    def add(self, data: bytes, digest: str) -> None:
        """Keep verified content."""
        with clear_errors(self._directory):
            self._disk.put(self.path(digest), data)

    def switch(self, release: Release) -> None:
        """Make a release current, on probation; the current one becomes the previous one.

        Raises:
            Refused: its version is not above all before it, or one of its files is not there.
        """
        if release.version <= self.pointer.highest:
            raise Refused(f"release {release.version} is not above {self.pointer.highest}; versions only go up")
        for name, one in release.files.items():
            if not self.holds(one.digest):
                raise Refused(f"{name} of release {release.version} is not there, or damaged")
        # A release on probation is no place to go back to, unless there is no other.
        well = self.pointer.starts is None or self.pointer.previous is None
        previous = self.pointer.current if well else self.pointer.previous
        self._point(replace(self.pointer, current=release, previous=previous, highest=release.version, starts=0))

    def start(self) -> Release | None:
        """Called when the device's software starts: the release to run, None if there is none.

        One whose files are damaged, or that was started too often without `commit`, gives way to the one before.
        """
        pointer = self.pointer
        if pointer.current is None:
            return None
        if not all(self.holds(one.digest) for one in pointer.current.files.values()):
            return self.fall_back("its files are damaged")
        if pointer.starts is not None:
            if pointer.starts >= _STARTS and pointer.previous is not None:
                return self.fall_back(f"{pointer.starts} starts, and never well")
            self._point(replace(pointer, starts=pointer.starts + 1))
        return self.pointer.current

    def commit(self) -> None:
        """The current release is well."""
        if self.pointer.starts is not None:
            self._point(replace(self.pointer, starts=None))

    def fall_back(self, reason: str) -> Release:
        """Go back to the release before; its version stays below ``highest``, so the unfit one is not taken again.

        Raises:
            Refused: there is none whose files are whole.
        """
        bad, good = self.pointer.current, self.pointer.previous
        if bad is None or good is None or not all(self.holds(one.digest) for one in good.files.values()):
            raise Refused(f"{self._directory}: no release before to go back to ({reason})")
        unfit = {**self.pointer.unfit, str(bad.version): reason}
        self._point(replace(self.pointer, current=good, previous=None, starts=None, unfit=unfit))
        return good

    def refuse(self, version: int, reason: str) -> None:
        """Note that a release was tried and found unfit: it is not tried again."""
        unfit = {**self.pointer.unfit, str(version): reason}
        self._point(replace(self.pointer, highest=max(version, self.pointer.highest), unfit=unfit))

    def collect(self) -> int:
        """Remove every file that the pointer does not name; how many."""
        named = {
            one.digest for release in (self.pointer.current, self.pointer.previous) if release for one in release.files.values()
        }
        found = [path for path in self._files.iterdir() if path.name not in named]
        with clear_errors(self._directory):
            for path in found:
                self._disk.remove(path)
        return len(found)

    def _point(self, pointer: Pointer) -> None:
        with clear_errors(self._directory):
            self._disk.put(self._directory / POINTER, pointer.encode())
        self.pointer = pointer


@contextlib.contextmanager
def clear_errors(directory: Path) -> Iterator[None]:
    """Errors of the disk in ``directory`` as `TryAgain`."""
    try:
        yield
    except FedcoreError:
        raise
    except OSError as error:
        raise TryAgain(f"{directory}: cannot be written ({error.strerror}); what is installed stays") from error
