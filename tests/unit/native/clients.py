"""Programs that train apart from this process, for the tests of the native trainer."""

import dataclasses
import subprocess

import numpy as np
import torch
from small_zoo import PLANS, federation, start_of

from fedcore.native.blocks import LANES, plan
from fedcore.native.build import FLAGS, compile_library
from fedcore.native.emit import source
from fedcore.native.layers import lower
from fedcore.native.memory import Memory, plan_memory
from fedcore.native.trainer import _range
from fedcore.quantization.layers import quantizers
from fedcore.training.plan import batch_order

# Reads a job as `run_elsewhere` writes it, trains, writes the update and the loss. Every buffer is allocated by itself and has
# exactly the size that trainer.h promises. GAPS: offsets and lengths in the workspace that belong to no region.
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#ifdef UNDER_VALGRIND
#include "memcheck.h"
#else
#define VALGRIND_MAKE_MEM_NOACCESS(p, n) (void)(p)
#endif
static void *take(FILE *f, size_t size, size_t room) {
    void *p;
    if (posix_memalign(&p, 64, size + room ? size + room : 1)) exit(3);
    if (size && fread(p, 1, size, f) != size) exit(3);
    return p;
}
static void *zeros(size_t size) {
    void *p = take(0, 0, size);
    for (size_t i = 0; i < size; i++) ((char *)p)[i] = 0;
    return p;
}
static const long gaps[][2] = {GAPS}, marked_gaps[][2] = {MARKED_GAPS};
int main(int count, char **names) {
    FILE *f = count == 3 ? fopen(names[1], "rb") : 0;
    int64_t head[7];
    if (!f || fread(head, sizeof head, 1, f) != 1) return 2;
    Job job = {0};
    job.examples = head[0], job.epochs = head[1], job.batch = head[2];
    if (fread(&job.rate, sizeof(double), 4, f) != 4) return 2;
    job.y = take(f, head[0] * 8, 0);
    job.order = take(f, head[0] * head[1] * 8, 0);
    job.x = take(f, head[3] * sizeof(real), PADDING * sizeof(real));
    real *values = take(f, head[4] * sizeof(real), 0);
    job.ranges = take(f, head[5] * sizeof(Range), PADDING * sizeof(real));
    real *blob = zeros(head[6] * sizeof(real));
    import_start(blob, values);
    job.start = blob;
    job.work = zeros(WORK * sizeof(real));
    job.bytes = zeros(BYTES);
    for (unsigned long i = 0; i < sizeof gaps / sizeof *gaps; i++)
        VALGRIND_MAKE_MEM_NOACCESS(job.work + gaps[i][0], gaps[i][1] * sizeof(real));
    for (unsigned long i = 0; i < sizeof marked_gaps / sizeof *marked_gaps; i++)
        VALGRIND_MAKE_MEM_NOACCESS(job.bytes + marked_gaps[i][0], marked_gaps[i][1]);
    job.update = take(0, 0, (head[4] + PADDING) * sizeof(real));
    if (train(&job)) return 4;
    FILE *out = fopen(names[2], "wb");
    fwrite(job.update, sizeof(real), head[4], out);
    fwrite(&job.loss, sizeof(double), 1, out);
    return fclose(out);
}
"""


def spread(places: dict[str, int], end: int, gap: int) -> tuple[dict[str, int], int, str]:
    """Regions with a gap behind each: their places, the new end, and the gaps as C."""
    order = sorted(places, key=places.__getitem__)
    moved = {name: places[name] + number * gap for number, name in enumerate(order)}
    ends = [*(moved[name] - gap for name in order[1:]), end + (len(order) - 1) * gap]
    return moved, ends[-1] + gap, ", ".join(f"{{{one}, {gap}}}" for one in ends)


def with_redzones(memory: Memory, gap: int) -> tuple[Memory, tuple[str, ...]]:
    """The plan with a gap behind every region, and the compiler's arguments that say where these are."""
    places, numbers, gaps = spread(memory.places, memory.numbers, gap)
    marked, count, marked_gaps = spread(memory.marked, memory.bytes, gap) if memory.marked else ({}, memory.bytes, "")
    found = dataclasses.replace(memory, places=places, numbers=numbers, marked=marked, bytes=count)
    return found, (f"-DGAPS={gaps}", f"-DMARKED_GAPS={marked_gaps}")


def run_elsewhere(
    model, shape, target, folder, *, flags=FLAGS, emulator=(), extra=("-static",), gap=0, local=PLANS["everything"]
) -> tuple[torch.Tensor, float]:
    """The first client's update and loss, from a program of its own, which an emulator runs."""
    client = federation(shape, torch.float32)[0]
    blocks = plan(lower(model, shape), model)
    memory, gaps = with_redzones(plan_memory(blocks), gap) if gap else (plan_memory(blocks), ("-DGAPS=", "-DMARKED_GAPS="))
    program, job, out = folder / "program", folder / "job", folder / "out"
    flags = tuple(f for f in flags if f not in {"-shared", "-nostdlib", "-fPIC"})
    defines = (f"-DWORK={memory.numbers}", f"-DBYTES={memory.bytes}", f"-DPADDING={LANES}", *gaps)
    compile_library(source(blocks, memory, target, local.loss) + MAIN, (*target.flags, *flags, *defines, *extra), program)
    order = np.concatenate(batch_order(len(client.y), local, client.rng))
    ranges = np.array([_range(quantizer.frozen) for _, quantizer in quantizers(model)], np.float32).reshape(-1, 7)
    head = [len(client.y), local.epochs, local.batch_size, client.x.numel(), blocks.trainable, len(ranges), blocks.blob + LANES]
    rates = [local.lr, local.momentum, local.weight_decay, local.proximal_mu]
    parts = (np.array(head), np.array(rates), client.y.numpy(), order, client.x.numpy(), start_of(model).numpy(), ranges)
    job.write_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    done = subprocess.run([*emulator, str(program), str(job), str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    found = out.read_bytes()
    return torch.from_numpy(np.frombuffer(found[:-8], np.float32).copy()), float(np.frombuffer(found[-8:])[0]) / len(order)
