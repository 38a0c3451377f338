"""Counters that several processes share and that survive them; the second opinion of a server; strain."""

import http.server
import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fedcore_device.runtime_health
import numpy as np
import pytest
from device_releases import Around, expected, put, written
from fedcore_device import Runtime
from fedcore_device.environment import Conditions
from fedcore_device.installed import Trial, health_path, installed, keep_trial, read_trials
from fedcore_device.runtime_health import HealthFile, bucket_of, read_health
from fedcore_device.runtime_server import SecondOpinion, ask_url, probabilities_of
from fedcore_device.runtime_tier import Strain, StrainWatch

from fedcore.errors import Refused


def test_quantiles_are_those_of_the_latencies_to_nine_percent(tmp_path):
    file, draw = HealthFile(tmp_path / "1.bin"), random.Random(0)
    latencies = sorted(draw.lognormvariate(6, 1) for _ in range(500))
    for one in latencies:
        file.add(one, calls=1)
    health = read_health(tmp_path / "1.bin")
    for share in (0.5, 0.95):
        exact = latencies[math.ceil(share * 500) - 1] / 1000
        assert exact <= health.quantile_ms(share) <= exact * 2**0.125 * 1.0001
    assert health.counters["calls"] == 500


def test_buckets_are_bounded():
    assert bucket_of(0.0) == bucket_of(1.0) == 0
    assert bucket_of(1e30) == 207
    assert [bucket_of(2.0**k) for k in range(5)] == [0, 8, 16, 24, 32]


def test_signals_are_those_of_a_rollout(tmp_path):
    from fedcore.registry.rollout import SIGNALS

    file = HealthFile(tmp_path / "1.bin")
    assert read_health(tmp_path / "1.bin").signals() == {}
    with file.loading():
        pass
    file.add(1000.0, calls=1)
    file.add(calls=3, errors=1, highest={"peak_bytes": 5, "decicelsius": 431})
    file.add(highest={"peak_bytes": 4})
    found = read_health(tmp_path / "1.bin").signals()
    assert found == {"p95_ms": pytest.approx(1.0, rel=0.1), "errors": 0.25, "crash": 0.0, "peak_bytes": 5.0, "celsius": 43.1}
    assert set(found) <= {signal.name for signal in SIGNALS}


def _child(code, *arguments, **options):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(fedcore_device.runtime_health.__file__).parents[1]), *sys.path])
    }
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True)


COUNT = """
import sys; from pathlib import Path; from fedcore_device.runtime_health import HealthFile
file = HealthFile(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    file.add(100.0, calls=1, errors=1)
"""


def test_processes_lose_no_count_of_each_other(tmp_path):
    path = tmp_path / "health" / "1.bin"
    children = [_child(COUNT, path, 3000) for _ in range(3)]
    file = HealthFile(path)
    threads = [threading.Thread(target=lambda: [file.add(100.0, calls=1, errors=1) for _ in range(1000)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait(120) for child in children] == [0, 0, 0]
    health = read_health(path)
    assert health.counters["calls"] == health.counters["errors"] == sum(health.buckets) == 12_000
    assert path.stat().st_size == 1752, "it does not grow"


def test_what_a_killed_process_counted_stays_and_its_load_was_a_crash(tmp_path):
    path = tmp_path / "1.bin"
    code = """
import sys, time; from pathlib import Path; from fedcore_device.runtime_health import HealthFile
file = HealthFile(Path(sys.argv[1]))
file.add(100.0, calls=7)
with file.loading():
    print("loading", flush=True); time.sleep(600)
"""
    child = _child(code, path)
    assert child.stdout.readline() == "loading\n"
    health = read_health(path)
    assert health.loading and health.crashes == 0 and "crash" not in health.signals(), "as long as it may still end well"
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    health = read_health(path)
    assert (health.loading, health.crashes, health.counters["calls"]) == (False, 1, 7)
    file = HealthFile(path)
    with file.loading():
        pass
    assert read_health(path).signals()["crash"] == 0.5


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 1752])
def test_a_file_of_something_else_is_begun_anew(tmp_path, content):
    path = tmp_path / "1.bin"
    path.write_bytes(content)
    assert read_health(path).counters["calls"] == 0
    HealthFile(path).add(calls=1)
    assert read_health(path).counters["calls"] == 1


