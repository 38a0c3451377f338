"""What Prometheus is told: the format, the numbers, and that no device is named."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest

from fedcore.chaos.deployment import free_address
from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled, GatewayClient, Requests
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.identity import spell
from fedcore.gateway.messages import Enrolment
from fedcore.gateway.metrics import CONTENT_TYPE, Family, Meter, MetricsServer, exposition, run_families, view_of
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.trust import issue_certificate
from fedcore.state.gateway import Device, Standing
from fedcore.state.stores import open_gateway_store

NOW = 1_800_000_000.0
NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?[0-9.e+-]+|NaN|[+-]Inf)")


def parsed(text):
    """Samples by name and labels, and kinds by name; the format as Prometheus' documentation has it."""
    assert text.endswith("\n")
    found, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in {"counter", "gauge"}
            assert name not in kinds, "a family stands in one piece"
            kinds[name] = kind
        elif line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} [^\n]+", line)
        else:
            whole = SAMPLE.fullmatch(line)
            assert whole, line
            name, labels, value = whole.groups()
            assert name in kinds, "its type was told before"
            pairs = tuple((k, v) for k, v in re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', labels or ""))
            assert (name, pairs) not in found
            found[name, pairs] = float(value)
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert name.startswith("fedcore_")
    return found, kinds


def test_the_format_escapes_what_labels_hold_and_knows_all_numbers():
    label = 'a"b\\c\nd'
    values = {(): 1.0, (("v", label),): 0.25, (("v", "inf"),): float("inf"), (("v", "nan"),): float("nan"), (("v", "n"),): -3.0}
    text = exposition([Family("fedcore_x", "gauge", "One\nline.", values), Family("fedcore_y_total", "counter", "Y.", {})])
    found, kinds = parsed(text)
    assert kinds == {"fedcore_x": "gauge", "fedcore_y_total": "counter"}
    assert found["fedcore_x", (("v", r"a\"b\\c\nd"),)] == 0.25
    assert found["fedcore_x", (("v", "inf"),)] == float("inf")
    assert "fedcore_x 1\n" in text
    assert 'fedcore_x{v="n"} -3\n' in text


def device(number, seen=0.0, **changes):
    return replace(Device(number, 1, bytes(32), 2_000_000_000, NOW, last_seen=NOW - seen), **changes)


def test_the_fleet_is_counted_by_standing_last_seen_and_version_and_no_device_is_named():
    told = [json.dumps({"agent_version": f"1.{n % 40}"}) for n in range(100)]
    devices = [device(0x1234567890 + n, seen=10.0 * n, told=told[n]) for n in range(100)]
    devices += [device(1, standing=Standing.REVOKED), device(2, seen=1e9, told="no json"), device(3, seen=1e9, told='{"a": 1}')]
    view = view_of(devices, NOW)
    assert view.standing == {"active": 102, "revoked": 1}
    assert view.seen[60] == 7
    assert view.seen[600] == 61
    assert view.seen[3600] == view.seen[2_592_000] == 100
    assert len(view.versions) == 21, "twenty, and the others"
    assert sum(view.versions.values()) == 102
    text = exposition(view.families())
    found, _ = parsed(text)
    assert found["fedcore_fleet_devices", (("standing", "revoked"),)] == 1
    assert spell(0x1234567890) not in text
    assert str(0x1234567890) not in text


def test_a_meter_counts_calls_in_flight_refusals_answers_and_bytes():
    meter = Meter()
    with meter.call("CheckIn"):
        meter.asked("CheckIn", pb.SignedRequest(protocol=1), 100)
        assert meter.flying["CheckIn"] == 1
        meter.told("CheckIn", pb.CheckInReply(wait=pb.Wait(reason="no")), 30)
    with contextlib.suppress(ValueError), meter.call("Upload"):
        meter.asked("Upload", pb.SignedRequest(protocol=2**31), 7)
        meter.refused("Upload", pb.LATE)
        raise ValueError
    meter.told("Upload", pb.UploadReply(repeated=True), 2)
    found, _ = parsed(exposition(meter.families()))
    assert found["fedcore_gateway_requests_in_flight", (("method", "CheckIn"),)] == 0
    assert found["fedcore_gateway_requests_in_flight", (("method", "Upload"),)] == 0
    assert found["fedcore_gateway_requests_total", (("method", "Upload"),)] == 1
    assert found["fedcore_gateway_refusals_total", (("method", "Upload"), ("reason", "late"))] == 1
    assert found["fedcore_gateway_check_ins_total", (("answer", "wait"),)] == 1
    assert found["fedcore_gateway_uploads_total", (("result", "repeated"),)] == 1
    assert found["fedcore_gateway_received_bytes_total", (("method", "CheckIn"),)] == 100
    assert found["fedcore_gateway_sent_bytes_total", (("method", "CheckIn"),)] == 30
    assert found["fedcore_gateway_protocol_requests_total", (("protocol", "other"),)] == 1


def test_a_run_tells_its_progress_and_what_privacy_it_has_spent(tmp_path):
    assert set(parsed(exposition(run_families(tmp_path)))[1]) == {"fedcore_build_info"}, "nothing is there yet"
    (tmp_path / "config.toml").write_text("[run]\nrounds = 9\n")
    rounds = [
        {"round": n, "replies": 3, "cohort": 4, "accuracy": 0.5, "privacy": {"client": {"epsilon": 0.5 * n, "budget": 8.0}}}
        for n in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds) + '{"round": 3, "cut o')
    found, _ = parsed(exposition(run_families(tmp_path)))
    assert found["fedcore_run_rounds_planned", ()] == 9
    assert found["fedcore_run_rounds_committed", ()] == 2
    assert found["fedcore_run_replies", ()] == 3
    assert found["fedcore_run_failed_attempts", ()] == 0
    assert found["fedcore_privacy_epsilon", (("unit", "client"),)] == 1.0
    assert found["fedcore_privacy_epsilon_budget", (("unit", "client"),)] == 8.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 1, "replies": None, "accuracy": None}) + "\n")
    assert ("fedcore_run_replies", ()) not in parsed(exposition(run_families(tmp_path)))[0], "numbers that are kept back stay so"


