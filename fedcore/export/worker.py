"""The child's side of `fedcore.export.child`: ``python -m fedcore.export.worker JOB.json ANSWER.json``.

Converters are imported here and nowhere else: they weigh up to a gigabyte, keep global state, and may crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import pickle  # reads what the parent wrote a moment ago, in a directory of its own
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.errors import FedcoreError, Refused
from fedcore.export.artefact import Contents, Facts
from fedcore.export.targets import TARGETS

__all__ = ["main"]

_WARM_UP = 10
_SET_DEATH_SIGNAL = 1  # of prctl(2)


def main(asked: Path, answered: Path) -> None:
    """Do the job and write the answer."""
    job = json.loads(asked.read_text())
    _end_with_parent(job["parent"])
    try:
        answer = _JOBS[job["task"]](job)
    except FedcoreError as error:
        answer = {"refused": str(error)}
    answered.write_text(json.dumps(answer))


def _end_with_parent(parent: int) -> None:
    """Where the system can: a parent that was killed ends nothing, and a converter would go on for minutes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it went while this process was starting
            os._exit(1)


def _convert(job: Mapping[str, Any]) -> dict[str, Any]:
    """``model`` to an artefact in ``folder``."""
    target = TARGETS[job["target"]]
    module = importlib.import_module(f"fedcore.export.{target.module}")
    model = pickle.loads(Path(job["model"]).read_bytes())  # noqa: S301 - see the import
    facts = Facts(**{**job["facts"], **{key: tuple(job["facts"][key]) for key in ("labels", "mean", "std")}})
    start = time.perf_counter()
    path = getattr(module, target.writer)(model, Path(job["folder"]), facts)
    return {"path": str(path), "seconds": time.perf_counter() - start}


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Logits of ``x`` into ``logits`` (where asked for), and milliseconds of ``repeats`` single examples."""
    x = np.load(job["x"], allow_pickle=False)
    if job["target"] == "micro":
        return _measure_micro(job, x)
    module = importlib.import_module(f"fedcore.export.{TARGETS[job['target']].module}")
    run = module.load(Path(job["path"]), job["threads"])
    singles = [x[i % len(x)][None] for i in range(_WARM_UP + job["repeats"])]
    milliseconds = []
    for one in singles:
        start = time.perf_counter()
        run(one)
        milliseconds.append(1000 * (time.perf_counter() - start))
    if job.get("logits"):
        np.save(job["logits"], np.concatenate([run(x[i : i + 64]) for i in range(0, len(x), 64)]))
    return {"milliseconds": milliseconds[_WARM_UP:], "peak": _peak(), **_contents(job)}


def _contents(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the artefact holds, asked with the logits: starting a process and importing a converter take longer than the answer."""
    if not job.get("logits"):
        return {}
    path = Path(job["path"]).with_name(TARGETS[job["target"]].artefact)
    return {"contents": _describe({"kind": job["target"], "path": str(path)})}


def _measure_micro(job: Mapping[str, Any], x: Any) -> dict[str, Any]:
    from fedcore.export import micro

    path = Path(job["path"]).with_name("model.tflite")
    done = micro.run(path, x if job.get("logits") else x[: job["repeats"]], Path(job["python"]))
    if job.get("logits"):
        np.save(job["logits"], done.logits)
        micro.write_source(path, done.arena)
    return {
        **_contents(job),
        "milliseconds": done.milliseconds[: _WARM_UP + job["repeats"]][_WARM_UP:].tolist(),
        "peak": done.arena,
    }


def _describe(job: Mapping[str, Any]) -> dict[str, Any]:
    kind, path = job["kind"], Path(job["path"])
    if kind == "fcm":
        return dataclasses.asdict(_describe_wire(path))
    module = importlib.import_module(f"fedcore.export.{TARGETS[kind].module}")
    try:
        contents: Contents = module.describe(path)
    except (FedcoreError, ModuleNotFoundError):
        raise
    except Exception as error:  # what a parser says of a damaged file may be anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Refused(f"{path.name}: damaged, or not a model of format {kind}: {reason}") from error
    metadata = contents.metadata if isinstance(contents.metadata, Mapping) else {}  # a file may hold anything there
    return {**dataclasses.asdict(contents), "metadata": {str(key): str(value) for key, value in metadata.items()}}


def _describe_wire(path: Path) -> Contents:
    from fedcore.quantization.wire import decode_model

    data = path.read_bytes()
    model = decode_model(data)
    shapes = dict.fromkeys(model.tensors, 1)
    return Contents("fcm", len(data), (), (), shapes, 0, 0, f"{len(model.ranges)} activation ranges", {
        key: str(value) for key, value in model.metadata.items()})  # fmt: skip


def _peak() -> int:
    """The most memory this process has held, in bytes; without what its parent held before the program was replaced."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_JOBS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"convert": _convert, "measure": _measure, "describe": _describe}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
