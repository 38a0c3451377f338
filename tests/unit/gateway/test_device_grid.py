"""DeviceGrid without gateways: devices that write to the store as a gateway would for them."""

import hashlib
import json
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedcore.errors import BudgetSpent, Refused, RoundFailed, TryAgain
from fedcore.flower import assume_identity, facts_of, from_record, only_record, to_record
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.conduct import Conductor
from fedcore.gateway.fleet import Selection, Told
from fedcore.gateway.identity import spell
from fedcore.gateway.rounds import PRESENT, REPORT, RoundDocument
from fedcore.gateway.sums import RunningSum, Summand, read_upload
from fedcore.grids.device import DeviceGrid, Offering
from fedcore.grids.protocol import invite, upload_of
from fedcore.models import ParameterLayout
from fedcore.privacy.release import plan_release
from fedcore.quantization.wire import Update, encode_update
from fedcore.registry.delta import apply_delta
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.participant import Visit
from fedcore.secagg.sums import ScoreSum, plan_update_sum
from fedcore.state.gateway import Contribution, Device, Note, Round, RoundState
from fedcore.state.sqlite import RunStore
from fedcore.state.stores import open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.plan import DpSgdPlan, LocalPlan

LAYOUT = ParameterLayout(("w",), ((5, 4),), ("fp32",))
BLOBS = ("step", "early-step", "step-signature", "evaluation", "evaluation-signature", "frozen")
PLAIN = LocalPlan(1, 8, 0.1)
MASTER = np.arange(20, dtype=np.float32)


class Devices(threading.Thread):
    """Devices 1..n of one store; ``contribute`` gives each one's upload for a plan, or the reason why there is none."""

    def __init__(self, where, count, contribute, told):
        super().__init__(daemon=True)
        self.where, self.count, self.contribute, self.seen = where, count, contribute, []
        self.said = {device: json.dumps({"told": told(device).encode(), "round_key": ""}) for device in range(1, count + 1)}
        self.stopped = threading.Event()

    def run(self):
        store, done = open_gateway_store(self.where), set()
        for device in range(1, self.count + 1):
            store.register(Device(device, 1, bytes([device]) * 32, 2**40, time.time()))
        while not self.stopped.is_set():
            for key in store.rounds():
                one = store.round(key)
                if one.state is RoundState.FORMING:
                    store.note(key, PRESENT, [Note(device, said, time.time()) for device, said in self.said.items()])
                if one.state is RoundState.RUNNING and key not in done:
                    done.add(key)
                    self.work(store, one)
            time.sleep(0.01)
        store.close()

    def work(self, store, one):
        document, total, counted = RoundDocument.decode(one.document), RunningSum(), []
        blobs = Blobs(self.blobs)
        for device, place in document.cohort.items():
            plan = pb.Plan.FromString(pb.SignedPlan.FromString(document.plans[place.plan]).plan)
            self.seen.append((one, plan))
            data = self.contribute(device, plan)
            if isinstance(data, str):
                store.note(one.key, REPORT, [Note(device, json.dumps({"outcome": pb.FAILED, "text": data}), time.time())])
                continue
            part: Summand = None if document.uploads.encoding == "masked" else read_upload(data, document.uploads)
            digest = blobs.put(data) if document.uploads.kept else bytes([device]) * 32
            if not document.uploads.kept:
                total.add(part)
            counted.append(Contribution(device, digest))
        assert store.accept(one.key, "w", total.encode(), counted).counted or not counted


