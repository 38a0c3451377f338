"""What a file, or the folder that somebody stands in, may not do to who inspects it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.export import worker
from fedcore.export.artefact import Contents
from fedcore.export.child import Limits, run_job
from fedcore.export.release import clear
from fedcore.quantization.wire import ModelTensor, encode_model


@pytest.fixture
def model(tmp_path):
    """A file of the wire format, with metadata that a terminal would obey."""
    path = tmp_path / "model.fcm"
    path.write_bytes(encode_model([ModelTensor("w", np.ones((2, 3), np.float32), "int8")], {}, {"na\x1b[31mme": "\x1b]0;x\x07"}))
    return path


def test_the_current_folder_is_no_place_to_import_from(model, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n")
    (tmp_path / "fedcore.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert run_job({"task": "describe", "kind": "fcm", "path": str(model)}, Limits(60))["kind"] == "fcm"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("metadata", [[1, 2], 5, None, {"a": float("inf"), 3: [1]}])
def test_metadata_may_be_anything(metadata, monkeypatch):
    class Module:
        @staticmethod
        def describe(path):
            return Contents("x", 1, (), (), {}, 0, 0, "", metadata)

    monkeypatch.setattr(worker.importlib, "import_module", lambda name: Module)
    held = worker._describe({"kind": "onnx", "path": "x.onnx"})
    assert held["metadata"] == ({"a": "inf", "3": "[1]"} if isinstance(metadata, dict) else {})


def test_an_error_does_not_command_the_terminal(tmp_path):
    node = onnx.helper.make_node("\x1b]0;pwned\x07\x1b[31mRED", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])).SerializeToString())
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert done.exit_code == 2
    assert "\x1b" not in done.output
    assert "\x07" not in done.output
    assert "RED" in done.output


def test_a_table_does_not_command_the_terminal(model):
    done = CliRunner().invoke(app, ["inspect", str(model)])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    (tmp_path / "endless.onnx").symlink_to("/dev/zero")
    for name in ("model.onnx", "endless.onnx"):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert done.exit_code == 2
        assert "neither a file nor a package" in done.output, "nobody waited for its end"


def test_a_worker_whose_parent_is_gone_does_nothing(model, tmp_path):
    """It may have gone while the worker was starting, before the system was asked to end it."""
    asked, answered = tmp_path / "job.json", tmp_path / "answer.json"
    asked.write_text(json.dumps({"task": "describe", "kind": "fcm", "path": str(model), "parent": os.getpid() + 1}))
    command = [sys.executable, "-m", "fedcore.export.worker", str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode in {1, -signal.SIGKILL}
    assert not answered.exists()


def test_artefacts_that_no_table_tells_of_go(tmp_path):
    def place(*targets, model="a"):
        for target in targets:
            (tmp_path / "flagship" / target).mkdir(parents=True, exist_ok=True)
        rows = [{"tier": "flagship", "target": target} for target in targets]
        (tmp_path / "export.json").write_text(json.dumps({"model": model, "rows": rows}))
        return rows

    rows = place("onnx", "litert")
    (tmp_path / "flagship" / "ncnn").mkdir()
    assert clear(tmp_path, "a") == rows
    assert {path.name for path in (tmp_path / "flagship").iterdir()} == {"onnx", "litert"}
    assert not (tmp_path / "export.json").exists()
    assert clear(tmp_path, "a") == []  # a killed export leaves no table
    assert list((tmp_path / "flagship").iterdir()) == []
    place("onnx")
    assert clear(tmp_path, "of another model") == []
    assert list((tmp_path / "flagship").iterdir()) == []
