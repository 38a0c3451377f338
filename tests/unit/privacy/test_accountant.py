import dataclasses
import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ive, logsumexp
from scipy.stats import binom, poisson

from fedcore.errors import Refused
from fedcore.privacy import accountant
from fedcore.privacy.accountant import (
    DpSgd,
    GaussianRelease,
    SkellamRelease,
    counted_by_draws,
    epsilon,
    event_from_table,
    event_to_table,
    gaussian_approximation,
    prv_epsilon,
    rdp_epsilon,
    rounds_left,
    solve_noise,
    without_amplification,
)

PUBLISHED = {GaussianRelease(1.0, 1e-3): 1500}  # population 1M, cohort 1000, 1500 rounds


def skellam(noise: float = 1.0, mu: float = 1e12, **changes: float) -> SkellamRelease:
    l2 = math.sqrt(mu) / noise
    return SkellamRelease(**{"noise_multiplier": noise, "l2": l2, "l1": l2**2, "mu": mu, **changes})


def test_the_published_values_of_the_sampled_gaussian():
    assert epsilon(PUBLISHED, 1e-7) == pytest.approx(0.2666, rel=0.01)
    assert prv_epsilon(PUBLISHED, 1e-7) == pytest.approx(0.277, rel=0.01)
    assert rdp_epsilon(PUBLISHED, 1e-7) == pytest.approx(1.0677, rel=0.01)


@pytest.mark.parametrize(("times", "gaussian", "certified"), [(1, 5.349, 5.683), (2, 7.935, 8.404), (4, 11.908, 12.623)])
def test_the_published_values_without_amplification(times, gaussian, certified):
    assert epsilon({GaussianRelease(1.0): times}, 1e-7) == pytest.approx(gaussian, rel=1e-3)
    assert epsilon({skellam(): times}, 1e-7) == pytest.approx(certified, rel=1e-3)
    assert gaussian_approximation({skellam(): times}, 1e-7) == pytest.approx(gaussian, rel=1e-3)


def by_dp_accounting(events, delta: float) -> float:
    """The slow twin: dp-accounting's own accountant on its default grid, one event after another."""
    judge = pld.PLDAccountant()
    for event, count in events.items():
        rate = 1 / event.batches if isinstance(event, DpSgd) else event.sampling_rate or 1.0
        steps = event.batches * event.epochs if isinstance(event, DpSgd) else 1
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        judge.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count * steps)
    return judge.get_epsilon(delta)


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ({GaussianRelease(1.0): 3}, 1e-6),
        pytest.param({GaussianRelease(0.5, 1e-3): 300}, 1e-7, marks=pytest.mark.slow),
        pytest.param({GaussianRelease(0.7, 0.02): 10}, 1e-5, marks=pytest.mark.slow),
        ({GaussianRelease(2.0, 0.1): 200}, 1e-5),
        pytest.param({GaussianRelease(1.0, 0.5): 10}, 1e-6, marks=pytest.mark.slow),
        ({DpSgd(1.0, 10, 2): 5}, 1e-5),
        ({GaussianRelease(1.0, 0.05): 100, GaussianRelease(3.0): 2, GaussianRelease(1.2, 0.02): 50}, 1e-6),
        pytest.param({DpSgd(1.0, 20, 1): 5, DpSgd(2.0, 10, 1): 3}, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_the_grid_of_our_choice_gives_what_dp_accounting_gives_on_its_own(events, delta):
    assert epsilon(events, delta) == pytest.approx(by_dp_accounting(events, delta), rel=0.005)


@pytest.mark.parametrize(("noise", "rate", "count"), [(1.0, 1e-3, 1500), (5.0, 0.2, 1000), (0.6, 0.02, 1)])
def test_epsilon_is_never_below_an_optimistic_estimate(noise, rate, count):
    """dp-accounting can round the other way; the truth lies between."""
    optimistic = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, pessimistic_estimate=False, use_connect_dots=False, value_discretization_interval=2e-4
    ).self_compose(count)
    assert epsilon({GaussianRelease(noise, rate): count}, 1e-6) >= optimistic.get_epsilon_for_delta(1e-6)


