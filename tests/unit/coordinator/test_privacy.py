"""What a scenario's [privacy] comes to: refused with its reason, or a plan and the facts for the ledger."""

import dataclasses
import math
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedcore.config import parse_config
from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.budget import Budget
from fedcore.coordinator.selection import TRAIN, draw_cohort, toss_coins
from fedcore.errors import BudgetSpent, Refused
from fedcore.flower import Roster, assume_identity, to_record
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.ledger import Ledger
from fedcore.state.stores import open_ledger
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4}


def private(scenario, *units, settings=()):
    """The scenario of the tests with one [[privacy]] for each of ``units``."""
    config = scenario(*settings)
    tables = tomllib.loads(config.to_toml()) | {"privacy": [dict(unit) for unit in units]}
    del tables["folder"]
    return parse_config(tables, "test", config.folder)


@pytest.mark.parametrize(
    ("units", "settings", "reason"),
    [
        ([CLIENT], ["strategy.name=fedmedian"], "fedmedian looks at clients one by one"),
        ([CLIENT], ["strategy.name=krum"], "krum looks at clients one by one"),
        ([CLIENT], ["strategy.name=qfedavg", "strategy.params.client_learning_rate=0.1"], "one by one"),
        ([CLIENT], ["evaluation.federated_every=1", "data.holdout=0.3"], "accuracies on their own examples"),
        ([EXAMPLE], ["evaluation.federated_every=1", "data.holdout=0.3"], "accuracies on their own examples"),
        ([CLIENT], ["wire.update=int8"], "round after clipping"),
        ([CLIENT | {"delta": 0.1}, EXAMPLE], ["data.clients=30"], "protects none of 30 clients"),
        ([EXAMPLE | {"delta": 0.01}], [], "protects none of"),
        ([EXAMPLE], ["strategy.name=qfedavg", "strategy.params.client_learning_rate=0.1"], "reads every client's training loss"),
        ([CLIENT | {"loss_cap": 5.0}, EXAMPLE], [], "training loss is not protected by DP-SGD"),
        ([CLIENT | {"mechanism": "skellam", "sampling": "poisson"}], [], "amplifies nothing"),
        ([CLIENT | {"mechanism": "skellam", "minimum_survivors": 7}], [], "more than the cohort of 6"),
        ([CLIENT | {"mechanism": "skellam", "minimum_survivors": 2, "corrupt_fraction": 0.4}], [], "leaves none that does"),
        ([CLIENT | {"adaptive_quantile": 0.5, "adaptive_noise": 0.4}], [], "half the noise multiplier"),
    ],
)
def test_what_would_void_the_guarantee_is_refused_with_the_reason(scenario, units, settings, reason):
    with pytest.raises(Refused, match=reason):
        assemble(private(scenario, *units, settings=settings))


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ([{"unit": "client", "delta": 1e-3}], "either noise_multiplier or target_epsilon"),
        ([CLIENT | {"target_epsilon": 3.0}], "either noise_multiplier or target_epsilon"),
        ([{"unit": "client", "noise_multiplier": 1.0}], "delta must be given"),
        ([{"noise_multiplier": 1.0, "delta": 1e-3}], "privacy.unit must be given"),
        ([CLIENT | {"unit": "person"}], "privacy.unit must be one of example, client"),
        ([CLIENT, CLIENT], "each unit may be given once"),
        ([EXAMPLE | {"sampling": "poisson"}], "privacy.sampling has no meaning with unit"),
        ([CLIENT | {"minimum_survivors": 3}], "privacy.minimum_survivors has no meaning"),
        ([CLIENT | {"ledger": "redis://:secret@host/0"}], "no place for a password"),
        ([CLIENT | {"adaptive_noise": 2.0}], "no meaning without adaptive_quantile"),
        ([CLIENT | {"clipping_norm": 1e-9}], "privacy.clipping_norm must be a number >= 1e-06"),
        ([CLIENT | {"noise": 1.0}], "unknown key privacy.noise"),
        ([CLIENT | {"noise_multiplier": math.nan}], "privacy.noise_multiplier must be"),
    ],
)
def test_contradictions_are_refused_when_the_scenario_is_read(scenario, units, reason):
    with pytest.raises(Refused, match=reason):
        private(scenario, *units)


