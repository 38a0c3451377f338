"""Uploads in the clear: what makes one unusable, and the running sum that they go into as they arrive. numpy only."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.privacy.mechanisms import clip
from fedcore.quantization.wire import decode_update

__all__ = ["ENCODINGS", "RunningSum", "Summand", "UploadTerms", "encode_score", "read_upload"]

ENCODINGS = ("float32", "int8", "contribution", "score", "masked")
_SCORE = struct.Struct("<QQd")
_HEADER = struct.Struct("<4sIQQQd")
_MAGIC = b"FCS1"
_UPDATE = ("float32", "int8")
_MOST_LOSS = 1e30  # of an example, far above any that is honest; sums of it stay finite


@dataclass(frozen=True)
class UploadTerms:
    """What an upload of a round must be: ``encoding`` of `ENCODINGS` with ``values`` numbers in at most ``most_bytes`` bytes.

    An update has an L2 norm of at most ``most_norm`` (a contribution is clipped to it) and weighs no more than ``most_examples``.
    Uploads are added up on arrival, or kept whole (``kept``).
    """

    encoding: str
    values: int
    most_bytes: int
    most_norm: float
    most_examples: int
    kept: bool = False


@dataclass(frozen=True)
class Summand:
    """One device's part of a sum: ``weight`` x ``vector`` [values], with the counts that go with it."""

    vector: npt.NDArray[np.float32]
    weight: int
    examples: int
    correct: int
    loss: float  # summed over examples


def read_upload(data: bytes, terms: UploadTerms) -> Summand:
    """An upload as a summand.

    Raises:
        Refused: it is not what the plan asks for, not finite, or over the norm.
    """
    if len(data) > terms.most_bytes:
        raise Refused(f"it has {len(data)} bytes, the plan allows {terms.most_bytes}")
    if terms.encoding == "score":
        return _score(data, terms)
    if terms.encoding == "contribution":
        if len(data) != 4 * terms.values:
            raise Refused(f"a contribution has {4 * terms.values} bytes, this one {len(data)}")
        sent = np.frombuffer(data, "<f4")
        if not np.isfinite(sent).all():
            raise Refused("it is not finite")
        # Not only a hostile device exceeds the norm: so does rounding to float32. It is clipped again, not refused.
        vector, examples, loss = clip(sent, terms.most_norm).astype(np.float32), 1, 0.0
    elif terms.encoding in _UPDATE:
        if data[4:5] != bytes([_UPDATE.index(terms.encoding)]):
            raise Refused(f"it is not in the encoding {terms.encoding}")
        update = decode_update(data)
        vector, examples, loss = update.values, update.examples, update.loss
    else:
        raise Refused(f"uploads in the encoding {terms.encoding} are not read here")
    if vector.size != terms.values:
        raise Refused(f"it has {vector.size} values, the plan asks for {terms.values}")
    if not 1 <= examples <= terms.most_examples:
        raise Refused(f"it claims {examples} examples; 1 to {terms.most_examples} count")
    norm = math.sqrt(float(np.square(vector, dtype=np.float64).sum()))  # no BLAS, whose threads cost more than they save here
    if not (math.isfinite(norm) and abs(loss) <= _MOST_LOSS):
        raise Refused("it is not finite")
    if norm > terms.most_norm and terms.encoding in _UPDATE:
        raise Refused(f"its norm {norm:.3g} is over the limit {terms.most_norm:.3g}")
    return Summand(vector.astype(np.float32, copy=False), examples, examples, 0, loss * examples)


def encode_score(examples: int, correct: int, loss: float) -> bytes:
    """An upload in the encoding "score": examples, correct predictions among them, and the sum of their losses."""
    return _SCORE.pack(examples, correct, loss)


def _score(data: bytes, terms: UploadTerms) -> Summand:
    if len(data) != _SCORE.size:
        raise Refused(f"a score has {_SCORE.size} bytes, this one {len(data)}")
    examples, correct, loss = _SCORE.unpack(data)
    if not (1 <= examples <= terms.most_examples and correct <= examples and abs(loss) <= _MOST_LOSS * examples):
        raise Refused(f"{correct} of {examples} examples with a loss of {loss:g} is no score")
    return Summand(np.zeros(0, np.float32), 0, examples, correct, loss)


@dataclass
class RunningSum:
    """What uploads add up to: ``vector`` [values] in float64, and counts."""

    vector: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    devices: int = 0
    examples: int = 0
    correct: int = 0
    loss: float = 0.0

    def copy(self) -> RunningSum:
        """One that can be added to without changing this one."""
        return RunningSum(self.vector.copy(), self.devices, self.examples, self.correct, self.loss)

    def add(self, part: Summand) -> None:
        """Add one device's part."""
        if not self.devices:
            self.vector = np.zeros(part.vector.size)
        self.vector += part.weight * part.vector.astype(np.float64)
        self.devices, self.examples, self.correct = self.devices + 1, self.examples + part.examples, self.correct + part.correct
        self.loss += part.loss

    def merge(self, other: RunningSum) -> None:
        """Add another sum."""
        self.vector = other.vector.copy() if not self.devices else self.vector + other.vector if other.devices else self.vector
        self.devices, self.examples = self.devices + other.devices, self.examples + other.examples
        self.correct, self.loss = self.correct + other.correct, self.loss + other.loss

    def encode(self) -> bytes:
        """The sum as bytes: header and little-endian float64 values."""
        header = _HEADER.pack(_MAGIC, self.devices, self.vector.size, self.examples, self.correct, self.loss)
        return header + self.vector.astype("<f8", copy=False).tobytes()

    @classmethod
    def decode(cls, data: bytes) -> RunningSum:
        """Inverse of `encode`.

        Raises:
            Refused: it is no sum.
        """
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise Refused("a partial sum is damaged")
        _, devices, values, examples, correct, loss = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + 8 * values:
            raise Refused("a partial sum is damaged")
        return cls(np.frombuffer(data, "<f8", offset=_HEADER.size).copy(), devices, examples, correct, loss)
