import dataclasses
import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict

from fedcore.config import PrivacyConfig, RunConfig
from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.run import FederatedRun, SimulatedRun
from fedcore.coordinator.strategy import accepts_mean
from fedcore.errors import FedcoreError, Refused, RoundFailed, TryAgain
from fedcore.flower import assume_identity, facts_of, to_record
from fedcore.grids import superlink
from fedcore.grids.superlink import SuperLinkGrid, identity_content
from fedcore.models import ParameterLayout
from fedcore.privacy.ledger import Ledger
from fedcore.privacy.release import plan_release
from fedcore.state.stores import open_ledger
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

LAYOUT = ParameterLayout(("w", "b"), ((2, 2), (2,)), ("int8", "fp16"))
MASTER = np.arange(6, dtype=np.float32) / 4


@dataclass
class Link:
    """A SuperLink of the same interface: ``nodes`` answer a message with content, an error, or (None) not at all."""

    nodes: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    waiting: dict = field(default_factory=dict)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"m{len(self.asked)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grids do
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            node = self.nodes.get(message.metadata.dst_node_id, lambda message: Error(1, "node is gone"))
            self.waiting[ids[-1]] = (message, node(message))
        return ids

    def pull_messages(self, message_ids):
        found = [(one, *self.waiting[one]) for one in message_ids if self.waiting[one][1] is not None]
        return [Message(answer, reply_to=message) for _, message, answer in found]

    def send_and_receive(self, messages, *, timeout=None):
        return list(reversed(self.pull_messages(self.push_messages(messages))))


