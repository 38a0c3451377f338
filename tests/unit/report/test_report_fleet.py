"""Staleness and virtual time on a page, where a run has them."""

import json

import pytest

from fedcore.config import parse_config
from fedcore.report import read_run
from fedcore.report.fleet import fleet_cards, fleet_tiles
from fedcore.report.page import write_report

ASYNCHRONOUS = {"asynchronous": {"buffer": 4, "max_staleness": 3}, "fleet": {"median_seconds": 60}, "run": {"name": "tail"}}


@pytest.fixture
def page(tmp_path):
    def write(tables, *rounds):
        config = parse_config({**tables, "data": {"clients": 9}}, "test", tmp_path)
        (tmp_path / "config.toml").write_text(config.to_toml())
        lines = [
            {"round": n, "cohort": 4, "replies": 4, "dropped": [], "accuracy": 0.1 * n, **one} for n, one in enumerate(rounds, 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        return read_run(tmp_path), write_report(tmp_path).read_text()

    return write


def test_an_asynchronous_run_shows_ages_time_and_what_was_discarded(page):
    run, text = page(
        ASYNCHRONOUS,
        {"virtual_seconds": 90.0, "staleness_mean": 0.0, "staleness_max": 0, "discarded": 0},
        {"virtual_seconds": 7200.0, "staleness_mean": 1.5, "staleness_max": 3, "discarded": 5},
    )
    assert [card.title for card in fleet_cards(run)] == ["Staleness", "Virtual time"]
    assert "1 / (1 + a)^0.5; over 3 it is discarded" in fleet_cards(run)[0].note
    tiles = {tile.label: (tile.value, tile.note) for tile in fleet_tiles(run)}
    assert tiles["virtual time"] == ("2 h 00 min", "1 h 00 min a round")
    assert tiles["discarded"] == ("5", "updates too stale")
    assert "asynchronous, a step every 4 updates" in text
    assert "all clients each round" not in text


def test_a_synchronous_run_over_a_fleet_shows_its_time_and_whom_it_did_not_wait_for(page):
    fleet = {"fleet": {"median_seconds": 60, "over_selection": 1.5}, "cohort": {"size": 4}}
    run, text = page(fleet, {"virtual_seconds": 90.0, "discarded": 2})
    assert [card.title for card in fleet_cards(run)] == ["Virtual time"]
    assert fleet_tiles(run)[1].note == "clients not waited for"
    assert "cohort of 4" in text


def test_other_runs_show_nothing_of_it(page):
    run, text = page({}, {})
    assert (fleet_cards(run), fleet_tiles(run)) == ([], [])
    assert "Virtual time" not in text
    assert "Staleness" not in text
