"""The child that tries a release: what it measures, and that whatever a model does to its process stays there."""

import os
import sys

import fedcore_device.self_test
import numpy as np
import pytest
from device_releases import expected, exporter, written
from fedcore_device.self_test import Bounds, self_test
from release_fake import batch_of

from fedcore.errors import Refused, TryAgain


@pytest.fixture
def files(tmp_path):
    """A release of both runtimes, and a batch of which it labels all as expected."""

    def made(**spoil):
        found, x = {}, written()[1]
        for runtime in ("onnx", "litert"):
            exporter(runtime)
            path = tmp_path / f"{runtime}.bin"
            path.write_bytes(spoil.get(runtime, written(runtime)[0]))
            found[f"flagship/{runtime}"] = path
        batch = tmp_path / "batch.npz"
        batch.write_bytes(spoil.get("batch", batch_of(x, expected("onnx", written()[0], x).argmax(1))))
        return found, batch

    return made


def test_agreement_latency_and_memory_are_measured(files):
    found, batch = files()
    trial = self_test(found, batch, Bounds(agreement=0.9))
    x = written()[1]
    wanted = expected("onnx", written()[0], x).argmax(1)
    assert trial.disagreement == float((expected("litert", written("litert")[0], x).argmax(1) != wanted).mean()) <= 0.05
    assert 0 < trial.p95_ms < 1000
    assert set(trial.loaded_bytes) == {"onnx.bin", "litert.bin"}
    assert 0 <= max(trial.loaded_bytes.values()) < trial.peak_bytes


def test_without_a_batch_it_is_loaded_and_run(files):
    found, _ = files()
    assert self_test({"flagship/onnx": found["flagship/onnx"]}, None, Bounds()).disagreement is None


@pytest.mark.parametrize(
    ("spoil", "bounds", "words"),
    [
        ({"batch": "wrong"}, {}, r"agreement 0\.\d+ is below 0.8"),
        ({"onnx": b"no model"}, {}, "onnx on cpu cannot open"),
        ({"litert": b"no model"}, {}, "litert on cpu cannot open"),
        ({"batch": b"no batch"}, {}, "its batch cannot be read"),
        ({"batch": "other shape"}, {}, "its batch has examples of shape"),
        ({}, {"p95_ms": 1e-6}, "more than 1e-06"),
        ({}, {"memory": 20_000_000}, "bytes of memory, more than|took more than 20000000 bytes"),
    ],
)
def test_what_makes_a_release_unfit(files, spoil, bounds, words):
    x = written()[1]
    if spoil.get("batch") == "wrong":
        spoil = {"batch": batch_of(x, (expected("onnx", written()[0], x).argmax(1) + 1) % 4)}
    elif spoil.get("batch") == "other shape":
        spoil = {"batch": batch_of(np.zeros((3, 2, 8, 8), np.float32), np.zeros(3, int))}
    found, batch = files(**spoil)
    one = "flagship/litert" if "litert" in spoil else "flagship/onnx"  # a child that imports one of them starts in half the time
    with pytest.raises(Refused, match=words) as caught:
        self_test({one: found[one]}, batch, Bounds(**bounds))
    assert str(caught.value).startswith("self-test: ")
    assert "\n" not in str(caught.value)


def replaced(folder, monkeypatch, code):
    """An ONNX Runtime that does something else when it is imported, or when a session is made."""
    package = folder / "bad"
    (package / "onnxruntime").mkdir(parents=True)
    (package / "onnxruntime" / "__init__.py").write_text(
        "import os, signal, time\n"
        "def get_available_providers(): return ['CPUExecutionProvider']\n"
        "class SessionOptions:\n    def add_session_config_entry(self, *_): pass\n"
        f"def InferenceSession(*_, **__):\n    {code}\n"
    )
    monkeypatch.setattr(sys, "path", [str(package), *sys.path])


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("os.abort()", Refused, "ended by SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", Refused, "ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", TryAgain, "ended by SIGKILL"),
        ("os._exit(3)", Refused, "stopped with code 3"),
        ("time.sleep(600)", Refused, "took longer than 3 s"),
        ("held = [bytearray(1 << 20) for _ in range(500)]; time.sleep(600)", Refused, "took more than 300000000 bytes"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", Refused, "PermissionError|not permitted"),
        ("os.posix_spawn('/bin/true', ['true'], {})", Refused, "PermissionError|not permitted|code"),
    ],
)
def test_whatever_it_does_to_its_process_stays_there(files, tmp_path, monkeypatch, code, error, words):
    found, batch = files()
    replaced(tmp_path, monkeypatch, code)
    seconds = 3.0 if "600" in code and "bytearray" not in code else 60.0
    with pytest.raises(error, match=words):
        self_test({"flagship/onnx": found["flagship/onnx"]}, batch, Bounds(memory=300_000_000, seconds=seconds))


def test_a_runtime_that_is_not_installed_is_no_finding(files, monkeypatch, tmp_path):
    found, _ = files()
    with pytest.raises(TryAgain, match="no runtime for coreml"):
        self_test({"flagship/coreml": found["flagship/onnx"]}, None, Bounds())


def test_no_child_outlives_an_agent_that_is_interrupted(files, tmp_path, monkeypatch):
    found, batch = files()
    replaced(tmp_path, monkeypatch, "time.sleep(600)")
    started = []
    popen = fedcore_device.self_test.subprocess.Popen
    monkeypatch.setattr(fedcore_device.self_test.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fedcore_device.self_test, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        self_test({"flagship/onnx": found["flagship/onnx"]}, batch, Bounds())
    assert started[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_energy_is_measured_where_something_measures_it(tmp_path, monkeypatch):
    from fedcore_device.environment import energy_used
    from fedcore_device.installed import Trial
    from fedcore_device.runtime_health import Health
    from fedcore_device.standing import signals_of

    assert energy_used(tmp_path) is None
    meter = tmp_path / "sys" / "class" / "hwmon" / "hwmon3"
    meter.mkdir(parents=True)
    (meter / "energy1_input").write_text("1500000\n")
    (meter / "energy2_input").write_text("500000\n")
    assert energy_used(tmp_path) == 2.0
    for number, used in ((0, 1_000_000), (1, 3_000_000)):
        package = tmp_path / "sys" / "class" / "powercap" / f"intel-rapl:{number}"
        (package / f"intel-rapl:{number}:0").mkdir(parents=True)
        (package / "energy_uj").write_text(str(used))
    assert energy_used(tmp_path) == 4.0, "the processors' own counters, and nothing of them twice"
    monkeypatch.setattr(fedcore_device.self_test, "_MEASURED", 0.02)
    counter, runs = iter([100.0, 103.0, 50.0, 10.0, None]), []
    monkeypatch.setattr(fedcore_device.self_test, "energy_used", lambda: next(counter))
    assert fedcore_device.self_test._joules(lambda: runs.append(1)) == 3.0 / len(runs)
    assert fedcore_device.self_test._joules(lambda: None) is None, "a counter that began anew"
    assert fedcore_device.self_test._joules(lambda: None) is None
    assert signals_of(Trial(0.0, 1.0, 5, {}, 0.25), Health())["joules"] == 0.25
    assert "joules" not in signals_of(Trial(0.0, 1.0, 5, {}), Health())
