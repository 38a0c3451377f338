"""A released model file, opened in the runtime it was made for: ONNX Runtime or LiteRT, through a delegate or on the CPU.

Both give the same function, float32 logits [n, classes] of normalised examples [n, channels, *space], so that nothing above here
knows which one runs. What the model wants to be fed (mean, deviation, labels) stands in the file.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export.artefact import Facts

__all__ = ["CPU", "RUNTIMES", "Opened", "default_delegates", "open_artefact", "usable_runtimes"]

CPU = "cpu"
RUNTIMES = {"onnx": "onnxruntime", "litert": "ai_edge_litert"}
"""The runtimes that a device can run, by the name that releases give them, and the package of each."""
_NO_ACCELERATORS = {"CPUExecutionProvider", "AzureExecutionProvider"}
_CHUNK = 64  # examples at once: what a run needs on top of the model stays bounded
_LARGEST = 2 << 30
_METADATA = b"fedcore"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Opened:
    """``shape`` is one example's [channels, *space]; ``logits`` may be called by several threads at once."""

    delegate: str
    shape: tuple[int, ...]
    classes: int
    facts: Facts
    logits: Callable[[Floats], Floats]


@functools.cache
def usable_runtimes() -> tuple[str, ...]:
    """Those of `RUNTIMES` whose package is installed, the preferred one first."""
    return tuple(name for name, package in RUNTIMES.items() if importlib.util.find_spec(package) is not None)


def default_delegates(runtime: str) -> tuple[str, ...]:
    """What is tried in turn: the accelerators that ONNX Runtime was built with, then the CPU. LiteRT's are shared libraries, which
    only the app can name."""
    if runtime != "onnx":
        return (CPU,)
    import onnxruntime

    return (*(name for name in onnxruntime.get_available_providers() if name not in _NO_ACCELERATORS), CPU)


def open_artefact(path: Path, runtime: str, delegate: str = CPU, threads: int = 1) -> Opened:
    """Open a file.

    Args:
        delegate: `CPU`, an execution provider of ONNX Runtime, or the path of a LiteRT delegate's shared library.

    Raises:
        Refused: the runtime cannot open the file through this delegate; the line says why.
        FileNotFoundError: the file is not there.
    """
    if path.stat().st_size > _LARGEST:
        raise Refused(f"{path}: a model of more than {_LARGEST >> 30} GiB")
    opening = {"onnx": _open_onnx, "litert": _open_litert}.get(runtime)
    if opening is None:
        raise Refused(f"{path}: made for {runtime}; this device runs {', '.join(RUNTIMES)}")
    try:
        return opening(path, delegate, threads)
    except Refused:
        raise
    except Exception as error:  # whatever a runtime says of a file or a driver
        path.stat()  # it is gone: that is for the caller
        raise Refused(f"{runtime} on {delegate} cannot open {path.name[:16]}: {_line(error)}") from error


def _open_onnx(path: Path, delegate: str, threads: int) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a device's battery
    options.log_severity_level = 4
    provider = "CPUExecutionProvider" if delegate == CPU else delegate
    if provider not in onnxruntime.get_available_providers():
        raise Refused(f"onnx on {delegate}: this ONNX Runtime was built without it")
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=[provider])
    if session.get_providers()[0] != provider:  # it goes on with the CPU without a word
        raise Refused(f"onnx on {delegate}: its driver or device is not there")
    session.disable_fallback()
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    shape = _sizes(taken.shape[1:], path)
    facts = Facts.of_texts(session.get_modelmeta().custom_metadata_map)
    return Opened(delegate, shape, int(given.shape[-1]), facts, _in_chunks(
        lambda x: np.asarray(session.run([given.name], {taken.name: x})[0], np.float32)
    ))  # fmt: skip


def _open_litert(path: Path, delegate: str, threads: int) -> Opened:
    from ai_edge_litert.interpreter import Interpreter, load_delegate

    if delegate != CPU and not Path(delegate).exists():
        raise Refused(f"litert on {delegate}: there is no such library")
    delegates = [] if delegate == CPU else [load_delegate(delegate)]
    facts = Facts.of_texts(_litert_texts(path.read_bytes()))
    interpreter = Interpreter(model_path=str(path), num_threads=threads, experimental_delegates=delegates)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    one_at_a_time = threading.Lock()  # an interpreter has one set of tensors

    def one(example: npt.NDArray[Any]) -> Floats:
        interpreter.set_tensor(taken["index"], _onto_grid(example, taken))
        interpreter.invoke()
        return _off_grid(interpreter.get_tensor(given["index"]), given)

    def logits(x: Floats) -> Floats:
        last = np.ascontiguousarray(np.moveaxis(x, 1, -1))  # its kernels want channels last
        with one_at_a_time:
            return np.concatenate([one(example[None]) for example in last])

    sizes = _sizes(taken["shape"][1:], path)
    return Opened(delegate, (sizes[-1], *sizes[:-1]), int(given["shape"][-1]), facts, logits)


def _onto_grid(x: Floats, tensor: Any) -> npt.NDArray[Any]:
    if np.dtype(tensor["dtype"]) == np.float32:
        return x
    scale, zero = tensor["quantization"]
    return np.asarray(np.clip(np.rint(x * (np.float32(1) / np.float32(scale))) + zero, -128, 127), np.int8)


def _off_grid(y: npt.NDArray[Any], tensor: Any) -> Floats:
    if y.dtype == np.float32:
        return np.array(y)
    scale, zero = tensor["quantization"]
    return np.asarray((y.astype(np.float32) - zero) * np.float32(scale))


def _litert_texts(data: bytes) -> dict[str, str]:
    """What an export wrote into the file about the model; nothing where it is of another origin."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    for position in range(model.MetadataLength()):
        entry = model.Metadata(position)
        if entry.Name() == _METADATA:
            return dict(json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()))
    return {}


def _in_chunks(run: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    return lambda x: run(x) if len(x) <= _CHUNK else np.concatenate([run(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])


def _sizes(shape: Sequence[Any], path: Path) -> tuple[int, ...]:
    sizes = tuple(int(side) if isinstance(side, (int, np.integer)) else 0 for side in shape)
    if not sizes or min(sizes) < 1:
        raise Refused(f"{path.name[:16]}: its input has no fixed shape for one example")
    return sizes


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
