"""The enrolment signer: the party that holds the enrolment key, and no gateway or coordinator. It knows every token and what it
was used for; gateways carry requests to it and certificates back, over gRPC, and can forge neither.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Protocol

from google.protobuf.message import DecodeError

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.identity import EnrolmentToken, check_enrolment, check_proof, check_request, mac_key, spell
from fedcore.gateway.messages import ENROLMENT, Enrolment, FleetTrust
from fedcore.gateway.refusals import FAILURE_KEY, STATUS, GatewayRefusal
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.committee_wire import one_line
from fedcore.secagg.crypto import ED25519, KEY_LENGTHS, Signer
from fedcore.secagg.messages import Certificate
from fedcore.secagg.trust import issue_certificate
from fedcore.state.sqlite import transaction

__all__ = ["EnrolmentServer", "EnrolmentSigner", "LocalSigner", "RemoteSigner", "check_labels"]

SERVICE = "fedcore.enrolment.v1"
_DAY = 24 * 3600
_LONGEST = 1 << 16
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS tokens (id BLOB PRIMARY KEY, mac_key BLOB NOT NULL, expiry REAL NOT NULL, algorithm INTEGER,
       public_key BLOB, enrolment BLOB)""",
    "CREATE TABLE IF NOT EXISTS devices (device INTEGER PRIMARY KEY, public_key BLOB NOT NULL UNIQUE, revoked INTEGER NOT NULL)",
)
_ADDED = ("tokens", "devices")  # tables that had no labels once
_MOST_LABELS, _LONGEST_LABEL = 32, 64
_LOG = logging.getLogger(__name__)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels that an operator gives a device, each once and sorted.

    Raises:
        Refused: too many, too long, or unprintable.
    """
    found = tuple(sorted(set(labels)))
    if len(found) > _MOST_LABELS or not all(1 <= len(one) <= _LONGEST_LABEL and one.isprintable() for one in found):
        raise Refused(f"a device has at most {_MOST_LABELS} labels, each of 1 to {_LONGEST_LABEL} printable characters")
    return found


class EnrolmentSigner(Protocol):
    """Who turns requests into enrolments; what it refuses is a `GatewayRefusal`."""

    def enrol(self, request: pb.EnrollRequest) -> Enrolment:
        """The enrolment for a token and key; the same again for the same ones."""
        ...

    def renew(self, request: pb.SignedRequest) -> Enrolment:
        """A device's enrolment with a new certificate; ``request`` is the device's call to Renew."""
        ...

    def labels(self, device: int) -> tuple[str, ...]:
        """What the operator labelled an enrolled device with; nothing that the device says changes it."""
        ...


class LocalSigner:
    """The signer itself. ``key`` is the enrolment key; ``file`` keeps tokens and devices, and is this process's alone to write.

    Certificates last ``days``.
    """

    def __init__(
        self, key: Signer, trust: FleetTrust, file: Path, *, days: int = 365, clock: Callable[[], float] = time.time,
        random: RandomBytes = os.urandom,
    ) -> None:  # fmt: skip
        if key.public != trust.enrolment_key or key.algorithm != ED25519:
            raise Refused("this is not the enrolment key that the trust bundle names")
        self._key, self._trust, self._days, self._clock, self._random = key, trust, days, clock, random
        self._turn = threading.Lock()
        self._file = file
        with self._clear_errors():
            file.touch(0o600)
            self._db = sqlite3.connect(file, timeout=5, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA synchronous = FULL")
            for statement in _SCHEMA:
                self._db.execute(statement)
            with transaction(self._db):
                for table in _ADDED:
                    if "labels" not in {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}:
                        self._db.execute(f"ALTER TABLE {table} ADD COLUMN labels TEXT NOT NULL DEFAULT '[]'")

    def issue(self, seconds: float, labels: Sequence[str] = ()) -> EnrolmentToken:
        """A fresh token that may be used once within ``seconds``; the device that it enrols has these labels.

        Raises:
            Refused: labels that cannot be.
        """
        token, held = EnrolmentToken.fresh(self._trust, self._random), json.dumps(check_labels(labels))
        with self._turn, self._clear_errors(), transaction(self._db):
            row = (token.id, mac_key(token.secret), self._clock() + seconds, held)
            self._db.execute("INSERT INTO tokens (id, mac_key, expiry, labels) VALUES (?, ?, ?, ?)", row)
        return token

    def label(self, device: int, labels: Sequence[str]) -> tuple[str, ...]:
        """Give a device these labels instead of those that it has; as they are kept.

        Raises:
            Refused: there is no such device, or labels that cannot be.
        """
        held = check_labels(labels)
        with self._turn, self._clear_errors(), transaction(self._db):
            update = "UPDATE devices SET labels = ? WHERE device = ?"
            if not self._db.execute(update, (json.dumps(held), device)).rowcount:
                raise Refused(f"no device {spell(device)} was enrolled here")
        return held

    def labels(self, device: int) -> tuple[str, ...]:
        """See `EnrolmentSigner`."""
        with self._turn, self._clear_errors():
            row = self._db.execute("SELECT labels FROM devices WHERE device = ?", (device,)).fetchone()
        return tuple(json.loads(row[0])) if row else ()

    def revoke(self, device: int) -> None:
        """Never renew this device again.

        Raises:
            Refused: there is no such device.
        """
        with self._turn, self._clear_errors(), transaction(self._db):
            if not self._db.execute("UPDATE devices SET revoked = 1 WHERE device = ?", (device,)).rowcount:
                raise Refused(f"no device {spell(device)} was enrolled here")

    def devices(self) -> list[tuple[int, bool]]:
        """The devices enrolled here, and whether they are revoked."""
        with self._turn, self._clear_errors():
            return [(device, bool(revoked)) for device, revoked in self._db.execute("SELECT device, revoked FROM devices")]

    def enrol(self, request: pb.EnrollRequest) -> Enrolment:
        """See `EnrolmentSigner`."""
        if KEY_LENGTHS.get(request.algorithm) != len(request.public_key):
            raise GatewayRefusal(pb.MALFORMED, "the identity key is none of Ed25519 or P-256")
        with self._turn, self._clear_errors(), transaction(self._db):
            query = "SELECT mac_key, expiry, algorithm, public_key, enrolment, labels FROM tokens WHERE id = ?"
            row = self._db.execute(query, (request.token_id,)).fetchone()
            try:
                check_proof(request, row[0] if row else bytes(32))
            except Refused as error:
                raise GatewayRefusal(pb.TOKEN_REFUSED, f"the enrolment token is refused: {error}") from None
            if row is None:
                raise GatewayRefusal(pb.TOKEN_REFUSED, "the enrolment token is unknown")
            _, expiry, algorithm, public, before, labels = row
            if before is not None:
                if (algorithm, public) != (request.algorithm, request.public_key):
                    raise GatewayRefusal(pb.TOKEN_REFUSED, "the enrolment token was used for another key")
                return Enrolment.decode(before)
            if self._clock() > expiry:
                raise GatewayRefusal(pb.TOKEN_REFUSED, "the enrolment token has expired")
            return self._enrol(request, labels)

    def renew(self, request: pb.SignedRequest) -> Enrolment:
        """See `EnrolmentSigner`."""
        try:
            held = Enrolment.decode(pb.RenewBody.FromString(request.body).enrolment)
            check_enrolment(held, self._trust.deployment, self._trust.enrolment_key)
        except (Refused, DecodeError) as error:
            raise GatewayRefusal(pb.MALFORMED, f"the enrolment cannot be renewed: {error}") from None
        certificate = held.certificate
        if held.device != request.device:
            raise GatewayRefusal(pb.MALFORMED, "the enrolment is another device's")
        check_request(request, "Renew", certificate.algorithm, certificate.public_key)
        with self._turn, self._clear_errors():
            row = self._db.execute("SELECT revoked FROM devices WHERE device = ?", (held.device,)).fetchone()
        if row is None or row[0]:
            raise GatewayRefusal(pb.REVOKED, f"device {spell(held.device)} is not enrolled here any more")
        return self._sign(held.device, certificate.algorithm, certificate.public_key)

    def close(self) -> None:
        """Let another process sign."""
        self._db.close()

    def _enrol(self, request: pb.EnrollRequest, labels: str) -> Enrolment:
        device = int.from_bytes(self._random(8), "big") >> 1
        enrolment = self._sign(device, request.algorithm, request.public_key)
        try:
            insert = "INSERT INTO devices (device, public_key, revoked, labels) VALUES (?, ?, 0, ?)"
            self._db.execute(insert, (device, request.public_key, labels))
        except sqlite3.IntegrityError:
            raise GatewayRefusal(pb.TOKEN_REFUSED, "this identity key is enrolled already; make another one") from None
        self._db.execute(
            "UPDATE tokens SET algorithm = ?, public_key = ?, enrolment = ? WHERE id = ?",
            (request.algorithm, request.public_key, enrolment.encode(), request.token_id),
        )
        return enrolment

    def _sign(self, device: int, algorithm: int, public_key: bytes) -> Enrolment:
        until = int(self._clock()) + self._days * _DAY
        certificate: Certificate = issue_certificate(self._key, self._trust.deployment, algorithm, public_key, until)
        unsigned = Enrolment(device, certificate, bytes(64))
        return Enrolment(device, certificate, self._key.sign(ENROLMENT, unsigned.content()))

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise TryAgain(f"{self._file}: the list of enrolments cannot be used now ({error})") from error


class EnrolmentServer:
    """Serves a signer to gateways, at an address that only they reach: ``unix:PATH``, or HOST:PORT on loopback."""

    def __init__(self, signer: EnrolmentSigner, listen: str) -> None:
        import grpc

        self._grpc, self._signer = grpc, signer
        calls: dict[str, tuple[Any, Any]] = {"enrol": (signer.enrol, pb.EnrollRequest), "renew": (signer.renew, pb.SignedRequest)}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                lambda request, context, call=call: self._serve(call, request, context), request_deserializer=kind.FromString
            )
            for name, (call, kind) in calls.items()
        }
        handlers["labels"] = grpc.unary_unary_rpc_method_handler(self._labels)
        options = (("grpc.max_receive_message_length", _LONGEST), ("grpc.so_reuseport", 0))
        self._server = grpc.server(ThreadPoolExecutor(2), options=options, maximum_concurrent_rpcs=64)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise Refused(f"{listen} cannot be listened at: it takes unix:PATH, or an address of this machine") from None
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Take requests from now on."""
        self._server.start()

    def stop(self) -> None:
        """Take no more requests."""
        self._server.stop(5).wait()

    def _serve(self, call: Callable[[Any], Enrolment], request: Any, context: Any) -> bytes:
        try:
            enrolment = call(request)
        except FedcoreError as error:
            self._abort(context, error)
        _LOG.info(
            "device %s of %r until %d", spell(enrolment.device), enrolment.certificate.population, enrolment.certificate.not_after
        )
        return enrolment.encode()

    def _labels(self, request: bytes, context: Any) -> bytes:
        try:
            return json.dumps(self._signer.labels(int.from_bytes(request, "big"))).encode()
        except FedcoreError as error:
            self._abort(context, error)

    def _abort(self, context: Any, error: FedcoreError) -> NoReturn:
        refusal = error if isinstance(error, GatewayRefusal) else GatewayRefusal(pb.ENROLMENT_CLOSED, one_line(str(error)))
        _LOG.warning("refused: %s", one_line(str(error)))
        context.set_trailing_metadata(((FAILURE_KEY, refusal.failure().SerializeToString()),))
        context.abort(getattr(self._grpc.StatusCode, STATUS[refusal.reason]), one_line(str(refusal)))
        raise AssertionError  # abort raises


