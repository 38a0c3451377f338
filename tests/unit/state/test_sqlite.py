import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from fedcore.errors import Refused, TryAgain
from fedcore.state.sqlite import Checkpoint, RunStore


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(number, {"master": np.full(100, number, np.float32), "none": np.zeros(0)}, {"text": "ü", "n": [number, None]})


def metrics(*numbers: int) -> list[dict]:
    return [{"round": number, "accuracy": number / 10} for number in numbers]


def same(one: Checkpoint, other: Checkpoint) -> bool:
    arrays = all((one.arrays[k] == other.arrays[k]).all() for k in one.arrays) and one.arrays.keys() == other.arrays.keys()
    return arrays and (one.round_number, one.facts) == (other.round_number, other.facts)


def test_a_new_run_has_nothing(tmp_path):
    store = RunStore(tmp_path)
    assert store.latest() is None
    assert list(store.metrics()) == []


def test_the_last_commit_comes_back_and_old_files_go(tmp_path):
    store = RunStore(tmp_path)
    for number in range(1, 6):
        store.commit(checkpoint(number), metrics(number), keep=2)
    store.close()
    again = RunStore(tmp_path)
    assert same(again.latest(), checkpoint(5))
    assert list(again.metrics()) == metrics(1, 2, 3, 4, 5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "round-000004.safetensors",
        "round-000005.safetensors",
    ]


def test_a_file_that_no_commit_names_is_ignored(tmp_path):
    """What a kill between the file and the transaction leaves."""
    store = RunStore(tmp_path)
    store.commit(checkpoint(1), metrics(1), keep=2)
    (tmp_path / "checkpoints" / "round-000002.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".round-000003.safetensors.new").write_bytes(b"")
    assert same(store.latest(), checkpoint(1))
    store.commit(checkpoint(2), metrics(2), keep=2)
    assert same(store.latest(), checkpoint(2))


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    store = RunStore(tmp_path)
    store.commit(checkpoint(1), metrics(1), keep=1)
    path = tmp_path / "checkpoints" / "round-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refused, match="is damaged"):
        store.latest()
    path.unlink()
    with pytest.raises(Refused, match="cannot be read"):
        store.latest()


def test_a_damaged_database_is_refused(tmp_path):
    (tmp_path / "state.sqlite").write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(Refused, match="is damaged"):
        RunStore(tmp_path)


def test_two_coordinators_cannot_hold_one_run(tmp_path):
    held = RunStore(tmp_path)
    with pytest.raises(TryAgain, match="another process is running this run"):
        RunStore(tmp_path)
    held.close()
    RunStore(tmp_path).close()


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from fedcore.state import sqlite
from fedcore.state.sqlite import Checkpoint, RunStore
store = RunStore(Path(sys.argv[1]))
store.commit(Checkpoint(1, {"master": np.ones(9)}, {}), [{"round": 1}], 2)
counter = 0
def trace(frame, event, argument):
    global counter
    if frame.f_code.co_filename == sqlite.__file__:
        counter += 1
        if counter == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
store.commit(Checkpoint(2, {"master": np.full(9, 2.0)}, {}), [{"round": 2}], 2)
sys.settrace(None)
print("done")
"""


def test_a_kill_at_any_line_of_a_commit_leaves_the_old_or_the_new_one(tmp_path):
    outcomes = set()
    for line in range(1, 60, 3):
        folder = tmp_path / str(line)
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", KILLED, folder, str(line)], capture_output=True, text=True, check=False)
        store = RunStore(folder)
        latest = store.latest()
        assert latest.arrays["master"][0] == latest.round_number
        assert [entry["round"] for entry in store.metrics()] == list(range(1, latest.round_number + 1))
        outcomes.add((done.stdout.strip(), latest.round_number))
        store.close()
        if done.stdout:
            break
    assert {("", 1), ("", 2), ("done", 2)} <= outcomes


FULL = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from fedcore.errors import TryAgain
from fedcore.state.sqlite import Checkpoint, RunStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = RunStore(Path(sys.argv[1]))
store.commit(Checkpoint(1, {"master": np.ones(10)}, {}), [{"round": 1}], 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    store.commit(Checkpoint(2, {"master": np.ones(int(sys.argv[3]))}, {}), [{"round": 2, "text": "x" * int(sys.argv[4])}], 2)
except TryAgain as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(("limit", "values", "text"), [(50_000, 100_000, 1), (60_000, 10, 100_000)], ids=["arrays", "database"])
def test_a_disk_that_fills_up_leaves_the_last_commit(tmp_path, limit, values, text):
    """A file size limit stands for a full disk: the same write fails, with another number."""
    assert resource.RLIMIT_FSIZE
    command = [sys.executable, "-c", FULL, tmp_path, str(limit), str(values), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the last commit is intact, free space and use --resume" in json.loads(done.stdout)
    store = RunStore(tmp_path)
    assert same(store.latest(), Checkpoint(1, {"master": np.ones(10)}, {}))
    assert [entry["round"] for entry in store.metrics()] == [1]
    store.commit(checkpoint(2), metrics(2), keep=2)
    assert same(store.latest(), checkpoint(2))


def test_clients_keep_the_numbers_that_their_names_were_given(tmp_path):
    store = RunStore(tmp_path)
    assert store.numbers(["b", "a", "b"]) == [0, 1, 0]
    assert store.numbers([]) == []
    store.close()
    store = RunStore(tmp_path)
    assert store.numbers(["c", "a", "b"]) == [2, 1, 0]
    store.close()
