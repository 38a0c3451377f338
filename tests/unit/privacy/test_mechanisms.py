import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.privacy import mechanisms
from fedcore.privacy.mechanisms import JointVector, adapt, bit_scale, clip, clip_factor, gaussian_noise, weight
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.privacy.skellam import decode, encode, plan_skellam

vectors = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e12, 1e12))
norms = st.floats(1e-3, 1e3)


@given(vectors, norms)
def test_clipping_never_exceeds_the_norm_and_never_enlarges(vector, norm):
    clipped = clip(vector, norm)
    assert np.linalg.norm(clipped) <= norm * (1 + 1e-12)
    assert (np.abs(clipped) <= np.abs(vector)).all()
    if np.linalg.norm(vector) < norm * (1 - 1e-12):
        assert (clipped == vector).all()
    elif np.linalg.norm(vector) > norm:
        assert np.linalg.norm(clipped) == pytest.approx(norm)
        np.testing.assert_allclose(clipped, vector * norm / np.linalg.norm(vector), rtol=1e-9)


def test_zeros_stay_zeros():
    assert clip_factor(np.zeros(3), 1.0) == 1.0
    assert not clip(np.zeros(3), 1.0).any()
    assert clip(np.zeros(0), 1.0).shape == (0,)


def test_clipping_gives_a_new_array_and_takes_float32():
    vector = np.array([0.3, 0.4], np.float32)
    clipped = clip(vector, 1.0)
    clipped[0] = 9
    assert vector[0] == np.float32(0.3)
    assert clip(vector, 0.25).dtype == np.float64


