"""What goes wrong is drawn from a seed, and what proxies do to bytes and messages is what was drawn."""

import asyncio
import contextlib
import itertools
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from fedcore.chaos.faults import Fate, Faults, blows, mangled
from fedcore.chaos.journal import Entry, append, read_journal
from fedcore.chaos.relay import MessageRelay
from fedcore.chaos.wire import WireProxy
from fedcore.errors import Refused
from fedcore.gateway.client import channel_to
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.tls import read_tls


def test_fates_come_as_often_as_was_asked_and_the_same_for_a_seed():
    faults = Faults(drop=0.1, duplicate=0.05, delay=0.2, corrupt=0.15)
    drawn = [[faults.draw(rng) for _ in range(20_000)] for rng in (random.Random(1), random.Random(1), random.Random(2))]
    assert drawn[0] == drawn[1] != drawn[2]
    found = Counter(drawn[0])
    for fate, chance in ((Fate.DROP, 0.1), (Fate.DUPLICATE, 0.05), (Fate.DELAY, 0.2), (Fate.CORRUPT, 0.15), (None, 0.5)):
        assert abs(found[fate] / 20_000 - chance) < 0.015
    assert not {Fate.REORDER, Fate.TRUNCATE} & set(found)


@pytest.mark.parametrize("texts", [["drop"], ["drop=x"], ["speed=1"], ["drop=0.6", "delay=0.6"], ["drop=-1"], ["seconds=nan"]])
def test_faults_that_make_no_sense_are_refused(texts):
    with pytest.raises(Refused, match="faults: "):
        Faults.parse(texts)
    assert Faults.parse(["drop=0.5", "seconds=2"]) == Faults(drop=0.5, seconds=2.0)


def test_blows_hit_everybody_before_anybody_twice_and_repeat_for_a_seed():
    series = [list(itertools.islice(blows(seed, ["a", "b"], ["a"], 2.0), 30)) for seed in (4, 4, 5)]
    assert series[0] == series[1] != series[2]
    for start in range(0, 30, 3):
        assert {(one.kind, one.target) for one in series[0][start : start + 3]} == {("kill", "a"), ("kill", "b"), ("disk", "a")}
    assert all(1.0 <= one.pause <= 3.0 for one in series[0])
    with pytest.raises(Refused, match="no process"):
        next(blows(1, [], [], 1.0))


def test_one_bit_is_turned_over():
    data, rng = bytes(range(200)), random.Random(3)
    for _ in range(50):
        found = mangled(data, rng)
        assert sum((a ^ b).bit_count() for a, b in zip(data, found, strict=True)) == 1
    assert mangled(b"", rng) == b""


def test_a_journal_survives_a_line_that_was_cut_off_and_reads_agents_logs_too(tmp_path):
    journal, entry = tmp_path / "journal", Entry("acknowledged", "t-1", 7, "ab" * 32)
    append(journal, entry)
    with journal.open("ab") as file:
        file.write(b'{"event": "acknow')
    append(journal, Entry("made", "t-1", 8, "cd" * 32))
    assert read_journal(journal) == [entry, Entry("made", "t-1", 8, "cd" * 32)]
    log = tmp_path / "agent.log"
    log.write_text(f"INFO round 9 of t-1\nINFO upload acknowledged: round 9 of t-1, sha256 {'ef' * 32}\n")
    assert read_journal(log) == [Entry("acknowledged", "t-1", 9, "ef" * 32)]
    with pytest.raises(Refused, match="cannot be read"):
        read_journal(tmp_path / "none")


PIECES = [bytes([i]) * 1000 for i in range(8)]


async def through(faults, seed=1):
    """What arrives of pieces that are sent one by one through a proxy, and what the proxy says that it did."""
    arrived = []

    async def sink(reader, writer):
        arrived.append(await reader.read(-1))
        writer.close()

    server = await asyncio.start_server(sink, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = WireProxy("127.0.0.1:0", [f"127.0.0.1:{port}"], faults, seed)
    await proxy.start()
    _, writer = await asyncio.open_connection(*proxy.address.split(":"))
    try:
        with contextlib.suppress(ConnectionError):  # the proxy may close it
            for piece in PIECES:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.03)
        writer.close()
        async with asyncio.timeout(30):
            while not arrived:
                await asyncio.sleep(0.01)
    finally:
        await proxy.stop()
        server.close()
    return arrived[0], proxy.happened


@pytest.mark.parametrize("fate", list(Fate))
def test_a_proxy_does_to_a_stream_what_it_says(fate):
    whole = b"".join(PIECES)
    found, happened = asyncio.run(through(Faults(**{fate.value: 0.4}, seconds=0.1)))
    assert happened[fate] >= 1
    if fate is Fate.DELAY:
        assert found == whole
    elif fate is Fate.CORRUPT:
        assert len(found) == len(whole)
        assert sum((a ^ b).bit_count() for a, b in zip(found, whole, strict=True)) == happened[fate]
    elif fate is Fate.DUPLICATE:
        assert len(found) == len(whole) + 1000 * happened[fate]
    else:
        assert found != whole
        assert len(found) < len(whole) or fate is Fate.REORDER


