"""A rollout as bytes, to be kept between decisions, and what is written down of every decision and order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedcore.errors import Refused
from fedcore.registry.journal import plain
from fedcore.registry.rollout import Decision, Member, Plan, Rollout, Signal, Test, exposed

__all__ = ["decision_record", "decode_rollout", "encode_rollout", "order_record"]


def encode_rollout(state: Rollout) -> bytes:
    """JSON of everything, the secret included: keep it where only gateways and the coordinator read."""
    held = {
        "plan": dataclasses.asdict(state.plan), "secret": state.secret.hex(), "phase": state.phase, "stage": state.stage,
        "fallback": state.fallback, "targets": {str(version): digest for version, digest in state.targets.items()},
        "members": {device: dataclasses.asdict(one) for device, one in state.members.items()},
    }  # fmt: skip
    return json.dumps(held, sort_keys=True).encode()


def decode_rollout(data: bytes) -> Rollout:
    """Inverse of `encode_rollout`.

    Raises:
        Refused: the bytes are no rollout.
    """
    try:
        held = json.loads(data)
        plan = dict(held["plan"])
        plan["signals"] = tuple(Signal(**one) for one in plan["signals"])
        plan["stages"], plan["hardware"] = tuple(plan["stages"]), tuple(plan["hardware"])
        members = {str(device): Member(**one) for device, one in held["members"].items()}
        secret = bytes.fromhex(held["secret"])
        targets = {int(version): str(digest) for version, digest in held.get("targets", {}).items()}
        return Rollout(Plan(**plan), secret, held["phase"], held["stage"], members, held["fallback"], targets)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused("this is no rollout that was kept, or it is damaged") from None


def decision_record(state: Rollout, decision: Decision, tests: Sequence[Test], clock: float) -> dict[str, Any]:
    """For `fedcore.registry.journal.Journal`: what was decided, on what evidence. ``state`` is the one after the decision."""
    return {**_where(state, clock), "event": decision, "by": "evidence", "evidence": _rows(tests)}


def order_record(state: Rollout, what: str, who: str, why: str, clock: float, tests: Sequence[Test] = ()) -> dict[str, Any]:
    """The same for what a person ordered, with the evidence at that time if it was looked at. ``state`` is the one after it.

    Raises:
        Refused: nobody, or no reason, is named.
    """
    if not who.strip() or not why.strip():
        raise Refused("an order is recorded with who gave it and why")
    return {**_where(state, clock), "event": what, "by": who, "why": why, **({"evidence": _rows(tests)} if tests else {})}


def _rows(tests: Sequence[Test]) -> list[Any]:
    """What is refuted for certain has infinite evidence, written as null."""
    return [plain({**dataclasses.asdict(test), "harmful": test.harmful, "harmless": test.harmless}) for test in tests]


def _where(state: Rollout, clock: float) -> Mapping[str, Any]:
    plan = state.plan
    return {
        "at": clock, "rollout": plan.name, "model": plan.model, "version": plan.version, "phase": state.phase, "stage": state.stage,
        "exposed": exposed(state), "fallback": state.fallback,
    }  # fmt: skip
