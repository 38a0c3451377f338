"""The agent: looks at the conditions, asks for work as often as it was told to, does it, and survives what happens meanwhile.

Between rounds it keeps the released models up to date (`fedcore_device.updates`); without examples that is all it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled, GatewayClient, Requests, enrol, may_pass
from fedcore.gateway.identity import spell
from fedcore.gateway.messages import Enrolment, FleetTrust
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.secagg.committee_wire import one_line
from fedcore.secagg.keys import IDENTITY, new_signing_key, read_signing_key
from fedcore_device.environment import Conditions, Environment
from fedcore_device.native import onnxruntime_here
from fedcore_device.policy import Policy
from fedcore_device.rounds import Draw, RoundWork, draw_from_system
from fedcore_device.state import State
from fedcore_device.updates import Identity, Updater

__all__ = ["Agent", "Gateway", "Stop", "default_directory", "enrol_device", "forget_device", "gateway_of", "load_enrolled"]

_LOG = logging.getLogger(__name__)
_RENEW_BEFORE = 30 * 86_400  # seconds before a certificate ends
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0  # seconds after a call that failed; doubled each time, and never all devices at once
_REFUSED_PAUSE = 30.0  # seconds after a plan that the device refused, which the gateway may offer again
_WRONG_CLOCK = 300.0
_IMPORTANT = 600_000  # milliseconds by which the floor rises before it is written for its own sake
_T = TypeVar("_T")
_ENDS = {pb.REVOKED, pb.QUARANTINED, pb.PROTOCOL, pb.BAD_SIGNATURE, pb.TOKEN_REFUSED}


class Stop(Protocol):
    """As `threading.Event`."""

    def is_set(self) -> bool:
        """Whether the agent is to end."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is to end, at most ``timeout`` seconds."""
        ...


@dataclass(frozen=True)
class Gateway:
    """Where a gateway is, as HOST:PORT, and whether without TLS."""

    address: str
    plain: bool = False


def enrol_device(state: State, server: str, token: str, *, plain: bool = False) -> Enrolled:
    """Enrol this device with a gateway at HOST:PORT. After a crash the same command ends it: the key stays the same.

    Raises:
        Refused: it is enrolled already, or the token or the gateway is not what it should be.
        TryAgain: the gateway cannot be reached.
    """
    if (state.directory / "enrolment.bin").exists():
        raise Refused(f"{state.directory} is enrolled already; `fedcore-device forget` ends that")
    if not (state.directory / f"{IDENTITY}.key").exists():
        new_signing_key(state.directory, IDENTITY)
    enrolled = enrol(server, token, read_signing_key(state.directory / f"{IDENTITY}.key"), plain=plain)
    state.keep("trust.bin", enrolled.trust.encode())
    state.keep("gateway.json", json.dumps({"address": server, "plain": plain}).encode())
    state.keep("enrolment.bin", enrolled.enrolment.encode())
    return enrolled


def load_enrolled(state: State) -> Enrolled:
    """The identity in the directory.

    Raises:
        Refused: the device is not enrolled, or a file of its identity is damaged.
    """
    if not (state.directory / "enrolment.bin").exists():
        raise Refused(f"{state.directory} is not enrolled; `fedcore-device enroll` does that")
    enrolment = _whole(state, "enrolment.bin", Enrolment.decode)
    trust = _whole(state, "trust.bin", FleetTrust.decode)
    return Enrolled(read_signing_key(state.directory / f"{IDENTITY}.key"), enrolment, trust)


def _whole(state: State, name: str, decode: Callable[[bytes], _T]) -> _T:
    try:
        return decode(state.kept(name))
    except Refused as error:
        raise Refused(
            f"{state.directory / name} is damaged ({error}): put a copy of it back, or `fedcore-device forget` and enrol with "
            "a new token"
        ) from None


def gateway_of(state: State) -> Gateway:
    """Where the device's gateway is.

    Raises:
        Refused: the file that says so is missing or damaged; nothing else is lost by that.
    """
    path = state.directory / "gateway.json"
    try:
        held = json.loads(state.kept(path.name))
        found = Gateway(**held)
        if isinstance(found.address, str) and isinstance(found.plain, bool):
            return found
    except (ValueError, TypeError, RecursionError):
        pass
    raise Refused(
        f'{path} is damaged or missing: write the gateway that `fedcore-device enroll` was given into it, as {{"address": '
        '"HOST:PORT", "plain": false}; the device stays enrolled'
    )


