"""Secure aggregation over devices: `SecureGrid` around `DeviceGrid`, a real gateway process, masked uploads."""

import itertools
import os
import threading
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from gateway_deployment import LAYOUT, Deployment, selection

from fedcore.errors import TryAgain
from fedcore.flower import facts_of, from_record, only_record, to_record
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import GatewayClient, Requests, may_pass
from fedcore.gateway.plan import to_table
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.grids.secure import SecureGrid, Terms
from fedcore.secagg.committee import local_committee
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.driver import Committee
from fedcore.secagg.participant import Demands, Participant, Visit, hash_work
from fedcore.secagg.plan import Policy
from fedcore.secagg.sums import plan_update_sum
from fedcore.secagg.trust import issue_certificate
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

POLICY = Policy(minimum_survivors=3, corrupt_clients=1, noise_multiplier=0.0)


class SecureDevice(threading.Thread):
    """A device that masks; one that ``vanishes`` checks in with its key and is not heard of again."""

    def __init__(self, deployment, number, local, *, vanishes=False):
        super().__init__(daemon=True)
        key = Ed25519Key(os.urandom(32))
        certificate = issue_certificate(local.enrolment, "watches", key.algorithm, key.public, int(time.time()) + 10**7)
        self.participant = Participant(key, certificate, local.trust, Demands(POLICY, POLICY))
        self.enrolled, self.number, self.vanishes, self.problem = deployment.enrol(number), number, vanishes, None
        self.counter = itertools.count(1)
        self.requests = Requests(self.enrolled, lambda: next(self.counter))
        self.client = GatewayClient(deployment.addresses[0], self.requests)

    def run(self):
        try:
            visit, key, round_key = None, b"", b""
            while True:
                try:
                    reply = self.client.check_in(pb.CheckInBody(round_key=round_key))
                except (TryAgain, GatewayRefusal) as error:
                    if not may_pass(error):
                        raise
                    continue
                if reply.HasField("visit"):
                    visit, key = Visit(reply.visit.task, reply.visit.epoch, reply.visit.expiry), os.urandom(32)
                    round_key = self.participant.check_in(key, visit)
                elif reply.HasField("assignment"):
                    return None if self.vanishes else self.work(reply.assignment, visit, key)
                else:
                    time.sleep(0.05)
        except Exception as error:  # noqa: BLE001 - told by the test
            self.problem = error
        finally:
            self.client.close()

    def work(self, assignment, visit, key):
        plan = self.requests.check_plan(assignment)
        table = to_table(plan)
        model = self.client.fetch_whole(assignment.token, plan.blobs[0])
        release = RoundTask.from_table(table).release
        accepted = self.participant.accept(key, visit, assignment.invitation, hash_work(model, table), release)
        update = np.full(LAYOUT.size, self.number / 10, np.float32)
        upload = accepted.upload(release.contribution(update, self.number, 0.5, os.urandom))
        assert self.client.upload(assignment.token, upload) is False
        assert self.client.upload(assignment.token, upload) is True  # resent verbatim


@pytest.mark.parametrize("vanishing", [(), (2,)], ids=["all stay", "one goes"])
def test_a_secure_round_over_devices_gives_the_sum_of_those_who_stayed(tmp_path, vanishing):
    deployment = Deployment(tmp_path)
    local = local_committee(3, 3, 2, "watches", POLICY)
    try:
        devices = [SecureDevice(deployment, number, local, vanishes=number in vanishing) for number in range(1, 6)]
        inner = deployment.grid(selection(5, minimum=3, deadline=8.0 if vanishing else 30.0))
        committee = Committee(local.trust, POLICY, local.members)
        grid = SecureGrid(inner, LAYOUT, Terms(1, 1, 0, 0.1, 1, 0), committee, "run/secret")
        for one in devices:
            one.start()
        nodes = grid.get_node_ids()
        assert len(nodes) == 5
        total = plan_update_sum(LAYOUT.size, 5, minimum_survivors=3, clip=1.0, weight_cap=10, bits=32)
        master = np.arange(LAYOUT.size, dtype=np.float32) / 7
        config = ConfigRecord(RoundTask(1, LocalPlan(1, 8, 0.1), 1e6, release=total).to_table())
        content = RecordDict({"arrays": to_record(LAYOUT, master), "config": config})
        (reply,) = grid.send_and_receive([Message(content, node, MessageType.TRAIN) for node in nodes], timeout=90)
        for one in devices:
            one.join(60)
            assert one.problem is None
        stayed = np.array([number for number in range(1, 6) if number not in vanishing])
        update = from_record(LAYOUT, only_record(reply, type(content["arrays"]))) - master
        np.testing.assert_allclose(update, (stayed * stayed / 10).sum() / stayed.sum(), atol=1e-4)
        assert facts_of(reply).survivors == len(stayed)
        assert not list((deployment.blobs / "blobs").glob("*/*"))
    finally:
        deployment.close()
        local.close()
