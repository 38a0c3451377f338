"""What an operator watches, for Prometheus: counters of a gateway, the fleet, and the run; text exposition format 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/. No label names a device, and what devices may write themselves (their
agents' versions) makes no more than twenty series.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import tomllib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore import __version__
from fedcore.errors import FedcoreError, Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.secagg.committee_wire import endpoint_of, one_line
from fedcore.state.gateway import Device

__all__ = ["CONTENT_TYPE", "Family", "FleetView", "Labels", "Meter", "MetricsServer", "exposition", "run_families", "view_of"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SEEN_WITHIN = (60, 600, 3600, 21_600, 86_400, 604_800, 2_592_000)
"""Seconds since devices were seen, by which the fleet is counted."""
_MOST_VERSIONS, _LONGEST_VERSION = 20, 32
_MOST_REQUEST, _PATIENCE, _AT_ONCE = 8192, 5.0, 16
_TAIL = 1 << 20  # bytes of the end of metrics.jsonl, in which the last round is
_BROKEN_OFF = (OSError, TimeoutError, FedcoreError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """A metric: its name, "counter" or "gauge", what it says, and its values by labels."""

    name: str
    kind: str
    text: str
    values: Mapping[Labels, float]


def exposition(families: Iterable[Family]) -> str:
    """Metrics in Prometheus' text format."""
    lines = []
    for one in families:
        lines += [f"# HELP {one.name} {_escaped(one.text)}", f"# TYPE {one.name} {one.kind}"]
        for labels, value in one.values.items():
            told = ",".join(f'{name}="{_escaped(text, quotes=True)}"' for name, text in labels)
            lines.append(f"{one.name}{{{told}}} {_number(value)}" if told else f"{one.name} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(int(value)) if float(value).is_integer() and abs(value) < 1 << 53 else repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


@dataclass
class Meter:
    """What a gateway counts from its start on. For one event loop."""

    requests: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    flying: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    protocols: Counter[str] = field(default_factory=Counter)
    slow: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def call(self, method: str) -> Any:
        """Around a call from its first byte on."""
        self.requests[method] += 1
        self.flying[method] += 1
        try:
            yield
        finally:
            self.flying[method] -= 1

    def asked(self, method: str, request: Any, size: int) -> None:
        """Count a request that was read."""
        self.received[method] += size
        if isinstance(request, pb.SignedRequest):
            self.protocols[str(request.protocol) if request.protocol < 100 else "other"] += 1

    def told(self, method: str, reply: Any, size: int) -> None:
        """Count an answer, or a piece of one."""
        self.sent[method] += size
        if isinstance(reply, pb.CheckInReply):
            self.answers[next((one for one in ("assignment", "visit", "wait") if reply.HasField(one)), "wait")] += 1
        elif isinstance(reply, pb.UploadReply):
            self.uploads["repeated" if reply.repeated else "counted"] += 1

    def refused(self, method: str, reason: pb.Reason) -> None:
        """Count a refusal."""
        self.refusals[method, pb.Reason.Name(reason).lower()] += 1

    def families(self) -> list[Family]:
        """As metrics."""

        def by(label: str, counts: Mapping[str, int]) -> dict[Labels, float]:
            return {((label, name),): times for name, times in sorted(counts.items())}

        refusals: dict[Labels, float] = {
            (("method", method), ("reason", reason)): times for (method, reason), times in sorted(self.refusals.items())
        }
        name = "fedcore_gateway"
        return [
            Family(f"{name}_requests_total", "counter", "Calls that began.", by("method", self.requests)),
            Family(f"{name}_requests_in_flight", "gauge", "Calls at work or held now.", by("method", self.flying)),
            Family(f"{name}_refusals_total", "counter", "Calls that were refused.", refusals),
            Family(f"{name}_received_bytes_total", "counter", "Bytes of requests.", by("method", self.received)),
            Family(f"{name}_sent_bytes_total", "counter", "Bytes of answers.", by("method", self.sent)),
            Family(f"{name}_check_ins_total", "counter", "Check-ins by what was answered.", by("answer", self.answers)),
            Family(f"{name}_uploads_total", "counter", "Uploads that were acknowledged.", by("result", self.uploads)),
            Family(f"{name}_protocol_requests_total", "counter", "Signed requests by protocol version.",
                   by("protocol", self.protocols)),
            Family(f"{name}_slow_readers_total", "counter", "Streams that were ended because nobody read them fast enough.",
                   by("method", self.slow)),
        ]  # fmt: skip


@dataclass(frozen=True)
class FleetView:
    """The fleet at a moment: devices by standing, by how long ago they were seen, and by version of their agents."""

    standing: Mapping[str, int]
    seen: Mapping[int, int]
    versions: Mapping[str, int]

    @property
    def devices(self) -> int:
        """All of them."""
        return sum(self.standing.values())

    def families(self) -> list[Family]:
        """As metrics."""
        return [
            Family("fedcore_fleet_devices", "gauge", "Devices by standing.",
                   {(("standing", name),): count for name, count in sorted(self.standing.items())}),
            Family("fedcore_fleet_devices_seen", "gauge", "Active devices that checked in within so many seconds.",
                   {(("within_seconds", str(bound)),): count for bound, count in self.seen.items()}),
            Family("fedcore_fleet_agent_versions", "gauge", "Active devices by version of their agents.",
                   {(("version", name),): count for name, count in self.versions.items()}),
        ]  # fmt: skip


def view_of(devices: Sequence[Device], now: float) -> FleetView:
    """The fleet at ``now`` (Unix seconds). The twenty commonest versions have a count of their own."""
    active = [one for one in devices if one.standing.value == "active"]
    versions = Counter(_version(one.told) for one in active)
    common = dict(versions.most_common(_MOST_VERSIONS))
    if len(versions) > len(common):
        common["other"] = common.get("other", 0) + sum(versions.values()) - sum(common.values())
    seen = {bound: sum(now - one.last_seen <= bound for one in active) for bound in SEEN_WITHIN}
    return FleetView(Counter(one.standing.value for one in devices), seen, common)


def _version(told: str) -> str:
    try:
        found = json.loads(told).get("agent_version", "") if told else ""
    except (ValueError, AttributeError):
        found = ""
    return one_line(str(found))[:_LONGEST_VERSION] or "unknown"


def run_families(directory: Path) -> list[Family]:
    """The progress of a run and the privacy it has spent, by the files in its directory; what is not there yet is left out."""
    name, last = "fedcore_run", _last_round(directory / "metrics.jsonl")
    found = [Family("fedcore_build_info", "gauge", "Version of fedcore.", {(("version", __version__),): 1})]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        planned = int(tomllib.loads((directory / "config.toml").read_text())["run"]["rounds"])
        found.append(Family(f"{name}_rounds_planned", "gauge", "Rounds that the scenario asks for.", {(): planned}))
        found.append(Family(f"{name}_rounds_committed", "gauge", "Rounds that are committed.", {(): last.get("round", 0)}))
    texts = {
        "replies": "Uploads in the last round's model.", "cohort": "Devices that the last round asked.",
        "accuracy": "Of the last model that was evaluated by the coordinator.",
    }  # fmt: skip
    known = [(key, text) for key, text in texts.items() if isinstance(last.get(key), int | float)]
    found += [Family(f"{name}_{key}", "gauge", text, {(): last[key]}) for key, text in known]
    if "round" in last:
        failed = len(last.get("failed_attempts", ()))
        found.append(Family(f"{name}_failed_attempts", "gauge", "Attempts that failed before the last round's.", {(): failed}))
    spent = last.get("privacy", {})
    for key, suffix, text in (
        ("epsilon", "", "Epsilon of what is published."),
        ("budget", "_budget", "Epsilon that may be spent."),
    ):
        told = {unit: one[key] for unit, one in spent.items() if isinstance(one.get(key), int | float)}
        if told:
            values: dict[Labels, float] = {(("unit", unit),): value for unit, value in told.items()}
            found.append(Family(f"fedcore_privacy_epsilon{suffix}", "gauge", text, values))
    return found


def _last_round(file: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - _TAIL))
            whole = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        found = json.loads(whole) if whole else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class MetricsServer:
    """Answers GET /metrics at HOST:PORT with what ``text`` gives, and nothing else; within a running event loop."""

    def __init__(self, listen: str, text: Callable[[], Awaitable[str]]) -> None:
        self._where, self._text = endpoint_of(listen, least=0), text
        self._seats = asyncio.Semaphore(_AT_ONCE)
        self.address = listen

    async def start(self) -> None:
        """Listen from now on.

        Raises:
            Refused: the address cannot be listened at.
        """
        host, port = self._where
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=_MOST_REQUEST)
        except OSError as error:
            raise Refused(f"metrics: {self.address} cannot be listened at ({error.strerror})") from error
        self.address = f"{self.address.rpartition(':')[0]}:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Listen no more."""
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._seats.locked():
            async with self._seats:
                with contextlib.suppress(*_BROKEN_OFF):
                    async with asyncio.timeout(_PATIENCE):
                        head = await reader.readuntil(b"\r\n\r\n")
                        writer.write(await self._reply(head.split(b" ", 2)))
                        await writer.drain()
        writer.close()

    async def _reply(self, words: Sequence[bytes]) -> bytes:
        path = words[1].partition(b"?")[0] if len(words) == 3 else b""
        if words[0] != b"GET" or path != b"/metrics":
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        body = (await self._text()).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return head.encode() + body
