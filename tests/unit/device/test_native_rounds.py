"""Rounds of a device that has a native library: it trains in the confined child, and ONNX Runtime goes on where it cannot."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import fedcore_device.rounds
import numpy as np
import pytest
from device_worlds import examples, exported, start_of
from fedcore_device.child import write_job
from fedcore_device.cli import _parser, main
from fedcore_device.noise import Randomness
from fedcore_device.plan import TrainingPlan
from fedcore_device.step import read_step
from fedcore_device.trainer import Task, train
from fedcore_device.training import Crashed, train_in_child
from fleet_fake import LOOSE, TASK, Gateway, World, assignment, doing, fixed_draw, fresh_state, plan, private, settings
from native_installed import CRASHES, edited, needs_compiler, replaced
from small_zoo import network

from fedcore.gateway import gateway_pb2 as pb
from fedcore.models import layout_of
from fedcore.quantization.wire import decode_update, encode_model
from fedcore.secagg.sums import plan_update_sum

pytestmark = needs_compiler
LAYOUT = layout_of(network("mlp"), trainable=True)
SUM = plan_update_sum(LAYOUT.size, 4, minimum_survivors=2, clip=1.0, weight_cap=32)


@pytest.fixture
def device(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()


def onnx_update():
    x, y = examples("mlp", 23)
    task = Task(read_step(exported("mlp").data), start_of(network("mlp")), TrainingPlan(2, 4, 0.1, 0.5))
    return train(task, x, y, Randomness(np.random.default_rng(7), bytes(16))).update


def go(device, library, given=None, policy=LOOSE):
    """One round, and what was sent of it."""
    state, world, gateway = device
    work = doing(state, world, gateway, policy, native=[library.parent])
    accepted = work.accept(assignment(given or plan(gateway)))
    if accepted is None:
        return None
    work.go_on(accepted)
    return decode_update(gateway.uploads[-1]).values if gateway.uploads else None


def told(device):
    return json.loads(device[0].kept("engine.json"))


def test_the_library_trains_and_the_status_says_so(device, library, caplog, capsys):
    sent = go(device, library)
    np.testing.assert_allclose(sent, onnx_update(), rtol=0, atol=1e-5)
    assert sent.tobytes() != onnx_update().tobytes(), "another engine rounds otherwise"
    assert [report.outcome for report in device[2].reports] == [pb.UPLOADED]
    assert told(device) == {
        "last": {"engine": f"native library {library}", "why": "it is built for this training step", "task": TASK, "round": 5}
    }
    assert f"training with native library {library}: it is built for this training step" in caplog.messages
    assert main(["--state", str(device[0].directory), "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == told(device)["last"]
    assert main(["--state", str(device[0].directory), "status"]) == 0
    assert f"native library {library} trained round 5 of {TASK}: it is built for" in capsys.readouterr().out


def test_without_a_library_that_fits_onnx_runtime_trains_and_one_line_says_why(device, library, caplog):
    edited(library, steps=["ab" * 32])
    np.testing.assert_array_equal(go(device, library), onnx_update())
    (line,) = [one for one in caplog.messages if one.startswith("training with")]
    assert line.startswith(f"training with ONNX Runtime: {library}: it is not built for training step ")
    assert told(device)["last"]["engine"] == "ONNX Runtime"


def test_example_level_privacy_has_the_same_noise(device, library, tmp_path):
    own = private()
    sent = go(device, library, plan(device[2], unit="example", local=own))
    other = fresh_state(tmp_path / "other"), device[1], Gateway()
    expected = go(other, tmp_path / "nothing" / "trainer.json", plan(other[2], unit="example", local=own))
    np.testing.assert_allclose(sent, expected, rtol=0, atol=1e-5)
    assert (told(device)["last"]["engine"], told(other)["last"]["engine"]) == (f"native library {library}", "ONNX Runtime")
    assert np.abs(sent - onnx_update()).max() > 0.01
    assert device[2].reports[-1].outcome == other[2].reports[-1].outcome == pb.UPLOADED


def masked(folder, description):
    """What a child leaves for the agent to mask."""
    folder.mkdir()
    x, y = examples("mlp", 23)
    (folder / "data").mkdir()
    np.savez(folder / "data" / "examples.npz", x=x, y=y)
    (folder / "model").write_bytes(encode_model(LAYOUT.wire_tensors(start_of(network("mlp")))))
    (folder / "step").write_bytes(exported("mlp").data)
    library = {"native": str(description), "native_sha256": json.loads(description.read_text())["sha256"]} if description else {}
    write_job(folder, {
        "examples": str(folder / "data"), "model": str(folder / "model"), "step": str(folder / "step"), "frozen": "",
        "step_sha256": exported("mlp").sha256, "settings": settings() | SUM.to_table(), "encoding": "masked", "values": LAYOUT.size,
        "memory": 1 << 31, "seconds": 60, "evaluates": False, "randomness": fixed_draw(None), **library,
    })  # fmt: skip
    assert train_in_child(folder, memory=1 << 30, seconds=60, why_stop=lambda: "").told["released"]
    return np.load(folder / "vector.npy").astype(np.int64)


def test_under_secure_aggregation_the_contribution_is_the_same_but_for_its_random_rounding(library, tmp_path):
    found, expected = masked(tmp_path / "native-child", library), masked(tmp_path / "onnx-child", None)
    modulus = 1 << SUM.bits
    apart = (found - expected + modulus // 2) % modulus - modulus // 2
    assert np.abs(apart).max() <= 23, "one step of the grid, times the examples"
    assert len(np.unique(found)) > 100


def test_a_crash_ends_the_child_and_onnx_runtime_does_the_round(device, library, caplog):
    replaced(library, CRASHES)
    np.testing.assert_array_equal(go(device, library), onnx_update())
    (line,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert line.startswith(f"native library {library} is not used any more: it crashed (SIG")
    assert told(device)["last"]["engine"] == "ONNX Runtime"
    assert "it failed before (it crashed (SIG" in told(device)["last"]["why"]
    assert [report.outcome for report in device[2].reports] == [pb.UPLOADED]
    assert list(device[0].round.iterdir()) == []
    caplog.clear()
    np.testing.assert_array_equal(go(device, library, plan(device[2], round=6)), onnx_update())
    assert not [one for one in caplog.records if one.levelno == logging.WARNING], "it is not loaded again"


def test_after_a_crash_another_library_in_its_place_is_used(device, library, built):
    whole = [(built.parent / name).read_bytes() for name in ("trainer.json", "libtrainer.so")]
    replaced(library, CRASHES)
    go(device, library)
    library.write_bytes(whole[0])
    (library.parent / "libtrainer.so").write_bytes(whole[1])
    go(device, library, plan(device[2], round=6))
    assert told(device)["last"]["engine"] == f"native library {library}"


def test_a_library_that_crashes_in_the_middle_of_a_round(device, library, monkeypatch):
    """The checkpoint of a process that wrote anywhere is not gone on from."""
    seen = []

    def train_in_child(directory, **limits):
        job = json.loads((directory / "job.json").read_text())
        seen.append((bool(job["native"]), (directory / "progress.bin").exists()))
        if job["native"]:
            (directory / "native.loading").touch()
            (directory / "progress.bin").write_bytes(b"half")
            raise Crashed("it crashed", "training ended")
        return real(directory, **limits)

    real = fedcore_device.rounds.train_in_child
    monkeypatch.setattr(fedcore_device.rounds, "train_in_child", train_in_child)
    np.testing.assert_array_equal(go(device, library), onnx_update())
    assert seen == [(True, False), (False, False)]


def test_answers_that_are_not_those_of_the_step_are_found_before_training(device, library, caplog):
    checks = json.loads(library.read_text())["checks"]
    checks[0]["sketch"][0] += 100.0
    edited(library, checks=checks)
    np.testing.assert_array_equal(go(device, library), onnx_update())
    (line,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert "in a check the library's gradient is" in line


def test_the_owners_own_code_that_crashes_is_not_the_librarys_fault(device, library, tmp_path, monkeypatch):
    (tmp_path / "crashing_owner.py").write_text("import os, signal\ndef examples(): os.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(tmp_path)
    device[1].examples = "crashing_owner:examples"
    assert go(device, library) is None
    assert [report.outcome for report in device[2].reports] == [pb.FAILED]
    assert "SIGSEGV" in device[0].problem
    assert not device[0].kept("engine.json")


class TestWithoutOnnxRuntime:
    @pytest.fixture(autouse=True)
    def _gone(self, tmp_path, monkeypatch):
        """Neither this process nor a child can import it."""
        (tmp_path / "gone").mkdir()
        (tmp_path / "gone" / "onnxruntime.py").write_text("raise ImportError('not installed')\n")
        monkeypatch.syspath_prepend(tmp_path / "gone")
        expected = onnx_update()
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        self.expected = expected

    def test_the_library_trains(self, device, library):
        np.testing.assert_allclose(go(device, library), self.expected, rtol=0, atol=1e-5)
        assert [report.outcome for report in device[2].reports] == [pb.UPLOADED]

    def test_other_plans_and_evaluations_are_declined(self, device, library):
        policy = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, evaluation=True))
        state, world, gateway = device
        assert "evaluate-1" not in doing(state, world, gateway, policy).capabilities
        assert go(device, library, plan(gateway, kind=pb.EVALUATE, upload_encoding="score"), policy) is None
        assert (
            gateway.reports[-1].text == "the plan asks for an evaluation, which takes ONNX Runtime; this device trains without it"
        )
        edited(library, steps=["ab" * 32])
        assert go(device, library) is None
        assert gateway.reports[-1].text.endswith("; this device has neither ONNX Runtime nor a library for it")
        assert [report.outcome for report in gateway.reports] == [pb.REFUSED_PLAN] * 2
        assert state.participation(TASK).times == 0

    def test_after_a_crash_nothing_is_left_to_train_with(self, device, library):
        replaced(library, CRASHES)
        assert go(device, library) is None
        assert [report.outcome for report in device[2].reports] == [pb.REFUSED_PLAN]
        assert "neither ONNX Runtime nor a library" in device[0].problem


def test_with_onnx_runtime_evaluations_are_offered(device):
    policy = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, evaluation=True))
    assert "evaluate-1" in doing(*device, policy).capabilities


def test_the_command_takes_directories(tmp_path):
    given = _parser().parse_args(["run", "--native", "a", "--native", str(tmp_path)])
    assert given.native == [Path("a"), tmp_path]
    assert _parser().parse_args(["run"]).native is None
