"""A release is tried in a process of its own before it is switched to: ``python -m fedcore_device.self_test DIRECTORY``.

The child is confined as the one that trains is: no network, no other programs, limits of memory and time. It opens every file on
the CPU, runs the release's public batch (an .npz with ``x`` float32 [n, *shape], normalised, and ``y`` [n], the labels that the
release is to give), and measures. A file whose loading ends the process ends the child, and neither the agent nor an app.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore_device.environment import energy_used
from fedcore_device.installed import Trial
from fedcore_device.sandbox import confine
from fedcore_device.state import write_durably

__all__ = ["Bounds", "self_test"]

_TURN = 0.05  # seconds between two looks at the child
_SINGLES = 40  # examples that are timed one by one
_MEASURED = 0.5  # seconds of runs whose energy is measured
_RESERVED = 1 << 30  # address space: stacks and arenas are most of it, and cost nothing
_PASSING = {signal.SIGKILL, signal.SIGTERM}  # the system's doing, or a person's: no finding about the release


@dataclass(frozen=True)
class Bounds:
    """What a release may take: bytes of the process, seconds for all of the test, milliseconds of one example (95th percentile; 0
    for any), and the share of the batch that it has to label as expected."""

    memory: int = 600_000_000
    seconds: float = 120.0
    p95_ms: float = 0.0
    agreement: float = 0.8


def self_test(files: Mapping[str, Path], batch: Path | None, bounds: Bounds) -> Trial:
    """Try a release's files, by TIER/RUNTIME.

    Raises:
        Refused: it is unfit; the line says how.
        TryAgain: the test could not be made.
    """
    with tempfile.TemporaryDirectory(prefix="fedcore-") as folder:
        job = {
            "files": {name: str(path) for name, path in files.items()}, "batch": str(batch or ""),
            "memory": bounds.memory + _RESERVED, "seconds": int(bounds.seconds) + 1,
        }  # fmt: skip
        told = _in_child(Path(folder), job, bounds)
    trial = Trial(
        told["disagreement"], told["p95_ms"], told["peak_bytes"],
        {files[name].name: size for name, size in told["loaded_bytes"].items()}, told["joules"],
    )  # fmt: skip
    _judge(trial, bounds)
    return trial


def _judge(trial: Trial, bounds: Bounds) -> None:
    if trial.disagreement is not None and trial.disagreement > 1 - bounds.agreement:
        raise Refused(f"self-test: agreement {1 - trial.disagreement:.3f} is below {bounds.agreement:g}")
    if bounds.p95_ms and trial.p95_ms > bounds.p95_ms:
        raise Refused(f"self-test: {trial.p95_ms:.1f} ms for an example, more than {bounds.p95_ms:g}")
    if trial.peak_bytes > bounds.memory:
        raise Refused(f"self-test: it took {trial.peak_bytes} bytes of memory, more than {bounds.memory}")


def _in_child(folder: Path, job: Mapping[str, Any], bounds: Bounds) -> dict[str, Any]:
    write_durably(folder / "job.json", json.dumps(job).encode())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    try:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
            [sys.executable, "-m", "fedcore_device.self_test", str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except OSError as error:
        raise TryAgain(f"self-test: no process could be started ({error.strerror})") from error
    try:
        _watch(process, bounds)
    finally:
        process.kill()
        process.wait()
    code = process.returncode
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        line = f"self-test: the process that loaded it was ended by {name}"
        raise TryAgain(line) if -code in _PASSING else Refused(line)
    try:
        told = dict(json.loads((folder / "result.json").read_bytes()))
    except (OSError, ValueError):
        raise Refused(f"self-test: the process that loaded it stopped with code {code}") from None
    if "passing" in told:
        raise TryAgain(f"self-test: {told['passing']}")
    if "unfit" in told:
        raise Refused(f"self-test: {told['unfit']}")
    return told


def _watch(process: subprocess.Popen[bytes], bounds: Bounds) -> None:
    end = time.monotonic() + bounds.seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TURN)
            return
        if _resident(process.pid) > bounds.memory:
            raise Refused(f"self-test: it took more than {bounds.memory} bytes of memory")
        if time.monotonic() > end:
            raise Refused(f"self-test: it took longer than {bounds.seconds:g} s")


def _resident(pid: int | str) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _main() -> int:
    folder = Path(sys.argv[1])
    told: dict[str, Any]
    try:
        told = _measure(json.loads((folder / "job.json").read_bytes()))
    except OSError as error:
        told = {"passing": f"a file cannot be read ({error.strerror})"}
    except TryAgain as error:
        told = {"passing": str(error)}
    except (FedcoreError, MemoryError) as error:
        told = {"unfit": str(error) or "it takes more memory than it may"}
    write_durably(folder / "result.json", json.dumps(told).encode())
    return 0


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    from fedcore_device.runtime_artefact import default_delegates, open_artefact, usable_runtimes

    runtimes = {name.partition("/")[2] for name in job["files"]}
    if missing := runtimes - set(usable_runtimes()):
        raise TryAgain(f"this device has no runtime for {', '.join(sorted(missing))}: no finding about the release")
    for runtime in runtimes:
        default_delegates(runtime)  # libraries are imported before memory is limited, and are not counted as the model's
    os.nice(5)
    confine(memory=job["memory"], seconds=job["seconds"])
    opened, loaded, times, wrong, joules = [], {}, [], [], []
    for name, path in job["files"].items():
        before = _resident("self")
        one = open_artefact(Path(path), name.partition("/")[2])
        opened.append(one)  # kept, so that the next one's memory is its own
        x, y = _batch(job["batch"], one.shape)
        one.logits(x[:1])
        loaded[name] = max(0, _resident("self") - before)
        for example in (x[i % len(x)][None] for i in range(_SINGLES)):
            began = time.perf_counter()
            one.logits(example)
            times.append(1000 * (time.perf_counter() - began))
        if (energy := _joules(lambda one=one, x=x: one.logits(x[:1]))) is not None:  # type: ignore[misc]
            joules.append(energy)
        logits = one.logits(x)
        if not np.isfinite(logits).all():
            raise Refused(f"{name} gives logits that are not finite")
        if y is not None:
            wrong.append(float((logits.argmax(1) != y).mean()))
    return {
        "disagreement": max(wrong) if wrong else None, "p95_ms": float(np.quantile(times, 0.95)), "peak_bytes": _peak(),
        "loaded_bytes": loaded, "joules": max(joules) if joules else None,
    }  # fmt: skip


def _joules(run: Callable[[], Any]) -> float | None:
    """Joules of one run, the machine's own consumption meanwhile included; None where nothing measures them."""
    before, began, runs = energy_used(), time.monotonic(), 0
    if before is None:
        return None
    while time.monotonic() < began + _MEASURED:
        run()
        runs += 1
    after = energy_used()
    return (after - before) / runs if after is not None and after > before else None


def _batch(path: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Examples and the labels that they are to get; one example of zeros, and none, without a batch."""
    import numpy as np

    if not path:
        return np.zeros((1, *shape), np.float32), None
    try:
        with np.load(path, allow_pickle=False) as held:
            x, y = np.asarray(held["x"], np.float32), np.asarray(held["y"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"its batch cannot be read ({type(error).__name__})") from None
    if x.shape[1:] != shape or len(x) != len(y) or not len(x) or y.dtype.kind not in "iu":
        raise Refused(f"its batch has examples of shape {list(x.shape[1:])}; the model takes {list(shape)}")
    return x, y


def _peak() -> int:
    """Bytes resident at most, since this program began."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


if __name__ == "__main__":
    sys.exit(_main())
