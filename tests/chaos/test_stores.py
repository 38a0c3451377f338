"""Stores that lose answers, and a Redis that would lose more than that."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.chaos.deployment import redis_binary
from fedcore.cli import app
from fedcore.errors import Refused, RoundFailed, TryAgain
from fedcore.gateway.conduct import Conductor
from fedcore.gateway.fleet import Selection
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import RoundState
from fedcore.state.stores import open_gateway_store

KEY = Ed25519Key(bytes(32))
PASSWORD = "hunter2-hunter2"
SELECTION = Selection(2, 1, 10.0, 0.05)


class LosesAnswers:
    """A store whose every call works the first time, and says that it did not; the second time it answers."""

    def __init__(self, store):
        self.store, self.lost = store, set()

    def __getattr__(self, name):
        def call(*given):
            found = getattr(self.store, name)(*given)
            if (name, given) not in self.lost:
                self.lost.add((name, given))
                raise TryAgain("the answer was lost")
            return found

        return call


@pytest.fixture
def store(tmp_path):
    one = open_gateway_store(str(tmp_path / "store.sqlite"))
    yield one
    one.close()


def states(store):
    return sorted((one.task, one.state, one.version) for one in map(store.round, store.rounds()))


def test_a_coordinator_whose_answers_are_lost_forms_and_closes_rounds_all_the_same(store):
    conductor = Conductor(LosesAnswers(store), "watches", KEY, pause=0.001)
    forming = conductor.form("run-1", 1, SELECTION)
    assert states(store) == [("run-1", RoundState.FORMING, 1)]
    conductor.close(forming, "enough")
    assert states(store) == [("run-1", RoundState.CLOSED, 2)]


def test_another_coordinators_change_is_not_taken_for_the_own(store):
    conductor, other = (Conductor(LosesAnswers(store), "watches", KEY, pause=0.001) for _ in range(2))
    forming = conductor.form("run-1", 1, SELECTION)
    other.close(forming, "the other one's word")
    with pytest.raises(RoundFailed, match="another coordinator"):
        conductor.close(forming, "the own one")


def test_what_a_coordinator_left_open_is_closed_with_its_evaluations_and_nobody_elses(store):
    first = Conductor(store, "watches", KEY, pause=0.001)
    for task in ("run-1", "run-1/evaluate", "run-10", "run-2"):
        first.form(task, 1, SELECTION)
    Conductor(LosesAnswers(store), "watches", KEY, pause=0.001).form("run-1", 2, SELECTION)
    assert states(store) == [
        ("run-1", RoundState.CLOSED, 2), ("run-1", RoundState.FORMING, 1), ("run-1/evaluate", RoundState.CLOSED, 2),
        ("run-10", RoundState.FORMING, 1), ("run-2", RoundState.FORMING, 1),
    ]  # fmt: skip


@pytest.fixture
def forgetful():
    """A Redis with a password, that would forget the last second of what it was given."""
    try:
        binary = redis_binary()
    except Refused as error:
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="fedcore-redis-"))
    path = folder / "redis.sock"
    command = [
        binary,
        "--port",
        "0",
        "--unixsocket",
        path,
        "--dir",
        folder,
        "--appendonly",
        "yes",
        "--requirepass",
        "hunter2-hunter2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX) as probe:
            if not probe.connect_ex(str(path)):
                break
        time.sleep(0.02)
    yield path
    process.kill()
    process.wait()
    shutil.rmtree(folder)


def test_serve_refuses_a_redis_that_would_lose_uploads_before_anything_begins(tmp_path, forgetful):
    (tmp_path / "scenario.toml").write_text('[run]\nname = "x"\n[data]\ndataset = "digits"\nclients = 3\n')
    command = ["serve", str(tmp_path / "scenario.toml"), "--fleet", str(tmp_path / "fleet"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--store", f"unix://:{PASSWORD}@{forgetful}?population=p"])
    assert done.exit_code == 2, done.output
    assert "would lose uploads that were acknowledged: appendfsync is everysec, it must be always" in done.output
    assert PASSWORD not in done.output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "fleet" / "gateway.json").exists()
    for wrong in (f"unix://:wrong@{forgetful}?population=p", f"unix://{forgetful}?population=p"):
        with pytest.raises(Refused, match=r"password was not accepted|NOAUTH"):
            open_gateway_store(wrong)


def test_a_disk_that_is_full_for_a_while_stops_no_gateway(tmp_path, monkeypatch):
    """The supervisor begins its gateway again, also when the first attempt cannot write."""
    from fedcore.coordinator.fleet import FleetFolder, ServedGateway

    failed = []
    begin = ServedGateway._begin

    def begin_or_fail(self):
        if self.address and len(failed) < 2:
            failed.append(1)
            raise OSError(28, "No space left on device")
        begin(self)

    monkeypatch.setattr(ServedGateway, "_begin", begin_or_fail)
    with ServedGateway(FleetFolder.open(tmp_path / "fleet", "watches"), "", "127.0.0.1:0") as gateway:
        first = gateway._process
        first.kill()
        first.wait()
        deadline = time.monotonic() + 60
        while gateway._process is first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(failed) == 2
        assert gateway._process.poll() is None
    assert sys.platform != "linux" or first.returncode == -9
