"""The runtime for apps: the exporters' own answers, what it refuses, what it loads and lets go, and what goes wrong around it."""

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fedcore_device.runtime
import fedcore_device.runtime_delegates
import numpy as np
import pytest
import torch
from device_releases import LABELS, Around, expected, put, rows, written
from fedcore_device import Runtime
from fedcore_device.environment import Conditions
from fedcore_device.installed import Trial, health_path, keep_trial
from fedcore_device.runtime_artefact import CPU, Opened, open_artefact
from fedcore_device.runtime_health import read_health
from fedcore_device.runtime_server import probabilities_of

from fedcore.errors import Refused, TryAgain

RUNTIMES = ("onnx", "litert")


def made(directory, **options):
    return Runtime(directory, environment=options.pop("environment", Around()), **options)


@pytest.mark.parametrize("name", ["mlp", "cnn", "imu_cnn"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_predict_gives_the_gates_logits(tmp_path, runtime, name):
    data, x = written(runtime, name)
    put(tmp_path, 1, {f"flagship/{runtime}": data})
    one = made(tmp_path)
    wanted = expected(runtime, data, x)
    np.testing.assert_array_equal(one.predict("digits", x), wanted)
    np.testing.assert_array_equal(one.predict("digits", x[3]), wanted[3])
    np.testing.assert_array_equal(one.predict("digits", x, normalised=True), wanted)
    np.testing.assert_array_equal(one.predict("digits", np.concatenate([x] * 3).astype(np.float64)), np.concatenate([wanted] * 3))
    assert one.labels("digits") == LABELS
    assert one.predict("digits", x).dtype == np.float32


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_raw_values_are_normalised_as_the_release_says(tmp_path, runtime):
    mean, std = (0.25, -1.0, 2.0), (0.5, 2.0, 4.0)  # powers of two: exact in float32
    data, x = written(runtime, "imu_cnn", mean=mean, std=std)
    put(tmp_path, 1, {f"flagship/{runtime}": data})
    x = np.round(x * 1024).astype(np.float32) / 1024
    raw = rows(x, mean=np.array(mean)[:, None], std=np.array(std)[:, None])
    found = made(tmp_path).predict("digits", raw)
    np.testing.assert_array_equal(found, expected(runtime, data, x))
    assert not np.array_equal(found, expected(runtime, data, raw))


def test_probabilities_are_the_softmax_of_the_logits(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    one = made(tmp_path)
    logits, found = one.predict("digits", x).astype(np.float64), one.predict("digits", x, probabilities=True)
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), rtol=1e-5)
    assert one.predict("digits", x[0], probabilities=True).shape == (4,)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_probabilities_by_a_model_of_the_squared_error_are_its_outputs(tmp_path, runtime):
    data, x = written(runtime, loss="squared")
    put(tmp_path, 1, {f"flagship/{runtime}": data})
    one = made(tmp_path)
    outputs, found = one.predict("digits", x).astype(np.float64), one.predict("digits", x, probabilities=True)
    above = np.clip(outputs, 0, None)
    some = above.sum(1) > 0
    assert some.any()
    np.testing.assert_allclose(found[some], above[some] / above[some].sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(found[~some], 0.25)
    np.testing.assert_allclose(probabilities_of(np.array([[-1, 0, -3, -2]], np.float32), "squared"), 0.25)


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (np.zeros((1, 8, 8), np.uint8), "x has type uint8"),
        (np.zeros((1, 8, 8), complex), "x has type complex128"),
        (
            np.zeros((1, 8, 9), np.float32),
            r"x has shape \[1, 8, 9\]; it takes floating point \[1, 8, 8\], or a batch \[n, 1, 8, 8\]",
        ),
        (np.zeros((0, 1, 8, 8), np.float32), r"shape \[0, 1, 8, 8\]"),
        (np.full((1, 8, 8), np.nan, np.float32), "not finite"),
        (np.full((1, 8, 8), 1e300), "not finite in single precision"),
        (None, "x is a NoneType that holds no numbers; it takes floating point"),
        ([[1.0, 2.0], [3.0]], r"x is no array \(ValueError\); it takes floating point \[1, 8, 8\]"),
        ("image.png", "x has type <U9"),
        ({"x": 1.0}, "x is a dict that holds no numbers"),
        (torch.zeros(1, 8, 8, requires_grad=True), r"x is no array \(RuntimeError\)"),
        (0.5, r"x has shape \[\]"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_is_no_error_of_the_model(tmp_path, x, line):
    place = put(tmp_path, 1, {"flagship/onnx": written()[0]})
    with pytest.raises(Refused, match=line) as caught:
        made(tmp_path).predict("digits", x)
    assert "\n" not in str(caught.value)
    assert read_health(health_path(place, 1)).counters["errors"] == 0


def test_what_is_not_installed_says_so(tmp_path):
    with pytest.raises(TryAgain, match="no release of digits is installed"):
        made(tmp_path).predict("digits", np.zeros((1, 8, 8)))
    with pytest.raises(Refused, match="names no model"):
        made(tmp_path).predict("../digits", np.zeros((1, 8, 8)))
    put(tmp_path, 1, {"flagship/coreml": b"x"})
    put(tmp_path, 1, {"flagship/coreml": b"x"}, "letters")
    with pytest.raises(Refused, match="has no file for onnx"):
        made(tmp_path).predict("digits", np.zeros((1, 8, 8)))
    with pytest.raises(TryAgain, match=r"no release of digit is installed in .*, which has digits, letters; ") as caught:
        made(tmp_path).predict("digit", np.zeros((1, 8, 8)))
    assert "\n" not in str(caught.value)
    for wrong in (None, 7, b"digits", ["digits"]):
        with pytest.raises(Refused, match="names no model"):
            made(tmp_path).predict(wrong, np.zeros((1, 8, 8)))


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("memory", None, "memory takes a whole number of bytes above 0, got None"), ("memory", -1, "bytes above 0, got -1"),
        ("memory", 0, "got 0"), ("memory", "256M", "got '256M'"), ("memory", 1.5, "got 1.5"), ("memory", True, "got True"),
        ("threads", -3, "threads takes a whole number from 1 to 1024, got -3"), ("threads", 0, "got 0"), ("threads", None, "None"),
        ("threads", 2.0, "got 2.0"), ("tiers", "flagship", "tiers takes a list of names"), ("tiers", [1], "list of names"),
        ("delegates", "cpu", "delegates takes lists of names by runtime, as {'onnx': ['cpu']}, got 'cpu'"),
        ("delegates", ["cpu"], "by runtime"), ("delegates", {"onnx": "cpu"}, "delegates['onnx'] takes a list of names"),
        ("delegates", {"tvm": ["cpu"]}, "delegates are of onnx or litert, got 'tvm'"), ("strain", 45.0, "strain takes a Strain"),
        ("server", 7, "server takes a function, an https URL or None"), ("confidence", None, "confidence takes a number above 0"),
        ("server_seconds", -1, "server_seconds takes a number above 0"), ("confidence", float("nan"), "number above 0"),
        ("directory", None, "takes the directory of an agent, got None"), ("directory", 7, "got 7"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_in_one_line_before_anything_is_loaded(tmp_path, option, value, line):
    with pytest.raises(Refused) as caught:
        made(**{"directory": tmp_path, option: value})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_as_people_give_them_are_taken(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    one = made(str(tmp_path), memory=np.int64(1 << 28), threads=2, tiers=["entry"], delegates={"onnx": ["cpu"]}, confidence=1)
    np.testing.assert_array_equal(one.predict("digits", [x[0].astype(np.float64).tolist()]), expected("onnx", data, x[:1]))


def test_a_damaged_pointer_is_named_and_takes_no_model_from_an_app_that_runs(tmp_path):
    data, x = written()
    pointer = put(tmp_path, 1, {"flagship/onnx": data}) / "pointer.json"
    whole, one = pointer.read_bytes(), made(tmp_path)
    before = one.predict("digits", x)
    for damage in (b"", b"{", b"[]", b"{}", whole[: len(whole) // 2], b"[" * 100_000, b"\xff"):
        pointer.write_bytes(damage)
        np.testing.assert_array_equal(one.predict("digits", x), before)
        with pytest.raises(Refused, match=rf"{pointer} is damaged.*: put a copy of it back, or remove it") as caught:
            made(tmp_path).predict("digits", x)
        assert "\n" not in str(caught.value)
        assert pointer.read_bytes() == damage
    pointer.write_bytes(whole)
    np.testing.assert_array_equal(made(tmp_path).predict("digits", x), before)


def test_a_new_release_is_taken_up_without_a_restart_and_old_calls_end_well(tmp_path, monkeypatch):
    (old, x), (new, _) = written(seed=0), written(seed=1)
    put(tmp_path, 1, {"flagship/onnx": old})
    one = made(tmp_path)
    running, installed, answers = threading.Event(), threading.Event(), []
    one.predict("digits", x)
    (loaded,) = one.loaded()
    inner = loaded.opened.logits

    def slow(batch):
        running.set()
        assert installed.wait(60)
        return inner(batch)

    object.__setattr__(loaded.opened, "logits", slow)
    thread = threading.Thread(target=lambda: answers.append(one.predict("digits", x)))
    thread.start()
    assert running.wait(60)
    put(tmp_path, 2, {"flagship/onnx": new})
    put(tmp_path, 3, {"flagship/onnx": new})  # release 1 is not even on the disk any more
    np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", new, x))
    installed.set()
    thread.join(60)
    np.testing.assert_array_equal(answers[0], expected("onnx", old, x))
    assert [held.version for held in one.loaded()] == [3]


def test_files_that_the_agent_removes_while_they_are_opened(tmp_path, monkeypatch):
    data = {seed: written(seed=seed)[0] for seed in (0, 1)}
    x = written()[1]
    put(tmp_path, 1, {"flagship/onnx": data[0]})
    one = made(tmp_path)
    look, looks = one._choose, []

    def late(model, release):
        if not looks:
            for version in (2, 3):
                put(tmp_path, version, {"flagship/onnx": data[1]})
        looks.append(release.version)
        return look(model, release)

    monkeypatch.setattr(one, "_choose", late)
    np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data[1], x))
    assert looks == [1, 3]


def test_a_damaged_file_is_refused_and_the_model_before_goes_on(tmp_path):
    (old, x), (new, _) = written(seed=0), written(seed=1)
    put(tmp_path, 1, {"flagship/onnx": old})
    one = made(tmp_path)
    one.predict("digits", x)
    place = put(tmp_path, 2, {"flagship/onnx": new})
    for path in (place / "files").iterdir():
        if path.read_bytes() == new:
            path.write_bytes(new[:-1])
    for _ in range(2):
        np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", old, x))
    fresh = made(tmp_path)
    with pytest.raises(TryAgain, match="release 2 is damaged"):
        fresh.predict("digits", x)
    for path in (place / "files").iterdir():
        if path.read_bytes() == new[:-1]:
            path.write_bytes(new)
    for repaired in (fresh, one):
        np.testing.assert_array_equal(repaired.predict("digits", x), expected("onnx", new, x))


def test_the_least_recently_used_model_goes_when_memory_is_short(tmp_path):
    data, x = written()
    other = written(seed=1)[0]
    for model, one in (("a", data), ("b", other), ("c", data)):
        keep_trial(put(tmp_path, 1, {"flagship/onnx": one}, model), 1, Trial(loaded_bytes=dict.fromkeys(_digests(one), 40 << 20)))
    one = made(tmp_path, memory=100 << 20)
    for model in "abab":
        one.predict(model, x)
    one.predict("c", x)
    assert [held.model for held in one.loaded()] == ["b", "c"]
    one.predict("b", x)
    one.predict("a", x)
    assert [held.model for held in one.loaded()] == ["b", "a"]
    assert all(held.bytes >= 40 << 20 for held in one.loaded())
    one.close()
    assert not one.loaded()
    one.predict("a", x)


def _digests(*data):
    import hashlib

    return [hashlib.sha256(one).hexdigest() for one in data]


def test_a_model_that_is_larger_than_the_limit(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    with pytest.raises(Refused, match=r"digits takes \d+ bytes of memory; the limit of this Runtime is 1000"):
        made(tmp_path, memory=1000).predict("digits", x)


def test_models_that_come_and_go_leave_no_open_file(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    one, counts = made(tmp_path), []
    for _ in range(6):
        one.predict("digits", x)
        one.close()
        gc.collect()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[-1] == counts[1]


def test_what_a_model_takes_is_measured_where_no_trial_did(tmp_path, monkeypatch):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    resident = iter([10 << 20, 90 << 20])
    monkeypatch.setattr(fedcore_device.runtime, "_resident", lambda: next(resident))
    one = made(tmp_path)
    one.predict("digits", x)
    assert one.loaded()[0].bytes == 80 << 20


def test_what_other_threads_take_while_it_loads_is_not_the_models(tmp_path, monkeypatch):
    data, x = written()
    place = put(tmp_path, 1, {"flagship/onnx": data})
    (digest,) = _digests(data)
    keep_trial(place, 1, Trial(loaded_bytes={digest: 1 << 20}))
    resident = iter([10 << 20, 900 << 20])
    monkeypatch.setattr(fedcore_device.runtime, "_resident", lambda: next(resident, 0))
    one = made(tmp_path, memory=50 << 20)
    one.predict("digits", x)
    assert one.loaded()[0].bytes == 1 << 20


def flaky(fails, delegate_fails):
    """`open_artefact` with an accelerator that cannot open, cannot run, or fails later."""
    opened = []

    def opening(path, runtime, delegate=CPU, threads=1):
        opened.append(delegate)
        found = open_artefact(path, runtime, CPU, threads)
        if delegate == CPU:
            return found
        if delegate_fails == "open":
            raise Refused(f"{delegate}: no such device")
        calls = []

        def logits(x):
            calls.append(1)
            if delegate_fails == "run" and len(calls) > fails:
                raise RuntimeError("device lost")
            answer = found.logits(x)
            return np.full_like(answer, np.nan) if delegate_fails == "nonsense" and len(calls) > fails else answer

        return Opened(delegate, found.shape, found.classes, found.facts, logits)

    return opening, opened


@pytest.mark.parametrize(("how", "after"), [("open", 0), ("run", 0), ("run", 2), ("nonsense", 0), ("nonsense", 2)])
def test_a_delegate_that_fails_gives_way_to_the_cpu_and_is_remembered(tmp_path, monkeypatch, how, after):
    data, x = written()
    place = put(tmp_path, 1, {"flagship/onnx": data})
    opening, opened = flaky(after, how)
    monkeypatch.setattr(fedcore_device.runtime_delegates, "open_artefact", opening)
    options = {"delegates": {"onnx": ("NpuExecutionProvider", CPU)}}
    one = made(tmp_path, **options)
    for _ in range(4):
        np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data, x))
    assert one.loaded()[0].opened.delegate == CPU
    assert opened == ["NpuExecutionProvider", CPU]
    made(tmp_path, **options).predict("digits", x)
    assert opened == ["NpuExecutionProvider", CPU, CPU], "another process does not try it again"
    health = read_health(health_path(place, 1))
    assert health.counters["delegate_failures"] == 1 and health.counters["errors"] == 0
    (reasons,) = json.loads((place / "delegates.json").read_text()).values()
    assert "device" in reasons["NpuExecutionProvider"] or "finite" in reasons["NpuExecutionProvider"]
    put(tmp_path, 2, {"flagship/onnx": written(seed=1)[0]})
    made(tmp_path, **options).predict("digits", x)
    assert opened[3] == "NpuExecutionProvider", "a new release has a new chance"


def test_a_driver_that_kills_the_process_is_not_tried_by_the_next_one(tmp_path):
    put(tmp_path, 1, {"flagship/onnx": written()[0]})
    code = """
import os, sys, numpy as np, fedcore_device.runtime_delegates as runtime
from fedcore_device import Runtime
inner = runtime.open_artefact
runtime.open_artefact = lambda path, kind, delegate, threads: inner(path, kind, delegate) if delegate == "cpu" else os.abort()
one = Runtime(sys.argv[1], delegates={"onnx": ("Bad", "cpu")})
print(one.predict("digits", np.zeros((1, 8, 8))).shape)
"""
    first, second = (_run(code, tmp_path) for _ in range(2))
    assert first.returncode < 0
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == "(4,)"
    health = read_health(health_path(tmp_path / "models" / "digits", 1))
    assert health.crashes == 1


def _run(code, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(fedcore_device.runtime.__file__).parents[1]), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def test_a_provider_that_this_machine_does_not_have(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    one = made(tmp_path, delegates={"onnx": ("CUDAExecutionProvider",)})
    np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data, x))
    assert one.loaded()[0].opened.delegate == CPU


def test_a_litert_delegate_that_is_not_there(tmp_path):
    data, x = written("litert")
    place = put(tmp_path, 1, {"flagship/litert": data})
    one = made(tmp_path, delegates={"litert": ("/nowhere/libdelegate.so",)})
    np.testing.assert_array_equal(one.predict("digits", x), expected("litert", data, x))
    assert read_health(health_path(place, 1)).counters["delegate_failures"] == 1


def test_a_model_that_fails_on_the_cpu_is_an_error_and_is_counted(tmp_path, monkeypatch):
    place = put(tmp_path, 1, {"flagship/onnx": written()[0]})
    one, x = made(tmp_path), written()[1]
    one.predict("digits", x)
    object.__setattr__(one.loaded()[0].opened, "logits", lambda _: np.full((60, 4), np.inf, np.float32))
    with pytest.raises(Refused, match="release 1 cannot be run: its logits are not finite"):
        one.predict("digits", x)
    health = read_health(health_path(place, 1))
    assert (health.counters["calls"], health.counters["errors"]) == (2, 1)


def test_a_file_that_is_no_model_counts_as_a_crash_on_load(tmp_path):
    place = put(tmp_path, 1, {"flagship/onnx": b"this is no model"})
    one = made(tmp_path)
    for _ in range(3):
        with pytest.raises(Refused, match="onnx on cpu cannot open"):
            one.predict("digits", np.zeros((1, 8, 8)))
    health = read_health(health_path(place, 1))
    assert (health.crashes, health.counters["loads_begun"]) == (1, 1), "it is not opened again and again"
    assert health.signals()["crash"] == 1.0


def test_the_lower_tier_runs_while_the_device_is_strained(tmp_path):
    (large, x), (small, _) = written(seed=0), written(seed=1)
    place = put(tmp_path, 1, {"flagship/onnx": large, "entry/onnx": small})
    around = Around(temperature=30.0, battery_percent=80)
    one = made(tmp_path, environment=around)
    one._watch._every = 0.0
    for found, data in (
        ({"temperature": 44.0}, large), ({"temperature": 45.5}, small), ({"temperature": 43.0}, small),
        ({"temperature": 42.0}, large),
        ({"battery_percent": 19}, small), ({"battery_percent": 24}, small), ({"battery_percent": 25}, large), ({}, large),
    ):  # fmt: skip
        around.found = Conditions(**found)
        np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data, x))
    assert read_health(health_path(place, 1)).counters["tier_switches"] == 4
    assert len(one.loaded()) == 2


def test_one_tier_alone_stays(tmp_path):
    data, x = written()
    put(tmp_path, 1, {"entry/onnx": data})
    one = made(tmp_path, environment=Around(temperature=80.0))
    np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data, x))