def test_values_whose_squares_overflow_are_clipped_like_others():
    np.testing.assert_allclose(clip(np.array([3e300, -4e300]), 2.0), [1.2, -1.6])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_fail_the_client(value):
    with pytest.raises(ClientFailure, match="not finite"):
        clip(np.array([1.0, value]), 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_clipping_norm_is_refused(norm):
    with pytest.raises(Refused, match="clipping norm"):
        clip(np.ones(2), norm)


@pytest.mark.parametrize(
    ("examples", "cap", "expected"), [(0, 0, 1.0), (7, 0, 1.0), (0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (99, 10, 1.0)]
)
def test_weights(examples, cap, expected):
    assert weight(examples, cap) == expected


@pytest.mark.parametrize(("examples", "cap"), [(-1, 10), (1, -10)])
def test_negative_counts_are_refused(examples, cap):
    with pytest.raises(Refused, match="must not be negative"):
        weight(examples, cap)


LAYOUTS = [
    JointVector(4, 2.0),
    JointVector(4, 2.0, bit_scale=0.5),
    JointVector(4, 2.0, loss_scale=0.25, loss_cap=3.0),
    JointVector(4, 2.0, bit_scale=0.5, loss_scale=0.25, loss_cap=3.0),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(hnp.arrays(np.float64, 4, elements=st.floats(-1e6, 1e6)), st.floats(-1e6, 1e6))
def test_no_contribution_exceeds_the_norm_bound(layout, update, loss):
    contribution = layout.encode(update, loss)
    assert contribution.shape == (layout.size,)
    assert np.linalg.norm(contribution) <= layout.norm_bound * (1 + 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_bound_is_reached(layout):
    assert np.linalg.norm(layout.encode(np.full(4, 9.0), 99.0)) == pytest.approx(layout.norm_bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_without_noise_gives_the_means(layout):
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal(4) * length for length in (0.1, 0.5, 3, 8, 0.2)]
    losses = [0.5, 1.0, 2.9, 7.0, -1.0]
    total = sum(layout.encode(update, loss) for update, loss in zip(updates, losses, strict=True))
    means = layout.decode(total, 5)
    np.testing.assert_allclose(means.update, np.mean([clip(update, 2.0) for update in updates], axis=0))
    below = np.mean([np.linalg.norm(update) <= 2.0 for update in updates])
    assert means.unclipped == (pytest.approx(below) if layout.bit_scale else None)
    assert means.loss == (pytest.approx(np.mean(np.clip(losses, 0, 3.0))) if layout.loss_scale else None)


def test_an_update_on_the_border_counts_as_unclipped():
    layout = JointVector(2, 5.0, bit_scale=1.0)
    assert layout.encode(np.array([3.0, 4.0]), 0.0)[-1] == 0.5
    assert layout.encode(np.array([3.0, 4.000001]), 0.0)[-1] == -0.5


def test_with_weights_bit_and_loss_are_means_over_the_clients():
    layout = LAYOUTS[-1]
    updates, examples = [np.full(4, 0.2), np.full(4, 0.6)], [5, 20]
    total = sum(layout.encode(update * weight(count, 10), 1.5) for update, count in zip(updates, examples, strict=True))
    means = layout.decode(total, 1.5, clients=2)
    np.testing.assert_allclose(means.update, (0.5 * updates[0] + updates[1]) / 1.5)
    assert means.unclipped == pytest.approx(1.0)
    assert means.loss == pytest.approx(1.5)


def test_a_client_of_zeros_says_nothing():
    layout = LAYOUTS[-1]
    means = layout.decode(np.zeros(layout.size), 3)
    assert not means.update.any()
    assert (means.unclipped, means.loss) == (0.5, 1.5)


@pytest.mark.parametrize(("denominator", "clients"), [(0, None), (-1, None), (math.nan, None), (1, 0)])
def test_a_mean_over_nobody_is_refused(denominator, clients):
    with pytest.raises(RoundFailed, match="does not exist"):
        LAYOUTS[-1].decode(np.zeros(6), denominator, clients)


def test_other_shapes_and_losses_that_are_not_finite_are_refused():
    layout = LAYOUTS[-1]
    with pytest.raises(Refused, match="has 4 values"):
        layout.encode(np.zeros(5), 0.0)
    with pytest.raises(Refused, match="has 6 values"):
        layout.decode(np.zeros(4), 1)
    with pytest.raises(ClientFailure, match="loss is not finite"):
        layout.encode(np.zeros(4), math.nan)
    assert LAYOUTS[0].encode(np.zeros(4), math.nan).tolist() == [0.0] * 4  # a loss that is withheld is not looked at


@pytest.mark.parametrize(
    "values",
    [
        {"dimension": 0}, {"clipping_norm": 0.0}, {"clipping_norm": math.nan}, {"bit_scale": -0.1}, {"bit_scale": math.inf},
        {"loss_scale": math.nan}, {"loss_cap": 0.0},
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused(values):
    with pytest.raises(Refused):
        JointVector(**({"dimension": 4, "clipping_norm": 1.0} | values))


@given(st.floats(0.05, 20), norms, st.floats(1.01, 1000), st.floats(0, 10))
def test_bit_and_update_together_cost_exactly_the_noise_multiplier(z, norm, excess, loss_scale):
    bit_noise = z / 2 * excess
    beta = bit_scale(z, norm, bit_noise, loss_scale)
    sigma = z * JointVector(3, norm, beta, loss_scale).norm_bound
    assert sigma / beta == pytest.approx(bit_noise, rel=1e-9)
    effective = sigma / math.hypot(norm, loss_scale)
    assert z**-2 == pytest.approx(effective**-2 + (2 * bit_noise) ** -2, rel=1e-9)


@pytest.mark.parametrize(("z", "bit_noise"), [(1.0, 0.5), (1.0, 0.1), (1.0, 0.0), (1.0, math.nan), (0.0, 1.0), (-1.0, 1.0)])
def test_bits_with_too_little_noise_are_refused(z, bit_noise):
    with pytest.raises(Refused, match="clipping bits"):
        bit_scale(z, 1.0, bit_noise)


def test_the_clipping_norm_moves_geometrically_towards_the_quantile():
    assert adapt(2.0, 0.5, 0.5, 0.2) == 2.0
    assert adapt(2.0, 1.0, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.1))
    assert adapt(adapt(2.0, 0.9, 0.5, 0.2), 0.1, 0.5, 0.2) == pytest.approx(2.0)


def test_adaptive_clipping_finds_the_median_through_the_noised_joint_vector():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(0.0, 0.5, 200)  # median 1
    norm, visited = 0.05, []
    for _ in range(80):
        layout = JointVector(3, norm, bit_scale(0.5, norm, bit_noise=4.0))
        total = sum(layout.encode(np.array([length, 0.0, 0.0]), 0.0) for length in lengths)
        total += gaussian_noise(layout.norm_bound, 0.5, layout.size, rng.bytes)
        norm = adapt(norm, layout.decode(total, len(lengths)).unclipped, 0.5, 0.3)
        visited.append(norm)
    assert np.mean(visited[-20:]) == pytest.approx(np.median(lengths), rel=0.1)


def test_gaussian_noise_is_normal_and_follows_its_key():
    noise = gaussian_noise(3.0, 0.5, 100_001, keystream(bytes(32)))
    assert noise.shape == (100_001,)
    assert scipy.stats.kstest(noise, scipy.stats.norm(0, 1.5).cdf).pvalue > 1e-3
    halves = noise[:50_000], noise[50_001:100_001]  # of Box and Muller's pairs, which share a radius
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02
    assert abs(np.corrcoef(*np.square(halves))[0, 1]) < 0.02
    assert (noise == gaussian_noise(3.0, 0.5, 100_001, keystream(bytes(32)))).all()
    other = gaussian_noise(3.0, 0.5, 100_001, keystream(bytes(31) + b"1"))
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
    assert gaussian_noise(1.0, 1.0, 1, keystream(bytes(32))).shape == (1,)


@pytest.mark.parametrize("bits", [0, 255])
def test_the_rarest_bits_of_gaussian_noise_are_finite(monkeypatch, bits):
    monkeypatch.setattr(mechanisms, "keystream", lambda key: lambda size: bytes([bits]) * size)
    pair = gaussian_noise(1.0, 1.0, 2, bytes)
    assert np.isfinite(pair).all()
    assert 9.3 < np.abs(pair).max() < 9.6 if bits == 0 else np.abs(pair).max() < 1e-6


def test_the_same_joint_vector_feeds_the_distributed_mechanism():
    cohort, dimension = 60, 5000
    layout = JointVector(dimension, 1.0, bit_scale(0.3, 1.0, bit_noise=2.0, loss_scale=0.3), 0.3, 4.0)
    plan = plan_skellam(layout.size, layout.norm_bound, 0.3, cohort, cohort, 0, b"seed")
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.5, 1.5, cohort)
    losses = rng.uniform(0, 4, cohort)
    direction = clip(rng.standard_normal(dimension), 1.0) / 1.0
    total = np.zeros(plan.padded, np.int64)
    for client in range(cohort):
        contribution = layout.encode(direction * lengths[client], losses[client])
        total += encode(plan, contribution, keystream(derive_key("joint", client)))
    means = layout.decode(decode(plan, total, cohort), cohort)
    sigma = 0.3 * layout.norm_bound
    assert means.unclipped == pytest.approx(np.mean(lengths <= 1), abs=4 * sigma / layout.bit_scale / cohort)
    assert means.loss == pytest.approx(losses.mean(), abs=4 * sigma / (2 * 0.3 / 4) / cohort)
    error = means.update - direction * np.minimum(lengths, 1).mean()
    assert np.std(error) * cohort == pytest.approx(sigma, rel=0.06)
