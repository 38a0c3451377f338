"""Buffered asynchronous rounds of simulated clients, beside a plain loop that is FedBuff's algorithm 1 as it is written."""

import heapq
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.flights import draw_order
from fedcore.coordinator.run import SimulatedRun
from fedcore.data.fleet import draw_fleet
from fedcore.errors import Refused, RoundFailed
from fedcore.privacy.ledger import Ledger
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.state.stores import open_ledger
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

FLOAT = ("quantization.enabled=false", "training.max_update_norm=1e3", "evaluation.every=0")
SLOW_TAIL = ("fleet.median_seconds=60", "fleet.spread=0.7", "fleet.jitter=0.2", "fleet.slow_share=0.2", "fleet.slow_factor=6")
BUFFERED = ("data.clients=10", "asynchronous.buffer=3", "asynchronous.concurrency=6", "run.rounds=8", *SLOW_TAIL)
EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1.5", "privacy.delta=1e-5")


@pytest.fixture
def simulate(scenario, tmp_path):
    """The rounds of a run, its last progress, and its directory."""
    count = itertools.count()

    def run(*settings, folder=None, resume=False):
        folder = folder or tmp_path / f"run-{next(count)}"
        with SimulatedRun(scenario(*settings), folder, resume=resume) as one:
            list(one.rounds())
            result = one.finish()
            return one._history, one.coordinator.progress, folder, result

    return run


def untimed(rounds):
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in rounds]


def first_model(assembly):
    model = {name: p.detach().numpy() for name, p in assembly.model.named_parameters() if p.requires_grad}
    return assembly.layout.join(model)


def algorithm_1(config):
    """The server of FedBuff: clients train when they are asked, updates are added one by one. The model, and what arrived."""
    assembly, one, seed = assemble(config), config.asynchronous, config.run.seed
    population, clients, w = len(assembly.data.clients), build_clients(assembly), first_model(assembly)
    fleet = draw_fleet(config.fleet, population, seed)
    now, queue, busy, arrived = 0.0, [], set(), []
    training = config.training
    plan = LocalPlan(training.epochs, training.batch_size, training.lr)
    for version in range(config.run.rounds):
        received = assembly.layout.join(decode_model(encode_model(assembly.layout.wire_tensors(w))).tensors)
        order, given = draw_order(seed, version, population), set()

        total, examples, k, asked = np.zeros(w.size), 0, 0, False
        while k < one.buffer:
            idle = not asked or not queue or queue[0][0] > now
            for client in order if idle else ():
                if len(busy) < one.concurrency and client not in busy | given:
                    task = RoundTask(version + 1, plan, training.max_update_norm)
                    (reply,) = clients.train(torch.from_numpy(received), [client], task)
                    busy.add(client)
                    given.add(client)
                    heapq.heappush(queue, (now + fleet.seconds(version + 1, client), version, client, reply))
            asked = True
            now, began, client, reply = heapq.heappop(queue)
            busy.remove(client)
            age = version - began
            arrived.append((version, began, client, age <= one.max_staleness, reply.update is not None))
            if age <= one.max_staleness and reply.update is not None:
                total += reply.examples * reply.update.numpy() / np.sqrt(1 + age)
                examples, k = examples + reply.examples, k + 1
        w = (w + total / examples).astype(np.float32)
    return w, now, arrived


