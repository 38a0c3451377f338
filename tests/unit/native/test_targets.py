"""The same bits on every processor, and generated code without undefined behaviour."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
from native_clients import PLANS, SHAPES, federation, network, start_of, updates, why_no_compiler

from fedcore.models import ZOO
from fedcore.native import build as builds
from fedcore.native.blocks import LANES, plan
from fedcore.native.build import AVX2, AVX512, FLAGS, NEON, compile_library, host_target
from fedcore.native.emit import source
from fedcore.native.layers import lower
from fedcore.native.memory import plan_memory
from fedcore.native.tiles import Target
from fedcore.native.trainer import NativeTrainer, _range
from fedcore.quantization.layers import quantizers
from fedcore.training.plan import batch_order

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")
NAMES = ["mlp", "cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lenet", "dscnn", "imu_cnn"))]
EXTRAS = [False, pytest.param(True, marks=pytest.mark.slow)]


def test_every_zoo_model_is_covered():
    assert {getattr(name, "values", (name,))[0] for name in NAMES} == set(ZOO)


@pytest.mark.skipif(not why_no_compiler() and host_target() is not AVX512, reason="this processor has no AVX-512 to compare with")
@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", NAMES)
def test_avx2_gives_the_bits_of_avx512(name, quantized):
    found = []
    for target in (AVX512, AVX2):
        trainer = NativeTrainer(network(name, quantized, torch.float32), target)
        found.append(updates(trainer, federation(SHAPES[name], torch.float32), PLANS["everything"]))
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


# Reads a job as the test below writes it, trains, writes the update and the loss.
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
static void *take(FILE *f, size_t size, size_t room) {
    void *p = aligned_alloc(4096, (size + room + 4095) / 4096 * 4096);
    for (size_t i = 0; i < size + room; i++) ((char *)p)[i] = 0;
    if (size && fread(p, 1, size, f) != size) exit(3);
    return p;
}
int main(int count, char **names) {
    FILE *f = count == 3 ? fopen(names[1], "rb") : 0;
    int64_t head[8];
    if (!f || fread(head, sizeof head, 1, f) != 1) return 2;
    Job job = {0};
    job.examples = head[0], job.epochs = head[1], job.batch = head[2];
    if (fread(&job.rate, sizeof(double), 4, f) != 4) return 2;
    job.y = take(f, head[0] * 8, 0);
    job.order = take(f, head[0] * head[1] * 8, 0);
    job.x = take(f, head[3] * sizeof(real), 64);
    real *values = take(f, head[4] * sizeof(real), 64);
    job.ranges = take(f, head[5] * sizeof(Range), 64);
    real *blob = take(f, 0, head[6] * sizeof(real));
    import_start(blob, values);
    job.start = blob;
    job.work = take(f, 0, WORK * sizeof(real));
    job.bytes = take(f, 0, BYTES);
    job.update = take(f, 0, (head[4] + 64) * sizeof(real));
    if (train(&job)) return 4;
    FILE *out = fopen(names[2], "wb");
    fwrite(job.update, sizeof(real), head[4], out);
    fwrite(&job.loss, sizeof(double), 1, out);
    return fclose(out);
}
"""


def run_elsewhere(
    name: str, quantized: bool, target: Target, emulator: list[str], folder, flags=FLAGS
) -> tuple[torch.Tensor, float]:
    """The first client's update and loss, from a static program that an emulator runs."""
    model, local, client = network(name, quantized, torch.float32), PLANS["everything"], federation(SHAPES[name], torch.float32)[0]
    blocks = plan(lower(model, SHAPES[name]), model)
    memory = plan_memory(blocks)
    program, job, out = folder / "program", folder / "job", folder / "out"
    flags = tuple(f for f in flags if f not in {"-shared", "-nostdlib", "-fPIC"})
    defines = (f"-DWORK={memory.numbers}", f"-DBYTES={memory.bytes}", "-static")
    compile_library(source(blocks, memory, target) + MAIN, (*target.flags, *flags, *defines), program)
    order = np.concatenate(batch_order(len(client.y), local, client.rng))
    ranges = np.array([_range(quantizer.frozen) for _, quantizer in quantizers(model)], np.float32).reshape(-1, 7)
    head = [len(client.y), local.epochs, local.batch_size, client.x.numel(), blocks.trainable, len(ranges), blocks.blob + LANES, 0]
    rates = [local.lr, local.momentum, local.weight_decay, local.proximal_mu]
    parts = (np.array(head), np.array(rates), client.y.numpy(), order, client.x.numpy(), start_of(model).numpy(), ranges)
    job.write_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    subprocess.run([*emulator, str(program), str(job), str(out)], check=True, timeout=120)
    found = out.read_bytes()
    return torch.from_numpy(np.frombuffer(found[:-8], np.float32).copy()), float(np.frombuffer(found[-8:])[0]) / len(order)


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 (Debian qemu-user) is not installed")
@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "lenet", "dscnn", "imu_cnn"))])
def test_aarch64_gives_the_bits_of_this_processor(name, quantized, tmp_path):
    here, losses = updates(
        NativeTrainer(network(name, quantized, torch.float32)), federation(SHAPES[name], torch.float32), PLANS["everything"]
    )
    update, loss = run_elsewhere(name, quantized, NEON, ["qemu-aarch64"], tmp_path)
    assert torch.equal(update, here[0])
    assert loss == losses[0]


@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "lenet", "dscnn", "imu_cnn"))])
def test_generated_code_has_no_undefined_behaviour(name, quantized, tmp_path):
    """Built with traps: undefined behaviour ends the process, which is therefore not this one."""
    target, flags = host_target(), tuple(flag for flag in FLAGS if flag != "-fno-sanitize=all")
    plain = run_elsewhere(name, quantized, target, [], tmp_path)
    checks = (*flags, "-fsanitize=undefined", "-fsanitize-trap=undefined")
    checked = run_elsewhere(name, quantized, target, [], tmp_path, checks)
    assert torch.equal(plain[0], checked[0])
    assert plain[1] == checked[1]


def test_a_library_needs_nothing_from_outside():
    model = network("cnn", True, torch.float32)
    blocks = plan(lower(model, SHAPES["cnn"]), model)
    library = builds.build(source(blocks, plan_memory(blocks), host_target()), host_target())
    assert {"train", "import_start"} <= {name for name in ("train", "import_start") if hasattr(ctypes.CDLL(str(library)), name)}
    assert b"libc.so" not in library.read_bytes()
    assert library.stat().st_size < 200_000
