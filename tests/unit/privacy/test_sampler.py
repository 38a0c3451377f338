import bisect
import math
import random as python_random
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from fedcore.errors import Refused
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.privacy.sampler import (
    BLOCK,
    LARGEST_TABLE,
    TOTAL_VARIATION_PER_SAMPLE,
    sample_skellam,
    skellam_table,
    table_size,
)

VARIANCES = [1e-9, 0.01, 0.7, 1.0, 7.3, 50.0, 333.3]
ONE = 1 << 127


def poisson_weights(mean: Fraction, precision: int = 320):
    """Poisson probabilities in units of a common constant, as integers: (first value, weights), tails beyond 2^-190 cut off."""
    mode = int(mean)
    smallest = 1 << (precision - 190)
    up, weight, j = [], 1 << precision, mode
    while weight >= smallest:
        up.append(weight)
        j += 1
        weight = weight * mean.numerator // (mean.denominator * j)
    down, weight, j = [], 1 << precision, mode
    while j > 0 and weight >= smallest:
        weight = weight * mean.denominator * j // mean.numerator
        j -= 1
        down.append(weight)
    return mode - len(down), down[::-1] + up


def exact_magnitudes(variance: float):
    """P(|X - Y| = k) for k = 0, 1, ... in units of 1 / total, for Poisson variables X and Y of mean variance / 2.

    Independent of the recurrence of the sampler: the probabilities of the difference are the convolution of one Poisson
    distribution with the mirrored other, done exactly as one product of two long integers with a slot for each probability.
    """
    _, weights = poisson_weights(Fraction(variance) / 2)
    slot = 88  # bytes: two weights of 320 bits, and their sums
    forward = int.from_bytes(b"".join(w.to_bytes(slot, "little") for w in weights), "little")
    mirrored = int.from_bytes(b"".join(w.to_bytes(slot, "little") for w in weights[::-1]), "little")
    product = (forward * mirrored).to_bytes(slot * 2 * len(weights), "little")
    signed = [int.from_bytes(product[i : i + slot], "little") for i in range(0, len(product), slot)]
    centre = len(weights) - 1
    return [signed[centre]] + [2 * signed[centre + k] for k in range(1, centre + 1)], sum(signed)


def table_integers(variance):
    table = skellam_table(variance)
    return [(int(u) << 64) | int(low) for u, low in zip(table.upper, table.lower, strict=True)]


def check_against_exact(variance):
    thresholds = table_integers(variance)
    exact, total = exact_magnitudes(variance)
    ours = np.diff(np.array([0, *thresholds, ONE], object)).tolist()  # probabilities in units of 2^-127
    size = max(len(ours), len(exact))
    ours += [0] * (size - len(ours))
    exact += [0] * (size - len(exact))
    distance = sum(abs(Fraction(o, ONE) - Fraction(e, total)) for o, e in zip(ours, exact, strict=True)) / 2
    assert distance <= Fraction(len(thresholds) + 1, 2**128) + Fraction(1, 2**140)
    assert distance <= TOTAL_VARIATION_PER_SAMPLE
    below = 0
    for threshold, weight in zip(thresholds, exact, strict=False):
        below += weight
        assert -Fraction(1, 2**20) < threshold - Fraction(below, total) * ONE < 1 + Fraction(1, 2**20)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_is_within_its_constant_of_the_exact_distribution(variance):
    check_against_exact(variance)


@pytest.mark.slow
@pytest.mark.parametrize("variance", [27_271.424517208525, 525_259.1031117749])
def test_large_tables_are_within_the_constant_too(variance):
    check_against_exact(variance)


def test_the_constant_covers_the_largest_table():
    """Half the sum over N magnitudes, each off by at most 2^-127; see the module for what else there is."""
    assert 1.9 * LARGEST_TABLE / 2**128 <= TOTAL_VARIATION_PER_SAMPLE


@pytest.mark.parametrize("variance", [*VARIANCES, 5e5])
def test_thresholds_ascend_and_their_number_is_foreseen(variance):
    thresholds = table_integers(variance)
    assert thresholds == sorted(thresholds)
    assert thresholds[0] >= 0
    assert thresholds[-1] < ONE
    assert len(thresholds) <= table_size(variance) <= LARGEST_TABLE


def slow_twin(variance, size, random):
    """Bisection over whole thresholds, a draw at a time; reads the low words of ties as the fast one does."""
    thresholds = table_integers(variance)
    uppers = [t >> 64 for t in thresholds]
    values = []
    for first in range(0, size, BLOCK):
        data = random(8 * min(BLOCK, size - first))
        words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
        tied = [i for i, word in enumerate(words) if (u := word % 2**63) in uppers[bisect.bisect_left(uppers, u) :][:1]]
        low = random(8 * len(tied)) if tied else b""
        lows = {i: int.from_bytes(low[8 * j : 8 * j + 8], "little") for j, i in enumerate(tied)}
        for i, word in enumerate(words):
            magnitude = bisect.bisect_right(thresholds, (word % 2**63 << 64) | lows.get(i, 0))
            values.append(-magnitude if word >> 63 else magnitude)
    return values


@pytest.mark.parametrize("variance", [*VARIANCES, 27_271.4])
def test_random_words_give_what_bisection_gives(variance):
    size = 3000
    assert sample_skellam(variance, size, keystream(bytes(32))).tolist() == slow_twin(variance, size, keystream(bytes(32)))


def script(*chunks):
    """A source that must be asked for exactly these chunks."""
    remaining = list(chunks)

    def read(size):
        chunk = remaining.pop(0)
        assert len(chunk) == size
        return chunk

    read.remaining = remaining
    return read


