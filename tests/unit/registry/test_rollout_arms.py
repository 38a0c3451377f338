"""Who joins which arm and gets which release, device by device: what gateways do with rows equals `assign`; what plans allow."""

import contextlib
import dataclasses
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.registry.rollout import (
    SIGNALS,
    Plan,
    Report,
    arm_of,
    assign,
    command,
    decide,
    draw_secret,
    exposed,
    new_rollout,
    release_of,
    room,
)
from fedcore.registry.rollout_record import decode_rollout, encode_rollout

SECRET = bytes(range(32))


def plan(**changes):
    return Plan(**{"name": "r", "model": "digits", "version": 7, "baseline": 6, "fleet": 60, "stages": (0.25, 0.5), "window": 10.0,
                   **changes})  # fmt: skip


def running(**changes):
    return command(new_rollout(plan(**changes), SECRET), "start")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["", "promote", "pause", "resume", "abort", "roll back"])), max_size=80),
    st.sampled_from(["", "lab"]),
    st.sampled_from([None, 3]),
)
def test_a_row_a_device_gives_what_the_state_in_one_piece_gives(steps, group, rest):
    state = running(group=group, rest=rest)
    rows: dict[str, str] = {}  # what a store holds: the arm of each device
    for number, what in steps:
        if what:
            with contextlib.suppress(Refused):
                state = command(state, what, fallback=9 if what == "roll back" else None)
        device, labels = f"device-{number}", ("lab",) if number % 3 else ()
        arm = arm_of(state, device, labels)
        if device not in rows and arm is not None and list(rows.values()).count(arm) < room(state, arm):
            rows[device] = arm
        version = release_of(state, rows.get(device))
        state, expected = assign(state, device, "other", 0.0, labels)
        assert version == expected
        assert {name: one.arm for name, one in state.members.items()} == rows
        if state.phase in {"aborted", "draft"}:
            assert version != 7
    assert exposed(state) <= 30 or state.phase == "full"


def test_a_first_release_goes_to_everybody_and_needs_no_fleet():
    state = running(baseline=0, fleet=1)
    assert (state.phase, release_of(state, None)) == ("full", 7)
    with pytest.raises(Refused, match="is nobody"):
        plan(fleet=1)


def test_side_by_side_the_rest_keeps_what_it_has():
    state = running(rest=5)
    assert [release_of(state, arm) for arm in ("canary", "control", None)] == [7, 6, 5]
    aborted = command(state, "abort")
    assert [release_of(aborted, arm) for arm in ("canary", "control", None)] == [5, 6, 5]
    back = command(aborted, "roll back", fallback=8)
    assert [release_of(back, arm) for arm in ("canary", "control", None)] == [8, 8, 8]
    assert [release_of(command(command(state, "promote"), "promote"), arm) for arm in ("canary", "control", None)] == [7, 7, 7]
    with pytest.raises(Refused, match="below both"):
        plan(rest=6)


def test_a_group_goes_first_and_then_everybody():
    state = running(group="lab", stages=(0.3, 0.5))
    names = [f"device-{number}" for number in range(60)]
    assert {arm_of(state, name, ("other",)) for name in names} == {None}
    assert {arm_of(state, name, ("lab",)) for name in names} == {"canary", "control"}
    later = command(state, "promote")
    assert {arm_of(later, name, ()) for name in names} == {"canary", "control", None}


@pytest.mark.parametrize("fleet", [4, 20, 60])
def test_a_drawn_secret_gives_small_fleets_their_canary(fleet):
    one, names = plan(fleet=fleet, stages=(0.25,), control=0.5), [f"device-{number}" for number in range(fleet)]
    state = command(new_rollout(one, draw_secret(one, names, os.urandom)), "start")
    arms = [arm_of(state, name) for name in names]
    assert abs(arms.count("canary") - fleet / 4) <= 2
    assert abs(arms.count("control") - fleet / 2) <= 3
    assert len(draw_secret(one, [], os.urandom)) == 32


def test_a_draw_among_draws_favours_no_device():
    one, names = plan(fleet=20, stages=(0.25,), control=0.5), [f"device-{number}" for number in range(20)]
    times = dict.fromkeys(names, 0)
    for _ in range(400):
        state = command(new_rollout(one, draw_secret(one, names, os.urandom, draws=8)), "start")
        for name in names:
            times[name] += arm_of(state, name) == "canary"
    # Each is in the canary in a quarter of 400 draws: 100, with a deviation of 9; six of them.
    assert all(46 < count < 154 for count in times.values())


def test_an_amount_has_a_budget_where_it_has_a_ceiling():
    slow = tuple(replace(one, budget=50.0, ceiling=0.25) if one.name == "p95_ms" else one for one in SIGNALS)
    state = running(signals=slow, stages=(0.25,), corrupt=0.0, control=0.5)
    names, fine = [f"device-{number}" for number in range(60)], {"disagreement": 0, "errors": 0, "crash": 0, "peak_bytes": 1.0}
    for name in names:
        state, _ = assign(state, name, "other", 0.0)

    def judged(canary):
        reports = [Report(name, {**fine, "p95_ms": canary if one.arm == "canary" else 1.0}) for name, one in state.members.items()]
        return decide(state, reports, 11.0)

    bad, decision, tests = judged(51.0)
    assert (bad.phase, decision) == ("aborted", "abort")
    assert "p95_ms above 50 or untold on more than 0.25" in {test.signal for test in tests if test.harmful}
    _, _, tests = judged(49.0)
    assert "p95_ms above 50 or untold on more than 0.25" not in {test.signal for test in tests if test.harmful}
    for wrong in ({"budget": 50.0}, {"ceiling": 0.25}):
        with pytest.raises(Refused, match="a budget is of an amount that has a ceiling"):
            plan(signals=(dataclasses.replace(SIGNALS[3], **wrong),))


def test_what_is_kept_has_the_releases_that_assignments_name():
    state = replace(running(group="lab", rest=2), targets={7: "ab" * 32, 6: "cd" * 32})
    assert decode_rollout(encode_rollout(state)) == state
