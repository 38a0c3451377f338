"""Releases over a real gateway on loopback: the repository, read through ``Fetch`` by a device's own client."""

import asyncio
import contextlib
import hashlib
import itertools
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.client import GatewayClient, Requests, enrol
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.door import GatewaySettings
from fedcore.gateway.identity import issue_token
from fedcore.gateway.limits import Limits
from fedcore.gateway.metrics import exposition
from fedcore.gateway.process import GatewayServer
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.registry.assignment import check_assignment
from fedcore.registry.catalogue import artefact
from fedcore.registry.client import Client
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create, load, publish, renew
from fedcore.registry.roles import target_name
from fedcore.registry.rollout import Plan, command, new_rollout
from fedcore.registry.rollout_record import encode_rollout
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.keys import read_signing_key
from fedcore.state.releases import RolloutEntry
from fedcore.state.stores import open_gateway_store

MODEL = bytes(range(256)) * 4000  # longer than a piece


class Served:
    """A repository with one release, its rollout full, and a gateway in this process."""

    def __init__(self, folder, limits):
        now = datetime.now(UTC)
        self.files = LocalFiles(folder / "repository")
        keys = make_keys(folder / "offline", folder / "online", 1, 1, publishes=True)
        self.signers = load_signers([folder / "offline", folder / "online"])
        create(self.files, keys, self.signers, now)
        publish(self.files, [artefact("digits", 1, "flagship", "onnx", "model.onnx", MODEL)], self.signers, now)
        self.root = self.files.read("metadata/1.root.json")
        self.fleet = make_fleet(folder / "fleet", "watches", update_root=self.root)
        self.signer = self.fleet.signer()
        self.store = open_gateway_store(str(folder / "state.sqlite"))
        plan = Plan("digits-1", "digits", 1, 0, 1)
        targets = {1: load(self.files).catalogue().digest("digits", 1).hex()}
        state = command(replace(new_rollout(plan, bytes(32)), targets=targets), "start")
        self.store.releases.advance_rollout(RolloutEntry("digits-1", "digits", 1, 1, encode_rollout(state).decode()))
        self.settings = GatewaySettings.of(
            self.fleet.trust(), read_signing_key(self.fleet.time_key), b"s" * 32, signer=self.signer, limits=limits,
            repository=self.files, release_every=2.0,
        )  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.run(self.begin(folder))
        self.counter = itertools.count(1)

    async def begin(self, folder):
        where = str(folder / "state.sqlite")
        server = GatewayServer(
            self.settings, lambda: open_gateway_store(where), Blobs(folder / "blobs"), "127.0.0.1:0", tls=None
        )  # fmt: skip
        await server.start()
        return server

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def device(self, number, labels=()):
        key = Ed25519Key(hashlib.sha256(b"%d" % number).digest())
        enrolled = enrol(self.server.address, self.signer.issue(600, labels).encode(), key, plain=True)
        return GatewayClient(self.server.address, Requests(enrolled, lambda: next(self.counter)), plain=True), enrolled

    def close(self):
        self.run(self.server.stop(0.1))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()
        self.store.close()
        self.signer.close()


@pytest.fixture
def served(tmp_path, request):
    one = Served(tmp_path, getattr(request, "param", Limits(rate=100, burst=400)))
    yield one
    one.close()


@pytest.mark.parametrize("served", [Limits(rate=100, burst=400, grace=3.0, slowest=2e7, downloads=1)], indirect=True)
def test_who_takes_too_long_to_read_a_stream_loses_it_and_goes_on_where_it_stopped(served, tmp_path, caplog):
    """A reader that stops costs a file and a place among the calls for a while, and not for ever."""
    import grpc

    from fedcore.gateway.client import SERVICE, failure_of

    client, _ = served.device(1)
    token, meter = client.release(BODY).token, served.server.gateway.meter
    entry = load(served.files).catalogue().artefact("digits", 1, "flagship", "onnx")
    name = target_name(entry.path, entry.digest.hex())
    served.files.write(f"{name}.long", MODEL * 8)  # more than what gRPC holds for a reader on both sides
    # A window that grows with the connection's delay takes the whole file on a busy machine, unread.
    channel = grpc.insecure_channel(served.server.address, (("grpc.http2.bdp_probe", 0),))

    def wanted(offset):
        asked = pb.FetchRequest(token=token, name=f"{name}.long", offset=offset).SerializeToString()
        return channel.stream_stream(f"/{SERVICE}/Fetch")(iter([asked]))

    replies = wanted(0)
    held = [pb.FetchReply.FromString(next(replies))]
    with pytest.raises(grpc.RpcError) as full:
        next(wanted(0))
    assert failure_of(full.value, "Fetch").reason == pb.TOO_FAST
    until = time.monotonic() + 120
    while not (meter.slow["Fetch"] and not meter.flying["Fetch"]):
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(grpc.RpcError) as ended:
        held.extend(pb.FetchReply.FromString(one) for one in replies)
    told = failure_of(ended.value, "Fetch")
    assert (told.reason, "go on where it stopped" in str(told)) == (pb.BUSY, True)
    taken = b"".join(one.data for one in held)
    assert 0 < len(taken) < len(MODEL) * 8
    assert taken == (MODEL * 8)[: len(taken)]
    assert sum("a reader took no more than" in one.message for one in caplog.records) == 1
    assert 'fedcore_gateway_slow_readers_total{method="Fetch"} 1' in exposition(meter.families())
    while len(taken) < len(MODEL) * 8:
        assert time.monotonic() < until
        with contextlib.suppress(grpc.RpcError):  # on a busy machine it takes several turns
            for one in wanted(len(taken)):
                taken += pb.FetchReply.FromString(one).data
    assert taken == MODEL * 8
    channel.close()
    client.close()


