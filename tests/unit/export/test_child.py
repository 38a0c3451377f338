import importlib
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from fedcore.errors import Refused
from fedcore.export.artefact import Facts
from fedcore.export.child import Limits, isolation, run_job, run_limited
from fedcore.export.targets import TARGETS, missing_package
from fedcore.models import ZOO
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.quantization.lower import lower

QUICK = ("onnx", "litert", "ncnn", "mnn")


def python(code: str, limits: Limits, folder: Path) -> str | None:
    return run_limited([sys.executable, "-c", code], limits, folder)


def test_a_child_that_ends_well_has_no_problem(tmp_path):
    assert python("print('words')", Limits(30), tmp_path) is None


@pytest.mark.parametrize(
    ("code", "limits", "problem"),
    [
        ("import time; time.sleep(60)", Limits(0.5), "longer than 0.5 s"),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", Limits(0.5), "longer"),
        (
            "x = bytearray(600 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(60)",
            Limits(60, 300 << 20),
            "300 MB",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Limits(30), "signal 11"),
        ("raise ValueError('the reason')", Limits(30), "code 1: ValueError: the reason"),
    ],
)
def test_a_child_that_hangs_swells_or_crashes_costs_nothing_else(code, limits, problem, tmp_path):
    assert problem in (python(code, limits, tmp_path) or "")


def test_memory_of_descendants_counts(tmp_path):
    grandchild = "x = bytearray(400 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert "memory" in (python(code, Limits(60, 200 << 20), tmp_path) or "")


def test_a_child_reaches_no_network(tmp_path):
    if not isolation():
        pytest.skip("this system lets us make no network namespace")
    listing = "import socket, pathlib; pathlib.Path('seen').write_text(' '.join(name for _, name in socket.if_nameindex()))"
    code = f"import os; os.chdir({str(tmp_path)!r}); {listing}; s = socket.socket(); s.settimeout(5); s.connect(('192.0.2.1', 80))"
    assert "unreachable" in (python(code, Limits(30), tmp_path) or "")
    assert (tmp_path / "seen").read_text() == "lo"


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux, and its /proc")
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    """The child hangs in its job: it reads from a pipe into which nobody writes."""
    pipe = tmp_path / "model.onnx"
    os.mkfifo(pipe)
    job = {"task": "describe", "kind": "onnx", "path": str(pipe)}
    code = f"from fedcore.export.child import Limits, run_job; run_job({job!r}, Limits(60))"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        writing = opened_by_reader(pipe)
        (worker,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert b"fedcore.export.worker" in command(worker)
        parent.kill()
    end = time.monotonic() + 60
    while command(worker) and time.monotonic() < end:
        time.sleep(0.02)
    os.close(writing)
    assert not command(worker)


def opened_by_reader(pipe: Path) -> int:
    """The pipe, open for writing, as soon as somebody reads it."""
    end = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)


def command(process: str) -> bytes:
    """The command line of a process; empty for one that has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_answer_without_end_is_refused(tmp_path, monkeypatch):
    from fedcore.export import child
    from fedcore.quantization.wire import ModelTensor, encode_model

    path = tmp_path / "model.fcm"
    path.write_bytes(encode_model([ModelTensor("w", torch.ones(2, 3).numpy(), "int8")], {}, {"name": "x" * 5000}))
    assert describe("fcm", path)["metadata"]["name"] == "x" * 5000
    monkeypatch.setattr(child, "_ANSWER", 4000)
    with pytest.raises(Refused, match="answered with more"):
        describe("fcm", path)


def exported(target: str, folder: Path) -> Path:
    if missing_package(TARGETS[target]):
        pytest.skip("the extra [export] is not installed")
    torch.manual_seed(0)
    model = make_quantization_aware(ZOO["cnn"]((1, 8, 8), 10)).eval()
    calibrate(model, [torch.randn(50, 1, 8, 8)])
    module = importlib.import_module(f"fedcore.export.{TARGETS[target].module}")
    return module.write(lower(model, (1, 8, 8)), folder, Facts(labels=("a", "b")))


def describe(target: str, path: Path) -> dict:
    return run_job({"task": "describe", "kind": target, "path": str(path)}, Limits(60, 2 << 30))


def swollen(target: str, data: bytes) -> bytes:
    """The file with a length field that promises far more than there is."""
    if target == "onnx":
        model = onnx.load_from_string(data)
        next(constant for constant in model.graph.initializer if constant.dims).dims[0] = 2**40
        return model.SerializeToString()
    if target == "ncnn":
        return data.replace(b"0=10 1=1 2=", b"0=10 1=1 2=99999999", 1)
    # The root table of a flatbuffer points far outside of it.
    return struct.pack("<I", 0x7FFFFFF0) + data[4:]


@pytest.mark.parametrize("target", QUICK)
def test_a_damaged_or_hostile_file_is_one_clear_line(target, tmp_path):
    path = exported(target, tmp_path)
    data = path.read_bytes()
    assert describe(target, path)["kind"] == target
    noise = bytes((i * 167 + 13) % 256 for i in range(5000))
    for damaged in (data[: len(data) // 2], noise, swollen(target, data)):
        assert damaged != data
        path.write_bytes(damaged)
        with pytest.raises(Refused) as caught:
            describe(target, path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_wire_model_is_described_and_a_damaged_one_refused(tmp_path):
    from fedcore.quantization.wire import ModelTensor, encode_model

    path = tmp_path / "model.fcm"
    path.write_bytes(encode_model([ModelTensor("w", torch.ones(2, 3).numpy(), "int8")], {}, {"name": "x"}))
    assert describe("fcm", path)["metadata"] == {"name": "x"}
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(Refused, match="damaged"):
        describe("fcm", path)


def test_exporting_changes_nothing_that_is_installed(tmp_path):
    """With no network in the namespace, nothing that an exporter needs can come from one."""
    import pickle

    place = Path(torch.__file__).parent.parent
    before = sorted(path.name for path in place.iterdir())
    torch.manual_seed(0)
    model = make_quantization_aware(ZOO["mlp"]((1, 8, 8), 10)).eval()
    calibrate(model, [torch.randn(50, 1, 8, 8)])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(lower(model, (1, 8, 8))))
    facts = {"name": "x", "version": "", "run": "", "tier": "", "labels": [], "mean": [0.0], "std": [1.0], "more": {}}
    for target in QUICK:
        if missing_package(TARGETS[target]):
            continue
        job = {
            "task": "convert",
            "target": target,
            "model": str(tmp_path / "model.pickle"),
            "folder": str(tmp_path),
            "facts": facts,
        }
        assert Path(run_job(job, Limits(120))["path"]).exists()
    assert sorted(path.name for path in place.iterdir()) == before
