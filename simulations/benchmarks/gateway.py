"""Load of real protocol clients on a gateway: signed requests over TLS, a durable store, no training.

    python -m simulations.benchmarks.gateway --devices 1000 --json
    python -m simulations.benchmarks.gateway --pace --json

The gateway is ``--gateways`` processes that share a port and a SQLite store; the clients are one process more, on the same machine.
Keys: ``checkins_per_second`` (authenticated, on warm connections), ``fresh_checkins_per_second`` (each with a new TLS connection),
``uploads_per_second`` (plain updates of ``--upload-bytes``, answered once durably summed), ``p99_ms`` (of warm check-ins),
``bytes_per_waiting_device`` (gateway memory for a device whose check-in is held on a TLS connection of its own), and by call
``cpu_ms``: processor milliseconds a call of the gateways and of the clients, which do not depend on what else the machine does.

``--pace`` is a virtual clock: a day and a half of a fleet of a million that may check in at night, with an outage of an hour, and
with all devices switched on at once; the load is the peak 1-minute bin over the mean of the eligible hours.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import SERVICE, Enrolled, Requests, channel_to, failure_of
from fedcore.gateway.conduct import Conductor, Forming
from fedcore.gateway.deployment import Fleet, make_fleet
from fedcore.gateway.fleet import Selection
from fedcore.gateway.messages import Enrolment
from fedcore.gateway.pace import DAY, Hours, Pace, simulate_load
from fedcore.gateway.rounds import Place
from fedcore.gateway.sums import RunningSum, UploadTerms
from fedcore.quantization.wire import Update, encode_update
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.trust import issue_certificate
from fedcore.state.gateway import Device
from fedcore.state.stores import open_gateway_store

_ROOT = Path(__file__).parents[2]
_TEN_YEARS = 10 * 365 * 86400


def _enrolled(fleet: Fleet, store: str, count: int) -> list[Requests]:
    """Devices that were enrolled before: their records are written to the store directly."""
    signer, trust, now = fleet.signer(), fleet.trust(), time.time()
    held = open_gateway_store(store)
    found = []
    for number in range(count):
        key = Ed25519Key(hashlib.sha256(b"%d" % number).digest())
        certificate = issue_certificate(signer._key, trust.deployment, key.algorithm, key.public, int(now) + _TEN_YEARS)
        held.register(Device(number + 1, key.algorithm, key.public, certificate.not_after, now))
        counter = itertools.count(1)
        enrolment = Enrolment(number + 1, certificate, bytes(64))
        found.append(Requests(Enrolled(key, enrolment, trust), lambda counter=counter: next(counter)))
    held.close()
    signer.close()
    return found


class _Gateways:
    """Gateway processes on one port and store."""

    def __init__(self, folder: Path, fleet: Fleet, count: int) -> None:
        self.store, self.blobs = str(folder / "state.sqlite"), folder / "blobs"
        settings: dict[str, Any] = {
            "store": self.store, "blobs": str(self.blobs), "trust": str(fleet.trust_file), "time_key": str(fleet.time_key),
            "tls": str(fleet.gateway), "share_port": True, "limits": {"rate": 1000.0, "burst": 10000.0}, "listen": "127.0.0.1:0",
        }  # fmt: skip
        self._processes = []
        for i in range(count):
            file = folder / f"gateway-{i}.json"
            file.write_text(json.dumps(settings))
            command = [sys.executable, "-m", "fedcore.gateway.process", str(file)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
            assert process.stdout is not None
            self.address = process.stdout.readline().split()[-1]
            settings["listen"] = self.address
            self._processes.append(process)

    def memory(self) -> int:
        """Resident bytes of all processes."""
        pages = [int(Path(f"/proc/{one.pid}/statm").read_text().split()[1]) for one in self._processes]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Processor seconds of all processes."""
        times = [Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[11:13] for one in self._processes]
        return sum(int(part) for pair in times for part in pair) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End them."""
        for one in self._processes:
            one.terminate()
        for one in self._processes:
            one.wait(30)


class _Caller:
    """A device's connection in an event loop."""

    def __init__(self, address: str, requests: Requests) -> None:
        self._address, self._requests = address, requests
        self._channel = channel_to(address, requests.enrolled.trust, aio=True)
        self._check_in = self._call("CheckIn", pb.CheckInReply)
        self._upload = self._call("Upload", pb.UploadReply)

    def _call(self, name: str, reply: Any) -> Any:
        return self._channel.unary_unary(f"/{SERVICE}/{name}", pb.SignedRequest.SerializeToString, reply.FromString)

    async def check_in(self) -> Any:
        """One check-in; the reply's signature of the time is checked as on a device."""
        sent = self._requests.sign("CheckIn", pb.CheckInBody(tier="bench", capabilities=["accumulate-1"]).SerializeToString())
        reply = await self._check_in(sent.request, timeout=60)
        self._requests.check_time(sent, reply.server_time)
        return reply

    async def upload(self, token: bytes, data: bytes) -> Any:
        """One plain upload."""
        body = pb.UploadBody(token=token, digest=hashlib.sha256(data).digest(), data=data)
        return await self._upload(self._requests.sign("Upload", body.SerializeToString()).request, timeout=60)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class _Costs:
    """Processor milliseconds a call, by kind of call: of the gateways, and of this process, the clients."""

    def __init__(self, gateways: _Gateways) -> None:
        self._gateways, self.found = gateways, dict[str, dict[str, float]]()

    async def of(self, kind: str, calls: Callable[[], Awaitable[tuple[Any, int]]]) -> Any:
        """What ``calls`` gives beside the number of its calls."""
        theirs, mine = self._gateways.cpu(), time.process_time()
        result, count = await calls()
        theirs, mine = self._gateways.cpu() - theirs, time.process_time() - mine
        self.found[kind] = {"gateways": 1000 * theirs / count, "clients": 1000 * mine / count}
        return result


