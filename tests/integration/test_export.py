"""fedcore export and inspect over a small finished run, through the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.coordinator.run import SimulatedRun
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
    assert report == json.loads((directory / "export" / "export.json").read_text())
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
            from fedcore.errors import Refused

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
        (("inspect", tmp_path / "x.onnx"), "does not exist"), (("inspect", tmp_path), "unknown kind"),
    ):  # fmt: skip
        done = fedcore(*arguments)
        assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output


def test_an_unfinished_run_is_refused(directory, tmp_path):
    (tmp_path / "config.toml").write_text((directory / "config.toml").read_text())
    assert "not finished" in fedcore("export", tmp_path).output
