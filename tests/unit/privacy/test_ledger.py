import json
import math
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from fedcore.errors import BudgetSpent, Refused
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import DpSgd, GaussianRelease, SkellamRelease, is_amplified, without_amplification
from fedcore.privacy.exposure import Exposure
from fedcore.privacy.ledger import Charge, Ledger, participations
from fedcore.state.ledger_sqlite import SqliteLedger

NOW = "2026-11-22T10:00:00+00:00"
SKELLAM = SkellamRelease(1.0, 1e6, 1e12, 1e12, 1e-25)


def charge(number: int = 1, clients=(1, 2, 3), event=None, **changes) -> Charge:
    event = event or GaussianRelease(1.0)
    unit = "example" if isinstance(event, DpSgd) else "client"
    return Charge(**{
        "run": "a", "round": number, "attempt": 1, "unit": unit, "event": event, "clients": tuple(clients), "time": NOW,
        "delta": 1e-6, **changes,
    })  # fmt: skip


@pytest.fixture
def ledger(tmp_path):
    held = Ledger(SqliteLedger(tmp_path / "ledger.sqlite"), "phones")
    yield held
    held.close()


def again(tmp_path, population="phones") -> Ledger:
    return Ledger(SqliteLedger(tmp_path / "ledger.sqlite"), population)


def test_a_charge_is_there_for_the_next_coordinator(ledger, tmp_path):
    charges = [
        charge(1), charge(2, event=GaussianRelease(1.0, 0.1), clients=()), charge(2, event=DpSgd(1.0, 5, 2)),
        charge(3, event=SKELLAM), charge(3, attempt=2, event=SKELLAM), charge(3, run="b", clients=("phone-1", 2**63)),
    ]  # fmt: skip
    assert [ledger.charge(one) for one in charges] == [True] * 6
    assert again(tmp_path).charges() == charges
    assert again(tmp_path).charges(4) == charges[4:]
    assert again(tmp_path).charges(6) == ledger.charges(9) == []
    for unit in ("client", "example"):
        assert again(tmp_path).spending(unit) == ledger.spending(unit)


def test_the_same_fact_counts_once_whenever_it_is_repeated(ledger, tmp_path):
    assert ledger.charge(charge(clients=(1, 2)))
    before = ledger.spending("client")
    for held in (ledger, again(tmp_path)):
        assert not held.charge(charge(clients=(2, 1), time="2027-01-01T00:00:00+00:00"))
        assert not held.charge(charge(clients=(2, 1)), budget=0.0)  # what is charged is not refused afterwards
        assert held.spending("client") == before
    assert len(list(ledger.charges())) == 1


def test_another_fact_under_the_same_key_is_refused(ledger):
    ledger.charge(charge())
    for other in (
        charge(clients=(1, 2)),
        charge(event=GaussianRelease(1.0, 0.1)),
        charge(event=GaussianRelease(2.0)),
        charge(delta=1e-5),
    ):
        with pytest.raises(
            Refused, match=r"round 1 of run a \(attempt 1, unit client\) was charged with other clients or another event"
        ):
            ledger.charge(other)
    assert len(list(ledger.charges())) == 1


def test_an_overspending_charge_is_refused_before_anything_is_written(ledger, tmp_path):
    budget = epsilon({GaussianRelease(1.0): 3}, 1e-6)
    for number in (1, 2, 3):
        assert ledger.charge(charge(number), budget)
    with pytest.raises(
        BudgetSpent, match=r"^round 4 of run a would overspend .* unit client: epsilon 11 .*, allowed 9.254; 9.254 is"
    ):
        ledger.charge(charge(4), budget)
    assert len(list(again(tmp_path).charges())) == 3
    assert ledger.charge(charge(4, clients=(7, 8)), budget)  # others have not taken part as often
    assert ledger.charge(charge(4, event=DpSgd(1.0, 50, 1)), budget)  # the other unit has an account of its own
    with pytest.raises(BudgetSpent, match="run b"):
        again(tmp_path).charge(charge(4, run="b", clients=(3, 9)), budget)  # runs over one population share it


@pytest.mark.parametrize("budget", [math.nan, -1.0, math.inf, "1"])
def test_a_budget_that_is_no_number_is_refused(ledger, budget):
    with pytest.raises(Refused, match="privacy budget must be a number"):
        ledger.charge(charge(), budget)
    assert list(ledger.charges()) == []


def test_the_view_that_the_budget_is_for(ledger):
    event = GaussianRelease(1.0, 0.01)
    assert ledger.charge(charge(1, event=event), 1.0)
    with pytest.raises(BudgetSpent, match="coordinator view"):
        ledger.charge(charge(2, event=event), 1.0, view="coordinator")