def test_both_runtimes_installed_and_tiers_of_other_names(tmp_path):
    (onnx, x), (litert, _) = written("onnx"), written("litert", seed=1)
    put(tmp_path, 1, {"small/litert": litert, "big/onnx": onnx})
    one = made(tmp_path, tiers=("big", "small"), environment=Around(temperature=80.0))
    np.testing.assert_array_equal(one.predict("digits", x), expected("litert", litert, x))


def test_many_threads_at_once(tmp_path):
    for runtime in RUNTIMES:
        data, x = written(runtime)
        put(tmp_path, 1, {f"flagship/{runtime}": data}, runtime)
        wanted, one, wrong = expected(runtime, data, x), made(tmp_path), []

        def work(one=one, runtime=runtime, wanted=wanted, x=x, wrong=wrong):
            for at in range(0, 40, 5):
                if not np.array_equal(one.predict(runtime, x[at : at + 3]), wanted[at : at + 3]):
                    wrong.append(at)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert read_health(health_path(tmp_path / "models" / runtime, 1)).counters["calls"] == 64
        assert len(one.loaded()) == 1


def test_a_runtime_does_not_outlive_a_fork(tmp_path, monkeypatch):
    put(tmp_path, 1, {"flagship/onnx": written()[0]})
    one = made(tmp_path)
    monkeypatch.setattr(fedcore_device.runtime.os, "getpid", lambda: -1)
    with pytest.raises(Refused, match="before the process was forked"):
        one.predict("digits", np.zeros((1, 8, 8)))