def node(partition, update=0.0, *, examples=10, loss=0.5, spoil=lambda content: content):
    """A node that reports ``update`` in every parameter; ``spoil`` may change or replace what it sends."""

    def answer(message):
        if message.metadata.message_type == MessageType.QUERY:
            return identity_content(partition)
        if message.metadata.message_type == MessageType.EVALUATE:
            return spoil(RecordDict({"m": MetricRecord({"num-examples": examples, "accuracy": 0.5, "loss": loss})}))
        arrays = to_record(LAYOUT, np.full(6, update, np.float32))
        return spoil(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": examples, "train_loss": loss})}))

    return answer


def grid_of(*nodes, mean=False, clients=None, wait=0.0):
    assume_identity()
    link = Link({1000 + 7 * place: one for place, one in enumerate(nodes)})
    return SuperLinkGrid(link, clients or len(nodes), LAYOUT, mean=mean, wait=wait), link


def exchange(grid, kind=MessageType.TRAIN, limit=100.0):
    task = RoundTask(1, LocalPlan(1, 8, 0.1), limit)
    content = RecordDict({"arrays": to_record(LAYOUT, MASTER), "config": ConfigRecord(task.to_table())})
    return grid.send_and_receive([Message(content, one, kind) for one in grid.get_node_ids()], timeout=1)


def models(replies):
    return [LAYOUT.join({name: array.numpy() for name, array in reply.content["arrays"].items()}) for reply in replies]


def test_a_client_is_known_by_its_partition_id():
    grid, link = grid_of(node(2), node(0), node(1))
    assert list(grid.get_node_ids()) == [1007, 1014, 1000]
    grid.nodes = (2, 0)
    assert list(grid.get_node_ids()) == [1000, 1007]
    assert link.asked == [(1000, "query"), (1007, "query"), (1014, "query")]


def test_replies_are_master_plus_update_in_the_order_of_clients():
    grid, _ = grid_of(node(1, 0.25, examples=30), node(0, -0.5))
    replies = exchange(grid)
    assert [facts_of(reply).clients for reply in replies] == [(0,), (1,)]
    np.testing.assert_array_equal(models(replies), [MASTER - 0.5, MASTER + 0.25])
    assert [reply.metadata.src_node_id for reply in replies] == [1007, 1000]
    assert dict(replies[1].content["metrics"]) == {"num-examples": 30, "train_loss": 0.5}


def test_the_mean_is_weighted_by_examples():
    grid, _ = grid_of(node(1, 0.25, examples=30, loss=1.5), node(0, -0.5), mean=True)
    (reply,) = exchange(grid)
    np.testing.assert_array_equal(models([reply])[0], MASTER + np.float32(0.0625))
    assert dict(reply.content["metrics"]) == {"num-examples": 40, "train_loss": 1.25}
    assert facts_of(reply).clients == (0, 1)


def test_evaluations_come_with_each_clients_accuracy():
    for mean in (True, False):
        grid, _ = grid_of(node(0), node(1, examples=30), mean=mean)
        replies = exchange(grid, MessageType.EVALUATE)
        assert sum(reply.content["metrics"]["num-examples"] for reply in replies) == 40
        assert [entry for reply in replies for entry in facts_of(reply).accuracies] == [(0, 0.5, 10), (1, 0.5, 30)]
        assert all(not reply.content.array_records for reply in replies)


def changed(**values):
    def spoil(content):
        content["m"].update({name.replace("_examples", "-examples"): value for name, value in values.items()})
        return content

    return spoil


def without_arrays(content):
    return RecordDict({"m": content["m"]})


def with_bad_facts(content):
    content["fedcore-facts"] = ConfigRecord({"json": "{"})
    return content


def renamed(content):
    content["a"] = ArrayRecord({"other": Array(np.zeros(6))})
    return content


@pytest.mark.parametrize(("bad", "reason"), [
    (node(1, math.nan), "update is not finite"),
    (node(1, math.inf), "update is not finite"),
    (node(1, 1e3), "update exploded"),
    (node(1, loss=math.nan), "train_loss is not a finite number"),
    (node(1, examples=0), "num-examples is not a whole number above 0"),
    (node(1, spoil=changed(num_examples=2.5)), "num-examples is not a whole number above 0"),
    (node(1, spoil=changed(train_loss=[1.0])), "train_loss is not a finite number"),
    (node(1, spoil=without_arrays), "its reply cannot be used"),
    (node(1, spoil=renamed), "parameter w: expected shape"),
    (node(1, spoil=with_bad_facts), "sent facts that cannot be read"),
    (node(1, spoil=lambda content: Error(1, "out of memory")), "its node failed: out of memory"),
    (node(1, spoil=lambda content: None), "no reply within cohort.timeout"),
])  # fmt: skip
@pytest.mark.parametrize("mean", [True, False])
def test_a_bad_reply_is_dropped_named_and_leaves_the_others_alone(bad, reason, mean):
    grid, _ = grid_of(node(0, 0.5), bad, node(2, 0.25), mean=mean)
    replies = exchange(grid)
    expected = [MASTER + 0.375] if mean else [MASTER + 0.5, MASTER + 0.25]
    np.testing.assert_array_equal(models(replies), expected)
    ((client, said),) = facts_of(replies[0]).dropped
    assert client == 1
    assert reason in said
    grid.nodes = (1,)
    with pytest.raises(RoundFailed, match="all 1 clients of the round failed; client 1: "):
        exchange(grid)


def test_what_a_node_says_of_other_clients_and_metrics_is_not_believed():
    def boast(content):
        content["m"]["bonus"] = 1.0  # Flower's strategies fail when replies have different metrics
        facts = '{"clients": [0, 1], "dropped": [[0, "bad"]], "bytes_up": 7, "bytes_down": 9, "accuracies": [[0, 1.0, 9]]}'
        content["fedcore-facts"] = ConfigRecord({"json": facts})
        return content

    grid, _ = grid_of(node(0), node(1, spoil=boast))
    _, reply = exchange(grid)
    facts = facts_of(reply)
    assert (facts.clients, facts.dropped, facts.accuracies) == ((1,), (), ())
    assert (facts.bytes_up, facts.bytes_down) == (7, 9)
    assert "bonus" not in reply.content["metrics"]


def test_partition_ids_must_be_distinct_and_exist():
    with pytest.raises(Refused, match="nodes 1000 and 1014 both have partition-id 1"):
        grid_of(node(1), node(0), node(1), clients=2)
    with pytest.raises(Refused, match="node 1007 has partition-id 2, but the scenario has 2 clients"):
        grid_of(node(0), node(2))


def test_a_missing_client_is_an_error_that_says_which_and_why():
    def broken(message):
        return Error(1, "no partition-id")

    with pytest.raises(RoundFailed, match=r"no SuperNode has partition-id 1, 2 after 0 s of waiting; node 1007: no partition-id; "):
        grid_of(node(0), broken, lambda message: None)


def test_the_roll_call_waits_for_nodes_that_connect_later(monkeypatch):
    link = Link({1000: node(0)})
    assume_identity()
    monkeypatch.setattr(superlink.time, "sleep", lambda seconds: link.nodes.setdefault(2000, node(1)))
    grid = SuperLinkGrid(link, 2, LAYOUT, mean=False, wait=60)
    assert list(grid.get_node_ids()) == [1000, 2000]


def test_a_restarted_node_takes_its_client_over_once_the_old_one_is_gone():
    grid, link = grid_of(node(0, 0.5), node(1, 0.5))
    link.nodes[5000] = node(1, 0.25)
    assert list(grid.get_node_ids()) == [1000, 1007]
    gone = link.nodes.pop(1007)
    assert list(grid.get_node_ids()) == [1000, 5000]
    assert link.asked.count((5000, "query")) == 1
    np.testing.assert_array_equal(models(exchange(grid))[1], MASTER + 0.25)
    link.nodes.pop(5000)
    replies = exchange(grid)  # nobody takes its place: the round goes on without the client
    assert facts_of(replies[0]).dropped == ((1, "its node failed: node is gone"),)
    link.nodes[6000] = gone
    assert list(grid.get_node_ids()) == [1000, 6000]


def test_a_mean_over_different_content_is_refused():
    grid, _ = grid_of(node(0), node(1), mean=True)
    task = ConfigRecord(RoundTask(1, LocalPlan(1, 8, 0.1), 1.0).to_table())
    messages = [Message(RecordDict({"a": to_record(LAYOUT, MASTER), "c": task}), one, "train") for one in grid.get_node_ids()]
    with pytest.raises(Refused, match="needs one reply per client"):
        grid.send_and_receive(messages)


def client_app(config: RunConfig, folder: Path, partition: int):
    """The real ClientApp as one of the nodes of a `Link`."""
    app = importlib.import_module("fedcore_flower.client").app
    path = folder / "resolved.toml"
    path.write_text(config.to_toml())

    def answer(message):
        context = Context(1, 1, {"partition-id": partition}, RecordDict(), {"scenario": str(path)})
        try:
            return app(message, context).content
        except FedcoreError as error:
            return Error(1, str(error))  # as Flower does

    return answer


@pytest.mark.parametrize("settings", [
    (), ("wire.update=int8",), ("strategy.name=fedmedian",), ("strategy.name=fedadam",),
    ("cohort.size=2", "quantization.calibrate_round=1"), ("quantization.enabled=false", "model.trainable=['3.*']"),
])  # fmt: skip
def test_the_flower_app_gives_the_bits_of_a_simulation(scenario, tmp_path, monkeypatch, settings):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "clients" / "flower"))
    config = scenario("data.clients=3", "run.rounds=2", "evaluation.federated_every=2", *settings)
    link = Link({500 - place: client_app(config, tmp_path, place) for place in range(3)})

    def connect(assembly):
        return SuperLinkGrid(link, 3, assembly.layout, mean=accepts_mean(assembly.strategy), wait=0)

    with FederatedRun(config, tmp_path / "link", connect, resume=False) as over_link:
        first = list(over_link.rounds())
        result = over_link.finish()
    with SimulatedRun(config, tmp_path / "simulated", resume=False) as simulated:
        second = list(simulated.rounds())
        expected = simulated.finish()
    assert (over_link.coordinator.progress.master == simulated.coordinator.progress.master).all()
    models = [(tmp_path / name / "model" / "model.fcm").read_bytes() for name in ("link", "simulated")]
    assert models[0] == models[1]
    for one, other in zip(first, second, strict=True):
        losses = [entry.pop("train_loss", 0) for entry in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert {**one, "timing": None, "federated": None} == {**other, "timing": None, "federated": None}
        if "federated" in other:
            assert one["federated"].pop("percentiles") == other["federated"].pop("percentiles")
            assert one["federated"] == pytest.approx(other["federated"])
    for name in ("accuracy", "int8_accuracy", "bytes_up", "bytes_down", "strategy_replies"):
        assert result[name] == expected[name]


CLIENT = {"unit": "client", "noise_multiplier": 0.01, "delta": 1e-3, "loss_cap": 5.0}
EXAMPLE = {"unit": "example", "noise_multiplier": 0.01, "delta": 1e-4}


@pytest.mark.parametrize(
    "units", [(CLIENT,), (EXAMPLE,), ({**CLIENT, "loss_cap": 0.0}, EXAMPLE)], ids=["client", "example", "both"]
)
def test_private_rounds_over_a_superlink_are_those_of_a_simulation_but_for_their_noise(scenario, tmp_path, monkeypatch, units):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "clients" / "flower"))
    config = scenario("data.clients=3", "run.rounds=2", "quantization.enabled=false")
    config = dataclasses.replace(config, privacy=tuple(PrivacyConfig(**unit) for unit in units))
    link = Link({500 - place: client_app(config, tmp_path, place) for place in range(3)})

    def connect(assembly):
        return SuperLinkGrid(link, 3, assembly.layout, mean=accepts_mean(assembly.strategy), wait=0)

    start = assemble(config).model.state_dict()
    with FederatedRun(config, tmp_path / "link", connect, resume=False) as over_link:
        first = list(over_link.rounds())
        over_link.finish()
    with SimulatedRun(config, tmp_path / "simulated", resume=False) as simulated:
        second = list(simulated.rounds())
    origin = over_link.coordinator.layout.join({name: value.numpy() for name, value in start.items()})
    moved = [run.coordinator.progress.master - origin for run in (over_link, simulated)]
    assert np.corrcoef(*moved)[0, 1] > 0.8, "the same training"
    assert (moved[0] != moved[1]).all(), "noise of its own, from the operating system"
    for one, other in zip(first, second, strict=True):
        assert one["privacy"] == other["privacy"]
        assert (one["train_loss"] is None) == (units[0].get("loss_cap", 0.0) == 0.0)
        assert (one["cohort"], one["replies"], one["dropped"]) == (other["cohort"], other["replies"], [])
    with pytest.raises(Refused, match="already"):
        FederatedRun(config, tmp_path / "link", connect, resume=False)


