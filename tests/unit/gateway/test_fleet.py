import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.fleet import Progress, Selection, Told, choose, judge_round, lacking, why_ineligible
from fedcore.gateway.pace import DAY, Hours, Pace, first_wait, simulate_load, wait
from fedcore.gateway.rounds import Place, RoundDocument
from fedcore.gateway.sums import UploadTerms
from fedcore.privacy.randomness import keystream

ROUND = Selection(goal=10, minimum=5, deadline=60.0, window=30.0)
TOLD = Told(tier="watch", capabilities=("a", "b"), labels=("lab",), model_version=3)


# Who may take part


@pytest.mark.parametrize(
    ("changes", "told", "taken", "said"),
    [
        ({}, TOLD, None, ""),
        ({"tiers": ("phone", "watch")}, TOLD, None, ""),
        ({"tiers": ("phone",)}, TOLD, None, "the round is for devices of tier phone"),
        ({"labels": ("lab",)}, TOLD, None, ""),
        ({"labels": ("lab", "ward")}, TOLD, None, "the round is for devices labelled ward"),
        ({"capabilities": ("b",)}, TOLD, None, ""),
        ({"capabilities": ("b", "c")}, TOLD, None, "the device lacks c"),
        ({"least_model": 3}, TOLD, None, ""),
        ({"least_model": 4}, TOLD, None, "the round needs model version 4, the device holds 3"),
        ({"population": "x"}, TOLD, None, ""),
        ({"population": "x"}, dataclasses.replace(TOLD, population="y"), None, "the round is for 'x'"),
        ({"most_participations": 3}, TOLD, (2, 1), ""),
        ({"most_participations": 3}, TOLD, (3, 1), "the device has taken part as often as it may"),
        ({"separation": 4}, TOLD, (1, 6), ""),
        ({"separation": 5}, TOLD, (1, 6), "the device took part in round 6; 5 rounds lie between two"),
        ({"separation": 5}, TOLD, None, ""),
    ],
)
def test_eligibility(changes, told, taken, said):
    assert why_ineligible(told, taken, dataclasses.replace(ROUND, **changes), 10) == said


def test_a_device_is_told_what_it_lacks():
    assert lacking(TOLD, dataclasses.replace(ROUND, capabilities=("b", "c", "d"))) == ["c", "d"]


def test_what_a_device_says_is_bounded_and_survives_the_store():
    body = pb.CheckInBody(tier="watch", capabilities=["a", "b"], labels=["lab"], model_version=3)
    assert Told.of(body) == TOLD == Told.decode(TOLD.encode())
    for strange in (pb.CheckInBody(tier="x" * 65), pb.CheckInBody(labels=["x"] * 33)):
        with pytest.raises(Refused, match="at most 32 texts of 64 characters"):
            Told.of(strange)


@pytest.mark.parametrize("wrong", [{"minimum": 0}, {"minimum": 11}, {"over_selection": 0.9}, {"deadline": 0.0}, {"window": -1.0}])
def test_numbers_of_a_round_that_make_no_sense_are_refused(wrong):
    with pytest.raises(Refused, match="1 <= minimum <= goal"):
        dataclasses.replace(ROUND, **wrong)


@pytest.mark.parametrize(("goal", "factor", "asked"), [(10, 1.3, 13), (100, 1.3, 130), (3, 1.3, 4), (10, 1.0, 10), (7, 1.1, 8)])
def test_over_selection(goal, factor, asked):
    assert dataclasses.replace(ROUND, goal=goal, minimum=1, over_selection=factor).asked == asked


# Who is drawn


@given(st.sets(st.integers(0, 2**63 - 1), max_size=40), st.binary(min_size=32, max_size=32))
def test_a_draw_is_of_those_present_without_replacement(present, seed):
    chosen = choose(sorted(present), ROUND, keystream(seed))
    assert len(chosen) == min(13, len(present))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= present


def test_everybody_is_as_likely_to_be_drawn():
    random, counts = keystream(b"k" * 32), np.zeros(26)
    for _ in range(2000):
        counts[choose(range(26), ROUND, random)] += 1
    assert abs(counts - 1000).max() < 5 * np.sqrt(500)


# When a round ends


@pytest.mark.parametrize(
    ("asked", "uploads", "gone", "elapsed", "progress"),
    [
        (13, 0, 0, 0.0, Progress.GOING),
        (13, 9, 3, 59.9, Progress.GOING),
        (13, 10, 0, 1.0, Progress.DONE),
        (13, 5, 0, 60.0, Progress.DONE),
        (13, 4, 0, 60.0, Progress.FAILED),
        (13, 6, 7, 2.0, Progress.DONE),
        (13, 4, 9, 2.0, Progress.FAILED),
        (7, 7, 0, 2.0, Progress.DONE),
        (4, 4, 0, 2.0, Progress.FAILED),
    ],
)
def test_a_round_ends_at_its_goal_at_its_deadline_or_when_nobody_is_left(asked, uploads, gone, elapsed, progress):
    assert judge_round(ROUND, asked, uploads, gone, elapsed) is progress


