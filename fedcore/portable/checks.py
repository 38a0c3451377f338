"""The numbers by which a device sees that a compiled trainer computes the step that it is described to compute; see `library`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.portable.library import SKETCH, Check, Library, Place
from fedcore.quantization.wire import ActivationRange

__all__ = ["CHECKED", "Checked", "checked_inputs", "difference", "positions", "sketch"]

CHECKED = 5
"""Examples of a check."""
_RANGE = ActivationRange(0.0317, -3)
_FROZEN, _EXAMPLES, _LABELS, _SIGNS = 1 << 19, 1 << 20, 1 << 21, 1 << 22  # seeds; parameters have their number
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Checked:
    """Inputs of checks: parameters [d] and [f], x [n, ...], labels [n], a range for every quantizer."""

    parameters: Floats
    frozen: Floats
    x: Floats
    labels: npt.NDArray[np.int64]
    ranges: Mapping[str, ActivationRange]


def checked_inputs(library: Library) -> Checked:
    """The same numbers everywhere, from the raw bits of PCG64."""
    count = CHECKED * math.prod(library.input_shape)
    return Checked(
        _values(library.trained, 0), _values(library.frozen, _FROZEN),
        2 * _uniform(_EXAMPLES, count).reshape(CHECKED, *library.input_shape),
        (np.random.PCG64(_LABELS).random_raw(CHECKED) % np.uint64(library.classes)).astype(np.int64),
        dict.fromkeys(library.quantizers, _RANGE),
    )  # fmt: skip


def sketch(values: Floats) -> npt.NDArray[np.float64]:
    """`SKETCH` sums of values [d] with random signs, whose squared norm is that of the values on average (Charikar, Chen and
    Farach-Colton 2002)."""
    signed = np.zeros(-(-len(values) // SKETCH) * SKETCH)
    signs = 1 - 2 * (np.random.PCG64(_SIGNS).random_raw(len(values)) >> np.uint64(63)).astype(np.float64)
    signed[: len(values)] = values * signs
    return np.asarray(signed.reshape(-1, SKETCH).sum(axis=0))


def difference(check: Check, loss: float, gradient: Floats) -> float:
    """How far an answer is from a check's: the larger of the relative distances of gradient and loss; infinite if not finite."""
    expected = np.array(check.sketch)
    with np.errstate(all="ignore"):
        far = float(np.linalg.norm(sketch(gradient) - expected) / np.linalg.norm(expected))
    return max(far, abs(loss - check.loss) / check.loss) if math.isfinite(far) and math.isfinite(loss) else math.inf


def positions(place: Place) -> npt.NDArray[np.int64]:
    """Where in the blob each value of the flattened tensor is."""
    found = np.full((1,) * len(place.dims), place.offset, np.int64)
    for axis, (count, stride) in enumerate(zip(place.dims, place.strides, strict=True)):
        found = found + (np.arange(count) * stride).reshape([-1 if i == axis else 1 for i in range(len(place.dims))])
    return found.reshape(-1)


def _values(places: tuple[Place, ...], first: int) -> Floats:
    parts = [_uniform(first + number, one.size) * np.float32(one.bound) for number, one in enumerate(places)]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _uniform(seed: int, count: int) -> Floats:
    """Numbers in [-1, 1)."""
    bits = np.random.PCG64(seed).random_raw(count) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
