"""The two harmful networks as running things: the TCP proxy's event loop in a thread, and the relay beside it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence

from fedcore.chaos.faults import Faults
from fedcore.chaos.relay import MessageRelay
from fedcore.chaos.wire import WireProxy
from fedcore.gateway.deployment import Fleet

__all__ = ["HarmfulNetwork", "RunningProxy"]


class RunningProxy:
    """A `WireProxy` that works in a thread of its own; a context manager."""

    def __init__(self, listen: str, to: Sequence[str], faults: Faults, seed: int) -> None:
        self.proxy = WireProxy(listen, to, faults, seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)

    def __enter__(self) -> RunningProxy:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.proxy.start(), self._loop).result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.proxy.stop(), self._loop).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class HarmfulNetwork:
    """A proxy before all ``gateways`` and a relay before the first of them; a context manager. `calm` ends the harm."""

    def __init__(self, gateways: Sequence[str], fleet: Fleet, wire: Faults, messages: Faults, seed: int) -> None:
        self._proxy = RunningProxy("127.0.0.1:0", gateways, wire, seed)
        self._relay = MessageRelay("127.0.0.1:0", gateways[0], fleet, messages, seed)

    def __enter__(self) -> HarmfulNetwork:
        self._relay.__enter__()
        self._proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.__exit__()
        self._relay.__exit__()

    @property
    def addresses(self) -> list[str]:
        """Where devices meet it."""
        return [self._proxy.proxy.address, self._relay.address]

    def calm(self) -> None:
        """Pass everything unharmed from now on."""
        self._proxy.proxy.faults = self._relay.faults = Faults()

    @property
    def happened(self) -> Counter[str]:
        """What was done, as "wire drop" or "message drop"."""
        found = Counter({f"wire {name}": times for name, times in self._proxy.proxy.happened.items() if name in set(_NAMES)})
        return found + Counter({f"message {name}": times for name, times in self._relay.happened.items()})


_NAMES = ("drop", "duplicate", "delay", "reorder", "truncate", "corrupt")
