"""A compiled trainer for devices, as whoever built it describes it: ``trainer.json`` beside the library.

A device may use a library that lies on it instead of ONNX Runtime, for the training steps that its description names by their
SHA-256: a step is a function of the architecture, of the loss, of what is rounded, of clipping and of the batch alone
(`fedcore.portable.form`), so its name says all that the library has to compute. Rates, momentum, noise and the order of examples
are not in a step, and not the library's business either. Whether it does compute that step on this processor, numbers that are part
of the description tell: a few gradients of the step in ONNX Runtime, for parameters and examples that everybody can draw
(`fedcore.portable.checks`).

An agent at rest reads descriptions: nothing here imports more than the standard library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from fedcore.errors import Refused

__all__ = ["ABI", "MANIFEST", "PADDING", "SKETCH", "Check", "Library", "Place"]

ABI = 1  # of the functions in trainer.h and of the fields of their structure; another number for any change of these
MANIFEST = "trainer.json"
PADDING = 16  # numbers behind a buffer that a library may read or write
SKETCH = 64  # numbers of a check's sketch
_FORMAT = "fedcore-trainer"
_MOST = 2**28


@dataclass(frozen=True)
class Place:
    """A parameter of ``dims`` at ``offset`` of the blob, a stride for each dimension; ``bound``: how large its values in a check
    are at most."""

    dims: tuple[int, ...]
    bound: float
    offset: int = 0
    strides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.dims)

    @property
    def last(self) -> int:
        """Where in the blob its last value is."""
        return self.offset + sum((count - 1) * stride for count, stride in zip(self.dims, self.strides, strict=True))


@dataclass(frozen=True)
class Check:
    """What the step gives for the inputs of checks: the sum of losses, the sketch of the sum of gradients. ``clip``: the norm to
    which they are clipped, 0 where they are not; ``rounds``: activations are rounded."""

    clip: float
    rounds: bool
    loss: float
    sketch: tuple[float, ...]


@dataclass(frozen=True)
class Library:
    """A shared library with the functions of trainer.h.

    ``machine``, ``features``: what it runs on, in the words of uname and of /proc/cpuinfo; ``steps``: SHA-256 of the training
    steps that it computes; ``trained``, ``frozen``: the parameters, each in the module's order; ``blob``, ``work``, ``bytes``:
    numbers and bytes of buffers as in trainer.h; ``tolerance``: how far an answer may be from that of a check;
    ``loss``: what its steps minimize, for people, and not written where it is cross-entropy, as in descriptions of before.
    """

    file: str
    sha256: str
    machine: str
    features: tuple[str, ...]
    input_shape: tuple[int, ...]
    classes: int
    trained: tuple[Place, ...]
    frozen: tuple[Place, ...]
    quantizers: tuple[str, ...]
    blob: int
    work: int
    bytes: int
    steps: tuple[str, ...]
    tolerance: float
    checks: tuple[Check, ...]
    abi: int = ABI
    loss: str = "cross_entropy"

    def to_json(self) -> str:
        """As `from_json` reads it."""
        table = asdict(self)
        if self.loss == "cross_entropy":
            del table["loss"]
        return json.dumps({"format": _FORMAT, **table}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The description of a library.

        Raises:
            Refused: it is none, it is of another version, or a field is missing, unknown or out of range.
        """
        try:
            found = json.loads(text)
            kind, abi = found.pop("format"), found["abi"]
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise Refused("it is no description of a library") from None
        if kind != _FORMAT or abi != ABI:
            raise Refused(f"it describes a {kind!r} of ABI {abi!r}; this agent takes {_FORMAT!r} of ABI {ABI}")
        try:
            parts = {"trained": Place, "frozen": Place, "checks": Check}
            made = {name: tuple(kind(**_tuples(one)) for one in found[name]) for name, kind in parts.items()}
            library = cls(**(_tuples(found) | made))
            library._validate()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Refused(f"a field is missing or of another kind ({type(error).__name__})") from None
        return library

    @property
    def parameters(self) -> int:
        """Trainable parameters, d."""
        return sum(place.size for place in self.trained)

    def _validate(self) -> None:
        sizes = (self.classes, self.blob, self.work, self.bytes, *self.input_shape, self.parameters)
        texts = (self.file, self.sha256, self.machine, self.loss, *self.features, *self.quantizers, *self.steps)
        tensors = (*self.trained, *self.frozen)
        whole = (*sizes, *(size for one in tensors for size in one.dims))
        numbers = (self.tolerance, *(one.bound for one in tensors), *(one.loss for one in self.checks))
        if not all(type(size) is int and 0 < size < _MOST for size in whole) or not all(isinstance(one, str) for one in texts):
            raise ValueError
        if not all(type(one) is float and 0 < one < math.inf for one in numbers) or not self.checks:
            raise ValueError
        for check in self.checks:
            if len(check.sketch) != SKETCH or not all(type(one) is float and math.isfinite(one) for one in check.sketch):
                raise ValueError
            if type(check.clip) is not float or not 0 <= check.clip < math.inf or type(check.rounds) is not bool:
                raise ValueError
        for place in self.frozen:
            steps = (place.offset, *place.strides)
            if not all(type(step) is int and step >= 0 for step in steps) or place.last >= self.blob:
                raise ValueError


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
