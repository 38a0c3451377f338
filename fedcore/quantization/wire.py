"""The bytes that travel: a quantized model down to the devices, an update back up. numpy only.

Model (little-endian): ``FCM1`` | header length, uint32 | header, canonical JSON | tensors in header order, each aligned to 4
bytes. The header lists tensors (name, shape, encoding), activation ranges and free metadata. Encodings: ``int8`` (one float32
scale per row of the first axis, then the integers), ``int8po2`` (the same bytes; scales are powers of two), ``fp16``, ``fp32``.

Update (little-endian): ``FCU1`` | encoding, uint8 (0 float32, 1 int8) | 3 zero bytes | number of values, uint32 | number of
examples, uint64 | training loss, float64 | values. ``int8`` values are float32 scales of blocks of `BLOCK` values, then the
integers. Which parameters the values belong to is the plan's business: names do not travel.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = [
    "BLOCK", "INTEGERS", "ActivationRange", "DecodedModel", "ModelTensor", "Section", "Update", "decode_model", "decode_update",
    "encode_model", "encode_update", "model_sections", "quantize_rows", "quantize_rows_po2", "update_length",
]  # fmt: skip

Floats = npt.NDArray[np.float32]
MAGIC_MODEL, MAGIC_UPDATE = b"FCM1", b"FCU1"
BLOCK = 256
_UPDATE_HEADER = struct.Struct("<4sB3xIQd")
_ENCODINGS = ("float32", "int8")
INTEGERS = ("int8", "int8po2")  # encodings of a model's weights as integers and a scale per row
_LEAST_EXPONENT = -126  # of a normal float32
_LARGEST_PO2 = 2.0**127  # what is larger may round to infinity


@dataclass(frozen=True)
class ActivationRange:
    """Affine int8 grid of an activation: ``real = scale * (integer - zero_point)``, integer in [-128, 127]."""

    scale: float
    zero_point: int

    @classmethod
    def spanning(cls, low: float, high: float) -> ActivationRange:
        """The grid over [min(low, 0), max(high, 0)]; zero is always on the grid, as the runtimes require."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max(high - low, 1e-8) / 255))
        return cls(scale, int(np.clip(round(-128 - low / scale), -128, 127)))


@dataclass(frozen=True)
class ModelTensor:
    """One parameter tensor of fp32 values and how it is encoded: ``int8``, ``int8po2``, ``fp16`` or ``fp32``."""

    name: str
    values: Floats
    encoding: str


@dataclass(frozen=True)
class DecodedModel:
    """A model as its receiver sees it: parameter values after the encoding's rounding, ranges and metadata."""

    tensors: dict[str, Floats]
    ranges: dict[str, ActivationRange] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Where a tensor lies in an encoded model: ``length`` bytes at ``offset``, without padding."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    length: int


@dataclass(frozen=True)
class Update:
    """A client's reply: ``values`` [d] = local minus received parameters, over ``examples`` examples with mean loss ``loss``."""

    values: Floats
    examples: int
    loss: float


