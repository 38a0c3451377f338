"""The command as a user runs it: real processes, real files."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fedcore_commands import COMMAND, Command, fedcore, settings
from run_directories import await_rounds, killed_and_resumed, last_checkpoint, metrics, rounds, untimed

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun
from fedcore.quantization.wire import decode_model, model_sections

SCENARIO = """
[run]
rounds = 6
[data]
clients = 12
holdout = 0.2
[model]
name = "mlp"
params = { hidden = [16] }
[quantization]
calibrate_round = 2
[training]
epochs = 2
[cohort]
size = 8
[evaluation]
federated_every = 2
"""


@pytest.fixture
def scenario(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return path


def simulate(scenario: Path, out: Path, *values: str) -> Command:
    done = fedcore("simulate", scenario, "--out", out, *settings(*values))
    assert done.returncode == 0, done.stderr
    return done


def run_here(scenario: Path, out: Path, *values: str, resume: bool = False, finish: bool = False) -> None:
    """The rounds of a run in this process; a model and a report only where it is to ``finish``."""
    with SimulatedRun(load_config(scenario, values), out, resume=resume) as run:
        list(run.rounds())
        if finish:
            run.finish()


def test_a_run_leaves_what_it_promises(scenario, tmp_path):
    out = tmp_path / "run"
    done = simulate(scenario, out)
    assert "round 6/6" in done.stdout
    assert "\x1b" not in done.stdout
    result = json.loads((out / "result.json").read_text())
    rounds = metrics(out)
    assert [entry["round"] for entry in rounds] == [1, 2, 3, 4, 5, 6]
    assert [entry["quantized"] for entry in rounds] == [False, True, True, True, True, True]
    assert result["rounds"] == 6
    assert result["accuracy"] == rounds[-1]["accuracy"]
    assert result["bytes_up"] == sum(entry["bytes_up"] for entry in rounds)
    assert 0 < result["int8_accuracy"] <= 1
    assert result["clients_per_second"] > 0
    assert result["operators"]["QGemm"] == 2
    assert set(rounds[1]["federated"]["percentiles"]) == {"5", "25", "50", "75", "95"}
    assert "federated" not in rounds[0]
    clients = json.loads((out / "clients.json").read_text())
    assert len(clients["accuracy"]) == 12
    model = decode_model((out / "model" / "model.fcm").read_bytes())
    assert model.metadata["round"] == "6"
    assert set(model.ranges) == {"1.input", "3.input"}
    assert (out / "model" / "model.onnx").stat().st_size == result["model_bytes"]["onnx"]
    assert "<html" in (out / "report.html").read_text()
    listed = json.loads(fedcore("runs", tmp_path, "--json").stdout)
    assert (listed["state"], listed["rounds"], listed["int8_accuracy"]) == ("finished", 6, result["int8_accuracy"])


def test_two_runs_are_the_same_with_one_and_two_workers(scenario, tmp_path):
    run_here(scenario, tmp_path / "1", "engine.workers=1", "wire.update=int8", finish=True)
    simulate(scenario, tmp_path / "2", "engine.workers=2", "wire.update=int8")
    assert untimed(tmp_path / "1") == untimed(tmp_path / "2")
    assert last_checkpoint(tmp_path / "1") == last_checkpoint(tmp_path / "2")
    kept = {one.encoding for one in model_sections((tmp_path / "1" / "model" / "model.fcm").read_bytes())}
    assert kept == {"int8", "fp16"}  # the grid that stays is that of downloads alone
    comparison = fedcore("compare", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "page.html")
    assert comparison.returncode == 0, comparison.stderr
    assert "engine.workers: 1 | 2" in comparison.stdout
    assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_kill_at_random_moments_then_resume_gives_the_same_bits(scenario, tmp_path, strategy):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    values = [f"strategy.name={strategy}", "run.rounds=30", "training.epochs=3"]
    run_here(scenario, whole, *values, finish=True)
    done, kills = killed_and_resumed(scenario, torn, strategy, *settings(*values))
    assert kills >= 2
    assert done.returncode == 0, done.stderr
    assert last_checkpoint(torn) == last_checkpoint(whole)
    assert (torn / "model" / "model.fcm").read_bytes() == (whole / "model" / "model.fcm").read_bytes()
    assert untimed(torn) == untimed(whole)


def test_an_interrupt_leaves_a_run_that_can_be_continued(scenario, tmp_path):
    out = tmp_path / "run"
    values = settings("run.rounds=400")
    process = Command("simulate", scenario, "--out", out, *values)
    await_rounds(out, 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    errors = process.stderr
    assert f"continue with: fedcore simulate {scenario} --out {out} --resume --set run.rounds=400" in errors
    assert "Traceback" not in errors
    assert not (out / "result.json").exists()
    done = rounds(out)
    assert fedcore("report", out).returncode == 0
    again = fedcore("simulate", scenario, "--out", out, "--resume", *settings(f"run.rounds={done + 2}"))
    assert again.returncode == 0, again.stderr
    assert [entry["round"] for entry in metrics(out)] == list(range(1, done + 3))


def test_commits_every_few_rounds_resume_to_the_same_bits(scenario, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run_here(scenario, whole)
    run_here(scenario, torn, "checkpoint.every=4", "run.rounds=5")
    run_here(scenario, torn, "checkpoint.every=2", resume=True)
    assert last_checkpoint(torn) == last_checkpoint(whole)


STRATEGY = """
from flwr.serverapp.strategy import FedAvg

