"""Sums of integers without noise: what the clients' numbers become, and come back as."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.privacy.release import plan_release
from fedcore.secagg.sums import LARGEST_LOSS, ScoreSum, UpdateSum, header_numbers, plan_update_sum, sum_from_table


def randomness(*parts):
    return keystream(derive_key("sums", *parts))


def added(found, contributions):
    """The modular sum, as a float64 vector like the grid's."""
    total = np.zeros(found.size)
    for one in contributions:
        total += found.accept(one)
    return total


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 700), st.sampled_from([0, 24, 32]), st.integers(0, 2**32),
)  # fmt: skip
def test_the_sum_is_the_weighted_mean_to_a_step(dimension, clients, cap, bits, seed):
    """Against the slow twin: the mean of the clipped updates in float64, weights as they are."""
    plan = plan_update_sum(dimension, clients, minimum_survivors=1, clip=0.5, weight_cap=cap, bits=bits)
    rng = np.random.default_rng(seed)
    updates, examples = rng.normal(0, 0.4, (clients, dimension)), rng.integers(1, 900, clients)
    losses = rng.uniform(0, 20, clients)
    sent = [
        plan.contribution(updates[i], int(examples[i]), float(losses[i]), randomness(seed, i)) for i in range(clients)
    ]  # fmt: skip
    assert all(int(one.max()) < 1 << plan.bits for one in sent)
    means = plan.publish(added(plan, sent), clients, randomness())
    weights = np.minimum(examples, cap)
    expected = weights @ np.clip(updates, -0.5, 0.5) / weights.sum()
    assert np.abs(means.update - expected).max() <= plan.granularity
    assert means.loss == pytest.approx(weights @ np.minimum(losses, LARGEST_LOSS) / weights.sum(), abs=LARGEST_LOSS / plan._largest)
    assert (means.examples, means.failed, means.unclipped) == (weights.sum(), 0, None)


def test_rounding_is_unbiased():
    plan = plan_update_sum(20000, 1, minimum_survivors=1, clip=1.0, weight_cap=1, bits=16)
    update = np.full(20000, 0.3 * plan.granularity)
    mean = plan.publish(plan.accept(plan.contribution(update, 1, 0.0, randomness("bias"))), 1, randomness()).update
    steps = mean / plan.granularity
    assert set(np.unique(np.round(steps)).tolist()) == {0.0, 1.0}
    assert steps.mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20000))


def test_a_client_with_nothing_to_say_has_no_weight_and_is_counted():
    plan = plan_update_sum(3, 3, minimum_survivors=2, clip=1.0, weight_cap=10)
    update = np.array([0.25, -0.5, 0.75])
    sent = [plan.contribution(update, 4, 1.0, randomness(0)), plan.nothing(randomness(1))]
    means = plan.publish(added(plan, sent), 2, randomness())
    assert np.abs(means.update - update).max() <= plan.granularity
    assert (means.examples, means.failed) == (4, 1)
    with pytest.raises(RoundFailed, match="training of all 2 clients failed"):
        plan.publish(added(plan, [plan.nothing(randomness(0))] * 2), 2, randomness())


def test_the_largest_sum_fits_and_a_sum_beyond_would_not():
    plan = plan_update_sum(1, 8, minimum_survivors=1, clip=1.0, weight_cap=64, bits=24)
    assert plan.coordinate_bits == 24 - 3 - 6
    for edge in (1.0, -1.0):
        sent = [plan.contribution(np.array([edge]), 64, LARGEST_LOSS, randomness(i)) for i in range(8)]
        means = plan.publish(added(plan, sent), 8, randomness())
        assert means.update[0] == pytest.approx(edge)
        assert means.loss == pytest.approx(LARGEST_LOSS)


@pytest.mark.parametrize(("clients", "cap", "bits"), [(1, 1, 16), (2, 1, 20), (50, 1, 24), (50, 64, 32), (10000, 4, 32)])
def test_the_width_is_the_smallest_that_leaves_sixteen_bits(clients, cap, bits):
    plan = plan_update_sum(10, clients, minimum_survivors=1, clip=1.0, weight_cap=cap)
    assert plan.bits == bits
    assert plan.coordinate_bits >= 16