@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-10])
def test_rounding_in_many_compositions_stays_below_what_is_set_aside_for_it(delta):
    """At a rate of almost 1 the exact curve is known, to compare the composed distribution with."""
    count, noise, rate = 20_000, math.sqrt(20_000), 0.999999
    composed = accountant._composed(noise, rate, accountant._interval(noise, rate), count)
    exact = epsilon({GaussianRelease(noise): count}, delta)
    set_aside = accountant._LOST_PER_STEP * count
    assert exact < composed.get_epsilon_for_delta(delta - set_aside) < 1.005 * exact
    assert epsilon({GaussianRelease(noise, rate): count}, delta) <= exact  # never more than without sampling


def test_small_epsilons_for_large_noise_are_above_zero_and_below_the_unsampled_ones():
    for noise in (10.0, 1000.0):
        assert 0 < epsilon({GaussianRelease(noise, 0.3): 100}, 1e-6) < epsilon({GaussianRelease(noise): 100}, 1e-6)


def with_batches(noise: float, batches: int, epochs: int, times: int) -> float:
    """Epsilon of a client that has exactly this many batches."""
    return epsilon({GaussianRelease(noise, 1 / batches): batches * epochs * times}, 1e-5)


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (1, 20), (5, 4)])
@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_the_charge_for_dp_sgd_bounds_every_client_with_at_least_as_many_batches(noise, epochs, times):
    """Clients differ in their batches per epoch, the public minimum is charged for all of them."""
    numbers = (1, 2, 3, 4, 6, 10, 50)
    charged = [epsilon({DpSgd(noise, number, epochs): times}, 1e-5) for number in numbers]
    exact = [with_batches(noise, number, epochs, times) for number in numbers]
    assert charged == sorted(charged, reverse=True)
    for position, cost in enumerate(charged):
        assert cost >= max(exact[position:])
        assert cost <= max(exact[position:]) * 1.03  # and by no more than the numbers that are not in our list


def test_the_fewest_batches_are_the_worst_only_from_a_peak_on():
    """With little noise and few steps, that some steps miss an example is worth less than that there are more steps."""
    costs = [with_batches(0.6, number, 1, 1) for number in (1, 2, 3, 4, 5, 10, 100)]
    assert costs[0] < costs[1] < costs[2] > costs[3] > costs[4] > costs[5] > costs[6]
    assert epsilon({DpSgd(0.6, 1, 1): 1}, 1e-5) == costs[2]
    usual = [with_batches(1.0, number, 1, 20) for number in (1, 2, 3, 5, 10, 100)]
    assert usual == sorted(usual, reverse=True)


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (1, 20), (5, 4)])
@pytest.mark.parametrize("noise", [0.02, 0.08, 0.149])
def test_with_hardly_any_noise_draws_bound_every_client_at_once(monkeypatch, noise, epochs, times):
    slow = max(with_batches(noise, number, epochs, times) for number in (1, 2, 4, 10, 40))
    plan = {DpSgd(noise, 1, epochs): times}
    monkeypatch.setattr(accountant, "_composed", None)  # no distribution is composed: that took up to a minute
    assert slow <= epsilon(plan, 1e-5) <= 4 * slow
    assert epsilon(plan, 1e-5) <= rdp_epsilon(plan, 1e-5)
    assert prv_epsilon(plan, 1e-5) is None
    assert counted_by_draws(plan, 1e-5)


def test_the_bound_by_draws_begins_where_epsilon_means_nothing_and_never_falls_with_less_noise():
    costs = [epsilon({DpSgd(noise, 3, 1): 2}, 1e-5) for noise in (0.12, 0.1499, 0.15, 0.2)]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] > 50
    assert not counted_by_draws({DpSgd(0.15, 3, 1): 2}, 1e-5)


@pytest.mark.parametrize("chance", [1e-12, 5e-6, 0.4])
@pytest.mark.parametrize("mean", [1, 7, 300])
def test_how_often_an_example_is_drawn(mean, chance):
    bound = accountant._most_draws(mean, chance)
    exact = [binom.isf(chance, mean * batches, 1 / batches) for batches in (1, 2, 10, 1000)]
    assert max(exact) <= bound
    assert bound <= poisson.isf(chance, mean) + 4 + 3 * math.sqrt(mean)


def test_a_peak_that_is_not_found_is_bounded_by_draws(monkeypatch):
    """Where the climb would leave the steps that can be accounted for before epsilon falls."""
    peak = epsilon({DpSgd(0.6, 1, 1): 1}, 1e-5)
    accountant.composed_epsilon.cache_clear()
    accountant._worst_steps.cache_clear()
    monkeypatch.setattr(accountant, "MOST_STEPS", 1)
    assert counted_by_draws({DpSgd(0.6, 1, 1): 1}, 1e-5)
    assert epsilon({DpSgd(0.6, 1, 1): 1}, 1e-5) > peak
    accountant.composed_epsilon.cache_clear()
    accountant._worst_steps.cache_clear()