class Explodes(FedAvg):
    accepts_mean = True
    def configure_train(self, server_round, arrays, config, grid):
        if server_round == 3:
            config["lr"] = 1e30
        return super().configure_train(server_round, arrays, config, grid)
"""


def test_all_clients_failing_stops_the_run_with_the_last_good_model(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(STRATEGY)
    out = tmp_path / "run"
    done = fedcore("simulate", scenario, "--out", out, *settings("strategy.name=mine:Explodes"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: all 8 clients of the round failed; client")
    assert rounds(out) == 2
    assert (out / "checkpoints" / "round-000002.safetensors").exists()
    assert (
        "Traceback"
        in fedcore("simulate", scenario, "--out", out, "--resume", "--debug", *settings("strategy.name=mine:Explodes")).stderr
    )


DATA = """
import numpy as np
from sklearn.datasets import load_digits

def poisoned():
    digits = load_digits()
    x, y, owner = digits.images[:, None] / 16, digits.target, np.arange(len(digits.target)) % 5
    x[owner == 3] *= 1e25
    return x, y, owner
"""


def test_a_client_that_explodes_is_dropped_counted_and_named(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(DATA)
    out = tmp_path / "run"
    values = [
        "data.dataset=mine:poisoned",
        "data.partition=natural",
        "data.clients=0",
        "cohort.size=0",
        "quantization.enabled=false",
    ]
    done = simulate(scenario, out, *values)
    assert "dropped 1" in done.stdout
    rounds = metrics(out)
    assert all([entry["client"] for entry in found["dropped"]] == [3] for found in rounds)
    assert all(found["replies"] == 4 for found in rounds)
    assert json.loads((out / "result.json").read_text())["dropped"] == 6
    page = (out / "report.html").read_text()
    assert rounds[0]["dropped"][0]["reason"].split(":")[0] in page


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(scenario, tmp_path):
    out = tmp_path / "run"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = [*COMMAND, "simulate", scenario, "--out", out]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=300, preexec_fn=limit)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot be written" in line
    done = fedcore("simulate", scenario, "--out", out, *(["--resume"] if (out / "config.toml").exists() else []))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (["training.lrr=1"], ["unknown key training.lrr", "did you mean lr?"]),
        (["model.name=lenet"], ["model.params.hidden: lenet has no such parameter; it takes: none"]),
        (["data.clients=700"], ["data.clients"]),
        (["strategy.name=nothing:Here"], ["nothing"]),
        (["engine.device=cuda"], ["no CUDA device"]),
        (["model.trainable=['head*']"], ["no parameter matches 'head*'"]),
        (["data.dataset=fashion-mnist", "data.path=nowhere"], ["dataset-fashion-mnist"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(scenario, tmp_path, values, parts):
    done = fedcore("simulate", scenario, "--out", tmp_path / "run", *settings(*values))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_nor_continued_as_another(scenario, tmp_path):
    out = tmp_path / "run"
    simulate(scenario, out, "run.rounds=2")
    before = last_checkpoint(out)
    again = fedcore("simulate", scenario, "--out", out)
    assert (again.returncode, "--resume" in again.stderr) == (2, True)
    other = fedcore("simulate", scenario, "--out", out, "--resume", *settings("training.lr=0.5"))
    assert (other.returncode, "training.lr is 0.5" in other.stderr) == (2, True)
    assert fedcore("simulate", scenario, "--resume").returncode == 2
    assert fedcore("simulate", scenario, "--out", tmp_path / "none", "--resume").returncode == 2
    assert last_checkpoint(out) == before


def test_json_lines_for_scripts(scenario, tmp_path):
    done = fedcore("simulate", scenario, "--out", tmp_path / "run", "--json", *settings("run.rounds=2"))
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["round", "round", "result"]
    assert events[-1]["directory"] == str(tmp_path / "run")


def test_frozen_parts_are_sent_once(scenario, tmp_path):
    out = tmp_path / "run"
    values = ["model.trainable=['3.*']", "evaluation.federated_every=0", "cohort.size=0", "quantization.calibrate_round=1"]
    simulate(scenario, out, *values)
    sent = [entry["bytes_down"] for entry in metrics(out)]
    assert len(set(sent[1:])) == 1
    frozen, rest = divmod(sent[0] - sent[1], 12)
    assert rest == 0
    body = 64 * 16 + 4 * 16 + 2 * 16  # int8 weights, their scales, fp16 biases
    assert body < frozen < body + 300
    head = 16 * 10 + 4 * 10 + 2 * 10
    assert head < sent[1] / 12 < head + 500


SYNTHETIC = """
import numpy as np

