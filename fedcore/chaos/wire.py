"""A TCP proxy that harms what passes: where TLS goes through it, a harmed connection dies, and devices must cope."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence

from fedcore.chaos.faults import Fate, Faults, mangled
from fedcore.errors import Refused
from fedcore.secagg.committee_wire import endpoint_of

__all__ = ["WireProxy"]

_PIECE = 16_384
_REACH = 5.0  # seconds to reach the other side


class WireProxy:
    """Passes connections at ``listen`` on to one of ``to`` (HOST:PORT, in turn), harming pieces of at most 16 KiB as ``faults``
    say. A connection that lost a piece is closed ``faults.seconds`` later. ``happened`` counts what was done.

    Raises:
        Refused: an address is none.
    """

    def __init__(self, listen: str, to: Sequence[str], faults: Faults, seed: int) -> None:
        self._listen, self.faults, self._seed = endpoint_of(listen, least=0), faults, seed
        self._to = itertools.cycle([endpoint_of(one) for one in to])
        self._numbers = itertools.count()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.happened: Counter[str] = Counter()
        self.address = listen

    async def start(self) -> None:
        """Listen from now on.

        Raises:
            Refused: the address cannot be listened at.
        """
        host, port = self._listen
        try:
            self._server = await asyncio.start_server(self._connected, host, port)
        except OSError as error:
            raise Refused(f"{self.address} cannot be listened at ({error.strerror})") from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._between(reader, writer)
        except asyncio.CancelledError:
            return  # stop was called; asyncio's own callback would report it as an error
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        self.happened["connections"] += 1
        try:
            async with asyncio.timeout(_REACH):
                far_reader, far_writer = await asyncio.open_connection(*next(self._to))
        except (OSError, TimeoutError):
            self.happened["unreachable"] += 1
            return
        ways = [
            asyncio.create_task(self._pass(reader, far_writer, random.Random(f"{self._seed} {number} up"))),  # noqa: S311
            asyncio.create_task(self._pass(far_reader, writer, random.Random(f"{self._seed} {number} down"))),  # noqa: S311
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
        """One direction, until it ends or is to end."""
        held, end = b"", None
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(OSError, TimeoutError):
            while True:
                async with asyncio.timeout_at(end):
                    piece = await reader.read(_PIECE)
                if not piece:
                    return
                fate = self.faults.draw(rng)
                if fate is not None:
                    self.happened[fate] += 1
                if fate is Fate.DELAY:
                    await asyncio.sleep(rng.uniform(0, self.faults.seconds))
                elif fate is Fate.CORRUPT:
                    piece = mangled(piece, rng)
                elif fate is Fate.DUPLICATE:
                    piece += piece
                elif fate is Fate.TRUNCATE:
                    writer.write(piece[: len(piece) // 2])
                    await writer.drain()
                    return
                elif fate is Fate.REORDER and not held:
                    held = piece
                if fate in {Fate.DROP, Fate.REORDER}:
                    end = end or clock() + self.faults.seconds
                    continue
                writer.write(piece + held)
                held = b""
                await writer.drain()