def test_a_device_that_enrols_has_the_labels_of_its_token_whatever_it_says(served):
    client, enrolled = served.device(1, ["lab"])
    other, _ = served.device(2)
    for one in (client, other):
        one.release(pb.ReleaseBody(model="digits", labels=["gold"]))
    assert sorted(held.labels for held in served.store.releases.holdings("digits")) == [(), ("lab",)]
    served.signer.label(enrolled.device, ["beta"])
    client.renew()
    assert served.store.device(enrolled.device).labels == ("beta",)
    client.close()
    other.close()


BODY = pb.ReleaseBody(model="digits", tier="flagship", runtime="onnx", hardware="Pi 5")


def test_a_device_reads_what_it_is_assigned_from_its_gateway_and_checks_it_by_the_root_that_it_pinned(served, tmp_path):
    client, enrolled = served.device(1)
    reply = client.release(BODY)
    assert 1600 <= reply.retry_after_ms <= 2400
    mine, now = hashlib.sha256(enrolled.key.public).digest(), datetime.now(UTC)
    found = check_assignment(reply.assignment, enrolled.trust.time_keys, mine, 0, now.timestamp())
    assert (found.model, found.version, found.rollout) == ("digits", 1, "digits-1")
    reader = Client(tmp_path / "device", client.repository(reply.token), enrolled.trust.update_root)
    catalogue = reader.refresh(now, 60)
    assert catalogue.digest("digits", 1) == found.target
    entry = catalogue.artefact("digits", 1, "flagship", "onnx")
    half = tmp_path / "device" / "partial" / entry.digest.hex()
    half.write_bytes(MODEL[:700_001])  # a download that was interrupted goes on
    assert reader.download(entry, 60).read_bytes() == MODEL
    renew(served.files, served.signers, datetime.now(UTC))  # a file that changes under its name
    assert reader.refresh(datetime.now(UTC), 60) == catalogue
    second = client.release(BODY)
    assert check_assignment(second.assignment, enrolled.trust.time_keys, mine, found.sequence, now.timestamp())
    with pytest.raises(Refused, match="not newer"):
        check_assignment(reply.assignment, enrolled.trust.time_keys, mine, found.sequence, now.timestamp())
    client.close()


def test_who_shows_no_token_for_the_repository_reads_nothing_of_it(served):
    client, enrolled = served.device(2)
    token, secret = client.release(BODY).token, served.settings.token_secret
    ahead = 2**43  # milliseconds
    for wrong, said in (
        (b"", "cannot be read"), (token[:-1] + bytes([token[-1] ^ 1]), "not one of this fleet"),
        (issue_token(secret, enrolled.device, "run-1", ahead), "a round's"),
        (issue_token(b"x" * 32, 5, "*release repository", ahead), "not one of"),
        (issue_token(secret, enrolled.device, "*release repository", 1), "is over"),
    ):  # fmt: skip
        request = pb.FetchRequest(token=wrong, name="metadata/timestamp.json")
        with pytest.raises(GatewayRefusal, match=said):
            list(client.replies(request, 30))
        with pytest.raises(TryAgain, match="timestamp"), client.repository(wrong).open("metadata/timestamp.json", 0, 30):
            pass
    with pytest.raises(GatewayRefusal, match="round is over"):  # and the repository's token opens no blob
        list(client.fetch(token, bytes(32)))
    for name in ("../offline/targets.key", "metadata/../../offline/root-1.key", ".lock", "metadata/9.root.json"):
        with client.repository(token).open(name, 0, 30) as reply:
            assert reply is None
    with client.repository(token).open("metadata/timestamp.json", 3, 30) as reply:
        assert b"".join(reply.pieces) == served.files.read("metadata/timestamp.json")[3:]
    bounded = list(client.replies(pb.FetchRequest(token=token, name="metadata/1.root.json", offset=1, length=5), 30))
    assert b"".join(one.data for one in bounded) == served.root[1:6]
    client.close()


@pytest.mark.parametrize("served", [Limits(rate=0.001, burst=2)], indirect=True)
def test_a_device_that_reads_too_much_waits(served):
    client, _ = served.device(3)
    token = client.release(BODY).token
    repository = client.repository(token)

    def read_often():
        for _ in range(60):
            with repository.open("metadata/timestamp.json", 0, 30) as reply:
                assert b"".join(reply.pieces)

    with pytest.raises(TryAgain, match="too many requests"):
        read_often()
    client.close()


def test_only_the_device_itself_is_told_its_release(served):
    client, enrolled = served.device(4)
    other, _ = served.device(5)
    stolen = Requests(replace(enrolled, key=Ed25519Key(b"z" * 32)), lambda: next(served.counter))
    thief = GatewayClient(served.server.address, stolen, plain=True)
    with pytest.raises(GatewayRefusal) as refusal:
        thief.release(BODY)
    assert refusal.value.reason == pb.BAD_SIGNATURE
    targets = {hashlib.sha256(one.release(BODY).assignment[2:34]).digest() for one in (client, other)}
    assert len(targets) == 2
    for one in (client, other, thief):
        one.close()