def words(values):
    return b"".join(value.to_bytes(8, "little") for value in values)


@pytest.mark.parametrize("variance", [0.01, 7.3, 50.0, 27_271.4])
def test_a_tie_in_the_high_word_is_resolved_by_the_low_word(variance):
    rng = python_random.Random(0)
    thresholds = table_integers(variance)
    # The last ones share their high word: probabilities below 2^-63 lie between them.
    chosen = {0, *range(max(0, len(thresholds) - 4), len(thresholds)), *rng.choices(range(len(thresholds)), k=30)}
    points = [t + step for t in (thresholds[k] for k in sorted(chosen)) for step in (-1, 0, 1) if 0 <= t + step < ONE]
    signs = [rng.getrandbits(1) for _ in points]
    uppers = {t >> 64 for t in thresholds}
    high = [(sign << 63) | (point >> 64) for sign, point in zip(signs, points, strict=True)]
    low = [point % 2**64 for point in points if point >> 64 in uppers]
    values = sample_skellam(variance, len(points), script(words(high), words(low)))
    expected = [bisect.bisect_right(thresholds, point) * (-1) ** sign for sign, point in zip(signs, points, strict=True)]
    assert values.tolist() == expected
    assert values.tolist() == slow_twin(variance, len(points), script(words(high), words(low)))


def test_tails_that_share_a_high_word_exist():
    uppers = skellam_table(50.0).upper
    assert (uppers == uppers[-1]).sum() > 10


def test_blocks_read_one_stream_in_order():
    size = 2 * BLOCK + 17
    read = script(*(keystream(bytes([i] * 32))(8 * n) for i, n in enumerate((BLOCK, BLOCK, 17))))
    values = sample_skellam(50.0, size, read)
    parts = [sample_skellam(50.0, n, keystream(bytes([i] * 32))) for i, n in enumerate((BLOCK, BLOCK, 17))]
    assert (values == np.concatenate(parts)).all()
    assert not read.remaining


def binned(values, edges):
    return np.histogram(values, bins=[-np.inf, *edges, np.inf])[0]


@pytest.mark.parametrize("variance", [0.7, 7.3, 333.3])
def test_chi_square_against_the_exact_difference_of_two_poisson_variables(variance):
    size = 400_000
    values = sample_skellam(variance, size, keystream(derive_key("chi-square", str(variance))))
    exact, total = exact_magnitudes(variance)
    probabilities = {0: exact[0] / total} | {s * k: exact[k] / total / 2 for k in range(1, len(exact)) for s in (-1, 1)}
    inner = [k for k, p in sorted(probabilities.items()) if p * size > 20]
    expected = np.array([p for k in inner if (p := probabilities[k])]) * size
    counts = np.array([(values == k).sum() for k in inner])
    rest = size - counts.sum(), size - expected.sum()
    statistic = scipy.stats.chisquare([*counts, rest[0]], [*expected, rest[1]])
    assert statistic.pvalue > 1e-3


@pytest.mark.parametrize("variance", [50.0, 525_259.1])
def test_chi_square_against_drawn_poisson_variables(variance):
    size, rng = 400_000, np.random.default_rng(5)
    ours = sample_skellam(variance, size, keystream(derive_key("two samples", str(variance))))
    theirs = rng.poisson(variance / 2, size) - rng.poisson(variance / 2, size)
    edges = np.unique(np.round(scipy.stats.norm.ppf(np.linspace(0, 1, 41)[1:-1]) * math.sqrt(variance))) + 0.5
    assert scipy.stats.chi2_contingency([binned(ours, edges), binned(theirs, edges)]).pvalue > 1e-3


def test_a_wrong_variance_would_fail_the_chi_square_test():
    size, rng = 400_000, np.random.default_rng(5)
    ours = sample_skellam(50.0 * 1.05, size, keystream(bytes(32)))
    theirs = rng.poisson(25, size) - rng.poisson(25, size)
    edges = np.arange(-20, 20) + 0.5
    assert scipy.stats.chi2_contingency([binned(ours, edges), binned(theirs, edges)]).pvalue < 1e-6


def test_variance_and_kurtosis_of_large_noise():
    variance, size = 1.3e8, 200_000
    values = sample_skellam(variance, size, keystream(bytes(32))) / math.sqrt(variance)
    assert values.mean() == pytest.approx(0, abs=4 / math.sqrt(size))
    assert values.var() == pytest.approx(1, abs=4 * math.sqrt(2 / size))
    assert np.mean(values**4) == pytest.approx(3, abs=4 * math.sqrt(96 / size))


def test_no_variance_is_no_noise_and_reads_nothing():
    assert not sample_skellam(0.0, 5, script()).any()


def test_noise_too_rare_to_matter_is_zero():
    assert not sample_skellam(1e-300, 1000, keystream(bytes(32))).any()


@pytest.mark.parametrize("variance", [-1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_variance_is_refused(variance):
    with pytest.raises(Refused, match="positive number"):
        sample_skellam(variance, 5, keystream(bytes(32)))


@pytest.mark.parametrize("variance", [1e12, 1e30, 1e300])
def test_a_table_beyond_the_limit_is_refused_before_it_is_built(variance):
    with pytest.raises(Refused, match=f"more than {LARGEST_TABLE} entries"):
        skellam_table(variance)


def test_the_stated_limit_is_the_limit():
    assert table_size(280_000.0**2) <= LARGEST_TABLE
    with pytest.raises(Refused):
        table_size(283_000.0**2)


def test_tables_are_kept_and_cannot_be_changed():
    table = skellam_table(7.3)
    assert skellam_table(7.3) is table
    with pytest.raises(ValueError, match="read-only"):
        table.upper[0] = 0
