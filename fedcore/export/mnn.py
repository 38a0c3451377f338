"""MNN: weights in int8 per channel, arithmetic in float; converted from a float ONNX file of the rounded weights.

MNN's importer of quantized ONNX crashes, so it is given floats that lie on the int8 grid already and rounds them to the same
integers. Its activations stay in float, clipped where the integer model saturates. The converter is called as a function of MNN's
extension module: the script that MNN installs for it would install packages and report the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export.artefact import Contents, Facts, Logits, Tensor
from fedcore.export.onnx import onnx_bytes
from fedcore.quantization.integer import IntegerModel, as_images

__all__ = ["describe", "load", "write"]

_FILE = "model.mnn"
_INPUT, _OUTPUT = "input", "logits"
_FLOAT = (
    "Convolution", "ConvolutionDepthwise", "MatMul", "Pooling", "ReLU", "ReLU6", "TanH", "Sigmoid", "BinaryOp", "LayerNorm",
    "InstanceNorm", "Reduction", "UnaryOp", "Eltwise", "Scale",
)  # fmt: skip
_INTEGER = ("ConvInt8", "DepthwiseConvInt8", "EltwiseInt8", "PoolInt8")


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.mnn``.

    Raises:
        Refused: the converter left no file.
    """
    path = folder / _FILE
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "float.onnx"
        source.write_bytes(onnx_bytes(as_images(model), {}, batch=1, in_float=True))
        _convert("-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(path), "--bizCode", json.dumps(facts.texts()),
                 "--weightQuantBits", "8", "--saveStaticModel")  # fmt: skip
    if not path.exists():
        raise Refused("export: MNN's converter left no file")
    return path


def load(path: Path, threads: int) -> Logits:
    """Open the file in MNN."""
    import MNN

    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
    net = MNN.nn.load_module_from_file(str(path), [_INPUT], [_OUTPUT], runtime_manager=runtime)

    def one(example: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        shape = [1, len(example), 1, example.shape[1]] if example.ndim == 2 else [1, *example.shape]
        given = MNN.expr.const(example, shape, MNN.expr.NCHW, MNN.expr.float)
        return np.array(net.forward([given])[0].read(), np.float32).reshape(-1)

    return lambda x: np.stack([one(np.ascontiguousarray(example)) for example in x])


def describe(path: Path) -> Contents:
    """What the file holds, as MNN's converter dumps it."""
    with tempfile.TemporaryDirectory() as place:
        dump = Path(place) / "model.json"
        _convert("-f", "MNN", "--modelFile", str(path), "--JsonFile", str(dump))
        if not dump.exists():
            raise Refused(f"{path.name}: MNN's converter cannot read it")
        net = json.loads(dump.read_text(errors="replace"))
    kinds = Counter(operator["type"] for operator in net["oplists"])
    entrance = next(operator["main"]["dims"] for operator in net["oplists"] if operator["type"] == "Input")
    quantized = sum("quanParameter" in operator.get("main", {}) for operator in net["oplists"])
    with contextlib.suppress(ValueError, TypeError):
        return _contents(path, kinds, entrance, quantized, json.loads(net.get("bizCode") or "{}"))
    return _contents(path, kinds, entrance, quantized, {})


def _contents(path: Path, kinds: Counter[str], shape: list[int], quantized: int, texts: dict[str, str]) -> Contents:
    return Contents(
        "mnn", path.stat().st_size, (Tensor(_INPUT, tuple(shape), "float"),), (Tensor(_OUTPUT, (None,), "float"),),
        dict(sorted(kinds.items())), sum(kinds[kind] for kind in _INTEGER), sum(kinds[kind] for kind in _FLOAT),
        f"int8 weights per channel in {quantized} layers, activations in float", texts,
    )  # fmt: skip


def _convert(*arguments: str) -> None:
    import _tools

    with _silent():
        _tools.mnnconvert(["mnnconvert", *arguments])


@contextlib.contextmanager
def _silent() -> Iterator[Any]:
    """The converter prints from C; standard output belongs to the caller."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