@pytest.mark.parametrize(
    "unit",
    [CLIENT, CLIENT | {"sampling": "poisson"}, CLIENT | {"mechanism": "skellam"}, CLIENT | {"max_participations": 2}, EXAMPLE],
)
def test_noise_is_solved_for_the_planned_rounds_and_not_larger_than_needed(scenario, unit):
    config = private(scenario, {**unit, "noise_multiplier": 0.0, "target_epsilon": 6.0}, settings=["run.rounds=5", "cohort.size=4"])
    protection = assemble(config).protection
    if protection.client:
        event = protection.client.event(protection.client.release(1, 1.0))
        noise = protection.client.noise_multiplier
        smaller = dataclasses.replace(protection.client, noise_multiplier=noise * 0.99)
        other = smaller.event(smaller.release(1, 1.0))
    else:
        event, noise = protection.example.event, protection.example.plan.noise_multiplier
        other = dataclasses.replace(event, noise_multiplier=noise * 0.99)
    times = unit.get("max_participations", 5)
    assert epsilon({event: times}, unit["delta"]) <= 6.0 < epsilon({other: times}, unit["delta"])


def test_an_example_is_charged_as_if_on_the_smallest_client(scenario):
    assembly = assemble(private(scenario, EXAMPLE, settings=["training.batch_size=4", "training.epochs=3"]))
    smallest = min(len(part) for part in assembly.data.clients)
    assert assembly.protection.example.event.batches == math.ceil(smallest / 4)
    assert assembly.protection.example.event.epochs == 3


def budget_of(config, tmp_path, run="a", name="ledger"):
    assembly = assemble(config)
    ledger = Ledger(open_ledger(tmp_path / f"{name}.sqlite"), "people")
    return Budget(assembly.protection, ledger, run, fresh_noise=False), assembly.protection, ledger


def test_a_repeated_round_is_charged_once_and_new_noise_is_charged_anew(scenario, tmp_path):
    config = private(scenario, CLIENT, EXAMPLE)
    budget, protection, ledger = budget_of(config, tmp_path)
    release = protection.client.release(1, 1.0)
    budget.charge(1, (0, 1), release)
    budget.charge(1, (0, 1), release)
    assert [(charge.unit, charge.attempt) for charge in ledger.charges()] == [("example", 0), ("client", 0)]
    with pytest.raises(Refused, match="charged with other clients"):
        budget.charge(1, (0, 2), release)
    fresh = Budget(protection, ledger, "a", fresh_noise=True)
    fresh.charge(1, (0, 2), release)
    assert [charge.attempt for charge in ledger.charges()] == [0, 0, 1, 1]


def test_runs_that_share_a_ledger_share_the_budget(scenario, tmp_path):
    config = private(scenario, CLIENT | {"budget": 7.0})
    first, protection, _ = budget_of(config, tmp_path, "a")
    second, _, _ = budget_of(config, tmp_path, "b")
    release = protection.client.release(1, 1.0)
    first.charge(1, (0, 1, 2), release)
    second.charge(1, (0, 1, 2), release)
    first.charge(2, (0, 1, 2), release)
    with pytest.raises(BudgetSpent, match="would overspend the privacy budget of unit client"):
        second.charge(2, (0, 1, 2), release)
    event = protection.client.event(release)
    assert epsilon({event: 3}, 1e-3) <= 7.0 < epsilon({event: 4}, 1e-3)


def test_a_round_that_one_unit_cannot_pay_is_charged_to_neither(scenario, tmp_path):
    budget, protection, ledger = budget_of(private(scenario, EXAMPLE, CLIENT | {"budget": 0.1}), tmp_path)
    with pytest.raises(BudgetSpent, match="unit client"):
        budget.charge(1, (0, 1), protection.client.release(1, 1.0))
    assert not list(ledger.charges())


def test_a_committed_round_without_a_charge_is_noticed(scenario, tmp_path):
    budget, protection, _ = budget_of(private(scenario, CLIENT), tmp_path)
    budget.charge(1, (0,), protection.client.release(1, 1.0))
    budget.check_paid(1)
    with pytest.raises(Refused, match="no charge of unit client for round 2"):
        budget.check_paid(2)


def test_clients_rest_after_their_last_participation_and_between_two(scenario, tmp_path):
    config = private(scenario, CLIENT | {"max_participations": 2, "min_separation": 3})
    budget, protection, _ = budget_of(config, tmp_path)
    release = protection.client.release(1, 1.0)
    for number, cohort in ((1, (0, 1)), (2, (2, 3)), (3, (4, 5)), (4, (0, 2))):
        budget.charge(number, cohort, release)
    assert budget.resting(5) == {4, 5, 0, 2}  # two rounds back, and who took part twice
    assert budget.resting(4) == {2, 3, 4, 5}, "a round that is repeated after a crash draws as it did"
    budget.charge(5, (1,), release)
    assert budget.resting(6) == {0, 2, 1}


