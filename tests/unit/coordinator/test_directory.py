"""A start that is refused leaves nothing behind, and nothing that was begun is taken away."""

import dataclasses

import pytest

from fedcore.config import PrivacyConfig
from fedcore.coordinator.directory import claim
from fedcore.coordinator.run import FederatedRun, SimulatedRun
from fedcore.errors import BudgetSpent, FedcoreError, Refused, RoundFailed, TryAgain
from fedcore.privacy.ledger import Ledger
from fedcore.state.stores import open_ledger

FEW = ("run.rounds=1", "quantization.enabled=false", "evaluation.every=0")
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4}
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def private(scenario):
    def make(*units, settings=()):
        config = scenario(*FEW, *settings)
        return dataclasses.replace(config, privacy=tuple(PrivacyConfig(**unit) for unit in units))

    return make


def attempt(config, out, connect=None):
    """Start and run as the command does."""
    start = FederatedRun(config, out, connect, resume=False) if connect else SimulatedRun(config, out, resume=False)
    with start as run:
        list(run.rounds())


def unreachable(_):
    raise TryAgain("no SuperNode has partition-id 1 after 0 s of waiting")


STRATEGY = """
from flwr.serverapp.strategy import FedAvg

class Raises(FedAvg):
    accepts_mean = True
    def aggregate_train(self, server_round, replies):
        raise ValueError("mine")
"""


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("cause", ["no ledger", "another population", "other units", "budget", "grid", "strategy"])
def test_a_refused_start_leaves_nothing_and_the_same_directory_can_be_used(private, tmp_path, existed, cause):
    out, ledger = tmp_path / "runs" / "one", tmp_path / "people.sqlite"
    if existed:
        out.mkdir(parents=True)
    shared, settings = {**EXAMPLE, "ledger": str(ledger)}, ()
    if cause == "no ledger":
        ledger.write_bytes(b"nothing of the kind" * 100)
    elif cause == "another population":
        attempt(private(shared, settings=["data.clients=5"]), tmp_path / "before")
    elif cause == "other units":
        attempt(private({**CLIENT, "ledger": str(ledger)}), tmp_path / "before")
    elif cause == "budget":
        shared |= {"budget": 0.01}
    elif cause == "strategy":
        (tmp_path / "mine.py").write_text(STRATEGY)
        settings = ["strategy.name=mine:Raises"]
    config = private(*(() if cause in {"strategy", "grid"} else (shared,)), settings=settings)
    with pytest.raises(FedcoreError):
        attempt(config, out, unreachable if cause == "grid" else None)
    assert (out.exists(), out.parent.exists()) == (existed, existed)
    assert not existed or not list(out.iterdir())
    attempt(private(EXAMPLE), out)
    assert (out / "metrics.jsonl").read_text().count("\n") == 1


def test_a_round_that_was_paid_for_is_not_forgotten(private, tmp_path):
    """The ledger lies in the directory: taking it away would refund the round."""
    (tmp_path / "mine.py").write_text(STRATEGY)
    for place in ("", str(tmp_path / "people.sqlite")):
        out = tmp_path / f"run{bool(place)}"
        with pytest.raises(RoundFailed, match="failed in aggregate_train: ValueError: mine"):
            attempt(private({**EXAMPLE, "ledger": place}, settings=["strategy.name=mine:Raises"]), out)
        assert [charge.round for charge in Ledger(open_ledger(place or out, write=False)).charges()] == [1]
        assert (out / "config.toml").exists(), "for --resume, which charges the round no second time"
        with pytest.raises(Refused, match="holds a run already; add --resume"):
            attempt(private(EXAMPLE), out)


def test_a_budget_spent_later_keeps_the_run(private, tmp_path):
    out = tmp_path / "run"
    config = private({**CLIENT, "budget": 5.0}, settings=["run.rounds=4"])
    with SimulatedRun(config, out, resume=False) as run:
        assert 1 <= len(list(run.rounds())) < 4
    with pytest.raises(BudgetSpent), SimulatedRun(config, out, resume=True):
        raise BudgetSpent("as of a caller")
    assert (out / "state.sqlite").exists()


def test_of_two_starts_in_one_directory_the_second_takes_nothing_away(private, tmp_path):
    out, config = tmp_path / "run", private()

    def connect(assembly):
        attempt(config, out)  # while the first one is still connecting
        raise AssertionError

    with pytest.raises(Refused, match=r"another run has just begun there|holds a run already"):
        FederatedRun(config, out, connect, resume=False)
    assert not out.exists()
    out.mkdir()
    first = claim(out)
    (out / "config.toml").write_text("of the first")
    with pytest.raises(Refused, match="another run has just begun there"):
        claim(out)
    assert (out / "config.toml").read_text() == "of the first"
    (out / "notes.txt").write_text("mine")
    first.give_up()
    assert [path.name for path in out.iterdir()] == ["notes.txt"], "nothing but what a run writes is removed"