def forget_device(state: State) -> str:
    """Withdraw the device and erase its keys, checkpoints, history and installed models. What could not be told to the gateway,
    empty if all was."""
    told = ""
    if (state.directory / "enrolment.bin").exists():
        try:
            client = _connect(state, Requests(load_enrolled(state), state.next_number, floor=state.floor))
            with contextlib.closing(client):
                client.forget()
        except FedcoreError as error:
            told = str(error)
    state.erase()
    return told


def _connect(state: State, requests: Requests) -> GatewayClient:
    place = gateway_of(state)
    return GatewayClient(place.address, requests, plain=place.plain, timeout=30.0)


class Agent:
    """One device. ``draw`` gives what a round's randomness comes from, which only comparisons with a simulation replace;
    ``native``: directories of native libraries, see `fedcore_device.native`.

    Raises:
        Refused: the device is not enrolled.
    """

    def __init__(
        self, state: State, environment: Environment, policy: Policy, *, draw: Draw = draw_from_system, look: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic, native: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self._state, self._environment, self._policy, self._draw = state, environment, policy, draw
        self._look, self._monotonic, self._native = look, monotonic, native
        self._requests = Requests(load_enrolled(state), state.next_number, clock=environment.clock, floor=state.floor)
        self._failures = 0
        self._told_wait = 0.0
        self._visit_held: dict[str, Any] | None = None
        self._updater = self._new_updater()
        self.waiting_for = ""

    def run(self, stop: Stop) -> None:
        """Work until ``stop`` is set. Waits are counted only while the device is eligible.

        Raises:
            Refused: the fleet does not want this identity any more, or the device's own files are wrong.
        """
        left = 0.0
        while not stop.is_set():
            self.waiting_for = self.why_not() if self._environment.examples else "without examples it trains nothing"
            if not self.waiting_for and left <= 0:
                left = self._visit(stop.is_set)
            if self.waiting_for or self._state.work() is None:  # a round that can go on comes first
                self.update(stop.is_set)
            began = self._monotonic()
            stop.wait(self._look if self.waiting_for else min(self._look, max(left, 0.01)))
            if not self.waiting_for:
                left -= self._monotonic() - began

    def why_not(self) -> str:
        """Why the device does not work now; empty where it does."""
        conditions = self._environment.conditions(training=False)
        return self._policy.conditions.why_not(conditions, self._requests.now / 1000)

    def update(self, stopped: Callable[[], bool] = lambda: False, *, now: bool = False) -> None:
        """See `Updater.step`; nothing where the fleet has no repository, or the owner wants no models.

        Raises:
            GatewayRefusal: the gateway will not have this identity any more.
        """
        if self._updater is None:
            return
        try:
            self._updater.step(stopped, now=now)
        except GatewayRefusal as refusal:
            self._refused(refusal)
        self._keep_floor()

    def _keep_floor(self) -> None:
        if self._requests.floor > self._state.floor + _IMPORTANT:
            self._state.raise_floor(self._requests.floor)

    def _new_updater(self) -> Updater | None:
        one = self._requests.enrolled
        if not (one.trust.update_root and self._policy.updates.models):
            return None
        identity = Identity(hashlib.sha256(one.key.public).digest(), one.trust.time_keys, one.trust.update_root)
        return Updater(self._state, self._environment, self._policy, identity, self._connected)

    def _visit(self, stopped: Callable[[], bool]) -> float:
        """Go on with the round in progress, or ask for one; eligible seconds until the next visit."""
        try:
            with self._connected() as client:
                doing = RoundWork(
                    self._state, self._environment, self._policy, self._requests, client, self._draw, stopped, self._native
                )  # fmt: skip
                wait = self._work(client, doing)
        except GatewayRefusal as refusal:
            return self._refused(refusal)
        except (Refused, TryAgain) as error:  # a gateway that lies about the time, say, ends no agent
            return self._later(str(error))
        except OSError as error:
            return self._later(f"{error.filename or 'a file'}: {error.strerror}")
        self._failures = 0
        return wait

    def _work(self, client: GatewayClient, doing: RoundWork) -> float:
        self._renew(client)
        if (work := self._state.work()) is not None:
            doing.go_on(work)
            return 0.0
        reply = client.check_in(self._body(doing))
        if reply.HasField("visit") and not self._holds(reply.visit):
            self._visit_held = _new_visit(reply.visit)
            reply = client.check_in(self._body(doing))
        self._keep_floor()
        if reply.HasField("assignment"):
            accepted, self._visit_held = doing.accept(reply.assignment, self._visit_held), None
            if accepted is None:
                return max(self._told_wait, _REFUSED_PAUSE)
            _LOG.info("round %d of %s", accepted.round, one_line(accepted.task))
            doing.go_on(accepted)
            return 0.0
        if not reply.HasField("wait"):
            return _FIRST_PAUSE  # another visit is asked for already
        self._told_wait = float(reply.wait.retry_after_ms) / 1000
        return self._told_wait

    def _body(self, doing: RoundWork) -> pb.CheckInBody:
        facts, now = self._policy.device, self._environment.conditions(training=False)
        runtime = "onnxruntime" if onnxruntime_here() else "native"
        return pb.CheckInBody(
            population=facts.population, tier=facts.tier, labels=facts.labels, runtime=runtime, agent_version=_version(),
            capabilities=doing.capabilities, round_key=self._round_key(), conditions=_told(now),
        )  # fmt: skip

    def _holds(self, visit: pb.Visit) -> bool:
        """Whether a key was drawn for this visit: it stays while the visit lasts, for a plan may be made with it already."""
        held = self._visit_held
        return held is not None and (held["task"], held["epoch"], held["expiry"]) == (visit.task, visit.epoch, visit.expiry)

    def _round_key(self) -> bytes:
        """What secure aggregation is told; empty outside of a visit."""
        held = self._visit_held
        if held is None or held["expiry"] < self._requests.now / 1000:
            return b""
        from fedcore.secagg.participant import Visit
        from fedcore_device.masking import Masking

        place = Visit(held["task"], held["epoch"], held["expiry"])
        return Masking(self._requests.enrolled, self._policy.plan, bytes.fromhex(held["key"]), place).check_in()

    def _renew(self, client: GatewayClient, *, now: bool = False) -> None:
        """Ask for a new certificate before the old one ends."""
        end = self._requests.enrolled.enrolment.certificate.not_after
        if now or end < self._requests.now / 1000 + _RENEW_BEFORE:
            self._state.keep("enrolment.bin", client.renew().enrolment.encode())
            _LOG.info("the certificate of device %s was renewed", spell(self._requests.enrolled.device))

    def _refused(self, refusal: GatewayRefusal) -> float:
        """What to do after the gateway refused.

        Raises:
            GatewayRefusal: it will not have this identity any more.
        """
        if refusal.reason in _ENDS:
            self._state.problem = str(refusal)
            raise refusal
        if refusal.reason in {pb.UNKNOWN_DEVICE, pb.EXPIRED}:
            try:
                with self._connected() as client:
                    self._renew(client, now=True)
            except GatewayRefusal as other:
                if other.reason in _ENDS:
                    self._state.problem = str(other)
                    raise
                return self._later(str(other), other.retry_after / 1000)
            except TryAgain as error:
                return self._later(str(error))
            return 0.0
        if not may_pass(refusal):
            _LOG.warning("%s", refusal)
        return self._later(str(refusal), refusal.retry_after / 1000)

    def _later(self, problem: str, least: float = 0.0) -> float:
        """Seconds to wait after a failure: longer with every one, and where no round is at stake the last wait again at least, so
        that a fleet whose gateways were away comes back as evenly as it was."""
        behind = self._requests.floor / 1000 - self._environment.clock()
        if behind > _WRONG_CLOCK:
            problem = f"clock: this device's clock is {behind:.0f} s behind the gateways'; {problem}"
        elif "certificate" in problem.lower():
            problem = f"clock: TLS fails, as it does where a clock is wrong; {problem}"
        self._state.problem = problem
        _LOG.warning("%s", problem)
        pause: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 16))
        pause *= random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        self._failures += 1
        return max(least, pause, 0.0 if self._state.work() else self._told_wait)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[GatewayClient]:
        client = _connect(self._state, self._requests)
        try:
            yield client
        finally:
            client.close()


def _new_visit(visit: pb.Visit) -> dict[str, Any]:
    return {"task": visit.task, "epoch": visit.epoch, "expiry": visit.expiry, "key": os.urandom(32).hex()}


def _told(found: Conditions) -> pb.Conditions:
    return pb.Conditions(
        charging=found.charging, unmetered=found.unmetered, idle=found.idle, battery_percent=found.battery_percent or 0,
        free_storage_bytes=found.free_storage,
    )  # fmt: skip


def _version() -> str:
    try:
        return version("fedcore-device")
    except PackageNotFoundError:
        return "source"


def default_directory() -> Path:
    """Where a device's state lies if nothing else is said: systemd's, root's, or the user's own."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    base = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local" / "state"
    return base / "fedcore-device"
