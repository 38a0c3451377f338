"""Audit records: whatever is changed, taken out or put in shows; a kill in the middle of a line does not break them."""

import os
import subprocess
import sys

import pytest

from fedcore.errors import Refused, TryAgain
from fedcore.registry.journal import GENESIS, Journal, check_chain, held


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "audit.jsonl")
    for number in range(4):
        journal.append({"event": "pause", "by": "ann", "evidence": [number, 0.5, None]})
    return tmp_path / "audit.jsonl"


def test_a_chain_is_continued(path):
    journal = Journal(path)
    before = journal.head
    after = journal.append({"event": "resume"})
    assert check_chain(path.read_bytes()) == (5, after)
    assert before != after
    assert check_chain(b"") == (0, GENESIS)


def test_changes_show(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for spoiled in (
        [lines[0], lines[1].replace(b"ann", b"bob"), *lines[2:]],
        [lines[0], *lines[2:]],
        lines[1:],
        [*lines, lines[-1]],
        [lines[1], lines[0], *lines[2:]],
        [b"{}\n"],
        [b"[]\n"],
        [b"\xff\n"],
    ):
        path.write_bytes(b"".join(spoiled))
        with pytest.raises(Refused, match="line"):
            Journal(path)


def test_a_torn_last_line_is_removed(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "ab')
    journal = Journal(path)
    assert path.read_bytes() == whole
    journal.append({"event": "abort"})
    assert check_chain(path.read_bytes())[0] == 5


def test_what_cannot_be_recorded_is_not_half_recorded(path, monkeypatch):
    journal, before = Journal(path), path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TryAgain, match="nothing was recorded"):
            journal.append({"event": "abort"})
    assert path.read_bytes() == before
    journal.append({"event": "abort"})
    assert Journal(path).records == 5


_HOLDER = """
import sys, time
from pathlib import Path
from fedcore.registry.journal import held
with held(Path(sys.argv[1]), 5):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_decides_and_a_dead_one_lets_go(path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TryAgain, match="somebody else decides"), held(path, 0.1):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with held(path, 60):
        Journal(path).append({"event": "resume"})
    with held(path, 0.0):
        assert check_chain(path.read_bytes())[0] == 5