@pytest.mark.parametrize("limit", [20, 1])
def test_a_run_is_algorithm_1_with_staleness_discards_and_clients_that_vanish(simulate, scenario, limit):
    settings = (*FLOAT, *BUFFERED, f"asynchronous.max_staleness={limit}", "cohort.dropout=0.15")
    rounds, progress, *_ = simulate(*settings)
    w, now, arrived = algorithm_1(scenario(*settings))
    np.testing.assert_allclose(progress.master, w, rtol=0, atol=1e-6)
    assert progress.virtual_seconds == rounds[-1]["virtual_seconds"] == pytest.approx(now)
    assert len({client for _, _, client, _, _ in arrived}) > 5
    for version, entry in enumerate(rounds):
        mine = [one for one in arrived if one[0] == version]
        ages = [version - began for _, began, _, fresh, usable in mine if fresh and usable]
        assert (entry["staleness_mean"], entry["staleness_max"]) == (pytest.approx(np.mean(ages)), max(ages))
        assert entry["discarded"] == sum(not fresh for *_, fresh, _ in mine)
        assert (entry["replies"], len(entry["dropped"])) == (3, sum(fresh and not usable for *_, fresh, usable in mine))
    assert max(entry["staleness_max"] for entry in rounds) == (1 if limit == 1 else max(v - b for v, b, *_ in arrived))
    assert (sum(entry["discarded"] for entry in rounds) > 0) == (limit == 1)
    assert sum(len(entry["dropped"]) for entry in rounds) > 0


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_when_nobody_is_stale_it_is_the_synchronous_run(simulate, strategy):
    sharp = (*FLOAT, f"strategy.name={strategy}", "fleet.median_seconds=60", "fleet.spread=0", "fleet.jitter=0", "run.rounds=4")
    buffered, found, *_ = simulate(*sharp, "asynchronous.buffer=6", "asynchronous.concurrency=6")
    synchronous, expected, *_ = simulate(*sharp)
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=2e-5 if strategy == "fedadam" else 1e-6)
    assert np.abs(expected.master).max() > 0.1
    for one, other in zip(buffered, synchronous, strict=True):
        assert one["virtual_seconds"] == other["virtual_seconds"] == 60 * one["round"]
        assert (one["staleness_max"], one["discarded"], one["replies"]) == (0, 0, other["replies"])
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_nothing_depends_on_the_number_of_workers(simulate):
    settings = (*BUFFERED, "wire.update=int8", "evaluation.federated_every=4")
    one, two = (simulate(*settings, f"engine.workers={workers}") for workers in (1, 2))
    assert untimed(one[0]) == untimed(two[0])
    np.testing.assert_array_equal(one[1].master, two[1].master)
    assert one[0][3]["federated"]["accuracy"] > 0
    assert one[1].pending.facts == two[1].pending.facts


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_a_run_that_is_continued_anywhere_ends_with_the_same_bits(simulate, tmp_path, strategy):
    settings = (*BUFFERED, f"strategy.name={strategy}", "asynchronous.max_staleness=2", "training.lr_decay=0.9")
    whole, expected, folder, _ = simulate(*settings)
    for rounds in (2, 3, 6, 8):  # activations are calibrated before the second, and older versions train without them
        _, found, torn, _ = simulate(*settings, f"run.rounds={rounds}", folder=tmp_path / "torn", resume=rounds > 2)
    np.testing.assert_array_equal(found.master, expected.master)
    recorded = [json.loads(line) for line in (torn / "metrics.jsonl").read_text().splitlines()]
    central = {"accuracy", "loss", "fake_quant_accuracy", "fake_quant_loss"}
    assert [one["virtual_seconds"] for one in recorded] == [one["virtual_seconds"] for one in whole]
    assert [{k: v for k, v in one.items() if k not in central} for one in untimed(recorded)] == [
        {k: v for k, v in one.items() if k not in central} for one in untimed(whole)
    ]
    assert found.pending.facts == expected.pending.facts
    assert len(found.pending.arrays) <= 3, "only models of which an update can still count are kept"
    assert folder != torn


def test_a_version_that_everybody_has_had_without_enough_use_ends_the_run(simulate):
    with pytest.raises(RoundFailed, match="every client was given version"):
        simulate(*FLOAT, *BUFFERED, "training.max_update_norm=1e-9")


def test_each_participation_is_charged_with_the_version_it_began_with(simulate, tmp_path):
    settings = (*FLOAT, *BUFFERED, *EXAMPLE)
    rounds, progress, folder, result = simulate(*settings)
    charges = list(Ledger(open_ledger(folder)).charges())
    assert [(one.unit, one.round, one.attempt) for one in charges] == [("example", n, 0) for n in range(1, 9)]
    assert all(len(set(one.clients)) == len(one.clients) for one in charges)
    begun = Counter(client for one in charges for client in one.clients)
    counted = sum(entry["replies"] + entry["discarded"] + len(entry["dropped"]) for entry in rounds)
    assert sum(begun.values()) == counted + len(progress.pending.facts["going"]), "also what never arrived"
    assert result["privacy"]["example"]["participations"] == max(begun.values())
    assert rounds[-1]["privacy"]["example"]["epsilon"] > rounds[0]["privacy"]["example"]["epsilon"] > 0
    assert all(entry["train_loss"] is None for entry in rounds), "an exact loss does not leave a client"
    torn = tmp_path / "torn"
    simulate(*settings, "run.rounds=3", folder=torn)
    _, found, *_ = simulate(*settings, folder=torn, resume=True)
    np.testing.assert_array_equal(found.master, progress.master)
    again = list(Ledger(open_ledger(torn)).charges())
    assert [(one.round, one.clients) for one in again] == [(one.round, one.clients) for one in charges]


def test_a_spent_budget_ends_the_run_at_the_step_that_it_would_not_pay_for(simulate):
    rounds, *_ = simulate(*FLOAT, *BUFFERED, *EXAMPLE)
    limit = 1.01 * rounds[3]["privacy"]["example"]["epsilon"]
    some, progress, folder, result = simulate(*FLOAT, *BUFFERED, *EXAMPLE, f"privacy.budget={limit}")
    assert 1 <= progress.round_number < 8
    assert "budget" in result["ended"]
    assert untimed(some)[0]["update_norm"] == untimed(rounds)[0]["update_norm"]
    assert len(list(Ledger(open_ledger(folder)).charges())) == progress.round_number


