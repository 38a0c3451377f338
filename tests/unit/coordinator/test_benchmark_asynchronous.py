"""The comparison of synchronous and asynchronous rounds: what is compared, and how it is told."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

from simulations.benchmarks.asynchronous import AT_ONCE, FLEETS, METHODS, draw, scenario, table


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_begins_as_many_trainings_and_has_as_many_clients_at_work(fleet, method):
    config = scenario(fleet, method, 3)
    buffer, rounds = config.asynchronous.buffer, config.run.rounds
    begun = rounds * buffer + AT_ONCE if buffer else rounds * AT_ONCE
    assert 4160 - AT_ONCE < begun <= 4160
    assert (config.asynchronous.concurrency or round(config.cohort.size * config.fleet.over_selection)) == AT_ONCE
    assert config.run.seed == 3


def curve(fleet, method, seed, **changed):
    one = {
        "fleet": fleet, "method": method, "seed": seed, "hours": 2.0 + seed, "hours_to": {"0.75": 0.5 + seed, "0.8": None},
        "accuracy": 0.8, "used": 100, "wasted": 7, "steps": 10, "staleness": 1.25, "curve": [[1.0, 0.7], [2.0 + seed, 0.8]],
    }  # fmt: skip
    return one | changed


def test_the_table_shows_means_and_ranges_and_how_often_a_target_was_missed():
    lines = table([curve("even", "a", 0), curve("even", "a", 1, hours_to={"0.75": None, "0.8": None})]).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row[:4] == ["even", "a", "0.50 (0.50 to 0.50), 1 of 2 seeds", "never"]
    assert row[4:] == ["2.5 (2.0 to 3.0)", "80.0 (80.0 to 80.0)", "10", "100", "7", "1.2"]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw([curve(fleet, method, seed) for fleet in FLEETS for method in METHODS for seed in (0, 1)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
