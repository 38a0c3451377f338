"""The trainer for app developers: C source, header, library or object for a device's processor, and its memory plan.

Native code is built by the developer and never downloaded to devices.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedcore.errors import Refused
from fedcore.native.blocks import LANES, Blocks, plan
from fedcore.native.build import AVX2, COMMON, NEON, SHARED, BuildFailed, compile_library
from fedcore.native.emit import source
from fedcore.native.layers import lower
from fedcore.native.manifest import describe
from fedcore.native.memory import Memory, plan_memory
from fedcore.native.tiles import Target
from fedcore.portable.library import MANIFEST

__all__ = ["DEVICES", "Delivery", "deliver", "load_alignment"]

# Devices load libraries by pages of up to 16 KiB (Android 15), which x86-64 and other ARM systems accept too.
_PAGES = "-Wl,-z,max-page-size=16384"
_NUMBER = 4  # bytes


@dataclass(frozen=True)
class Device:
    """A target of `deliver`: its processor, the form of what is built, and examples worked on together (0: as here)."""

    processor: Target
    flags: tuple[str, ...]
    file: str
    rows: int = 0


DEVICES: Mapping[str, Device] = {
    "x86_64": Device(AVX2, (*SHARED, _PAGES), "libtrainer.so"),
    "aarch64-linux": Device(NEON, (*SHARED, _PAGES), "libtrainer.so"),
    "aarch64-android": Device(
        Target("neon", ("-target", "aarch64-linux-android", "-mcpu=generic"), 6), (*SHARED, _PAGES), "libtrainer.so"
    ),
    # Fused as on other processors: the one instruction that multiplies and adds rounds twice, the other has to be asked for. It is
    # not where rounding to a grid says so, which plain "fast" does not heed.
    "cortex-m4": Device(
        Target("m4", ("-target", "thumb-freestanding-eabihf", "-mcpu=cortex_m4+vfp4d16sp-slowfpvfmx-slowfpvmlx"), 6),
        ("-Os", "-ffp-contract=fast-honor-pragmas", "-ffunction-sections", "-c"), "trainer.o", rows=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Delivery:
    """What was built. ``code_bytes``: instructions and constants; ``parameter_bytes``: of the model; ``peak_bytes``: memory of one
    training step beside the examples: parameters, workspace and update; ``description``: the file that an agent reads, or why there
    is none."""

    target: str
    file: str
    code_bytes: int
    parameters: int
    parameter_bytes: int
    workspace_bytes: int
    peak_bytes: int
    examples_together: int
    description: str = ""
    no_description: str = ""


def deliver(
    model: nn.Module, input_shape: tuple[int, ...], target: str, out: Path, batches: Iterable[int] = (),
    loss: str = "cross_entropy",
) -> Delivery:  # fmt: skip
    """Write ``trainer.c``, ``trainer.h`` and the compiled file for a target into the directory ``out``, and for a device's agent
    ``trainer.json``, which names the training steps of ``batches`` too. It minimizes one ``loss`` of `config.LOSSES`.

    Raises:
        Unsupported: a layer that the generator does not know.
        BuildFailed: an unknown target, no compiler, or a directory that cannot be written.
    """
    if target not in DEVICES:
        raise BuildFailed(f"target {target!r} is not known; allowed: {', '.join(DEVICES)}")
    device = DEVICES[target]
    blocks = plan(lower(model, input_shape), model)
    memory = plan_memory(blocks, device.rows)
    text = source(blocks, memory, device.processor, loss)
    library = out / device.file
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "trainer.h").write_text(_header(blocks, memory, loss), encoding="ascii")
        compile_library(text, (*device.processor.flags, *COMMON, *device.flags), library)
        library.with_suffix(".c").replace(out / "trainer.c")  # which the compiler was given
        (out / MANIFEST).unlink(missing_ok=True)
        why = ""
        try:
            described = describe(model, input_shape, blocks, memory, library, device.processor, batches, loss)
            (out / MANIFEST).write_text(described.to_json(), encoding="utf-8")
        except Refused as error:
            why = str(error)
    except OSError as error:
        raise BuildFailed(f"{out} cannot be written ({error.strerror})") from error
    parameters = sum(math.prod(parameter.dims) for parameter in blocks.parameters)
    workspace = _NUMBER * memory.numbers + memory.bytes
    blobs = _NUMBER * (blocks.blob + LANES + blocks.trainable + LANES)
    return Delivery(
        target, str(library), _code_bytes(library.read_bytes()), parameters, _NUMBER * parameters, workspace, workspace + blobs,
        memory.rows, "" if why else str(out / MANIFEST), why,
    )  # fmt: skip


def load_alignment(library: bytes) -> int:
    """The smallest alignment of a loaded segment of an ELF file, bytes; 0 where nothing is loaded (an object)."""
    wide = library[4] == 2
    start, size, count = (
        (*struct.unpack_from("<Q", library, 32), *struct.unpack_from("<HH", library, 54)) if wide
        else (*struct.unpack_from("<I", library, 28), *struct.unpack_from("<HH", library, 42))
    )  # fmt: skip
    found = []
    for n in range(count):
        at = start + n * size
        (kind,) = struct.unpack_from("<I", library, at)
        if kind == 1:  # PT_LOAD
            found.append(struct.unpack_from("<Q", library, at + 48)[0] if wide else struct.unpack_from("<I", library, at + 28)[0])
    return min(found, default=0)


def _code_bytes(library: bytes) -> int:
    """Bytes of an ELF file's sections that are loaded and not written to."""
    wide = library[4] == 2
    start = struct.unpack_from("<Q", library, 40)[0] if wide else struct.unpack_from("<I", library, 32)[0]
    size, count = struct.unpack_from("<HH", library, 58 if wide else 46)
    total = 0
    for n in range(count):
        at = start + n * size
        if wide:
            (flags,), (length,) = struct.unpack_from("<Q", library, at + 8), struct.unpack_from("<Q", library, at + 32)
        else:
            (flags,), (length,) = struct.unpack_from("<I", library, at + 8), struct.unpack_from("<I", library, at + 20)
        if flags & 2 and not flags & 1:  # SHF_ALLOC, not SHF_WRITE
            total += length
    return total


