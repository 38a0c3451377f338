"""The same bits on every processor, and generated code without undefined behaviour."""

import ctypes
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from native_clients import run_elsewhere
from small_zoo import PLANS, SHAPES, SQUARED, federation, network, updates, why_no_compiler

from fedcore.models import ZOO
from fedcore.native import build as builds
from fedcore.native.blocks import plan
from fedcore.native.build import AVX2, AVX512, FLAGS, NEON, host_target
from fedcore.native.emit import source
from fedcore.native.layers import lower
from fedcore.native.memory import plan_memory
from fedcore.native.trainer import NativeTrainer
from fedcore.training.plan import DpSgdPlan, client_rng

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")
NAMES = ["mlp", "cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lenet", "dscnn", "imu_cnn"))]
EXTRAS = [False, pytest.param(True, marks=pytest.mark.slow)]
PLAN, LOSSES = PLANS["everything"], ["usual", "squared"]
EXTRA_LOSSES = [PLAN, pytest.param(SQUARED, marks=pytest.mark.slow)]


def test_every_zoo_model_is_covered():
    assert {getattr(name, "values", (name,))[0] for name in NAMES} == set(ZOO)


@pytest.mark.skipif(not why_no_compiler() and host_target() is not AVX512, reason="this processor has no AVX-512 to compare with")
@pytest.mark.parametrize("local", [PLAN, SQUARED], ids=LOSSES)
@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", NAMES)
def test_avx2_gives_the_bits_of_avx512(name, quantized, local):
    found = []
    for target in (AVX512, AVX2):
        trainer = NativeTrainer(network(name, quantized, torch.float32), target)
        found.append(updates(trainer, federation(SHAPES[name], torch.float32), local))
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.skipif(not why_no_compiler() and host_target() is not AVX512, reason="this processor has no AVX-512 to compare with")
@pytest.mark.parametrize("local", EXTRA_LOSSES, ids=LOSSES)
@pytest.mark.parametrize("simulated", [False, True], ids=["cipher", "simulated"])
@pytest.mark.parametrize("name", NAMES)
def test_avx2_gives_the_bits_of_avx512_in_private(name, simulated, local):
    found, plan = [], dataclasses.replace(local, dp=DpSgdPlan(0.5, 0.8))
    for target in (AVX512, AVX2):
        clients = [
            dataclasses.replace(c, noise_rng=client_rng(1, 1, c.client, 2), simulated=simulated)
            for c in federation(SHAPES[name], torch.float32)
        ]  # fmt: skip
        found.append(updates(NativeTrainer(network(name, False, torch.float32), target), clients, plan)[0])
    assert torch.equal(*found)


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 (Debian qemu-user) is not installed")
@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "lenet", "dscnn", "imu_cnn"))])
@pytest.mark.parametrize("local", [PLAN, SQUARED], ids=LOSSES)
def test_aarch64_gives_the_bits_of_this_processor(name, quantized, local, tmp_path):
    here, losses = updates(NativeTrainer(network(name, quantized, torch.float32)), federation(SHAPES[name], torch.float32), local)
    model, emulator = network(name, quantized, torch.float32), ["qemu-aarch64"]
    update, loss = run_elsewhere(model, SHAPES[name], NEON, tmp_path, emulator=emulator, local=local)
    assert torch.equal(update, here[0])
    assert loss == losses[0]


@pytest.mark.parametrize("quantized", EXTRAS, ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "lenet", "dscnn", "imu_cnn"))])
def test_generated_code_has_no_undefined_behaviour(name, quantized, tmp_path):
    """Built with traps: undefined behaviour ends the process, which is therefore not this one."""
    target, flags = host_target(), tuple(flag for flag in FLAGS if flag != "-fno-sanitize=all")
    model = network(name, quantized, torch.float32)
    plain = run_elsewhere(model, SHAPES[name], target, tmp_path)
    checks = (*flags, "-fsanitize=undefined", "-fsanitize-trap=undefined")
    checked = run_elsewhere(model, SHAPES[name], target, tmp_path, flags=checks)
    assert torch.equal(plain[0], checked[0])
    assert plain[1] == checked[1]


def test_a_library_needs_nothing_from_outside():
    model = network("cnn", True, torch.float32)
    blocks = plan(lower(model, SHAPES["cnn"]), model)
    library = builds.build(source(blocks, plan_memory(blocks), host_target()), host_target())
    assert {"train", "import_start"} <= {name for name in ("train", "import_start") if hasattr(ctypes.CDLL(str(library)), name)}
    assert b"libc.so" not in library.read_bytes()
    assert library.stat().st_size < 200_000