def test_too_many_steps_say_what_is_allowed_and_which_keys_to_change():
    with pytest.raises(Refused) as refused:
        epsilon({DpSgd(1.0, 10_000, 1000): 2}, 1e-5)
    assert str(refused.value) == (
        "20000000 steps (rounds x epochs x batches an epoch) are more than the 10000000 that can be accounted for; lower "
        "run.rounds or training.epochs, or raise training.batch_size (in a plan --rounds, --epochs, --batches)"
    )
    with pytest.raises(Refused, match=r"20000000 rounds are more than the 10000000 that can be accounted for; lower run.rounds"):
        epsilon({DpSgd(1.0, 1, 1): 20_000_000}, 1e-5)


def test_two_kinds_of_local_training_are_climbed_together():
    """The slow twin tries every pair of numbers of batches."""
    events = {DpSgd(0.6, 1, 1): 1, DpSgd(0.8, 2, 1): 1}
    tried = [
        epsilon({GaussianRelease(0.6, 1 / one): one, GaussianRelease(0.8, 1 / other): other}, 1e-5)
        for one in range(1, 6)
        for other in range(2, 6)
    ]
    assert epsilon(events, 1e-5) == pytest.approx(max(tried), rel=1e-9)


def test_local_training_is_its_steps():
    assert epsilon({DpSgd(1.1, 8, 3): 5}, 1e-5) == epsilon({GaussianRelease(1.1, 1 / 8): 120}, 1e-5)


def renyi_of_shifted_skellam(shift: int, mu: float, order: int) -> float:
    """D_order(Sk(mu) + shift || Sk(mu)) by summation over the integers; the variance is mu."""
    reach = int(40 * math.sqrt(mu)) + 40 * shift
    integers = np.arange(-reach, reach + 1)
    with np.errstate(divide="ignore"):
        log_p, log_q = (np.log(ive(np.abs(integers - by), mu)) for by in (shift, 0))
    inside = np.isfinite(log_p) & np.isfinite(log_q)
    return float(logsumexp(order * log_p[inside] + (1 - order) * log_q[inside]) / (order - 1))


@pytest.mark.parametrize(("shift", "mu"), [(1, 4.0), (1, 100.0), (3, 30.0), (10, 400.0), (30, 10_000.0)])
def test_the_skellam_bound_lies_above_the_divergence_summed_numerically(shift, mu):
    """One coordinate: L2 and L1 sensitivity are the shift."""
    orders = np.array([2, 3, 5, 8, 16])
    event = SkellamRelease(math.sqrt(mu) / shift, shift, shift, mu)
    bound = accountant.skellam_divergence(event, orders)
    exact = np.array([renyi_of_shifted_skellam(shift, mu, int(order)) for order in orders])
    assert (exact <= bound).all()
    if mu >= 400:  # where both approach the Gaussian's
        assert (bound <= 1.1 * exact).all()
        assert exact == pytest.approx(orders * shift**2 / (2 * mu), rel=0.1)


