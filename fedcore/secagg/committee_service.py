"""An operator's member as a gRPC service over TLS. The decisions are `Member`'s; here is who may ask, how much, and the log.

One request is decided at a time, since a member's promises are made one after the other. Every request leaves one line in the log
(who, step, task, round, what was done or refused and why), and no secret is in any line.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.committee import STEPS, Clock, LocalMember, wall_clock
from fedcore.secagg.committee_wire import (
    FAILURE_KEY,
    GREET,
    SERVICE,
    STATUS,
    Failure,
    Limits,
    endpoint_of,
    longest_message,
    one_line,
    welcome,
)
from fedcore.secagg.crypto import Signer
from fedcore.secagg.encoding import Reader
from fedcore.secagg.journal import FileJournal
from fedcore.secagg.keys import IDENTITY, read_certificate, read_private_key, read_signing_key
from fedcore.secagg.member import Member
from fedcore.secagg.messages import LARGEST_COHORT, Header, OfferRequest, TrustBundle
from fedcore.secagg.plan import Policy
from fedcore.secagg.trust import blaming

__all__ = ["JOURNAL", "STRICT", "CommitteeServer", "Floor", "Operator", "open_operator", "point_of", "read_floor"]

JOURNAL = "journal"
_THREADS, _CALLS = 4, 16  # at work, and at most accepted at a time
_PATIENCE = 60.0  # seconds that a request waits for those before it, whatever deadline it brings
_BUSY = "the member is busy with other requests"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Floor:
    """What an operator demands of every plan, and the largest cohorts it serves."""

    policy: Policy
    limits: Limits

    def items(self) -> Iterator[tuple[str, float]]:
        """Every key of the policy file with its value."""
        for part in (self.policy, self.limits):
            yield from vars(part).items()


STRICT = Floor(Policy(minimum_survivors=20, corrupt_clients=4, noise_multiplier=0.5, longest_round=3600), Limits())
_KEYS = {
    "minimum_survivors": (int, 2, LARGEST_COHORT),
    "corrupt_clients": (int, 0, LARGEST_COHORT),
    "noise_multiplier": (float, 0.0, 1e6),
    "longest_round": (int, 1, 7 * 24 * 3600),
    "clients": (int, 2, LARGEST_COHORT),
    "neighbours": (int, 1, LARGEST_COHORT),
}


def read_floor(path: Path | None) -> Floor:
    """An operator's policy: the keys of `Policy` and `Limits` in TOML; what is not said there is as in `STRICT`.

    Raises:
        Refused: an unknown key, or a value that is not allowed.
    """
    if path is None:
        return STRICT
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Refused(f"{path}: {one_line(str(error))}") from None
    for key, value in found.items():
        if key not in _KEYS:
            raise Refused(f"{path}: there is no key {one_line(key)}; keys are: {', '.join(_KEYS)}")
        kind, low, high = _KEYS[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not ((whole or (kind is float and isinstance(value, float) and math.isfinite(value))) and low <= value <= high):
            raise Refused(f"{path}: {key} must be {'a whole number' if kind is int else 'a number'} from {low} to {high}")
    return Floor(_changed(STRICT.policy, found), _changed(STRICT.limits, found))


def _changed(part: Any, found: dict[str, Any]) -> Any:
    return type(part)(**{one.name: found.get(one.name, getattr(part, one.name)) for one in fields(part)})


def point_of(trust: TrustBundle, public: bytes) -> int:
    """The place of a key in the committee.

    Raises:
        Refused: the committee has no such member.
    """
    if public not in trust.member_keys:
        raise Refused(f"the trust bundle names no member with the key {public.hex()}")
    return trust.member_keys.index(public) + 1


@dataclass(frozen=True)
class Operator:
    """A member with what its service needs: its identity, its TLS key and certificate (PEM), and the longest message it takes."""

    member: LocalMember
    identity: Signer = field(repr=False)
    trust: TrustBundle
    tls: tuple[bytes, bytes] = field(repr=False)
    longest: int


def open_operator(
    directory: Path, trust: TrustBundle, floor: Floor, *, clock: Clock = wall_clock, random: RandomBytes = os.urandom
) -> Operator:  # fmt: skip
    """The member whose keys and journal are in ``directory``; the journal is this process's until the member is closed.

    Raises:
        Refused: a key or record is missing, damaged or open to others, or the trust bundle does not name the key.
        TryAgain: another process serves this directory.
    """
    identity = read_signing_key(directory / f"{IDENTITY}.key")
    point = point_of(trust, identity.public)
    longest = longest_message(floor.limits, len(trust.member_keys))
    tls = read_private_key(directory / "tls.key"), read_certificate(directory / "tls.pem")
    journal = FileJournal(directory / JOURNAL)
    try:
        member = Member(point, identity, trust, floor.policy, journal, random)
    except FedcoreError:
        journal.close()
        raise
    return Operator(LocalMember(point, member, journal, clock), identity, trust, tls, longest)


class CommitteeServer:
    """Serves one member at ``listen`` (HOST:PORT, port 0 for any free one) from `start` to `stop`.

    With ``coordinator``, a TLS certificate in PEM, nobody else is heard. Without it everybody who reaches the port may use up
    round numbers and time, though learn nothing.
    """

    def __init__(self, operator: Operator, listen: str, coordinator: bytes | None = None) -> None:
        import grpc

        self._operator, self._listen, self._grpc = operator, listen, grpc
        self._turn = threading.Lock()
        steps = {name: getattr(operator.member, name) for name in STEPS}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(partial(self._serve, name, decide))
            for name, decide in {**steps, GREET: self._greet}.items()
        }
        options = (
            ("grpc.max_receive_message_length", operator.longest),
            ("grpc.max_send_message_length", operator.longest),
            ("grpc.max_concurrent_streams", _CALLS),
            ("grpc.per_message_decompression", 0),  # a small message could become a large one
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        )
        self._server = grpc.server(ThreadPoolExecutor(_THREADS), options=options, maximum_concurrent_rpcs=_CALLS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._credentials = grpc.ssl_server_credentials([operator.tls], coordinator, require_client_auth=coordinator is not None)

    def start(self) -> str:
        """The address, once requests are taken.

        Raises:
            Refused: the address cannot be listened at.
        """
        endpoint_of(self._listen, least=0)
        try:
            port = self._server.add_secure_port(self._listen, self._credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise Refused(f"{self._listen} cannot be listened at: it takes an address of this machine and a free port, or 0")
        self._server.start()
        return f"{self._listen.rpartition(':')[0]}:{port}"

    def expire(self) -> None:
        """Erase what belongs to rounds that are over; a disk that cannot be written is logged, and tried again next time."""
        with self._turn:
            try:
                self._operator.member.expire()
            except TryAgain as error:
                _LOG.error("expire: %s", one_line(str(error)))

    def stop(self, grace: float = 10.0) -> None:
        """Take no new request, give those at work ``grace`` seconds, and close the member."""
        self._server.stop(grace).wait()
        with self._turn:
            self._operator.member.close()

    def _greet(self, request: bytes) -> bytes:
        with blaming("coordinator"):
            one = self._operator
            return welcome(request, one.identity, one.member.point, one.trust, one.longest)

    def _serve(self, name: str, decide: Callable[[bytes], bytes], request: bytes, context: Any) -> bytes:
        begun = time.monotonic()
        what = f"{context.peer()} {name} {_subject(name, request)}"
        try:
            answer = self._in_turn(decide, request, context)
        except FedcoreError as error:
            _LOG.warning("%s: refused: %s", what, one_line(str(error)))
            problem = error
        except Exception as error:  # noqa: BLE001 - a defect: its text could hold anything, so only its kind and place are told
            place = _place(error)
            _LOG.error("%s: failed: %s at %s", what, type(error).__name__, place)
            problem = TryAgain("the member failed; its log says where")
        else:
            spent = 1000 * (time.monotonic() - begun)
            _LOG.info("%s: done, %d bytes in, %d out, %.0f ms", what, len(request), len(answer), spent)
            return answer
        return self._abort(context, problem)

    def _in_turn(self, decide: Callable[[bytes], bytes], request: bytes, context: Any) -> bytes:
        remaining = context.time_remaining()
        if not self._turn.acquire(timeout=_PATIENCE if remaining is None else max(0.0, min(_PATIENCE, remaining))):
            raise TryAgain(_BUSY)
        try:
            if not context.is_active():
                raise TryAgain("the caller has gone")
            return decide(request)
        finally:
            self._turn.release()

    def _abort(self, context: Any, error: FedcoreError) -> NoReturn:
        kind = next((one for one in STATUS if isinstance(error, one)), TryAgain)
        context.set_trailing_metadata(((FAILURE_KEY, Failure.of(error).encode()),))
        context.abort(getattr(self._grpc.StatusCode, STATUS[kind]), one_line(str(error))[:500])
        raise AssertionError  # abort raises


def _subject(name: str, request: bytes) -> str:
    """The task and round of a request, read from its start alone."""
    if name == GREET:
        return "-"
    try:
        if name == "offer":
            wanted: Header | OfferRequest = OfferRequest.decode(request)
        else:
            reader = Reader(request)
            reader.take(2 if name == "approve" else 4)  # version and type, of the request and of the plan in it
            wanted = Header.read(reader)
    except Refused:
        return "unreadable"
    return one_line(f"{wanted.task!r} round {wanted.round}")


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