@pytest.fixture
def world(tmp_path):
    started = []

    def make(contribute, count=4, mean=True, told=lambda _: Told(), evaluation=None, **changes):
        assume_identity()
        where = str(tmp_path / "state.sqlite")
        devices = Devices(where, count, contribute, told)
        devices.blobs = tmp_path / "blobs"
        parts = {"goal": count, "minimum": 2, "deadline": 3.0, "window": 3.0, "over_selection": 1.0} | changes
        conductor = Conductor(open_gateway_store(where), "watches", Ed25519Key(b"k" * 32), pause=0.01)
        devices.start()
        started.append(devices)
        offering = Offering({name: name.encode() for name in BLOBS})
        blobs, selection = Blobs(tmp_path / "blobs"), Selection(**parts)
        return DeviceGrid(conductor, blobs, LAYOUT, "run", selection, offering, mean=mean, evaluation=evaluation), devices

    yield make
    for one in started:
        one.stopped.set()
        one.join(60)


def messages(grid, kind=MessageType.TRAIN, number=1, release=None, plan=PLAIN):
    task = RoundTask(number, plan, 1e6, release=release)
    content = RecordDict({"arrays": to_record(LAYOUT, MASTER), "config": ConfigRecord(task.to_table())})
    return [Message(content, node, kind) for node in grid.get_node_ids()]


def numbered(device, plan):
    return encode_update(Update(np.full(20, device, np.float32), device, 0.1), plan.upload_encoding, np.random.default_rng(0))


def test_a_strategy_of_flower_runs_over_devices(world):
    """Mean and one reply per device give FedAvg the same model; plans name what their kind of work needs."""
    models = []
    for mean in (True, False):
        grid, devices = world(numbered, mean=mean)
        strategy = FedAvg(fraction_train=1.0, min_train_nodes=0, min_available_nodes=0)
        record = ConfigRecord(RoundTask(1, LocalPlan(1, 8, 0.1), 1e6).to_table())
        asked = list(strategy.configure_train(1, to_record(LAYOUT, MASTER), record, grid))
        arrays, metrics = strategy.aggregate_train(1, grid.send_and_receive(asked))
        assert metrics["train_loss"] == pytest.approx(0.1)
        models.append(from_record(LAYOUT, arrays) - MASTER)
        plan = devices.seen[0][1]
        assert [blob.name for blob in plan.blobs] == ["model", "step", "early-step", "step-signature", "frozen"]
        assert plan.minimum_uploads == 2
        devices.stopped.set()
        devices.join(60)
    np.testing.assert_allclose(models[0], sum(n * n for n in range(1, 5)) / 10, rtol=1e-6)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-5)


def test_noised_sums_are_published_as_by_other_grids(world):
    release = plan_release(20, 3.0, 0.0, 4)
    grid, devices = world(lambda device, plan: release.contribution(np.full(20, device * 0.1), device, 0.5, None).tobytes())
    paid = []
    grid.pay = lambda *what: paid.append(what)
    (reply,) = grid.send_and_receive(messages(grid, release=release))
    assert paid == [(1, [spell(n) for n in range(1, 5)], release)]
    expected = sum(release.contribution(np.full(20, n * 0.1), n, 0.5, None)[:20] for n in range(1, 5)) / 4
    np.testing.assert_allclose(from_record(LAYOUT, only_record(reply, ArrayRecord)) - MASTER, expected, atol=1e-5)
    assert facts_of(reply).clients == ()
    assert grid.observed.clients == (0, 1, 2, 3)
    assert devices.seen[0][1].upload_encoding == "contribution"


def test_what_would_show_single_devices_is_refused(world):
    grid, _ = world(numbered)
    shares = plan_release(20, 3.0, 1.0, 4, shares=(2, 0, b"s" * 32))
    with pytest.raises(Refused, match="every device's part of the sum"):
        grid.send_and_receive(messages(grid, release=shares))
    grid.nodes = ()
    with pytest.raises(Refused, match="every device's scores"):
        grid.send_and_receive(messages(grid, MessageType.EVALUATE, release=ScoreSum(4, 2, 10)))
    grid.nodes = ()


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_loss_that_the_signed_graphs_do_not_compute_is_asked_of_no_device(world, kind):
    grid, devices = world(numbered)
    with pytest.raises(Refused, match="asks devices for the loss squared; the graphs signed for them compute cross_entropy"):
        grid.send_and_receive(messages(grid, kind, plan=LocalPlan(1, 8, 0.1, loss="squared")))
    assert not devices.seen


