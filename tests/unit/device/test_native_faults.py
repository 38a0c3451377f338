"""Native libraries and descriptions that do harm: ONNX Runtime does the round, one line says why, and they are not tried again."""

import dataclasses
import json
import logging

import fedcore_device.training
import numpy as np
import pytest
from device_worlds import examples, exported, start_of
from fedcore_device.native import choose
from fedcore_device.noise import Randomness
from fedcore_device.plan import TrainingPlan
from fedcore_device.step import read_step
from fedcore_device.trainer import Task, train
from fleet_fake import LOOSE, Gateway, World, assignment, doing, fresh_state, plan
from native_installed import TARGET, does, edited, needs_compiler, replaced
from small_zoo import network

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.portable.library import Library

pytestmark = needs_compiler
EXITS = {
    "x86_64": '__asm__ volatile("syscall" : : "a"(231), "D"({code}));',
    "aarch64-linux": 'register long n __asm__("x8") = 94; register long c __asm__("x0") = {code}; '
    '__asm__ volatile("svc 0" : : "r"(n), "r"(c));',
}.get(TARGET, "")
HANGS = "for (volatile int i = 0;; i++) {}"


@pytest.fixture(scope="module")
def expected():
    """The update of ONNX Runtime, of which no bit may be another where it does the round."""
    x, y = examples("mlp", 23)
    task = Task(read_step(exported("mlp").data), start_of(network("mlp")), TrainingPlan(2, 4, 0.1, 0.5))
    return train(task, x, y, Randomness(np.random.default_rng(7), bytes(16))).update


@pytest.fixture
def rounds(tmp_path, caplog, library, expected):
    """Does a round in which ONNX Runtime must end up training; returns the warnings."""
    caplog.set_level(logging.INFO)
    state, world, gateway = fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()
    numbers = iter(range(5, 100))

    def one(policy=LOOSE):
        caplog.clear()
        work = doing(state, world, gateway, policy, native=[library.parent])
        work.go_on(work.accept(assignment(plan(gateway, round=next(numbers)))))
        assert gateway.reports[-1].outcome == pb.UPLOADED, state.problem
        np.testing.assert_array_equal(np.frombuffer(gateway.uploads[-1][-4 * len(expected) :], "<f4"), expected)
        assert json.loads(state.kept("engine.json"))["last"]["engine"] == "ONNX Runtime"
        assert list(state.round.iterdir()) == []
        return [record.message for record in caplog.records if record.levelno == logging.WARNING]

    return one


@pytest.mark.parametrize("where", ["in a call", "in a constructor"])
def test_one_that_hangs(rounds, library, monkeypatch, where):
    monkeypatch.setattr(fedcore_device.training, "_LONGEST_CALL", 0.5)
    loading = f"__attribute__((constructor)) static void begin(void) {{ {HANGS} }}" if where == "in a constructor" else ""
    replaced(library, does(HANGS) + loading)
    (line,) = rounds()
    assert line == f"native library {library} is not used any more: a call took longer than 0.5 s"
    assert rounds() == [], "it is not loaded again"


def test_one_that_hangs_later(rounds, library, monkeypatch):
    """After a checkpoint of steps that are wrong, from which nobody goes on."""
    monkeypatch.setattr(fedcore_device.training, "_LONGEST_CALL", 0.5)
    replaced(library, does(f"static int calls; if (++calls > 12) {HANGS}"))  # one of a check, one of zeros, ten steps
    edited(library, tolerance=1e30)
    (line,) = rounds()
    assert line.endswith("a call took longer than 0.5 s")


def test_calls_that_are_quick_and_many_are_no_hang(library, tmp_path):
    calls = fedcore_device.training._Calls(tmp_path / "calls")
    with (tmp_path / "calls").open("ab", buffering=0) as file:
        for turn in range(10_000):
            assert not calls.hang()
            if turn % 1000 == 0:
                file.write(b".")
        file.write(b"." * (1 + (tmp_path / "calls").stat().st_size % 2))  # a call begins
        looks = int(fedcore_device.training._LONGEST_CALL / fedcore_device.training._TURN)
        assert not any(calls.hang() for _ in range(looks))
        assert any(calls.hang() for _ in range(3))


