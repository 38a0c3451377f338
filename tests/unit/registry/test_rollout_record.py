"""A rollout survives being kept, and what is written down says who, what and why, and never the secret."""

import json

import pytest

from fedcore.errors import Refused
from fedcore.registry.journal import Journal, check_chain
from fedcore.registry.rollout import Plan, Report, Signal, assign, command, decide, new_rollout
from fedcore.registry.rollout_record import decision_record, decode_rollout, encode_rollout, order_record

SECRET = bytes(range(100, 132))


@pytest.fixture
def state():
    signals = (Signal("crash", 0.05), Signal("p95_ms", 0.2, "amount"), Signal("wrong", 0.1, ceiling=0.3))
    plan = Plan("r", "digits", 7, 6, 400, stages=(0.3, 0.5), signals=signals, hardware=("pi",), window=10.0, corrupt=0.0)
    state = command(new_rollout(plan, SECRET), "start")
    for number in range(400):
        state, _ = assign(state, f"d{number}", "pi" if number % 2 else "nano", number / 100)
    return state


def test_a_rollout_that_was_kept_decides_the_same(state):
    reports = [Report(device, {"crash": float(one.arm == "canary"), "p95_ms": 3.5}) for device, one in state.members.items()]
    kept = decode_rollout(encode_rollout(state))
    assert kept == state
    assert decide(kept, reports, 20.0) == decide(state, reports, 20.0)
    after = decide(state, reports, 20.0)[0]
    assert decode_rollout(encode_rollout(after)) == after
    for data in (b"", b"{}", b"[]", encode_rollout(state).replace(b'"window"', b'"widow"')):
        with pytest.raises(Refused, match="no rollout"):
            decode_rollout(data)


def test_every_decision_is_recorded_with_its_evidence_and_without_the_secret(state, tmp_path):
    journal = Journal(tmp_path / "audit.jsonl")
    reports = [Report(device, {"crash": float(one.arm == "canary"), "p95_ms": 3.5}) for device, one in state.members.items()]
    state, decision, tests = decide(state, reports, 20.0)
    journal.append(decision_record(state, decision, tests, 20.0))
    state = command(state, "roll back", fallback=8)
    journal.append(order_record(state, "roll back", "ann", "crashes", 21.0))
    data = (tmp_path / "audit.jsonl").read_bytes()
    assert check_chain(data)[0] == 2
    first, second = (json.loads(line) for line in data.splitlines())
    assert (first["event"], first["phase"], first["exposed"]) == ("abort", "aborted", 120)
    assert any(one["harmful"] and one["signal"] == "crash" for one in first["evidence"])
    assert {one["group"] for one in first["evidence"]} == {"all", "pi", "other"}
    assert (second["by"], second["why"], second["fallback"]) == ("ann", "crashes", 8)
    assert SECRET.hex().encode() not in data
    for who, why in (("", "x"), ("x", " ")):
        with pytest.raises(Refused, match="who gave it and why"):
            order_record(state, "pause", who, why, 1.0)