def many(clients):
    rng = np.random.default_rng(0)
    y = np.arange(2 * clients) % 10
    x = rng.standard_normal((2 * clients, 8)).astype(np.float32)
    test = rng.standard_normal((50, 8)).astype(np.float32)
    return x, y, np.arange(2 * clients) // 2
"""
PEAK = """
import resource, sys
from pathlib import Path
from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun
with SimulatedRun(load_config(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), resume=False) as run:
    list(run.rounds())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_cohort(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(SYNTHETIC)
    peaks = []
    for clients in (100, 5000):
        data = ["data.dataset=mine:many", f"data.params.clients={clients}", "data.partition=iid", f"data.clients={clients // 2}"]
        small = ["data.holdout=0.0", "data.min_examples=1", "data.calibration=16", "evaluation.federated_every=0"]
        values = [*data, *small, "cohort.size=0", "run.rounds=2", "model.params.hidden=[1000]"]
        out = tmp_path / str(clients)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, scenario, out, *values], capture_output=True, text=True, check=True, env=os.environ
        )
        peaks.append(np.array(done.stdout.split(), int))
    # All updates of the larger cohort together would take 2500 x 19,010 x 4 bytes = 190 MB.
    assert (peaks[1] - peaks[0] < 40).all(), peaks


def test_a_continuation_that_cannot_be_one_is_refused(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(DATA)
    out = tmp_path / "run"
    values = ["data.dataset=mine:poisoned", "data.partition=natural", "data.clients=0", "cohort.size=0"]
    simulate(scenario, out, *values, "run.rounds=3", "evaluation.every=0")
    fewer = fedcore("simulate", scenario, "--out", out, "--resume", *settings(*values, "run.rounds=2", "evaluation.every=0"))
    assert (fewer.returncode, "has 3 rounds already" in fewer.stderr) == (2, True)
    (scenario.parent / "mine.py").write_text(DATA.replace("% 5", "// 360 % 5"))
    other = fedcore("simulate", scenario, "--out", out, "--resume", *settings(*values, "evaluation.every=0"))
    assert (other.returncode, "has changed" in other.stderr) == (2, True)


def test_the_engine_is_recorded_and_kept_on_resume(scenario, tmp_path):
    out = tmp_path / "run"
    simulate(scenario, out, "engine.name=vmap", "run.rounds=2", "quantization.enabled=false")
    assert 'name = "vmap"' in (out / "config.toml").read_text()
    again = fedcore("simulate", scenario, "--out", out, "--resume", *settings("run.rounds=3", "quantization.enabled=false"))
    assert again.returncode == 0, again.stderr
    result = json.loads((out / "result.json").read_text())
    assert (result["engine"], result["rounds"], result["int8_accuracy"]) == ("vmap", 3, None)
    other = fedcore("simulate", scenario, "--out", out, "--resume", *settings("engine.name=loop", "quantization.enabled=false"))
    assert (other.returncode, "engine.name is 'loop'" in other.stderr) == (2, True)
    run_here(scenario, tmp_path / "loop", "run.rounds=3", "quantization.enabled=false")
    loop, vmap = (metrics(folder)[-1] for folder in (tmp_path / "loop", out))
    assert vmap["train_loss"] == pytest.approx(loop["train_loss"], abs=1e-4)


MISBEHAVING = """
import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

class Nothing(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None

class NoMessages(FedAvg):
    def configure_train(self, *arguments):
        return None

class Stranger(FedAvg):
    def configure_train(self, *arguments):
        (message, *rest) = super().configure_train(*arguments)
        return [Message(message.content, 99, "train"), *rest]

class Raises(FedAvg):
    def configure_train(self, *arguments):
        yield from ()
        raise KeyError("mine")

class Clash(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, _ = super().aggregate_train(server_round, replies)
        return arrays, {"round": 77, "dropped": np.float32(1.5), "accuracy": float("nan"), "train_loss": 0.25}
"""


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Nothing", "aggregate_train must return (ArrayRecord, MetricRecord)"),
        ("NoMessages", "failed in configure_train: TypeError"),
        ("Stranger", "sent a message to node 99, which was not drawn"),
        ("Raises", "failed in configure_train: KeyError: 'mine'"),
    ],
)
def test_a_strategy_that_misbehaves_is_one_line(scenario, tmp_path, name, part):
    (scenario.parent / "mine.py").write_text(MISBEHAVING)
    done = fedcore("simulate", scenario, "--out", tmp_path / "run", *settings(f"strategy.name=mine:{name}"))
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert part in line


