"""Blobs that nothing names any more: forgotten by every gateway, after long enough, and never one that a plan names or may name."""

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
import time

import pytest

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.commits import Committer
from fedcore.gateway.door import GatewaySettings
from fedcore.gateway.fleet import Selection
from fedcore.gateway.messages import FleetTrust
from fedcore.gateway.rounds import Place, RoundDocument, named_blobs
from fedcore.gateway.service import Gateway
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Contribution, Device, Round, RoundState
from fedcore.state.stores import open_gateway_store


def aged(folder, digest, seconds):
    path = folder / "blobs" / digest.hex()
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_blobs_that_nothing_names_for_long_are_forgotten_and_no_others(tmp_path):
    blobs = Blobs(tmp_path)
    named, old, fresh, again = (blobs.put(word) for word in (b"named", b"old", b"fresh", b"again"))
    for digest in (named, old, again):
        aged(tmp_path, digest, 1000)
    (tmp_path / "blobs" / ".new-torn").write_bytes(b"x")  # a kill left it
    os.utime(tmp_path / "blobs" / ".new-torn", (1, 1))
    assert blobs.put(b"again") == again  # as new as the first time: a plan may name it now
    assert blobs.collect({named}, 900) == 2
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {one.hex() for one in (named, fresh, again)}
    with pytest.raises(Refused, match="there is no blob"):
        blobs.get(old)
    assert blobs.collect(set(), 900) == 0, "what was named until now stays for as long again"
    aged(tmp_path, named, 1000)
    assert blobs.collect(set(), 900) == 1
    assert blobs.put(b"old") == old
    assert blobs.get(old) == b"old"


def test_who_puts_a_blob_has_it_though_others_forget_blobs_at_the_same_time(tmp_path):
    blobs, stopped, lost = Blobs(tmp_path), threading.Event(), []

    def forget():
        while not stopped.is_set():
            blobs.collect(set(), 500)

    threads = [threading.Thread(target=forget) for _ in range(2)]
    for one in threads:
        one.start()
    for number in range(400):
        with contextlib.suppress(FileNotFoundError):  # old again; or forgotten meanwhile
            aged(tmp_path, hashlib.sha256(b"blob").digest(), 1000)
        if blobs.get(blobs.put(b"blob")) != b"blob":
            lost.append(number)
    stopped.set()
    for one in threads:
        one.join()
    assert lost == []


def test_what_rounds_name_is_what_the_store_says(tmp_path):
    store = open_gateway_store(str(tmp_path / "s.sqlite"))
    digests = [bytes([n]) * 32 for n in range(6)]
    plan = pb.Plan(blobs=[pb.Blob(name="model", digest=digests[0]), pb.Blob(name="step", digest=digests[1])])
    signed = pb.SignedPlan(plan=plan.SerializeToString()).SerializeToString()
    document = RoundDocument(Selection(1, 1, 9.0, 70.0), 0.0, plans=(signed,), cohort={1: Place(0, digests[2]), 2: Place(0)})
    store.register(Device(1, 1, bytes(32), 2**40, 0.0))
    for version, state in ((1, RoundState.FORMING), (2, RoundState.RUNNING)):
        store.advance(Round("r", "task", 1, state, version, document.encode()))
    store.accept("r", "w", b"", [Contribution(1, digests[3])])
    store.advance(Round("s", "task", 2, RoundState.FORMING, 1, RoundDocument(Selection(1, 1, 9.0, 50.0), 0.0).encode()))
    assert named_blobs(store) == (set(digests[:4]), 70.0)
    store.advance(Round("r", "task", 1, RoundState.CLOSED, 3, document.encode()))
    assert named_blobs(store)[0] == set(digests[:4]), "a round that is over is still read"
    store.prune(time.time(), time.time() + 60)
    assert named_blobs(store) == (set(), 50.0)
    store.advance(Round("t", "task", 3, RoundState.FORMING, 1, "{}"))
    with pytest.raises(Refused, match="cannot be read"):
        named_blobs(store)
    store.close()


def test_a_gateway_forgets_the_blobs_of_failed_rounds_and_nothing_where_the_store_cannot_be_read(tmp_path, caplog):
    where, blobs = str(tmp_path / "s.sqlite"), Blobs(tmp_path)
    store = open_gateway_store(where)
    kept, failed = blobs.put(b"model of a round that goes on"), blobs.put(b"model of a round that failed")
    plan = pb.SignedPlan(plan=pb.Plan(blobs=[pb.Blob(name="model", digest=kept)]).SerializeToString())
    document = RoundDocument(Selection(1, 1, 9.0, 600.0), 0.0, plans=(plan.SerializeToString(),))
    store.advance(Round("r", "task", 1, RoundState.FORMING, 1, document.encode()))
    trust = FleetTrust("watches", bytes(32), (bytes(32),), (Ed25519Key(bytes(32)).public,), (bytes(32),), b"", b"", b"")
    settings = GatewaySettings(trust, Ed25519Key(bytes(32)), b"s" * 32)
    committer = Committer(lambda: open_gateway_store(where))

    async def look():
        await Gateway(settings, committer, blobs)._forget_blobs()

    day, windows = 86_400, 100 * 600
    for digest in (kept, failed):
        aged(tmp_path, digest, day + windows - 600)
    asyncio.run(look())
    assert blobs.get(failed)
    assert not caplog.records
    store.advance(Round("broken", "task", 2, RoundState.FORMING, 1, "{}"))
    aged(tmp_path, failed, day + windows + 600)
    with pytest.raises(Refused):
        asyncio.run(look())
    assert blobs.get(failed)
    store.advance(Round("broken", "task", 2, RoundState.CLOSED, 2, document.encode()))
    caplog.set_level(logging.INFO)
    asyncio.run(look())
    assert blobs.get(kept)
    with pytest.raises(Refused, match="there is no blob"):
        blobs.get(failed)
    assert [one.getMessage() for one in caplog.records] == ["1 blobs that no round names were removed"]
    committer.close()
    store.close()