def test_nothing_is_counted_where_the_disk_is_full_and_predictions_go_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    data, x = written()
    place = put(tmp_path, 1, {"flagship/onnx": data})
    monkeypatch.setattr(fedcore_device.runtime_health.os, "posix_fallocate", full)
    one = Runtime(tmp_path, environment=Around())
    np.testing.assert_array_equal(one.predict("digits", x), expected("onnx", data, x))
    assert read_health(health_path(place, 1)).counters["calls"] == 0


def test_the_file_holds_nothing_of_an_input(tmp_path):
    """Equal counts and latencies: equal bytes, whatever was predicted."""
    data, x = written()
    files = []
    for number, batch in enumerate((x, -x)):
        place = put(tmp_path / str(number), 1, {"flagship/onnx": data})
        one = Runtime(tmp_path / str(number), environment=Around())
        one.predict("digits", batch)
        health = read_health(health_path(place, 1))
        files.append({**health.counters, "peak_bytes": 0})
        assert sum(health.buckets) == 1
    assert files[0] == files[1]


def test_trials_are_kept_of_the_newest_releases(tmp_path):
    for version in (1, 2, 3, 4):
        keep_trial(tmp_path, version, Trial(version / 10, 1.0, 5, {"ab": version}))
    assert sorted(read_trials(tmp_path)) == [2, 3, 4]
    assert read_trials(tmp_path)[3] == Trial(0.3, 1.0, 5, {"ab": 3})
    (tmp_path / "trials.json").write_text("[1]")
    assert read_trials(tmp_path) == {}


def test_what_is_installed(tmp_path):
    put(tmp_path, 1, {"flagship/onnx": b"x"})
    (put(tmp_path, 1, {"flagship/onnx": b"x"}, "other") / "pointer.json").write_text("{}")
    assert {name: one.current.version for name, one in installed(tmp_path).items()} == {"digits": 1}


class TestStrain:
    def test_what_is_not_sensed_strains_nothing(self):
        assert not Strain().holds(False, Conditions())
        assert not Strain().holds(True, Conditions())

    @pytest.mark.parametrize(
        ("before", "celsius", "battery", "strained"),
        [(False, 45.0, 20, False), (False, 45.1, 90, True), (False, 20.0, 19, True), (True, 42.1, 90, True),
         (True, 42.0, 25, False),
         (True, 20.0, 24, True), (False, None, 24, False), (False, 44.0, None, False)],
    )  # fmt: skip
    def test_edges(self, before, celsius, battery, strained):
        assert Strain().holds(before, Conditions(temperature=celsius, battery_percent=battery)) is strained

    def test_looks_are_few_and_conditions_that_cannot_be_read_change_nothing(self):
        now, looks = [0.0], []

        def conditions():
            looks.append(now[0])
            if now[0] > 10:
                raise Refused("the file with overrides is damaged")
            return Conditions(temperature=50.0)

        watch = StrainWatch(conditions, Strain(), 5.0, lambda: now[0])
        for now[0] in (0.0, 1.0, 4.9, 5.0, 9.0, 20.0, 21.0):
            assert watch.strained()
        assert looks == [0.0, 5.0, 20.0]


def logits_of(x):
    """Sure of the first class by as much as the first number of each example."""
    return np.stack([x.reshape(len(x), -1)[:, 0], *[np.zeros(len(x), np.float32)] * 3], 1).astype(np.float32)


