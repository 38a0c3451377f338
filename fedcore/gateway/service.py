"""The gateway as a gRPC service. Decisions are made in `fleet`, `identity` and `sums`; here is who may call what, in which order
a request is checked, and what a stranger can cost. A gateway keeps nothing of its own: any number of them may share a store.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError, Message

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.board import Board, OpenRound
from fedcore.gateway.commits import Committer
from fedcore.gateway.enrolment import EnrolmentSigner
from fedcore.gateway.fleet import HOLD, Told, lacking, why_ineligible
from fedcore.gateway.identity import (
    PROTOCOL,
    WINDOW,
    check_enrolment,
    check_request,
    issue_token,
    read_token,
    server_time,
    spell,
)
from fedcore.gateway.limits import Buckets, Limits, ReadingRoom
from fedcore.gateway.messages import NONCE, Enrolment, FleetTrust, RoundToken
from fedcore.gateway.pace import Pace, first_wait, wait
from fedcore.gateway.refusals import FAILURE_KEY, STATUS, GatewayRefusal
from fedcore.gateway.rounds import PRESENT, REPORT, is_for
from fedcore.gateway.sums import UploadTerms, read_upload
from fedcore.secagg.committee_wire import one_line
from fedcore.secagg.crypto import Signer, digest
from fedcore.state.gateway import Admission, Contribution, Device, GatewayStore, Note, Problem, RoundState, Standing

__all__ = ["SERVICE", "Gateway", "GatewaySettings"]

SERVICE = "fedcore.gateway.v1.Gateway"
_LARGEST_UPLOAD, _LARGEST_PIECE, _TEXT = 4_000_000, 1 << 20, 300
_KEYS_KEPT = 200_000
_UNFINISHED = 3600.0  # seconds that a staged upload is kept
_LOG = logging.getLogger(__name__)
_PROBLEMS = {
    Problem.UNKNOWN: (pb.UNKNOWN_DEVICE, "the device is not known here: Renew shows its enrolment"),
    Problem.REPLAYED: (pb.REPLAYED, "this request was seen before, or comes after a later one"),
    Problem.REVOKED: (pb.REVOKED, "the identity has been revoked"),
    Problem.QUARANTINED: (pb.QUARANTINED, "the device's state was copied: two requests carried one number"),
    Problem.FORGOTTEN: (pb.REVOKED, "the device was withdrawn by its owner"),
}


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway goes by. ``time_key`` signs its clock, and is one for all gateways of a fleet: round tokens hang on it too.

    ``signer`` enrols and renews; without one both are refused. ``hold``: seconds that a check-in is held at most.
    """

    trust: FleetTrust
    time_key: Signer = field(repr=False)
    token_secret: bytes = field(repr=False)
    signer: EnrolmentSigner | None = None
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)
    hold: float = HOLD

    @classmethod
    def of(cls, trust: FleetTrust, time_key: Signer, seed: bytes, **others: Any) -> GatewaySettings:
        """Settings with the token secret that belongs to the time key of this 32-byte seed.

        Raises:
            Refused: the trust bundle does not name the time key.
        """
        if time_key.public not in trust.time_keys:
            raise Refused("this is not a time key that the trust bundle names")
        return cls(trust, time_key, digest("round tokens", seed), **others)


@dataclass(frozen=True)
class _Caller:
    """A device whose request has been checked and admitted."""

    device: Device
    request: pb.SignedRequest