def by_hand(events, delta: float, orders) -> float:
    """The slow twin of the Renyi path: each order on its own, formulas written out."""
    best = math.inf
    for order in orders:
        total = 0.0
        for event, count in events.items():
            if isinstance(event, SkellamRelease):
                first = ((2 * order - 1) * event.l2**2 + 6 * event.l1) / (4 * event.mu**2)
                total += count * (order * event.l2**2 / (2 * event.mu) + min(first, 3 * event.l1 / (2 * event.mu)))
            else:
                total += count * order / (2 * event.noise_multiplier**2)
        best = min(best, total + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return best


@pytest.mark.parametrize(
    "events",
    [
        {skellam(): 1},
        {skellam(3.0, 50.0): 4},
        {skellam(1.0, 30.0): 2, skellam(2.0, 1e4, l1=500.0): 3},
        {skellam(): 1, GaussianRelease(1.5): 2},
        {skellam(40.0): 1},
    ],
)
def test_the_renyi_path_is_the_written_out_minimum_over_integer_orders(events):
    assert epsilon(events, 1e-7) == pytest.approx(by_hand(events, 1e-7, range(2, 3000)), rel=1e-3)
    assert epsilon(events, 1e-7) >= by_hand(events, 1e-7, range(2, 3000)) * (1 - 1e-9)
    assert rdp_epsilon(events, 1e-7) == epsilon(events, 1e-7)


def test_skellam_costs_more_than_the_gaussian_and_less_noise_detail_costs_more():
    assert epsilon({skellam(1.0, 20.0): 1}, 1e-6) > epsilon({skellam(1.0, 1e4): 1}, 1e-6) > epsilon({GaussianRelease(1.0): 1}, 1e-6)
    sampled = {skellam(): 1, GaussianRelease(1.0, 0.1): 5}
    assert epsilon({skellam(): 1}, 1e-6) < epsilon(sampled, 1e-6) < epsilon({skellam(): 1, GaussianRelease(1.0): 5}, 1e-6)


def test_the_samplers_error_is_paid_from_delta():
    """P(exact) <= e^eps P(exact') + d becomes, t away on both sides, d + (1 + e^eps) t."""
    distance, times, delta = 1e-12, 2, 1e-7
    found = epsilon({skellam(total_variation=distance): times}, delta)
    orders = np.arange(2, 3000)
    left = delta - (1 + math.exp(found)) * times * distance
    exact = rdp.compute_epsilon(orders, times * accountant.skellam_divergence(skellam(), orders), left)[0]
    assert found == pytest.approx(exact, rel=1e-6)
    assert found > 1.001 * epsilon({skellam(): times}, delta)
    with pytest.raises(Refused, match="delta 1e-07 is used up by the noise sampler's total variation, 4e-08"):
        epsilon({skellam(total_variation=1e-8): 4}, delta)


@pytest.mark.parametrize(
    ("event", "times", "target"),
    [
        (GaussianRelease, 10, 4.0),
        (lambda noise: GaussianRelease(noise, 0.05), 100, 1.0),
        (lambda noise: DpSgd(noise, 5, 2), 10, 8.0),
        (skellam, 4, 6.0),
    ],
    ids=["gaussian", "sampled", "dp_sgd", "skellam"],
)
def test_the_noise_found_is_the_smallest_of_four_digits(event, times, target):
    found = solve_noise(event, times, target, 1e-5)
    assert float(f"{found:.4g}") == found
    smaller = float(f"{found - 10 ** (math.floor(math.log10(found)) - 3):.4g}")
    assert epsilon({event(found): times}, 1e-5) <= target < epsilon({event(smaller): times}, 1e-5)


def test_noise_that_an_encoding_cannot_hold_is_passed_over_or_refused():
    def encoded(most: float):
        def event(noise: float) -> SkellamRelease:
            if noise > most:
                raise Refused("16 bits cannot hold the noise")
            return skellam(noise)

        return event

    assert solve_noise(encoded(3.0), 1, 4.0, 1e-5) == solve_noise(skellam, 1, 4.0, 1e-5)
    with pytest.raises(Refused, match="16 bits cannot hold the noise"):
        solve_noise(encoded(0.1), 1, 4.0, 1e-5)


def test_no_noise_may_be_enough():
    with pytest.raises(Refused, match="no noise multiplier up to 100000 keeps epsilon within 1e-06"):
        solve_noise(GaussianRelease, 10_000_000, 1e-6, 1e-10)


@pytest.mark.parametrize("spent", [{}, {GaussianRelease(1.0, 0.1): 7}, {GaussianRelease(2.0): 2}], ids=["none", "same", "other"])
def test_rounds_left_is_what_counting_one_by_one_gives(spent):
    event, target = GaussianRelease(1.0, 0.1), 4.0
    counted = 0
    while epsilon({**spent, event: spent.get(event, 0) + counted + 1}, 1e-5) <= target:
        counted += 1
    assert counted > 3
    assert rounds_left(spent, event, target, 1e-5) == counted
    assert rounds_left(spent, event, target, 1e-5, most=3) == 3
    assert rounds_left(spent, event, 0.01, 1e-5) == 0


events = st.one_of(
    st.builds(GaussianRelease, st.floats(0.01, 1e5), st.none() | st.floats(1e-9, 1) | st.just(0)),
    st.builds(DpSgd, st.integers(1, 100), st.integers(1, 10**6), st.integers(1, 10**6)),
    st.builds(skellam, st.floats(0.1, 100), st.floats(1e3, 1e15), total_variation=st.floats(0, 1e-3)),
)


@given(events)
def test_an_event_survives_json(event):
    again = event_from_table(json.loads(json.dumps(event_to_table(event))))
    assert again == event
    assert hash(again) == hash(event)


@pytest.mark.parametrize(
    "table",
    [
        None, [], {}, {"kind": None}, {"kind": "laplace", "scale": 1.0}, {"kind": ["dp_sgd"]},
        {"kind": "gaussian_release", "noise_multiplier": 1.0},
        {"kind": "gaussian_release", "noise_multiplier": 1.0, "sampling_rate": None, "truncated": True},
        {"kind": "dp_sgd", "noise_multiplier": 1.0, "batches": 2.5, "epochs": 1},
        {"kind": "gaussian_release", "noise_multiplier": "1", "sampling_rate": None},
    ],
)  # fmt: skip
def test_what_cannot_be_accounted_is_refused(table):
    with pytest.raises(Refused):
        event_from_table(table)


@pytest.mark.parametrize("noise", [0, -1, 0.001, 1e9, math.nan, math.inf, "1", None, True])
def test_bad_noise_is_refused(noise):
    for build in (lambda: GaussianRelease(noise), lambda: DpSgd(noise, 1, 1), lambda: SkellamRelease(noise, 1.0, 1.0, 1.0)):
        with pytest.raises(Refused, match=r"^noise multiplier must be a number from 0.01 to 100000, got [^\n]*$"):
            build()


@pytest.mark.parametrize("rate", [-0.1, 1.1, 1e-12, math.nan, math.inf, "0.1"])
def test_bad_rates_are_refused(rate):
    with pytest.raises(Refused, match="sampling rate must be a number from 1e-09 to 1"):
        GaussianRelease(1.0, rate)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, 1e-12, math.nan, math.inf, None, "1e-5"])