class TestSecondOpinion:
    X = np.array([0.1, 9.0, 0.2, 8.0], np.float32)[:, None]

    def test_only_examples_that_are_unsure_are_asked_about(self):
        asked = []

        def ask(model, x):
            asked.append((model, x.tolist()))
            return np.full((len(x), 4), 7.0)

        mine = logits_of(self.X)
        found, count, answered = SecondOpinion(ask, 0.9, 60.0).over("digits", self.X, mine)
        assert [(name, np.round(x, 3).tolist()) for name, x in asked] == [("digits", [[0.1], [0.2]])]
        assert (count, answered) == (2, 2)
        np.testing.assert_array_equal(found[[1, 3]], mine[[1, 3]])
        np.testing.assert_array_equal(found[[0, 2]], 7.0)
        assert mine[0, 0] == np.float32(0.1), "the device's own answer is not written to"

    @pytest.mark.parametrize("answer", [np.zeros((2, 3)), np.full((2, 4), np.nan), "words", None])
    def test_a_useless_answer_leaves_the_local_one(self, answer):
        mine = logits_of(self.X)
        found, asked, answered = SecondOpinion(lambda *_: answer, 0.9, 60.0).over("digits", self.X, mine)
        assert (asked, answered) == (2, 0)
        np.testing.assert_array_equal(found, mine)

    def test_a_server_that_hangs_is_waited_for_and_not_joined_by_ever_more_threads(self):
        release, mine = threading.Event(), logits_of(self.X)
        opinion = SecondOpinion(lambda *_: release.wait(60), 0.9, 0.01)
        before = threading.active_count()
        for _ in range(12):
            np.testing.assert_array_equal(opinion.over("digits", self.X, mine)[0], mine)
        assert threading.active_count() <= before + 4
        release.set()

    def test_confidence_and_time_are_checked(self, tmp_path):
        for confidence, seconds in ((0.0, 1.0), (1.5, 1.0), (0.5, 0.0)):
            with pytest.raises(Refused, match="below a confidence"):
                SecondOpinion(lambda *_: None, confidence, seconds)
        for url in ("http://example.org/", "ftp://example.org", "example.org"):
            with pytest.raises(Refused, match="https"):
                Runtime(tmp_path, server=url)

    def test_off_by_default_and_local_where_it_is_asked_for(self, tmp_path):
        data, x = written()
        place = put(tmp_path, 1, {"flagship/onnx": data})
        wanted = expected("onnx", data, x)
        sent = []
        one = Runtime(tmp_path, environment=Around(), server=lambda _, x: sent.append(x) or np.ones((len(x), 4)), confidence=0.4,
                      server_seconds=60.0)  # fmt: skip
        found = one.predict("digits", x)
        unsure = probabilities_of(wanted, "cross_entropy").max(1) < 0.4
        assert 0 < unsure.sum() < len(x)
        np.testing.assert_array_equal(found[~unsure], wanted[~unsure])
        np.testing.assert_array_equal(found[unsure], 1.0)
        np.testing.assert_array_equal(sent[0], x[unsure])
        counters = read_health(health_path(place, 1)).counters
        assert counters["server_asked"] == counters["server_answered"] == unsure.sum()

    def test_a_model_of_the_squared_error_is_as_sure_as_its_outputs_say(self, tmp_path):
        """Softmax would call every answer between 0 and 1 unsure, and send every input away."""
        outputs, asked = np.array([[0.02, 0.97, -0.05, 0.01], [0.4, 0.3, 0.2, 0.1]], np.float32), []
        opinion = SecondOpinion(lambda _, x: asked.append(x.tolist()) or np.ones((len(x), 4)), 0.5, 60.0)
        found, count, _ = opinion.over("digits", self.X[:2], outputs, "squared")
        assert (count, asked) == (1, [self.X[1:2].tolist()])
        np.testing.assert_array_equal(found, [outputs[0], [1, 1, 1, 1]])
        assert opinion.over("digits", self.X[:2], outputs)[1] == 2
        data, x = written(loss="squared")
        put(tmp_path, 1, {"flagship/onnx": data})
        one = Runtime(tmp_path, environment=Around(), server=lambda _, x: asked.append(x) or np.ones((len(x), 4)), confidence=0.6,
                      server_seconds=60.0)  # fmt: skip
        one.predict("digits", x)
        np.testing.assert_array_equal(asked[-1], x[probabilities_of(expected("onnx", data, x), "squared").max(1) < 0.6])
        assert 0 < len(asked[-1]) < len(x)

    def test_a_server_behind_a_url(self):
        seen, answers = [], iter([(200, None), (302, None), (500, None)])

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                x = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
                seen.append((self.path, x.shape))
                status, _ = next(answers)
                body = io.BytesIO()
                np.save(body, np.full((len(x), 4), 3.0, np.float32))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
                self.end_headers()
                self.wfile.write(body.getvalue())

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            opinion = SecondOpinion(ask_url(f"http://127.0.0.1:{server.server_port}/ask?v=1"), 0.9, 60.0)
            mine = logits_of(self.X)
            found = [opinion.over("digits", self.X, mine) for _ in range(3)]
            server.shutdown()
        assert [one[2] for one in found] == [2, 0, 0]
        assert seen == [("/ask?v=1&model=digits", (2, 1))] * 3, "a redirect is not followed"


def test_the_highest_temperature_is_noted_also_with_one_tier(tmp_path):
    data, x = written()
    place, around = put(tmp_path, 1, {"flagship/onnx": data}), Around(temperature=38.25)
    one = Runtime(tmp_path, environment=around)
    one._watch._every = 0.0
    for celsius in (38.25, 44.0, 41.0):
        around.found = Conditions(temperature=celsius)
        one.predict("digits", x)
    assert read_health(health_path(place, 1)).signals()["celsius"] == 44.0
