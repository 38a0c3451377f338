"""A privacy ledger in Redis, for coordinators on several machines.

Redis forgets what it acknowledged unless told otherwise. A ledger is therefore only written where every acknowledged write is on
the disk (append-only file, fsync always, also while the file is rewritten), where nothing is evicted, and, with replicas, when
all of them have it on theirs (WAITAOF, Redis 7.2 and later; WAIT only says that they received it).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedcore.errors import Refused, TryAgain
from fedcore.privacy.ledger import PositionTaken
from fedcore.state.redis_url import parse_redis_url

__all__ = ["RedisLedger"]

# One entry is a list item and a hash field, written together or not at all: a script is one unit of the append-only file.
_APPEND = """
local count = redis.call('LLEN', KEYS[1])
if count ~= tonumber(ARGV[1]) then return 'the ledger has ' .. count .. ' entries, not ' .. ARGV[1] end
if redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[1]) == 0 then return 'the ledger has an entry for ' .. ARGV[2] .. ' already' end
redis.call('RPUSH', KEYS[1], ARGV[3])
return 'appended'
"""
_NEEDED = {
    "appendonly": ("yes",),
    "appendfsync": ("always",),
    "no-appendfsync-on-rewrite": ("no",),
    "maxmemory-policy": ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"),
}
_CONFIRM_MS = 10_000


class RedisLedger:
    """A `LedgerStore` at ``redis://[user:password@]host:port/db?population=NAME`` (or rediss, or unix with a path).

    The population names the list; NAME has letters, digits, dot, dash and underscore. Errors never show user or password.
    """

    def __init__(self, url: str, *, write: bool = True) -> None:
        population, self._shown, bare = parse_redis_url(url)
        self._entries, self._keys, self._confirmed = (
            f"fedcore:ledger:{{{population}}}:{part}" for part in ("entries", "keys", "confirmed")
        )
        self._replicas = 0
        with self._clear_errors():
            try:
                self._redis = _connect(bare)
            except (ValueError, TypeError):
                raise Refused(f"{self._shown}: is not a Redis URL that can be used") from None
            try:
                if write:
                    self._check_durability()
                elif not self._redis.exists(self._entries):
                    raise Refused(f"{self._shown}: holds no privacy ledger of population {population}")
            except BaseException:
                self.close()
                raise

    def entries(self, start: int = 0) -> list[dict[str, Any]]:
        """See `LedgerStore`."""
        with self._clear_errors():
            texts = cast("list[str]", self._redis.lrange(self._entries, start, -1))
        try:
            return [dict(json.loads(text)) for text in texts]
        except (TypeError, ValueError) as error:
            raise Refused(f"{self._shown}: the ledger is damaged (an entry cannot be read)") from error

    def append(self, position: int, key: str, entry: Mapping[str, Any]) -> None:
        """See `LedgerStore`."""
        with self._clear_errors():
            self._check_durability()  # the server's configuration may have changed since
            answer = self._redis.eval(_APPEND, 2, self._entries, self._keys, str(position), key, json.dumps(entry))
            if answer != "appended":
                raise PositionTaken(f"{self._shown}: {answer}")
            self._wait()

    def confirm(self) -> None:
        """See `LedgerStore`."""
        with self._clear_errors():
            self._check_durability()
            self._redis.incr(self._confirmed)  # a write, so that there is something to wait for
            self._wait()

    def close(self) -> None:
        """See `LedgerStore`."""
        self._redis.close()

    def _check_durability(self) -> None:
        try:
            found = {name: cast("dict[str, str]", self._redis.config_get(name)).get(name, "") for name in _NEEDED}
        except redis.ResponseError:
            raise Refused(f"{self._shown}: does not allow CONFIG GET, so nobody can tell whether it keeps a ledger") from None
        for name, allowed in _NEEDED.items():
            if found[name] not in allowed:
                raise Refused(
                    f"{self._shown}: would not keep a privacy ledger: {name} is {found[name] or 'unknown'}, it must be {allowed[0]}"
                )
        facts = self._redis.info()
        if facts.get("role") != "master":
            raise Refused(f"{self._shown}: is a replica; a ledger is written to the master")
        self._replicas = max(self._replicas, int(facts["connected_slaves"]))
        version = tuple(int(part) for part in str(facts["redis_version"]).split(".")[:2])
        if self._replicas and version < (7, 2):
            raise Refused(
                f"{self._shown}: Redis {facts['redis_version']} cannot say whether its {self._replicas} replicas have an entry on "
                "disk; it takes Redis 7.2, or no replicas"
            )

    def _wait(self) -> None:
        """Until every replica that was ever seen has what was written on its disk."""
        if not self._replicas:
            return
        local, replicas = self._redis.waitaof(1, self._replicas, _CONFIRM_MS)
        if local < 1 or replicas < self._replicas:
            raise TryAgain(f"{self._shown}: {replicas} of {self._replicas} replicas have the entry on disk; repeat the charge")

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError:
            raise Refused(f"{self._shown}: user or password was not accepted") from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise TryAgain(f"{self._shown}: cannot be reached ({type(error).__name__})") from None
        except redis.ResponseError as error:
            kind = str(error).split(" ", 1)[0]
            if kind in {"NOPERM", "NOAUTH", "WRONGTYPE", "READONLY"}:
                raise Refused(f"{self._shown}: refuses what a ledger needs ({kind})") from None
            raise TryAgain(f"{self._shown}: cannot be used now ({kind}); nothing counts as charged") from None
        except redis.RedisError as error:
            raise TryAgain(f"{self._shown}: cannot be used now ({type(error).__name__}); nothing counts as charged") from None


def _connect(url: str) -> redis.Redis:
    """One connection, never renewed within a command: WAITAOF speaks only of what its own connection wrote."""
    return redis.Redis.from_url(
        url, single_connection_client=True, retry=Retry(NoBackoff(), 0), decode_responses=True, socket_timeout=30,
        socket_connect_timeout=5,
    )  # fmt: skip