async def _at_once(work: Callable[[int], Awaitable[None]], count: int, seconds: float) -> None:
    """Repeat ``work`` in so many places for so long."""
    end = time.perf_counter() + seconds

    async def place(number: int) -> None:
        while time.perf_counter() < end:
            await work(number)

    await asyncio.gather(*[place(number) for number in range(count)])


async def _warm(callers: list[_Caller], seconds: float) -> tuple[tuple[float, float], int]:
    """Check-ins a second on connections that are there, and the 99th percentile of their milliseconds."""
    await asyncio.gather(*[one.check_in() for one in callers])
    taken: list[float] = []

    async def work(number: int) -> None:
        begun = time.perf_counter()
        await callers[number].check_in()
        taken.append(1000 * (time.perf_counter() - begun))

    begun = time.perf_counter()
    await _at_once(work, len(callers), seconds)
    return (len(taken) / (time.perf_counter() - begun), float(np.percentile(taken, 99))), len(taken) + len(callers)


async def _fresh(address: str, requests: list[Requests], seconds: float) -> tuple[float, int]:
    """Check-ins a second, each with a connection of its own."""
    turn, done = itertools.cycle(requests), 0

    async def work(_: int) -> None:
        nonlocal done
        caller = _Caller(address, next(turn))
        await caller.check_in()
        await caller.close()
        done += 1

    begun = time.perf_counter()
    await _at_once(work, 8, seconds)
    return done / (time.perf_counter() - begun), done


class _Round(threading.Thread):
    """A coordinator that gives all devices work and adds nothing itself."""

    def __init__(self, gateways: _Gateways, fleet: Fleet, devices: int, upload: bytes) -> None:
        super().__init__(daemon=True)
        self._gateways, self._fleet, self._devices, self._values = gateways, fleet, devices, (len(upload) - 28) // 4
        self._most = len(upload)
        self.begun, self.result = threading.Event(), None
        self.formed = threading.Event()

    def run(self) -> None:
        """One round."""
        conductor = Conductor(open_gateway_store(self._gateways.store), self._fleet.trust().deployment, self._fleet.plan_key())
        selection = Selection(self._devices, 1, 120.0, 60.0, 1.0)
        forming: Forming = conductor.form("bench", 1, selection)
        self.formed.set()
        self.begun.wait()
        cohort = {device: Place(0) for device in conductor.gather(forming)}
        terms = UploadTerms("float32", self._values, self._most, 1e9, 1000)
        plan = pb.Plan(kind=pb.TRAIN, aggregation=pb.MEAN, upload_encoding="float32", most_upload_bytes=self._most)
        self.result = conductor.run(forming, [plan], cohort, terms, 120.0)


async def _held(gateways: _Gateways, requests: list[Requests], held: _Round) -> tuple[float, list[Any], list[_Caller]]:
    """Bytes of gateway memory for each device that waits, and the assignments that end the waiting."""
    callers = [_Caller(gateways.address, one) for one in requests]
    before = gateways.memory()
    waiting = [asyncio.ensure_future(one.check_in()) for one in callers]
    await asyncio.sleep(min(20.0, 3 + len(requests) / 100))
    each = (gateways.memory() - before) / len(requests)
    held.begun.set()
    replies = await asyncio.gather(*waiting)
    return each, [reply.assignment.token for reply in replies], callers


