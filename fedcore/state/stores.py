"""Opens what is kept in a file of SQLite or in Redis, by its place; Redis is imported only where a URL asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from fedcore.privacy.ledger import LedgerStore
from fedcore.state.gateway import GatewayStore
from fedcore.state.gateway_sqlite import SqliteGatewayStore
from fedcore.state.ledger_sqlite import SqliteLedger

__all__ = ["LEDGER_FILE", "open_gateway_store", "open_ledger"]

LEDGER_FILE = "ledger.sqlite"
_LEDGER_PASSWORD = "FEDCORE_LEDGER_PASSWORD"  # noqa: S105 - the name of the environment's variable


def open_ledger(where: str | Path, *, write: bool = True) -> LedgerStore:
    """The store at ``where``: a directory that exists (its ledger.sqlite), a file, or a URL redis://, rediss:// or unix://.

    Raises:
        Refused: a URL that is not understood, nothing there to read, or a store that would not keep what it is given.
        TryAgain: the store is busy or out of reach.
    """
    if "://" in str(where):
        from fedcore.state.ledger_redis import RedisLedger

        url, password = str(where), os.environ.get(_LEDGER_PASSWORD, "")
        named = password and "@" not in url
        return RedisLedger(url.replace("://", f"://:{quote(password, safe='')}@", 1) if named else url, write=write)
    path = Path(where)
    return SqliteLedger(path / LEDGER_FILE if path.is_dir() else path, write=write)


def open_gateway_store(where: str) -> GatewayStore:
    """The store at a path (SQLite, made if missing) or a URL redis://, rediss:// or unix:// with ?population=NAME.

    Raises:
        Refused: a URL that is not understood, or a store that would not keep what it is given.
        TryAgain: the store is busy or out of reach.
    """
    if "://" in where:
        from fedcore.state.gateway_redis import RedisGatewayStore

        return RedisGatewayStore(where)
    return SqliteGatewayStore(Path(where))