def test_importing_the_package_imports_no_runtime():
    found = _run("import sys, fedcore_device; print([m for m in ('numpy', 'onnxruntime', 'tuf', 'grpc') if m in sys.modules])")
    assert found.stdout.strip() == "[]"
    found = _run("import sys; from fedcore_device import Runtime; print([m for m in ('torch', 'tuf', 'grpc') if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_the_readmes_example(tmp_path, capsys):
    readme = (Path(fedcore_device.runtime.__file__).parents[2] / "README.md").read_text()
    (code,) = [part.partition("```")[0] for part in readme.split("```python\n")[1:] if "Runtime(" in part.partition("```")[0]]
    data, _ = written()
    put(tmp_path, 1, {"flagship/onnx": data})
    assert code.count("/var/lib/fedcore-device") == 1
    exec(compile(code.replace("/var/lib/fedcore-device", str(tmp_path)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in LABELS


def test_the_readmes_policy_is_one_and_says_the_defaults(tmp_path):
    from fedcore_device.policy import UpdatePolicy, read_policy

    readme = (Path(fedcore_device.runtime.__file__).parents[2] / "README.md").read_text()
    (table,) = [part.partition("```")[0] for part in readme.split("```toml\n")[1:] if part.startswith("[updates]")]
    (tmp_path / "policy.toml").write_text(table)
    assert read_policy(tmp_path / "policy.toml").updates == UpdatePolicy(models=("digits",), windows=("01:00-05:00",))
