"""A fleet for an agent, without a network: plans signed by real keys, and a gateway that keeps the protocol's promises."""

import hashlib
import itertools
import time

import numpy as np
from device_worlds import examples, exported, start_of
from fedcore_device.environment import Conditions
from fedcore_device.policy import PlanPolicy, Policy
from fedcore_device.rounds import RoundWork
from fedcore_device.state import State
from small_zoo import network

from fedcore.errors import TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled, Requests
from fedcore.gateway.identity import server_time
from fedcore.gateway.messages import Enrolment, FleetTrust
from fedcore.gateway.plan import sign_plan, to_settings
from fedcore.models import layout_of
from fedcore.portable.signature import sign_step
from fedcore.quantization.wire import encode_model
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.trust import issue_certificate
from fedcore.training.client import RoundTask
from fedcore.training.plan import DpSgdPlan, LocalPlan

DEPLOYMENT, TASK, DEVICE = "watches", "run-1", 7
ENROLMENT, PLAN, TIME, PUBLISHER, OTHER, IDENTITY = (Ed25519Key(bytes([i]) * 32) for i in range(1, 7))
TRUST = FleetTrust(DEPLOYMENT, ENROLMENT.public, (PLAN.public,), (TIME.public,), (PUBLISHER.public,), b"", b"", b"")
LOOSE = Policy(PlanPolicy(secure_aggregation=False, noise_multiplier=0.0, minimum_devices=1, corrupt_devices=0))
LOCAL = LocalPlan(2, 4, 0.1, 0.5, 0.0)


def enrolled():
    certificate = issue_certificate(ENROLMENT, DEPLOYMENT, 1, IDENTITY.public, int(time.time()) + 365 * 86_400)
    return Enrolled(IDENTITY, Enrolment(DEVICE, certificate, bytes(64)), TRUST)


class Gateway:
    """What a device hears; ``fails`` counts down calls of a name that break off, ``pieces`` is the size of a transfer's pieces."""

    def __init__(self):
        self.blobs, self.reports, self.uploads, self.offsets = {}, [], [], []
        self.fails, self.refusals, self.pieces, self.stop, self.replies, self.asked = {}, {}, 4096, False, [], []

    def _may(self, name):
        if self.refusals.get(name):
            raise self.refusals[name].pop()
        if self.fails.get(name, 0) > 0:
            self.fails[name] -= 1
            raise TryAgain(f"{name} broke off")

    def put(self, name, data):
        digest = hashlib.sha256(data).digest()
        self.blobs[digest] = data
        return pb.Blob(name=name, digest=digest, size=len(data))

    def check_in(self, body):
        self.asked.append(body)
        self._may("check_in")
        return self.replies.pop(0)

    def fetch(self, token, digest, offset=0):
        self.offsets.append(offset)
        data = self.blobs[digest]
        for at in range(offset, len(data), self.pieces):
            if at > offset:
                self._may("fetch")
            yield data[at : at + self.pieces]

    def upload(self, token, data):
        self.uploads.append(data)
        self._may("upload")
        return len(self.uploads) > 1

    def report(self, body):
        self._may("report")
        self.reports.append(body)
        return pb.ReportReply(stop=self.stop, reason="the round has what it needs")

    def forget(self):
        self._may("forget")

    def renew(self):
        self._may("renew")
        return enrolled()

    def close(self):
        pass


class World:
    """A device's environment: ``now`` is a list of conditions, the last of which stays."""

    def __init__(self, directory, size=23, *now):
        x, y = examples("mlp", size)
        directory.mkdir(exist_ok=True)
        np.savez(directory / "examples.npz", x=x, y=y)
        self.x, self.y, self.examples = x, y, str(directory)
        self.now, self.offset = list(now) or [Conditions(free_storage=1 << 40)], 0.0

    def conditions(self, *, training):
        return self.now.pop(0) if len(self.now) > 1 else self.now[0]

    def clock(self):
        return time.time() + self.offset


def step_blobs(gateway, data, key=PUBLISHER):
    return [gateway.put("step", data), gateway.put("step-signature", sign_step(key, data))]


def settings(number=1, local=LOCAL, **more):
    return RoundTask(number, local, 1e6).to_table() | more


def plan(gateway, *, unit="", local=LOCAL, blobs=None, seconds=60.0, table=None, **fields):
    """A complete plan of the mlp; ``fields`` take the place of its own."""
    model = network("mlp")
    layout = layout_of(model, trainable=True)
    found = pb.Plan(
        deployment=DEPLOYMENT, task=TASK, round=5, kind=pb.TRAIN, aggregation=pb.MEAN, issued_ms=int(1000 * time.time()),
        expires_ms=int(1000 * (time.time() + seconds)), settings=to_settings(table or settings(local=local)),
        upload_encoding="float32", most_upload_bytes=1 << 20, values=layout.size, minimum_uploads=1, server_round=1,
        capabilities=["accumulate-1"],
        blobs=[gateway.put("model", encode_model(layout.wire_tensors(start_of(model))))]
        + (step_blobs(gateway, exported("mlp", unit=unit).data) if blobs is None else blobs),
    )  # fmt: skip
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def private(noise=1.0):
    return LocalPlan(1, 4, 0.1, dp=DpSgdPlan(1.0, noise))


def assignment(found, key=PLAN):
    return pb.Assignment(plan=sign_plan(key, found), token=b"token")


def doing(state, world, gateway, policy=LOOSE, stopped=lambda: False, draw=None, native=()):
    counter = itertools.count(1)
    requests = Requests(enrolled(), lambda: next(counter), clock=world.clock, floor=state.floor)
    return RoundWork(state, world, policy, requests, gateway, draw or fixed_draw, stopped, native)


def fixed_draw(_):
    return {"entropy": "07", "noise_key": bytes(16).hex()}


def told(sent, now=None):
    """The gateway's clock for a request."""
    return server_time(TIME, DEPLOYMENT, sent.request.nonce, now or int(1000 * time.time()))


def fresh_state(directory):
    return State(directory)