def quantize_rows(values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Symmetric int8 of ``values`` [out, ...] with one scale per row, [out]; equals `layers.fake_quantize_weight`."""
    rows = values.reshape(values.shape[0], -1)
    peak = np.maximum(np.abs(rows).max(axis=1, initial=0.0), np.finfo(np.float32).tiny * np.float32(127))
    scale = (peak / np.float32(127)).astype(np.float32)
    integers = np.rint(rows * (np.float32(1) / scale)[:, None]).astype(np.int8)
    return integers.reshape(values.shape), scale


def quantize_rows_po2(values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Symmetric int8 of ``values`` [out, ...] with one scale per row, [out]: the power of two that is nearest to peak / 64.

    A row's largest integer is within [45, 91], and its scale stays until the peak has left a factor of two. From one round to the
    next integers then differ only where weights have moved, and by little: that makes the delta between the two models small.
    """
    rows = values.reshape(values.shape[0], -1)
    fraction, exponent = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
    nearest = exponent - np.where(fraction >= math.sqrt(0.5), 6, 7)
    scale = np.ldexp(np.float32(1), np.maximum(nearest, _LEAST_EXPONENT)).astype(np.float32)
    return np.rint(rows / scale[:, None]).astype(np.int8).reshape(values.shape), scale


def encode_model(
    tensors: Iterable[ModelTensor], ranges: Mapping[str, ActivationRange] | None = None, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """The model as bytes.

    Raises:
        Refused: a value is not finite, or too large for fp16; the line names the tensor.
    """
    described, parts = [], []
    for tensor in tensors:
        if not np.isfinite(tensor.values).all():
            raise Refused(f"parameter {tensor.name} holds values that are not finite; it cannot be encoded")
        described.append({"name": tensor.name, "shape": list(tensor.values.shape), "encoding": tensor.encoding})
        parts.append(_pad(_encode_tensor(tensor)))
    header = {
        "tensors": described,
        "ranges": {name: [span.scale, span.zero_point] for name, span in (ranges or {}).items()},
        "metadata": dict(metadata or {}),
    }
    text = _pad(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), b" ")
    return b"".join([MAGIC_MODEL, struct.pack("<I", len(text)), text, *parts])


def decode_model(data: bytes) -> DecodedModel:
    """Inverse of `encode_model`, up to the encoding's rounding.

    Raises:
        Refused: not such a file, truncated, oversized, or a header that lies about its content.
    """
    header, sections = _read_model(data)
    try:
        ranges = {name: _range(*span) for name, span in header["ranges"].items()}
        metadata = dict(header["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("damaged fedcore model: its header cannot be read") from error
    tensors = {
        one.name: _decode_tensor(data[one.offset : one.offset + one.length], one.shape, one.encoding) for one in sections
    }  # fmt: skip
    return DecodedModel(tensors, ranges, metadata)


def model_sections(data: bytes) -> tuple[Section, ...]:
    """Where the tensors of an encoded model lie; the first one's offset is the end of the header.

    Raises:
        Refused: as `decode_model`.
    """
    return _read_model(data)[1]


def _read_model(data: bytes) -> tuple[Any, tuple[Section, ...]]:
    """The header, and the sections that fill the rest to the last byte."""
    if len(data) < 8 or data[:4] != MAGIC_MODEL:
        raise Refused("not a fedcore model: it does not begin with FCM1")
    (length,) = struct.unpack_from("<I", data, 4)
    try:
        header = json.loads(data[8 : 8 + length])
        described = [(str(t["name"]), tuple(_size(s) for s in t["shape"]), str(t["encoding"])) for t in header["tensors"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("damaged fedcore model: its header cannot be read") from error
    sections: dict[str, Section] = {}
    offset = 8 + length
    for name, shape, encoding in described:
        size = _encoded_length(shape, encoding, name)
        if offset + size > len(data) or name in sections:
            raise Refused(f"damaged fedcore model: tensor {name} is cut off or listed twice")
        sections[name] = Section(name, shape, encoding, offset, size)
        offset += size + -size % 4
    if offset != len(data):
        raise Refused(f"damaged fedcore model: {len(data)} bytes where the header promises {offset}")
    return header, tuple(sections.values())


def update_length(size: int, encoding: str) -> int:
    """Bytes of an encoded update of ``size`` values."""
    return _UPDATE_HEADER.size + (4 * size if encoding == "float32" else 4 * math.ceil(size / BLOCK) + size)


def encode_update(update: Update, encoding: str, rng: np.random.Generator) -> bytes:
    """The update as bytes; ``int8`` rounds stochastically with ``rng``, so that its expectation is the update."""
    values = np.ascontiguousarray(update.values, np.float32)
    header = _UPDATE_HEADER.pack(MAGIC_UPDATE, _ENCODINGS.index(encoding), values.size, update.examples, update.loss)
    if encoding == "float32":
        return header + values.tobytes()
    blocks = np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(axis=1, initial=0.0), np.finfo(np.float32).tiny * np.float32(127)) / np.float32(127)
    scaled = blocks * (np.float32(1) / scale)[:, None]
    integers = np.clip(np.floor(scaled + rng.random(scaled.shape, np.float32)), -127, 127).astype(np.int8)
    return b"".join([header, scale.tobytes(), integers.reshape(-1)[: values.size].tobytes()])


def decode_update(data: bytes) -> Update:
    """Inverse of `encode_update`.

    Raises:
        Refused: not such a message, truncated or oversized.
    """
    if len(data) < _UPDATE_HEADER.size or data[:4] != MAGIC_UPDATE:
        raise Refused("not a fedcore update: it does not begin with FCU1")
    _, code, size, examples, loss = _UPDATE_HEADER.unpack_from(data)
    if code >= len(_ENCODINGS) or len(data) != update_length(size, _ENCODINGS[code]):
        raise Refused(f"damaged fedcore update: {len(data)} bytes do not hold {size} values of encoding {code}")
    body = data[_UPDATE_HEADER.size :]
    if _ENCODINGS[code] == "float32":
        return Update(np.frombuffer(body, "<f4"), examples, loss)
    blocks = math.ceil(size / BLOCK)
    scale = np.frombuffer(body, "<f4", blocks)
    integers = np.frombuffer(body, np.int8, size, 4 * blocks).astype(np.float32)
    return Update(integers * np.repeat(scale, BLOCK)[:size], examples, loss)


def _encode_tensor(tensor: ModelTensor) -> bytes:
    if tensor.encoding in INTEGERS:
        if tensor.encoding == "int8po2" and np.abs(tensor.values).max(initial=0.0) > _LARGEST_PO2:
            raise Refused(f"parameter {tensor.name} holds values beyond the range of int8po2 (2^127); it cannot be encoded")
        integers, scale = (quantize_rows if tensor.encoding == "int8" else quantize_rows_po2)(tensor.values)
        return scale.tobytes() + integers.tobytes()
    if tensor.encoding == "fp16":
        with np.errstate(over="ignore"):
            halves = tensor.values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise Refused(f"parameter {tensor.name} holds values beyond the range of fp16 (65504); it cannot be encoded")
        return halves.tobytes()
    return tensor.values.astype(np.float32).tobytes()


def _decode_tensor(data: bytes, shape: tuple[int, ...], encoding: str) -> Floats:
    if encoding in INTEGERS:
        scale = np.frombuffer(data, "<f4", shape[0])
        integers = np.frombuffer(data, np.int8, offset=4 * shape[0]).reshape(shape)
        values: Floats = integers.astype(np.float32) * scale.reshape(-1, *[1] * (len(shape) - 1))
        return values
    return np.frombuffer(data, "<f2" if encoding == "fp16" else "<f4").astype(np.float32).reshape(shape)


def _encoded_length(shape: tuple[int, ...], encoding: str, name: str) -> int:
    count = math.prod(shape)
    lengths = {**dict.fromkeys(INTEGERS, count + 4 * (shape[0] if shape else 0)), "fp16": 2 * count, "fp32": 4 * count}
    if encoding not in lengths or (encoding in INTEGERS and not shape):
        raise Refused(f"damaged fedcore model: tensor {name} has encoding {encoding!r}; allowed: {', '.join(lengths)}")
    return lengths[encoding]


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _range(scale: Any, zero_point: Any) -> ActivationRange:
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0 and -128 <= int(zero_point) <= 127):
        raise ValueError
    return ActivationRange(float(scale), int(zero_point))


def _pad(data: bytes, filler: bytes = b"\0") -> bytes:
    return data + filler * (-len(data) % 4)