@pytest.mark.parametrize("code", [0, 1, 10, 11, 12, 13])
def test_one_that_ends_the_process(rounds, library, code):
    replaced(library, does(EXITS.replace("{code}", str(code))))
    (line,) = rounds()
    assert line.endswith(f"is not used any more: it ended the process with code {code}")
    assert rounds() == []


@pytest.mark.parametrize(("name", "problem"), [
    (".result.json.new", r"is the disk full\?"),
    ("native.loading", r"native\.loading cannot be written \(No space left on device\)"),
])  # fmt: skip
def test_one_that_is_there_when_the_disk_is_full(tmp_path, library, name, problem):
    """Its process cannot say how it ended, or not note a call: no fault of the library; the round goes on when there is room."""
    state, world, gateway = fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()
    work = doing(state, world, gateway, LOOSE, native=[library.parent])
    full = state.round / name
    work.accept(assignment(plan(gateway, round=5)))
    accepted, unlink = state.work(), type(full).unlink
    with pytest.MonkeyPatch.context() as patch:  # the agent would remove what stands for the full disk
        patch.setattr(type(full), "unlink", lambda path, **more: None if path == full else unlink(path, **more))
        full.symlink_to("/dev/full")
        with pytest.raises(TryAgain, match=problem):
            work.go_on(accepted)
    assert "failed" not in json.loads(state.kept("engine.json") or b"{}")
    assert not gateway.reports
    full.unlink()
    work.go_on(accepted)
    assert gateway.reports[-1].outcome == pb.UPLOADED


def test_one_that_takes_more_memory_than_the_owner_allows(rounds, library):
    policy = dataclasses.replace(LOOSE, limits=dataclasses.replace(LOOSE.limits, memory=400 << 20))
    replaced(
        library, "static volatile char all[600 << 20];\n" + does("for (;;) for (long i = 0; i < sizeof all; i += 4096) all[i] = 1;")
    )
    (line,) = rounds(policy)
    assert line.endswith(f"it took more than {400 << 20} bytes of memory")


def test_a_workspace_for_which_there_is_no_memory(rounds, library):
    edited(library, work=2**28 - 1, bytes=2**28 - 1, blob=2**28 - 1)
    (line,) = rounds()
    assert "there is no memory for its workspace" in line
    assert rounds() == []


def test_a_name_that_is_none(rounds, library):
    for name in ("a\0b", "\ud800", "a\nb"):
        edited(library, file=name)
        assert rounds() == []
        assert "must lie beside it" in choose([library.parent], "ab" * 32, {}).why


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip", "1"), ("clip", -1.0), ("clip", float("nan")), ("clip", float("inf")), ("rounds", 1), ("sketch", "x" * 64),
     ("sketch", [0.0] * 63 + [None]), ("sketch", [0.0] * 63 + [float("nan")]), ("sketch", [[0.0]] * 64)],
)  # fmt: skip
def test_checks_that_are_none(rounds, library, field, value):
    checks = json.loads(library.read_text())["checks"]
    checks[0][field] = value
    edited(library, checks=checks)
    with pytest.raises(Refused, match="missing or of another kind"):
        Library.from_json(library.read_text())
    assert rounds() == []


@pytest.mark.parametrize(
    "change", [{"offset": 0.5}, {"strides": [1.5, 1]}, {"strides": ["1", "1"]}, {"strides": []}, {"offset": -1}]
)
def test_places_that_are_none(library, change):
    place = {"dims": [2, 2], "bound": 1.0, "offset": 0, "strides": [2, 1]}
    Library.from_json(edited(library, frozen=[place]).read_text())
    with pytest.raises(Refused, match="missing or of another kind"):
        Library.from_json(edited(library, frozen=[place | change]).read_text())
