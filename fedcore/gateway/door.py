"""Who a request is from: everything that is checked before a gateway does anything for a device."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.commits import Committer
from fedcore.gateway.enrolment import EnrolmentSigner
from fedcore.gateway.fleet import HOLD
from fedcore.gateway.identity import PROTOCOL, WINDOW, check_request, server_time, spell
from fedcore.gateway.limits import Buckets, Limits
from fedcore.gateway.messages import NONCE, Enrolment, FleetTrust
from fedcore.gateway.pace import Pace
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.registry.files import Files
from fedcore.secagg.crypto import Signer, digest
from fedcore.state.gateway import Admission, Device, Problem

__all__ = ["Door", "GatewaySettings"]

_KEYS_KEPT = 200_000
_PROBLEMS = {
    Problem.UNKNOWN: (pb.UNKNOWN_DEVICE, "the device is not known here: Renew shows its enrolment"),
    Problem.REPLAYED: (pb.REPLAYED, "this request was seen before, or comes after a later one"),
    Problem.REVOKED: (pb.REVOKED, "the identity has been revoked"),
    Problem.QUARANTINED: (pb.QUARANTINED, "the device's state was copied: two requests carried one number"),
    Problem.FORGOTTEN: (pb.REVOKED, "the device was withdrawn by its owner"),
}


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway goes by. ``time_key`` signs its clock; it and ``token_secret`` are one for all gateways of a fleet.

    ``signer`` enrols and renews; without one both are refused. ``hold``: seconds that a check-in is held at most. ``repository``:
    releases, if there are any; devices ask for theirs every ``release_every`` seconds.
    """

    trust: FleetTrust
    time_key: Signer = field(repr=False)
    token_secret: bytes = field(repr=False)
    signer: EnrolmentSigner | None = None
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)
    hold: float = HOLD
    repository: Files | None = None
    release_every: float = 1800.0

    @classmethod
    def of(cls, trust: FleetTrust, time_key: Signer, secret: bytes, **others: Any) -> GatewaySettings:
        """Settings whose token secret is derived from what only the fleet's gateways know.

        Raises:
            Refused: the trust bundle does not name the time key.
        """
        if time_key.public not in trust.time_keys:
            raise Refused("this is not a time key that the trust bundle names")
        return cls(trust, time_key, digest("round tokens", secret), **others)


class Door:
    """Lets requests in. ``clock`` in Unix seconds."""

    def __init__(self, settings: GatewaySettings, committer: Committer, clock: Callable[[], float]) -> None:
        self._settings, self._committer, self._clock = settings, committer, clock
        limits = settings.limits
        self._per_device, self._enrolments = Buckets(limits.rate, limits.burst), Buckets(limits.enrolments, limits.enrolments)
        self._known: OrderedDict[int, Device] = OrderedDict()  # of which only id, key and certificate's end are used

    async def caller(self, request: pb.SignedRequest, method: str, told: str = "") -> Device:
        """The device behind a request, as the store held it before. Format, key, signature, clock, rate, number and nonce, and
        standing are checked in this order, so that nothing is kept of what a stranger sends.

        Raises:
            GatewayRefusal: it is refused.
        """
        self.check_form(request)
        known = await self._device(request.device)
        check_request(request, method, known.algorithm, known.public_key)
        now = self._clock()
        if abs(request.time_ms - 1000 * now) > WINDOW:
            raise GatewayRefusal(pb.CLOCK, "the device's clock is more than five minutes off", time=self.time(request.nonce))
        if method != "Renew" and now > known.not_after:
            self.forget(request.device)  # another gateway may have renewed it
            if now > (await self._device(request.device)).not_after:
                raise GatewayRefusal(pb.EXPIRED, "the device's certificate has ended: Renew")
        self._per_device.take(request.device)
        verdict = await self._committer.admit(Admission(request.device, request.counter, request.nonce, told))
        if verdict.problem is not None or verdict.device is None:
            self.forget(request.device)
            reason, text = _PROBLEMS[verdict.problem or Problem.UNKNOWN]
            raise GatewayRefusal(reason, f"device {spell(request.device)}: {text}")
        return verdict.device

    def check_form(self, request: pb.SignedRequest) -> None:
        """See that a request is for this protocol and deployment and within bounds.

        Raises:
            GatewayRefusal: it is not.
        """
        if request.protocol != PROTOCOL:
            text = f"protocol {request.protocol} is not spoken here"
            raise GatewayRefusal(pb.PROTOCOL, text, lacks=[f"protocol-{PROTOCOL}"])
        if request.deployment != self._settings.trust.deployment:
            raise GatewayRefusal(pb.UNKNOWN_DEVICE, "this gateway serves another deployment")
        if len(request.nonce) != NONCE or not (0 < request.counter < 1 << 53 and request.device < 1 << 63):
            raise GatewayRefusal(pb.MALFORMED, "nonce, counter or device is out of bounds")

    async def enrol(self, request: pb.EnrollRequest) -> Enrolment:
        """What the signer says to a device that has a token.

        Raises:
            GatewayRefusal: it is refused.
        """
        if len(request.nonce) != NONCE or len(request.token_id) != 16:
            raise GatewayRefusal(pb.MALFORMED, "nonce or token is out of bounds")
        enrolment = await asyncio.to_thread(self._signer.enrol, request)
        await self.register(enrolment)
        return enrolment

    async def renew(self, request: pb.SignedRequest) -> Enrolment:
        """What the signer says to a device that wants a new certificate. Raises as `enrol`."""
        enrolment = await asyncio.to_thread(self._signer.renew, request)
        await self.register(enrolment)
        return enrolment

    async def register(self, enrolment: Enrolment) -> None:
        """Let the store know a device by an enrolment that was checked."""
        one, labels = enrolment.certificate, await asyncio.to_thread(self._signer.labels, enrolment.device)
        device = Device(enrolment.device, one.algorithm, one.public_key, one.not_after, self._clock(), labels=labels)
        self._keep(await self._committer.call(lambda store: store.register(device)))

    def strangers_turn(self) -> None:
        """Count an enrolment.

        Raises:
            GatewayRefusal: there are too many.
        """
        self._enrolments.take("all")

    def time(self, nonce: bytes) -> pb.ServerTime:
        """The signed clock, for whoever sent this nonce."""
        return server_time(self._settings.time_key, self._settings.trust.deployment, nonce, int(1000 * self._clock()))

    def forget(self, device: int) -> None:
        """Ask the store for this device next time."""
        self._known.pop(device, None)

    async def _device(self, device: int) -> Device:
        known = self._known.get(device)
        if known is None:
            known = await self._committer.call(lambda store: store.device(device))
            if known is None:
                raise GatewayRefusal(*_PROBLEMS[Problem.UNKNOWN])
            self._keep(known)
        return known

    def _keep(self, device: Device) -> None:
        self._known[device.id] = device
        if len(self._known) > _KEYS_KEPT:
            self._known.popitem(last=False)

    @property
    def _signer(self) -> EnrolmentSigner:
        if self._settings.signer is None:
            raise GatewayRefusal(pb.ENROLMENT_CLOSED, "this gateway enrols nobody", retry_after=3_600_000)
        return self._settings.signer