def _header(blocks: Blocks, memory: Memory, loss: str = "cross_entropy") -> str:
    source_shape = blocks.network.source
    sizes = {
        "EXAMPLE": (source_shape[0] * source_shape[1] * source_shape[2], "numbers of one example, as torch lays them out"),
        "CLASSES": (blocks.network.classes, "labels are 0 to one less"),
        "PARAMETERS": (blocks.trainable, "trainable parameters, in torch's order"),
        "BLOB": (blocks.blob + LANES, "numbers of the start as import_start lays them out"),
        "RANGES": (len(blocks.quantizers), "activation ranges; on = 0 in each before calibration"),
        "WORK": (memory.numbers, "numbers of workspace, zero before the first call"),
        "BYTES": (memory.bytes, "bytes of workspace"),
        "PADDING": (LANES, "numbers behind x, ranges, noise and update that may be read or written"),
    }
    frozen = [parameter.name for parameter in blocks.parameters if not parameter.trainable]
    lines = [
        "/* A client's local training in one call; see fedcore native build. No libc is needed. Buffers begin at 64 bytes. */",
        "#ifndef TRAINER_H", "#define TRAINER_H", "#include <stdint.h>", "",
        *(f"#define TRAINER_{name} {value} /* {words} */" for name, (value, words) in sizes.items()), "",
        *([] if loss == "cross_entropy" else [f"/* The loss: {loss} error to one-hot targets, the mean over classes. */"]),
        *([f"/* Frozen, and to be written into the blob by hand: {', '.join(frozen)}. */"] if frozen else []),
        _STRUCTURES,
        "#endif", "",
    ]  # fmt: skip
    return "\n".join(lines)


_STRUCTURES = """\
/* A frozen activation range of scale s and zero point z: on 1, inverse 1 / s (in float), scale s, low -128 - z, high 127 - z,
   from (low - 0.5) s, to (high + 0.5) s. */
typedef struct {
    float on, inverse, scale, low, high, from, to;
} TrainerRange;

typedef struct {
    const float *x;       /* examples */
    const int64_t *y;     /* labels */
    const int64_t *order; /* epochs * examples row numbers: the order of training */
    int64_t examples, epochs, batch;
    const float *start;   /* TRAINER_BLOB numbers, made by import_start */
    const TrainerRange *ranges;
    float *work;          /* TRAINER_WORK numbers */
    uint8_t *bytes;       /* TRAINER_BYTES bytes */
    float *update;        /* out: local minus received parameters, TRAINER_PARAMETERS numbers */
    double rate, momentum, decay, proximal; /* SGD as torch.optim.SGD has it, and FedProx's mu */
    double loss;          /* out: the sum of the losses of all examples trained on */
    const float *noise;   /* DP-SGD: TRAINER_PARAMETERS numbers that are added to the sum of a step's gradients */
    double bound;         /* DP-SGD: the clipping norm */
    int64_t step;         /* DP-SGD: steps made so far */
    uint64_t *seed;       /* these three are of no use here */
    double deviation;
    float *fresh;
} TrainerJob;

#ifdef __cplusplus
extern "C" {
#endif
void import_start(float *blob, const float *parameters); /* blob: zeros at first */
int train(TrainerJob *job);                              /* 1: a label is no class */
/* DP-SGD: begin; a step for each Poisson batch (order and examples name its rows); end, which writes the update. */
void private_begin(TrainerJob *job);
int private_step(TrainerJob *job);
void private_end(TrainerJob *job);
#ifdef __cplusplus
}
#endif
"""
