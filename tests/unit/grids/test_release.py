"""Releases through the simulated grid: what the strategy is given, and what it cannot tell."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.errors import ClientFailure, RoundFailed
from fedcore.flower import from_record, to_nobody, to_record
from fedcore.grids.cohort import CohortGrid
from fedcore.privacy.randomness import keystream
from fedcore.privacy.release import plan_release
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.training.client import Clients, RoundTask
from fedcore.training.plan import DpSgdPlan, LocalPlan

SHARES = (5, 1, bytes(32))


class Bench:
    """Six clients whose updates are summed by ``release``."""

    def __init__(self, config, workers=1, **numbers):
        assembly = assemble(config)
        self.layout, self.data = assembly.layout, assembly.data
        self.release = plan_release(self.layout.size, 1.0, 1.0, 6, **numbers)
        self.clients = build_clients(assembly)
        self.grid = CohortGrid(self.clients, self.layout, mean=True, workers=workers, released=self.release.size)
        named = {name: p.detach().numpy() for name, p in assembly.model.named_parameters()}
        self.master = self.layout.join(named)

    def run(self, clients=range(6), lr=0.1, release=None, **task):
        """The strategy's one reply: mean update [d] and its content."""
        planned = RoundTask(**({"round_number": 1, "plan": LocalPlan(1, 8, lr), "max_update_norm": 100.0} | task))
        planned = dataclasses.replace(planned, release=release or self.release)
        arrays, table = to_record(self.layout, self.master), ConfigRecord(planned.to_table())
        self.grid.nodes = list(clients)
        content = RecordDict({"arrays": arrays, "config": table})
        messages = [Message(content, client, MessageType.TRAIN) for client in clients] or [to_nobody(arrays, table)]
        (reply,) = self.grid.send_and_receive(messages)
        (local,) = reply.content.array_records.values()
        return from_record(self.layout, local) - self.master, reply.content

    def received(self):
        """What clients start from."""
        blob = encode_model(self.layout.wire_tensors(self.master))
        return torch.from_numpy(self.layout.join(decode_model(blob).tensors))

    def quiet(self):
        """A release whose noise is too small to be seen; only tests can make one."""
        if not self.release.shares:
            return dataclasses.replace(self.release, noise_multiplier=1e-9)
        return self.release

    def clipped_mean(self, release, lr=0.1):
        """What the release should be without noise, computed client by client."""
        task = RoundTask(1, LocalPlan(1, 8, lr), 100.0)
        total = np.zeros(self.layout.size)
        for reply in self.clients.train(self.received(), range(6), task):
            update = reply.update.numpy().astype(np.float64)
            weight = min(reply.examples, release.weight_cap) / release.weight_cap if release.weight_cap else 1
            update *= weight
            total += update * min(1, release.joint.clipping_norm / np.linalg.norm(update))
        return total / release.cohort


@pytest.mark.parametrize("weight_cap", [0, 250])
def test_the_reply_is_the_mean_of_clipped_updates_over_the_planned_cohort(scenario, weight_cap):
    bench = Bench(scenario(), weight_cap=weight_cap)
    mean, content = bench.run(release=bench.quiet())
    np.testing.assert_allclose(mean, bench.clipped_mean(bench.release), atol=1e-6)
    assert dict(content["metrics"]) == {"num-examples": 6}, "neither counts nor losses"
    assert np.linalg.norm(mean) <= 1.0 + 1e-6


def test_shares_give_the_mean_too_but_for_their_noise(scenario):
    """The noise has the variance it should, around the mean that it should have."""
    bench = Bench(scenario(), shares=(6, 0, bytes(32)))
    errors = []
    for number in range(1, 9):
        mean, content = bench.run(round_number=number, lr=1e-12)  # all updates are next to zero
        errors.append(mean)
        assert facts_of_reply(content)["survivors"] == 6
    measured = np.var(np.concatenate(errors)) * 36
    expected = bench.release.shares.mu * bench.release.shares.granularity**2
    assert abs(measured / expected - 1) < 0.05


def facts_of_reply(content):
    return json.loads(content["fedcore-facts"]["json"])


def test_an_empty_cohort_and_a_full_one_cannot_be_told_apart_but_by_the_sum(scenario):
    bench = Bench(scenario())
    noise, nobody = bench.run(clients=[])
    _, everybody = bench.run()
    assert noise.std() == pytest.approx(1.0 / 6, rel=0.1)
    assert dict(nobody["metrics"]) == dict(everybody["metrics"])
    assert {**facts_of_reply(nobody)} == {**facts_of_reply(everybody)}
    assert facts_of_reply(everybody)["clients"] == []
    assert bench.grid.observed.clients == (0, 1, 2, 3, 4, 5), "only the operator learns who took part"


def test_noise_is_drawn_anew_every_round_and_repeats_with_the_round(scenario):
    bench = Bench(scenario())
    first, again, other = (bench.run(clients=[], round_number=number)[0] for number in (1, 1, 2))
    assert (first == again).all()
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


