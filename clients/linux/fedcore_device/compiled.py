"""The native library at work: an engine that gives a training step's answers, in the confined child alone.

The library makes whole rounds; here it makes one step at a time, so long that the update is the gradient, and what is done with
gradients (noise, order, momentum, checkpoints) is `trainer`'s for every engine.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.portable.checks import checked_inputs, difference, positions
from fedcore.portable.form import StepForm
from fedcore.portable.library import PADDING, Library
from fedcore.quantization.wire import ActivationRange
from fedcore_device.native import Unfit, opened

__all__ = ["CompiledStep", "Job", "load"]

Floats = npt.NDArray[np.float32]
_SCALE = 2.0**40  # length of a step: the parameters that it begins from are lost in rounding, to 2^-40 of their last bit
_TOGETHER = 64  # examples handed over at once, if the step's batch is not larger
_ALIGNMENT = 64


class Job(ctypes.Structure):
    """``TrainerJob`` of trainer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "order")),
        *((name, ctypes.c_int64) for name in ("examples", "epochs", "batch")),
        *((name, ctypes.c_void_p) for name in ("start", "ranges", "work", "bytes", "update")),
        *((name, ctypes.c_double) for name in ("rate", "momentum", "decay", "proximal", "loss")),
        ("noise", ctypes.c_void_p),
        ("bound", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("seed", ctypes.c_void_p),
        ("deviation", ctypes.c_double),
        ("fresh", ctypes.c_void_p),
    )


def load(
    description: Path, sha256: str, form: StepForm, *, frozen: Floats | None, ranges: Mapping[str, ActivationRange],
    note: Callable[[], object] = lambda: None,
) -> CompiledStep:  # fmt: skip
    """Load the library with this SHA-256, and see that it gives what its description says.

    ``note`` is called when code of the library begins, and when it has ended.

    Raises:
        Unfit: it is not that library, it cannot be loaded, does not fit ``form``, asks for too much memory, or an answer in a check
            differs.
    """
    with opened(description) as (library, descriptor):
        if library.sha256 != sha256:
            raise Unfit(f"{description}: the library was replaced meanwhile")
        note()
        try:
            # These very bytes, whatever the path leads to by now. The descriptor stays open: the loader takes names that it knows
            # for libraries that it has.
            functions = _functions(ctypes.CDLL(f"/proc/self/fd/{os.dup(descriptor)}"))
            note()
        except (OSError, AttributeError) as error:
            raise Unfit(f"{description.parent / library.file} cannot be loaded ({error})") from None
    sizes = (library.parameters, sum(one.size for one in library.frozen), library.input_shape, library.classes)
    if sizes != (form.parameters, form.frozen, form.input_shape, form.classes) or set(form.quantizers) - set(library.quantizers):
        raise Unfit(f"{description}: its sizes are not those of the training step")
    own = {name: ranges[name] for name in form.quantizers if name in ranges}
    if len(own) < len(form.quantizers):
        raise Refused("training step: a quantizer has no activation range")
    try:
        _check(functions, library, description, note)
        return CompiledStep(functions, library, frozen, own, max(form.batch, _TOGETHER), note)
    except MemoryError:
        raise Unfit(f"{description}: there is no memory for its workspace of {4 * library.work + library.bytes} bytes") from None


