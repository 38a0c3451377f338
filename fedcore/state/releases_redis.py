"""`ReleaseStore` in the Redis of a gateway's store. Each change is one script, which is one unit of the append-only file.

Numbers stay text on their way through Lua, whose JSON would round them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedcore.state.releases import Holding, Membership, Outcome, RolloutEntry, Visit

__all__ = ["RedisReleases"]

_ADVANCE = """
local name, model, number, revision = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local there = redis.call('HGET', KEYS[1], name)
if revision == 1 then
  local last = redis.call('HGET', KEYS[2], model)
  if there or number ~= (last and cjson.decode(last).number or 0) + 1 then return 0 end
else
  if not there then return 0 end
  local old = cjson.decode(there)
  if old.model ~= model or old.number ~= number or old.revision ~= revision - 1 then return 0 end
end
redis.call('HSET', KEYS[1], name,
           cjson.encode({model = model, number = number, revision = revision, document = ARGV[5]}))
local current = redis.call('HGET', KEYS[2], model)
if not current or cjson.decode(current).number <= number then
  redis.call('HSET', KEYS[2], model, cjson.encode({name = name, number = number, revision = revision}))
end
return 1
"""
_VISIT = """
local ask = cjson.decode(ARGV[1])
local device, prefix = ask.device, ARGV[2]
redis.call('HSET', KEYS[1], device, ask.holding)
local said = redis.call('HGET', KEYS[5], device)
if ask.note ~= '' then
  redis.call('HSET', KEYS[5], device, cjson.encode({ask.version, ask.note}))
elseif said and cjson.decode(said)[1] ~= ask.version then
  redis.call('HDEL', KEYS[5], device)
end
redis.call('SADD', KEYS[4], ask.model)
for _, report in ipairs(ask.reports) do
  local key = prefix .. 'members:' .. report.rollout
  local found = redis.call('HGET', key, device)
  if found then
    local member = cjson.decode(found)
    if member.arm == report.arm and tonumber(ask.now) < tonumber(member.closes) then
      member.values = member.values or {}
      for _, pair in ipairs(report.values) do
        local old = member.values[pair[1]]
        if not old or tonumber(old) < tonumber(pair[2]) then member.values[pair[1]] = pair[2] end
      end
      redis.call('HSET', key, device, cjson.encode(member))
    end
  end
end
local held = redis.call('HGET', KEYS[2], ask.model)
local row = held and cjson.decode(held) or {name = '', revision = 0}
local current = row.name == ask.rollout and row.revision == ask.revision
local member = false
if current and ask.rollout ~= '' then
  local key = prefix .. 'members:' .. ask.rollout
  member = redis.call('HGET', key, device)
  if not member and ask.arm then
    local arms = prefix .. 'arms:' .. ask.rollout
    if tonumber(redis.call('HGET', arms, ask.arm) or 0) < ask.most then
      redis.call('HINCRBY', arms, ask.arm, 1)
      member = cjson.encode({arm = ask.arm, hardware = ask.hardware, joined = ask.joined, closes = ask.closes})
      redis.call('HSET', key, device, member)
    end
  end
