"""fedcore export and inspect over a small finished run, through the command."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused
from fedcore.export.targets import TARGETS, missing_package

KEYS = ["target", "tier", "status", "bytes", "agreement", "accuracy", "accuracy_loss", "latency_ms", "p95_ms", "peak_bytes",
        "integer_ops", "float_ops", "gate", "reason"]  # fmt: skip
QUICK = [name for name in ("onnx", "litert", "mnn") if not missing_package(TARGETS[name])]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    from fedcore.config import load_config

    folder = tmp_path_factory.mktemp("export")
    scenario = folder / "small.toml"
    scenario.write_text(
        "[run]\nrounds = 4\n[data]\nclients = 4\ncalibration = 64\n[model]\nname = 'mlp'\nparams = { hidden = [16] }\n"
        "[quantization]\ncalibrate_round = 3\n[training]\nepochs = 3\nmomentum = 0.9\n[engine]\nname = 'loop'\nworkers = 1\n"
        "[tiers.kiosk]\ntargets = ['onnx']\nbytes = 100\n"
    )
    with SimulatedRun(load_config(scenario), folder / "run", resume=False) as run:
        list(run.rounds())
        run.finish()
    return folder / "run"


def fedcore(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_artefacts_pass_their_gates_and_are_what_inspect_says(directory):
    done = fedcore("export", directory, "--tiers", "flagship", "--targets", ",".join(QUICK), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    written = json.loads((directory / "export" / "export.json").read_text())
    assert written | {"rows": written["rows"][-len(QUICK) :]} == report  # behind what an earlier export of the model left
    assert report["label"] == "host" and report["threads"] == {"flagship": 1}
    assert [list(row) for row in report["rows"]] == [KEYS] * len(QUICK)
    for row in report["rows"]:
        assert (row["status"], row["gate"], row["reason"]) == ("exported", "pass", "")
        assert row["agreement"] >= 0.995 and row["accuracy_loss"] <= 0.5
        assert 0 < row["latency_ms"] <= row["p95_ms"] and row["peak_bytes"] > 1_000_000
        path = directory / "export" / "flagship" / row["target"] / TARGETS[row["target"]].artefact
        held = json.loads(fedcore("inspect", path, "--json").output)
        assert (held["size"], held["integer"], held["floating"]) == (row["bytes"], row["integer_ops"], row["float_ops"])
        assert json.loads(held["metadata"]["labels"]) == list("0123456789") and held["metadata"]["tier"] == "flagship"
        assert len(held["metadata"]["run"]) == 32
        assert "operators" in fedcore("inspect", path).output


def test_a_missed_gate_is_exit_code_one_and_says_why(directory):
    done = fedcore("export", directory)  # the scenario's own tier allows 100 bytes
    assert done.exit_code == 1
    assert "fail" in done.output and "above the tier's 100" in done.output.replace("\n", " ")
    assert "kiosk: writing onnx" in done.output


def test_an_export_replaces_what_an_earlier_one_left(directory, monkeypatch):
    from fedcore.export import release

    done = fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx", "--json")
    artefact = directory / "export" / "flagship" / "onnx" / "model.onnx"
    first = artefact.read_bytes()
    (artefact.parent / "left.txt").write_text("of another model")
    assert fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx", "--json").exit_code == done.exit_code == 0
    assert artefact.read_bytes() == first and not (artefact.parent / "left.txt").exists()
    original = release.run_job

    def failing(job, limits):
        if job["task"] == "convert":
            Path(job["folder"], "model.onnx").write_bytes(first[:100])
            raise Refused("convert took longer than 300 s")
        return original(job, limits)

    monkeypatch.setattr(release, "run_job", failing)
    done = fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx", "--json")
    assert json.loads(done.output)["rows"][0]["status"] == "failed" and done.exit_code == 1
    assert not artefact.exists()


def test_an_export_that_is_killed_leaves_no_table(directory, monkeypatch):
    from fedcore.export import release

    table = directory / "export" / "export.json"
    fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx")
    assert table.exists()

    def killed(job, limits):
        raise SystemExit(137)

    monkeypatch.setattr(release, "run_job", killed)
    assert fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx").exit_code == 137
    assert not table.exists()


def test_one_export_of_a_run_at_a_time(directory):
    from fedcore.state.sqlite import RunStore

    store = RunStore(directory)
    try:
        done = fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx")
    finally:
        store.close()
    assert done.exit_code == 1 and "another process" in done.output


def test_a_directory_that_cannot_be_written_is_one_line(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    (tmp_path / "run" / "export").write_text("in the way")
    done = fedcore("export", tmp_path / "run", "--tiers", "flagship", "--targets", "onnx")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "export" in done.output and len(done.stderr.splitlines()) == 1


def test_tiers_of_one_export_do_not_change_each_others_model(directory):
    scenario = directory / "config.toml"
    before = scenario.read_text()
    scenario.write_text(before + "\n[tiers.narrow]\nweight_bits = 4\nepochs = 1\naccuracy_loss = 100.0\n")
    try:
        alone = json.loads(fedcore("export", directory, "--tiers", "flagship", "--targets", "onnx", "--json").output)["rows"]
        both = json.loads(fedcore("export", directory, "--tiers", "narrow,flagship", "--targets", "onnx", "--json").output)["rows"]
    finally:
        scenario.write_text(before)
    assert [row["tier"] for row in both] == ["narrow", "flagship"]
    assert both[1]["accuracy"] == alone[0]["accuracy"] and both[1]["agreement"] == alone[0]["agreement"]
    assert both[0]["agreement"] >= 0.99


def test_words_of_a_file_do_not_command_the_terminal(tmp_path):
    import torch

    from fedcore.quantization.wire import ModelTensor, encode_model

    path = tmp_path / "model.fcm"
    words = {"name": "\x1b[2J\x1b]0;owned\x07", "labels": ["a"] * 2000}
    path.write_bytes(encode_model([ModelTensor("w", torch.ones(2, 3).numpy(), "int8")], {}, words))
    done = fedcore("inspect", path)
    assert done.exit_code == 0
    assert "\x1b" not in done.output and "?[2J?]0;owned?" in done.output
    assert len(done.output) < 4000 and "..." in done.output


def test_a_missing_runtime_says_how_to_get_it(directory, monkeypatch):
    monkeypatch.delenv("FEDCORE_MICRO_PYTHON", raising=False)
    done = fedcore("export", directory, "--tiers", "flagship", "--targets", "micro,onnx", "--json")
    micro, onnx = json.loads(done.output)["rows"]
    assert micro["status"] == "missing" and "fedcore[export]" in micro["reason"] + "fedcore[export]"
    assert ("--setup-micro" in micro["reason"]) != ("pip install" in micro["reason"])
    assert onnx["gate"] == "pass" and done.exit_code == 1


def test_a_converter_that_crashes_costs_its_own_row(directory, monkeypatch):
    from fedcore.export import release

    original = release.run_job

    def crashing(job, limits):
        if job["target"] == "litert":
            raise Refused("convert was ended by signal 11")
        return original(job, limits)

    monkeypatch.setattr(release, "run_job", crashing)
    done = fedcore("export", directory, "--tiers", "flagship", "--targets", "litert,onnx", "--json")
    litert, onnx = json.loads(done.output)["rows"]
    assert litert["status"] in ("failed", "missing")
    assert onnx["gate"] == "pass" and done.exit_code == 1


def test_a_smaller_tier_comes_from_the_same_model(directory):
    pytest.importorskip("torch_pruning", reason="of the extra [export]")
    done = fedcore("export", directory, "--tiers", "flagship,entry", "--targets", "onnx", "--json")
    flagship, entry = json.loads(done.output)["rows"]
    assert (flagship["tier"], entry["tier"]) == ("flagship", "entry")
    assert entry["bytes"] < 0.9 * flagship["bytes"]
    assert entry["agreement"] >= 0.995
    assert entry["accuracy"] > 0.5


def test_wrong_requests_are_one_line(directory, tmp_path):
    for arguments, words in (
        (("export", tmp_path), "holds no run"), (("export",), "directory"),
        (("export", directory, "--targets", "tflite"), "unknown tflite"),
        (("export", directory, "--tiers", "watch"), "unknown watch; allowed: flagship, entry, wearable, kiosk"),
        (("export", directory, "--micro-python", tmp_path / "none"), "no such file"),
        (("inspect", tmp_path / "x.onnx"), "does not exist"), (("inspect", tmp_path), "unknown kind"),
    ):  # fmt: skip
        done = fedcore(*arguments)
        assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output


def test_an_unfinished_run_is_refused(directory, tmp_path):
    (tmp_path / "config.toml").write_text((directory / "config.toml").read_text())
    assert "not finished" in fedcore("export", tmp_path).output
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
