"""NCNN: ``model.param`` (text) and ``model.bin``, with int8 kernels for every layer with weights.

Format: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure and operation-param-weight-table. NCNN's int8 is
symmetric: an activation on [0, 6] gets 127 steps where the integer model has 255, which is why its agreement is lower. Each layer
rounds its own input, so pooling runs in float. The format has no place for metadata; they stand beside the model, in
``model.json``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export.artefact import Contents, Facts, Logits, Tensor
from fedcore.quantization.integer import (
    Convolution,
    Dense,
    Elementwise,
    Flatten,
    GroupNorm,
    IntegerModel,
    Pool,
    Step,
    Weights,
)  # fmt: skip
from fedcore.quantization.wire import ActivationRange

__all__ = ["describe", "load", "write"]

_MAGIC, _INT8_TAG = "7767517", 0x000D4B38
_FILE, _BLOB, _TEXTS = "model.param", "model.bin", "model.json"
_KINDS = {"relu": "ReLU", "tanh": "TanH", "sigmoid": "Sigmoid", "add": "BinaryOp"}
_WEIGHTED = ("Convolution", "ConvolutionDepthWise", "InnerProduct")
_FLOAT = ("Pooling", "ReLU", "TanH", "Sigmoid", "BinaryOp", "GroupNorm")
_INT8_SCALES = 8  # key of the parameter that says a layer has them
_MOST_LAYERS = 100_000


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.param`` and what belongs to it."""
    writer = _Writer(model)
    for position, step in enumerate(model.steps, 1):
        writer.add(step, position)
    path = folder / _FILE
    path.write_text(writer.text())
    (folder / _BLOB).write_bytes(b"".join(writer.blobs))
    (folder / _TEXTS).write_text(json.dumps(facts.texts(), indent=2) + "\n")
    return path


