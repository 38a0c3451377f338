"""Gateways as processes on loopback with TLS, devices that speak the protocol, and a coordinator's grid."""

import contextlib
import hashlib
import itertools
import json
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

from fedcore.errors import TryAgain
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
from fedcore.state.stores import open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

ROOT = Path(__file__).parents[2]
LAYOUT = ParameterLayout(("w", "b"), ((20, 30), (30,)), ("fp32", "fp32"))


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
        code = process.wait(60)
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
        self.join(90)
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
