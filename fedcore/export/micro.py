"""TensorFlow Lite Micro: the .tflite file as a C array, and the size of the arena that its tensors need.

The runtime cannot be installed beside the others; an interpreter that has ``tflite_micro`` (PyPI) is named by the user.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export import litert, micro_runner
from fedcore.export.artefact import Contents, Facts
from fedcore.quantization.integer import IntegerModel

__all__ = ["ARENA_LIMIT", "MicroRun", "describe", "run", "set_up", "write", "write_source"]

ARENA_LIMIT = 16 << 20
_SOURCE, _HEADER_BYTES = "model.cc", 16
_ARENA_SLACK = 1024  # on top of what the allocator recorded: it may need more on another processor


@dataclass(frozen=True, eq=False)
class MicroRun:
    """Logits [n, classes], milliseconds [n] in this machine's reference kernels, and the arena in bytes."""

    logits: npt.NDArray[np.float32]
    milliseconds: npt.NDArray[np.float64]
    arena: int


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.tflite``, without the archive of labels behind it: flash is dear."""
    return litert.write(model, folder, dataclasses.replace(facts, labels=()), micro=True)


def write_source(model: Path, arena: int) -> Path:
    """Write ``model.cc`` beside the .tflite file: ``fedcore_model``, its length, and ``fedcore_arena_bytes``."""
    data, path = model.read_bytes(), model.with_name(_SOURCE)
    rows = [", ".join(f"0x{byte:02x}" for byte in data[i : i + _HEADER_BYTES]) for i in range(0, len(data), _HEADER_BYTES)]
    body = ",\n  ".join(rows)
    path.write_text(
        "// A fedcore model for TensorFlow Lite Micro: int8 in and out.\n#include <cstddef>\n#include <cstdint>\n\n"
        f"extern const size_t fedcore_arena_bytes = {arena + _ARENA_SLACK};\n"
        f"extern const size_t fedcore_model_bytes = {len(data)};\n"
        f"alignas(16) extern const uint8_t fedcore_model[] = {{\n  {body}}};\n"
    )
    return path


def describe(path: Path) -> Contents:
    """What the array holds."""
    text = path.read_text(encoding="ascii", errors="strict")
    found, length = re.search(r"fedcore_model\[\] = \{([^}]*)\}", text), re.search(r"fedcore_model_bytes = (\d+)", text)
    arena = re.search(r"fedcore_arena_bytes = (\d+)", text)
    if not found or not length or not arena:
        raise Refused(f"{path.name}: not a source file of fedcore's")
    try:
        data = bytes(int(part, 16) for part in found[1].split(","))
    except ValueError as error:
        raise Refused(f"{path.name}: damaged array") from error
    if len(data) != int(length[1]):
        raise Refused(f"{path.name}: {len(data)} bytes where {length[1]} are promised")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.tflite"
        model.write_bytes(data)
        held = litert.describe(model)
    return Contents("micro", held.size, held.inputs, held.outputs, held.operators, held.integer, held.floating,
                    held.quantization, {**held.metadata, "arena_bytes": arena[1]})  # fmt: skip


def run(model: Path, x: npt.NDArray[np.float32], python: Path) -> MicroRun:
    """Run the .tflite file for x [n, *input_shape] in ``python``'s TensorFlow Lite Micro.

    Raises:
        Refused: it stopped; the line has its last words.
    """
    taken, given = litert.describe(model).inputs[0], litert.describe(model).outputs[0]
    scale, zero = (taken.scale or 1.0, taken.zero_point or 0)
    examples = litert.on_input_grid(litert.channels_last(x), np.int8 if taken.kind == "int8" else np.float32, (scale, zero))
    with tempfile.TemporaryDirectory() as folder:
        inputs, result = Path(folder) / "inputs.npy", Path(folder) / "result.npz"
        np.save(inputs, examples)
        command = [str(python), "-I", micro_runner.__file__, str(model), str(inputs), str(result), str(ARENA_LIMIT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own interpreter
        if done.returncode or not result.exists():
            words = done.stderr.strip().splitlines()
            raise Refused(f"TensorFlow Lite Micro stopped with code {done.returncode}: {words[-1][:200] if words else 'silently'}")
        with np.load(result, allow_pickle=False) as found:
            outputs = litert.off_output_grid(found["outputs"], (given.scale or 1.0, given.zero_point or 0))
            return MicroRun(outputs, found["milliseconds"], int(found["arena"]))


def set_up(directory: Path) -> Path:
    """Make a virtual environment with tflite_micro in ``directory``; returns its interpreter. Needs a package index.

    Raises:
        Refused: pip could not install it; the line has its last words.
    """
    python = directory / "bin" / "python"
    for command in ([sys.executable, "-m", "venv", str(directory)], [str(python), "-m", "pip", "install", "-q", "tflite-micro"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - nothing of the command is given
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines()
            raise Refused(f"--setup-micro {directory}: {words[-1][:300] if words else 'failed'}")
    return python