class RemoteSigner:
    """A signer in another process, as an `EnrolmentServer` serves it."""

    def __init__(self, address: str, patience: float = 10.0) -> None:
        import grpc

        self._grpc, self._patience = grpc, patience
        self._channel = grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),))

    def enrol(self, request: pb.EnrollRequest) -> Enrolment:
        """See `EnrolmentSigner`."""
        return self._call("enrol", request)

    def renew(self, request: pb.SignedRequest) -> Enrolment:
        """See `EnrolmentSigner`."""
        return self._call("renew", request)

    def labels(self, device: int) -> tuple[str, ...]:
        """See `EnrolmentSigner`."""
        return tuple(str(one) for one in json.loads(self._asked("labels", device.to_bytes(8, "big"))))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, name: str, request: Any) -> Enrolment:
        return Enrolment.decode(self._asked(name, request.SerializeToString()))

    def _asked(self, name: str, request: bytes) -> bytes:
        try:
            return bytes(self._channel.unary_unary(f"/{SERVICE}/{name}")(request, timeout=self._patience))
        except self._grpc.RpcError as error:
            told = next((value for key, value in error.trailing_metadata() or () if key == FAILURE_KEY), None)
            if told is None:
                raise GatewayRefusal(pb.ENROLMENT_CLOSED, "the enrolment signer cannot be reached", retry_after=60_000) from None
            failure = pb.Failure.FromString(told)
            raise GatewayRefusal(failure.reason, failure.text, retry_after=failure.retry_after_ms) from None
