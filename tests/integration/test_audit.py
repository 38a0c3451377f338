"""Canaries in the whole privacy code: the lower bound stays below the report, and rises above it where noise is missing."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from fedcore.errors import Refused
from fedcore.privacy.accountant import GaussianRelease, epsilon
from fedcore.privacy.release import plan_release

sys.path.insert(0, str(Path(__file__).parents[2]))
from simulations.benchmarks import audit as audit_module
from simulations.benchmarks import canaries
from simulations.benchmarks.audit import Errors, audit, curve_bound, direct_bound, errors, gaussian_epsilon

SURE = 0.999  # so that another stream of random numbers does not turn a right test red


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small only waits for its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("noise", [0.1, 0.7, 1.0, 5.0, 300.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_the_gaussian_curve_is_the_accountant_s(noise, delta):
    expected = epsilon({GaussianRelease(noise): 1}, delta)
    assert gaussian_epsilon(1 / noise, delta) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_nothing_is_concluded_from_guessing():
    for threshold in (-9.0, 0.0, 9.0):
        found = Errors(float(norm.sf(threshold)), float(norm.cdf(threshold)))
        assert curve_bound(found, GaussianRelease(1.0), 1, 1e-5) == pytest.approx(0, abs=1e-6)
        assert direct_bound(found, 1e-5) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.9, 2.0])
def test_exact_errors_of_a_gaussian_give_its_epsilon_at_every_threshold(threshold):
    found = Errors(float(norm.sf(threshold)), float(norm.cdf(threshold - 1.3)))
    assert curve_bound(found, GaussianRelease(1.0), 1, 1e-5) == pytest.approx(
        epsilon({GaussianRelease(1 / 1.3): 1}, 1e-5), rel=1e-6
    )
    assert direct_bound(found, 1e-5) < curve_bound(found, GaussianRelease(1.0), 1, 1e-5)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.25), (0.6, 0.05)])
def test_exact_errors_of_a_sampled_gaussian_give_nearly_its_epsilon(noise, rate):
    step, threshold = GaussianRelease(noise, rate), 0.5 + 1.5 * noise
    miss = (1 - rate) * norm.cdf(threshold / noise) + rate * norm.cdf((threshold - 1) / noise)
    bound = curve_bound(Errors(float(norm.sf(threshold / noise)), float(miss)), step, 1, 1e-5)
    assert 0.8 * epsilon({step: 1}, 1e-5) < bound <= epsilon({step: 1}, 1e-5)


def test_a_curve_says_nothing_where_errors_are_too_large_and_stops_where_they_are_too_small():
    step = GaussianRelease(1.0, 0.25)
    assert curve_bound(Errors(0.5, 0.5), step, 4, 1e-5) == 0
    assert curve_bound(Errors(1e-9, 1e-9), step, 4, 1e-5) == epsilon({GaussianRelease(1 / 8, 0.25): 4}, 1e-5)


@pytest.mark.parametrize("claimed", [0.5, 2.0, 6.0])
def test_exact_errors_of_randomised_response_give_its_epsilon(claimed):
    wrong = 1 / (1 + math.exp(claimed))
    assert direct_bound(Errors(wrong, wrong), 0.0) == pytest.approx(claimed)
    delta = 0.05  # that share of answers is given away
    leaking = Errors((1 - delta) * wrong, (1 - delta) * wrong)
    assert direct_bound(leaking, delta) == pytest.approx(claimed)


@pytest.mark.parametrize(("wrong", "trials"), [(0, 40), (3, 40), (17, 100), (39, 40)])
def test_bounds_of_errors_invert_the_binomial_distribution(wrong, trials):
    """Clopper and Pearson: the largest rate at which so few errors are still as likely as the doubt that is left."""
    absent, present = np.zeros(trials), np.ones(trials)
    absent[:wrong], present[:wrong] = 2.0, 0.0
    found = errors(present, absent, 0.5, 0.9)
    assert found.false_alarm == found.miss
    assert binom.cdf(wrong, trials, found.miss) == pytest.approx(0.05)
    assert errors(np.zeros(5), np.ones(5), 0.5, 0.9) == Errors(1.0, 1.0)


def test_a_known_mechanism_is_neither_refuted_nor_missed():
    """The whole audit on plain normal numbers, whose epsilon is known: the bound exceeds it no more often than allowed."""
    rng = np.random.default_rng(5)

    def scores(present, trials):
        return rng.normal(float(present), 1.0, len(trials))

    case = canaries.Case("none", "normal numbers", GaussianRelease(1.0), scores, GaussianRelease(1.0))
    found = [audit(case, 400, confidence=0.95) for _ in range(100)]
    assert sum(one.refuted for one in found) <= 5
    assert np.median([one.lower_bound for one in found]) > 0.6 * case.epsilon


@pytest.mark.parametrize(
    "case",
    [
        canaries.central(0.6), canaries.central(0.6, adaptive=True), canaries.distributed(0.6), canaries.distributed(0.6, 8, 5),
        canaries.example(0.6, epochs=1),
    ],
    ids=lambda case: case.mechanism,
)  # fmt: skip
def test_the_report_holds_and_is_not_far_from_what_can_be_shown(case):
    found = audit(case, 250, SURE)
    assert not found.refuted
    assert found.lower_bound > 0.2 * found.reported


def test_the_report_holds_where_sampling_amplifies():
    found = audit(canaries.poisson(0.7, 0.5, 4), 300, SURE)
    assert 0.2 * found.reported < found.lower_bound <= found.reported


@pytest.mark.parametrize(
    "case",
    [
        canaries.central(drawn_noise=canaries.QUIET), canaries.poisson(3.0, rounds=4, drawn_noise=canaries.QUIET),
        canaries.example(epochs=1, drawn_noise=canaries.QUIET),
    ],
    ids=lambda case: f"{case.unit}, {case.mechanism}",
)  # fmt: skip
def test_noise_that_is_switched_off_is_noticed(case):
    assert audit(case, 80, SURE).refuted


@pytest.mark.parametrize(
    "case", [canaries.central(drawn_noise=0.5), canaries.distributed(sized_for=12)], ids=lambda case: case.broken
)
def test_too_little_noise_is_noticed(case):
    """Shares sized for all twelve clients of whom three reply leave a quarter of the planned variance."""
    assert audit(case, 500, SURE).refuted


def test_clients_refuse_the_plan_that_the_audit_refutes():
    right = plan_release(60, 1.0, 1.0, 12, shares=(3, 0, bytes(32))).shares
    right.check()
    object.__setattr__(right, "noise_variance", right.mu / 12)
    with pytest.raises(Refused, match="the plan's noise_variance is"):
        right.check()


def test_a_whole_grid_keeps_to_the_report_and_is_refuted_without_noise():
    kept = audit(canaries.grid(0.5), 80, SURE)
    assert 0.1 * kept.reported < kept.lower_bound <= kept.reported
    assert audit(canaries.grid(drawn_noise=canaries.QUIET), 40, SURE).refuted


def test_a_row_says_what_was_found_and_the_exit_status_whether_all_is_as_it_should_be(monkeypatch, capsys):
    rows = [canaries.central(), canaries.central(drawn_noise=canaries.QUIET)]
    monkeypatch.setattr(audit_module, "cases", lambda: iter(rows))
    monkeypatch.setattr(sys, "argv", ["audit", "--trials", "60", "--json"])
    with pytest.raises(SystemExit, match="0"):
        audit_module.main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["refuted"], second["refuted"]) == (False, True)
    assert second["lower_bound"] == max(second["curve"], second["direct"]) > second["reported"]
    rows[1] = canaries.Case("client, central", "a lie", rows[1].event, rows[1].scores, rows[1].step)
    monkeypatch.setattr(sys, "argv", ["audit", "--trials", "60"])
    with pytest.raises(SystemExit, match="1"):
        audit_module.main()
    assert capsys.readouterr().out.rstrip().endswith("refuted, unexpected |")


@pytest.mark.slow
def test_every_row_of_the_table_is_as_it_should_be():
    for case in canaries.cases():
        found = audit(case, 1500)
        assert found.refuted == bool(case.broken), found
