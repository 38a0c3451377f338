"""The decision function of rollouts over simulated devices, with harm that a canary of twenty could not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedcore.registry.rollout import Plan, Report, assign, command, decide, exposed, new_rollout

__all__ = ["VARIANTS", "rehearse"]

VARIANTS = {
    "is harmless": {}, "takes 60 % more memory": {"memory": 1.6}, "crashes on 1 load in 20": {"crash": 0.05},
    "silences 1 device in 5": {"silent": 0.2},
}  # fmt: skip


def rehearse(fleet: int, variant: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """A rollout over simulated devices: exposed devices and the phase by hour, until it is over."""
    rng = np.random.default_rng(seed)
    plan = Plan("rehearsal", "digits", 2, 1, fleet, stages=(0.3, 0.6), control=0.4, window=6 * 3600.0, corrupt=0.0)
    state = command(new_rollout(plan, rng.bytes(32)), "start")
    memory, speed = 5e6 * np.exp(0.2 * rng.standard_normal(fleet)), 10 * np.exp(0.3 * rng.standard_normal(fleet))
    hours: list[tuple[int, int, str]] = []
    decision, tests = "inconclusive", ()
    for hour in range(96):
        clock, reports = 3600.0 * hour, []
        for number in np.flatnonzero(rng.random(fleet) < 0.25):
            device = f"device-{number}"
            state, _ = assign(state, device, "other", clock)
            member = state.members.get(device)
            if member is None or member.joined != clock:
                continue
            worse = variant if member.arm == "canary" else {}
            if rng.random() < 0.03 + worse.get("silent", 0.0):
                continue
            reports.append(Report(device, {
                "disagreement": float(np.clip(rng.normal(0.03, 0.01), 0, 1)), "errors": 0.1 * float(rng.random() < 0.01),
                "crash": float(rng.random() < 0.002 + worse.get("crash", 0.0)), "p95_ms": float(speed[number]),
                "peak_bytes": float(memory[number] * worse.get("memory", 1.0)),
            }))  # fmt: skip
        state, now, evidence = decide(state, reports, clock)
        hours.append((hour, exposed(state), state.phase))
        if now != "hold":
            decision, tests = now, evidence
        if state.phase in {"full", "aborted"}:
            break
    by = sorted({test.signal for test in tests if test.harmful}) if decision == "abort" else []
    return {"phase": state.phase, "exposed": exposed(state), "hours": len(hours), "by": by, "curve": hours}
