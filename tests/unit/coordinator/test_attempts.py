"""Rounds over clients that come and go: tried again, each attempt paid for; and clients that are not asked again."""

from __future__ import annotations

import json

import pytest

from fedcore.config import parse_config
from fedcore.coordinator.assembly import build_clients
from fedcore.coordinator.run import FederatedRun, SimulatedRun
from fedcore.errors import RoundFailed
from fedcore.grids.cohort import CohortGrid
from fedcore.privacy.ledger import Ledger
from fedcore.state.stores import open_ledger

SCENARIO = {
    "run": {"rounds": 2},
    "data": {"clients": 6},
    "model": {"name": "mlp", "params": {"hidden": [8]}},
    "cohort": {"size": 4},
}
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "max_participations": 4}


class Unsteady(CohortGrid):
    """Clients that come and go: the exchanges in ``failing``, by their number, fail."""

    def send_and_receive(self, messages, *, timeout=None):
        self.exchanges = getattr(self, "exchanges", 0) + 1
        self.asked = [*getattr(self, "asked", []), tuple(self.nodes)]
        if self.exchanges in self.failing:
            raise RoundFailed("too few clients are awake")
        return super().send_and_receive(messages, timeout=timeout)


def run(folder, failing, simulated=False, **sections):
    def connect(assembly):
        grid = Unsteady(build_clients(assembly), assembly.layout, mean=True, workers=1, released=assembly.protection.released)
        grid.failing, grid.simulated = failing, simulated
        return grid

    config = parse_config({**SCENARIO, **sections}, "test", None)
    with FederatedRun(config, folder, connect, resume=False) as found:
        return list(found.rounds()), found.grid.asked


def test_a_round_is_tried_again_and_says_why(tmp_path):
    rounds, asked = run(tmp_path / "run", failing=(2, 3))
    assert [entry.get("failed_attempts") for entry in rounds] == [None, ["too few clients are awake"] * 2]
    assert len(asked) == 4
    with pytest.raises(RoundFailed, match="awake"):
        run(tmp_path / "ends", failing=(2, 3), cohort={"size": 4, "attempts": 2})


def test_every_attempt_is_paid_for_and_asks_clients_that_still_may(tmp_path):
    rounds, asked = run(tmp_path / "run", failing=(1, 2), privacy=[CLIENT])
    ledger = Ledger(open_ledger(tmp_path / "run"))
    charges = [charge for charge in ledger.charges() if charge.unit == "client"]
    assert [(charge.round, charge.attempt) for charge in charges] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert [set(charge.clients) for charge in charges] == [set(cohort) for cohort in asked]
    assert len(rounds) == 2
    one = run(tmp_path / "quiet", failing=(), privacy=[CLIENT])[0]
    assert rounds[-1]["privacy"]["client"]["epsilon"] > one[-1]["privacy"]["client"]["epsilon"]


def test_a_simulated_round_is_not_tried_again(tmp_path):
    with pytest.raises(RoundFailed):
        run(tmp_path / "run", failing=(2,), simulated=True)


def test_blamed_clients_are_remembered_by_the_run(tmp_path):
    config = parse_config({**SCENARIO, "secagg": {"enabled": True}}, "test", None)
    with SimulatedRun(config, tmp_path / "run", resume=False) as found:
        rounds = found.rounds()
        next(rounds)
        found.grid.blamed["client 3 (abc)"] = "it dealt shares of something else than it committed to"
        rounds.close()
    assert "client 3" in next(iter(json.loads((tmp_path / "run" / "blamed.json").read_text())))
    with SimulatedRun(config, tmp_path / "run", resume=True) as found:
        assert list(found.grid.blamed) == ["client 3 (abc)"]
        assert len(list(found.rounds())) == 1