def test_without_faults_a_proxy_changes_nothing_and_a_seed_repeats_its_faults():
    whole, happened = asyncio.run(through(Faults()))
    assert whole == b"".join(PIECES)
    assert happened == Counter(connections=1)
    one, other = (asyncio.run(through(Faults(corrupt=0.5, seconds=0.1), seed=9))[0] for _ in range(2))
    assert one == other != whole


def test_a_proxy_whose_gateway_is_away_closes_connections():
    async def tried():
        proxy = WireProxy("127.0.0.1:0", ["127.0.0.1:1"], Faults(), 1)
        await proxy.start()
        reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
        await proxy.stop()
        with pytest.raises(Refused, match="HOST:PORT"):
            WireProxy("nowhere", ["127.0.0.1:1"], Faults(), 1)
        return proxy.happened["unreachable"]

    assert asyncio.run(tried()) == 1


class Echo:
    """A gateway that answers every request with itself and remembers it; it refuses what begins with "no"."""

    def __init__(self, fleet):
        self.heard, self.server = [], grpc.server(ThreadPoolExecutor(8), [self])
        self.address = (
            f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', grpc.ssl_server_credentials([read_tls(fleet.gateway)]))}"
        )
        self.server.start()

    def service(self, details):
        return grpc.unary_stream_rpc_method_handler(self.answer)

    def answer(self, request, context):
        self.heard.append(request)
        if request.startswith(b"no"):
            context.set_trailing_metadata((("why-bin", b"\x01"),))
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "it is there")
        yield request
        yield b"end"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return make_fleet(tmp_path_factory.mktemp("relay") / "fleet", "watches")


@pytest.fixture
def echo(fleet):
    one = Echo(fleet)
    yield one
    one.server.stop(0).wait()


def relayed(fleet, echo, faults, messages, seed=1):
    """What comes back for each message, None where nothing did."""
    found = []
    with MessageRelay("127.0.0.1:0", echo.address, fleet, faults, seed) as relay:
        channel = channel_to(relay.address, fleet.trust())
        for one in messages:
            try:
                found.append(list(channel.unary_stream("/fedcore.gateway.v1.Gateway/Any")(one, timeout=20)))
            except grpc.RpcError as error:
                found.append(error)
        channel.close()
    return found, relay.happened


MESSAGES = [b"message %03d" % i for i in range(40)]


def test_a_relay_without_faults_passes_requests_answers_and_refusals(fleet, echo):
    found, happened = relayed(fleet, echo, Faults(), [*MESSAGES[:3], b"no"])
    assert found[:3] == [[one, b"end"] for one in MESSAGES[:3]]
    assert found[3].code() is grpc.StatusCode.ALREADY_EXISTS
    assert dict(found[3].trailing_metadata())["why-bin"] == b"\x01"
    assert not happened


def test_a_relay_loses_requests_and_answers(fleet, echo):
    found, happened = relayed(fleet, echo, Faults(drop=0.5), MESSAGES)
    lost = [one for one in found if isinstance(one, grpc.RpcError)]
    assert len(lost) == happened[Fate.DROP] > 5
    assert {one.code() for one in lost} == {grpc.StatusCode.UNAVAILABLE}
    assert {one.details() for one in lost} == {"the request was lost", "the answer was lost"}
    assert len(echo.heard) == 40 - sum(one.details() == "the request was lost" for one in lost)


def test_a_relay_repeats_requests(fleet, echo):
    found, happened = relayed(fleet, echo, Faults(duplicate=0.5), MESSAGES)
    assert found == [[one, b"end"] for one in MESSAGES]
    twice = [one for one, times in Counter(echo.heard).items() if times == 2]
    assert len(twice) == happened[Fate.DUPLICATE] > 5


@pytest.mark.parametrize("fate", [Fate.CORRUPT, Fate.TRUNCATE])
def test_a_relay_harms_requests_and_answers(fleet, echo, fate):
    found, happened = relayed(fleet, echo, Faults(**{fate.value: 0.5}), MESSAGES)
    assert happened[fate] > 5
    heard = {one for one in echo.heard if one not in MESSAGES}
    assert heard, "requests were harmed"
    assert any(one[0] != message and one[0] not in heard for one, message in zip(found, MESSAGES, strict=True)), "and answers"


def test_a_relay_lets_requests_overtake_each_other(fleet, echo):
    with MessageRelay("127.0.0.1:0", echo.address, fleet, Faults(reorder=0.5, seconds=5.0), 2) as relay:
        channel = channel_to(relay.address, fleet.trust())
        calls = []
        for one in MESSAGES:
            calls.append(threading.Thread(target=lambda one=one: list(channel.unary_stream("/g/Any")(one, timeout=30))))
            calls[-1].start()
            calls[-1].join(0.02)
        for call in calls:
            call.join(40)
        channel.close()
    assert sorted(echo.heard) == MESSAGES
    assert echo.heard != MESSAGES