def test_survivors_are_those_declared():
    plan = plan_update_sum(2, 5, minimum_survivors=3, clip=1.0, weight_cap=1)
    total = added(plan, [plan.contribution(np.zeros(2), 1, 0.0, randomness(i)) for i in range(3)])
    for survivors in (2, 6):
        with pytest.raises(RoundFailed, match="3 to 5"):
            plan.publish(total, survivors, randomness())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 17}, "16, 20, 24, 32"), ({"bits": 16, "weight_cap": 4096}, "leave 2 for a coordinate"),
        ({"clip": 0.0}, "positive"), ({"clip": math.nan}, "positive"), ({"cohort": 0}, "cohort is an integer"),
        ({"minimum_survivors": 9}, "more than the cohort"),
        ({"weight_cap": 1.5}, "weight cap is an integer"), ({"cohort": True}, "cohort is an integer"),
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused(changes, message):
    plan = UpdateSum(dimension=4, cohort=4, minimum_survivors=2, clip=1.0, weight_cap=8, bits=32)
    with pytest.raises(Refused, match=message):
        dataclasses.replace(plan, **changes)


def test_what_is_no_contribution_is_the_clients_failure():
    plan = plan_update_sum(4, 4, minimum_survivors=2, clip=1.0, weight_cap=8)
    for sent in (np.zeros(6, np.uint32), np.zeros(7, np.float32), np.zeros((7, 1), np.uint32), np.zeros(7, np.int32)):
        with pytest.raises(ClientFailure):
            plan.accept(sent)
    with pytest.raises(ClientFailure, match="not finite"):
        plan.contribution(np.array([1.0, math.nan, 0, 0]), 1, 0.0, randomness())
    with pytest.raises(ClientFailure, match="not finite"):
        plan.contribution(np.zeros(4), 1, math.inf, randomness())
    with pytest.raises(Refused, match="4 values"):
        plan.contribution(np.zeros(5), 1, 0.0, randomness())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1), st.floats(0, 15.0)), min_size=1, max_size=8))
def test_scores_come_back(clients):
    plan = ScoreSum(cohort=len(clients), minimum_survivors=1, weight_cap=300)
    numbers = [(n, round(share * n), loss * n) for n, share, loss in clients]
    total = added(plan, [plan.contribution(*one) for one in numbers])
    examples = sum(n for n, _, _ in numbers)
    if not examples:
        with pytest.raises(RoundFailed, match="had examples"):
            plan.publish(total, len(clients))
        return
    scores = plan.publish(total, len(clients))
    assert scores.examples == examples
    assert scores.accuracy == pytest.approx(sum(c for _, c, _ in numbers) / examples)
    assert scores.loss == pytest.approx(sum(x for _, _, x in numbers) / examples, abs=plan.granularity * len(clients))
    accuracies = [c / n for n, c, _ in numbers if n]
    assert scores.histogram == tuple(np.histogram(accuracies, bins=20, range=(0, 1))[0].tolist()) or any(
        math.isclose(a * 20, round(a * 20))
        for a in accuracies  # numpy's edges are floats
    )


def test_a_client_beyond_the_cap_counts_in_proportion():
    plan = ScoreSum(cohort=2, minimum_survivors=1, weight_cap=10)
    scores = plan.publish(plan.accept(plan.contribution(1000, 700, 1500.0)), 1)
    assert (scores.examples, scores.accuracy) == (10, 0.7)
    assert scores.loss == pytest.approx(1.5, abs=1e-6)
    assert not plan.contribution(5, 2, math.nan).any()


@pytest.mark.parametrize(("clients", "cap"), [(4, 8), (64, 20), (50, 7), (1, 1)])
def test_the_largest_losses_do_not_wrap(clients, cap):
    plan = ScoreSum(clients, 1, cap)
    total = added(plan, [plan.contribution(cap, 0, 100.0 * cap)] * clients)
    assert plan.publish(total, clients).loss == pytest.approx(LARGEST_LOSS)