async def _uploads(callers: list[_Caller], tokens: list[bytes], upload: bytes, at_once: int) -> tuple[float, int]:
    """Uploads a second, one for each device."""
    turn = iter(zip(callers, tokens, strict=True))

    async def place() -> None:
        for caller, token in turn:
            await caller.upload(token, upload)

    begun = time.perf_counter()
    await asyncio.gather(*[place() for _ in range(at_once)])
    return len(callers) / (time.perf_counter() - begun), len(callers)


async def _measure(devices: int, gateways: int, seconds: float, upload_bytes: int, folder: Path) -> dict[str, Any]:
    import grpc

    fleet = make_fleet(folder / "fleet", "bench")
    requests = _enrolled(fleet, str(folder / "state.sqlite"), devices)
    values = (upload_bytes - 28) // 4
    rng = np.random.default_rng(0)
    update = rng.normal(size=values).astype(np.float32)
    upload = encode_update(Update(update, 10, 0.5), "float32", rng)
    running = _Gateways(folder, fleet, gateways)
    costs = _Costs(running)
    try:
        callers = [_Caller(running.address, one) for one in requests[: min(devices, 64)]]
        warm, p99 = await costs.of("warm", lambda: _warm(callers, seconds))
        await asyncio.gather(*[one.close() for one in callers])
        fresh = await costs.of("fresh", lambda: _fresh(running.address, requests, seconds))
        one = _Round(running, fleet, devices, upload)
        one.start()
        one.formed.wait()
        await asyncio.sleep(1)
        each, tokens, held = await _held(running, requests, one)
        rate = await costs.of("upload", lambda: _uploads(held, tokens, upload, 32))
        one.join(60)
        total: RunningSum = one.result.total if one.result else RunningSum()
        exact = total.devices == devices and bool(np.allclose(total.vector, 10 * devices * update.astype(np.float64)))
        await asyncio.gather(*[caller.close() for caller in held])
    except grpc.RpcError as error:
        raise failure_of(error, running.address) from None
    finally:
        running.close()
    return {
        "devices": devices, "gateways": gateways, "checkins_per_second": warm, "fresh_checkins_per_second": fresh,
        "uploads_per_second": rate, "upload_bytes": len(upload), "p99_ms": p99, "bytes_per_waiting_device": each,
        "sum_is_right": exact, "cpu_ms": costs.found,
    }  # fmt: skip


def pace(fleet: int, days: float = 1.5) -> dict[str, Any]:
    """Peak over mean load of a fleet that may check in from 22 to 6 o'clock, at 200 check-ins a second."""
    hours, rng = Hours(((0.0, DAY / 4), (11 * DAY / 12, DAY))), np.random.default_rng(1)
    law, hour = Pace(200.0), 3600.0
    plain, _ = simulate_load(fleet, law, hours, days, rng)
    attempts, answered = simulate_load(fleet, law, hours, days, rng, outage=(3 * hour, 4 * hour))
    together, _ = simulate_load(fleet, law, hours, days, rng, together=True)
    after = attempts[4 * 60 :]
    return {
        "fleet": fleet, "check_ins": int(plain.sum()), "peak_to_mean": float(plain.max() / plain.mean()),
        "peak_to_mean_with_outage": float(attempts.max() / plain.mean()),
        "peak_to_mean_after_outage": float(after.max() / plain.mean()),
        "unanswered": int(attempts.sum() - answered.sum()),
        "peak_to_mean_after_switch_on": float(together[1:].max() / together[1:].mean()),
    }  # fmt: skip


def main() -> None:
    """Measure, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of check-ins")
    parser.add_argument("--upload-bytes", type=int, default=200_000)
    parser.add_argument("--pace", action="store_true", help="simulate the load of a day instead; --devices is then 1,000,000")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.pace:
        found = pace(options.devices if options.devices != parser.get_default("devices") else 1_000_000)
    else:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        with tempfile.TemporaryDirectory(prefix="fedcore-gateway-") as folder:
            arguments = (options.devices, options.gateways, options.seconds, options.upload_bytes, Path(folder))
            found = asyncio.run(_measure(*arguments))
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:<32} {value:,.4g}" if isinstance(value, float) else f"{key:<32} {value}")


if __name__ == "__main__":
    main()
