"""Whole rounds over real processes on loopback with TLS: gateways that are killed, replicas on one store, devices that speak the
protocol, and a coordinator's grid."""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedcore.errors import Refused, RoundFailed, TryAgain
from fedcore.flower import assume_identity, facts_of, from_record, only_record, to_record
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.client import GatewayClient, Requests, enrol, may_pass
from fedcore.gateway.conduct import Conductor
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.enrolment import EnrolmentServer
from fedcore.gateway.fleet import Selection
from fedcore.gateway.plan import to_table
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.grids.device import DeviceGrid, Offering
from fedcore.models import ParameterLayout
from fedcore.quantization.wire import Update, decode_model, encode_update
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Standing, open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

ROOT = Path(__file__).parents[2]
LAYOUT = ParameterLayout(("w", "b"), ((20, 30), (30,)), ("fp32", "fp32"))


def redis_of_the_contracts():
    path = ROOT / "tests" / "contracts" / "test_gateway_store.py"
    spec = importlib.util.spec_from_file_location("gateway_store_contract", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RedisServer()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """A fleet's keys, its enrolment signer, and gateway processes on one store."""

    def __init__(self, folder, store="", gateways=1, **settings):
        self.folder, self.store = folder, store or str(folder / "state.sqlite")
        self.fleet = make_fleet(folder / "fleet", "watches")
        self.signer = self.fleet.signer()
        self.enrolments = EnrolmentServer(self.signer, f"unix:{folder}/signer.sock")
        self.enrolments.start()
        self.blobs = folder / "blobs"
        self.settings = {
            "store": self.store, "blobs": str(self.blobs), "trust": str(self.fleet.trust_file), "hold": 2.0,
            "time_key": str(self.fleet.time_key), "tls": str(self.fleet.gateway), "signer": self.enrolments.address,
            "limits": {"rate": 200, "burst": 200}, "pace": {"rate": 1000, "least": 0.05}, **settings,
        }  # fmt: skip
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(gateways)]
        self.processes = {}
        for i in range(gateways):
            self.start(i)

    def start(self, i=0):
        file = self.folder / f"gateway-{i}.json"
        file.write_text(json.dumps(self.settings | {"listen": self.addresses[i]}))
        with (self.folder / f"gateway-{i}.log").open("ab") as log:
            command = [sys.executable, "-m", "fedcore.gateway.process", str(file)]
            self.processes[i] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        line = self.processes[i].stdout.readline()
        assert line == f"gateway listens on {self.addresses[i]}\n", (self.folder / f"gateway-{i}.log").read_text()

    def end(self, i=0, number=signal.SIGKILL):
        process = self.processes.pop(i)
        process.send_signal(number)
        code = process.wait(30)
        process.stdout.close()
        return code

    def enrol(self, number, gateway=0):
        token = self.signer.issue(600).encode()
        return enrol(self.addresses[gateway], token, Ed25519Key(hashlib.sha256(b"%d" % number).digest()))

    def client(self, enrolled, gateway=0, begin=1, **options):
        counter = itertools.count(begin)
        return GatewayClient(self.addresses[gateway], Requests(enrolled, lambda: next(counter), **options))

    def grid(self, selection, mean=True, offering=None, task="run-1"):
        self.coordinator = open_gateway_store(self.store)
        conductor = Conductor(self.coordinator, "watches", self.fleet.plan_key(), pause=0.02)
        return DeviceGrid(conductor, Blobs(self.blobs), LAYOUT, task, selection, offering or Offering({}), mean=mean)

    def close(self):
        for i in list(self.processes):
            self.end(i, signal.SIGTERM)
        self.enrolments.stop()
        self.signer.close()


@pytest.fixture
def deployment(tmp_path):
    one = Deployment(tmp_path)
    yield one
    one.close()


