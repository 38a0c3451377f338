"""DeviceGrid without gateways: devices that write to the store as a gateway would for them."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedcore.errors import Refused, RoundFailed
from fedcore.flower import assume_identity, facts_of, from_record, only_record, to_record
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.conduct import Conductor
from fedcore.gateway.fleet import Selection, Told
from fedcore.gateway.rounds import PRESENT, REPORT, RoundDocument
from fedcore.gateway.sums import RunningSum, Summand, read_upload
from fedcore.grids.device import DeviceGrid, Offering
from fedcore.models import ParameterLayout
from fedcore.privacy.release import plan_release
from fedcore.quantization.wire import Update, encode_update
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.sums import ScoreSum
from fedcore.state.gateway import Contribution, Device, Note, Round, RoundState, open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

LAYOUT = ParameterLayout(("w",), ((5, 4),), ("fp32",))
MASTER = np.arange(20, dtype=np.float32)


class Devices(threading.Thread):
    """Devices 1..n of one store; ``contribute`` gives each one's upload for a plan, or the reason why there is none."""

    def __init__(self, where, count, contribute):
        super().__init__(daemon=True)
        self.where, self.count, self.contribute, self.seen = where, count, contribute, []
        self.stopped = threading.Event()

    def run(self):
        store, done = open_gateway_store(self.where), set()
        for device in range(1, self.count + 1):
            store.register(Device(device, 1, bytes([device]) * 32, 2**40, time.time()))
        while not self.stopped.is_set():
            for key in store.rounds():
                one = store.round(key)
                if one.state is RoundState.FORMING:
                    said = json.dumps({"told": Told().encode(), "round_key": ""})
                    store.note(key, PRESENT, [Note(device, said, time.time()) for device in range(1, self.count + 1)])
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
            part: Summand = read_upload(data, document.uploads)
            digest = blobs.put(data) if document.uploads.kept else bytes([device]) * 32
            if not document.uploads.kept:
                total.add(part)
            counted.append(Contribution(device, digest))
        assert store.accept(one.key, "w", total.encode(), counted).counted or not counted


@pytest.fixture
def world(tmp_path):
    started = []

    def make(contribute, count=4, mean=True, **changes):
        assume_identity()
        where = str(tmp_path / "state.sqlite")
        devices = Devices(where, count, contribute)
        devices.blobs = tmp_path / "blobs"
        parts = {"goal": count, "minimum": 2, "deadline": 3.0, "window": 3.0, "over_selection": 1.0} | changes
        conductor = Conductor(open_gateway_store(where), "watches", Ed25519Key(b"k" * 32), pause=0.01)
        devices.start()
        started.append(devices)
        offering = Offering({"step": b"step", "evaluation": b"evaluation", "frozen": b"frozen"})
        return DeviceGrid(conductor, Blobs(tmp_path / "blobs"), LAYOUT, "run", Selection(**parts), offering, mean=mean), devices

    yield make
    for one in started:
        one.stopped.set()
        one.join(10)


def messages(grid, kind=MessageType.TRAIN, number=1, release=None):
    task = RoundTask(number, LocalPlan(1, 8, 0.1), 1e6, release=release)
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
        assert [blob.name for blob in plan.blobs] == ["model", "step", "frozen"]
        assert plan.minimum_uploads == 2
        devices.stopped.set()
        devices.join(10)
    np.testing.assert_allclose(models[0], sum(n * n for n in range(1, 5)) / 10, rtol=1e-6)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-5)


def test_noised_sums_are_published_as_by_other_grids(world):
    release = plan_release(20, 3.0, 0.0, 4)
    grid, devices = world(lambda device, plan: release.contribution(np.full(20, device * 0.1), device, 0.5, None).tobytes())
    (reply,) = grid.send_and_receive(messages(grid, release=release))
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


def test_evaluations_are_a_task_of_their_own(world):
    import struct

    grid, devices = world(lambda device, plan: struct.pack("<QQd", 10 * device, device, 2.0 * device))
    (reply,) = grid.send_and_receive(messages(grid, MessageType.EVALUATE, number=3))
    metrics = next(iter(reply.content.metric_records.values()))
    assert (metrics["num-examples"], metrics["accuracy"], metrics["loss"]) == (100, 0.1, 0.2)
    one, plan = devices.seen[0]
    assert (one.task, one.number, plan.task, plan.server_round) == ("run/evaluate", 3, "run/evaluate", 3)
    assert [blob.name for blob in plan.blobs] == ["model", "evaluation", "frozen"]
    assert {accuracy for _, accuracy, _ in facts_of(reply).accuracies} == {0.1}


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
