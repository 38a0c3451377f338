"""`GatewayStore` in Redis, for gateways and coordinators on several machines.

Every compare-and-set is one Lua script, which is one unit of the append-only file. As with the privacy ledger, nothing is written
to a server that would forget what it acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedcore.errors import Refused, TryAgain
from fedcore.state.gateway import (
    REQUEST_WINDOW,
    Acceptance,
    Admission,
    Contribution,
    Device,
    Note,
    Problem,
    Round,
    RoundState,
    Standing,
    Verdict,
)
from fedcore.state.redis_url import parse_redis_url
from fedcore.state.releases_redis import RedisReleases

__all__ = ["RedisGatewayStore"]

_NEEDED = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no", "maxmemory-policy": "noeviction"}
_REGISTER = """
local id, algorithm, key, not_after = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'id', id, 'algorithm', algorithm, 'public_key', key, 'not_after', not_after, 'enrolled', ARGV[5],
             'standing', ARGV[6], 'reason', ARGV[7], 'last_seen', ARGV[8], 'counter', ARGV[9], 'counted', ARGV[10],
             'told', ARGV[11], 'labels', ARGV[12])
  redis.call('SADD', KEYS[2], id)
  return 1
end
if redis.call('HGET', KEYS[1], 'algorithm') ~= algorithm or redis.call('HGET', KEYS[1], 'public_key') ~= key then return 0 end
if tonumber(redis.call('HGET', KEYS[1], 'not_after')) < tonumber(not_after) then
  redis.call('HSET', KEYS[1], 'not_after', not_after)
end
redis.call('HSET', KEYS[1], 'labels', ARGV[12])
return 1
"""
_JUDGE = """
local standing = redis.call('HGET', KEYS[1], 'standing')
if not standing then return 0 end
if (standing == 'revoked' or standing == 'forgotten') and ARGV[1] ~= 'forgotten' then return 0 end
redis.call('HSET', KEYS[1], 'standing', ARGV[1], 'reason', ARGV[2])
if ARGV[1] == 'forgotten' then
  redis.call('HSET', KEYS[1], 'told', '', 'labels', '[]', 'last_seen', '0', 'enrolled', '0')
  redis.call('DEL', KEYS[2], KEYS[3])
end
return 1
"""
# What a device was before, and 'ok' or why not. The order of fields is _FIELDS.
_ADMIT = """
local row = redis.call('HMGET', KEYS[1], 'id', 'algorithm', 'public_key', 'not_after', 'enrolled', 'standing', 'reason',
                       'last_seen', 'counter', 'counted', 'told', 'labels')
if not row[1] then return {'unknown'} end
local taken = redis.call('HGETALL', KEYS[3])
if row[6] ~= 'active' then return {row[6], row, taken} end
local seen, counter, now = redis.call('GET', KEYS[2]), tonumber(ARGV[1]), tonumber(ARGV[4])
if seen and seen == ARGV[2] then return {'replayed', row, taken} end
local behind = counter <= tonumber(row[9])
if seen or (behind and now - tonumber(row[10]) > tonumber(ARGV[5])) then
  redis.call('HSET', KEYS[1], 'standing', 'quarantined', 'reason', 'request number ' .. ARGV[1] .. ' was used twice')
  return {'quarantined', row, taken}
