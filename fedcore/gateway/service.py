"""The gateway as a gRPC service. Decisions are made in `fleet`, `identity` and `sums`; here is who may call what, in which order
a request is checked, and what a stranger can cost. A gateway keeps nothing of its own: any number of them may share a store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from fedcore.errors import FedcoreError, Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.board import Board, OpenRound
from fedcore.gateway.calls import streaming, unary
from fedcore.gateway.commits import Committer
from fedcore.gateway.door import Door, GatewaySettings
from fedcore.gateway.fleet import Told, lacking, why_ineligible
from fedcore.gateway.identity import check_enrolment, check_request, issue_token, read_token, spell
from fedcore.gateway.limits import Buckets, Places, ReadingRoom
from fedcore.gateway.messages import Enrolment, RoundToken
from fedcore.gateway.metrics import Family, FleetView, Labels, Meter, view_of
from fedcore.gateway.pace import first_wait, wait
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.gateway.releases import Desk
from fedcore.gateway.repository import REPOSITORY, read_out
from fedcore.gateway.rounds import ENDED, ENDS, PRESENT, REPORT, is_for, named_blobs
from fedcore.gateway.sums import UploadTerms, read_upload
from fedcore.registry.assignment import LONGEST
from fedcore.secagg.committee_wire import one_line
from fedcore.state.gateway import Contribution, Device, GatewayStore, Note, RoundState, Standing

__all__ = ["SERVICE", "Gateway"]

SERVICE = "fedcore.gateway.v1.Gateway"
_LARGEST_UPLOAD, _LARGEST_PIECE, _TEXT = 4_000_000, 1 << 20, 300
_KEYS_KEPT = 200_000
_UNFINISHED = 3600.0  # seconds that a staged upload is kept
_UNNAMED, _LOOKS_AT_BLOBS = 86_400.0, 100  # seconds that a blob is kept that nothing names; looks in that time
_MOST_ATTEMPTS = 100  # of a round, as the configuration allows
_LOG = logging.getLogger(__name__)


class Gateway:
    """Answers the calls of gateway.proto. Build it in a running event loop; `follow` must run beside it."""

    def __init__(
        self, settings: GatewaySettings, committer: Committer, blobs: Blobs, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._settings, self._committer, self._blobs, self._clock = settings, committer, blobs, clock
        limits = settings.limits
        self.board, self.meter = Board(committer), Meter()
        self._viewed, self._view = 0.0, FleetView({}, {}, {})
        self._room, self._door = ReadingRoom(limits), Door(settings, committer, clock)
        self._downloads = Places(limits.downloads)
        self._transfers = Buckets(50 * limits.rate, 20 * limits.burst)
        self._desk = Desk(committer, settings.time_key, settings.release_every, clock)
        self._fleet, self._collected = 0, -math.inf
        self._draw = random.SystemRandom()

    def handler(self) -> Any:
        """The gRPC handler of all calls."""
        import grpc

        plain: dict[str, tuple[type[Message], Callable[[Any], Awaitable[Message]]]] = {
            "Enroll": (pb.EnrollRequest, self._enroll), "Renew": (pb.SignedRequest, self._renew),
            "CheckIn": (pb.SignedRequest, self._check_in), "Stage": (pb.StageRequest, self._stage),
            "Upload": (pb.SignedRequest, self._upload), "Report": (pb.SignedRequest, self._report),
            "Forget": (pb.SignedRequest, self._forget), "Release": (pb.SignedRequest, self._release),
        }  # fmt: skip
        limits = self._settings.limits
        calls = {
            name: grpc.stream_unary_rpc_method_handler(unary(self._room, self.meter, name, *what)) for name, what in plain.items()
        }
        fetch = streaming(self._room, self.meter, "Fetch", pb.FetchRequest, self._fetch, limits)
        calls["Fetch"] = grpc.stream_stream_rpc_method_handler(fetch)
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    async def follow(self) -> None:
        """Keep up with the rounds, the size of the fleet, and what may be forgotten; until cancelled."""
        await asyncio.gather(self.board.follow(), self._tidy())

    async def metrics(self) -> list[Family]:
        """What there is to watch. The fleet is looked at anew when the last look is older than a second, and a millisecond for each
        device.

        Raises:
            TryAgain: the store is away.
        """
        now = self._clock()
        if now >= self._viewed + 1 + self._view.devices / 1000:
            self._view, self._viewed = await self._committer.call(lambda store: view_of(store.devices(), now)), now
        running, uploads = self.board.running(), 0
        for one in running:
            uploads += len(await self._committer.call(lambda store, key=one.round.key: store.contributions(key)))  # type: ignore[misc]
        states: dict[Labels, float] = {(("state", "forming"),): len(self.board.forming()), (("state", "running"),): len(running)}
        cohort = sum(len(one.document.cohort) for one in running)
        return [
            *self.meter.families(), *self._view.families(),
            Family("fedcore_rounds", "gauge", "Rounds that go on now.", states),
            Family("fedcore_round_cohort_devices", "gauge", "Devices that work now.", {(): cohort}),
            Family("fedcore_round_uploads", "gauge", "Uploads that count in rounds that go on now.", {(): uploads}),
        ]  # fmt: skip

    async def _bearer(self, token: bytes) -> tuple[RoundToken, OpenRound]:
        """Who shows a round token, and the round while it runs.

        Raises:
            GatewayRefusal: it is none, or the round is over.
        """
        found = read_token(self._settings.token_secret, token, self._now())
        one = self.board.get(found.round_key)
        if one is None or one.forming:  # another gateway gave the token, and saw the round begin before this one
            await self.board.look()
            one = self.board.get(found.round_key)
        if one is None or not one.running:
            raise GatewayRefusal(pb.LATE, one.document.reason if one and one.document.reason else "the round is over")
        self._transfers.take(found.device)
        return found, one

    # Calls

    async def _enroll(self, request: pb.EnrollRequest) -> pb.EnrollReply:
        self._door.strangers_turn()
        trust = self._settings.trust.encode()
        if not request.public_key:
            return pb.EnrollReply(trust=trust)
        enrolment = await self._door.enrol(request)
        return pb.EnrollReply(trust=trust, enrolment=enrolment.encode(), server_time=self._door.time(request.nonce))

    async def _renew(self, request: pb.SignedRequest) -> pb.RenewReply:
        self._door.check_form(request)
        try:
            held = Enrolment.decode(_body(pb.RenewBody, request).enrolment)
            check_enrolment(held, self._settings.trust.deployment, self._settings.trust.enrolment_key)
        except Refused as error:
            raise GatewayRefusal(pb.MALFORMED, str(error)) from None
        if held.device != request.device:
            raise GatewayRefusal(pb.MALFORMED, "the enrolment is another device's")
        check_request(request, "Renew", held.certificate.algorithm, held.certificate.public_key)
        if await self._committer.call(lambda store: store.device(held.device)) is None:
            await self._door.renew(request)  # a store that was lost learns of the device, unless the signer knows it as revoked
        await self._door.caller(request, "Renew")
        enrolment = await self._door.renew(request)
        return pb.RenewReply(enrolment=enrolment.encode(), server_time=self._door.time(request.nonce))

    async def _check_in(self, request: pb.SignedRequest) -> pb.CheckInReply:
        body = _body(pb.CheckInBody, request)
        told = Told.of(body)
        device = await self._door.caller(request, "CheckIn", told.encode())
        end = asyncio.get_running_loop().time() + self._settings.hold
        noted = ""
        while True:
            reply, forming = self._answer(device, told, await self._done(device))
            if reply is not None:
                reply.server_time.CopyFrom(self._door.time(request.nonce))
                return reply
            if forming is None:
                raise GatewayRefusal(pb.BUSY, "no answer")
            visit = forming.document.visit
            if visit is not None and not is_for(body.round_key, visit):
                asked = pb.Visit(task=visit[0], epoch=visit[1], expiry=visit[2])
                return pb.CheckInReply(visit=asked, server_time=self._door.time(request.nonce))
            if noted != forming.round.key:
                noted = forming.round.key
                await self._committer.note(noted, PRESENT, Note(device.id, _present(told, body), self._clock()))
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return self._wait_reply(request.nonce, 100 + int(900 * self._draw.random()), "the round is still being formed")
            await self.board.changed(left)

    async def _done(self, device: Device) -> set[str]:
        """The running rounds that the device is done with: its upload counts already, or it said that there will be none."""
        done = set()
        for one in self.board.running():
            if device.id in one.document.cohort and await self._has_ended(one.round.key, device.id):
                done.add(one.round.key)
                continue
            key, last = one.round.key, device.participations.get(one.round.task, (0, -1))[1]
            if device.id in one.document.cohort and last >= one.round.number:
                counted = await self._committer.call(lambda store, key=key: store.contributions(key))  # type: ignore[misc]
                if any(contribution.device == device.id for contribution in counted):
                    done.add(key)
        return done

    async def _has_ended(self, key: str, device: int) -> bool:
        notes = await self._committer.call(lambda store: store.notes(key, ENDED))
        return any(note.device == device for note in notes)

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
        return pb.CheckInReply(wait=pb.Wait(retry_after_ms=milliseconds, reason=reason), server_time=self._door.time(nonce))

    def _assignment(self, device: int, one: OpenRound) -> pb.Assignment:
        place = one.document.cohort[device]
        signed = pb.SignedPlan.FromString(one.document.plans[place.plan])
        plan = pb.Plan.FromString(signed.plan)
        token = issue_token(self._settings.token_secret, device, one.round.key, plan.expires_ms)
        invitation = self._blobs.get(place.invitation) if place.invitation else b""
        return pb.Assignment(plan=signed, token=token, invitation=invitation)

    async def _release(self, request: pb.SignedRequest) -> pb.ReleaseReply:
        body = _body(pb.ReleaseBody, request)
        device = await self._door.caller(request, "Release")
        assignment, reason = await self._desk.answer(device, body)
        wait_ms = int(1000 * self._settings.release_every * (0.8 + 0.4 * self._draw.random()))
        token = b""
        if self._settings.repository is not None:
            token = issue_token(self._settings.token_secret, device.id, REPOSITORY, self._now() + 1000 * LONGEST)
        told = self._door.time(request.nonce)
        return pb.ReleaseReply(assignment=assignment, token=token, retry_after_ms=wait_ms, reason=reason, server_time=told)

    async def _fetch(self, request: pb.FetchRequest) -> AsyncGenerator[pb.FetchReply, None]:
        if request.name:
            async with contextlib.aclosing(self._read_out(request)) as replies:
                async for reply in replies:
                    yield reply
            return
        token, one = await self._bearer(request.token)
        if request.digest not in one.document.blobs(token.device):
            raise GatewayRefusal(pb.NO_SUCH_BLOB, "the plan names no such blob")
        total = self._blobs.size(request.digest)
        if request.offset > total:
            raise GatewayRefusal(pb.MALFORMED, f"the blob has {total} bytes; there is nothing at {request.offset}")
        with self._downloads.hold(token.device):
            yield pb.FetchReply(total=total)
            for piece in self._blobs.read(request.digest, request.offset, min(request.length, total)):
                yield pb.FetchReply(data=piece)

    async def _read_out(self, request: pb.FetchRequest) -> AsyncGenerator[pb.FetchReply, None]:
        token = read_token(self._settings.token_secret, request.token, self._now())
        if token.round_key != REPOSITORY:
            raise GatewayRefusal(pb.NO_SUCH_ROUND, "the token is a round's, not one for the release repository")
        if self._settings.repository is None:
            raise GatewayRefusal(pb.NO_SUCH_BLOB, "this gateway serves no release repository")
        self._transfers.take(token.device)
        with self._downloads.hold(token.device):
            async for reply in read_out(self._settings.repository, request.name, request.offset, request.length):
                yield reply

    async def _stage(self, request: pb.StageRequest) -> pb.StageReply:
        token, one = await self._bearer(request.token)
        terms = _terms(one)
        end = request.offset + len(request.data)
        if len(request.digest) != 32 or request.total > terms.most_bytes or end > request.total:
            raise GatewayRefusal(pb.UNUSABLE, f"an upload of this round has at most {terms.most_bytes} bytes")
        if len(request.data) > _LARGEST_PIECE:
            raise GatewayRefusal(pb.MALFORMED, f"a piece has at most {_LARGEST_PIECE} bytes")
        name = _staged_name(token.round_key, token.device)
        return pb.StageReply(staged=self._blobs.stage(name, request.digest, request.offset, request.data))

    async def _upload(self, request: pb.SignedRequest) -> pb.UploadReply:
        device = await self._door.caller(request, "Upload")
        body = _body(pb.UploadBody, request)
        try:
            return pb.UploadReply(repeated=await self._count(device.id, body))
        except GatewayRefusal as refusal:
            if refusal.reason != pb.LATE:
                raise
            # The answer may have been lost, and the round over meanwhile: what was counted is never called late.
            key = self._owned(device.id, body.token).round_key
            counted = await self._committer.call(lambda store: store.contributions(key))
            if Contribution(device.id, body.digest) not in counted:
                raise
        return pb.UploadReply(repeated=True)

    async def _count(self, device: int, body: pb.UploadBody) -> bool:
        """Take an upload into its round; whether it was counted before."""
        self._owned(device, body.token)
        token, one = await self._bearer(body.token)
        terms, name = _terms(one), _staged_name(token.round_key, device)
        if len(body.data) > _LARGEST_UPLOAD:
            raise GatewayRefusal(pb.MALFORMED, f"an upload of more than {_LARGEST_UPLOAD} bytes is staged")
        data = body.data or self._blobs.take_staged(name, body.digest)
        if len(data) > terms.most_bytes:
            raise GatewayRefusal(pb.UNUSABLE, f"it has {len(data)} bytes, the plan allows {terms.most_bytes}")
        if hashlib.sha256(data).digest() != body.digest:
            self._blobs.discard_staged(name)
            raise GatewayRefusal(pb.UNUSABLE, "the upload is not what its digest says; stage it again")
        try:
            part = None if terms.encoding == "masked" else read_upload(data, terms)
        except Refused as error:
            told = json.dumps({"outcome": pb.FAILED, "text": f"unusable upload: {one_line(str(error))}"[:_TEXT]})
            for kind in (REPORT, ENDED):
                await self._committer.note(token.round_key, kind, Note(device, told, self._clock()))
            raise GatewayRefusal(pb.UNUSABLE, f"the upload cannot be used: {error}") from None
        if terms.kept:
            await asyncio.to_thread(self._blobs.put, data)
        repeated = await self._committer.count(token.round_key, Contribution(device, body.digest), None if terms.kept else part)
        if not body.data:
            self._blobs.discard_staged(name)
        return repeated

    def _owned(self, device: int, token: bytes) -> RoundToken:
        """A device's own round token, also after its end.

        Raises:
            GatewayRefusal: it is none, or another device's.
        """
        found = read_token(self._settings.token_secret, token, 0)
        if found.device != device:
            raise GatewayRefusal(pb.NO_SUCH_ROUND, "the round token is another device's")
        return found

    async def _report(self, request: pb.SignedRequest) -> pb.ReportReply:
        device = await self._door.caller(request, "Report")
        body = _body(pb.ReportBody, request)
        token = self._owned(device.id, body.token)
        one = self.board.get(token.round_key)
        if one is None:
            return pb.ReportReply(stop=True, reason="the round is over")
        facts = {field.name: value for field, value in body.ListFields() if field.name not in {"token", "text"}}
        said = json.dumps(facts | {"text": one_line(body.text)[:_TEXT]})
        for kind in (REPORT, ENDED) if body.outcome in ENDS else (REPORT,):
            await self._committer.note(token.round_key, kind, Note(device.id, said, self._clock()))
        over = not one.running or self._clock() > one.document.until
        return pb.ReportReply(stop=over, reason=(one.document.reason or "the round is over") if over else "")

    async def _forget(self, request: pb.SignedRequest) -> pb.ForgetReply:
        device = await self._door.caller(request, "Forget")
        await self._committer.call(lambda store: store.judge(device.id, Standing.FORGOTTEN, "by its owner"))
        self._door.forget(device.id)
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
                await self._forget_blobs()
            except (FedcoreError, OSError) as error:
                _LOG.warning("tidying up: %s", one_line(str(error)))
            await asyncio.sleep(60 + 10 * self._fleet / 1000)

    async def _forget_blobs(self) -> None:
        """Now and then: forget blobs of rounds that are forgotten, which failed rounds and killed coordinators leave behind.

        A coordinator that waits for devices names what it put when it began only with its next plan, after a hundred windows at
        most (`cohort.attempts`); until then, and for a day, everything stays.
        """
        if time.monotonic() < self._collected + _UNNAMED / _LOOKS_AT_BLOBS:
            return
        named, window = await self._committer.call(named_blobs)
        removed = await asyncio.to_thread(self._blobs.collect, named, _UNNAMED + _MOST_ATTEMPTS * window)
        self._collected = time.monotonic()
        if removed:
            _LOG.info("%d blobs that no round names were removed", removed)

    def _now(self) -> int:
        return int(1000 * self._clock())


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
