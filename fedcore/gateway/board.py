"""The rounds as a gateway knows them: read from the store again and again, and whom to wake when one changes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from fedcore.errors import FedcoreError
from fedcore.gateway.commits import Committer
from fedcore.gateway.rounds import RoundDocument
from fedcore.secagg.committee_wire import one_line
from fedcore.state.gateway import GatewayStore, Round, RoundState

__all__ = ["Board", "OpenRound"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRound:
    """A round with its document read."""

    round: Round
    document: RoundDocument

    @property
    def forming(self) -> bool:
        """Whether devices check in for it."""
        return self.round.state is RoundState.FORMING

    @property
    def running(self) -> bool:
        """Whether its cohort works."""
        return self.round.state is RoundState.RUNNING


class Board:
    """All rounds that are kept; `follow` keeps it fresh, ``pause`` seconds between two looks."""

    def __init__(self, committer: Committer, pause: float = 0.1) -> None:
        self._committer, self._pause = committer, pause
        self._rounds: dict[str, OpenRound] = {}
        self._changed = asyncio.Event()

    def get(self, key: str) -> OpenRound | None:
        """The round of this key."""
        return self._rounds.get(key)

    def forming(self) -> list[OpenRound]:
        """The rounds that devices check in for."""
        return [one for one in self._rounds.values() if one.forming]

    def running(self) -> list[OpenRound]:
        """The rounds whose cohorts work."""
        return [one for one in self._rounds.values() if one.running]

    async def changed(self, seconds: float) -> None:
        """Return when a round has changed, or when so many seconds have passed."""
        event = self._changed
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return

    async def follow(self) -> None:
        """Look until cancelled. A store that cannot be read leaves everything as it was."""
        while True:
            try:
                await self.look()
            except FedcoreError as error:
                _LOG.warning("the rounds cannot be read: %s", one_line(str(error)))
            await asyncio.sleep(self._pause)

    async def look(self) -> None:
        """Read what has changed."""
        known = {key: one.round.version for key, one in self._rounds.items()}

        def read(store: GatewayStore) -> tuple[set[str], list[Round]]:
            versions = store.rounds()
            changed = [store.round(key) for key, version in versions.items() if known.get(key) != version]
            return set(versions), [one for one in changed if one is not None]

        keys, changed = await self._committer.call(read)
        gone = known.keys() - keys
        for key in gone:
            del self._rounds[key]
        for one in changed:
            self._rounds[one.key] = OpenRound(one, RoundDocument.decode(one.document))
        if gone or changed:
            self._committer.forget([one.round.key for one in self.running()])
            event, self._changed = self._changed, asyncio.Event()
            event.set()