@pytest.mark.parametrize("shares", [None, (6, 0, bytes(32))])
def test_bits_do_not_depend_on_the_number_of_workers(scenario, shares):
    found = []
    for workers in (1, 2):
        bench = Bench(scenario(), workers=workers, shares=shares, bit_noise=2.0, loss_cap=5.0)
        found.append(bench.run()[0])
        bench.grid.close()
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("shares", [None, (6, 0, bytes(32))])
def test_loss_and_clipping_ride_in_the_vector(scenario, shares):
    bench = Bench(scenario(), shares=shares, bit_noise=2.0, loss_cap=5.0)
    losses, shares_unclipped = [], []
    for number in range(1, 31):
        _, content = bench.run(round_number=number, lr=1e-12)
        losses.append(content["metrics"]["train_loss"])
        shares_unclipped.append(facts_of_reply(content)["unclipped"])
    task = RoundTask(1, LocalPlan(1, 8, 1e-12), 100.0)
    true_loss = np.mean([reply.loss for reply in bench.clients.train(bench.received(), range(6), task)])
    spread = 1.0 * bench.release.joint.norm_bound / bench.release.joint.loss_scale / 6 * 2.5
    assert abs(np.mean(losses) - true_loss) < 5 * spread / np.sqrt(30)
    assert abs(np.mean(shares_unclipped) - 1.0) < 5 * (2.0 / 6) / np.sqrt(30), "updates next to zero need no clipping"


class Poisoned(Clients):
    """Clients of which one cannot be trained."""

    def _examples(self, client, task):
        if client == 3:
            raise ValueError(f"secret of client {client}")
        return super()._examples(client, task)


def poisoned(bench):
    bench.clients.__class__ = Poisoned
    return bench


@pytest.mark.parametrize("shares", [None, (6, 0, bytes(32))])
def test_a_client_that_cannot_be_trained_contributes_nothing_and_is_not_told_apart(scenario, shares):
    numbers = {"shares": shares} if shares else {}
    healthy, ill = Bench(scenario(), **numbers), poisoned(Bench(scenario(), **numbers))
    whole, told = healthy.run(release=healthy.quiet())
    partial, content = ill.run(release=ill.quiet())
    assert {**facts_of_reply(content)} == {**facts_of_reply(told)}, "nor is it missing among the survivors"
    assert np.linalg.norm(whole - partial) <= (1.0 / 6) * 1.001, "nobody else loses its part"
    assert [client for client, _ in ill.grid.observed.dropped] == [3]


def test_one_client_of_a_chunk_that_fails_costs_the_others_nothing(scenario):
    bench = poisoned(Bench(scenario()))
    bench.clients.trainer.chunk = 6
    bench.run()
    assert bench.grid.observed.dropped == ((3, "training failed: ValueError: secret of client 3"),)
    task = RoundTask(1, LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0)), 100.0)
    replies = list(bench.clients.train(bench.received(), range(6), task))
    assert [reply.reason for reply in replies] == ["", "", "", "training failed", "", ""], "an exception may quote an example"


def test_too_few_survivors_fail_the_round(scenario):
    bench = Bench(scenario(), shares=SHARES)
    bench.run(clients=range(5))
    with pytest.raises(RoundFailed, match="a sum of 4 survivors is not decoded: the noise is sized for 5"):
        bench.run(clients=range(4))


@pytest.mark.parametrize("shares", [None, SHARES])
def test_what_a_hostile_client_sends_moves_the_sum_by_no_more_than_the_norm(shares):
    release = plan_release(20, 1.0, 1.0, 6, shares=shares)
    for wrong in (np.zeros(3, np.float32), np.zeros(release.size, np.int64), np.zeros((release.size, 1), np.float32)):
        with pytest.raises(ClientFailure):
            release.accept(wrong)
    if shares:
        assert release.accept(np.full(release.size, 2**32 - 1, np.uint32)).max() < 2**release.shares.bits
    else:
        assert np.linalg.norm(release.accept(np.full(20, 1e30, np.float32))) <= 1.0 + 1e-9
        with pytest.raises(ClientFailure, match="not finite"):
            release.accept(np.full(20, np.nan, np.float32))


def test_a_release_survives_its_message():
    for numbers in ({}, {"shares": SHARES}, {"bit_noise": 2.0, "loss_cap": 3.0, "weight_cap": 7, "shares": SHARES}):
        release = plan_release(20, 1.0, 1.0, 6, **numbers)
        assert type(release).from_table(ConfigRecord(release.to_table())) == release


def test_contributions_are_the_client_s_own_randomness():
    release = plan_release(20, 1.0, 1.0, 6, shares=SHARES)
    update = np.zeros(20, np.float32)
    sent = [release.contribution(update, 5, 1.0, keystream(bytes([number] * 32))) for number in (1, 1, 2)]
    assert (sent[0] == sent[1]).all()
    assert (sent[0] != sent[2]).any()