def test_evaluations_are_a_task_of_their_own(world):
    grid, devices = world(lambda device, plan: struct.pack("<QQd", 10 * device, device, 2.0 * device))
    (reply,) = grid.send_and_receive(messages(grid, MessageType.EVALUATE, number=3))
    metrics = next(iter(reply.content.metric_records.values()))
    assert (metrics["num-examples"], metrics["accuracy"], metrics["loss"]) == (100, 0.1, 0.2)
    one, plan = devices.seen[0]
    assert (one.task, one.number, plan.task, plan.server_round) == ("run/evaluate", 3, "run/evaluate", 3)
    assert [blob.name for blob in plan.blobs] == ["model", "evaluation", "evaluation-signature", "frozen"]
    assert {accuracy for _, accuracy, _ in facts_of(reply).accuracies} == {0.1}


def test_an_evaluation_asks_devices_that_evaluate_and_no_others(world):
    grid, devices = world(
        lambda device, plan: struct.pack("<QQd", 10, 5, 2.0),
        told=lambda device: Told(capabilities=() if device % 2 else ("evaluate-1",)),
        evaluation=Selection(2, 2, 3.0, 3.0, 1.0, capabilities=("evaluate-1",)),
    )
    assert len(grid.gather(MessageType.EVALUATE, 3, ())) == 2
    grid.send_and_receive(messages(grid, MessageType.EVALUATE, number=3))
    one, plan = devices.seen[0]
    assert sorted(RoundDocument.decode(one.document).cohort) == [2, 4]
    assert (one.task, one.number, list(plan.capabilities)) == ("run/evaluate", 3, ["evaluate-1"])


def test_an_evaluation_that_a_dead_coordinator_was_gathering_holds_no_device(world):
    grid, devices = world(numbered)
    grid.gather(MessageType.EVALUATE, 7, ())  # and dies
    again, _ = world(numbered)
    assert len(again.gather(MessageType.TRAIN, 7, ())) == 4
    states = {one.task: one.state for one in rounds_in(devices)}
    assert states == {"run/evaluate": RoundState.CLOSED, "run": RoundState.FORMING}


def rounds_in(devices):
    store = open_gateway_store(devices.where)
    found = [store.round(key) for key in store.rounds()]
    store.close()
    return found


