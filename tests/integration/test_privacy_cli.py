"""`fedcore privacy` as a user runs it; in this process, except where the process is the point."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import DpSgd, GaussianRelease, SkellamRelease
from fedcore.privacy.ledger import Charge, Ledger
from fedcore.state.stores import open_ledger

PLAN = "--population 1000000 --cohort 1000 --rounds 1500 --delta 1e-7"


def privacy(line: str, *more: object):
    return CliRunner().invoke(app, ["privacy", *line.split(), *map(str, more)])


def answer(line: str, *more: object) -> dict:
    done = privacy(line, *more, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_command_gives_the_published_values():
    command = [
        sys.executable,
        "-c",
        "from fedcore.cli import main; main()",
        "privacy",
        "epsilon",
        *PLAN.split(),
        "--noise",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["pld"] == pytest.approx(0.2666, rel=0.01)
    assert found["prv"] == pytest.approx(0.277, rel=0.01)
    assert found["rdp"] == pytest.approx(1.0677, rel=0.01)
    assert found["coordinator"] == pytest.approx({"1": 5.349, "2": 7.935, "4": 11.908}, rel=1e-3)


def test_skellam_is_certified_and_the_gaussian_beside_it_is_called_an_approximation():
    found = answer("epsilon --mechanism skellam --noise 1 --delta 1e-7")
    assert found["skellam"] == pytest.approx({"1": 5.683, "2": 8.404, "4": 12.623}, rel=1e-3)
    assert found["approximation"] == pytest.approx({"1": 5.349, "2": 7.935, "4": 11.908}, rel=1e-3)
    assert not {"pld", "prv", "rdp", "coordinator"} & found.keys()
    finite = answer("epsilon --mechanism skellam --noise 1 --delta 1e-7 --mu 100 --dimension 16 --participations 3")
    assert finite["skellam"]["3"] == epsilon({SkellamRelease(1.0, 10.0, 40.0, 100.0): 3}, 1e-7)


def test_the_unit_example():
    found = answer("epsilon --unit example --batches 10 --epochs 2 --rounds 20 --noise 1 --delta 1e-5 --participations 1,5")
    assert found["pld"] == found["coordinator"]["20"] == epsilon({DpSgd(1.0, 10, 2): 20}, 1e-5)
    assert found["coordinator"].keys() == {"1", "5", "20"}
    assert found["pld"] <= found["rdp"]
    assert found["pld"] == pytest.approx(found["prv"], rel=0.01)


def test_where_noise_is_next_to_nothing_a_bound_is_given_and_called_one():
    plan = "--unit example --batches 10 --epochs 2 --rounds 20 --delta 1e-5"
    found = answer(f"epsilon {plan} --noise 0.01")
    assert 348950 < found["pld"] < 1.1 * 348950, "dp-accounting's number, and not much more"
    assert found["bound"].startswith("upper bound by how often an example is drawn")
    assert found["prv"] is None
    shown = " ".join(privacy(f"epsilon {plan} --noise 0.01").stdout.split())
    assert "by draws: an upper bound 3." in shown
    assert "an epsilon says nothing but that hardly anything is protected" in shown
    assert "PLD: the number to use" not in shown
    assert "bound" not in answer(f"epsilon {plan} --noise 1")
    target = answer(f"noise {plan} --target-epsilon 1000000")
    assert target["epsilon"] <= 1_000_000
    assert target["bound"]


def test_more_steps_than_can_be_accounted_for_name_the_options():
    done = privacy("epsilon --unit example --batches 100 --epochs 200 --rounds 1000 --noise 1 --delta 1e-5")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "20000000 steps (rounds x epochs x batches an epoch) are more than the 10000000" in done.stderr
    assert "--rounds, --epochs, --batches" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "--population 1000 --cohort 20 --rounds 100",
        "--population 1000 --cohort 20 --rounds 100 --view coordinator --participations 3",
        "--mechanism skellam --participations 1,4",
        pytest.param("--unit example --batches 10 --epochs 1 --rounds 10", marks=pytest.mark.slow),
    ],
)
def test_the_noise_found_reaches_the_target_and_epsilon_agrees(line):
    found = answer(f"noise --target-epsilon 4 --delta 1e-5 {line}")
    assert 3.9 < found["epsilon"] <= 4
    plain = line.replace("--view coordinator ", "")
    cost = answer(f"epsilon --noise {found['noise_multiplier']} --delta 1e-5 {plain}")
    assert found["epsilon"] in (cost.get("pld"), *cost.get("coordinator", {}).values(), *cost.get("skellam", {}).values())
    assert cost.items() <= found.items()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"epsilon {PLAN} --noise 0", "noise multiplier must be a number from 0.01 to 100000, got 0.0"),
        (f"epsilon {PLAN} --noise nan", "noise multiplier must be a number"),
        (f"epsilon {PLAN.replace('1e-7', '1')} --noise 1", "delta must be a number from 1e-10 to below 1, got 1.0"),
        ("epsilon --noise 1 --delta 1e-7", "--population must be given for unit client, a whole number from 1; it is missing"),
        ("epsilon --noise 1 --delta 1e-7 --population 10 --cohort 11 --rounds 5", "--cohort 11 is more than --population 10"),
        (f"epsilon {PLAN} --noise 1 --unit person", "--unit must be client or example, got person"),
        (f"epsilon {PLAN} --noise 1 --mechanism laplace", "--mechanism must be gaussian or skellam, got laplace"),
        (f"epsilon {PLAN} --noise 1 --participations one", "--participations must be whole numbers such as 1,2,4, got one"),
        (f"epsilon {PLAN} --noise 1 --participations 1501", "--participations must lie between 1 and --rounds 1500, got 1501"),
        ("epsilon --unit example --noise 1 --delta 1e-5 --rounds 5", "--batches must be given for unit example"),
        (f"noise {PLAN} --target-epsilon -1", "target epsilon must be a number"),
        (f"noise {PLAN} --target-epsilon 1 --view nobody", "--view must be released or coordinator, got nobody"),
        (
            "noise --mechanism skellam --delta 1e-5 --target-epsilon 1",
            "--participations must be given where no amplification counts",
        ),
        ("ledger /nowhere", "/nowhere: there is no privacy ledger"),
        ("ledger redis://user:secret@localhost/0", "redis://localhost/0: needs ?population=NAME"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(line, said):
    done = privacy(line)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.fixture
def run_directory(tmp_path) -> Path:
    """What a run with both units leaves: 5 rounds, each client in at most 3."""
    store = open_ledger(tmp_path)
    held = Ledger(store, "phones")
    for number in range(1, 6):
        for event in (GaussianRelease(1.0, 0.1), DpSgd(1.5, 10, 1)):
            unit, delta = ("example", 1e-6) if isinstance(event, DpSgd) else ("client", 1e-5)
            clients = (number, number + 1, number + 2)
            held.charge(Charge("run", number, 1, unit, event, clients, "2026-11-22T10:00:00+00:00", delta))
    store.close()
    return tmp_path


def test_a_ledger_shows_both_views_of_each_unit(run_directory):
    for where in (run_directory, run_directory / "ledger.sqlite"):
        found = answer("ledger", where)
        assert found["population"] == "phones"
        client, example = found["units"]["client"], found["units"]["example"]
        assert client["released"] == epsilon({GaussianRelease(1.0, 0.1): 5}, 1e-5)
        assert client["coordinator"] == epsilon({GaussianRelease(1.0): 3}, 1e-5)
        assert example["released"] == example["coordinator"] == epsilon({DpSgd(1.5, 10, 1): 3}, 1e-6)
        assert (client["releases"], client["participations"], client["delta"], example["delta"]) == (5, 3, 1e-5, 1e-6)
    assert answer("ledger", run_directory, "--delta", "1e-3")["units"]["client"]["delta"] == 1e-3


def test_what_a_person_reads_fits_a_terminal_and_says_what_not_to_conclude(run_directory):
    client = epsilon({GaussianRelease(1.0, 0.1): 5}, 1e-5), epsilon({GaussianRelease(1.0): 3}, 1e-5)
    shown = privacy("ledger", run_directory).stdout
    assert "  ".join(f"{value:.4g}" for value in client).split() in [line.split() for line in shown.splitlines()]
    assert "does not protect clients from the coordinator" in " ".join(shown.split())
    assert "releases: 5, rounds: 5, in 1 run; clients that took part: 7, none more often than 3 times" in " ".join(shown.split())
    cost = privacy(f"epsilon {PLAN} --noise 1").stdout
    assert "PLD: the number to use" in cost
    assert "0.267" in cost
    noise = privacy("noise --mechanism skellam --participations 2 --delta 1e-5 --target-epsilon 4").stdout
    assert noise.startswith("noise multiplier ")
    assert "epsilon (certified)  Gaussian, approximation" in noise
    example = privacy("epsilon --unit example --batches 10 --epochs 2 --rounds 20 --noise 1 --delta 1e-5").stdout
    assert "does not protect a person" in " ".join(example.split())
    for text in (shown, cost, noise, example):
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text


def test_a_key_is_made_once_and_not_shown(tmp_path):
    path = tmp_path / "secret.key"
    made = privacy("key", path)
    assert (made.exit_code, made.stderr) == (0, "")
    assert made.stdout == f"made {path}, mode 600; name it in the scenario as privacy.key, relative to the scenario's folder\n"
    key = path.read_bytes()
    assert (len(key), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
    again = privacy("key", path)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"error: {path} exists already; keys are never overwritten\n"
    assert path.read_bytes() == key


def test_an_empty_ledger_says_so(tmp_path):
    open_ledger(tmp_path).close()
    assert privacy("ledger", tmp_path).stdout == "The ledger is empty: nothing was charged.\n"
    assert answer("ledger", tmp_path) == {"population": None, "units": {}}
