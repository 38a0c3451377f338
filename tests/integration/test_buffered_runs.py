"""Asynchronous rounds of simulated clients as a user runs them: real processes that are killed, and what is shown."""

import json

import pytest
from fedcore_commands import fedcore
from run_directories import killed_and_resumed, last_checkpoint, untimed

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun

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


def test_kills_at_random_moments_leave_the_bits_of_a_run_that_was_not_killed(small, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with SimulatedRun(load_config(small), whole, resume=False) as run:
        list(run.rounds())
        run.finish()
    done, kills = killed_and_resumed(small, torn, 5)
    assert kills >= 2
    assert done.returncode == 0, done.stderr
    assert "virtual " in done.stdout
    assert "stale " in done.stdout
    assert "discarded " in done.stdout
    assert untimed(torn) == untimed(whole)
    assert last_checkpoint(torn) == last_checkpoint(whole)
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