def test_a_strategy_must_leave_alone_what_the_guarantee_rests_on(scenario):
    assembly = assemble(private(scenario, CLIENT, EXAMPLE))
    protection, layout = assembly.protection, assembly.layout
    assume_identity()
    release = protection.client.release(3, 1.0)
    task = RoundTask(3, LocalPlan(1, 8, 0.1, dp=protection.example.plan), 10.0, release=release)
    assert RoundTask.from_table(ConfigRecord(task.to_table())) == task
    assert task.to_table()["example-batches"] == protection.example.event.batches > 1

    def messages(clients=(0, 1, 2), **changed):
        table = task.to_table() | {key.replace("_", "-"): value for key, value in changed.items()}
        arrays = to_record(layout, np.zeros(layout.size, np.float32))
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(table)})
        return [Message(content, client, MessageType.TRAIN) for client in clients]

    protection.check_messages(messages(), task, (0, 1, 2))
    protection.check_messages(messages(lr=9.0, proximal_mu=0.5), task, (0, 1, 2))
    guarded = {
        "epochs": 2, "batch_size": 4, "example_clipping_norm": 2.0, "example_noise_multiplier": 0.1, "example_batches": 1,
        "server_round": 2,
        "release_clipping_norm": 5.0, "release_noise_multiplier": 0.1, "release_cohort": 100, "release_weight_cap": 3,
    }  # fmt: skip
    for key, value in guarded.items():
        with pytest.raises(Refused, match="the strategy changed"):
            protection.check_messages(messages(**{key: value}), task, (0, 1, 2))
    with pytest.raises(Refused, match="addressed 2 of the 3 clients drawn"):
        protection.check_messages(messages(clients=(0, 1)), task, (0, 1, 2))


def test_a_client_gives_no_less_protection_than_its_own_scenario_has(scenario):
    protection = assemble(private(scenario, CLIENT | {"adaptive_quantile": 0.5, "adaptive_noise": 1.0}, EXAMPLE)).protection
    release, plan = protection.client.release(3, 0.7), LocalPlan(1, 16, 0.1, dp=protection.example.plan)
    task = RoundTask(3, plan, 10.0, release=release)
    protection.check_task(task, trains=True)
    weaker = dataclasses.replace(plan.dp, noise_multiplier=0.5)
    for other in (
        dataclasses.replace(task, plan=dataclasses.replace(plan, dp=None)),
        dataclasses.replace(task, plan=dataclasses.replace(plan, dp=weaker)),
        dataclasses.replace(task, plan=dataclasses.replace(plan, dp=dataclasses.replace(plan.dp, clipping_norm=2.0))),
        dataclasses.replace(task, plan=dataclasses.replace(plan, epochs=2)),
        dataclasses.replace(task, plan=dataclasses.replace(plan, batch_size=4)),
        dataclasses.replace(task, release=None),
        dataclasses.replace(task, release=dataclasses.replace(release, noise_multiplier=0.5)),
        dataclasses.replace(task, release=dataclasses.replace(release, cohort=60)),
    ):
        with pytest.raises(Refused, match="the coordinator asks for another"):
            protection.check_task(RoundTask.from_table(ConfigRecord(other.to_table())), trains=True)
    more = dataclasses.replace(task, plan=dataclasses.replace(plan, dp=dataclasses.replace(plan.dp, batches=50)))
    protection.check_task(more, trains=True)  # others' data are stand-ins on a node: its own are counted when it trains
    with pytest.raises(Refused, match="tells no accuracy"):
        protection.check_task(task, trains=False)
    assemble(scenario()).protection.check_task(dataclasses.replace(task, release=None), trains=False)


def test_runs_that_protect_other_units_do_not_share_a_ledger(scenario, tmp_path):
    budget, protection, _ = budget_of(private(scenario, CLIENT), tmp_path, "a")
    budget.charge(1, (0, 1), protection.client.release(1, 1.0))
    for units in ([EXAMPLE], [CLIENT, EXAMPLE]):
        with pytest.raises(Refused, match="neither number would count the other's releases"):
            budget_of(private(scenario, *units), tmp_path, "b")
    budget_of(private(scenario, CLIENT), tmp_path, "b")


