"""LiteRT (TensorFlow Lite): the integer model as a flatbuffer, written operator by operator, int8 in and float logits out.

Quantization follows https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec: int8 per-channel
weights, int32 biases, per-tensor activations. Images are [1, height, width, channels], windows [1, steps, channels], as the
runtime's kernels have them; the columns of a layer behind a flattening are put in that order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from fedcore.errors import Refused
from fedcore.export.artefact import Contents, Facts, Logits, Tensor
from fedcore.export.litert_metadata import append_labels
from fedcore.export.litert_writer import FACTS, IDENTIFIER, LiteRTWriter
from fedcore.quantization.integer import IntegerModel

__all__ = ["channels_last", "describe", "load", "write"]

_FILE = "model.tflite"
_OPS, _TYPES = schema.BuiltinOperator, schema.TensorType
_ARITHMETIC = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "AVERAGE_POOL_2D", "MEAN", "ADD", "SUB", "MUL", "RSQRT",
               "SQUARED_DIFFERENCE", "RELU", "TANH", "LOGISTIC")  # fmt: skip
_LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

Array = npt.NDArray[Any]


def write(model: IntegerModel, folder: Path, facts: Facts, *, micro: bool = False) -> Path:
    """Write ``folder/model.tflite``; its input is int8 where the model begins on a grid. The last dense layer multiplies int16 by
    int8 (the runtime's 16x8 kernels): in eight bits the two largest logits of several in a hundred examples would be equal.
    Weights whose integers fit four bits are stored in four.

    For ``micro`` the file is as TensorFlow Lite Micro's reference kernels need it: weights of dense layers in eight bits, float
    weights where a layer calculates in float (they would dequantize all channels by the first's scale), see `fixed_point_bias`.

    Raises:
        Refused: padding that the runtime's operators do not have; the line names the layer.
    """
    writer = LiteRTWriter(model, micro=micro)
    for position, step in enumerate(model.steps, 1):
        writer.add(step, position)
    path = folder / _FILE
    path.write_bytes(append_labels(writer.finish(facts), facts))
    return path


def load(path: Path, threads: int) -> Logits:
    """Open the file in LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def one(example: npt.NDArray[np.float32]) -> Array:
        interpreter.set_tensor(taken["index"], on_input_grid(example, taken["dtype"], taken["quantization"]))
        interpreter.invoke()
        return off_output_grid(interpreter.get_tensor(given["index"]), given["quantization"])

    return lambda x: np.concatenate([one(example[None]) for example in channels_last(x)])


def on_input_grid(x: npt.NDArray[np.float32], kind: Any, quantization: tuple[float, int]) -> Array:
    """``x`` as the input tensor takes it."""
    if np.dtype(kind) == np.float32:
        return x
    scale, zero = quantization
    integers = np.rint(x * (np.float32(1) / np.float32(scale))) + zero
    return np.asarray(np.clip(integers, -128, 127), np.int8)


def off_output_grid(y: Array, quantization: tuple[float, int]) -> Array:
    """The real numbers of an output tensor."""
    return y if y.dtype == np.float32 else np.asarray((y.astype(np.float32) - quantization[1]) * np.float32(quantization[0]))


def channels_last(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[n, channels, *space] as [n, *space, channels]."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def describe(path: Path) -> Contents:
    """What the file holds, read without running it; integer operators are convolutions and dense layers."""
    data = path.read_bytes()
    if data[4:8] != IDENTIFIER:
        raise Refused(f"{path.name}: not a LiteRT model: its identifier is not {IDENTIFIER.decode()}")
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]  # the others are bodies of control flow
    names = {value: name for name, value in vars(_OPS).items() if not name.startswith("_")}
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]  # older files have the second only
    kinds = [names[codes[one.opcodeIndex]] for one in graph.operators]
    taken_by = [(kind, graph.tensors[one.inputs[0]].type) for one, kind in zip(graph.operators, kinds, strict=True)
                if kind in _ARITHMETIC]  # fmt: skip
    computing = [number for _, number in taken_by]
    stored = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata or []}
    texts = json.loads(stored[FACTS]) if FACTS in stored else {}
    taken, given = (tuple(_tensor(graph.tensors[i]) for i in side) for side in (graph.inputs, graph.outputs))
    integers = sum(kind in _LAYERS and number in (_TYPES.INT8, _TYPES.INT16) for kind, number in taken_by)
    return Contents(
        "litert", len(data), taken, given, {kind: kinds.count(kind) for kind in sorted(set(kinds))}, integers,
        computing.count(_TYPES.FLOAT32), _quantization_words(model, graph, computing), texts,
    )  # fmt: skip


def _quantization_words(model: Any, graph: Any, computing: list[int]) -> str:
    """How activations and the constants that lie on a grid are stored."""
    names = {value: name.lower() for name, value in vars(_TYPES).items() if not name.startswith("_")}
    scaled = [tensor for tensor in graph.tensors if tensor.quantization is not None and tensor.quantization.scale is not None]
    constants = [tensor.type for tensor in scaled if model.buffers[tensor.buffer].data is not None]
    kinds = sorted({names[kind] for kind in computing if kind != _TYPES.FLOAT32})
    stored = ", ".join(f"{constants.count(kind)} {names[kind]}" for kind in sorted(set(constants), key=names.__getitem__))
    return f"{' and '.join(kinds)} inputs of operators, constants: {stored}" if kinds else "none"


def _tensor(tensor: Any) -> Tensor:
    kinds = {value: name.lower() for name, value in vars(_TYPES).items() if not name.startswith("_")}
    quantization = tensor.quantization
    scaled = quantization is not None and quantization.scale is not None and len(quantization.scale)
    scale, zero = (float(quantization.scale[0]), int(quantization.zeroPoint[0])) if scaled else (None, None)
    return Tensor(tensor.name.decode(), tuple(map(int, tensor.shape)), kinds[tensor.type], scale, zero)
