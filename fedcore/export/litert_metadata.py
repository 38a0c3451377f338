"""TensorFlow Lite model metadata, which ML Kit's custom models and LiteRT's task libraries read.

Schema: https://github.com/google-ai-edge/LiteRT (metadata_schema.fbs, identifier M001), written table by table since no package
here carries its generated code. The file of labels is appended to the model as a zip archive, where those libraries look for it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence

import flatbuffers

from fedcore.export.artefact import Facts
from fedcore.quantization.wire import ActivationRange

__all__ = ["LABELS_FILE", "append_labels", "metadata_bytes"]

LABELS_FILE = "labels.txt"
_FEATURE, _IMAGE = 1, 2  # ContentProperties
_NORMALIZATION = 1  # ProcessUnitOptions
_RGB, _GRAYSCALE = 1, 2
_AXIS_LABELS = 2  # AssociatedFileType
_PIXELS = 255  # task libraries normalise bytes


def append_labels(model: bytes, facts: Facts) -> bytes:
    """The model with its labels, one a line, as a zip archive behind it; without labels the model."""
    if not facts.labels:
        return model
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        entry = zipfile.ZipInfo(LABELS_FILE)  # of a fixed date, so that equal models are equal bytes
        file.writestr(entry, "\n".join(label.replace("\n", " ") for label in facts.labels) + "\n")
    return model + archive.getvalue()


def metadata_bytes(facts: Facts, input_shape: tuple[int, ...], logits: ActivationRange | None) -> bytes:
    """The metadata buffer of a classifier over images [channels, height, width] or features of another shape."""
    builder = flatbuffers.Builder(1024)
    given = _tensor(
        builder, "input", _input_words(input_shape), _content(builder, input_shape), _normalization(builder, facts, input_shape)
    )
    files = _vector(builder, [_labels_file(builder)]) if facts.labels else None
    words = "logits" if logits is None else f"logits, {logits.scale:.6g} * (value - {logits.zero_point})"
    taken = _tensor(builder, "logits", words, _content(builder, ()), None, files)
    inputs, outputs = _vector(builder, [given]), _vector(builder, [taken])
    graphs = _vector(builder, [_table(builder, 9, {2: inputs, 3: outputs})])
    texts = {
        0: facts.name or "fedcore", 1: f"Federated model, run {facts.run or 'unknown'}, tier {facts.tier or 'none'}", 2:
        facts.version, 7: "1.0.0",
    }  # fmt: skip
    strings = {slot: builder.CreateString(text) for slot, text in texts.items()}
    builder.Finish(_table(builder, 8, {**strings, 3: graphs}), b"M001")
    return bytes(builder.Output())


def _input_words(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "image [1, height, width, channels]"
    return "window [1, steps, channels]" if len(shape) == 2 else "features"


def _content(builder: flatbuffers.Builder, shape: tuple[int, ...]) -> int:
    """Content: an image of known colours, or features."""
    image = len(shape) == 3 and shape[0] in (1, 3)
    if image:
        builder.StartObject(2)
        builder.PrependInt8Slot(0, _RGB if shape[0] == 3 else _GRAYSCALE, 0)
        properties = builder.EndObject()
    else:
        properties = _table(builder, 0, {})
    return _union(builder, 3, _IMAGE if image else _FEATURE, properties)


def _normalization(builder: flatbuffers.Builder, facts: Facts, shape: tuple[int, ...]) -> int:
    factor = _PIXELS if len(shape) == 3 else 1
    mean, std = (_floats(builder, [value * factor for value in values]) for values in (facts.mean, facts.std))
    return _vector(builder, [_union(builder, 2, _NORMALIZATION, _table(builder, 2, {0: mean, 1: std}))])


def _labels_file(builder: flatbuffers.Builder) -> int:
    name = builder.CreateString(LABELS_FILE)
    builder.StartObject(5)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependInt8Slot(2, _AXIS_LABELS, 0)
    return int(builder.EndObject())


def _tensor(
    builder: flatbuffers.Builder, name: str, words: str, content: int, units: int | None, files: int | None = None
) -> int:  # fmt: skip
    strings = {0: builder.CreateString(name), 1: builder.CreateString(words)}
    given = {3: content, 4: units, 6: files}
    return _table(builder, 7, strings | {slot: offset for slot, offset in given.items() if offset is not None})


def _union(builder: flatbuffers.Builder, slots: int, kind: int, value: int) -> int:
    """A table whose first two slots are a union."""
    builder.StartObject(slots)
    builder.PrependUint8Slot(0, kind, 0)
    builder.PrependUOffsetTRelativeSlot(1, value, 0)
    return int(builder.EndObject())


def _table(builder: flatbuffers.Builder, slots: int, offsets: dict[int, int]) -> int:
    builder.StartObject(slots)
    for slot, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _vector(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    return _filled(builder, offsets, builder.PrependUOffsetTRelative)


def _floats(builder: flatbuffers.Builder, values: Sequence[float]) -> int:
    return _filled(builder, values, builder.PrependFloat32)


def _filled(builder: flatbuffers.Builder, items: Sequence[float], prepend: Callable[[float], None]) -> int:
    builder.StartVector(4, len(items), 4)
    for item in reversed(items):
        prepend(item)
    return int(builder.EndVector())