class TestCharging:
    """Who is charged: the devices that are about to see a plan, and never fewer."""

    RELEASE = plan_release(20, 3.0, 0.0, 4)

    def work(self, device, plan):
        return self.RELEASE.contribution(np.full(20, device * 0.1), device, 0.5, None).tobytes()

    def test_nothing_private_is_given_where_nobody_charges(self, world):
        grid, devices = world(self.work)
        for release, plan in ((self.RELEASE, LocalPlan(1, 8, 0.1)), (None, LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0)))):
            with pytest.raises(Refused, match="nobody charges"):
                grid.send_and_receive(messages(grid, release=release, plan=plan))
        assert not devices.seen
        assert {one.state for one in rounds_in(devices)} == {RoundState.CLOSED}

    @pytest.mark.parametrize("error", [BudgetSpent("spent"), TryAgain("the ledger is away"), KeyboardInterrupt()])
    def test_devices_that_cannot_be_charged_see_no_plan(self, world, error):
        def refuse(*_):
            raise error

        grid, devices = world(self.work)
        grid.pay = refuse
        with pytest.raises(type(error)):
            grid.send_and_receive(messages(grid, release=self.RELEASE))
        (one,) = rounds_in(devices)
        assert (one.state, RoundDocument.decode(one.document).reason) == (RoundState.CLOSED, "the round was not paid for")
        assert not devices.seen

    def test_the_ledger_is_written_before_a_plan_can_be_seen_and_for_exactly_its_cohort(self, world):
        grid, devices = world(self.work, goal=2, minimum=1)
        paid = []

        def pay(number, names, release):
            paid.append(names)
            assert [one.state for one in rounds_in(devices)] == [RoundState.FORMING], "no plan is in the store yet"

        grid.pay = pay
        chosen = grid.gather(MessageType.TRAIN, 1, ())
        assert len(chosen) == 2
        grid.send_and_receive(messages(grid, release=self.RELEASE))
        (one,) = {one.key: one for one, _ in devices.seen}.values()
        assert paid == [[spell(device) for device in sorted(RoundDocument.decode(one.document).cohort)]]

    def test_an_evaluation_costs_nothing(self, world):
        grid, _ = world(lambda device, plan: struct.pack("<QQd", 10, 5, 2.0))
        grid.pay = lambda *what: pytest.fail(str(what))
        grid.gather(MessageType.EVALUATE, 1, ())
        grid.send_and_receive(messages(grid, MessageType.EVALUATE))

    def test_who_rests_is_not_chosen(self, world):
        grid, devices = world(self.work, goal=2, minimum=2)
        grid.pay = lambda *_: None
        grid.gather(MessageType.TRAIN, 1, (spell(1), spell(3)))
        assert sorted(grid.get_node_ids()) == [2, 4]
        with pytest.raises(BudgetSpent, match=r"round 2: 1 devices checked in .* needs 2\. 3 others may not take part"):
            grid.gather(MessageType.TRAIN, 2, [spell(n) for n in (1, 2, 3)])
        assert list(grid.nodes) == []
        assert {one.state for one in rounds_in(devices)} == {RoundState.CLOSED}

    def test_where_too_few_came_it_is_no_matter_of_the_budget(self, world):
        grid, _ = world(self.work, goal=9, minimum=9, window=0.3)
        with pytest.raises(RoundFailed, match=r"4 devices checked in within 0.3 s; the round needs 9$"):
            grid.gather(MessageType.TRAIN, 1, [])


def test_masked_uploads_of_the_same_bytes_end_no_round_and_take_no_blob_away(world):
    """Nobody can read what is masked: devices that mean harm may agree on their bytes, or send back what a plan names."""
    grid, devices = world(lambda device, plan: {3: b"step", 4: Blobs(devices.blobs).get(plan.blobs[0].digest)}.get(device, b"same"))
    total = plan_update_sum(LAYOUT.size, 4, minimum_survivors=2, clip=1.0, weight_cap=10, bits=32)
    replies = grid.send_and_receive([invite(one, Visit("run", 1, 2**40), b"invitation") for one in messages(grid, release=total)])
    assert [upload_of(reply)[0] for reply in replies][:3] == [b"same", b"same", b"step"]
    blobs = Blobs(devices.blobs)
    for blob in devices.seen[-1][1].blobs:
        assert blobs.size(blob.digest) == blob.size
    with pytest.raises(Refused, match="no blob"):
        blobs.get(hashlib.sha256(b"same").digest())


def test_clients_keep_their_numbers_where_somebody_keeps_them(world, tmp_path):
    (tmp_path / "run").mkdir()
    for chosen in ([4, 2], [3, 2, 1], [1, 2, 3, 4]):
        store = RunStore(tmp_path / "run")
        grid, _ = world(numbered)
        grid.numbers = store.numbers
        found = {device: grid.client_of(device) for device in chosen}
        assert found == {device: {4: 0, 2: 1, 1: 2, 3: 3}[device] for device in chosen}
        assert grid.gather(MessageType.TRAIN, 1, ()) == tuple({4: 0, 2: 1, 1: 2, 3: 3}[n] for n in grid.get_node_ids())
        store.close()