class Device(threading.Thread):
    """Checks in until it has worked in ``rounds`` rounds; its update adds its number to every parameter."""

    def __init__(self, deployment, enrolled, number, gateways=(0,), rounds=1, encoding="float32"):
        super().__init__(daemon=True)
        self.deployment, self.enrolled, self.number, self.rounds = deployment, enrolled, number, rounds
        self.gateways, self.encoding = itertools.cycle(gateways), encoding
        self.acknowledged, self.plans, self.problem = [], [], None
        self.counter = itertools.count(1)

    def run(self):
        try:
            while len(self.acknowledged) < self.rounds:
                self.visit()
        except Exception as error:  # noqa: BLE001 - told by the test
            self.problem = error

    def visit(self):
        address = self.deployment.addresses[next(self.gateways)]
        requests = Requests(self.enrolled, lambda: next(self.counter))
        client = GatewayClient(address, requests)
        try:
            reply = client.check_in(pb.CheckInBody(tier="watch", capabilities=["accumulate-1"]))
            if reply.HasField("assignment"):
                self.work(client, requests, reply.assignment)
            else:
                time.sleep(min(0.1, reply.wait.retry_after_ms / 1000))
        except (TryAgain, GatewayRefusal) as error:
            if isinstance(error, GatewayRefusal) and error.reason == pb.LATE:
                return
            if not may_pass(error):
                raise
            time.sleep(0.05)
        finally:
            client.close()

    def work(self, client, requests, assignment):
        plan = requests.check_plan(assignment, max(self.plans, default=0))
        model = client.fetch_whole(assignment.token, plan.blobs[0])
        decode_model(model)
        assert to_table(plan)["batch-size"] == 8
        rng = np.random.default_rng(0)
        if plan.kind == pb.TRAIN:
            values = np.full(LAYOUT.size, self.number, np.float32)
            data = encode_update(Update(values, self.number + 1, 0.5 * self.number), plan.upload_encoding, rng)
        else:
            data = (10).to_bytes(8, "little") + (self.number).to_bytes(8, "little") + np.float64(self.number).tobytes()
        client.upload(assignment.token, data)
        self.acknowledged.append(plan.round)
        self.plans.append(plan.round)
        with contextlib.suppress(GatewayRefusal, TryAgain):
            client.report(pb.ReportBody(token=assignment.token, outcome=pb.UPLOADED, train_ms=3))


def work_for(nodes, kind=MessageType.TRAIN, number=1, **changes):
    assume_identity()
    master = np.arange(LAYOUT.size, dtype=np.float32) / 7
    record = ConfigRecord(RoundTask(number, LocalPlan(1, 8, 0.1, **changes), 1e6).to_table())
    content = RecordDict({"arrays": to_record(LAYOUT, master), "config": record})
    return master, [Message(content, node, kind) for node in nodes]


def assigned(client):
    """Check in until there is work."""
    while not (reply := client.check_in(pb.CheckInBody())).HasField("assignment"):
        time.sleep(0.02)
    return reply


def finish(threads, seconds=60):
    for one in threads:
        one.join(seconds)
        assert one.problem is None, one.problem
        assert not one.is_alive()


class OneRound(threading.Thread):
    """A coordinator for one round, in a thread of its own, to which its store belongs."""

    def __init__(self, deployment, chosen, work):
        super().__init__(daemon=True)
        self.deployment, self.chosen, self.work, self.replies = deployment, chosen, work, None
        self.start()

    def run(self):
        grid = self.deployment.grid(self.chosen)
        self.replies = grid.send_and_receive(self.work(grid))

    def result(self):
        self.join(40)
        assert not self.is_alive()
        return self.replies


def selection(count, **changes):
    return Selection(**({"goal": count, "minimum": count, "deadline": 30.0, "window": 20.0, "over_selection": 1.0} | changes))


