"""Whole rounds over real processes on loopback with TLS: gateways that are killed, replicas on one store, devices that speak the
protocol, and a coordinator's grid."""

import hashlib
import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from gateway_deployment import (
    LAYOUT,
    Deployment,
    Device,
    OneRound,
    assigned,
    check_mean,
    finish,
    selection,
    work_for,
)
from redis_server import RedisServer

from fedcore.errors import Refused, RoundFailed
from fedcore.flower import facts_of, from_record, only_record, to_record
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import GatewayClient, Requests, enrol
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.grids.device import Offering
from fedcore.models import ParameterLayout
from fedcore.quantization.wire import Update, encode_update
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Standing
from fedcore.state.stores import open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan


@pytest.mark.parametrize("store", ["sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def test_a_round_survives_gateways_that_are_killed_between_uploads(tmp_path, store):
    """Two replicas, one of them killed with -9 again and again while ten devices upload: the mean is exact."""
    redis = RedisServer() if store == "redis" else None
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
            redis.remove()


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
            one.join(60)
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
        one.join(60)
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
