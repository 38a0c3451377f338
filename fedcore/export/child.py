"""Work on converters and files of unknown origin, in a process that may crash, hang, swell or be cut off without harm.

A child has a time limit, a limit on the memory that it and its descendants hold (RLIMIT_AS would count address space, of which
torch reserves far more than it uses), and where the system permits a network namespace of its own, in which nothing can be reached.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import Refused, TryAgain

__all__ = ["Limits", "isolation", "run_job", "run_limited"]

_POLL = 0.05  # seconds between looks at the child
_WORDS = 300  # characters of a child's last line that are passed on
_ANSWER = 16 << 20  # bytes of an answer: a hostile file is described in as many words as it likes
_QUIET = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TF_CPP_MIN_LOG_LEVEL": "3",
    "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
    "PYTHONSAFEPATH": "1",  # the folder that somebody stands in, with a model from elsewhere, is no place to import from
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Seconds, and bytes of memory held at once."""

    seconds: float = 300.0
    memory: int = 6 << 30


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command prefix that takes the network away, or nothing where the system does not let us."""
    if not shutil.which("unshare"):
        return ()
    for prefix in (("unshare", "--net"), ("unshare", "--map-root-user", "--net")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if subprocess.run([*prefix, "true"], capture_output=True, check=False, timeout=10).returncode == 0:  # noqa: S603
                return prefix
    return ()


def run_job(job: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """One job of `fedcore.export.worker` in a child; returns its answer.

    Raises:
        Refused: the worker refused, crashed, or needed more than the limits allow; one line.
        TryAgain: the child could not be started.
    """
    doing = f"{Path(job['path']).name}: {job['task']}" if "path" in job else job["task"]
    with tempfile.TemporaryDirectory(prefix="fedcore-") as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps({**job, "parent": os.getpid()}))
        command = [sys.executable, "-m", "fedcore.export.worker", str(asked), str(answered)]
        problem = run_limited(command, limits, Path(folder))
        if problem:
            raise Refused(f"{doing} {problem}")
        try:
            if answered.stat().st_size > _ANSWER:
                raise Refused(f"{doing} answered with more than {_ANSWER >> 20} MB")
            answer: dict[str, Any] = json.loads(answered.read_text())
        except (OSError, ValueError) as error:
            raise Refused(f"{doing} left no answer") from error
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer


def run_limited(command: Sequence[str], limits: Limits, folder: Path) -> str | None:
    """Run ``command`` to its end, without network where possible; its temporary files and words go to ``folder``.

    Returns what went wrong in a few words, or None.
    """
    environment = {**os.environ, **_QUIET, "TMPDIR": str(folder), "MPLCONFIGDIR": str(folder)}
    log = folder / "words.txt"
    with log.open("wb") as words:
        try:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [*isolation(), *command],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise TryAgain(f"a process for an exporter could not be started: {error.strerror}") from error
        try:
            problem = _watch(child, limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # descendants too, also of one that has ended
            child.wait()
    if problem or child.returncode == 0:
        return problem
    reason = f"was ended by signal {-child.returncode}" if child.returncode < 0 else f"stopped with code {child.returncode}"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
    said = "".join(letter if letter.isprintable() else "?" for letter in last[0][:_WORDS])  # it may quote a file
    return f"{reason}: {said}" if said else reason


def _watch(child: subprocess.Popen[bytes], limits: Limits) -> str | None:
    end = time.monotonic() + limits.seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL)
            return None
        if time.monotonic() > end:
            return f"took longer than {limits.seconds:g} s"
        if sum(map(_resident, _family(child.pid))) > limits.memory:
            return f"needed more than {limits.memory >> 20} MB of memory"


def _family(root: int) -> Iterator[int]:
    """A process and its descendants, where /proc tells."""
    yield root
    for path in Path(f"/proc/{root}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for one in path.read_text().split():
                yield from _family(int(one))


def _resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
