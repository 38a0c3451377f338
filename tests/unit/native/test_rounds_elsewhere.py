"""Whole rounds, private or not, in a program of their own: the same bits on every processor, and clean under UBSan and valgrind."""

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_zoo import PLANS, SHAPES, network, start_of, why_no_compiler

from fedcore.data import Examples
from fedcore.models import ZOO
from fedcore.native.blocks import LANES
from fedcore.native.build import AVX2, AVX512, FLAGS, NEON, compile_library, host_target
from fedcore.native.cohort import Board, Cohort, _Cohort
from fedcore.native.emit import engine_source
from fedcore.native.memory import plan_memory
from fedcore.native.tiles import Target
from fedcore.native.trainer import _DRAWN_AHEAD, Job, NativeTrainer
from fedcore.training.plan import DpSgdPlan

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")
KEYS = bytes(range(32)), bytes(range(32, 64))
CLIENTS = 35  # more than units
SIZES = [13, 0, 1, 7, 200, *[3] * (CLIENTS - 5)]  # a batch in several parts, an empty client, more batches than examples
DP = DpSgdPlan(0.5, 0.8)
PRIVATE = {
    "private": dataclasses.replace(PLANS["sgd"], dp=DP),
    "private, everything": dataclasses.replace(PLANS["everything"], dp=DP),
    "private, one batch": dataclasses.replace(PLANS["sgd"], batch_size=300, dp=DP),
}
MODELS = ["mlp", "cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(ZOO) - {"mlp", "cnn"}))]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(ZOO) - {"mlp"})]
HEADERS = Path("/usr/include/valgrind")
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
static FILE *from;
static void *taken(size_t room) { /* the next array of the file, in a buffer of its own with so much room behind */
    int64_t size;
    void *p;
    if (fread(&size, sizeof size, 1, from) != 1) exit(3);
    if (size < 0) return 0;
    if (posix_memalign(&p, 64, size + room ? size + room : 1)) exit(3);
    if (size && fread(p, 1, size, from) != (size_t)size) exit(3);
    return p;
}
static void *zeros(size_t size) {
    void *p;
    if (posix_memalign(&p, 64, size ? size : 1)) exit(3);
    for (size_t i = 0; i < size; i++) ((char *)p)[i] = 0;
    return p;
}
int main(int count, char **names) {
    from = count == 3 ? fopen(names[1], "rb") : 0;
    if (!from) return 2;
    int64_t *const n = taken(0);
    double *const d = taken(0);
    Job job = {0};
    Cohort c = {.job = &job, .word_count = n[0], .unit_count = n[1], .room = n[2], .private_count = n[3]};
    c.channels = n[4], c.plane = n[5];
    const int64_t clients = n[6], size = n[7];
    job.epochs = n[8], job.batch = n[9];
    job.rate = d[0], job.momentum = d[1], job.decay = d[2], job.proximal = d[3], job.bound = d[4], job.deviation = d[5];
    c.limit = d[6];
    c.unit = -1;
    job.x = taken(0), job.y = taken(0), job.start = taken(0), job.ranges = taken(PADDING * sizeof(real));
    c.rows = taken(0), c.ends = taken(0), c.units = taken(0), c.words = taken(0);
    c.raw = taken(0), c.values = taken(0), c.labels = taken(0), c.own = taken(0), c.coins = taken(0), c.noise = taken(0);
    job.order = malloc(n[10] * 8), job.work = zeros(WORK * sizeof(real)), job.bytes = zeros(BYTES);
    job.seed = malloc(32 * 8), job.fresh = malloc(n[11] * sizeof(real));
    c.board = zeros(sizeof(Board)), c.complete = zeros(c.room * 8), c.joined = zeros(BLOB * sizeof(double));
    c.losses = malloc(clients * 8), c.norms = malloc(clients * 8), c.total = zeros(size * 8);
    c.sums = malloc(c.room * BLOB * sizeof(double));
    for (long i = 0; i < c.room * BLOB; i++) c.sums[i] = 0;
    while (run_cohort(&c)) {}
    FILE *out = fopen(names[2], "wb");
    fwrite(c.total, 8, size, out), fwrite(c.norms, 8, clients, out), fwrite(c.losses, 8, clients, out);
    return fclose(out);
}
"""


class Elsewhere:
    """Stands for a `trainer.Worker`: what a cohort hands to its library goes to a program in ``folder``."""

    def __init__(self, model, shape, target, folder, *, flags=FLAGS, extra=("-static",), emulator=()):
        self._worker, self._folder, self._emulator = NativeTrainer(model).worker(shape), folder, emulator
        self.numbers, self.job, self.set_privacy = self._worker.numbers, self._worker.job, self._worker.set_privacy
        self.library = SimpleNamespace(run_cohort=self._run)
        self._blocks = blocks = self._worker.blocks
        memory = plan_memory(blocks)
        flags = tuple(flag for flag in flags if flag not in {"-shared", "-nostdlib", "-fPIC"})
        defines = (f"-DWORK={memory.numbers}", f"-DBYTES={memory.bytes}", f"-DPADDING={LANES}")
        source = engine_source(blocks, memory, target) + MAIN
        compile_library(source, (*target.flags, *flags, *defines, *extra), folder / "program")

    def train(self, cohort, start, data, plan):
        self._data, self._plan = data, plan
        self._board = Board(len(cohort.rows), len(start), self._blocks.blob, 1)
        self._rows = sum(map(len, cohort.rows))
        self._most = max(map(len, cohort.rows))
        cohort.train(self, start, data, plan, self._board)
        return self._found

    def _run(self, reference) -> int:
        mine: _Cohort = reference._obj
        job = Job.from_address(mine.job)
        data, clients, plan = self._data, len(self._board.norms), self._plan
        numbers = [
            mine.word_count, mine.unit_count, mine.room, mine.private_count, mine.channels, mine.plane, clients,
            len(self._board.total), job.epochs, job.batch, plan.epochs * self._most, self._blocks.trainable + _DRAWN_AHEAD,
        ]  # fmt: skip
        rates = [job.rate, job.momentum, job.decay, job.proximal, job.bound, job.deviation, mine.limit]
        raw, each = bool(mine.raw), 4 * int(np.prod(data.shape))
        examples = self._most if raw else len(data.y)
        arrays = [
            (job.x, each * examples), (job.y, 8 * examples), (job.start, 4 * (self._blocks.blob + LANES)),
            (job.ranges, 28 * len(self._blocks.quantizers)),
            (mine.rows, 8 * self._rows), (mine.ends, 8 * clients), (mine.units, 8 * mine.unit_count),
            (mine.words, 4 * clients * mine.word_count),
            (mine.raw, data.raw.nbytes), (mine.values, 4 * 256 * mine.channels), (mine.labels, 8 * len(data.y)),
            (mine.own, 8 * self._most),
            (mine.coins, 4 * clients * mine.private_count), (mine.noise, 4 * clients * mine.private_count),
        ]  # fmt: skip
        parts = [np.array(numbers).tobytes(), np.array(rates).tobytes()]
        parts += [ctypes.string_at(address, size) if address else None for address, size in arrays]
        given, out = self._folder / "given", self._folder / "out"
        given.write_bytes(b"".join(
            np.int64(-1 if part is None else len(part)).tobytes() + (part or b"") for part in parts
        ))  # fmt: skip
        command = [*self._emulator, str(self._folder / "program"), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        size = len(self._board.total)
        self._found = np.split(np.fromfile(out), [size, size + clients])
        return 0


def task(name, quantized, kind):
    """A model, its cohort and data: numbers, or bytes."""
    rng = np.random.default_rng(0)
    model, count = network(name, quantized, torch.float32), 300
    shape = SHAPES[name]
    y = rng.integers(0, 4, count)
    if kind == "bytes":
        values = rng.standard_normal((1, 256)).astype(np.float32)
        data = Examples(rng.integers(0, 256, (count, *shape)).astype(np.uint8), y, values)
    else:
        data = Examples(rng.standard_normal((count, *shape)).astype(np.float32), y)
    rows = [np.sort(rng.choice(count, size, replace=False)).astype(np.int64) for size in SIZES]
    return model, Cohort(range(3, 3 + CLIENTS), rows, 2**40 + 3, 12, 1, 1e6, KEYS), data


def here(model, cohort, data, plan, target=None):
    start, trainer = start_of(model), NativeTrainer(model, target)
    board = Board(CLIENTS, len(start), trainer.blob(data.shape), 1)
    cohort.train(trainer.worker(data.shape, private=plan.dp is not None), start, data, plan, board)
    return board.total, board.norms, board.losses


def assert_same(found, expected):
    """To the bit; of a client without examples the loss is nan, whose sign is the processor's own."""
    assert np.abs(expected[0]).max() > 1e-3
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


PLANS_HERE = {"plain": PLANS["everything"], **PRIVATE}


@pytest.mark.skipif(not why_no_compiler() and host_target() is not AVX512, reason="this processor has no AVX-512 to compare with")
@pytest.mark.parametrize("plan", PLANS_HERE.values(), ids=PLANS_HERE)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", MODELS)
def test_avx2_gives_the_bits_of_avx512(name, quantized, plan):
    model, cohort, data = task(name, quantized, "numbers")
    assert_same(here(model, cohort, data, plan, AVX2), here(model, cohort, data, plan, AVX512))


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 (Debian qemu-user) is not installed")
@pytest.mark.parametrize("kind", ["numbers", pytest.param("bytes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *SLOW])
def test_aarch64_gives_the_bits_of_this_processor(name, quantized, kind, tmp_path):
    model, cohort, data = task(name, quantized, kind)
    there = Elsewhere(model, SHAPES[name], NEON, tmp_path, emulator=["qemu-aarch64"])
    for plan in PLANS_HERE.values():
        assert_same(there.train(cohort, start_of(model), data, plan), here(model, cohort, data, plan))


@pytest.mark.parametrize("kind", ["numbers", pytest.param("bytes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *SLOW])
def test_a_round_has_no_undefined_behaviour(name, quantized, kind, tmp_path):
    """Built with traps: undefined behaviour ends the process."""
    model, cohort, data = task(name, quantized, kind)
    flags = (*(flag for flag in FLAGS if flag != "-fno-sanitize=all"), "-fsanitize=undefined", "-fsanitize-trap=undefined")
    there = Elsewhere(model, SHAPES[name], host_target(), tmp_path, flags=flags)
    for plan in PLANS_HERE.values():
        assert_same(there.train(cohort, start_of(model), data, plan), here(model, cohort, data, plan))


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind (Debian) is not installed")
@pytest.mark.parametrize(
    ("name", "kind"), [("mlp", "bytes"), *(pytest.param(name, "numbers", marks=pytest.mark.slow) for name in sorted(ZOO))]
)
def test_a_round_stays_in_its_buffers(name, kind, tmp_path):
    model, cohort, data = task(name, True, kind)
    target = Target("avx2", ("-target", "x86_64-linux-gnu", *AVX2.flags[2:]), AVX2.accumulators)
    valgrind = ["valgrind", "-q", "--error-exitcode=9", "--redzone-size=1024", "--expensive-definedness-checks=yes"]
    there = Elsewhere(model, SHAPES[name], target, tmp_path, extra=(), emulator=valgrind)
    for plan in PLANS_HERE.values():
        assert_same(there.train(cohort, start_of(model), data, plan), here(model, cohort, data, plan))