class CompiledStep:
    """The gradients of a loaded library, for one round's frozen parameters [f] and activation ranges; a quantizer without a range
    passes activations on. ``most``: examples in one call."""

    name, fault = "native library", Unfit

    def __init__(
        self, functions: Mapping[str, Any], library: Library, frozen: Floats | None, ranges: Mapping[str, ActivationRange],
        most: int, note: Callable[[], object],
    ) -> None:  # fmt: skip
        self._functions, self.most, self._note = functions, most, note
        self._blob = _numbers(library.blob)
        values = np.zeros(0, np.float32) if frozen is None else frozen
        places = np.concatenate([np.zeros(0, np.int64), *map(positions, library.frozen)])
        if values.shape != places.shape or not np.isfinite(values).all():
            raise Refused(f"training step: it needs {len(places)} finite frozen parameters")
        self._blob[places] = values
        self._rows = np.arange(most)
        self._x, self._labels = _numbers(most * math.prod(library.input_shape) + PADDING), np.zeros(most, np.int64)
        self._images = self._x[: most * math.prod(library.input_shape)].reshape(most, *library.input_shape)
        self._ranges = _numbers(7 * len(library.quantizers) + PADDING)
        for row, name in enumerate(library.quantizers):
            self._ranges[7 * row : 7 * row + 7] = _range(ranges.get(name))
        self._work, self._marks = _numbers(library.work), _numbers(-(-library.bytes // 4))
        self._update, self._noise = _numbers(library.parameters + PADDING), _numbers(library.parameters + PADDING)
        self._gradient = self._update[: library.parameters]
        self._job = Job(
            x=self._x.ctypes.data, y=self._labels.ctypes.data, order=self._rows.ctypes.data, epochs=1, rate=-_SCALE,
            start=self._blob.ctypes.data, ranges=self._ranges.ctypes.data, work=self._work.ctypes.data,
            bytes=self._marks.ctypes.data, update=self._update.ctypes.data, noise=self._noise.ctypes.data,
        )  # fmt: skip

    def answer(
        self, parameters: Floats, x: Floats, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], clip: float
    ) -> tuple[Floats, float, float]:
        """As the step's outputs: the sum of the gradients [d] of the examples ``rows`` of x and labels, clipped where ``clip`` is
        finite, their number, and the sum of their losses. No more rows than ``most``.

        Raises:
            Refused: a label is no class.
        """
        used, job, call = len(rows), self._job, self._functions
        np.take(x, rows, axis=0, out=self._images[:used], mode="clip")
        np.take(labels, rows, out=self._labels[:used], mode="clip")
        self._note()
        call["import_start"](self._blob.ctypes.data, parameters.ctypes.data)
        job.examples = used
        if math.isfinite(clip):  # the noise is added later, by who drew it: here it is zeros
            job.batch, job.bound, scale = 1, clip, 1 / _SCALE
            call["private_begin"](job)
            wrong = call["private_step"](job)
            call["private_end"](job)
        else:
            job.batch, scale = used, used / _SCALE
            wrong = call["train"](job)
        self._note()
        if wrong:
            raise Refused("training: a label is no class")
        gradient, loss = self._gradient * np.float32(scale), float(job.loss)
        if math.isfinite(clip) and not math.isfinite(loss):  # of an example whose gradient is not finite, and which adds nothing
            each = (self.answer(parameters, x, labels, rows[i : i + 1], clip)[2] for i in range(used) if used > 1)
            loss = sum(each, 0.0)
        return gradient, float(used), loss


def _check(functions: Mapping[str, Any], library: Library, description: Path, note: Callable[[], object]) -> None:
    inputs = checked_inputs(library)
    rows = np.arange(len(inputs.labels))
    for check in library.checks:
        compiled = CompiledStep(functions, library, inputs.frozen, inputs.ranges if check.rounds else {}, len(rows), note)
        gradient, _, loss = compiled.answer(inputs.parameters, inputs.x, inputs.labels, rows, check.clip or math.inf)
        if not (far := difference(check, loss, gradient)) <= library.tolerance:
            raise Unfit(f"{description}: in a check the library's gradient is {far:.2g} of its length off")


def _functions(library: ctypes.CDLL) -> dict[str, Any]:
    job, nothing = ctypes.POINTER(Job), None
    kinds: dict[str, tuple[list[Any], Any]] = {
        "import_start": ([ctypes.c_void_p, ctypes.c_void_p], nothing), "train": ([job], ctypes.c_int),
        "private_begin": ([job], nothing), "private_step": ([job], ctypes.c_int), "private_end": ([job], nothing),
    }  # fmt: skip
    found = {}
    for name, (arguments, result) in kinds.items():
        found[name] = getattr(library, name)
        found[name].argtypes, found[name].restype = arguments, result
    return found


def _range(grid: ActivationRange | None) -> tuple[float, ...]:
    """A ``TrainerRange``; zeros where the activation passes."""
    if grid is None:
        return (0.0,) * 7
    low, high = -128 - grid.zero_point, 127 - grid.zero_point
    inverse = float(np.float32(1) / np.float32(grid.scale))
    return 1.0, inverse, grid.scale, low, high, (low - 0.5) * grid.scale, (high + 0.5) * grid.scale


def _numbers(count: int) -> Floats:
    """Zeros that begin where trainer.h wants them to."""
    raw = np.zeros(4 * count + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + 4 * count].view(np.float32)
