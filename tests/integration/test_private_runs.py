"""Private runs as a user starts, kills and resumes them."""

import json
import stat

import pytest
from fedcore_commands import fedcore
from run_directories import killed_and_resumed, last_checkpoint, untimed

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun
from fedcore.privacy.ledger import Ledger
from fedcore.state.stores import open_ledger

SCENARIO = """
[run]
rounds = 5
[data]
clients = 12
[model]
name = "mlp"
params = { hidden = [16] }
[quantization]
calibrate_round = 2
[cohort]
size = 8
[engine]
workers = 2
"""
CENTRAL = """
[[privacy]]
unit = "client"
sampling = "poisson"
noise_multiplier = 1.0
delta = 1e-3
adaptive_quantile = 0.5
adaptive_noise = 1.0
loss_cap = 5.0
"""
SHARES = """
[[privacy]]
unit = "client"
mechanism = "skellam"
noise_multiplier = 1.0
delta = 1e-3
minimum_survivors = 6
"""
EXAMPLE = """
[[privacy]]
unit = "example"
noise_multiplier = 1.0
delta = 1e-4
"""


def charged(out):
    ledger = Ledger(open_ledger(out, write=False))
    return [(charge.unit, charge.round, charge.attempt) for charge in ledger.charges()]


@pytest.fixture
def scenario(tmp_path):
    def write(*units, name="private"):
        path = tmp_path / f"{name}.toml"
        path.write_text(SCENARIO + "".join(units))
        return path

    return write


@pytest.mark.parametrize(
    "units",
    [
        pytest.param((CENTRAL,), id="central"),
        pytest.param((SHARES, EXAMPLE), id="both"),
        pytest.param((SHARES,), id="shares", marks=pytest.mark.slow),
        pytest.param((EXAMPLE,), id="example", marks=pytest.mark.slow),
    ],
)
def test_a_killed_private_run_ends_with_the_same_bits_and_charges_every_round_once(scenario, tmp_path, units):
    path = scenario(*units)
    with SimulatedRun(load_config(path), tmp_path / "straight", resume=False) as run:
        list(run.rounds())
    done, kills = killed_and_resumed(path, tmp_path / "torn", units)
    assert done.returncode == 0, done.stderr
    assert kills >= 2
    assert "epsilon" in done.stdout
    assert last_checkpoint(tmp_path / "torn") == last_checkpoint(tmp_path / "straight")
    assert untimed(tmp_path / "torn") == untimed(tmp_path / "straight")
    assert charged(tmp_path / "torn") == charged(tmp_path / "straight")
    assert len(charged(tmp_path / "torn")) == 5 * len(units)


def test_what_a_release_keeps_back_is_in_no_file_but_the_operator_s(scenario, tmp_path):
    out = tmp_path / "run"
    assert fedcore("simulate", scenario(CENTRAL), "--out", out).returncode == 0
    rows = untimed(out)
    assert {row["cohort"] for row in rows} == {8}
    assert all(row["replies"] is None and row["dropped"] == [] for row in rows)
    assert len({row["bytes_up"] for row in rows}) == len({row["bytes_down"] for row in rows if row["quantized"]}) == 1
    assert all(isinstance(row["train_loss"], float) for row in rows), "a loss, if a noisy one"
    told = [json.loads(line) for line in (out / "operator.jsonl").read_text().splitlines()]
    assert len({row["replies"] for row in told}) > 1, "cohorts are Poisson, so their sizes differ"
    assert stat.S_IMODE((out / "operator.jsonl").stat().st_mode) == 0o600
    norms = [row["privacy"]["client"]["clipping_norm"] for row in rows]
    assert len(set(norms)) == 5, "the clipping norm adapts"


def test_the_run_ends_before_it_overspends_and_says_so(scenario, tmp_path):
    out, path = tmp_path / "run", scenario(EXAMPLE.replace("delta", "budget = 8.0\ndelta"))
    done = fedcore("simulate", path, "--out", out, "--set", "run.rounds=50")
    assert done.returncode == 0, done.stderr
    assert "would overspend the privacy budget of unit example" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert 1 <= result["rounds"] < 50
    assert result["privacy"]["example"]["epsilon"] <= 8.0
    assert "8" in result["ended"]
    page = (out / "report.html").read_text()
    assert "What protects clients, and what it assumes" in page
    assert "ended by the budget" in page
    again = fedcore("simulate", path, "--out", out, "--set", "run.rounds=50", "--resume")
    assert again.returncode == 0, again.stderr
    assert len(untimed(out)) == result["rounds"]


def test_a_first_round_that_cannot_be_paid_is_refused_before_anybody_works(scenario, tmp_path):
    done = fedcore("simulate", scenario(EXAMPLE.replace("delta", "budget = 0.01\ndelta")), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "would overspend" in done.stderr
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_runs_over_one_population_share_a_ledger_and_its_budget(scenario, tmp_path):
    unit = EXAMPLE.replace("delta", f'ledger = "{tmp_path}/people.sqlite"\ndelta')
    done = fedcore("simulate", scenario(unit, name="one"), "--out", tmp_path / "one", "--set", "run.rounds=3")
    assert done.returncode == 0, done.stderr
    spent = json.loads((tmp_path / "one" / "result.json").read_text())["privacy"]["example"]["epsilon"]
    second = fedcore("simulate", scenario(unit, name="two"), "--out", tmp_path / "two", "--set", f"privacy.budget={1.05 * spent}")
    assert second.returncode == 2
    assert f"{spent:.4g} is spent" in second.stderr
    assert not (tmp_path / "two").exists()
    assert len(charged(tmp_path / "people.sqlite")) == 3
    shown = fedcore("privacy", "ledger", tmp_path / "one")
    assert shown.returncode == 0, shown.stderr
    assert "unit example" in shown.stdout, "the directory of a run leads to the ledger that it shares"
    assert stat.S_IMODE((tmp_path / "people.sqlite").stat().st_mode) == 0o600
    again = fedcore("simulate", scenario(unit, name="one"), "--out", tmp_path / "again", "--set", "run.rounds=3")
    assert again.returncode == 0, again.stderr
    assert last_checkpoint(tmp_path / "again") != last_checkpoint(tmp_path / "one"), "noise of its own: theirs would cancel"
    third = fedcore("simulate", scenario(unit, name="three"), "--out", tmp_path / "three", "--set", "data.clients=13")
    assert third.returncode == 2
    assert "population" in third.stderr, "other clients stand behind the same ids"


def test_a_resumed_run_needs_the_ledger_that_its_rounds_were_charged_to(scenario, tmp_path):
    out, path = tmp_path / "run", scenario(CENTRAL)
    assert fedcore("simulate", path, "--out", out, "--set", "run.rounds=2").returncode == 0
    (out / "ledger.sqlite").unlink()
    done = fedcore("simulate", path, "--out", out, "--resume")
    assert done.returncode == 2
    assert "the privacy ledger has no charge of unit client for round 1" in done.stderr


def test_noise_that_was_solved_for_some_rounds_serves_no_others(scenario, tmp_path):
    out, path = tmp_path / "run", scenario(EXAMPLE.replace("noise_multiplier = 1.0", "target_epsilon = 6.0"))
    done = fedcore("simulate", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert 5.9 < json.loads((out / "result.json").read_text())["privacy"]["example"]["epsilon"] <= 6.0
    more = fedcore("simulate", path, "--out", out, "--resume", "--set", "run.rounds=9")
    assert more.returncode == 2
    assert "was solved for 5 rounds" in more.stderr