def check_mean(replies, master, numbers):
    (reply,) = replies
    numbers = np.array(sorted(numbers))
    mean = (numbers * (numbers + 1)).sum() / (numbers + 1).sum()
    update = from_record(LAYOUT, only_record(reply, type(to_record(LAYOUT, master)))) - master
    np.testing.assert_allclose(update, mean, rtol=1e-5)
    metrics = next(iter(reply.content.metric_records.values()))
    assert metrics["num-examples"] == (numbers + 1).sum()
    assert metrics["train_loss"] == pytest.approx((0.5 * numbers * (numbers + 1)).sum() / (numbers + 1).sum())
    assert len(facts_of(reply).clients) == len(numbers)


@pytest.mark.parametrize("store", ["sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def test_a_round_survives_gateways_that_are_killed_between_uploads(tmp_path, store):
    """Two replicas, one of them killed with -9 again and again while ten devices upload: the mean is exact."""
    redis = redis_of_the_contracts() if store == "redis" else None
    deployment = Deployment(tmp_path, redis.url("a") if redis else "", gateways=2)
    try:
        devices = [Device(deployment, deployment.enrol(n, n % 2), n, gateways=(n % 2, 1 - n % 2)) for n in range(10)]
        grid = deployment.grid(selection(10))
        for one in devices:
            one.start()
        master, messages = work_for(grid.get_node_ids())
        assert len(messages) == 10
        stop = threading.Event()

        def kill():
            while not stop.is_set():
                deployment.end(0)
                time.sleep(0.1)
                deployment.start(0)
                stop.wait(0.3)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            replies = grid.send_and_receive(messages, timeout=60)
        finally:
            stop.set()
            killer.join()
        check_mean(replies, master, range(10))
        finish(devices)
        grid.close()
        assert sorted(one.participations["run-1"] for one in deployment.coordinator.devices()) == [(1, 1)] * 10
    finally:
        deployment.close()
        if redis:
            redis.kill()
            shutil.rmtree(redis.folder, ignore_errors=True)


def test_several_rounds_training_and_evaluation_one_reply_per_device(deployment):
    devices = [Device(deployment, deployment.enrol(n), n, rounds=3, encoding="int8") for n in range(4)]
    grid = deployment.grid(selection(4), mean=False, offering=Offering({"step": b"s" * 300_000}, "int8", ("accumulate-1",)))
    for one in devices:
        one.start()
    for number in (1, 2):
        master, messages = work_for(grid.get_node_ids(), number=number)
        replies = grid.send_and_receive(messages)
        got = {}
        for reply in replies:
            update = from_record(LAYOUT, only_record(reply, type(to_record(LAYOUT, master)))) - master
            got[next(iter(reply.content.metric_records.values()))["num-examples"] - 1] = float(update.mean())
        assert got == pytest.approx({0: 0, 1: 1, 2: 2, 3: 3}, abs=1e-4)
        grid.nodes = ()
    _, messages = work_for(grid.get_node_ids(), MessageType.EVALUATE, number=2)
    replies = grid.send_and_receive(messages)
    assert {one.participations["run-1"] for one in deployment.coordinator.devices()} == {(2, 2)}
    assert {one.participations["run-1/evaluate"] for one in deployment.coordinator.devices()} == {(1, 2)}
    accuracies = sorted(accuracy for reply in replies for _, accuracy, _ in facts_of(reply).accuracies)
    assert accuracies == [0, 0.1, 0.2, 0.3]
    finish(devices)
    assert deployment.end(0, signal.SIGTERM) == 0
    assert not list((deployment.blobs / "staged").iterdir())


def test_a_large_upload_goes_in_pieces_and_is_resumed_after_a_kill(deployment):
    big = ParameterLayout(("w",), ((1500, 1000),), ("fp32",))
    enrolled = deployment.enrol(1)
    counter = itertools.count(1)
    requests = Requests(enrolled, lambda: next(counter))
    client = GatewayClient(deployment.addresses[0], requests)
    arrays, config = to_record(big, np.zeros(big.size, np.float32)), RoundTask(1, LocalPlan(1, 8, 0.1), 1e6).to_table()

    def work(grid):
        grid._layout = big
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    coordinator = OneRound(deployment, selection(1), work)
    assignment = assigned(client).assignment
    plan = requests.check_plan(assignment)
    first = b"".join(itertools.islice(client.fetch(assignment.token, plan.blobs[0].digest, 0, 1_000_000), 100))
    assert len(first) == 1_000_000
    assert client.fetch_whole(assignment.token, plan.blobs[0], first)[:1_000_000] == first
    with pytest.raises(GatewayRefusal, match="names no such blob"):
        list(client.fetch(assignment.token, bytes(32)))
    data = encode_update(Update(np.arange(big.size, dtype=np.float32) / big.size, 3, 0.25), "float32", np.random.default_rng(0))
    digest = hashlib.sha256(data).digest()
    have = client._staged(assignment.token, digest, data, 0, data[: 1 << 20])
    deployment.end()
    deployment.start()
    assert have == client._staged(assignment.token, digest, data, 0, b"") == 1 << 20
    assert client.upload(assignment.token, data) is False
    (reply,) = coordinator.result()
    np.testing.assert_allclose(from_record(big, only_record(reply, type(arrays)))[-1], (big.size - 1) / big.size)
    assert client.upload(assignment.token, data) is True  # counted: it is never called late
    with pytest.raises(GatewayRefusal, match="the round has what it needs") as late:
        client.upload(assignment.token, data[:-1] + b"x")
    assert late.value.reason == pb.LATE
    client.close()


def test_a_device_is_not_offered_again_the_round_that_it_ended(tmp_path):
    """Whatever gateway it asks; one that is only not eligible at the moment may go on with it."""
    deployment = Deployment(tmp_path, gateways=2)
    try:
        outcomes = [pb.FAILED, pb.REFUSED_PLAN, pb.GAVE_UP, pb.INELIGIBLE, pb.WORKING]
        devices = [deployment.enrol(n) for n in range(5)]
        clients = [deployment.client(one) for one in devices]
        coordinator = OneRound(deployment, selection(5, minimum=1, deadline=15.0), lambda grid: work_for(grid.get_node_ids())[1])
        tokens = {}

        def begin(n):
            tokens[n] = assigned(clients[n]).assignment.token

        threads = [threading.Thread(target=begin, args=(n,)) for n in range(5)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(20)
        offered = {}
        for n, outcome in enumerate(outcomes):
            assert clients[n].check_in(pb.CheckInBody()).assignment.token, "as long as it said nothing, it is offered"
            clients[n].report(pb.ReportBody(token=tokens[n], outcome=outcome, text="because"))
        for n, client in enumerate(clients):
            elsewhere = deployment.client(devices[n], 1, begin=1000)
            replies = [one.check_in(pb.CheckInBody()) for one in (client, elsewhere)]
            offered[n] = [reply.HasField("assignment") for reply in replies]
            assert all(reply.HasField("assignment") or reply.wait.reason == "not selected for this round" for reply in replies)
            elsewhere.close()
        assert offered == {0: [False] * 2, 1: [False] * 2, 2: [False] * 2, 3: [True] * 2, 4: [True] * 2}
        update = encode_update(Update(np.ones(LAYOUT.size, np.float32), 2, 0.5), "float32", np.random.default_rng(0))
        clients.append(deployment.client(devices[4], begin=2000))
        clients[-1].upload(tokens[4], update)
        (reply,) = coordinator.result()
        assert len(facts_of(reply).clients) == 1
    finally:
        for client in clients:
            client.close()
        deployment.close()


def test_uploads_that_are_late_strange_or_different_are_refused_with_the_reason(deployment):
    devices = [deployment.enrol(n) for n in range(3)]
    clients = [deployment.client(one) for one in devices]
    coordinator = OneRound(deployment, selection(3, minimum=1, deadline=4.0), lambda grid: work_for(grid.get_node_ids())[1])
    replies = []
    threads = [threading.Thread(target=lambda c=c: replies.append((c, assigned(c)))) for c in clients]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    tokens = {client: reply.assignment.token for client, reply in replies}
    first, second, third = clients
    rng = np.random.default_rng(0)
    good = encode_update(Update(np.ones(LAYOUT.size, np.float32), 2, 0.5), "float32", rng)
    other = encode_update(Update(np.zeros(LAYOUT.size, np.float32), 2, 0.5), "float32", rng)
    nan = encode_update(Update(np.full(LAYOUT.size, np.nan, np.float32), 2, 0.5), "float32", rng)
    far = encode_update(Update(np.full(LAYOUT.size, 1e30, np.float32), 2, 0.5), "float32", rng)
    greedy = encode_update(Update(np.ones(LAYOUT.size, np.float32), 1 << 60, 0.5), "float32", rng)
    for data, said in (
        (nan, "not finite"), (far, "over the limit"), (greedy, "claims 1152921504606846976 examples"), (b"xx", "encoding float32"),
        (good + b"0", "bytes, the plan allows"),
    ):  # fmt: skip
        with pytest.raises(GatewayRefusal, match=said) as refused:
            first.upload(tokens[first], data)
        assert refused.value.reason == pb.UNUSABLE
    with pytest.raises(GatewayRefusal, match="another device's"):
        first.upload(tokens[second], good)
    forged = bytearray(tokens[first])
    forged[12] ^= 1
    with pytest.raises(GatewayRefusal, match="round token"):
        first.upload(bytes(forged), good)
    assert first.upload(tokens[first], good) is False
    assert first.upload(tokens[first], good) is True
    with pytest.raises(GatewayRefusal, match="another upload of this device counts") as twice:
        first.upload(tokens[first], other)
    assert twice.value.reason == pb.OTHER_UPLOAD
    assert not second.report(pb.ReportBody(token=tokens[second], outcome=pb.WORKING, steps=3)).stop
    second.report(pb.ReportBody(token=tokens[second], outcome=pb.INELIGIBLE, text="no longer charging"))
    result = coordinator.result()
    check_mean_of_one(result, work_for([1])[0])
    with pytest.raises(GatewayRefusal, match=r"the round (is over|has what it needs)") as late:
        third.upload(tokens[third], good)
    assert late.value.reason == pb.LATE
    told = third.report(pb.ReportBody(token=tokens[third], outcome=pb.WORKING))
    assert told.stop
    assert told.reason in {"the round is over", "the round has what it needs"}
    reasons = dict(facts_of(result[0]).dropped).values()
    assert sorted(reasons) == ["ineligible: no longer charging", "no upload"]
    for one in clients:
        one.close()


def check_mean_of_one(replies, master):
    (reply,) = replies
    update = from_record(LAYOUT, only_record(reply, type(to_record(LAYOUT, master)))) - master
    np.testing.assert_allclose(update, 1.0, rtol=1e-5)


def test_too_few_devices_fail_the_round_with_numbers(deployment):
    grid = deployment.grid(selection(2, window=0.3))
    with pytest.raises(RoundFailed, match=r"0 devices checked in within 0\.3 s; the round needs 2"):
        grid.get_node_ids()
    devices = [Device(deployment, deployment.enrol(n), n) for n in range(2)]
    for one in devices:
        one.work = lambda *_: time.sleep(0.2)  # they take the plan and vanish
        one.start()
    grid = deployment.grid(selection(2, deadline=1.0))
    _, messages = work_for(grid.get_node_ids())
    with pytest.raises(RoundFailed, match=r"0 of 2 devices uploaded within 1 s; the round needs 2; client \d: no upload"):
        grid.send_and_receive(messages)
    for one in devices:
        one.rounds = 0
    finish(devices)


def test_revocation_quarantine_and_clocks(deployment):
    enrolled = deployment.enrol(1)
    store = open_gateway_store(deployment.store)
    client = deployment.client(enrolled)
    assert client.check_in(pb.CheckInBody()).wait.reason == "no round now"
    for skew in (-365 * 86400, 365 * 86400):
        wrong = deployment.client(enrolled, begin=abs(skew) + skew // 2, clock=lambda skew=skew: time.time() + skew)
        assert wrong.check_in(pb.CheckInBody()).wait.reason == "no round now"
        wrong.close()
    copy = deployment.client(enrolled, begin=store.device(enrolled.device).counter)
    with pytest.raises(GatewayRefusal, match="state was copied") as caught:
        copy.check_in(pb.CheckInBody())
    assert caught.value.reason == pb.QUARANTINED
    store.judge(enrolled.device, Standing.ACTIVE, "")
    later = deployment.client(enrolled, begin=10**12)
    later.check_in(pb.CheckInBody())
    assert later.renew().device == enrolled.device
    store.judge(enrolled.device, Standing.REVOKED, "stolen")
    for call in (lambda: later.check_in(pb.CheckInBody()), later.renew):
        with pytest.raises(GatewayRefusal, match="has been revoked") as caught:
            call()
        assert caught.value.reason == pb.REVOKED
    for one in (client, copy, later):
        one.close()
    store.close()


def test_a_certificate_that_ended_months_ago_is_renewed_and_a_store_that_was_lost_learns_of_the_device(tmp_path):
    deployment = Deployment(tmp_path)
    try:
        deployment.signer._days = -90
        enrolled = deployment.enrol(1)
        client = deployment.client(enrolled)
        with pytest.raises(GatewayRefusal, match="certificate has ended") as caught:
            client.check_in(pb.CheckInBody())
        assert caught.value.reason == pb.EXPIRED
        deployment.signer._days = 365
        assert client.renew().enrolment.certificate.not_after > time.time()
        client.check_in(pb.CheckInBody())
        deployment.end()
        for path in tmp_path.glob("state.sqlite*"):
            path.unlink()
        deployment.start()
        with pytest.raises(GatewayRefusal, match="not known here") as caught:
            client.check_in(pb.CheckInBody())
        assert caught.value.reason == pb.UNKNOWN_DEVICE
        client.renew()
        assert client.check_in(pb.CheckInBody()).wait.reason == "no round now"
        deployment.signer.revoke(enrolled.device)
        with pytest.raises(GatewayRefusal, match="not enrolled here any more"):
            client.renew()
        client.forget()
        with pytest.raises(GatewayRefusal, match="withdrawn by its owner"):
            client.check_in(pb.CheckInBody())
        deployment.end()
        for path in tmp_path.glob("state.sqlite*"):
            path.unlink()
        deployment.start()
        for call in (client.renew, lambda: client.check_in(pb.CheckInBody())):  # a revoked device is not learnt of again
            with pytest.raises(GatewayRefusal, match=r"not enrolled here any more|not known here"):
                call()
        client.close()
    finally:
        deployment.close()


def test_enrolment_refuses_other_trust_bundles_other_keys_and_closed_signers(deployment, tmp_path):
    address, key = deployment.addresses[0], Ed25519Key(os.urandom(32))
    token = deployment.signer.issue(600).encode()
    first = enrol(address, token, key)
    assert enrol(address, token, key) == first
    with pytest.raises(GatewayRefusal, match="used for another key"):
        enrol(address, token, Ed25519Key(os.urandom(32)))
    with pytest.raises(GatewayRefusal, match="enrolled already"):
        enrol(address, deployment.signer.issue(600).encode(), key)
    with pytest.raises(GatewayRefusal, match="expired"):
        enrol(address, deployment.signer.issue(-1).encode(), Ed25519Key(os.urandom(32)))
    elsewhere = make_fleet(tmp_path / "other", "watches").signer()
    with pytest.raises(Refused, match="another trust bundle than the enrolment token names"):
        enrol(address, elsewhere.issue(600).encode(), key)
    with pytest.raises(Refused, match="was it cut off"):
        enrol(address, token[:-5], key)
    deployment.enrolments.stop()
    with pytest.raises(GatewayRefusal, match="signer cannot be reached") as caught:
        enrol(address, deployment.signer.issue(600).encode(), Ed25519Key(os.urandom(32)))
    assert caught.value.reason == pb.ENROLMENT_CLOSED
    elsewhere.close()


# Strangers


def resident(deployment, i=0):
    pid = deployment.processes[i].pid
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw_call(deployment, method, data, metadata=None):
    """Bytes to a call, over TLS: the refusal's reason."""
    import grpc

    from fedcore.gateway.client import SERVICE, channel_to, failure_of

    channel = channel_to(deployment.addresses[0], deployment.fleet.trust())
    try:
        channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=20, metadata=metadata)
    except grpc.RpcError as error:
        return failure_of(error, "x")
    finally:
        channel.close()
    return None


def test_strangers_do_nothing_but_see_the_trust_bundle(deployment):
    """No call without an enrolled identity or a token of a round; forged, replayed, misdirected and malformed requests."""
    enrolled = deployment.enrol(1)
    stranger = Ed25519Key(os.urandom(32))
    requests = Requests(enrolled, itertools.count(1).__next__)
    body = pb.CheckInBody().SerializeToString()

    def reason(method, message):
        data = message if isinstance(message, bytes) else message.SerializeToString()
        found = raw_call(deployment, method, data)
        return pb.Reason.Name(found.reason) if isinstance(found, GatewayRefusal) else found

    for method in ("CheckIn", "Upload", "Report", "Forget"):
        assert reason(method, b"") == "PROTOCOL"
        assert reason(method, b"\xff\xff\xff") == "MALFORMED"
        assert reason(method, pb.SignedRequest(protocol=1, deployment="watches", nonce=bytes(16), counter=1)) == "UNKNOWN_DEVICE"
    assert reason("Renew", pb.SignedRequest(protocol=1, deployment="watches", nonce=bytes(16), counter=1)) == "MALFORMED"
    assert reason("Fetch", pb.FetchRequest(token=b"x" * 60, digest=bytes(32))) == "NO_SUCH_ROUND"
    assert reason("Stage", pb.StageRequest(token=b"x", digest=bytes(32))) == "NO_SUCH_ROUND"
    assert reason("Enroll", pb.EnrollRequest(token_id=bytes(16))) is None
    forged = Requests(type(enrolled)(stranger, enrolled.enrolment, enrolled.trust), itertools.count(100).__next__)
    assert reason("CheckIn", forged.sign("CheckIn", body).request) == "BAD_SIGNATURE"
    good = requests.sign("CheckIn", body).request
    for change in (
        {"counter": good.counter + 1}, {"time_ms": good.time_ms + 1}, {"nonce": bytes(16)}, {"body": b"\x12\x01"},
        {"signature": bytes(64)},
    ):  # fmt: skip
        changed = pb.SignedRequest()
        changed.CopyFrom(good)
        for name, value in change.items():
            setattr(changed, name, value)
        assert reason("CheckIn", changed) in {"BAD_SIGNATURE", "MALFORMED"}
    assert reason("Forget", good) == "BAD_SIGNATURE"  # another call than it was signed for
    assert reason("CheckIn", good) is None
    assert reason("CheckIn", good) == "REPLAYED"
    old = Requests(enrolled, itertools.count(50).__next__, clock=lambda: time.time() - 400)
    assert reason("CheckIn", old.sign("CheckIn", body).request) == "CLOCK"
    far = pb.SignedRequest()
    far.CopyFrom(requests.sign("CheckIn", body).request)
    far.protocol = 9
    assert raw_call(deployment, "CheckIn", far.SerializeToString()).lacks == ("protocol-1",)
    held = open_gateway_store(deployment.store)
    assert held.device(enrolled.device).standing is Standing.ACTIVE
    assert held.device(enrolled.device).counter == good.counter
    held.close()


def test_too_much_and_too_fast_is_refused(tmp_path):
    deployment = Deployment(tmp_path, limits={"rate": 1.0, "burst": 5.0, "patience": 1.0, "enrolments": 5.0})
    try:
        client = deployment.client(deployment.enrol(1))
        for _ in range(5):
            client.check_in(pb.CheckInBody())
        with pytest.raises(GatewayRefusal, match="too many requests") as fast:
            client.check_in(pb.CheckInBody())
        assert fast.value.reason == pb.TOO_FAST
        assert 0 < fast.value.retry_after <= 1001
        client.close()
        said = [raw_call(deployment, "Enroll", pb.EnrollRequest(token_id=bytes(16)).SerializeToString()) for _ in range(10)]
        assert any(isinstance(one, GatewayRefusal) and one.reason == pb.TOO_FAST for one in said)
        before = resident(deployment)
        large = b"\x3a\xff\xff\xff\x03" + bytes(8 << 20)
        for _ in range(20):
            assert isinstance(raw_call(deployment, "CheckIn", large), TryAgain)  # RESOURCE_EXHAUSTED, by its announced length
        assert resident(deployment) - before < 40 << 20
    finally:
        deployment.close()


def test_slow_loris_connections_cost_bounded_memory_and_nobody_else_their_turn(tmp_path):
    """Connections that never finish their handshake and calls whose request never comes are ended; others are served meanwhile."""
    import ssl

    import grpc

    from fedcore.gateway.client import SERVICE, channel_to

    limits = {"rate": 200.0, "burst": 200.0, "patience": 1.0, "handshake": 1.0, "reading": 8, "from_one": 4}
    deployment = Deployment(tmp_path, limits=limits)
    try:
        client = deployment.client(deployment.enrol(1))
        client.check_in(pb.CheckInBody())
        host, _, port = deployment.addresses[0].rpartition(":")
        before = resident(deployment)
        silent = [socket.create_connection((host, int(port))) for _ in range(100)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        secured = [context.wrap_socket(socket.create_connection((host, int(port)))) for _ in range(20)]
        channel = channel_to(deployment.addresses[0], deployment.fleet.trust())
        never = threading.Event()
        hanging = [
            channel.stream_unary(f"/{SERVICE}/CheckIn").future(iter(lambda: never.wait(30) and b"", b"")) for _ in range(8)
        ]  # fmt: skip
        assert client.check_in(pb.CheckInBody()).wait.reason == "no round now"
        for one in hanging:
            assert one.exception(timeout=20).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert resident(deployment) - before < 30 << 20
        for one in silent:
            one.settimeout(15)
            while one.recv(1000):  # until the gateway closes it
                pass
        never.set()
        channel.close()
        for one in (*silent, *secured):
            one.close()
        client.close()
    finally:
        deployment.close()


def test_without_tls_a_gateway_answers_on_this_machine_alone(tmp_path):
    deployment = Deployment(tmp_path, tls="")
    try:
        token = deployment.signer.issue(600).encode()
        enrolled = enrol(deployment.addresses[0], token, Ed25519Key(os.urandom(32)), plain=True)
        client = GatewayClient(deployment.addresses[0], Requests(enrolled, itertools.count(1).__next__), plain=True)
        assert client.check_in(pb.CheckInBody()).wait.reason == "no round now"
        client.close()
        with pytest.raises(Refused, match="only spoken to over TLS"):
            GatewayClient("192.0.2.1:7000", Requests(enrolled, itertools.count(1).__next__), plain=True)
        file = tmp_path / "open.json"
        file.write_text(json.dumps(deployment.settings | {"listen": "0.0.0.0:0"}))
        command = [sys.executable, "-m", "fedcore.gateway.process", str(file)]
        told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        assert (told.returncode, told.stdout) == (1, "")
        assert "0.0.0.0:0 can be reached from elsewhere, so it takes TLS" in told.stderr
    finally:
        deployment.close()
