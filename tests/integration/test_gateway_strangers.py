"""What a gateway does for those whom it does not know, or who ask for too much."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gateway_deployment import ROOT, Deployment

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import GatewayClient, Requests, enrol
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Standing
from fedcore.state.stores import open_gateway_store


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
