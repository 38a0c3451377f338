"""The runtimes that a model can be exported for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import Refused

__all__ = ["TARGETS", "Target", "missing_package", "target_of"]


@dataclass(frozen=True)
class Target:
    """A runtime: ``module`` of this package that writes for it, packages that it takes, and what is promised of its artefact."""

    name: str
    module: str
    packages: tuple[str, ...]
    artefact: str
    integer: bool = True  # every layer with weights adds up integers
    float_head: bool = False  # the last layer with weights is float: its integers would give eight bits
    runs: bool = True  # on this machine
    writer: str = "write"


TARGETS = {
    target.name: target
    for target in (
        Target("onnx", "onnx", ("onnx", "onnxruntime"), "model.onnx"),
        Target("litert", "litert", ("ai_edge_litert", "flatbuffers"), "model.tflite"),
        Target("executorch", "executorch", ("executorch",), "model.xnnpack.pte", float_head=True),
        Target("executorch-portable", "executorch", ("executorch",), "model.portable.pte", integer=False, writer="write_portable"),
        Target("coreml", "coreml", ("coremltools",), "model.mlpackage", runs=False),
        Target("ncnn", "ncnn", ("ncnn",), "model.param"),
        Target("mnn", "mnn", ("MNN",), "model.mnn", integer=False),
        Target("micro", "micro", ("ai_edge_litert", "flatbuffers"), "model.cc"),
    )
}
_SUFFIXES = {".onnx": "onnx", ".tflite": "litert", ".pte": "executorch", ".mlpackage": "coreml", ".param": "ncnn", ".mnn": "mnn",
             ".cc": "micro", ".fcm": "fcm"}  # fmt: skip


def missing_package(target: Target) -> str | None:
    """The first package that a target takes and that is not installed."""
    return next((name for name in target.packages if importlib.util.find_spec(name) is None), None)


def target_of(path: Path) -> str:
    """The format of a file, by its suffix.

    Raises:
        Refused: none that we know.
    """
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise Refused(f"{path}: unknown kind of model file; known: {', '.join(_SUFFIXES)}")
    return kind
