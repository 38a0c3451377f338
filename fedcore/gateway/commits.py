"""Group commit: one thread owns a gateway's store, and everything that waits for it becomes durable in one go.

An upload is answered only when a committed partial sum and index set hold it. After a failure nobody knows what is kept, so the
gateway begins a new sum under a new name; what is in the old one stays counted, and the index keeps anything from counting twice.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedcore.errors import FedcoreError, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.gateway.sums import RunningSum, Summand
from fedcore.state.gateway import Admission, Contribution, GatewayStore, Note, Verdict

__all__ = ["Committer"]

_MOST = 256  # of what waits, in one go
_GATHER = 0.003  # seconds that the first waits for others: a commit costs more than it does
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class _Waiting:
    """Something that a coroutine waits for."""

    what: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class _Upload:
    round_key: str
    contribution: Contribution
    part: Summand | None


@dataclass(frozen=True)
class _Noted:
    round_key: str
    kind: str
    note: Note


@dataclass
class _Sum:
    """What this gateway has added up in a round, under the name that the store knows it by."""

    total: RunningSum = field(default_factory=RunningSum)
    writer: str = field(default_factory=lambda: secrets.token_hex(8))


class Committer:
    """Owns a store that ``connect`` opens; coroutines of any loop may wait for what it does. Raises what `GatewayStore` raises."""

    def __init__(self, connect: Callable[[], GatewayStore], clock: Callable[[], float] = time.time) -> None:
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._sums: dict[str, _Sum] = {}
        self._clock = clock
        opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(connect, opened), name="gateway-store", daemon=True)
        self._thread.start()
        if (error := opened.get()) is not None:
            raise error

    def close(self) -> None:
        """Finish what waits, and close the store."""
        self._queue.put(None)
        self._thread.join()

    async def call(self, work: Callable[[GatewayStore], _T]) -> _T:
        """The result of ``work`` on the store."""
        return await self._wait(work)  # type: ignore[no-any-return]

    async def admit(self, request: Admission) -> Verdict:
        """See `GatewayStore.admit`."""
        return await self._wait(request)  # type: ignore[no-any-return]

    async def note(self, round_key: str, kind: str, note: Note) -> None:
        """See `GatewayStore.note`."""
        await self._wait(_Noted(round_key, kind, note))

    async def count(self, round_key: str, contribution: Contribution, part: Summand | None) -> bool:
        """Count an upload, which is ``part`` of the round's sum unless uploads are kept whole; whether it was counted before.

        Raises:
            GatewayRefusal: the round is not running, or another upload of the device counts already.
        """
        return await self._wait(_Upload(round_key, contribution, part))  # type: ignore[no-any-return]

    def forget(self, rounds: Sequence[str]) -> None:
        """Let go of the sums of all rounds but these; what is committed stays."""
        for key in set(self._sums) - set(rounds):
            self._sums.pop(key, None)

    async def _wait(self, what: Any) -> Any:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(what, loop, loop.create_future())
        self._queue.put(waiting)
        return await waiting.future

    def _serve(self, connect: Callable[[], GatewayStore], opened: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            store = connect()
        except BaseException as error:  # noqa: BLE001 - raised again where the committer is made
            opened.put(error)
            return
        opened.put(None)
        going = True
        while going:
            group, going = self._next_group()
            self._commit(store, group)
        store.close()

    def _next_group(self) -> tuple[list[_Waiting], bool]:
        first, group = self._queue.get(), []
        time.sleep(_GATHER)
        while first is not None:
            group.append(first)
            if len(group) == _MOST:
                return group, True
            try:
                first = self._queue.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, store: GatewayStore, group: Sequence[_Waiting]) -> None:
        admissions = [one for one in group if isinstance(one.what, Admission)]
        uploads = [one for one in group if isinstance(one.what, _Upload)]
        notes = [one for one in group if isinstance(one.what, _Noted)]
        self._together(admissions, lambda: self._admit(store, admissions))
        for key in {one.what.round_key for one in uploads}:
            mine = [one for one in uploads if one.what.round_key == key]
            self._together(mine, lambda key=key, mine=mine: self._count(store, key, mine))  # type: ignore[misc]
        for key, kind in {(one.what.round_key, one.what.kind) for one in notes}:
            said = [one for one in notes if (one.what.round_key, one.what.kind) == (key, kind)]
            self._together(said, lambda k=key, n=kind, s=said: store.note(k, n, [one.what.note for one in s]))  # type: ignore[misc]
        for one in group:
            if callable(one.what):
                self._together([one], lambda one=one: setattr(one, "result", one.what(store)))  # type: ignore[misc]
        _answer(group)

    def _together(self, waiting: Sequence[_Waiting], work: Callable[[], None]) -> None:
        """Do the work of some that wait; what it raises, all of them are told who were not told anything else."""
        if not waiting:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a defect must not end the thread that everybody waits for
            if not isinstance(error, FedcoreError):
                _LOG.exception("the store's thread failed")
            problem = error if isinstance(error, FedcoreError) else TryAgain("the gateway failed; its log says where")
            for one in waiting:
                one.error = one.error or (problem if one.result is None else None)

    def _admit(self, store: GatewayStore, waiting: Sequence[_Waiting]) -> None:
        for one, verdict in zip(waiting, store.admit([one.what for one in waiting], self._clock()), strict=True):
            one.result = verdict

    def _count(self, store: GatewayStore, key: str, waiting: Sequence[_Waiting]) -> None:
        """Add up what can be added, in as few commits as it takes; a device twice in one group takes two."""
        while waiting:
            now = list({one.what.contribution.device: one for one in reversed(waiting)}.values())
            held = self._sums.setdefault(key, _Sum())
            fresh = held.total.copy()
            for one in now:
                if one.what.part is not None:
                    fresh.add(one.what.part)
            try:
                answer = store.accept(key, held.writer, fresh.encode(), [one.what.contribution for one in now])
            except BaseException:
                self._sums.pop(key, None)
                raise
            if answer.counted:
                held.total = fresh
            for one in now:
                contribution = one.what.contribution
                if answer.counted:
                    one.result = False
                elif contribution.device in answer.repeated:
                    one.result = answer.repeated[contribution.device] == contribution.digest
                    if not one.result:
                        one.error = GatewayRefusal(pb.OTHER_UPLOAD, "another upload of this device counts in this round already")
                elif not answer.repeated:
                    one.error = GatewayRefusal(pb.LATE, "the round is over; the upload was not counted")
            waiting = [one for one in waiting if one.result is None and one.error is None]


def _answer(group: Sequence[_Waiting]) -> None:
    """Wake those who waited, with one call for each loop."""
    for loop in {one.loop for one in group}:
        mine = [one for one in group if one.loop is loop]
        try:
            loop.call_soon_threadsafe(_wake, mine)
        except RuntimeError:  # the loop has been closed: nobody waits there
            continue


def _wake(group: Sequence[_Waiting]) -> None:
    for one in group:
        if one.future.done():
            continue
        if one.error is not None:
            one.future.set_exception(one.error)
        else:
            one.future.set_result(one.result)