async def asked(address, request):
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    reply = await reader.read()
    writer.close()
    return reply


def test_the_server_answers_one_path_and_outlasts_strangers():
    async def tried():
        async def text():
            return "fedcore_x 1\n"

        server = MetricsServer("127.0.0.1:0", text)
        await server.start()
        try:
            good = await asked(server.address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            assert good.startswith(b"HTTP/1.1 200 OK\r\n")
            assert CONTENT_TYPE.encode() in good
            assert good.endswith(b"\r\n\r\nfedcore_x 1\n")
            for other in (b"GET / HTTP/1.1", b"POST /metrics HTTP/1.1", b"x", b"GET"):
                assert (await asked(server.address, other + b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
            assert await asked(server.address, b"x" * 100_000) == b"", "one that is too long is cut off"
            host, port = server.address.split(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
            async with asyncio.timeout(60):  # some wait for their end, the others are turned away
                assert await asyncio.gather(*[reader.read() for reader, _ in silent]) == [b""] * 40
            for _, writer in silent:
                writer.close()
            assert (await asked(server.address, b"GET /metrics HTTP/1.0\r\n\r\n")).endswith(b"fedcore_x 1\n")
            with pytest.raises(Refused, match=r"metrics: .* cannot be listened at"):
                await MetricsServer(server.address, text).start()
        finally:
            server.stop()

    asyncio.run(tried())


def test_a_gateway_process_tells_what_happened_to_it(tmp_path):
    fleet, address, watched = make_fleet(tmp_path / "fleet", "watches"), free_address(), free_address()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[run]\nrounds = 5\n")
    key, signer = Ed25519Key(hashlib.sha256(b"k").digest()), fleet.signer()
    certificate = issue_certificate(signer._key, "watches", 1, key.public, int(time.time()) + 86_400)
    signer.close()
    number = 0x1234567890ABCDEF
    store = open_gateway_store(str(tmp_path / "store.sqlite"))
    store.register(Device(number, 1, key.public, certificate.not_after, time.time()))
    settings = {
        "store": str(tmp_path / "store.sqlite"), "blobs": str(tmp_path / "blobs"), "trust": str(fleet.trust_file),
        "time_key": str(fleet.time_key), "tls": str(fleet.gateway), "listen": address, "metrics": watched,
        "run": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "gateway.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "fedcore.gateway.process", str(tmp_path / "gateway.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"gateway listens on {address}\n"
        counter = itertools.count(1)
        enrolled = Enrolled(key, Enrolment(number, certificate, bytes(64)), fleet.trust())
        client = GatewayClient(address, Requests(enrolled, lambda: next(counter)))
        for _ in range(3):
            client.check_in(pb.CheckInBody(agent_version="0.7", tier="watch"))
        stranger = replace(enrolled, key=Ed25519Key(hashlib.sha256(b"other").digest()))
        forger = GatewayClient(address, Requests(stranger, lambda: 99))
        with pytest.raises(GatewayRefusal):
            forger.check_in(pb.CheckInBody())
        client.close()
        forger.close()
        with urllib.request.urlopen(f"http://{watched}/metrics", timeout=20) as reply:
            assert reply.headers["Content-Type"] == CONTENT_TYPE
            text = reply.read().decode()
        store.judge(number, Standing.REVOKED, "stolen")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()
        store.close()
    found, _ = parsed(text)
    assert found["fedcore_gateway_check_ins_total", (("answer", "wait"),)] == 3
    assert found["fedcore_gateway_refusals_total", (("method", "CheckIn"), ("reason", "bad_signature"))] == 1
    assert found["fedcore_gateway_protocol_requests_total", (("protocol", "1"),)] == 4
    assert found["fedcore_fleet_devices", (("standing", "active"),)] == 1
    assert found["fedcore_fleet_devices_seen", (("within_seconds", "60"),)] == 1
    assert found["fedcore_fleet_agent_versions", (("version", "0.7"),)] == 1
    assert found["fedcore_gateway_received_bytes_total", (("method", "CheckIn"),)] > 300
    assert found["fedcore_rounds", (("state", "running"),)] == 0
    assert found["fedcore_gateway_store_up", ()] == 1
    assert found["fedcore_run_rounds_planned", ()] == 5
    assert spell(number) not in text
    assert str(number) not in text