def test_a_rounds_document_survives_the_store():
    plan = pb.SignedPlan(plan=pb.Plan(blobs=[pb.Blob(name="model", digest=b"d" * 32)]).SerializeToString())
    one = RoundDocument(
        dataclasses.replace(ROUND, tiers=("a",)), 12.5, ("task", 3, 99), (plan.SerializeToString(),),
        {2**62: Place(0, b"\1\2"), 5: Place(0)}, UploadTerms("float32", 10, 100, 1.5, 7, kept=True), "why",
    )  # fmt: skip
    assert RoundDocument.decode(one.encode()) == one
    assert one.blobs(5) == {b"d" * 32}
    assert one.blobs(6) == set()
    for wrong in ("", "[]", "{}", one.encode().replace("selection", "s")):
        with pytest.raises(Refused, match="a round's document cannot be read"):
            RoundDocument.decode(wrong)


# Pace

NIGHT = Hours(((0.0, DAY / 4), (11 * DAY / 12, DAY)))


def test_a_wait_is_half_to_one_and_a_half_periods():
    assert Pace(200.0, 5.0).period(1_000_000) == 5000
    assert Pace(200.0, 5.0).period(8) == 5
    assert wait(100.0, [0.0, 0.5, 1.0]).tolist() == [50, 100, 150]


def test_a_first_wait_is_what_is_left_of_a_wait_met_at_random():
    """Against the slow way: waits one after the other, and what is left of the one at a random moment."""
    rng = np.random.default_rng(3)
    ends = np.cumsum(wait(1.0, rng.random(200_000)))
    moments = rng.random(100_000) * ends[-2]
    left = ends[np.searchsorted(ends, moments)] - moments
    drawn = first_wait(1.0, rng.random(100_000), rng.random(100_000))
    points = np.linspace(0, 1.5, 31)
    cdfs = [np.searchsorted(np.sort(one), points) / len(one) for one in (left, drawn)]
    assert abs(cdfs[0] - cdfs[1]).max() < 0.01


@given(st.floats(0, 3e6), st.floats(0, 5e5))
def test_eligible_time_is_counted_within_the_hours_alone(now, delay):
    after = float(NIGHT.after(now, delay))
    assert NIGHT.eligible(after) - NIGHT.eligible(now) == pytest.approx(delay, abs=1e-3)
    within = after % DAY
    assert within <= DAY / 4 + 1e-3 or within >= 11 * DAY / 12 - 1e-3


def slow_after(spans, now, delay):
    """Second by second."""
    while delay > 0:
        now += 1
        delay -= any(begin < now % DAY <= end or (now % DAY == 0 and end == DAY) for begin, end in spans)
    return now


@pytest.mark.parametrize(("now", "delay"), [(0, 10), (21_000, 700), (30_000, 1), (86_000, 700), (79_300, 9_000)])
def test_eligible_time_equals_counting_seconds(now, delay):
    spans = ((0.0, DAY / 4), (11 * DAY / 12, DAY))
    assert float(NIGHT.after(now, delay)) == pytest.approx(slow_after(spans, now, delay), abs=1.5)


@pytest.mark.parametrize("spans", [(), ((5.0, 4.0),), ((0.0, 10.0), (9.0, 20.0)), ((-1.0, 5.0),), ((0.0, DAY + 1),)])
def test_hours_that_are_none_are_refused(spans):
    with pytest.raises(Refused, match="hours are spans of a day in order"):
        Hours(spans)


def test_the_simulation_equals_one_device_after_the_other():
    fleet, pace = 50, Pace(0.1, 1.0)
    attempts, answered = simulate_load(fleet, pace, NIGHT, 1.0, np.random.default_rng(5), outage=(3600.0, 7200.0))
    rng = np.random.default_rng(5)
    period = pace.period(fleet)
    due = list(first_wait(period, rng.random(fleet), rng.random(fleet)))
    minutes, bad = np.zeros_like(attempts), 0
    while any(time < NIGHT.length for time in due):
        due = [time for time in due if time < NIGHT.length]
        for time in due:
            minutes[int(time // 60)] += 1
            bad += 3600 <= time < 7200
        due = [time + float(delay) for time, delay in zip(due, wait(period, rng.random(len(due))), strict=True)]
    assert attempts.tolist() == minutes.tolist()
    assert attempts.sum() - answered.sum() == bad > 0


@pytest.mark.parametrize("outage", [None, (3 * 3600.0, 4 * 3600.0)])
@pytest.mark.parametrize("hours", [NIGHT, Hours()], ids=["night", "always"])
def test_the_load_stays_flat_also_after_an_outage(hours, outage):
    """The peak minute is at most 1.5 times the mean; of 100,000 devices 20 a second, so that chance adds one part in ten."""
    attempts, answered = simulate_load(100_000, Pace(20.0), hours, 1.2, np.random.default_rng(0), outage=outage)
    assert attempts.max() <= 1.15 * attempts.mean()
    assert answered.max() <= 1.15 * attempts.mean()
    if outage:
        assert answered[181:240].sum() == 0


def test_a_fleet_that_is_switched_on_at_once_is_a_crowd_only_once():
    attempts, _ = simulate_load(100_000, Pace(20.0), NIGHT, 1.2, np.random.default_rng(0), together=True)
    assert attempts[0] >= 100_000
    assert attempts[1:].max() <= 1.15 * attempts[1:].mean()


def test_immediate_retries_would_not_pass():
    """The measure itself sees a crowd: a law by which devices come back at a fixed time."""
    pace, counts = Pace(20.0), np.zeros(600)
    for due in np.arange(0.0, 36_000, pace.period(100_000)):
        counts[int(due // 60)] += 1000
    assert counts.max() > 1.5 * counts.mean()
