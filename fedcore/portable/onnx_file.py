"""Reads the few fields of an ONNX file that a training step may have, and refuses every other one.

What is not in the tables below cannot be in a step: functions, graphs inside attributes (control flow), external or sparse data,
operators of other domains, sizes that are not numbers. Field numbers are those of onnx.proto (https://github.com/onnx/onnx); the
encoding is protobuf's (https://protobuf.dev/programming-guides/encoding/). A singular field that comes twice is refused, so that
no other reader of the same bytes can see another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedcore.errors import Refused

__all__ = ["FLOAT", "Node", "StepFile", "read_step_file"]

FLOAT, _INT32, _INT64 = 1, 6, 7
_ITEM_BYTES = {FLOAT: 4, _INT32: 4, _INT64: 8}
_MOST_DIMENSIONS, _MOST_FIELDS = 8, 50_000  # the zoo's steps have less than 4,000 fields

_Table = dict[int, tuple[str, Any, bool]]  # field number: name, type (int, bytes or a table), whether it may be repeated
_ENTRY: _Table = {1: ("key", bytes, False), 2: ("value", bytes, False)}
_OPSET: _Table = {1: ("domain", bytes, False), 2: ("version", int, False)}
_DIMENSION: _Table = {1: ("size", int, False)}
_SHAPE: _Table = {1: ("dimensions", _DIMENSION, True)}
_TENSOR_TYPE: _Table = {1: ("element", int, False), 2: ("shape", _SHAPE, False)}
_TYPE: _Table = {1: ("tensor", _TENSOR_TYPE, False)}
_VALUE: _Table = {1: ("name", bytes, False), 2: ("type", _TYPE, False)}
_TENSOR: _Table = {
    1: ("dimensions", int, True), 2: ("element", int, False), 8: ("name", bytes, False), 9: ("data", bytes, False),
}  # fmt: skip
_ATTRIBUTE: _Table = {1: ("name", bytes, False), 3: ("integer", int, False), 8: ("integers", int, True), 20: ("kind", int, False)}
_NODE: _Table = {
    1: ("inputs", bytes, True), 2: ("outputs", bytes, True), 3: ("name", bytes, False), 4: ("operator", bytes, False),
    5: ("attributes", _ATTRIBUTE, True),
}  # fmt: skip
_GRAPH: _Table = {
    1: ("nodes", _NODE, True), 2: ("name", bytes, False), 5: ("constants", _TENSOR, True), 11: ("inputs", _VALUE, True),
    12: ("outputs", _VALUE, True),
}  # fmt: skip
_MODEL: _Table = {
    1: ("ir_version", int, False), 2: ("producer", bytes, False), 7: ("graph", _GRAPH, False), 8: ("opsets", _OPSET, True),
    14: ("properties", _ENTRY, True),
}  # fmt: skip

_OTHERS = {
    ("nodes", 7): "an operator of another domain", ("nodes", 8): "an overload of a function", ("constants", 13): "external data",
    ("constants", 14): "external data", ("attributes", 6): "a graph inside an attribute", ("graph", 15): "sparse constants",
    ("model", 20): "training information", ("model", 25): "functions",
}  # fmt: skip
"""What ONNX has in fields that steps do not have, for people."""


@dataclass(frozen=True)
class Node:
    """One operator: its name, and the names of what it reads and writes."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StepFile:
    """What stands in the file. ``inputs`` and ``outputs``: element type and shape by name, in order; ``constants``: names."""

    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    properties: dict[str, str]
    nodes: tuple[Node, ...]
    constants: tuple[str, ...]
    inputs: dict[str, tuple[int, tuple[int, ...]]]
    outputs: dict[str, tuple[int, tuple[int, ...]]]