class Gateway:
    """Answers the calls of gateway.proto. Build it in a running event loop; `follow` must run beside it."""

    def __init__(
        self, settings: GatewaySettings, committer: Committer, blobs: Blobs, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._settings, self._committer, self._blobs, self._clock = settings, committer, blobs, clock
        limits = settings.limits
        self.board = Board(committer)
        self._room = ReadingRoom(limits)
        self._per_device, self._enrolments = Buckets(limits.rate, limits.burst), Buckets(limits.enrolments, limits.enrolments)
        self._transfers = Buckets(50 * limits.rate, 20 * limits.burst)
        self._keys: OrderedDict[int, Device] = OrderedDict()  # of a device, only what never changes is used
        self._fleet = 0
        self._draw = random.SystemRandom()

    def handler(self) -> Any:
        """The gRPC handler of all calls."""
        import grpc

        plain: dict[str, tuple[type[Message], Callable[[Any], Awaitable[Message]]]] = {
            "Enroll": (pb.EnrollRequest, self._enroll), "Renew": (pb.SignedRequest, self._renew),
            "CheckIn": (pb.SignedRequest, self._check_in), "Stage": (pb.StageRequest, self._stage),
            "Upload": (pb.SignedRequest, self._upload), "Report": (pb.SignedRequest, self._report),
            "Forget": (pb.SignedRequest, self._forget),
        }  # fmt: skip
        calls = {name: grpc.stream_unary_rpc_method_handler(self._unary(*what)) for name, what in plain.items()}
        calls["Fetch"] = grpc.stream_stream_rpc_method_handler(self._stream(pb.FetchRequest, self._fetch))
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    async def follow(self) -> None:
        """Keep up with the rounds, the size of the fleet, and what may be forgotten; until cancelled."""
        await asyncio.gather(self.board.follow(), self._tidy())

    # How requests come in

    def _unary(self, kind: type[Message], answer: Callable[[Any], Awaitable[Message]]) -> Callable[..., Awaitable[bytes]]:
        """A call with one reply. To gRPC its request is a stream of one message: so nothing is read before there is a seat."""

        async def serve(_: Any, context: Any) -> bytes:
            try:
                return bytes((await answer(await self._read(kind, context))).SerializeToString())
            except FedcoreError as error:
                return await self._refuse(context, error)

        return serve

    def _stream(self, kind: type[Message], answer: Callable[[Any], AsyncIterator[Message]]) -> Callable[..., AsyncIterator[bytes]]:
        async def serve(_: Any, context: Any) -> AsyncIterator[bytes]:
            try:
                async for one in answer(await self._read(kind, context)):
                    yield one.SerializeToString()
            except FedcoreError as error:
                await self._refuse(context, error)

        return serve

    async def _read(self, kind: type[Message], context: Any) -> Any:
        import grpc

        async with self._room.seat(_address(context.peer())):
            data = await context.read()
        if data is grpc.aio.EOF:
            raise GatewayRefusal(pb.MALFORMED, "the call holds no request")
        try:
            return kind.FromString(data)
        except DecodeError:
            raise GatewayRefusal(pb.MALFORMED, "the request cannot be read") from None

    async def _refuse(self, context: Any, error: FedcoreError) -> bytes:
        import grpc

        if isinstance(error, GatewayRefusal):
            refusal = error
        elif isinstance(error, TryAgain):
            _LOG.warning("%s", one_line(str(error)))
            refusal = GatewayRefusal(pb.BUSY, "the gateway cannot do this now", retry_after=1000)
        else:
            refusal = GatewayRefusal(pb.MALFORMED, one_line(str(error))[:_TEXT])
        metadata = ((FAILURE_KEY, refusal.failure().SerializeToString()),)
        await context.abort(getattr(grpc.StatusCode, STATUS[refusal.reason]), one_line(str(refusal))[:_TEXT], metadata)
        raise AssertionError  # abort raises

    # Who calls

    async def _caller(self, request: pb.SignedRequest, method: str, told: str = "") -> _Caller:
        """The device behind a request: format, key, signature, clock, number and nonce, standing, rate; in this order, so that
        nothing is kept of what a stranger sends.

        Raises:
            GatewayRefusal: it is refused.
        """
        self._check_form(request)
        known = await self._device(request.device)
        check_request(request, method, known.algorithm, known.public_key)
        now = self._clock()
        if abs(request.time_ms - 1000 * now) > WINDOW:
            raise GatewayRefusal(pb.CLOCK, "the device's clock is more than five minutes off", time=self._time(request.nonce))
        if method != "Renew" and now > known.not_after:
            renewed = await self._committer.call(lambda store: store.device(request.device))
            if renewed is None or now > renewed.not_after:
                raise GatewayRefusal(pb.EXPIRED, "the device's certificate has ended: Renew")
            self._keep(renewed)
        return await self._admitted(request, told)

    async def _admitted(self, request: pb.SignedRequest, told: str = "") -> _Caller:
        self._per_device.take(request.device)
        verdict = await self._committer.admit(Admission(request.device, request.counter, request.nonce, told))
        if verdict.problem is not None or verdict.device is None:
            reason, text = _PROBLEMS[verdict.problem or Problem.UNKNOWN]
            self._keys.pop(request.device, None)
            raise GatewayRefusal(reason, f"device {spell(request.device)}: {text}")
        return _Caller(verdict.device, request)

    def _check_form(self, request: pb.SignedRequest) -> None:
        if request.protocol != PROTOCOL:
            text = f"protocol {request.protocol} is not spoken here"
            raise GatewayRefusal(pb.PROTOCOL, text, lacks=[f"protocol-{PROTOCOL}"])
        if request.deployment != self._settings.trust.deployment:
            raise GatewayRefusal(pb.UNKNOWN_DEVICE, "this gateway serves another deployment")
        if len(request.nonce) != NONCE or not (0 < request.counter < 1 << 53 and request.device < 1 << 63):
            raise GatewayRefusal(pb.MALFORMED, "nonce, counter or device is out of bounds")

    async def _device(self, device: int) -> Device:
        known = self._keys.get(device)
        if known is None:
            known = await self._committer.call(lambda store: store.device(device))
            if known is None:
                raise GatewayRefusal(*_PROBLEMS[Problem.UNKNOWN])
            self._keep(known)
        return known

    def _keep(self, device: Device) -> None:
        self._keys[device.id] = device
        if len(self._keys) > _KEYS_KEPT:
            self._keys.popitem(last=False)

    def _bearer(self, token: bytes) -> tuple[RoundToken, OpenRound]:
        """Who shows a round token, and the round while it runs.

        Raises:
            GatewayRefusal: it is none, or the round is over.
        """
        found = read_token(self._settings.token_secret, token, self._now())
        one = self.board.get(found.round_key)
        if one is None or not one.running:
            raise GatewayRefusal(pb.LATE, one.document.reason if one and one.document.reason else "the round is over")
        self._transfers.take(found.device)
        return found, one

    # Calls

    async def _enroll(self, request: pb.EnrollRequest) -> pb.EnrollReply:
        self._enrolments.take("all")
        trust = self._settings.trust.encode()
        if not request.public_key:
            return pb.EnrollReply(trust=trust)
        if len(request.nonce) != NONCE or len(request.token_id) != 16:
            raise GatewayRefusal(pb.MALFORMED, "nonce or token is out of bounds")
        enrolment = await asyncio.to_thread(self._signer.enrol, request)
        await self._register(enrolment)
        return pb.EnrollReply(trust=trust, enrolment=enrolment.encode(), server_time=self._time(request.nonce))

    async def _renew(self, request: pb.SignedRequest) -> pb.RenewReply:
        self._check_form(request)
        try:
            held = Enrolment.decode(_body(pb.RenewBody, request).enrolment)
            check_enrolment(held, self._settings.trust.deployment, self._settings.trust.enrolment_key)
        except Refused as error:
            raise GatewayRefusal(pb.MALFORMED, str(error)) from None
        if held.device != request.device:
            raise GatewayRefusal(pb.MALFORMED, "the enrolment is another device's")
        check_request(request, "Renew", held.certificate.algorithm, held.certificate.public_key)
        if await self._committer.call(lambda store: store.device(held.device)) is None:
            await self._register(held)
        await self._caller(request, "Renew")
        enrolment = await asyncio.to_thread(self._signer.renew, request)
        await self._register(enrolment)
        return pb.RenewReply(enrolment=enrolment.encode(), server_time=self._time(request.nonce))

    async def _check_in(self, request: pb.SignedRequest) -> pb.CheckInReply:
        body = _body(pb.CheckInBody, request)
        told = Told.of(body)
        caller = await self._caller(request, "CheckIn", told.encode())
        end = asyncio.get_running_loop().time() + self._settings.hold
        noted = ""
        while True:
            reply, forming = self._answer(caller.device, told, await self._done(caller.device))
            if reply is not None:
                reply.server_time.CopyFrom(self._time(request.nonce))
                return reply
            if forming is None:
                raise GatewayRefusal(pb.BUSY, "no answer")
            visit = forming.document.visit
            if visit is not None and not is_for(body.round_key, visit):
                asked = pb.Visit(task=visit[0], epoch=visit[1], expiry=visit[2])
                return pb.CheckInReply(visit=asked, server_time=self._time(request.nonce))
            if noted != forming.round.key:
                noted = forming.round.key
                await self._committer.note(noted, PRESENT, Note(caller.device.id, _present(told, body), self._clock()))
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return self._wait_reply(request.nonce, 100 + int(900 * self._draw.random()), "the round is still being formed")
            await self.board.changed(left)

    async def _done(self, device: Device) -> set[str]:
        """The running rounds that count an upload of the device already."""
        done = set()
        for one in self.board.running():
            key, last = one.round.key, device.participations.get(one.round.task, (0, -1))[1]
            if device.id in one.document.cohort and last >= one.round.number:
                counted = await self._committer.call(lambda store, key=key: store.contributions(key))  # type: ignore[misc]
                if any(contribution.device == device.id for contribution in counted):
                    done.add(key)
        return done

    def _answer(self, device: Device, told: Told, done: set[str]) -> tuple[pb.CheckInReply | None, OpenRound | None]:
        """The reply to a check-in, or the round that it is held for."""
        reason, lacks = "no round now", list[str]()
        for one in self.board.running():
            if device.id in one.document.cohort and one.round.key not in done:
                return pb.CheckInReply(assignment=self._assignment(device.id, one)), None
            reason = "not selected for this round"
        for one in self.board.forming():
            selection, number = one.document.selection, one.round.number
            why = why_ineligible(told, device.participations.get(one.round.task), selection, number)
            if not why:
                return None, one
            reason, lacks = why, [*lacks, *lacking(told, selection)]
        period = self._settings.pace.period(self._fleet)
        first = not device.last_seen
        draws = self._draw.random(), self._draw.random()
        seconds = float(first_wait(period, *draws)) if first else float(wait(period, draws[0]))
        return pb.CheckInReply(wait=pb.Wait(retry_after_ms=int(1000 * seconds), reason=reason), lacks=lacks), None

    def _wait_reply(self, nonce: bytes, milliseconds: int, reason: str) -> pb.CheckInReply:
        return pb.CheckInReply(wait=pb.Wait(retry_after_ms=milliseconds, reason=reason), server_time=self._time(nonce))

    def _assignment(self, device: int, one: OpenRound) -> pb.Assignment:
        place = one.document.cohort[device]
        signed = pb.SignedPlan.FromString(one.document.plans[place.plan])
        plan = pb.Plan.FromString(signed.plan)
        token = issue_token(self._settings.token_secret, device, one.round.key, plan.expires_ms)
        invitation = self._blobs.get(place.invitation) if place.invitation else b""
        return pb.Assignment(plan=signed, token=token, invitation=invitation)

    async def _fetch(self, request: pb.FetchRequest) -> AsyncIterator[pb.FetchReply]:
        token, one = self._bearer(request.token)
        if request.digest not in one.document.blobs(token.device):
            raise GatewayRefusal(pb.NO_SUCH_BLOB, "the plan names no such blob")
        total = self._blobs.size(request.digest)
        if request.offset > total:
            raise GatewayRefusal(pb.MALFORMED, f"the blob has {total} bytes; there is nothing at {request.offset}")
        yield pb.FetchReply(total=total)
        for piece in self._blobs.read(request.digest, request.offset, min(request.length, total)):
            yield pb.FetchReply(data=piece)

    async def _stage(self, request: pb.StageRequest) -> pb.StageReply:
        token, one = self._bearer(request.token)
        terms = _terms(one)
        end = request.offset + len(request.data)
        if len(request.digest) != 32 or request.total > terms.most_bytes or end > request.total:
            raise GatewayRefusal(pb.UNUSABLE, f"an upload of this round has at most {terms.most_bytes} bytes")
        if len(request.data) > _LARGEST_PIECE:
            raise GatewayRefusal(pb.MALFORMED, f"a piece has at most {_LARGEST_PIECE} bytes")
        name = _staged_name(token.round_key, token.device)
        return pb.StageReply(staged=self._blobs.stage(name, request.digest, request.offset, request.data))

    async def _upload(self, request: pb.SignedRequest) -> pb.UploadReply:
        caller = await self._caller(request, "Upload")
        body = _body(pb.UploadBody, request)
        token, one = self._bearer(body.token)
        if token.device != caller.device.id:
            raise GatewayRefusal(pb.NO_SUCH_ROUND, "the round token is another device's")
        terms, name = _terms(one), _staged_name(token.round_key, token.device)
        if len(body.data) > _LARGEST_UPLOAD:
            raise GatewayRefusal(pb.MALFORMED, f"an upload of more than {_LARGEST_UPLOAD} bytes is staged")
        data = body.data or self._blobs.take_staged(name, body.digest)
        if hashlib.sha256(data).digest() != body.digest:
            self._blobs.discard_staged(name)
            raise GatewayRefusal(pb.UNUSABLE, "the upload is not what its digest says; stage it again")
        try:
            part = None if terms.encoding == "masked" else read_upload(data, terms)
        except Refused as error:
            raise GatewayRefusal(pb.UNUSABLE, f"the upload cannot be used: {error}") from None
        if len(data) > terms.most_bytes:
            raise GatewayRefusal(pb.UNUSABLE, f"an upload of this round has at most {terms.most_bytes} bytes")
        if terms.kept:
            await asyncio.to_thread(self._blobs.put, data)
        contribution = Contribution(token.device, body.digest)
        repeated = await self._committer.count(token.round_key, contribution, None if terms.kept else part)
        if not body.data:
            self._blobs.discard_staged(name)
        return pb.UploadReply(repeated=repeated)

    async def _report(self, request: pb.SignedRequest) -> pb.ReportReply:
        caller = await self._caller(request, "Report")
        body = _body(pb.ReportBody, request)
        token = read_token(self._settings.token_secret, body.token, 0)  # a report may come after the round
        one = self.board.get(token.round_key)
        if token.device != caller.device.id:
            raise GatewayRefusal(pb.NO_SUCH_ROUND, "the round token is another device's")
        if one is None:
            return pb.ReportReply(stop=True, reason="the round is over")
        facts = {field.name: value for field, value in body.ListFields() if field.name not in {"token", "text"}}
        said = json.dumps(facts | {"text": one_line(body.text)[:_TEXT]})
        await self._committer.note(token.round_key, REPORT, Note(caller.device.id, said, self._clock()))
        over = not one.running or self._clock() > one.document.until
        return pb.ReportReply(stop=over, reason=(one.document.reason or "the round is over") if over else "")

    async def _forget(self, request: pb.SignedRequest) -> pb.ForgetReply:
        caller = await self._caller(request, "Forget")
        device = caller.device.id
        await self._committer.call(lambda store: store.judge(device, Standing.FORGOTTEN, "by its owner"))
        self._keys.pop(device, None)
        return pb.ForgetReply()

    # What goes on beside

    async def _tidy(self) -> None:
        """Once a minute: count the devices seen in two days, forget what can come no more."""
        while True:
            try:
                now = self._clock()
                await self._committer.call(lambda store, now=now: store.prune(now, now - _UNFINISHED))  # type: ignore[misc]
                self._fleet = await self._committer.call(lambda store, now=now: _active(store, now))  # type: ignore[misc]
                await asyncio.to_thread(self._blobs.sweep, _UNFINISHED)
            except (FedcoreError, OSError) as error:
                _LOG.warning("tidying up: %s", one_line(str(error)))
            await asyncio.sleep(60 + 10 * self._fleet / 1000)

    async def _register(self, enrolment: Enrolment) -> None:
        certificate = enrolment.certificate
        device = Device(enrolment.device, certificate.algorithm, certificate.public_key, certificate.not_after, self._clock())
        self._keep(await self._committer.call(lambda store: store.register(device)))

    def _time(self, nonce: bytes) -> pb.ServerTime:
        return server_time(self._settings.time_key, self._settings.trust.deployment, nonce, self._now())

    def _now(self) -> int:
        return int(1000 * self._clock())

    @property
    def _signer(self) -> EnrolmentSigner:
        if self._settings.signer is None:
            raise GatewayRefusal(pb.ENROLMENT_CLOSED, "this gateway enrols nobody", retry_after=3_600_000)
        return self._settings.signer


def _active(store: GatewayStore, now: float) -> int:
    return sum(one.standing is Standing.ACTIVE and one.last_seen > now - 2 * 86_400 for one in store.devices())


def _body(kind: type[Any], request: pb.SignedRequest) -> Any:
    try:
        return kind.FromString(request.body)
    except DecodeError:
        raise GatewayRefusal(pb.MALFORMED, "the body of the request cannot be read") from None


def _terms(one: OpenRound) -> UploadTerms:
    if one.document.uploads is None or one.round.state is not RoundState.RUNNING:
        raise GatewayRefusal(pb.LATE, "the round takes no uploads")
    return one.document.uploads


def _present(told: Told, body: pb.CheckInBody) -> str:
    return json.dumps({"told": told.encode(), "round_key": body.round_key.hex()})


def _staged_name(round_key: str, device: int) -> str:
    return f"{round_key}-{spell(device)}"


def _address(peer: str) -> str:
    """The network address of a peer such as ipv4:127.0.0.1:4711, without its port."""
    return peer.rpartition(":")[0]