def test_devices_that_give_nothing_are_facts_and_end_the_round_early(world):
    def contribute(device, plan):
        return numbered(device, plan) if device != 3 else "too hot"

    grid, _ = world(contribute, deadline=1e6)
    (reply,) = grid.send_and_receive(messages(grid))
    assert [reason for _, reason in facts_of(reply).dropped] == ["failed: too hot"]
    assert len(facts_of(reply).clients) == 3


def test_too_few_uploads_fail_the_round(world):
    grid, _ = world(lambda device, plan: numbered(device, plan) if device == 1 else "no")
    with pytest.raises(RoundFailed, match=r"1 of 4 devices uploaded .* needs 2; client \d: failed: no"):
        grid.send_and_receive(messages(grid))


def test_plans_of_a_task_rise_and_a_dead_coordinators_round_is_closed(world, tmp_path):
    grid, devices = world(numbered)
    grid.get_node_ids()  # and dies
    again = DeviceGrid(
        Conductor(open_gateway_store(devices.where), "watches", Ed25519Key(b"k" * 32), pause=0.01), Blobs(tmp_path / "blobs"),
        LAYOUT, "run", Selection(4, 2, 3.0, 3.0, 1.0), Offering({}), mean=True, done=7,
    )  # fmt: skip
    for number in (8, 9):
        again.send_and_receive(messages(again, number=number))
    rounds = [plan.round for _, plan in devices.seen]
    assert rounds == sorted(rounds)
    assert len(set(rounds)) == 2
    store = open_gateway_store(devices.where)
    states = {key: store.round(key) for key in store.rounds()}
    assert [one.state for one in states.values()] == [RoundState.CLOSED] * 3
    reasons = sorted(RoundDocument.decode(one.document).reason for one in states.values())
    assert reasons == ["the coordinator began anew", "the round has what it needs", "the round has what it needs"]
    assert {one.participations["run"] for one in store.devices()} == {(2, 9)}
    store.close()


def test_another_coordinators_task_is_left_alone(tmp_path):
    store = open_gateway_store(str(tmp_path / "s.sqlite"))
    one = Conductor(store, "watches", Ed25519Key(b"k" * 32))
    other = one.form("other", 1, Selection(2, 1, 3.0, 3.0))
    Conductor(store, "watches", Ed25519Key(b"k" * 32)).form("mine", 1, Selection(2, 1, 3.0, 3.0))
    assert store.round(other.round.key).state is RoundState.FORMING
    changed = Round(other.round.key, "other", 1, RoundState.FORMING, 2, other.round.document)
    assert store.advance(changed)
    with pytest.raises(RoundFailed, match="another coordinator works on"):
        one.close(other, "mine")


def test_messages_to_devices_that_were_not_collected_are_refused(world):
    grid, _ = world(numbered)
    sent = messages(grid)
    grid.nodes = ()
    with pytest.raises(Refused, match="was not drawn"):
        grid.send_and_receive(sent)
    with pytest.raises(RoundFailed, match="no devices were collected"):
        grid.send_and_receive([])


def test_a_devices_side_needs_neither_torch_nor_numpy():
    code = (
        "import sys, fedcore.gateway.client; print([m for m in ('torch', 'flwr', 'numpy', 'redis', 'sqlite3') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_next_rounds_plan_names_a_delta_from_this_rounds_model(world):
    grid, devices = world(numbered)
    plans = []
    for number in (1, 2):
        task, record = ConfigRecord(RoundTask(number, PLAIN, 1e6).to_table()), to_record(LAYOUT, MASTER * number)
        content = RecordDict({"arrays": record, "config": task})
        grid.send_and_receive([Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()])
        plans.append({blob.name: blob for blob in devices.seen[-1][1].blobs})
    (first, second), blobs = plans, Blobs(devices.blobs)
    base, model = first["model"].digest, second["model"]
    delta = second[f"model-from-{base.hex()}"]
    assert delta.size < model.size
    assert apply_delta(blobs.get(base), blobs.get(delta.digest), model.digest, model.size) == blobs.get(model.digest)
    assert not any(name.startswith("model-from-") for name in first)