def worst_client(history, unit: str, view: str, delta: float) -> float:
    """The slow twin of `Exposure`: every client on its own, from the definitions."""
    costs = [0.0]
    for client in {client for one in history for client in one.clients} | {"bystander"}:
        own: Counter = Counter()
        for one in history:
            if one.unit == unit and view == "released" and (is_amplified(one.event) or client in one.clients):
                own[one.event] += 1
            if one.unit == unit and view == "coordinator" and client in one.clients:
                own[without_amplification(one.event)] += 1
        costs.append(epsilon(own, delta))
    return max(costs)


@pytest.mark.parametrize("seed", range(3))
def test_both_views_are_the_worst_clients(ledger, seed):
    draw = random.Random(seed)
    events = [GaussianRelease(1.0, 0.2), GaussianRelease(2.0), GaussianRelease(1.3), DpSgd(1.0, 10, 1), DpSgd(2.0, 5, 2)]
    history = []
    for number in range(12):
        history.append(charge(number, draw.sample(range(6), 2), draw.choice(events)))
        unit = history[-1].unit
        for view in ("released", "coordinator"):
            expected = worst_client(history, unit, view, 1e-6)
            assert ledger.epsilon(unit, 1e-6, view, after=history[-1]) == pytest.approx(expected, rel=1e-9)
        ledger.charge(history[-1])
        for view in ("released", "coordinator"):
            assert ledger.epsilon(unit, 1e-6, view) == pytest.approx(worst_client(history, unit, view, 1e-6), rel=1e-9)


def test_a_million_clients_have_few_compositions():
    """What is kept for the maximum does not grow with clients or rounds."""
    exposure = Exposure()
    for number in range(20):
        exposure.add(GaussianRelease(1.0), range(number * 1000, number * 1000 + 5000))
    assert exposure.most_participations == 5
    assert exposure.clients == 24_000
    assert [len(view.worst) for view in exposure._views.values()] == [1, 1]
    assert exposure.epsilon("released", 1e-6) == epsilon({GaussianRelease(1.0): 5}, 1e-6)


def test_spending_says_how_much_and_what_it_assumes(ledger):
    assert ledger.spending("client") is None
    event = GaussianRelease(1.0, 0.1)
    for number, attempt, run in ((1, 1, "a"), (1, 2, "a"), (2, 1, "a"), (1, 1, "b")):
        ledger.charge(charge(number, (number, 9), event, attempt=attempt, run=run, delta=1e-5 if run == "b" else 1e-6))
    spent = ledger.spending("client")
    assert (spent.releases, spent.rounds, spent.runs, spent.clients, spent.participations) == (4, 3, 2, 3, 4)
    assert spent.delta == 1e-6  # the strictest that a run was planned with
    assert spent.released == epsilon({event: 4}, 1e-6)
    assert spent.coordinator == epsilon({GaussianRelease(1.0): 4}, 1e-6)
    assert ledger.spending("client", 1e-3).released == epsilon({event: 4}, 1e-3)
    assert "secret coin" in spent.statement.released
    assert "knows which client took part" in spent.statement.coordinator
    assert "does not protect clients from the coordinator" in spent.statement.not_concluded[0]


def test_the_words_fit_the_events(ledger):
    ledger.charge(charge(1, event=SKELLAM))
    words = ledger.spending("client").statement
    assert "zero-out" in words.adjacency
    assert "Skellam" in words.bound
    assert "No amplification" in words.released
    assert "committee" in words.not_concluded[0]
    assert "from the coordinator" not in str(words)
    ledger.charge(charge(1, event=DpSgd(1.0, 5, 1)))
    words = ledger.spending("example").statement
    assert "one training example" in words.adjacency
    assert "does not protect a person" in words.not_concluded[0]


def test_participations_counts_rounds_not_charges():
    counted = participations([
        charge(1, (1, 2)), charge(1, (1, 2), DpSgd(1.0, 5, 1)), charge(2, (2, "x")), charge(2, (2,), attempt=2),
        charge(2, (2,), run="b"),
    ])  # fmt: skip
    assert counted == Counter({2: 4, 1: 1, "x": 1})


def test_a_ledger_of_other_clients_is_refused(ledger, tmp_path):
    ledger.charge(charge())
    with pytest.raises(Refused, match="its population is 'phones', not 'watches'; client ids would be mixed up"):
        again(tmp_path, "watches")
    assert again(tmp_path, None).population == "phones"
    empty = Ledger(SqliteLedger(tmp_path / "new.sqlite"))
    with pytest.raises(Refused, match="the first charge must name the population"):
        empty.charge(charge())
    with pytest.raises(Refused, match="must not be empty"):
        Ledger(SqliteLedger(tmp_path / "new.sqlite"), "")


