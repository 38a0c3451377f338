"""Asynchronous rounds of simulated clients as a user runs them: real processes that are killed, and what is shown."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from fedcore.cli import main; main()"]
SCENARIO = """
[run]
name = "slow-tail"
rounds = 60
[data]
clients = 12
[model]
name = "mlp"
params = { hidden = [16] }
[quantization]
calibrate_round = 2
[training]
epochs = 3
[strategy]
name = "fedadam"
[asynchronous]
buffer = 4
concurrency = 8
max_staleness = 3
[fleet]
median_seconds = 60
slow_share = 0.2
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "slow-tail.toml"
    path.write_text(SCENARIO)
    return path


def fedcore(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


def metrics(out):
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in entries]


def wait_for_rounds(out, goal, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= goal:
            return
        time.sleep(0.01)


def test_kills_at_random_moments_leave_the_bits_of_a_run_that_was_not_killed(small, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    done = fedcore("simulate", small, "--out", whole)
    assert done.returncode == 0, done.stderr
    assert "virtual " in done.stdout
    assert "stale " in done.stdout
    assert "discarded " in done.stdout
    draw, kills = random.Random(5), 0
    for goal in (1, 15, 30):
        resume = ["--resume"] if (torn / "config.toml").exists() else []
        process = subprocess.Popen([*COMMAND, "simulate", small, "--out", torn, *resume], stdout=subprocess.DEVNULL)
        wait_for_rounds(torn, goal, process)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    done = fedcore("simulate", small, "--out", torn, "--resume")
    assert done.returncode == 0, done.stderr
    assert metrics(torn) == metrics(whole)
    last = [max((out / "checkpoints").glob("*.safetensors")).read_bytes() for out in (torn, whole)]
    assert last[0] == last[1]
    results = [json.loads((out / "result.json").read_text()) for out in (torn, whole)]
    assert results[0]["virtual_seconds"] == results[1]["virtual_seconds"] > 0
    assert results[0]["discarded"] == results[1]["discarded"] > 0
    page = (whole / "report.html").read_text()
    assert "Staleness" in page
    assert "Virtual time" in page


def test_what_cannot_be_is_one_line_and_leaves_nothing(small, tmp_path):
    for override, words in (
        ("strategy.name=krum", "[asynchronous] gives the strategy one weighted mean, which krum cannot use"),
        ("fleet.median_seconds=0", "fleet.median_seconds must be > 0"),
        ("secagg.enabled=true", "[asynchronous] cannot go with [secagg]"),
    ):
        done = fedcore("simulate", small, "--out", tmp_path / "run", "--set", override)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
    text = fedcore("config", "--json").stdout + fedcore("config").stdout
    assert "asynchronous" in text
    assert "staleness_exponent" in text