def test_a_round_that_is_repeated_with_new_noise_is_charged_again(scenario, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "clients" / "flower"))
    config = scenario("data.clients=3", "run.rounds=1", "quantization.enabled=false")
    config = dataclasses.replace(config, privacy=(PrivacyConfig(**{**CLIENT, "noise_multiplier": 1.0}),))
    link = Link({500 - place: client_app(config, tmp_path, place) for place in range(3)})

    def connect(assembly):
        return SuperLinkGrid(link, 3, assembly.layout, mean=True, wait=0)

    with FederatedRun(config, tmp_path / "link", connect, resume=False) as run, monkeypatch.context() as broken:
        broken.setattr(run._store, "commit", lambda *_: (_ for _ in ()).throw(TryAgain("disk full")))
        with pytest.raises(TryAgain):
            list(run.rounds())
    with FederatedRun(config, tmp_path / "link", connect, resume=True) as run:
        list(run.rounds())
        result = run.finish()
    attempts = [(charge.round, charge.attempt) for charge in Ledger(open_ledger(tmp_path / "link", write=False)).charges()]
    assert attempts == [(1, 0), (1, 1)]
    assert result["privacy"]["client"]["participations"] == 2


def test_shares_of_noise_are_refused_where_the_coordinator_sees_each(scenario, tmp_path):
    config = dataclasses.replace(
        scenario("data.clients=3"), privacy=(PrivacyConfig("client", "skellam", noise_multiplier=1.0, delta=1e-3),)
    )
    link = Link({500 - place: node(place) for place in range(3)})

    def connect(assembly):
        return SuperLinkGrid(link, 3, assembly.layout, mean=True, wait=0)

    with pytest.raises(Refused, match="nothing but the sum"):
        FederatedRun(config, tmp_path / "link", connect, resume=False)