def tamper(tmp_path, statement: str, *values) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute(statement, values)
    database.close()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"noise_multiplier": 1.0', '"noise_multiplier": 9.0', "entry 1 does not follow from those before; the ledger was damaged"),
        ('"version": 1', '"version": 2', "entry 1 is not of a version that this fedcore knows"),
        ('"chain": "', '"chain": "0', "entry 1 does not follow"),
        ('{"version"', '{"extra": 1, "version"', "entry 1 is not of a version"),
        ('"round": 2', '"round": ', r"is damaged \(entry 1 cannot be read\)"),
    ],
)
def test_a_changed_entry_is_noticed(ledger, tmp_path, old, new, said):
    for number in (1, 2, 3):
        ledger.charge(charge(number))
    tamper(tmp_path, "UPDATE entries SET entry = replace(entry, ?, ?) WHERE position = 1", old, new)
    with pytest.raises(Refused, match=said):
        again(tmp_path)


def test_an_event_from_the_future_is_refused(tmp_path, monkeypatch):
    """A valid chain does not make an unknown event accountable."""
    table = {**charge().to_table(), "event": {"kind": "laplace", "scale": 1.0}}
    monkeypatch.setattr(Charge, "to_table", lambda self: table)
    Ledger(SqliteLedger(tmp_path / "ledger.sqlite"), "phones").charge(charge())
    with pytest.raises(Refused, match="unknown privacy event"):
        again(tmp_path)


def test_a_missing_or_rolled_back_entry_is_noticed(ledger, tmp_path):
    for number in (1, 2, 3):
        ledger.charge(charge(number))
    tamper(tmp_path, "DELETE FROM entries WHERE position = 2")
    with pytest.raises(Refused, match="rolled back or replaced"):
        ledger.charge(charge(4))
    tamper(tmp_path, "DELETE FROM entries WHERE position = 0")
    with pytest.raises(Refused, match="entry 0 is missing"):
        again(tmp_path)


def test_a_history_that_forked_is_noticed(ledger, tmp_path):
    """As after a failover to a copy that lacked the last entry, to which another coordinator wrote."""
    for number in (1, 2):
        ledger.charge(charge(number))
    tamper(tmp_path, "DELETE FROM entries WHERE position = 1")
    again(tmp_path).charge(charge(2, run="b"))
    again(tmp_path).charge(charge(3, run="b"))
    with pytest.raises(Refused, match="entry 2 does not follow"):
        ledger.charge(charge(3))


@pytest.mark.parametrize(
    "changes",
    [
        {"run": ""}, {"run": 5}, {"round": -1}, {"round": 1.0}, {"round": True}, {"attempt": None}, {"unit": "person"},
        {"unit": "example"}, {"clients": (1, 1)}, {"clients": (1.5,)}, {"clients": (True,)}, {"clients": ()}, {"time": None},
        {"time": "yesterday"}, {"delta": 0}, {"delta": math.nan}, {"event": DpSgd(1.0, 5, 1), "unit": "client"},
        {"event": SKELLAM, "clients": ()},
    ],
)  # fmt: skip
def test_a_charge_that_is_none_is_refused_in_one_line(changes):
    with pytest.raises(Refused, match=r"^[^\n]+$"):
        replace(charge(), **changes)


@pytest.mark.parametrize("change", [{"more": 1}, {"clients": "123"}, {"clients": None}, {"event": None}])
def test_a_table_that_is_no_charge_is_refused(change):
    table = json.loads(json.dumps(charge().to_table()))
    assert Charge.from_table(table) == charge()
    with pytest.raises(Refused):
        Charge.from_table({**table, **change})
    with pytest.raises(Refused, match="other fields"):
        Charge.from_table({name: value for name, value in table.items() if name != "delta"})


def test_the_ledger_needs_neither_torch_nor_flwr(tmp_path):
    program = f"""
import sys
from fedcore.privacy.ledger import Charge, Ledger
from fedcore.privacy.events import GaussianRelease
from fedcore.state.stores import open_ledger
held = Ledger(open_ledger({str(tmp_path)!r}), "phones")
assert not {{"torch", "flwr", "dp_accounting", "redis"}} & set(sys.modules)
held.charge(Charge("a", 1, 1, "client", GaussianRelease(1.0, 0.1), (1,), {NOW!r}, 1e-6), 5.0)
assert not {{"torch", "flwr", "redis"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
