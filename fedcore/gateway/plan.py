"""Plans: what a round asks of a device, signed by the coordinator's plan key, and how a device checks one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.messages import PLAN, FleetTrust
from fedcore.secagg.crypto import ED25519, Signer, verify

__all__ = ["check_plan", "sign_plan", "to_settings", "to_table"]


def sign_plan(key: Signer, plan: pb.Plan) -> pb.SignedPlan:
    """The plan as it travels."""
    data = plan.SerializeToString(deterministic=True)
    return pb.SignedPlan(plan=data, key=key.public, signature=key.sign(PLAN, data))


def check_plan(signed: pb.SignedPlan, trust: FleetTrust, now: int, last_round: int = 0) -> pb.Plan:
    """The plan that a device may act on; ``now`` in Unix milliseconds, ``last_round`` the last of this task it took part in.

    Raises:
        Refused: not signed by a pinned plan key, of another deployment, expired, or of a round that is not new.
    """
    if signed.key not in trust.plan_keys:
        raise Refused("the plan is signed by no plan key of the trust bundle")
    verify(ED25519, signed.key, signed.signature, PLAN, signed.plan)
    try:
        plan: pb.Plan = pb.Plan.FromString(signed.plan)
    except DecodeError:
        raise Refused("the plan cannot be read") from None
    if plan.deployment != trust.deployment:
        raise Refused(f"the plan is of {plan.deployment!r}, this device is in {trust.deployment!r}")
    if not now < plan.expires_ms:
        raise Refused("the plan has expired")
    if plan.round <= last_round:
        raise Refused(f"the plan is of round {plan.round}; this device took part in round {last_round} already")
    return plan


def to_settings(table: Mapping[str, Any]) -> list[pb.Setting]:
    """A flat table of numbers, texts, bytes, booleans and lists of them.

    Raises:
        Refused: a value of another kind.
    """
    return [pb.Setting(name=name, value=_to_value(name, value)) for name, value in table.items()]


def to_table(plan: pb.Plan) -> dict[str, Any]:
    """Inverse of `to_settings`, for the settings of a plan.

    Raises:
        Refused: a value of a kind that this software does not know.
    """
    return {setting.name: _from_value(setting.name, setting.value) for setting in plan.settings}


def _to_value(name: str, value: Any) -> pb.Value:
    if isinstance(value, bool):
        return pb.Value(flag=value)
    if isinstance(value, int):
        return pb.Value(integer=value)
    if isinstance(value, float):
        return pb.Value(real=value)
    if isinstance(value, str):
        return pb.Value(text=value)
    if isinstance(value, bytes):
        return pb.Value(data=value)
    if isinstance(value, (list, tuple)):
        return pb.Value(list=pb.Values(values=[_to_value(name, one) for one in value]))
    raise Refused(f"setting {name} is a {type(value).__name__}, which a plan cannot hold")


def _from_value(name: str, value: pb.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind is None:
        raise Refused(f"setting {name} has a value that this software does not know")
    return [_from_value(name, one) for one in value.list.values] if kind == "list" else getattr(value, kind)
