"""The evidence: equal to its definition, never more than the honest votes give, and wrong no more often than promised."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.registry import confidence
from fedcore.registry.confidence import (
    LEVELS,
    allowed_liars,
    ceiling_evidence,
    excess_evidence,
    histogram,
    mean_interval,
    median_interval,
    ratio_evidence,
)

votes = st.lists(st.integers(0, LEVELS).map(lambda level: level / LEVELS), max_size=12)
amounts = st.lists(st.integers(1, 30).map(float), max_size=9)


def capital(values, mean):
    """The definition: a gambler's capital, one vote after another, for each bet; and the average of the gamblers."""
    return np.mean([math.prod(1 + bet * (value / mean - 1) for value in values) for bet in confidence._BETS])


@settings(deadline=None)
@given(votes, st.integers(1, 199))
def test_the_capital_of_a_histogram_is_the_gamblers(values, level):
    mean = level / LEVELS
    assert math.isclose(ceiling_evidence(histogram(values), 0, mean), math.log(capital(values, mean)), abs_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(votes, votes, st.sampled_from([-0.1, 0.0, 0.05]))
def test_two_groups_are_never_given_more_than_at_the_worst_means(a, b, tolerance):
    """Against a fine search over the means that the hypothesis allows."""
    worst = min(
        math.log(capital(a, low + tolerance)) + math.log(capital([1 - one for one in b], 1 - low))
        for low in np.linspace(0.0007, 0.9993, 150)
        if low + tolerance > 0
    )
    assert excess_evidence(histogram(a), histogram(b), 0, 0, tolerance) <= worst + 1e-9


@settings(max_examples=60, deadline=None)
@given(votes, st.integers(0, 4), st.integers(1, 199))
def test_with_liars_the_evidence_is_at_most_that_of_any_honest_rest(values, liars, level):
    doubted = ceiling_evidence(histogram(values), liars, level / LEVELS)
    for count in range(min(liars, len(values)) + 1):
        for rest in itertools.islice(itertools.combinations(values, len(values) - count), 200):
            assert doubted <= ceiling_evidence(histogram(rest), 0, level / LEVELS) + 1e-9


@settings(max_examples=60, deadline=None)
@given(amounts, amounts, st.sampled_from([0.8, 1.0, 1.5]), st.randoms())
def test_the_ratio_is_judged_at_the_worst_point_and_in_any_order(a, b, ratio, random):
    def coin(hits, count):
        return math.log(np.mean([(1 + bet) ** hits * (1 - bet) ** (count - hits) for bet in confidence._BETS]))

    points = [0.0, 1e9, *(point + shift for point in [*b, *(one / ratio for one in a)] for shift in (-1e-6, 0, 1e-6))]
    worst = min(coin(sum(one / ratio > x for one in a), len(a)) + coin(sum(one < x for one in b), len(b)) for x in points)
    found = ratio_evidence(a, b, 0, 0, ratio)
    assert math.isclose(found, worst, abs_tol=1e-9)
    random.shuffle(a)
    random.shuffle(b)
    assert ratio_evidence(a, b, 0, 0, ratio) == found
    assert ratio_evidence(a, b, 2, 1, ratio) <= found


def test_votes_are_clipped():
    assert histogram([-5, 0, 1, 7]).tolist() == [2, *[0] * (LEVELS - 1), 2]


@pytest.mark.parametrize("mean", [0.03, 0.4])
def test_looking_all_the_time_is_wrong_no_more_often_than_alpha(mean):
    """400 pairs of equal groups, looked at 20 times; a plain 95 % test at each look would be wrong many times more often."""
    rng, pairs, step, alpha = np.random.default_rng(1), 400, 15, 0.05
    wrong, peeking = np.zeros(pairs, bool), np.zeros(pairs, bool)
    a, b = (np.zeros((pairs, LEVELS + 1), np.int64) for _ in range(2))
    for look in range(1, 21):
        for counts in (a, b):
            hits = rng.binomial(step, mean, pairs)
            counts[:, -1] += hits
            counts[:, 0] += step - hits
        wrong |= excess_evidence(a, b, 0, 0, 0.0) >= math.log(1 / alpha)
        p, q = a[:, -1] / (look * step), b[:, -1] / (look * step)
        spread = np.sqrt((p * (1 - p) + q * (1 - q)) / (look * step)) + 1e-12
        peeking |= (p - q) / spread > 1.645
    assert wrong.mean() <= alpha
    assert peeking.mean() > 3 * alpha


def test_the_number_of_liars_is_rarely_exceeded_at_any_time():
    rng, share, alpha = np.random.default_rng(2), 0.05, 0.05
    allowed = np.array([allowed_liars(count, share, alpha) for count in range(1, 201)])
    drawn = (rng.random((2000, 200)) < share).cumsum(axis=1)
    assert (drawn > allowed).any(axis=1).mean() <= alpha
    assert allowed_liars(1000, 0.0, alpha) == 0
    assert 50 < allowed_liars(1000, 0.05, 0.001) < 100


def test_intervals_hold_the_truth_at_all_looks():
    rng, missed, runs = np.random.default_rng(3), 0, 60
    for _ in range(runs):
        values = np.exp(rng.standard_normal(160))
        rates = np.rint(LEVELS * rng.beta(2, 18, 160)) / LEVELS
        bad = False
        for count in (20, 40, 80, 160):
            low, high = median_interval(values[:count], 0.05)
            below, above = mean_interval(histogram(rates[:count]), 0.05)
            bad |= not low <= 1 <= high or not below <= 0.1 <= above
        missed += bad
    assert missed <= 0.1 * runs
    low, high = median_interval(values, 0.05)
    assert high / low < 2
    assert median_interval([1.0], 0.05) == (0.0, math.inf)
    assert mean_interval(histogram([]), 0.05) == (0.0, 1.0)