end
if behind then return {'replayed', row, taken} end
redis.call('SET', KEYS[2], ARGV[2], 'EX', math.ceil(tonumber(ARGV[5])))
redis.call('HSET', KEYS[1], 'counter', ARGV[1], 'counted', ARGV[4], 'last_seen', ARGV[4])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'told', ARGV[3]) end
return {'ok', row, taken}
"""
_LABEL = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'labels', ARGV[1])
return 1
"""
_ADVANCE = """
local there = redis.call('HMGET', KEYS[1], 'version', 'state')
local version = tonumber(ARGV[5])
if version == 1 then
  if there[1] then return 0 end
else
  if not there[1] or tonumber(there[1]) ~= version - 1 or there[2] == 'closed' then return 0 end
end
redis.call('HSET', KEYS[1], 'key', ARGV[1], 'task', ARGV[2], 'number', ARGV[3], 'state', ARGV[4], 'version', ARGV[5],
           'document', ARGV[6])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[5])
if ARGV[4] == 'closed' then redis.call('ZADD', KEYS[3], ARGV[7], ARGV[1]) end
return 1
"""
_NOTE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SADD', KEYS[3], ARGV[1])
for i = 2, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
return 1
"""
_ACCEPT = """
local found = redis.call('HMGET', KEYS[1], 'state', 'task', 'number')
if found[1] ~= 'running' then return {'closed'} end
local repeated = {}
for i = 4, #ARGV, 2 do
  local digest = redis.call('HGET', KEYS[2], ARGV[i])
  if digest then
    repeated[#repeated + 1] = ARGV[i]
    repeated[#repeated + 1] = digest
  end
end
if #repeated > 0 then return {'repeated', repeated} end
for i = 4, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  local taken = ARGV[3] .. ARGV[i]
  redis.call('HINCRBY', taken, 'times ' .. found[2], 1)
  local last = redis.call('HGET', taken, 'last ' .. found[2])
  if not last or tonumber(last) < tonumber(found[3]) then redis.call('HSET', taken, 'last ' .. found[2], found[3]) end
end
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
return {'counted'}
"""
_FIELDS = (
    "id", "algorithm", "public_key", "not_after", "enrolled", "standing", "reason", "last_seen", "counter", "counted", "told",
    "labels",
)  # fmt: skip
_KEPT = ("notes", "contributions", "partials")


class RedisGatewayStore:
    """See `GatewayStore`; at ``redis://[user:password@]host:port/db?population=NAME`` (or rediss, or unix with a path)."""

    def __init__(self, url: str) -> None:
        population, self._shown, bare = parse_redis_url(url)
        self._prefix = f"fedcore:gateway:{{{population}}}:"
        with self._clear_errors():
            try:
                self._redis: Any = redis.Redis.from_url(
                    bare, single_connection_client=True, retry=Retry(NoBackoff(), 0), socket_timeout=30, socket_connect_timeout=5
                )
            except (ValueError, TypeError):
                raise Refused(f"{self._shown}: is not a Redis URL that can be used") from None
            try:
                self._check_durability()
                names = ("register", "judge", "label", "admit", "advance", "note", "accept")
                texts = (_REGISTER, _JUDGE, _LABEL, _ADMIT, _ADVANCE, _NOTE, _ACCEPT)
                self._scripts = {name: self._redis.register_script(text) for name, text in zip(names, texts, strict=True)}
                self.releases = RedisReleases(self._redis, self._prefix, self._clear_errors)
            except BaseException:
                self.close()
                raise

    def register(self, device: Device) -> Device:
        """See `GatewayStore`."""
        values = ({name: getattr(device, name) for name in _FIELDS} | {"labels": json.dumps(device.labels)}).values()
        with self._clear_errors():
            if not self._run("register", [self._device_key(device.id), self._key("devices")], [_number(one) for one in values]):
                raise Refused(f"device {device.id:016x} is another key's id")
            known = self.device(device.id)
        if known is None:
            raise TryAgain(f"{self._shown}: lost a device that was just registered")
        return known

    def device(self, device: int) -> Device | None:
        """See `GatewayStore`."""
        with self._clear_errors():
            pipeline = self._redis.pipeline(transaction=False)
            return self._read_devices(pipeline, [device])[0]

    def devices(self) -> list[Device]:
        """See `GatewayStore`."""
        with self._clear_errors():
            ids = sorted(int(one) for one in self._redis.smembers(self._key("devices")))
            found = []
            for start in range(0, len(ids), 1000):
                found += self._read_devices(self._redis.pipeline(transaction=False), ids[start : start + 1000])
        return [one for one in found if one is not None]

    def judge(self, device: int, standing: Standing, reason: str) -> None:
        """See `GatewayStore`."""
        with self._clear_errors():
            self._run("judge", [self._device_key(device), self._taken_key(device), self._key("none")], [standing.value, reason])
            if standing is not Standing.FORGOTTEN:
                return
            for key in self._redis.hkeys(self._key("rounds")):
                for kind in self._redis.smembers(self._key("kinds", key.decode())):
                    self._redis.hdel(self._key("notes", key.decode(), kind.decode()), device)
            self.releases.forget(device)

    def label(self, device: int, labels: Sequence[str]) -> None:
        """See `GatewayStore`."""
        with self._clear_errors():
            self._run("label", [self._device_key(device)], [json.dumps(labels)])

    def admit(self, requests: Sequence[Admission], now: float) -> list[Verdict]:
        """See `GatewayStore`. One script a request, sent together: each is decided, and kept, on its own."""
        with self._clear_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for one in requests:
                request = self._key("request", str(one.device), str(one.counter))
                keys = [self._device_key(one.device), request, self._taken_key(one.device)]
                self._run("admit", keys, [one.counter, one.nonce, one.told, repr(now), repr(REQUEST_WINDOW)], pipeline)
            return [_read_verdict(answer) for answer in pipeline.execute()]

    def advance(self, change: Round) -> bool:
        """See `GatewayStore`."""
        keys = [self._key("round", change.key), self._key("rounds"), self._key("closed")]
        values = [change.key, change.task, change.number, change.state.value, change.version, change.document, repr(time.time())]
        with self._clear_errors():
            return bool(self._run("advance", keys, values))

    def rounds(self) -> dict[str, int]:
        """See `GatewayStore`."""
        with self._clear_errors():
            return {key.decode(): int(version) for key, version in sorted(self._redis.hgetall(self._key("rounds")).items())}

    def round(self, key: str) -> Round | None:
        """See `GatewayStore`."""
        with self._clear_errors():
            found = {name.decode(): value.decode() for name, value in self._redis.hgetall(self._key("round", key)).items()}
        if not found:
            return None
        state, version = RoundState(found["state"]), int(found["version"])
        return Round(key, found["task"], int(found["number"]), state, version, found["document"])

    def note(self, key: str, kind: str, notes: Sequence[Note]) -> None:
        """See `GatewayStore`."""
        values: list[Any] = [part for one in notes for part in (one.device, json.dumps([one.text, one.time]))]
        with self._clear_errors():
            keys = [self._key("round", key), self._key("notes", key, kind), self._key("kinds", key)]
            self._run("note", keys, [kind, *values])

    def notes(self, key: str, kind: str) -> list[Note]:
        """See `GatewayStore`."""
        with self._clear_errors():
            found = self._redis.hgetall(self._key("notes", key, kind))
        return sorted((Note(int(device), *json.loads(value)) for device, value in found.items()), key=lambda one: one.device)

    def accept(self, key: str, writer: str, partial: bytes, contributions: Sequence[Contribution]) -> Acceptance:
        """See `GatewayStore`."""
        keys = [self._key("round", key), self._key("contributions", key), self._key("partials", key)]
        values: list[Any] = [part for one in contributions for part in (one.device, one.digest)]
        with self._clear_errors():
            try:
                self._check_durability()  # it may have been set up anew, or begun again without its settings
            except Refused as error:
                raise TryAgain(f"{error}; nothing is counted until it is set right") from None
            answer = self._run("accept", keys, [writer, partial, self._key("taken", ""), *values])
        if answer[0] != b"repeated":
            return Acceptance(counted=answer[0] == b"counted")
        pairs = iter(answer[1])
        return Acceptance(counted=False, repeated={int(device): digest for device, digest in zip(pairs, pairs, strict=True)})

    def contributions(self, key: str) -> list[Contribution]:
        """See `GatewayStore`."""
        with self._clear_errors():
            found = self._redis.hgetall(self._key("contributions", key))
        return sorted((Contribution(int(device), digest) for device, digest in found.items()), key=lambda one: one.device)

    def partials(self, key: str) -> list[bytes]:
        """See `GatewayStore`."""
        with self._clear_errors():
            return [partial for _, partial in sorted(self._redis.hgetall(self._key("partials", key)).items())]

    def prune(self, now: float, before: float) -> None:  # noqa: ARG002 - requests expire by themselves
        """See `GatewayStore`."""
        with self._clear_errors():
            for name in self._redis.zrangebyscore(self._key("closed"), "-inf", f"({before!r}"):
                key = name.decode()
                kinds = [self._key("notes", key, kind.decode()) for kind in self._redis.smembers(self._key("kinds", key))]
                with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.delete(self._key("round", key), self._key("kinds", key), *kinds)
                    pipeline.delete(*(self._key(kept, key) for kept in _KEPT))
                    pipeline.hdel(self._key("rounds"), key)
                    pipeline.zrem(self._key("closed"), key)
                    pipeline.execute()

    def close(self) -> None:
        """See `GatewayStore`."""
        if hasattr(self, "_redis"):
            self._redis.close()

    def _run(self, name: str, keys: Sequence[str], values: Sequence[Any], client: Any = None) -> Any:
        return self._scripts[name](keys=keys, args=values, client=client)

    def _read_devices(self, pipeline: Any, ids: Sequence[int]) -> list[Device | None]:
        for one in ids:
            pipeline.hmget(self._device_key(one), _FIELDS)
            pipeline.hgetall(self._taken_key(one))
        answers = iter(pipeline.execute())
        return [_read_device(row, taken) for row, taken in zip(answers, answers, strict=True)]

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _device_key(self, device: int) -> str:
        return self._key("device", str(device))

    def _taken_key(self, device: int) -> str:
        return self._key("taken", str(device))

    def _check_durability(self) -> None:
        """Ask the server whether it would keep what it acknowledges.

        Raises:
            Refused: it would not, or nobody can tell.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for name in _NEEDED:
            pipeline.config_get(name)
        pipeline.info("replication")
        try:
            *answers, replication = cast("list[dict[Any, Any]]", pipeline.execute())
        except redis.ResponseError as error:
            if str(error).startswith(("NOAUTH", "WRONGPASS")):
                raise
            raise Refused(f"{self._shown}: does not allow CONFIG GET, so nobody can tell whether it keeps anything") from None
        for (name, needed), found in zip(_NEEDED.items(), answers, strict=True):
            value = next((_text(one) for one in found.values()), "")
            if value != needed:
                raise Refused(
                    f"{self._shown}: would lose uploads that were acknowledged: {name} is {value or 'unknown'}, it must be {needed}"
                )
        if _text(replication.get("role", "")) != "master":
            raise Refused(f"{self._shown}: is a replica; a gateway's store is written to the master")

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError:
            raise Refused(f"{self._shown}: user or password was not accepted") from None
        except redis.RedisError as error:
            held = self._redis.connection if hasattr(self, "_redis") else None
            if held is not None and isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
                held.disconnect()  # a pipeline leaves a broken connection as it is; the next call begins a new one
            kind = str(error).split(" ", 1)[0] if isinstance(error, redis.ResponseError) else type(error).__name__
            if kind in {"NOPERM", "NOAUTH", "WRONGTYPE", "READONLY"}:
                raise Refused(f"{self._shown}: refuses what a gateway's store needs ({kind})") from None
            raise TryAgain(f"{self._shown}: the gateway's store cannot be used now ({kind})") from None


def _read_verdict(answer: Sequence[Any]) -> Verdict:
    said = answer[0].decode()
    if said == "unknown":
        return Verdict(Problem.UNKNOWN, None)
    taken = iter(answer[2])
    device = _read_device(answer[1], dict(zip(taken, taken, strict=True)))
    return Verdict(None if said == "ok" else Problem(said), device)


def _read_device(row: Sequence[bytes | None], taken: dict[bytes, bytes]) -> Device | None:
    if row[0] is None:
        return None
    found = cast("dict[str, bytes]", dict(zip(_FIELDS, row, strict=True)))
    texts = {name: found[name].decode() for name in ("standing", "reason", "told")}
    tasks = sorted(name.decode().removeprefix("times ") for name in taken if name.startswith(b"times "))
    device = Device(
        int(found["id"]), int(found["algorithm"]), found["public_key"], int(found["not_after"]), float(found["enrolled"]),
        Standing(texts["standing"]), texts["reason"], float(found["last_seen"]), int(found["counter"]), float(found["counted"]),
        texts["told"], labels=tuple(json.loads(found["labels"] or "[]")),
    )  # fmt: skip
    return replace(device, participations={t: (int(taken[f"times {t}".encode()]), int(taken[f"last {t}".encode()])) for t in tasks})


def _number(value: Any) -> Any:
    """A value as Redis takes it; floats to the last bit."""
    return repr(value) if isinstance(value, float) else value.value if isinstance(value, Standing) else value


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
