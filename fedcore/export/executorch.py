"""ExecuTorch: one program for XNNPACK's integer kernels, one for the portable kernels, which dequantize and calculate in float."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export.artefact import Contents, Facts, Logits, Tensor
from fedcore.quantization.integer import IntegerModel

__all__ = ["describe", "load", "write", "write_portable"]

_XNNPACK, _PORTABLE, _TEXTS = "model.xnnpack.pte", "model.portable.pte", "model.json"
_MAGIC = b"ET12"
_LAYERS = ("Conv2d", "DepthwiseConv2d", "FullyConnected")
_CALCULATING = (*_LAYERS, "Add", "AvgPooling2d", "GlobalAvgPooling2d", "Multiply", "Subtract", "Sigmoid", "Tanh")
_FLOAT_KERNELS = ("convolution", "addmm", "mm", "linear", "relu", "avg_pool2d", "mean", "add", "mul", "sub", "tanh", "sigmoid",
                  "native_group_norm")  # fmt: skip


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.xnnpack.pte``."""
    return _write(model, folder / _XNNPACK, facts, portable=False)


def write_portable(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.portable.pte``: int8 in storage, float in arithmetic."""
    return _write(model, folder / _PORTABLE, facts, portable=True)


def _write(model: IntegerModel, path: Path, facts: Facts, *, portable: bool) -> Path:
    import executorch.kernels.quantized  # noqa: F401 - registers the out variants of quantize and dequantize
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from fedcore.export.graph import QuantizedGraph

    program = torch.export.export(QuantizedGraph(model).eval(), (torch.zeros(1, *model.input_shape),))
    edge = to_edge_transform_and_lower(
        program, partitioner=None if portable else [XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),  # the q/dq operators are none of the core ones
        constant_methods={"facts": json.dumps(facts.texts())},
    )  # fmt: skip
    path.write_bytes(edge.to_executorch().buffer)
    return path


def load(path: Path, threads: int) -> Logits:
    """Open the program in ExecuTorch's runtime; its thread pool has the machine's size, so ``threads`` is kept by affinity."""
    import os

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import executorch.kernels.quantized  # noqa: F401 - the portable program's q/dq kernels
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    if method is None:
        raise Refused(f"{path.name}: the program has no method forward")

    def one(example: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (logits,) = method.execute([torch.from_numpy(np.ascontiguousarray(example))])
        return np.array(logits)

    return lambda x: np.concatenate([one(example[None]) for example in x])


def describe(path: Path) -> Contents:
    """What the program holds, read without running it; XNNPACK's graphs are opened, too. Integer operators are convolutions and
    dense layers."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    data = path.read_bytes()
    if data[4:8] != _MAGIC:
        raise Refused(f"{path.name}: not an ExecuTorch program: its identifier is not {_MAGIC.decode()}")
    program = deserialize_pte_binary(data).program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    operators: Counter[str] = Counter()
    integer = floating = 0
    for kernel in _kernels(plan):
        operators[kernel] += 1
        floating += kernel.partition("::")[2] in _FLOAT_KERNELS
    for delegate in plan.delegates:
        blob = program.backend_delegate_data[delegate.processed.index].data
        for kind, quantized in _xnnpack_nodes(bytes(blob)):
            operators[f"xnnpack::{kind}"] += 1
            integer += quantized and kind in _LAYERS
            floating += not quantized and kind in _CALCULATING
    values = [plan.values[index].val for index in (plan.inputs[0], plan.outputs[0])]
    taken, given = (Tensor(name, tuple(value.sizes), "float") for name, value in zip(("input", "logits"), values, strict=True))
    words = "int8 weights per channel, int8 activations" if integer else "int8 weights, dequantized where they are used"
    return Contents("executorch", len(data), (taken,), (given,), dict(operators), integer, floating, words, _facts(program))


def _kernels(plan: Any) -> Iterator[str]:
    """The portable kernels that are called, in order."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            index = getattr(instruction.instr_args, "op_index", None)
            if index is not None:
                yield str(plan.operators[index].name)


def _xnnpack_nodes(blob: bytes) -> Iterator[tuple[str, bool]]:
    """Each node of a delegated graph, and whether its result is an integer tensor.

    The blob: 4 reserved bytes, ``XH00``, header length u16, flatbuffer offset and size u32, as in XNNPACK's own header.
    """
    from executorch.backends.xnnpack import serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    if blob[4:8] != b"XH00":
        raise Refused("ExecuTorch program: a delegate that is not XNNPACK's cannot be read")
    offset, size = (int.from_bytes(blob[start : start + 4], "little") for start in (10, 14))
    with tempfile.TemporaryDirectory() as folder:
        schema, packed = Path(next(iter(serialization.__path__))) / "runtime_schema.fbs", Path(folder) / "graph.bin"
        packed.write_bytes(blob[offset : offset + size])
        _flatc_decompile(folder, str(schema), str(packed), ["--raw-binary"])
        graph = json.loads(re.sub(r": -?(inf|nan)\b", ": null", (Path(folder) / "graph.json").read_text()))  # not JSON's words
    integers = {
        value["xvalue_union"]["tensor_value"]["id_out"] for value in graph["xvalues"]
        if value["xvalue_union_type"] == "XNNQuantizedTensorValue"
    }  # fmt: skip
    for node in graph["xnodes"]:
        yield node["xnode_union_type"].removeprefix("_").removeprefix("XNN"), node["xnode_union"].get("output_id", 0) in integers


def _facts(program: Any) -> dict[str, str]:
    """The facts stand in the program as a method that returns a string."""
    for plan in program.execution_plan:
        if plan.name == "facts":
            text = getattr(plan.values[plan.outputs[0]].val, "string_val", "{}")
            return {str(key): str(value) for key, value in json.loads(text).items()}
    return {}
