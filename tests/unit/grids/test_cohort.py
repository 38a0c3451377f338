import gc
import weakref

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused, RoundFailed
from fedcore.flower import Facts, facts_of, from_record, to_record
from fedcore.grids.cohort import CohortGrid
from fedcore.quantization.wire import Update, decode_model, decode_update, encode_model, encode_update, update_length
from fedcore.training.client import RoundTask, why_unusable
from fedcore.training.plan import LocalPlan


class Bench:
    """A grid over a small federation, and one train message per client."""

    def __init__(self, config, *, mean=True, workers=1):
        self.assembly = assemble(config)
        self.layout = self.assembly.layout
        self.clients = build_clients(self.assembly)
        self.grid = CohortGrid(self.clients, self.layout, mean=mean, workers=workers)
        named = {name: p.detach().numpy() for name, p in self.assembly.model.named_parameters() if p.requires_grad}
        self.master = self.layout.join(named)

    def task(self, **plan) -> RoundTask:
        return RoundTask(1, LocalPlan(**({"epochs": 1, "batch_size": 8, "lr": 0.1} | plan)), 10.0)

    def messages(self, task=None, kind=MessageType.TRAIN, clients=None):
        config = ConfigRecord((task or self.task()).to_table())
        content = RecordDict({"arrays": to_record(self.layout, self.master), "config": config})
        chosen = self.grid.get_node_ids() if clients is None else clients
        return [Message(content, client, kind) for client in chosen]

    def models(self, replies):
        return [from_record(self.layout, reply.content["arrays"]) for reply in replies]


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_the_mean_reply_is_the_weighted_mean_of_the_single_replies(scenario, encoding):
    config = scenario(f"wire.update={encoding}")
    one, each = Bench(config), Bench(config, mean=False)
    (mean,) = one.grid.send_and_receive(one.messages())
    singles = each.grid.send_and_receive(each.messages())
    assert len(singles) == 6
    weights = [reply.content["metrics"]["num-examples"] for reply in singles]
    assert weights == [len(part) for part in one.assembly.data.clients]
    expected = np.average(np.array(each.models(singles), np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(one.models([mean])[0], expected, rtol=0, atol=1e-6)
    assert mean.content["metrics"]["num-examples"] == sum(weights)
    losses = [reply.content["metrics"]["train_loss"] for reply in singles]
    assert mean.content["metrics"]["train_loss"] == pytest.approx(np.average(losses, weights=weights))
    assert facts_of(mean) == Facts.merge(facts_of(reply) for reply in singles)


def test_a_reply_is_master_plus_local_minus_received(scenario):
    bench = Bench(scenario(), mean=False)
    blob = encode_model(bench.layout.wire_tensors(bench.master))
    received = bench.layout.join(decode_model(blob).tensors)
    assert np.abs(received - bench.master).max() > 1e-4  # the download is quantized
    (reply,) = bench.grid.send_and_receive(bench.messages(bench.task(lr=1e-30), clients=[2]))
    np.testing.assert_allclose(bench.models([reply])[0], bench.master, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mean", [True, False])
def test_bits_do_not_depend_on_the_number_of_workers(scenario, mean):
    found = []
    for workers in (1, 2, 3):
        bench = Bench(scenario("data.clients=40"), mean=mean, workers=workers)
        replies = bench.grid.send_and_receive(bench.messages())
        found.append(
            (np.array(bench.models(replies)), [dict(r.content["metrics"]) for r in replies], [facts_of(r) for r in replies])
        )
        bench.grid.close()
    for other in found[1:]:
        assert (other[0] == found[0][0]).all()
        assert other[1:] == found[0][1:]


def test_the_order_of_messages_does_not_matter(scenario):
    bench = Bench(scenario())
    (straight,) = bench.grid.send_and_receive(bench.messages())
    (reversed_,) = bench.grid.send_and_receive(bench.messages()[::-1])
    assert (bench.models([straight])[0] == bench.models([reversed_])[0]).all()


def test_bytes_are_lengths_of_what_a_device_would_exchange(scenario):
    for encoding in ("float32", "int8"):
        bench = Bench(scenario(f"wire.update={encoding}"))
        (reply,) = bench.grid.send_and_receive(bench.messages())
        facts = facts_of(reply)
        up = len(encode_update(Update(bench.master, 1, 0.0), encoding, np.random.default_rng(0)))
        assert up == update_length(bench.layout.size, encoding)
        assert facts.bytes_up == 6 * up
        assert facts.bytes_down == 6 * len(encode_model(bench.layout.wire_tensors(bench.master)))
        assert decode_update(encode_update(Update(bench.master, 7, 0.5), encoding, np.random.default_rng(0))).examples == 7


@pytest.mark.parametrize("mean", [True, False])
def test_a_bad_update_is_dropped_named_and_leaves_the_others_alone(scenario, mean):
    config = scenario()
    clean, spoiled = Bench(config, mean=mean), Bench(config, mean=mean)
    for bench in (clean, spoiled):
        bench.assembly.data.dataset.train.x.setflags(write=True)
    spoiled.assembly.data.dataset.train.x[spoiled.assembly.data.clients[3]] = np.inf
    others = [0, 1, 2, 4, 5]
    expected = clean.grid.send_and_receive(clean.messages(clients=others))
    found = spoiled.grid.send_and_receive(spoiled.messages())
    assert (np.array(spoiled.models(found)) == np.array(clean.models(expected))).all()
    facts = Facts.merge(facts_of(reply) for reply in found)
    assert facts.clients == tuple(others)
    assert facts.dropped == ((3, "update is not finite"),)
    assert facts.bytes_down == 6 * len(encode_model(spoiled.layout.wire_tensors(spoiled.master)))


def test_an_exploding_update_is_dropped(scenario):
    bench = Bench(scenario(), mean=False)
    task = bench.task()
    norms = [np.linalg.norm(model - bench.master) for model in bench.models(bench.grid.send_and_receive(bench.messages(task)))]
    limited = RoundTask(task.round_number, task.plan, float(np.median(norms)))
    replies = bench.grid.send_and_receive(bench.messages(limited))
    facts = Facts.merge(facts_of(reply) for reply in replies)
    assert [client for client, _ in facts.dropped] == [c for c, norm in enumerate(norms) if norm > np.median(norms)]
    assert "over the limit" in facts.dropped[0][1]


@pytest.mark.parametrize("mean", [True, False])
def test_all_failing_is_an_error_that_says_why(scenario, mean):
    bench = Bench(scenario(), mean=mean)
    with pytest.raises(RoundFailed, match="all 6 clients of the round failed; client 0: update exploded"):
        bench.grid.send_and_receive(bench.messages(RoundTask(1, bench.task().plan, 1e-9)))


@pytest.mark.parametrize(("norm", "loss", "reason"), [
    (float("nan"), 1, "not finite"), (float("inf"), 1, "not finite"), (1, float("nan"), "loss"), (11, 1, "exploded"), (10, 1, ""),
])  # fmt: skip
def test_what_is_unusable(norm, loss, reason):
    found = why_unusable(norm, loss, 10)
    assert reason in found
    assert bool(reason) == bool(found)


def test_evaluation_on_clients_counts_every_held_out_example(scenario):
    for mean in (True, False):
        bench = Bench(scenario(), mean=mean, workers=2)
        replies = bench.grid.send_and_receive(bench.messages(kind=MessageType.EVALUATE))
        facts = Facts.merge(facts_of(reply) for reply in replies)
        sizes = [len(part) for part in bench.assembly.data.holdout]
        assert [examples for _, _, examples in facts.accuracies] == sizes
        assert sum(reply.content["metrics"]["num-examples"] for reply in replies) == sum(sizes)
        overall = np.average([a for _, a, _ in facts.accuracies], weights=sizes)
        means = [reply.content["metrics"]["accuracy"] for reply in replies]
        assert np.average(means, weights=[r.content["metrics"]["num-examples"] for r in replies]) == pytest.approx(overall)
        assert all(len(reply.content.array_records) == 0 for reply in replies)
        bench.grid.close()


def test_the_callers_arrays_are_not_written_to(scenario):
    bench = Bench(scenario())
    before = bench.master.copy()
    messages = bench.messages()
    record = messages[0].content["arrays"]
    held = {name: array.numpy().copy() for name, array in record.items()}
    bench.grid.send_and_receive(messages)
    assert (bench.master == before).all()
    assert all((record[name].numpy() == value).all() for name, value in held.items())


def test_different_content_needs_single_replies(scenario):
    one, each = Bench(scenario()), Bench(scenario(), mean=False)
    mixed = [*one.messages(clients=[0, 1]), *one.messages(one.task(lr=0.2), clients=[2])]
    with pytest.raises(Refused, match="needs one reply per client"):
        one.grid.send_and_receive(mixed)
    assert len(each.grid.send_and_receive(mixed)) == 3


def test_with_different_content_one_bad_client_does_not_fail_the_others(scenario):
    bench = Bench(scenario(), mean=False)
    doomed = RoundTask(1, bench.task().plan, 1e-9)
    replies = bench.grid.send_and_receive([*bench.messages(doomed, clients=[0]), *bench.messages(clients=[1, 2])])
    assert [facts_of(reply).clients for reply in replies] == [(1,), (2,)]
    assert [client for client, _ in facts_of(replies[0]).dropped] == [0]


@pytest.mark.parametrize("change", [{"epochs": 0}, {"lr": float("nan")}, {"batch-size": 1.5}, {"momentum": -1}, {"lr": "0.1"}])
def test_a_configuration_that_a_strategy_spoiled_is_refused(scenario, change):
    bench = Bench(scenario())
    messages = bench.messages()
    messages[0].content["config"].update(change)
    with pytest.raises(Refused, match=next(iter(change))):
        bench.grid.send_and_receive(messages)


def test_a_task_survives_the_trip_through_a_config_record(scenario):
    task = RoundTask(3, LocalPlan(2, 8, 0.1, 0.9, 1e-4, 0.01), 5.0)
    assert RoundTask.from_table(ConfigRecord(task.to_table())) == task


def test_missing_arrays_are_refused(scenario):
    bench = Bench(scenario())
    content = RecordDict({"config": ConfigRecord(bench.task().to_table())})
    with pytest.raises(Refused, match="exactly one ArrayRecord"):
        bench.grid.send_and_receive([Message(content, 0, MessageType.TRAIN)])
    with pytest.raises(Refused, match=r"parameter 1\.weight: expected shape"):
        bench.grid.send_and_receive([Message(RecordDict({"a": ArrayRecord(), "c": content["config"]}), 0, MessageType.TRAIN)])


def test_a_closed_run_gives_its_data_back_at_once(scenario, tmp_path):
    """A sweep of runs in one process must not wait for the garbage collector, which counts objects and not their size."""
    gc.disable()
    try:
        with SimulatedRun(scenario("run.rounds=1", "quantization.enabled=false"), tmp_path / "run", resume=False) as run:
            list(run.rounds())
            data, grid = weakref.ref(run.assembly.data.dataset), weakref.ref(run.grid)
        del run
        assert data() is None
        assert grid() is None
    finally:
        gc.enable()
