"""A compiled trainer that an app developer installed on the device (`fedcore native build`), in the place of ONNX Runtime.

Nothing of it is ever downloaded. A library is used for the training steps that its description names, on the processor that it was
built for, while its bytes are the described ones and nobody but root and the agent's user can change them; and after its answers
in a few checks were those of the step. Only the confined child loads it. What is done with its gradients is `trainer`'s, as ever.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import Refused
from fedcore.portable.library import MANIFEST, Library

__all__ = ["Choice", "Unfit", "choose", "default_directories", "onnxruntime_here", "opened", "why_not"]

_LOG = logging.getLogger(__name__)
_DESCRIPTION, _LIBRARY = 1 << 20, 1 << 26  # most bytes of either


class Unfit(Refused):
    """A library is not what the step needs, or not what its description says; another engine has to train."""


@dataclass(frozen=True)
class Choice:
    """What trains, and ``why``: the native library with this description, and this SHA-256 of its own; empty, ONNX Runtime."""

    description: str = ""
    sha256: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"native library {self.description}" if self.description else "ONNX Runtime"


def choose(directories: Sequence[Path], step: str, unfit: Mapping[str, str]) -> Choice:
    """The first library in the directories that does the training step with the SHA-256 ``step``, unless it is among those that
    failed before (``unfit``, by checksum); else ONNX Runtime, and why no library.

    Raises:
        Refused: ONNX Runtime is not installed.
    """
    reasons = []
    for path in (one for directory in directories for one in _descriptions(directory)):
        try:
            with opened(path) as (library, _):
                reason = unfit.get(library.sha256) or why_not(library, step)
                if not reason:
                    return Choice(str(path), library.sha256, "it is built for this training step")
                reasons.append(f"{path}: {reason}")
        except Unfit as error:
            reasons.append(str(error))
    why = "; ".join(reasons) or f"no native library in {', '.join(map(str, directories)) or 'any directory'}"
    if not onnxruntime_here():
        _LOG.warning("ONNX Runtime is not installed, and no native library fits: %s", why)
        raise Refused(f"the plan names training step {step[:16]}; this device has neither ONNX Runtime nor a library for it")
    return Choice(why=why)


def onnxruntime_here() -> bool:
    """Whether ONNX Runtime is installed; it is not loaded."""
    return importlib.util.find_spec("onnxruntime") is not None


def default_directories() -> tuple[Path, ...]:
    """Where libraries are looked for if nothing else is said."""
    places = [Path("/usr/local/lib"), Path("/usr/lib")]
    with suppress(RuntimeError):  # a user without a home
        places.append(Path.home() / ".local" / "lib")
    return tuple(place / "fedcore" / "native" for place in places)


def _descriptions(directory: Path) -> list[Path]:
    """Of libraries in a directory, and in the directories in it."""
    return [path for path in (directory / MANIFEST, *sorted(directory.glob(f"*/{MANIFEST}"))) if os.path.lexists(path)]


@contextmanager
def opened(description: Path) -> Iterator[tuple[Library, int]]:
    """A library's description, and the library as a file descriptor of just those bytes that the description names.

    Raises:
        Unfit: a file is missing, a link, may be changed by others, or is not what the description says.
    """
    for place in _way_to(description.parent):
        try:
            found = place.lstat()
        except OSError as error:
            raise Unfit(f"{place} cannot be looked at ({error.strerror})") from None
        _guarded(place, found)
    with _file(description, _DESCRIPTION) as descriptor:
        text = _all(descriptor)
    try:
        library = Library.from_json(text.decode(errors="replace"))
    except Refused as error:
        raise Unfit(f"{description}: {error}") from None
    if Path(library.file).name != library.file or not library.file.isprintable():
        raise Unfit(f"{description}: the library's file must lie beside it, got {library.file[:40]!r}")
    path = description.parent / library.file
    with _file(path, _LIBRARY) as descriptor:
        if hashlib.sha256(_all(descriptor)).hexdigest() != library.sha256:
            raise Unfit(f"{path}: its SHA-256 is not the one in {MANIFEST}")
        yield library, descriptor


def why_not(library: Library, step: str, machine: str = "", flags: Iterable[str] = ()) -> str:
    """Why a library cannot do the training step with this SHA-256 on a processor (by default this one's kind and /proc/cpuinfo);
    empty if it can."""
    machine, known = machine or platform.machine(), set(flags) or _processor_flags()
    if library.machine != machine:
        return f"it is built for {library.machine}, this machine is {machine}"
    if missing := [feature for feature in library.features if feature not in known]:
        return f"it needs a processor with {', '.join(missing)}"
    if step not in library.steps:
        return f"it is not built for training step {step[:16]}, but for another model, batch size or version"
    return ""


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").split())


def _way_to(directory: Path) -> list[Path]:
    """A directory and all above it, as it is named and as links lead to it."""
    named = directory.absolute()
    try:
        real = named.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Unfit(f"{directory} cannot be entered") from None
    return list(dict.fromkeys([named, *named.parents, real, *real.parents]))


def _guarded(path: Path, found: os.stat_result) -> None:
    """See that nobody but root and this user can change what is at a path.

    Raises:
        Unfit: somebody can.
    """
    if found.st_uid not in {0, os.geteuid()}:
        raise Unfit(f"{path} belongs to user {found.st_uid}; allowed are root and the agent's own")
    shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # there, others cannot touch what is not theirs
    if found.st_mode & 0o022 and not shared and not stat.S_ISLNK(found.st_mode):
        raise Unfit(f"{path} may be written by others; chmod go-w makes it right")


@contextmanager
def _file(path: Path, most: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unfit(f"{path} cannot be opened ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise Unfit(f"{path} is no file of at most {most} bytes")
        _guarded(path, found)
        yield descriptor
    finally:
        os.close(descriptor)


def _all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()
