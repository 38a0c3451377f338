"""Rollouts: who is exposed, what stops one, and how often that is a mistake; by properties and by simulated fleets."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.registry.compare import compare_releases
from fedcore.registry.confidence import LEVELS, allowed_liars, excess_evidence, ratio_evidence
from fedcore.registry.rollout import SIGNALS, Plan, Report, Signal, assign, command, decide, exposed, new_rollout, place_of

SECRET = bytes(range(32))
HOUR = 3600.0
FINE = {"disagreement": 0.02, "errors": 0.0, "crash": 0, "p95_ms": 10.0, "peak_bytes": 5e6}


def plan(**changes):
    return Plan(**{"name": "r", "model": "digits", "version": 7, "baseline": 6, "fleet": 1000, "window": 10 * HOUR, **changes})


def running(**changes):
    return command(new_rollout(plan(**changes), SECRET), "start")


def check_in(state, devices, clock, hardware="other"):
    for device in devices:
        state, _ = assign(state, device, hardware, clock)
    return state


def devices(count):
    return [f"device-{number}" for number in range(count)]


def reports_of(state, canary, control, rng, clock):
    """What every member says that joined now; ``canary`` and ``control`` give the values, or None for silence."""
    found = []
    for device, member in state.members.items():
        if member.joined == clock:
            values = (canary if member.arm == "canary" else control)(rng)
            if values is not None:
                found.append(Report(device, values))
    return found


def honest(rng):
    """A healthy device: all that is measured differs from device to device."""
    values = {
        "disagreement": float(np.clip(rng.normal(0.03, 0.01), 0, 1)), "errors": float(rng.random() < 0.01) * 0.1, "crash": 0,
        "p95_ms": 10 * math.exp(0.3 * rng.standard_normal()), "peak_bytes": 5e6 * math.exp(0.2 * rng.standard_normal()),
    }  # fmt: skip
    return None if rng.random() < 0.03 else values


def run(state, canary, control, rng, fleet, looks=12, start=0.0):
    """Devices check in over the looks and report in their window; a decision is taken at every look, until one ends it."""
    everybody = devices(fleet)
    rng.shuffle(everybody)
    for look in range(3 * looks):
        clock = start + look * HOUR
        share = (
            everybody[look * fleet // looks : (look + 1) * fleet // looks]
            if look < looks
            else everybody
            if look == 2 * looks
            else []
        )
        state = check_in(state, share, clock)
        state, decision, tests = decide(state, reports_of(state, canary, control, rng, clock), clock)
        if state.phase != "running":
            return state, decision, tests
    return state, decision, tests


actions = st.lists(
    st.one_of(
        st.tuples(st.just("check in"), st.integers(0, 59)),
        st.tuples(st.just("decide"), st.integers(0, 30)),
        st.tuples(st.sampled_from(["pause", "resume", "promote", "abort", "start"]), st.none()),
    ),
    max_size=150,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(actions, st.integers(20, 80), st.binary(min_size=32, max_size=32))
def test_never_more_than_the_stages_share_is_exposed_and_nothing_new_after_an_abort(steps, fleet, secret):
    state = new_rollout(plan(fleet=fleet, stages=(0.1, 0.3, 0.6), control=0.3), secret) if fleet >= 20 else None
    clock, aborted = 0.0, None
    for what, number in steps:
        clock += HOUR
        before = state
        if what == "check in":
            state, version = assign(state, f"device-{number}", "other", clock)
            if aborted is not None:
                assert version != 7
            if version == 7 and state.phase != "full":
                assert place_of(secret, f"device-{number}") < state.plan.stages[state.stage]
            if state.phase in {"draft", "paused", "aborted"}:
                assert state.members == before.members
        elif what == "decide":
            state, _, _ = decide(state, [Report(f"device-{number}", FINE)], clock)
        else:
            try:
                state = command(state, what)
            except Refused:
                continue
        if state.phase == "aborted" and aborted is None:
            aborted = exposed(state)
        if state.phase != "full":
            assert exposed(state) <= state.plan.stages[state.stage] * fleet
        if aborted is not None:
            assert (state.phase, exposed(state)) == ("aborted", aborted)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_order_of_reports_does_not_matter(data):
    state = check_in(running(fleet=200, stages=(0.3, 0.5)), devices(200), 0.0)
    value = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, math.nan, math.inf, -1.0])
    report = st.builds(Report, st.sampled_from(devices(220)), st.dictionaries(st.sampled_from([*FINE, "odd"]), value))
    reports = data.draw(st.lists(report, max_size=80))
    shuffled = data.draw(st.permutations(reports))
    cut = data.draw(st.integers(0, len(reports)))
    whole = decide(state, reports, 10 * HOUR)
    assert decide(state, shuffled, 10 * HOUR) == whole
    parts = decide(decide(state, shuffled[:cut], HOUR)[0], shuffled[cut:] + shuffled[:3], 10 * HOUR)
    assert parts == whole


def test_a_healthy_release_goes_through_all_stages():
    state, rng = running(fleet=8000, stages=(0.1, 0.5), corrupt=0.0), np.random.default_rng(1)
    for start in (0.0, 100 * HOUR):
        if state.phase == "running":
            state, decision, tests = run(state, honest, honest, rng, 8000, start=start)
    assert (state.phase, decision) == ("full", "promote")
    assert assign(state, "anybody", "other", 0.0)[1] == 7
    assert all(test.canary >= 3 / 0.02 for test in tests if test.signal == "crash" and test.group == "all")


def spoiled(**changes):
    def canary(rng):
        values = honest(rng)
        return None if values is None else {**values, **{name: change(values, rng) for name, change in changes.items()}}

    return canary


BAD = {
    "2 points worse": spoiled(disagreement=lambda values, _: values["disagreement"] + 0.02),
    "twice as slow": spoiled(p95_ms=lambda values, _: 2 * values["p95_ms"]),
    "hungry": spoiled(peak_bytes=lambda values, _: 2 * values["peak_bytes"]),
    "crashes on 1 load in 20": spoiled(crash=lambda _, rng: float((rng.random(10) < 0.05).any())),  # 10 loads in a window
    "silent": lambda rng: honest(rng) if rng.random() < 0.5 else None,
    "without the measure": lambda rng: {name: value for name, value in (honest(rng) or FINE).items() if name != "crash"},
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_release_is_stopped_by_a_canary_of_150_of_3000(what):
    state, decision, tests = run(running(fleet=3000, corrupt=0.0), BAD[what], honest, np.random.default_rng(3), 3000)
    assert (state.phase, state.stage, decision) == ("aborted", 0, "abort")
    assert exposed(state) <= 150
    assert max(test.canary for test in tests) <= 150
    assert {assign(state, device, "other", 0.0)[1] for device in devices(3000)} == {6}


@pytest.mark.parametrize("what", ["twice as slow", "hungry", "crashes on 1 load in 20", "silent"])
def test_5_percent_liars_do_not_hide_a_bad_release(what):
    """They say that all is well on the canary and that all is ill in the control; the canary is 600 of 12,000."""

    worst = {name: 1.0 if value < 1 else 1e9 for name, value in FINE.items()}
    state, decision, _ = run(running(fleet=12_000), lying(BAD[what], FINE), lying(honest, worst), np.random.default_rng(4), 12_000)
    assert (state.phase, state.stage, decision) == ("aborted", 0, "abort")


def test_5_percent_liars_do_not_abort_a_healthy_release():
    worst = {name: 1.0 if value < 1 else 1e9 for name, value in FINE.items()}
    best = {name: 0.0 if value < 1 else 1e-9 for name, value in FINE.items()}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        state, decision, tests = run(
            running(fleet=4000), lambda rng: worst if rng.random() < 0.05 else honest(rng),
            lambda rng: best if rng.random() < 0.05 else honest(rng), rng, 4000,
        )  # fmt: skip
        assert (state.phase, decision) == ("running", "inconclusive"), [test for test in tests if test.harmful]


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_allowance_for_liars_that_keeps_5_percent_of_them_from_aborting_a_healthy_release(seed):
    """On a canary of 600 the same lies stop the same release as soon as nobody is expected to lie."""
    worst = {name: 1.0 if value < 1 else 1e9 for name, value in FINE.items()}
    best = {name: 0.0 if value < 1 else 1e-9 for name, value in FINE.items()}

    def decided(corrupt):
        rng = np.random.default_rng(seed)
        state = running(fleet=1500, stages=(0.4, 0.6), corrupt=corrupt)
        return run(state, lying(honest, worst), lying(honest, best), rng, 1500, looks=6)[:2]

    assert decided(0.0)[1] == "abort"
    state, decision = decided(0.05)
    assert (state.phase, decision) == ("running", "inconclusive")


def lying(values, other):
    """One in twenty says something else."""
    return lambda rng: other if rng.random() < 0.05 else values(rng)


@pytest.mark.parametrize(("hardware", "early"), [((), True), (("pi",), False)])
def test_liars_who_come_first_or_name_a_hardware_of_their_own_do_not_abort_a_healthy_release(hardware, early):
    state, fleet, rng = running(fleet=10_000, hardware=hardware), 10_000, np.random.default_rng(10)
    names = devices(fleet)
    liars, others = set(names[: fleet // 20]), names[fleet // 20 :]
    joining = [name for name in names if place_of(SECRET, name) < 0.05 or place_of(SECRET, name) >= 0.96]
    assert len(liars) == 500
    rng.shuffle(others)
    order = [*liars, *others] if early else rng.permutation(names)
    clocks = {name: HOUR * place / fleet for place, name in enumerate(order)}
    for name in sorted(joining, key=clocks.__getitem__):
        state, _ = assign(state, name, "made up" if name in liars else "pi", clocks[name])
    worst = {name: 1.0 if value < 1 else 1e9 for name, value in FINE.items()}
    best = {name: 0.0 if value < 1 else 1e-9 for name, value in FINE.items()}
    said = [
        Report(name, (worst if one.arm == "canary" else best) if name in liars else honest(rng) or FINE)
        for name, one in state.members.items()
    ]
    state, _, _ = decide(state, said, 2 * HOUR)
    for minute in range(0, 61, 6):
        state, decision, tests = decide(state, [], 10 * HOUR + 60 * minute)
        assert decision == "inconclusive", [test for test in tests if test.harmful]
    assert max(test.canary for test in tests) > 400


def test_a_canary_of_20_cannot_tell_crashes_on_1_load_in_20():
    state, decision, _ = run(running(fleet=400), BAD["crashes on 1 load in 20"], honest, np.random.default_rng(5), 400)
    assert (state.phase, decision) == ("running", "inconclusive")


def simulated_aborts(rollouts, liars, rng, looks=8, step=40, wall=None, allow=True):
    """Share of harmless rollouts that any signal ever stops, all of them at once: five rates and two amounts, looked at 8 times.

    ``wall``: evidence that stops one, instead of what `decide` asks for; ``allow``: whether liars are allowed for.
    """
    rows, alpha = 8, 0.05
    wall, liars_alpha = math.log(rows / (alpha * 0.8)) if wall is None else wall, alpha * 0.2 / 2
    aborted = np.zeros(rollouts, bool)
    means = (0.03, 0.005, 0.01, 0.02, 0.5)
    counts = np.zeros((len(means), 2, rollouts, LEVELS + 1), np.int64)
    values = [[[np.zeros((rollouts, 0)) for _ in range(2)] for _ in range(2)]][0]
    for look in range(1, looks + 1):
        lie = rng.random((2, rollouts, step)) < liars
        for number, mean in enumerate(means):
            for arm in range(2):
                hits = np.where(lie[arm], arm == 0, rng.random((rollouts, step)) < mean).sum(axis=1)
                counts[number, arm, :, -1] += hits
                counts[number, arm, :, 0] += step - hits
        for number in range(2):
            for arm in range(2):
                fresh = np.where(lie[arm], 1e9 if arm == 0 else 1e-9, np.exp(0.3 * rng.standard_normal((rollouts, step))))
                values[number][arm] = np.concatenate([values[number][arm], fresh], axis=1)
        allowed = allowed_liars(look * step, 0.05 if liars and allow else 0.0, liars_alpha)
        for number in range(len(means)):
            aborted |= excess_evidence(counts[number, 0], counts[number, 1], allowed, allowed, 0.0) >= wall
        for number in range(2):
            for one in range(rollouts):
                aborted[one] |= ratio_evidence(values[number][0][one], values[number][1][one], allowed, allowed, 1.0) >= wall
    return aborted.mean()


@pytest.mark.parametrize("liars", [0.0, 0.05])
def test_harmless_rollouts_are_aborted_no_more_often_than_promised(liars):
    assert simulated_aborts(150, liars, np.random.default_rng(6), looks=4, step=60) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("liars", [0.0, 0.05])
def test_of_thousands_of_harmless_rollouts_few_are_aborted(liars):
    assert simulated_aborts(3000, liars, np.random.default_rng(7)) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("liars", [0.0, 0.05])
def test_of_harmless_rollouts_that_are_decided_at_every_look_few_are_aborted(liars):
    """As gateways and the coordinator do it: devices join, report late or never, and each look may end the rollout."""
    worst = {name: 1.0 if value < 1 else 1e9 for name, value in FINE.items()}
    best = {name: 0.0 if value < 1 else 1e-9 for name, value in FINE.items()}
    new, old = (lying(honest, worst), lying(honest, best)) if liars else (honest, honest)
    aborted = 0
    for seed in range(150):
        state = running(fleet=1500, stages=(0.4, 0.6), corrupt=liars)
        state, decision, _ = run(state, new, old, np.random.default_rng(100 + seed), 1500, looks=6)
        assert (state.phase == "aborted") == (decision == "abort")
        aborted += state.phase == "aborted"
    assert aborted <= 0.05 * 150


@pytest.mark.parametrize(("liars", "wall", "allowed"), [(0.0, 0.7, True), (0.05, None, False)])
def test_the_simulation_counts_aborts_where_evidence_or_the_allowance_for_liars_is_too_weak(liars, wall, allowed):
    """A simulation that found every rule sound would promise nothing."""
    assert simulated_aborts(60, liars, np.random.default_rng(9), looks=4, step=100, wall=wall, allow=allowed) > 0.05


def test_one_hardware_model_that_suffers_stops_the_rollout():
    def slow_on_b(state, canary, control, rng, clock):
        return [
            Report(one.device, {**one.values, "p95_ms": one.values["p95_ms"] * 3})
            if state.members[one.device].hardware == "b" and state.members[one.device].arm == "canary"
            else one
            for one in reports_of(state, canary, control, rng, clock)
        ]

    state = running(fleet=3000, hardware=("a", "b"), corrupt=0.0, stages=(0.2, 0.5))
    for number, device in enumerate(devices(3000)):
        state, _ = assign(state, device, "b" if number % 8 == 0 else "a", 0.0)
    state, _, _ = decide(state, slow_on_b(state, honest, honest, np.random.default_rng(8), 0.0), HOUR)
    state, decision, tests = decide(state, [], 10 * HOUR)
    assert decision == "abort"
    assert {(test.group, test.signal) for test in tests if test.harmful} == {("b", "p95_ms")}


def test_a_ceiling_stops_what_is_plainly_wrong_on_a_fleet_of_20():
    signals = (Signal("disagreement", 0.1, ceiling=0.2), *(one for one in SIGNALS if one.name != "disagreement"))
    state = running(fleet=20, stages=(0.4, 0.6), control=0.4, corrupt=0.0, signals=signals)
    state = check_in(state, devices(60), 0.0)  # more devices than were declared, and still no more than the share
    assert exposed(state) == 8
    wrong = {**FINE, "disagreement": 0.9}
    reports = [Report(device, wrong if one.arm == "canary" else FINE) for device, one in state.members.items()]
    state, decision, tests = decide(state, reports, 10 * HOUR)
    assert decision == "abort"
    assert "disagreement at most 0.2" in {test.signal for test in tests if test.harmful}


def test_three_over_limit_votes_are_needed_even_where_nothing_fails():
    signals = (Signal("crash", 0.02),)
    state = check_in(running(fleet=1400, stages=(0.1, 0.5), signals=signals, corrupt=0.0), devices(1400), 0.0)
    count = exposed(state)
    assert count < 3 / 0.02
    state, decision, _ = decide(state, [Report(device, FINE) for device in state.members], 10 * HOUR)
    assert decision == "inconclusive"
    assert command(state, "promote").stage == 1


def test_a_vote_is_cast_when_the_window_closes_and_not_changed_after():
    state = check_in(running(fleet=200, stages=(0.5,), control=0.5), devices(200), 0.0)
    state, _, tests = decide(state, [Report(device, FINE) for device in state.members], 9 * HOUR)
    assert {test.canary for test in tests} == {0}
    state, _, _ = decide(state, [], 10 * HOUR)
    later, _, _ = decide(state, [Report(device, {"crash": 1}) for device in state.members], 11 * HOUR)
    assert later.members == state.members


def test_paused_nothing_is_decided_and_nobody_new_joins():
    state = command(check_in(running(), devices(500), 0.0), "pause")
    before = exposed(state)
    state = check_in(state, devices(1000), HOUR)
    state, decision, _ = decide(
        state, [Report(device, {**FINE, "crash": one.arm == "canary"}) for device, one in state.members.items()], 10 * HOUR
    )
    assert (exposed(state), decision, state.phase) == (before, "hold", "paused")
    state, decision, _ = decide(command(state, "resume"), [], 10 * HOUR)
    assert decision == "abort"


def test_orders_that_make_no_sense_and_the_way_back():
    draft = new_rollout(plan(), SECRET)
    for what in ("pause", "resume", "promote", "abort", "roll back"):
        with pytest.raises(Refused, match=r"draft|release above"):
            command(draft, what, fallback=8)
    with pytest.raises(Refused, match="no order"):
        command(draft, "explode")
    state = check_in(running(), devices(1000), 0.0)
    with pytest.raises(Refused, match="above 7"):
        command(state, "roll back", fallback=6)
    state = command(state, "roll back", fallback=8)
    assert {assign(state, device, "other", 0.0)[1] for device in devices(1000)} == {8}
    full = running(stages=(0.5,), control=0.5)
    full = command(full, "promote")
    assert full.phase == "full"
    assert command(full, "abort").phase == "aborted"


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": ()}, {"stages": (0.2, 0.1)}, {"stages": (0.9,)}, {"fleet": 3}, {"version": 6}, {"corrupt": 0.5}, {"window": 0},
        {"window": math.inf}, {"signals": (Signal("a", 0.1, "amount", ceiling=0.25, budget=math.inf),)},
        {"signals": (Signal("a", 0.0),)}, {"signals": (Signal("a", 0.1), Signal("a", 0.1))}, {"control": 0.0},
    ],
)  # fmt: skip
def test_plans_that_cannot_be(changes):
    with pytest.raises(Refused):
        plan(**changes)
    with pytest.raises(Refused, match="32 bytes"):
        new_rollout(plan(), b"short")


def test_the_secret_is_not_shown_and_places_are_even():
    assert "secret" not in repr(new_rollout(plan(), SECRET))
    assert SECRET.hex() not in repr(new_rollout(plan(), SECRET))
    places = np.array([place_of(SECRET, device) for device in devices(4000)])
    assert abs(np.histogram(places, 10, (0, 1))[0] - 400).max() < 100
    assert np.corrcoef(places, [place_of(bytes(32), device) for device in devices(4000)])[0, 1] < 0.06


def test_two_releases_side_by_side():
    rng = np.random.default_rng(9)
    signals = SIGNALS[:4]
    a = {"disagreement": rng.normal(0.03, 0.01, 400), "crash": np.zeros(400), "p95_ms": 10 * np.exp(0.3 * rng.standard_normal(400))}
    b = {"disagreement": rng.normal(0.06, 0.01, 300), "crash": np.zeros(300), "p95_ms": 5 * np.exp(0.3 * rng.standard_normal(300))}
    rows = {row.signal: row for row in compare_releases(a, b, signals)}
    assert {name: row.verdict for name, row in rows.items()} == {
        "disagreement": "A better", "errors": "no difference shown", "crash": "no difference shown", "p95_ms": "B better",
    }  # fmt: skip
    assert rows["disagreement"].difference[0] <= 0.03 <= rows["disagreement"].difference[1]
    assert rows["p95_ms"].difference[0] <= 0.5 <= rows["p95_ms"].difference[1] < 1
    assert rows["errors"].a is None
    assert rows["errors"].difference == (-0.2, 0.2)
    for row in (rows["disagreement"], rows["p95_ms"]):
        assert row.a[1] <= row.a[0] <= row.a[2]
    same = compare_releases(a, a, signals)
    assert {row.verdict for row in same} == {"no difference shown"}
    assert dataclasses.is_dataclass(same[0])


@pytest.mark.slow
def test_harmless_rollouts_by_the_whole_decision():
    """All signals, three hardware models, silence and 24 looks, by `decide` itself."""
    aborted, rollouts = 0, 150
    for seed in range(rollouts):
        rng = np.random.default_rng(1000 + seed)
        state = running(fleet=2000, stages=(0.1, 0.4), hardware=("a", "b"), corrupt=0.0)
        everybody = devices(2000)
        rng.shuffle(everybody)
        for look in range(24):
            clock = look * HOUR
            for number, device in enumerate(everybody[look * 160 : (look + 1) * 160]):
                state, _ = assign(state, device, ("a", "b", "c")[number % 3], clock)
            state, decision, _ = decide(state, reports_of(state, honest, honest, rng, clock), clock)
            if decision == "abort":
                aborted += 1
                break
    assert aborted <= 0.05 * rollouts