def test_bad_deltas_are_refused(delta):
    for function in (epsilon, rdp_epsilon, prv_epsilon, gaussian_approximation):
        with pytest.raises(Refused, match="delta must be a number from 1e-10 to below 1"):
            function({GaussianRelease(1.0, 0.1): 1}, delta)


def test_other_bad_numbers_are_refused():
    for build in (
        lambda: DpSgd(1.0, 0, 1), lambda: DpSgd(1.0, 1, 0), lambda: DpSgd(1.0, 10**9, 1), lambda: skellam(l2=0.0),
        lambda: SkellamRelease(1.0, 5.0, 1.0, 25.0), lambda: SkellamRelease(1.0, 1.0, 1.0, math.nan),
        lambda: SkellamRelease(1.1, 5.0, 5.0, 25.0), lambda: skellam(total_variation=-1.0),
        lambda: epsilon({GaussianRelease(1.0): -1}, 1e-5), lambda: epsilon({GaussianRelease(1.0, 0.1): 1.5}, 1e-5),
        lambda: epsilon({DpSgd(1.0, 10_000, 1000): 2}, 1e-5), lambda: solve_noise(GaussianRelease, 1, math.nan, 1e-5),
        lambda: epsilon({GaussianRelease(1.0, 0.5): 1_000_000}, 1e-10), lambda: prv_epsilon({skellam(): 1}, 1e-5),
    ):  # fmt: skip
        with pytest.raises(Refused, match=r"^[^\n]+$"):
            build()


def test_a_rate_of_zero_or_one_claims_no_amplification():
    assert GaussianRelease(1.0, 0) == GaussianRelease(1.0, 1) == GaussianRelease(1.0)
    assert without_amplification(GaussianRelease(1.0, 0.1)) == GaussianRelease(1.0)
    for event in (DpSgd(1.0, 5, 1), skellam()):
        assert without_amplification(event) == event


def test_nothing_costs_nothing():
    assert epsilon({}, 1e-5) == epsilon({GaussianRelease(1.0, 0.1): 0}, 1e-5) == 0
    assert prv_epsilon({}, 1e-5) == 0


def test_what_is_far_too_much_is_still_a_number():
    """Beyond e^700 the privacy loss distribution overflows; the curve without sampling stays finite."""
    assert 1000 < epsilon({GaussianRelease(0.1, 0.5): 1000}, 1e-5) <= epsilon({GaussianRelease(0.1): 1000}, 1e-5) < math.inf


def test_the_cross_check_by_prv_says_when_it_cannot():
    assert prv_epsilon({GaussianRelease(0.05): 1000}, 1e-5) is None


def test_events_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GaussianRelease(1.0).noise_multiplier = 2.0