def read_step_file(data: bytes) -> StepFile:
    """Parse the bytes of a step.

    Raises:
        Refused: not such a file, or one with a field that no step has; the line says where.
    """
    model = _Reader().message(memoryview(data), _MODEL, "model")
    graph = model.get("graph") or {}
    properties = [(_text(entry.get("key")), _text(entry.get("value"))) for entry in model["properties"]]
    found = StepFile(
        ir_version=model.get("ir_version", 0),
        opsets=tuple((_text(one.get("domain")), one.get("version", 0)) for one in model["opsets"]),
        properties=dict(properties),
        nodes=tuple(_node(one) for one in graph.get("nodes", ())),
        constants=tuple(_constant(one) for one in graph.get("constants", ())),
        inputs=dict(_value(one) for one in graph.get("inputs", ())),
        outputs=dict(_value(one) for one in graph.get("outputs", ())),
    )
    if len(properties) != len(found.properties) or any(
        len(graph.get(side, ())) != len(getattr(found, side)) for side in ("inputs", "outputs")
    ):
        raise Refused("training step: two properties, inputs or outputs have one name")
    return found


def _node(found: dict[str, Any]) -> Node:
    return Node(_text(found.get("operator")), tuple(map(_text, found["inputs"])), tuple(map(_text, found["outputs"])))


def _constant(found: dict[str, Any]) -> str:
    name, dimensions, element = _text(found.get("name")), found["dimensions"], found.get("element")
    if element not in _ITEM_BYTES:
        raise Refused(f"training step: constant {name[:40]} has element type {element}")
    if len(dimensions) > _MOST_DIMENSIONS or any(size < 0 for size in dimensions):
        raise Refused(f"training step: constant {name[:40]} has a shape that no step has")
    if math.prod(dimensions) * _ITEM_BYTES[element] != len(found.get("data", b"")):
        raise Refused(f"training step: constant {name[:40]} has not as many bytes as its shape says")
    return name


def _value(found: dict[str, Any]) -> tuple[str, tuple[int, tuple[int, ...]]]:
    tensor = (found.get("type") or {}).get("tensor") or {}
    sizes = [dimension.get("size", -1) for dimension in (tensor.get("shape") or {}).get("dimensions", ())]
    return _text(found.get("name")), (tensor.get("element", 0), tuple(sizes))


def _text(found: bytes | None) -> str:
    try:
        return bytes(found or b"").decode()
    except UnicodeDecodeError as error:
        raise Refused("training step: a name in the file is not text") from error


class _Reader:
    """Counts the fields of a file, so that millions of empty ones cost neither time nor memory."""

    def __init__(self) -> None:
        self.fields = 0

    def message(self, data: memoryview, table: _Table, where: str) -> dict[str, Any]:
        """The fields of a message by name; repeated ones as lists, empty where there are none."""
        found: dict[str, Any] = {name: [] for name, _, repeated in table.values() if repeated}
        for number, value in _fields(data, where):
            self.fields += 1
            if self.fields > _MOST_FIELDS:
                raise Refused(f"training step: it has more than {_MOST_FIELDS} fields")
            if number not in table:
                what = _OTHERS.get((where.rpartition(".")[2], number), f"number {number}")
                raise Refused(f"training step: {where} has a field ({what}) that no training step has")
            name, kind, repeated = table[number]
            if isinstance(value, int) != (kind is int):
                raise Refused(f"training step: {where}.{name} has another encoding than ONNX gives it")
            content = self.message(value, kind, f"{where}.{name}") if isinstance(kind, dict) else value
            if repeated:
                found[name].append(content)
            elif name in found:
                raise Refused(f"training step: {where}.{name} stands there twice")
            else:
                found[name] = content
        return found


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, Any]]:
    """Field number and content of every field: an integer, or a view of its bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place, where)
        if tag & 7 == 0:
            value, place = _varint(data, place, where)
            yield tag >> 3, value - (1 << 64) if value >= 1 << 63 else value
        elif tag & 7 == 2:
            size, place = _varint(data, place, where)
            if size > len(data) - place:
                raise Refused(f"training step: {where} ends in the middle of a field")
            yield tag >> 3, data[place : place + size]
            place += size
        else:
            raise Refused(f"training step: {where} has an encoding (wire type {tag & 7}) that no training step has")


def _varint(data: memoryview, place: int, where: str) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if place + i >= len(data):
            break
        byte = data[place + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80 and value < 1 << 64:
            return value, place + i + 1
    raise Refused(f"training step: {where} holds a number that does not end")