@pytest.mark.parametrize("nodes", [(1000, 1000), (1007, 555)])
def test_a_message_reaches_drawn_clients_only_and_each_once(nodes):
    grid, _ = grid_of(node(0, 0.5), node(1, 0.5), mean=True)
    content = RecordDict({"a": to_record(LAYOUT, MASTER), "c": ConfigRecord(RoundTask(1, LocalPlan(1, 8, 0.1), 1.0).to_table())})
    with pytest.raises(Refused, match="the strategy sent a message to node"):
        grid.send_and_receive([Message(content, one, MessageType.TRAIN) for one in nodes])


def test_a_node_that_sends_no_contribution_is_dropped_and_named_to_the_operator_alone():
    grid, _ = grid_of(node(0, 0.5), node(1, 0.5))
    grid.mean = True
    release = plan_release(6, 1.0, 1e-9, 2)
    task = RoundTask(1, LocalPlan(1, 8, 0.1), 100.0, release=release)
    content = RecordDict({"arrays": to_record(LAYOUT, MASTER), "config": ConfigRecord(task.to_table())})
    (reply,) = grid.send_and_receive([Message(content, one, MessageType.TRAIN) for one in grid.get_node_ids()], timeout=1)
    np.testing.assert_allclose(models([reply])[0], MASTER, atol=1e-6)
    assert facts_of(reply).dropped == ()
    assert [client for client, _ in grid.observed.dropped] == [0, 1]


def test_a_node_without_partition_id_says_how_to_start_it(scenario, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "clients" / "flower"))
    assume_identity()
    answer = client_app(scenario(), tmp_path, "0")(Message(RecordDict(), 5, MessageType.QUERY))
    assert "start it with --node-config 'partition-id=0'" in answer.reason
