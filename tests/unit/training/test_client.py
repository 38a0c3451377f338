"""A client never trains with fewer batches an epoch than its round is charged for."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from small_zoo import why_no_compiler

from fedcore.config import PrivacyConfig
from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.errors import Refused
from fedcore.privacy.randomness import RootKey
from fedcore.privacy.release import plan_release
from fedcore.training.client import Clients, RoundTask
from fedcore.training.dpsgd import GaussianNoise, SimulatedNoise, noise_of
from fedcore.training.engine import Engine, make_trainer
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, client_rng, poisson_schedule


class Bench:
    """Six clients of different sizes, and a round charged for ``batches`` batches of 8."""

    def __init__(self, config, batches):
        self.assembly = assemble(config)
        self.clients = build_clients(self.assembly)
        self.sizes = [len(part) for part in self.assembly.data.clients]
        self.own = [math.ceil(size / 8) for size in self.sizes]
        self.task = RoundTask(1, LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0, batches)), 1e9)
        self.start = torch.zeros(self.assembly.layout.size)
        self.trained = []
        train = self.clients.trainer.train

        def spied(start, data, plan):
            self.trained += [one.client for one in data]
            return train(start, data, plan)

        self.clients.trainer.train = spied

    def replies(self, **changed):
        return {
            reply.client: reply for reply in self.clients.train(self.start, range(6), dataclasses.replace(self.task, **changed))
        }


@pytest.fixture
def bench(scenario):
    def make(*settings):
        sizes = sorted(Bench(scenario(*settings), 1).own)
        assert sizes[0] < sizes[3], "clients of different sizes"
        return Bench(scenario(*settings), sizes[3])

    return make


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_client_with_fewer_batches_than_are_charged_refuses(bench, engine):
    bench = bench(f"engine.name={engine}", "quantization.enabled=false")
    charged = bench.task.plan.dp.batches
    enough = {client for client, own in enumerate(bench.own) if own >= charged}
    found = bench.replies()
    assert set(bench.trained) == {client for client, reply in found.items() if not reply.reason} == enough
    for client in set(range(6)) - enough:
        assert found[client].update is None
        assert found[client].reason == (
            f"{bench.sizes[client]} examples are {bench.own[client]} batches an epoch, and the round is charged for clients with "
            f"{charged} or more"
        ), "numbers of examples are public, so the operator is told"


def test_where_only_the_sum_is_seen_it_adds_zeros(bench):
    bench = bench("quantization.enabled=false", "engine.name=loop")
    release = plan_release(len(bench.start), 1.0, 1.0, 6)
    found = bench.replies(release=release)
    refusing = [client for client, own in enumerate(bench.own) if own < bench.task.plan.dp.batches]
    assert refusing
    for client, reply in found.items():
        assert (np.abs(reply.contribution).max() == 0) == (client in refusing), "who drops out must not tell how much data it has"
    assert not set(bench.trained) & set(refusing)


NATIVE = ("engine.name=native", "quantization.enabled=false", "wire.update=float32")


@pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")
def test_a_private_cohort_gives_what_its_clients_give_one_by_one(bench):
    bench = bench(*NATIVE)
    clients, task = bench.clients, bench.task
    clients.dropout = 0.4
    clients.data.dataset.train.y[clients.data.clients[np.argmax(bench.sizes)]] = 10  # no class
    start = torch.cat([p.detach().reshape(-1) for p in bench.assembly.model.parameters()])
    singles = list(clients.train(start, range(6), task))
    board = clients.board(6, 1)
    assert clients.adds_up(task)
    clients.add_up(start, range(6), task, board)
    together = clients.added(range(6), task, board)
    good = [reply for reply in singles if not reply.reason]
    bad = [dataclasses.replace(reply, update=None) for reply in singles if reply.reason]
    assert repr(sorted(together.others, key=lambda reply: reply.client)) == repr(sorted(bad, key=lambda reply: reply.client))
    assert together.clients == tuple(reply.client for reply in good)
    assert list(zip(together.examples, together.losses, strict=True)) == [(reply.examples, reply.loss) for reply in good]
    assert together.bytes_up == sum(reply.bytes_up for reply in good)
    assert len({reply.reason for reply in singles}) > 3, "one that vanishes, one that refuses, one that fails, good ones"
    expected = sum(reply.examples * reply.update.double() for reply in singles if reply.update is not None)
    np.testing.assert_allclose(board.total, expected.numpy(), rtol=0, atol=1e-12)


@pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")
def test_what_is_to_protect_somebody_is_never_simulated(bench):
    """Only where a seed in the run's files gives the noise away may it come from a quick generator, in whole rounds."""
    bench, kept = bench(*NATIVE), []
    draw = bench.clients.trainer.train
    bench.clients.trainer.train = lambda start, data, plan: kept.append(data[0]) or draw(start, data, plan)
    kinds = {"seeded": {}, "keyed": {"root": RootKey.of_key(b"k" * 32, "run")}, "real": {"real": True}}
    for kind, changed in kinds.items():
        for name, value in changed.items():
            setattr(bench.clients, name, value)
        bench.replies()
        assert isinstance(noise_of(kept[-1]), SimulatedNoise if kind == "seeded" else GaussianNoise)
        assert bench.clients.adds_up(bench.task) == (kind == "seeded")


