"""Generated code reads and writes where it may: under valgrind, with redzones behind all buffers and regions of the workspace."""

import shutil
from pathlib import Path

import native_clients
import pytest
import torch
from native_clients import run_elsewhere
from small_zoo import PLANS, SHAPES, federation, network, updates, why_no_compiler
from torch import nn

from fedcore.models import ZOO, Residual
from fedcore.native.build import AVX2
from fedcore.native.tiles import Target
from fedcore.native.trainer import NativeTrainer
from fedcore.quantization.layers import FakeQuantize, calibrate, make_quantization_aware

HEADERS = Path("/usr/include/valgrind")
INSTALLED = shutil.which("valgrind") and (HEADERS / "memcheck.h").exists()
pytestmark = [
    pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles"),
    pytest.mark.skipif(not INSTALLED, reason="valgrind (Debian) is not installed"),
]
# Memcheck does not know AVX-512, and replaces the allocator of a program that links libc dynamically.
CHECKED = Target("avx2", ("-target", "x86_64-linux-gnu", *AVX2.flags[2:]), AVX2.accumulators)
VALGRIND = ["valgrind", "-q", "--error-exitcode=9", "--redzone-size=1024", "--expensive-definedness-checks=yes"]
EVERYTHING = "every other layer"


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 19, (3, 2), (1, 2), padding=(1, 0)), nn.GroupNorm(1, 19), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        Residual(nn.Conv2d(19, 5, 3, padding=1), nn.ReLU6(), nn.Conv2d(5, 19, 1)), nn.ReLU(), FakeQuantize(), nn.AvgPool2d(2, 1),
        nn.Conv2d(19, 19, 3, 2, padding=2, groups=19), nn.ReLU(), nn.Flatten(), nn.Linear(114, 21), nn.GroupNorm(7, 21),
        nn.ReLU(), Residual(nn.Linear(21, 21), nn.ReLU()), nn.Linear(21, 4),
    )  # fmt: skip
    make_quantization_aware(model)
    calibrate(model, [torch.randn(40, 3, 9, 11)])
    return model


@pytest.mark.parametrize("name", ["mlp", EVERYTHING, *(pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n != "mlp")])
def test_no_access_outside_of_a_region(name, tmp_path):
    shape = SHAPES.get(name, (3, 9, 11))

    def model_of():
        return everything() if name == EVERYTHING else network(name, True, torch.float32)

    extra = ("-DUNDER_VALGRIND", "-idirafter", str(HEADERS))
    update, loss = run_elsewhere(model_of(), shape, CHECKED, tmp_path, emulator=VALGRIND, extra=extra, gap=64)
    here, losses = updates(NativeTrainer(model_of(), AVX2), federation(shape, torch.float32), PLANS["everything"])
    assert torch.equal(update, here[0])
    assert loss == losses[0]


def test_an_access_outside_is_seen(tmp_path, monkeypatch):
    """A region that is smaller than its kernels believe."""
    written = native_clients.source
    shifted = "real *const work = job->work;"
    monkeypatch.setattr(native_clients, "source", lambda *a: written(*a).replace(shifted, "real *const work = job->work + 16;", 1))
    extra = ("-DUNDER_VALGRIND", "-idirafter", str(HEADERS))
    with pytest.raises(AssertionError, match="Invalid"):
        run_elsewhere(network("mlp", True, torch.float32), SHAPES["mlp"], CHECKED, tmp_path, emulator=VALGRIND, extra=extra, gap=64)
