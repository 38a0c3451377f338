"""The process that works: ``python -m fedcore_device.child DIRECTORY``, confined before it reads anything that was received.

In the directory: ``job.json`` (`write_job`), and afterwards ``upload.bin`` or ``vector.npy``, and ``result.json``. The exit code
says what became of it: `DONE`, `PAUSED` (the checkpoint is there, or nothing can be written), `REFUSED`, `FAILED`, or `UNFIT`: the
native library cannot do it (result.json says why). It is told neither the device's key nor the round's token.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcore.errors import ClientFailure, FedcoreError, Refused, TryAgain
from fedcore_device.native import Unfit
from fedcore_device.sandbox import confine
from fedcore_device.state import write_durably

__all__ = ["DONE", "FAILED", "LOADING", "PAUSED", "REFUSED", "UNFIT", "read_job", "write_job"]

DONE, PAUSED, REFUSED, FAILED, UNFIT = 0, 10, 11, 12, 13
LOADING = "native.loading"
"""File that is there from the moment when a native library may do harm; before, only the owner's own code did. It grows by a byte
when a call of the library begins, and by another when it ends."""
_EVERY = 10  # steps between two checkpoints


def write_job(directory: Path, job: Mapping[str, Any]) -> None:
    """Write what a child is to do; bytes among the plan's settings are marked.

    Keys: ``examples``, ``model``, ``step``, ``frozen`` (paths), ``step_sha256``, ``settings``, ``encoding``, ``values``,
    ``randomness``, ``memory``, ``seconds``; ``evaluates``: the step is an evaluation graph; and where a native library trains
    ``native``, the path of its description, and ``native_sha256``, its own checksum.
    """
    write_durably(directory / "job.json", json.dumps(job, default=lambda value: {"hex": bytes(value).hex()}).encode())


def read_job(directory: Path) -> dict[str, Any]:
    """Inverse of `write_job`."""
    plain = json.loads((directory / "job.json").read_bytes())
    plain["settings"] = {
        name: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value for name, value in plain["settings"].items()
    }
    return dict(plain)


def _main() -> int:
    directory = Path(sys.argv[1])
    told: dict[str, Any] = {}
    code = DONE
    try:
        job = read_job(directory)
        told = _evaluate(directory, job) if job["evaluates"] else _work(directory, job)
    except Unfit as error:
        code, told = UNFIT, {"reason": str(error)}
    except Refused as error:
        code, told = REFUSED, {"reason": str(error)}
    except TryAgain as error:
        code, told = PAUSED, {"reason": str(error)}
    except (FedcoreError, MemoryError) as error:
        code, told = FAILED, {"reason": str(error) or type(error).__name__}
    told["peak_memory_bytes"] = _peak_memory()
    try:
        write_durably(directory / "result.json", json.dumps(told).encode())
    except TryAgain:
        return PAUSED
    return code


def _peak_memory() -> int:
    """Bytes resident at most. Not of getrusage, which counts what the parent had when it forked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def _work(directory: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and leave what is sent; what is told about it."""
    from fedcore_device.examples import load_examples

    os.nice(10)
    x, y = load_examples(job["examples"])  # the owner's own code, before the doors are closed
    confine(memory=job["memory"], seconds=job["seconds"])
    from fedcore_device.trainer import Resume, train

    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    task, release = _task(job), _release(job["settings"])
    began = time.monotonic()
    engine = _engine(directory, job, task)
    resume = Resume(directory / "progress.bin", _EVERY)
    try:
        trained = train(task, x, y, _randomness(job["randomness"]), resume=resume, keep_going=lambda: not stopping, engine=engine)
        _check(trained.update, trained.loss, task.plan.privacy is not None, float(job["settings"]["max-update-norm"]))
    except ClientFailure:
        if release is None:
            raise
        # Who contributes must not depend on anybody's examples: what fails is sent as nothing, which is noised and masked alike.
        _leave(directory, job, release.nothing(os.urandom))
        return {"steps": 0, "seconds": time.monotonic() - began}
    loss = 0.0 if task.plan.privacy else trained.loss
    if release is not None:
        _leave(directory, job, release.contribution(trained.update, trained.examples, loss, os.urandom))
    else:
        _leave_update(directory, job, trained.update, trained.examples, loss)
    return {
        "steps": trained.steps, "seconds": time.monotonic() - began, "examples": trained.examples, "loss": trained.loss,
        "released": release is not None,
    }  # fmt: skip


def _evaluate(directory: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Score the held-out examples, and leave what is sent; what is told about it."""
    from fedcore_device.examples import load_held_out

    os.nice(10)
    x, y = load_held_out(job["examples"])  # the owner's own code, before the doors are closed
    confine(memory=job["memory"], seconds=job["seconds"])
    from fedcore.gateway.sums import encode_score
    from fedcore.secagg.sums import ScoreSum, sum_from_table
    from fedcore_device.evaluation import score_examples
    from fedcore_device.step import read_evaluation

    masked, summation = job["encoding"] == "masked", sum_from_table(job["settings"])
    if not (isinstance(summation, ScoreSum) if masked else summation is None):
        raise Refused("the plan asks for an evaluation, and for another sum than one of scores")
    values, frozen, ranges = _received(job)
    began = time.monotonic()
    step = read_evaluation(Path(job["step"]).read_bytes(), job["step_sha256"])
    scored = score_examples(step, values, x, y, frozen=frozen, ranges=ranges)
    if isinstance(summation, ScoreSum):  # who has nothing to say adds zeros
        _leave(directory, job, summation.contribution(scored.examples, scored.correct, scored.loss))
    elif not scored.examples:
        raise ClientFailure("this device holds out no examples to evaluate on")
    elif not math.isfinite(scored.loss):
        raise ClientFailure("evaluation failed: the loss is not finite")
    else:
        write_durably(directory / "upload.bin", encode_score(scored.examples, scored.correct, scored.loss))
    return {
        "seconds": time.monotonic() - began, "examples": scored.examples, "loss": scored.loss / max(1, scored.examples),
        "released": masked,
    }  # fmt: skip


def _task(job: Mapping[str, Any]) -> Any:
    from fedcore_device.step import read_step
    from fedcore_device.trainer import Task

    values, frozen, ranges = _received(job)
    return Task(read_step(Path(job["step"]).read_bytes(), job["step_sha256"]), values, _plan(job["settings"]), frozen, ranges)


def _engine(directory: Path, job: Mapping[str, Any], task: Any) -> Any:
    """The native library that the agent chose; None for ONNX Runtime."""
    if not job.get("native"):
        return None
    from fedcore_device.compiled import load

    calls = (directory / LOADING).open("ab", buffering=0)

    def note() -> None:
        try:
            calls.write(b".")
        except OSError as error:
            raise TryAgain(f"{LOADING} cannot be written ({error.strerror})") from error

    return load(Path(job["native"]), job["native_sha256"], task.step.form, frozen=task.frozen, ranges=task.ranges or {}, note=note)


def _received(job: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The trainable parameters [d], the frozen ones [f] or None, and the activations' ranges."""
    import numpy as np

    from fedcore.quantization.wire import ActivationRange, decode_model

    settings = job["settings"]

    def flat(path: str) -> Any:
        tensors = decode_model(Path(path).read_bytes()).tensors
        return np.concatenate([tensor.reshape(-1) for tensor in tensors.values()]).astype(np.float32)

    columns = (settings["activation-names"], settings["activation-scales"], settings["activation-zero-points"])
    ranges = {str(name): ActivationRange(float(scale), int(zero)) for name, scale, zero in zip(*columns, strict=True)}
    return flat(job["model"]), flat(job["frozen"]) if job["frozen"] else None, ranges


def _plan(settings: Mapping[str, Any]) -> Any:
    from fedcore_device.plan import ExamplePrivacy, TrainingPlan

    try:
        privacy = None
        if any(name.startswith("example-") for name in settings):
            privacy = ExamplePrivacy(
                settings["example-clipping-norm"], settings["example-noise-multiplier"], settings["example-batches"]
            )
        return TrainingPlan(
            settings["epochs"], settings["batch-size"], settings["lr"], settings["momentum"], settings["weight-decay"],
            settings["proximal-mu"], privacy,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise Refused(f"training plan: a setting is missing or of another kind ({error})") from None


def _release(settings: Mapping[str, Any]) -> Any:
    """How contributions are summed; None where the update goes as it is."""
    if not any(name.startswith(("release-", "sum-", "scores-")) for name in settings):
        return None
    from fedcore.secagg.sums import ScoreSum, sum_from_table

    found = sum_from_table(settings)
    if isinstance(found, ScoreSum):
        raise Refused("the plan asks for scores; this device trains")
    return found


def _randomness(drawn: Mapping[str, Any]) -> Any:
    import numpy as np

    from fedcore_device.checkpoint import restored_generator
    from fedcore_device.noise import Randomness

    order = restored_generator(drawn["state"]) if "state" in drawn else np.random.default_rng(int(drawn["entropy"], 16))
    return Randomness(order, bytes.fromhex(drawn["noise_key"]))


def _check(update: Any, loss: float, private: bool, most: float) -> None:
    import numpy as np

    norm = float(np.linalg.norm(update))
    if not math.isfinite(norm) or not (private or math.isfinite(loss)):
        raise ClientFailure("training failed: the update or its loss is not finite")
    if norm > most:
        raise ClientFailure(f"training exploded: the update's norm {norm:.3g} is over the limit {most:.3g}")


def _leave(directory: Path, job: Mapping[str, Any], vector: Any) -> None:
    """A contribution: as numbers that the agent masks, or as the bytes that are sent."""
    import io

    import numpy as np

    if job["encoding"] == "masked":
        buffer = io.BytesIO()
        np.save(buffer, vector)
        write_durably(directory / "vector.npy", buffer.getvalue())
    elif job["encoding"] == "contribution" and vector.dtype == np.float32:
        write_durably(directory / "upload.bin", vector.astype("<f4").tobytes())
    else:
        raise Refused(f"the plan asks for a sum that cannot be sent as {job['encoding']!r}")


def _leave_update(directory: Path, job: Mapping[str, Any], update: Any, examples: int, loss: float) -> None:
    import numpy as np

    from fedcore.quantization.wire import Update, encode_update

    if job["encoding"] not in {"float32", "int8"} or job["values"] != len(update) or not examples:
        raise Refused(
            f"the plan asks for {job['values']} values in {job['encoding']!r}; there are {len(update)} of {examples} examples"
        )
    rng = np.random.default_rng(int.from_bytes(os.urandom(32), "little"))
    write_durably(directory / "upload.bin", encode_update(Update(update, examples, loss), job["encoding"], rng))


if __name__ == "__main__":
    sys.exit(_main())