def test_a_strategys_metrics_stand_apart_from_ours(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(MISBEHAVING)
    out = tmp_path / "run"
    simulate(scenario, out, "strategy.name=mine:Clash", "run.rounds=2")
    assert [entry["round"] for entry in metrics(out)] == [1, 2]
    assert metrics(out)[0]["strategy"] == {"round": 77.0, "dropped": 1.5, "accuracy": None}
    assert metrics(out)[0]["train_loss"] == 0.25
    assert "NaN" not in (out / "metrics.jsonl").read_text()


MODEL = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, classes)
    def forward(self, x):
        return self.b(torch.cumsum(torch.relu(self.a(x.flatten(1))), 1))
"""


def test_a_model_that_cannot_be_exported_still_finishes_and_says_why(scenario, tmp_path):
    (scenario.parent / "mine.py").write_text(MODEL)
    out = tmp_path / "run"
    own = ["model.name=mine:Mine", "model.params={}", "run.rounds=2"]
    scenario.write_text(SCENARIO.replace("params = { hidden = [16] }", ""))
    done = simulate(scenario, out, *own)
    result = json.loads((out / "result.json").read_text())
    assert result["int8_accuracy"] is None
    assert "cumsum" in result["onnx"]
    assert "cumsum" in done.stdout
    assert (out / "report.html").exists()
    (scenario.parent / "mine.py").write_text(MODEL.replace("relu", "tanh"))
    other = fedcore("simulate", scenario, "--out", out, "--resume", *settings(*own, "run.rounds=3"))
    assert (other.returncode, "the model behind the run has changed" in other.stderr) == (2, True)


def test_directories_that_are_no_place_for_a_run_are_refused(scenario, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "report.html").write_text("mine")
    done = fedcore("simulate", scenario, "--out", foreign)
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
    assert (foreign / "report.html").read_text() == "mine"
    assert fedcore("simulate", scenario, "--out", foreign / "report.html").returncode == 2
    out = tmp_path / "[/run]"
    simulate(scenario, out, "run.rounds=2", "run.name=[red]")
    (out / "state.sqlite").unlink()
    lost = fedcore("simulate", scenario, "--out", out, "--resume", *settings("run.rounds=3", "run.name=[red]"))
    assert (lost.returncode, "state.sqlite that holds them is gone" in lost.stderr) == (2, True)
    assert len(metrics(out)) == 2


def test_a_kill_before_the_first_commit_can_be_resumed(scenario, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    values = ["checkpoint.every=1000", "run.rounds=1000", "evaluation.federated_every=0"]
    process = Command("simulate", scenario, "--out", torn, *settings(*values))
    await_rounds(torn, 2, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    values[1] = "run.rounds=4"
    done = fedcore("simulate", scenario, "--out", torn, "--resume", *settings(*values))
    assert done.returncode == 0, done.stderr
    run_here(scenario, whole, *values)
    assert last_checkpoint(torn) == last_checkpoint(whole)
    assert untimed(torn) == untimed(whole)