def test_a_repeated_round_draws_from_what_stood_before_its_charge(scenario, tmp_path):
    config = private(scenario, CLIENT | {"min_separation": 2})
    first, protection, ledger = budget_of(config, tmp_path, "a")
    second, _, _ = budget_of(config, tmp_path, "b")
    release = protection.client.release(1, 1.0)
    first.charge(1, (0, 1), release)
    first.charge(2, (2, 3), release)
    second.charge(1, (4, 5), release)
    assert first.resting(2) == {0, 1}, "what others did since does not change it"
    assert first.resting(3) == {4, 5}
    fresh = Budget(protection, ledger, "a", fresh_noise=True)
    assert fresh.resting(2) == {0, 1, 2, 3, 4, 5}, "of real clients those rest, too, that an attempt at this round asked already"
    assert fresh.resting(3) == {2, 3, 4, 5}
    assert fresh.resting(4) == {4, 5}


def test_an_empty_cohort_is_paid_though_no_example_was_in_it(scenario, tmp_path):
    config = private(scenario, CLIENT | {"sampling": "poisson"}, EXAMPLE, settings=["cohort.size=1"])
    budget, protection, _ = budget_of(config, tmp_path)
    budget.charge(1, (), protection.client.release(1, 1.0))
    budget.check_paid(1)
    told = [budget.spent(1.0, None)]
    budget.charge(2, (3,), protection.client.release(2, 1.0))
    told.append(budget.spent(1.0, None))
    one = epsilon({protection.example.event: 1}, 1e-4)
    assert [round(spent["example"]["epsilon"], 6) for spent in told] == [round(one, 6), round(epsilon(
        {protection.example.event: 2}, 1e-4), 6)], "published numbers do not tell the coins"  # fmt: skip
    assert all(spent["client"]["epsilon_coordinator"] > 2 for spent in told)


def test_a_strategy_cannot_ask_clients_past_the_charges(scenario):
    grid = Roster(SimpleNamespace(get_node_ids=lambda: (1, 2)))
    assert list(grid.get_node_ids()) == [1, 2]
    for call in (grid.send_and_receive, grid.push_messages, grid.pull_messages):
        with pytest.raises(Refused):
            call([])


def test_statistics_of_clients_examples_are_not_used(scenario):
    """Normalisation and the record of the data's origin come from the coordinator's own examples."""
    public, exact = assemble(private(scenario, EXAMPLE)), assemble(scenario())
    assert public.data.dataset.mean != exact.data.dataset.mean
    test = public.data.dataset.test.x
    assert abs(float(test.mean())) < 1e-5
    assert abs(float(test.std()) - 1) < 1e-5
    raw = [a.data.dataset.train.x * a.data.dataset.std + a.data.dataset.mean for a in (public, exact)]
    np.testing.assert_allclose(*raw, atol=1e-5)
    np.testing.assert_allclose(public.origin()["data"], test.reshape(len(test), -1)[:, ::8].mean(0), atol=1e-5)


def test_coins_fall_with_their_bias_and_repeat_with_their_key():
    tosses = [toss_coins(bytes([number] * 32), 10_000, 0.02) for number in range(50)]
    assert tosses[3] == toss_coins(bytes([3] * 32), 10_000, 0.02)
    assert len(set(tosses)) == 50
    mean = np.mean([len(cohort) for cohort in tosses])
    assert abs(mean - 200) < 5 * math.sqrt(10_000 * 0.02 * 0.98 / 50)
    assert abs(np.var([len(cohort) for cohort in tosses]) - 196) < 120  # binomial, not a fixed size
    resting = tosses[3][:5]
    assert toss_coins(bytes([3] * 32), 10_000, 0.02, resting) == tosses[3][5:], "a rest moves nobody else's coin"
    assert toss_coins(bytes(32), 5, 1.0) == (0, 1, 2, 3, 4)


def test_a_cohort_is_drawn_from_those_who_do_not_rest():
    drawn = draw_cohort(0, 1, 20, 5, TRAIN, resting=range(12))
    assert len(drawn) == 5
    assert min(drawn) >= 12
    assert draw_cohort(0, 1, 20, 10, TRAIN, resting=range(12)) == tuple(range(12, 20))
    assert draw_cohort(0, 1, 20, 5, TRAIN) == draw_cohort(0, 1, 20, 5, TRAIN, resting=())