def load(path: Path, threads: int) -> Logits:
    """Open the files in NCNN."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    if net.load_param(str(path)) or net.load_model(str(path.with_name(_BLOB))):
        raise Refused(f"{path.name}: NCNN cannot load it")

    def one(example: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        extractor = net.create_extractor()
        shaped = example[:, None] if example.ndim == 2 else example
        extractor.input("input", ncnn.Mat(np.ascontiguousarray(shaped)).clone())
        code, logits = extractor.extract("logits")
        if code:
            raise Refused(f"{path.name}: NCNN stopped with code {code}")
        return np.array(logits, np.float32).reshape(-1)

    return lambda x: np.stack([one(example) for example in x])


def describe(path: Path) -> Contents:
    """What the files hold, read from the text; the weights must be there and complete."""
    lines = path.read_text(encoding="ascii", errors="strict").splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise Refused(f"{path.name}: not an NCNN model: it does not begin with {_MAGIC}")
    layers, _ = (int(number) for number in lines[1].split())
    if layers > _MOST_LAYERS or len(lines) - 2 != layers:
        raise Refused(f"{path.name}: damaged NCNN model: {len(lines) - 2} layers where {layers} are promised")
    parsed = [_parse(line, path) for line in lines[2:]]
    blob = path.with_name(_BLOB)
    expected, size = sum(map(_weight_bytes, parsed)), blob.stat().st_size if blob.exists() else 0
    if size != expected:
        raise Refused(f"{path.name}: damaged NCNN model: {blob.name} has {size} bytes where the layers need {expected}")
    kinds = [kind for kind, _ in parsed]
    integer = sum(kind in _WEIGHTED and bool(keys.get(_INT8_SCALES)) for kind, keys in parsed)
    floating = sum(kind in _WEIGHTED or kind in _FLOAT for kind in kinds) - integer
    (_, entrance), outputs = parsed[0], [keys[0] for kind, keys in parsed if kind in _WEIGHTED]
    shape = tuple(int(entrance[key]) for key in (2, 1, 0) if key in entrance)
    texts = path.with_name(_TEXTS)
    return Contents(
        "ncnn", path.stat().st_size + size, (Tensor("input", shape, "float"),),
        (Tensor("logits", (int(outputs[-1]) if outputs else None,), "float"),), {kind: kinds.count(kind) for kind in
        sorted(set(kinds))}, integer, floating, "int8 weights per channel, symmetric int8 inputs of layers with weights" if integer
        else "none", json.loads(texts.read_text()) if texts.exists() else {},
    )  # fmt: skip


def _parse(line: str, path: Path) -> tuple[str, dict[int, float]]:
    try:
        kind, _, inputs, outputs, *rest = line.split()
        values = rest[int(inputs) + int(outputs) :]
        return kind, {int(key): float(value) for key, value in (pair.split("=") for pair in values)}
    except ValueError as error:
        raise Refused(f"{path.name}: damaged NCNN model: line {line[:60]!r} cannot be read") from error


def _weight_bytes(layer: tuple[str, dict[int, float]]) -> int:
    kind, keys = layer
    if kind == "GroupNorm":
        return 8 * int(keys[1]) if keys.get(3) else 0
    if kind not in _WEIGHTED:
        return 0
    count, outputs = int(keys[2 if kind == "InnerProduct" else 6]), int(keys[0])
    if keys.get(_INT8_SCALES):
        return 4 + count + -count % 4 + 4 * outputs * 2 + 4
    return 4 + 4 * count + 4 * outputs


class _Writer:
    """Collects the text's lines and the binary's arrays; a blob that several layers read is split first, as NCNN asks."""

    def __init__(self, model: IntegerModel) -> None:
        self.blobs: list[bytes] = []
        self._lines: list[str] = []
        self._made: set[str] = set()
        self._model = model
        channels, *space = model.input_shape
        sides = dict(enumerate([*reversed(space), *([1] if len(space) == 1 else []), channels])) if space else {0: channels}
        self._names: list[list[str]] = []
        self._layer("Input", "input", [], ["input"], sides)
        self._offer(0, "input")

    def text(self) -> str:
        """The contents of the .param file."""
        return "\n".join([_MAGIC, f"{len(self._lines)} {len(self._made)}", *self._lines]) + "\n"

    def add(self, step: Step, position: int) -> None:
        """Write one step; a requantization is left to the layers that read it."""
        inputs, operation = [self._names[place].pop() for place in step.inputs], step.operation
        last = position == len(self._model.steps)
        if isinstance(operation, Elementwise) and operation.kind == "requantize":
            self._offer(position, inputs[0])
            return
        output = "logits" if last else f"v{position}"
        kind, keys = self._described(step, operation)
        self._layer(kind, f"{position}.{step.name}", inputs, [output], keys)
        self._offer(position, output)

    def _described(self, step: Step, operation: Any) -> tuple[str, dict[int, Any]]:
        if isinstance(operation, Convolution | Dense):
            grid = self._model.grid(step.inputs[0])
            return self._weighted(operation, grid)
        if isinstance(operation, Pool):
            return "Pooling", _pool(operation)
        if isinstance(operation, Flatten):
            return "Flatten", {}
        if isinstance(operation, GroupNorm):
            self.blobs += [operation.weight.tobytes(), operation.bias.tobytes()]
            return "GroupNorm", {0: operation.groups, 1: len(operation.weight), 2: operation.epsilon, 3: 1}
        return _KINDS[operation.kind], {0: 0} if operation.kind == "add" else {}

    def _weighted(self, operation: Convolution | Dense, grid: ActivationRange | None) -> tuple[str, dict[int, Any]]:  # fmt: skip
        weights = operation.weights
        outputs, size = len(weights.values), weights.values.size
        activation = {9: 1} if operation.relu else {}
        if isinstance(operation, Dense):
            scales = self._store(weights, grid)
            return "InnerProduct", {0: outputs, 1: 1, 2: size, **scales, **activation}
        depthwise = operation.groups == outputs and weights.values.shape[1] == 1
        if operation.groups > 1 and not depthwise:
            grid = None  # NCNN has one scale a group, the integer model one a channel
        (kernel, dilation, stride, pad) = (
            (*[usual] * (2 - len(given)), *given) for usual, given in (
                (1, weights.values.shape[2:]), (1, operation.dilation), (1, operation.stride), (0, operation.padding))
        )  # fmt: skip
        keys = {
            0: outputs, 1: kernel[1], 11: kernel[0], 2: dilation[1], 12: dilation[0], 3: stride[1], 13: stride[0],
            4: pad[1], 15: pad[1], 14: pad[0], 16: pad[0], 5: 1, 6: size, **self._store(weights, grid), **activation,
        }  # fmt: skip
        return ("ConvolutionDepthWise", keys | {7: operation.groups}) if operation.groups > 1 else ("Convolution", keys)

    def _store(self, weights: Weights, grid: ActivationRange | None) -> dict[int, int]:
        """Append weights, bias and scales; integers where the input's grid is known."""
        values, bias = weights.real()
        if weights.scale is None or grid is None:
            self.blobs += [struct.pack("<I", 0), values.tobytes(), bias.tobytes()]
            return {}
        data = weights.values.tobytes()
        peak = max((127 - grid.zero_point) * grid.scale, (128 + grid.zero_point) * grid.scale)
        self.blobs += [struct.pack("<I", _INT8_TAG), data + bytes(-len(data) % 4), bias.tobytes()]
        self.blobs += [(np.float32(1) / weights.scale).tobytes(), np.float32(127 / peak).tobytes()]
        return {_INT8_SCALES: 1}

    def _offer(self, position: int, name: str) -> None:
        """Make the value available to as many readers as it has."""
        readers = sum(step.inputs.count(position) for step in self._model.steps)
        names = [name]
        if readers > 1:
            names = [f"{name}.{reader}" for reader in range(readers)]
            self._layer("Split", f"{name}.split", [name], names, {})
        self._names.append(names)

    def _layer(self, kind: str, name: str, inputs: list[str], outputs: list[str], keys: dict[int, Any]) -> None:
        self._made.update(outputs)
        values = [f"{key}={value}" for key, value in keys.items()]
        self._lines.append(" ".join([kind, name, str(len(inputs)), str(len(outputs)), *inputs, *outputs, *values]))


def _pool(operation: Pool) -> dict[int, Any]:
    kernel, stride, pad = (
        (*[usual] * (2 - len(given)), *given)
        for usual, given in ((1, operation.kernel), (1, operation.stride), (0, operation.padding))
    )
    return {
        0: int(operation.kind == "average"), 1: kernel[1], 11: kernel[0], 2: stride[1], 12: stride[0], 3: pad[1], 14: pad[1],
        13: pad[0], 15: pad[0], 5: 0 if operation.ceil else 1, 6: int(operation.count_padding),
    }  # fmt: skip