def test_synchronous_rounds_over_the_fleet_end_with_the_fastest_and_their_clock_goes_on_after_a_stop(simulate, scenario, tmp_path):
    settings = (*FLOAT, *SLOW_TAIL, "data.clients=20", "cohort.size=5", "fleet.over_selection=1.3", "run.rounds=5")
    rounds, progress, _, result = simulate(*settings)
    fleet = draw_fleet(scenario(*settings).fleet, 20, 0)
    assert [(one["cohort"], one["replies"], one["discarded"]) for one in rounds] == [(5, 5, 2)] * 5
    took = np.diff([0, *(one["virtual_seconds"] for one in rounds)])
    slowest = [max(fleet.seconds(n, client) for client in range(20)) for n in range(1, 6)]
    assert all(0 < one < other for one, other in zip(took, slowest, strict=True))
    assert (result["virtual_seconds"], result["discarded"]) == (progress.virtual_seconds, 10)
    simulate(*settings, "run.rounds=2", folder=tmp_path / "torn")
    again, *_ = simulate(*settings, folder=tmp_path / "torn", resume=True)
    assert again[-1]["virtual_seconds"] == rounds[-1]["virtual_seconds"]
    plain, other, *_ = simulate(*(one for one in settings if "fleet" not in one))
    assert "virtual_seconds" not in plain[0]
    assert not np.array_equal(other.master, progress.master), "who is slow does not count"


def test_a_synchronous_round_of_everybody_takes_as_long_as_the_slowest(simulate, scenario):
    rounds, *_ = simulate(*FLOAT, *SLOW_TAIL, "run.rounds=1")
    fleet = draw_fleet(scenario(*SLOW_TAIL).fleet, 6, 0)
    assert rounds[0]["virtual_seconds"] == max(fleet.seconds(1, client) for client in range(6))
    assert "discarded" not in rounds[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["asynchronous.concurrency=4"], r"\[asynchronous\] has no meaning without asynchronous.buffer"),
        (["asynchronous.buffer=7"], "asynchronous.buffer = 7 is more than data.clients = 6"),
        (["asynchronous.buffer=2", "asynchronous.concurrency=9"], "asynchronous.concurrency = 9 is more"),
        (["asynchronous.buffer=2", "secagg.enabled=true"], r"cannot go with \[secagg\]"),
        (
            ["asynchronous.buffer=2", "privacy.unit=client", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3"],
            r'unit client.*unit = "example" can',
        ),
        (["asynchronous.buffer=2", "strategy.name=krum"], r"krum cannot use; it takes fedavg, .*accepts_mean = True"),
        (["asynchronous.buffer=2", "cohort.size=3"], "cohort.size and fleet.over_selection are of synchronous rounds"),
        (["asynchronous.buffer=2", "checkpoint.every=2"], "checkpoint.every must be 1"),
        (["asynchronous.buffer=2", "asynchronous.staleness_exponent=-1"], "staleness_exponent must be a number >= 0"),
        (["fleet.over_selection=1.5"], "needs fleet.median_seconds > 0 and a cohort.size"),
        (
            ["fleet.over_selection=1.5", "fleet.median_seconds=9", "cohort.size=2", *EXAMPLE],
            r"cannot be simulated with \[privacy\]",
        ),
    ],
)
def test_what_asynchronous_rounds_cannot_go_with_is_refused_in_a_line(scenario, settings, words):
    with pytest.raises(Refused, match=words) as refusal:
        scenario(*settings)
    assert "\n" not in str(refusal.value)


def test_a_simulation_without_a_virtual_clock_and_a_strategy_that_looks_at_replies_are_refused(scenario, tmp_path):
    with pytest.raises(Refused, match=r"fleet\.median_seconds must be > 0"):
        SimulatedRun(scenario("asynchronous.buffer=2"), tmp_path / "clockless", resume=False)
    (tmp_path / "closest_model.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Closest(FedAvg): pass\nclass Mean(FedAvg): accepts_mean = True\n"
    )
    settings = (*FLOAT, "asynchronous.buffer=2", "fleet.median_seconds=5", "run.rounds=1")
    with pytest.raises(Refused, match="does not say that it accepts"):
        SimulatedRun(scenario(*settings, "strategy.name=closest_model:Closest"), tmp_path / "refused", resume=False)
    with SimulatedRun(scenario(*settings, "strategy.name=closest_model:Mean"), tmp_path / "taken", resume=False) as run:
        assert len(list(run.rounds())) == 1
    assert not (tmp_path / "refused").exists()
    assert not (tmp_path / "clockless").exists()