end
local last = tonumber(redis.call('HGET', KEYS[3], device) or -1)
local sequence = math.max(last + 1, tonumber(ask.least))
local text = string.format('%.0f', sequence)
redis.call('HSET', KEYS[3], device, text)
return {current and 1 or 0, member, text}
"""


class RedisReleases:
    """See `ReleaseStore`; keys begin with ``prefix``. ``clear_errors`` turns Redis's errors into ours."""

    def __init__(self, server: Any, prefix: str, clear_errors: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._redis, self._prefix, self._clear_errors = server, prefix, clear_errors
        self._advance, self._visit = server.register_script(_ADVANCE), server.register_script(_VISIT)

    def rollouts(self) -> list[RolloutEntry]:
        """See `ReleaseStore`."""
        with self._clear_errors():
            found = self._redis.hgetall(self._key("rollouts"))
        entries = [RolloutEntry(name.decode(), **json.loads(row)) for name, row in found.items()]
        return sorted(entries, key=lambda one: (one.model, one.number))

    def advance_rollout(self, change: RolloutEntry) -> bool:
        """See `ReleaseStore`."""
        keys = [self._key("rollouts"), self._key("current-rollouts")]
        with self._clear_errors():
            return bool(self._advance(keys=keys, args=[change.name, change.model, change.number, change.revision, change.document]))

    def visit(self, visit: Visit) -> Outcome:
        """See `ReleaseStore`."""
        one, joining, known = visit.holding, visit.joining, visit.known or ("", 0)
        held = json.dumps([one.version, one.tier, one.runtime, one.hardware, one.labels, repr(one.seen), ""])
        ask = {
            "device": str(one.device), "model": one.model, "version": str(one.version), "note": one.note, "holding": held,
            "now": repr(one.seen), "rollout": known[0],
            "revision": known[1], "least": str(int(1000 * one.seen)), "most": visit.most,
            "reports": [
                {"rollout": part.rollout, "arm": part.arm, "values": [[name, repr(float(v))] for name, v in part.values.items()]}
                for part in visit.reports
            ],
        }  # fmt: skip
        if joining is not None:
            ask |= {
                "arm": joining.arm,
                "hardware": joining.hardware,
                "joined": repr(joining.joined),
                "closes": repr(joining.closes),
            }
        keys = [self._key("holdings", one.model), self._key("current-rollouts"), self._key("sequences"), self._key("models"),
                self._key("refusals", one.model)]  # fmt: skip
        with self._clear_errors():
            current, member, sequence = self._visit(keys=keys, args=[json.dumps(ask), self._prefix])
        return Outcome(bool(current), None if member is None else _member(one.device, member), int(sequence))

    def prune_rollouts(self, model: str, keep: int) -> None:
        """See `ReleaseStore`."""
        old = [one.name for one in self.rollouts() if one.model == model][: -max(keep, 1)]
        if not old:
            return
        with self._clear_errors(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(*(self._key(kind, name) for name in old for kind in ("members", "arms")))
            pipeline.hdel(self._key("rollouts"), *old)
            pipeline.execute()

    def members(self, rollout: str) -> list[Membership]:
        """See `ReleaseStore`."""
        with self._clear_errors():
            found = self._redis.hgetall(self._key("members", rollout))
        return sorted((_member(int(device), row) for device, row in found.items()), key=lambda one: one.device)

    def holdings(self, model: str) -> list[Holding]:
        """See `ReleaseStore`."""
        with self._clear_errors():
            found = self._redis.hgetall(self._key("holdings", model))
            notes = {device: json.loads(row)[1] for device, row in self._redis.hgetall(self._key("refusals", model)).items()}
        rows = [_holding(int(device), model, json.loads(row), notes.get(device, "")) for device, row in found.items()]
        return sorted(rows, key=lambda one: one.device)

    def forget(self, device: int) -> None:
        """Erase a device, within the caller's handling of errors."""
        for name in self._redis.hkeys(self._key("rollouts")):
            self._redis.hdel(self._key("members", name.decode()), device)
        for model in self._redis.smembers(self._key("models")):
            self._redis.hdel(self._key("holdings", model.decode()), device)
            self._redis.hdel(self._key("refusals", model.decode()), device)
        self._redis.hdel(self._key("sequences"), device)

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)


def _member(device: int, row: bytes) -> Membership:
    found = json.loads(row)
    member = Membership(device, found["arm"], found["hardware"], float(found["joined"]), float(found["closes"]))
    values = found.get("values")
    if values is None:
        return member
    return replace(member, values={name: float(value) for name, value in sorted(dict(values).items())})


def _holding(device: int, model: str, row: Sequence[Any], note: str) -> Holding:
    version, tier, runtime, hardware, labels, seen, before = row  # a note stood in the row itself once
    return Holding(device, model, version, tier, runtime, hardware, tuple(labels), float(seen), note or before)
