"""A gateway's double that passes whole requests on, and loses, repeats, overtakes or harms them on the way.

TLS hides messages from whoever stands between, so the relay shows the gateway's own certificate: it is for fleets whose keys are at
hand, as those of a rehearsal are.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedcore.chaos.faults import Fate, Faults, mangled
from fedcore.errors import Refused
from fedcore.gateway.client import channel_to
from fedcore.gateway.deployment import Fleet
from fedcore.gateway.tls import read_tls

__all__ = ["MessageRelay"]

_AT_ONCE = 64
_LARGEST = 8 << 20


class MessageRelay:
    """Takes calls at ``listen`` in the name of the ``fleet``'s gateway and passes them on to the one at ``to``; a context manager.
    ``happened`` counts what was done.

    A message that is dropped may be the request or the answer; one of two answers to a repeated request is returned; a request that
    is reordered waits until another one has passed, or for ``faults.seconds``.

    Raises:
        Refused: the address cannot be listened at, or the fleet's keys are not there.
    """

    def __init__(self, listen: str, to: str, fleet: Fleet, faults: Faults, seed: int) -> None:
        import grpc

        self.faults, self._rng, self._lock = faults, random.Random(f"relay {seed}"), threading.Lock()  # noqa: S311 - no secret
        self.happened: Counter[str] = Counter()
        self._passed = threading.Condition(self._lock)
        self._count = 0
        self._channel = channel_to(to, fleet.trust())
        options = [("grpc.max_receive_message_length", _LARGEST), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(_AT_ONCE), [_Anything(self._relay)], options=options)
        try:
            port = self._server.add_secure_port(listen, grpc.ssl_server_credentials([read_tls(fleet.gateway)]))
        except RuntimeError:
            port = 0
        if not port:
            self._channel.close()
            raise Refused(f"{listen} cannot be listened at: it takes an address of this machine and a free port, or 0")
        self.address = f"{listen.rpartition(':')[0]}:{port}"

    def __enter__(self) -> MessageRelay:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.5).wait()
        self._channel.close()

    def _relay(self, method: str, request: bytes, context: Any) -> Iterator[bytes]:
        import grpc

        with self._lock:
            fate, rng = self.faults.draw(self._rng), random.Random(self._rng.random())  # noqa: S311 - no secret
            if fate is not None:
                self.happened[fate] += 1
        there = rng.random() < 0.5  # it is the request that suffers, not the answer
        if fate is Fate.DELAY:
            threading.Event().wait(rng.uniform(0, self.faults.seconds))
        elif fate is Fate.REORDER:
            self._let_another_pass()
        if there and fate is Fate.DROP:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the request was lost")
        if there:
            request = _harmed(request, fate, rng)
        try:
            answers = self._ask(method, request, context)
            if fate is Fate.DUPLICATE:
                again = self._ask(method, request, context)
                answers = answers if there else again
        except grpc.RpcError as error:
            context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
            context.abort(error.code(), error.details() or "")
        finally:
            self._tell_passed()
        if not there and fate is Fate.DROP:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        for answer in answers:
            yield answer if there else _harmed(answer, fate, rng)

    def _ask(self, method: str, request: bytes, context: Any) -> list[bytes]:
        return list(self._channel.unary_stream(method)(request, timeout=context.time_remaining()))

    def _let_another_pass(self) -> None:
        with self._passed:
            before = self._count
            self._passed.wait_for(lambda: self._count > before, self.faults.seconds)

    def _tell_passed(self) -> None:
        with self._passed:
            self._count += 1
            self._passed.notify_all()


class _Anything:
    """A handler for calls of any name; behaves as `grpc.GenericRpcHandler`, which is no class to inherit before grpc is there."""

    def __init__(self, behaviour: Any) -> None:
        self._behaviour = behaviour

    def service(self, details: Any) -> Any:
        """See `grpc.GenericRpcHandler`."""
        import grpc

        return grpc.unary_stream_rpc_method_handler(lambda request, context: self._behaviour(details.method, request, context))


def _harmed(data: bytes, fate: Fate | None, rng: random.Random) -> bytes:
    if fate is Fate.CORRUPT:
        return mangled(data, rng)
    return data[: rng.randrange(len(data))] if fate is Fate.TRUNCATE and data else data
