"""An entry of a ledger outlives whatever happens after `append` returns: kills, full disks, servers that die."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgers import charge, in_child
from redis_server import redis_server

from fedcore.errors import TryAgain
from fedcore.privacy.ledger import Ledger
from fedcore.state.ledger_sqlite import SqliteLedger
from fedcore.state.stores import open_ledger


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_any_moment_loses_nothing_that_was_learnt(ledger, seed):
    """Each child charges round after round and "learns", a byte for each round, until it is killed."""
    draw = random.Random(seed)
    learnt = 0
    for _ in range(5):
        begin = Ledger(open_ledger(ledger), "phones")
        first = len(list(begin.charges())) + 1
        begin.close()
        receiving, sending = os.pipe()

        def work(first=first, sending=sending):
            held = Ledger(open_ledger(ledger), "phones")
            for number in range(first, first + 1000):
                held.charge(charge(number), 1e6)
                os.write(sending, b"x")

        child = in_child(work)
        os.close(sending)
        seen = os.read(receiving, 1)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(receiving, 4096):
            seen += more
        os.close(receiving)
        learnt = first - 1 + len(seen)
        held = Ledger(open_ledger(ledger), "phones")
        rounds = [one.round for one in held.charges()]
        assert rounds in (list(range(1, learnt + 1)), list(range(1, learnt + 2)))
        assert held.charge(charge(learnt)) is False  # a repetition does not double
        held.charge(charge(learnt + 1))
        assert [one.round for one in held.charges()] == list(range(1, learnt + 2))
        held.close()
    assert learnt >= 5


def killed_in_a_charge(path: Path, arm: Callable[[sqlite3.Connection], None]) -> tuple[bool, list[int]]:
    """Whether the child learnt that round 2 is charged, and the rounds that the ledger holds afterwards."""
    receiving, sending = os.pipe()

    def work() -> None:
        store = SqliteLedger(path)
        held = Ledger(store, "phones")
        arm(store._db)
        held.charge(charge(2))
        os.write(sending, b"x")

    child = in_child(work)
    os.close(sending)
    learnt = os.read(receiving, 1) == b"x"
    os.close(receiving)
    os.waitpid(child, 0)
    held = Ledger(SqliteLedger(path), "phones")
    rounds = [one.round for one in held.charges()]
    assert held.charge(charge(2)) is (rounds == [1])  # a repetition charges what is missing and nothing else
    assert [one.round for one in held.charges()] == [1, 2]
    held.close()
    return learnt, rounds


def die_at(number: int) -> Callable[..., int]:
    count = 0

    def step(*_: object) -> int:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    return step


@pytest.mark.parametrize(
    ("arm", "stride"),
    [
        pytest.param(lambda database, number: database.set_trace_callback(die_at(number)), 1, id="statement"),
        pytest.param(lambda database, number: database.set_progress_handler(die_at(number), 1), 9, id="every ninth instruction"),
        pytest.param(
            lambda database, number: database.set_progress_handler(die_at(number), 1), 1, id="instruction", marks=pytest.mark.slow
        ),
    ],
)
def test_a_kill_inside_a_charge_leaves_all_of_it_or_nothing(tmp_path, arm, stride):
    outcomes = set()
    for number in range(1, 2000, stride):
        path = tmp_path / f"{number}.sqlite"
        held = Ledger(SqliteLedger(path), "phones")
        held.charge(charge(1))
        held.close()
        learnt, rounds = killed_in_a_charge(path, lambda database, number=number: arm(database, number))
        assert rounds in ([1], [1, 2])
        assert not learnt or rounds == [1, 2]
        outcomes.add((learnt, len(rounds)))
        if learnt:
            break
    assert outcomes >= {(False, 1), (True, 2)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to kill between two system calls")
def test_a_kill_at_any_system_call_of_a_charge(tmp_path):
    """SIGKILL on entering the n-th write, sync or unlink: inside the commit, where no callback of SQLite's comes."""
    program = """
import os, sys
from pathlib import Path
from fedcore.privacy.events import GaussianRelease
from fedcore.privacy.ledger import Charge, Ledger
from fedcore.state.ledger_sqlite import SqliteLedger
held = Ledger(SqliteLedger(Path(sys.argv[1])), "phones")
held.charge(Charge("a", 2, 1, "client", GaussianRelease(1.0), (1, 2, 3), "2026-11-22T10:00:00+00:00", 1e-6))
print("learnt")
"""
    calls = "pwrite64,fsync,fdatasync,unlink,ftruncate"
    outcomes = set()
    for number in range(1, 100):
        path = tmp_path / f"{number}.sqlite"
        held = Ledger(SqliteLedger(path), "phones")
        held.charge(charge(1))
        held.close()
        command = ["strace", "-f", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={number}"]
        done = subprocess.run([*command, sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
        if "PTRACE" in done.stderr or "ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        again = Ledger(SqliteLedger(path), "phones")
        rounds = [one.round for one in again.charges()]
        assert rounds in ([1], [1, 2])
        assert "learnt" not in done.stdout or rounds == [1, 2]
        again.charge(charge(2))
        assert [one.round for one in again.charges()] == [1, 2]
        again.close()
        outcomes.add((done.stdout.strip(), len(rounds)))
        if done.returncode == 0:
            break
    assert outcomes >= {("", 1), ("learnt", 2)}


def test_what_redis_acknowledged_survives_a_kill_of_the_server():
    with redis_server() as server:
        for number in range(1, 6):
            held = Ledger(open_ledger(server.url()), "phones")
            assert [one.round for one in held.charges()] == list(range(1, number))
            held.charge(charge(number))
            server.stop(signal.SIGKILL)
            with pytest.raises(TryAgain, match="cannot be reached"):
                held.charge(charge(number + 1))
            server.start()