def test_simulated_clients_draw_alike_only_in_the_same_round_and_for_the_same_purpose(bench):
    bench = bench("quantization.enabled=false", "engine.name=loop")
    numbers = []
    for number in (1, 2):
        for client in (0, 1):
            data = bench.clients._examples(client, dataclasses.replace(bench.task, round_number=number))
            numbers += [data.rng.random(), data.noise_rng.random()]
    built, root = bench.assembly, RootKey.of_seed(0, "run")
    other = Clients(built.model, built.data, built.engine, seed=0, encoding="float32", root=root)
    data = other._examples(0, bench.task)
    assert len({*numbers, data.rng.random(), data.noise_rng.random()}) == 10


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_no_engine_takes_the_steps_if_asked_past_the_client(scenario, engine):
    assembly = assemble(scenario("quantization.enabled=false", f"engine.name={engine}"))
    trainer = make_trainer(Engine(engine, "cpu", ""), assembly.model)
    x, y = torch.rand(17, 1, 8, 8), torch.zeros(17, dtype=torch.int64)
    data = ClientData(0, x, y, client_rng(0, 1, 0, 1), client_rng(0, 1, 0, 2))
    start = torch.zeros(assembly.layout.size)
    (result,) = trainer.train(start, [data], LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0, 3)))
    assert torch.isfinite(result.update).all()
    with pytest.raises(Refused, match="17 examples are 3 batches an epoch, and the round is charged for clients with 4 or more"):
        list(trainer.train(start, [data], LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0, 4))))


def test_the_schedule_at_the_limit():
    plan = LocalPlan(2, 5, 0.1, dp=DpSgdPlan(1.0, 1.0, 3))
    assert poisson_schedule(11, plan) == (1 / 3, 6)
    assert poisson_schedule(0, plan) == (0.0, 0), "no data, no steps, nothing to charge"
    with pytest.raises(Refused, match="10 examples are 2 batches"):
        poisson_schedule(10, plan)
    with pytest.raises(Refused, match="batches must be an integer >= 1"):
        DpSgdPlan(1.0, 1.0, 0)


@pytest.mark.parametrize("missing", ["example-batches", "example-noise-multiplier"])
def test_a_private_task_without_one_of_its_numbers_is_no_task(missing):
    table = RoundTask(1, LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0, 3)), 1.0).to_table()
    assert RoundTask.from_table(ConfigRecord(table)).plan.dp.batches == 3
    del table[missing]
    with pytest.raises(Refused, match=f"key '{missing}' is missing"):
        RoundTask.from_table(ConfigRecord(table))
    with pytest.raises(Refused, match="example-batches must be an integer >= 1"):
        RoundTask.from_table(table | {missing: 1.0, "example-batches": 0})


def test_the_coordinator_asks_for_what_it_charges(scenario):
    config = dataclasses.replace(
        scenario("training.batch_size=4"), privacy=(PrivacyConfig("example", noise_multiplier=1.0, delta=1e-4),)
    )
    unit = assemble(config).protection.example
    assert unit.plan.batches == unit.event.batches == math.ceil(min(map(len, assemble(config).data.clients)) / 4)