def test_a_table_gives_the_sum_back():
    found = [
        plan_update_sum(7, 5, minimum_survivors=3, clip=0.5, weight_cap=9), ScoreSum(5, 3, 100),
        plan_release(7, 1.0, 1.0, 8, shares=(6, 1, b"s" * 32)),
    ]  # fmt: skip
    for one in found:
        assert sum_from_table({"epochs": 1, **one.to_table()}) == one
    assert sum_from_table({"epochs": 1}) is None
    with pytest.raises(Refused, match="weight_cap is missing"):
        sum_from_table({key: value for key, value in found[0].to_table().items() if key != "sum-weight-cap"})
    with pytest.raises(Refused, match="bits"):
        sum_from_table({**found[0].to_table(), "sum-bits": 33})


def test_header_numbers_name_every_extra_coordinate():
    update = plan_update_sum(7, 5, minimum_survivors=3, clip=0.5, weight_cap=9)
    numbers = header_numbers(update)
    assert (numbers["dimension"], numbers["planned"], numbers["noise_multiplier"]) == (update.size, 5, 0.0)
    assert [block.name for block in numbers["layout"]] == ["examples", "train_loss", "failed"]
    noised = plan_release(7, 1.0, 1.0, 8, bit_noise=2.0, loss_cap=4.0, shares=(6, 1, b"s" * 32))
    numbers = header_numbers(noised)
    assert (numbers["dimension"], numbers["squared_norm_bound"]) == (9, noised.shares.squared_norm_bound)
    assert [block.name for block in numbers["layout"]] == ["unclipped", "train_loss"]
    with pytest.raises(Refused, match="the clients' shares"):
        header_numbers(plan_release(7, 1.0, 1.0, 8))


def test_scores_that_no_clients_can_have_are_not_published():
    scores = ScoreSum(4, 2, 50)
    honest = added(scores, [scores.contribution(40, 30, 12.0), scores.contribution(50, 50, 0.0), scores.contribution(0, 0, 0.0)])
    assert scores.publish(honest, 3).accuracy == 80 / 90
    for place, value in ((0, 200), (1, 91), (1, -1), (2, -5), (2, 2**30), (3, -1), (10, 7)):
        hostile = honest.copy()
        hostile[place] = value % 2**32
        with pytest.raises(RoundFailed, match="no client can have"):
            scores.publish(hostile, 3)
    without = honest.copy()
    without[3:] = 0
    with pytest.raises(RoundFailed, match="no client can have"):
        scores.publish(without, 3)


def test_weights_and_losses_that_no_clients_can_have_are_not_published():
    plan = plan_update_sum(3, 4, minimum_survivors=2, clip=1.0, weight_cap=10)
    total = added(plan, [plan.contribution(np.full(3, 0.25), 7, 1.0, randomness(i)) for i in range(3)])
    assert plan.publish(total, 3, randomness()).examples == 21
    for place, value in ((3, 31), (4, -1), (4, 2**22), (5, 4), (5, -1)):
        hostile = total.copy()
        hostile[place] = value % 2**plan.bits
        with pytest.raises(RoundFailed, match="no client can have"):
            plan.publish(hostile, 3, randomness())


def test_a_clip_that_does_not_suit_the_updates_is_told():
    updates = np.random.default_rng(0).normal(0, 0.01, (20, 500))

    def told(clip):
        plan = plan_update_sum(500, 20, minimum_survivors=2, clip=clip, weight_cap=1)
        total = added(plan, [plan.contribution(update, 1, 0.0, randomness(str(clip), i)) for i, update in enumerate(updates)])
        return plan.why_unfit(plan.publish(total, 20, randomness()).update, 20)

    assert "raise it" in told(1e-4)
    assert "lower it" in told(1e6)
    assert told(1.0) == told(0.05) == ""
