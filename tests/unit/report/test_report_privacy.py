"""What a private run's report says, and what it must not say."""

import dataclasses
import json

import pytest

from fedcore.config import PrivacyConfig, load_config
from fedcore.report.page import write_report


@pytest.fixture
def private_run(make_run):
    """A run that protects clients, with a budget that ended it or not."""

    def make(*, ended="", units=("client",)):
        directory = make_run(f"run-{len(units)}-{bool(ended)}-{units[0]}", federated_every=0)
        config = load_config(directory / "config.toml")
        privacy = tuple(PrivacyConfig(unit, noise_multiplier=1.0, delta=1e-4, budget=3.0) for unit in units)
        (directory / "config.toml").write_text(dataclasses.replace(config, privacy=privacy).to_toml())
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows, start=1):
            spent = {"epsilon": 0.2 * number, "epsilon_coordinator": 0.7 * number, "delta": 1e-4, "budget": 3.0}
            row["privacy"] = {unit: spent | ({"clipping_norm": 1 - number / 50} if unit == "client" else {}) for unit in units}
            row |= {"dropped": [], "replies": None}
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = json.loads((directory / "result.json").read_text())
        words = {"adjacency": "one client or nothing", "released": "sees models <only>", "coordinator": "knows who took part",
                 "bound": "exact curve", "not_concluded": ["two devices are two clients"]}  # fmt: skip
        result["privacy"] = {unit: rows[-1]["privacy"][unit] | {"statement": words} for unit in units}
        result |= {"ended": ended} if ended else {}
        (directory / "result.json").write_text(json.dumps(result))
        return write_report(directory).read_text()

    return make


def test_it_shows_what_was_spent_what_is_left_and_what_both_numbers_assume(private_run):
    page = private_run()
    assert "epsilon, one client" in page
    assert "of 3 allowed, 0.6 left; 8.4 towards the coordinator; delta 0.0001" in page
    assert "Epsilon 2.4 assumes" in page
    assert "sees models &lt;only&gt;" in page
    assert "two devices are two clients" in page
    assert "Clipping norm" in page


def test_it_does_not_tell_who_took_part(private_run):
    page = private_run()
    assert "clients dropped" not in page
    assert "Withheld: with privacy of unit client" in page
    assert "clients dropped" in private_run(units=("example",)), "an example's privacy hides no client"


def test_it_says_that_the_budget_ended_the_run(private_run):
    assert "ended by the budget" in private_run(ended="round 13 would overspend")
    assert "ended by the budget" not in private_run()


def test_both_units_stand_side_by_side(private_run):
    page = private_run(units=("client", "example"))
    for unit in ("client", "example"):
        assert f"Spent, one {unit}" in page
        assert f"privacy.{unit}" in page
