"""What a set of privacy events costs: epsilon at a delta, always derived from the events and never stored.

Adjacency is "with or without": one client's whole contribution (unit ``client``) or one training example (unit ``example``) is
there, or is replaced by nothing (add-or-remove; for a sum of shares, zero-out).

The number claimed is the exact Gaussian curve where no sampling is counted, the privacy loss distribution of dp-accounting where
it is (rounded pessimistically), and a bound by integer Renyi orders where Skellam noise takes part. DP-SGD with so little noise
that one draw of an example gives it away is bounded by how often it is drawn (`counted_by_draws`). PRV (Opacus) and RDP are
cross-checks. Opacus's GDP accountant is an approximation that under-reports and is not offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.privacy.events import (
    LEAST_SAMPLED_NOISE,
    MOST_STEPS,
    NOISE_RANGE,
    DpSgd,
    Event,
    GaussianRelease,
    SkellamRelease,
    check_number,
    event_from_table,
    event_to_table,
    without_amplification,
)

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = [
    "Composition", "DpSgd", "Event", "GaussianRelease", "SkellamRelease", "check_delta", "composed_epsilon", "composition",
    "counted_by_draws", "epsilon", "event_from_table", "event_to_table", "gaussian_approximation", "prv_epsilon", "rdp_epsilon",
    "rounds_left", "skellam_divergence", "solve_noise", "without_amplification",
]  # fmt: skip

SMALLEST_DELTA = 1e-10
_LOG_TAIL = -40.0  # a step's tails beyond e^-40 pass to delta
_LOST_PER_STEP = 5e-16  # delta that rounding in a power of a Fourier transform may cost; 2e-16 were seen
_PER_DEVIATION, _MOST_POINTS = 16, 8_000
_WIDEST_PRV = 2**22
_ORDERS: npt.NDArray[np.int64] = np.unique(np.concatenate([np.arange(2, 129), np.geomspace(128, 1e6, 200)]).astype(np.int64))
_HIGHEST_SAMPLED_ORDER = 1024

Composition = frozenset[tuple[Event, int]]
Steps = dict[tuple[float, float], int]  # (noise multiplier, sampling rate) -> how often


def check_delta(delta: float) -> float:
    """``delta``, or Refused when it is no probability that can be accounted for numerically."""
    return check_number("delta", delta, SMALLEST_DELTA, math.nextafter(1, 0))


def epsilon(events: Mapping[Event, int], delta: float) -> float:
    """Epsilon at ``delta`` of one client, or of one example, that was subject to each event as often as given.

    Raises:
        Refused: delta outside [1e-10, 1), more steps than can be accounted for, or a delta used up by the sampler's error.
    """
    return composed_epsilon(composition(events), check_delta(delta))


def composition(events: Mapping[Event, int]) -> Composition:
    """``events`` as a value that can be hashed; those of count zero are left out."""
    for event, count in events.items():
        if isinstance(count, int) and count > MOST_STEPS:
            raise Refused(f"{count} rounds are more than the {MOST_STEPS} that can be accounted for; lower run.rounds (--rounds)")
        check_number(f"count of {type(event).__name__}", count, 0, MOST_STEPS, whole=True)
    return frozenset((event, count) for event, count in events.items() if count)


@lru_cache(maxsize=4096)
def composed_epsilon(events: Composition, delta: float) -> float:
    """`epsilon` of a `composition`; remembered, since a ledger asks for the same ones again and again."""
    if any(isinstance(event, SkellamRelease) for event, _ in events):
        return _renyi_epsilon(events, delta)
    return _loss_epsilon(*_worst_steps(events, delta))


def counted_by_draws(events: Mapping[Event, int], delta: float) -> bool:
    """Whether epsilon is an upper bound by how often an example is drawn, above 50 and possibly several times too large."""
    return _worst_steps(composition(events), check_delta(delta))[1] < delta


def gaussian_approximation(events: Mapping[Event, int], delta: float) -> float:
    """Epsilon as if Skellam noise were Gaussian of the same noise multiplier: an approximation, never a certified number."""
    swapped: dict[Event, int] = {}
    for event, count in events.items():
        like = GaussianRelease(event.noise_multiplier) if isinstance(event, SkellamRelease) else event
        swapped[like] = swapped.get(like, 0) + count
    return epsilon(swapped, delta)


def rdp_epsilon(events: Mapping[Event, int], delta: float) -> float:
    """Epsilon by Renyi orders alone, an upper bound that is looser than `epsilon`: a cross-check."""
    import dp_accounting
    from dp_accounting import rdp

    chosen = composition(events)
    if any(isinstance(event, SkellamRelease) for event, _ in chosen):
        return _renyi_epsilon(chosen, check_delta(delta))
    accountant = rdp.RdpAccountant(orders=_ORDERS[_ORDERS <= _HIGHEST_SAMPLED_ORDER])
    steps, left = _worst_steps(chosen, check_delta(delta))
    for (noise, rate), count in steps.items():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(left))


def prv_epsilon(events: Mapping[Event, int], delta: float) -> float | None:
    """Epsilon by Opacus's PRV accountant, its upper bound with an error of 0.01: a cross-check.

    None where its grid would not fit into memory, or has no point at this delta, or where epsilon is `counted_by_draws`.

    Raises:
        Refused: an event with Skellam noise, which it does not know.
    """
    chosen = composition(events)
    if any(isinstance(event, SkellamRelease) for event, _ in chosen):
        raise Refused("the PRV accountant knows no Skellam noise; use the Renyi bound")
    steps, left = _worst_steps(chosen, check_delta(delta))
    if not steps:
        return 0.0
    if left < delta:
        return None
    mesh = 0.01 / math.sqrt(sum(steps.values()) * math.log(12_000 / delta) / 2)
    if 2 * rdp_epsilon(events, delta) / mesh > _WIDEST_PRV:
        return None
    from opacus.accountants import PRVAccountant  # here, since it brings torch

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, count) for (noise, rate), count in steps.items()]
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(accountant.get_epsilon(delta))
        except RuntimeError:  # its grid has no point at this delta
            return None


def solve_noise(event: Callable[[float], Event], times: int, target: float, delta: float) -> float:
    """The smallest noise multiplier of 4 significant digits, from 0.01 to 1e5, at which ``times`` events cost at most ``target``.

    ``event`` gives the event that a noise multiplier leads to; its epsilon must fall as it grows.

    Raises:
        Refused: no noise multiplier reaches the target, or ``event`` refuses the one that does.
    """
    check_number("target epsilon", target, 1e-6, 1e6)

    def noise(index: int) -> float:
        return float(f"{1000 + index % 9000}e{index // 9000 - 5}")  # decimal digits, so the same on every machine

    def affordable(index: int) -> bool:
        try:
            return epsilon({event(noise(index)): times}, delta) <= target
        except Refused:  # an encoding may hold no noise as small or large as this; the search goes on by the Gaussian's epsilon
            return epsilon({GaussianRelease(noise(index)): times}, delta) <= target

    if not affordable(63_000):
        raise Refused(f"no noise multiplier up to {NOISE_RANGE[1]:g} keeps epsilon within {target:g}")
    found = noise(_first(affordable, -1, 63_000))
    if not epsilon({event(found): times}, delta) <= target:
        raise Refused(f"no noise multiplier keeps epsilon within {target:g}")
    return found


def rounds_left(spent: Mapping[Event, int], event: Event, target: float, delta: float, most: int = 1_000_000) -> int:
    """How many more ``event`` fit after ``spent`` before epsilon exceeds ``target``; ``most`` where that many do."""
    check_number("target epsilon", target, 0, 1e6)

    def overspent(more: int) -> bool:
        return more > most or not epsilon({**spent, event: spent.get(event, 0) + more}, delta) <= target

    if overspent(0):
        return 0
    reach = 1
    while reach <= most and not overspent(reach):
        reach *= 2
    return _first(overspent, reach // 2, min(reach, most + 1)) - 1


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest index above ``low`` from which on ``holds``, by bisection; at ``high`` it does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _worst_steps(events: Composition, delta: float) -> tuple[Steps, float]:
    """The steps of the client whose numbers of batches, at least those of the `DpSgd` events, cost the most; and delta for them.

    Up to a peak epsilon rises with the number of batches, and from there on falls: climbed one event at a time. Where noise is so
    little that the peak lies far out, or no peak is found, the steps are `_drawn` ones.

    Raises:
        Refused: more steps than can be accounted for.
    """
    batches = {event: event.batches for event, _ in events if isinstance(event, DpSgd)}
    best = _steps(events, batches)
    if sum(best.values()) > MOST_STEPS:
        raise Refused(
            f"{sum(best.values())} steps (rounds x epochs x batches an epoch) are more than the {MOST_STEPS} that can be accounted "
            "for; lower run.rounds or training.epochs, or raise training.batch_size (in a plan --rounds, --epochs, --batches)"
        )
    if any(event.noise_multiplier < LEAST_SAMPLED_NOISE for event in batches):
        return _drawn(events, delta)
    cost = _loss_epsilon(best, delta) if batches else 0.0
    improving = bool(batches)
    while improving:
        improving = False
        for event in sorted(batches, key=str):
            while True:
                more = {**batches, event: batches[event] + max(1, batches[event] // 8)}
                tried = _steps(events, more)
                if sum(tried.values()) > 2 * MOST_STEPS:
                    return _drawn(events, delta)
                if (higher := _loss_epsilon(tried, delta)) <= cost * (1 + 1e-9):
                    break
                best, cost, batches, improving = tried, higher, more, len(batches) > 1
    return best, delta


def _drawn(events: Composition, delta: float) -> tuple[Steps, float]:
    """Steps that cost at least as much as the `DpSgd` events, whatever the numbers of batches, at the delta that is left: half.

    In E epochs of m batches an example is drawn J times, J binomial of mean E; given the draws, J unsampled Gaussian steps
    separate the two cases. A mixture over draws costs no more than its costliest part, and with probability 1 - delta / 2 no J
    is above `_most_draws`.
    """
    local = [event for event, _ in events if isinstance(event, DpSgd)]
    steps = _steps(frozenset((event, count) for event, count in events if not isinstance(event, DpSgd)), {})
    for event, count in events:
        if isinstance(event, DpSgd):
            mean = count * event.epochs
            key = (event.noise_multiplier, 1.0)
            steps[key] = steps.get(key, 0) + _most_draws(mean, delta / 2 / len(local))
    return dict(sorted(steps.items())), delta / 2


def _most_draws(mean: int, chance: float) -> int:
    """What a sum J of independent coins exceeds with at most ``chance``, by Chernoff: P(J >= n) <= e^(n - mean) (mean / n)^n."""

    def rare(draws: int) -> bool:
        n = draws + 1
        return n - mean + n * math.log(mean / n) <= math.log(chance)

    high = 2 * mean
    while not rare(high):
        high *= 2
    return _first(rare, mean, high)


def _steps(events: Composition, batches: Mapping[DpSgd, int]) -> Steps:
    """The Gaussian steps that the events consist of, with the numbers of ``batches`` given for DP-SGD."""
    steps: Steps = {}
    for event, count in events:
        if isinstance(event, DpSgd):
            key, repeated = (event.noise_multiplier, 1 / batches[event]), event.epochs * batches[event]
        elif isinstance(event, GaussianRelease):
            key, repeated = (event.noise_multiplier, event.sampling_rate or 1.0), 1
        else:
            raise Refused(f"{type(event).__name__} is not made of Gaussian steps")
        steps[key] = steps.get(key, 0) + count * repeated
    return dict(sorted(steps.items()))  # the order of a set must not decide a last digit


def _loss_epsilon(steps: Steps, delta: float) -> float:
    """By the exact Gaussian curve for unsampled steps, and the composed privacy loss distributions for the others."""
    exact = _gaussian_epsilon(math.fsum(count / noise**2 for (noise, _), count in steps.items()), delta)
    sampled = {key: count for key, count in steps.items() if key[1] < 1}
    if not sampled:
        return exact
    lost = _LOST_PER_STEP * sum(sampled.values())
    if lost > delta / 2:
        raise Refused(f"delta {delta:g} is too small for {sum(sampled.values())} steps: it is lost in rounding errors")
    parts = dict(sampled)
    precision = math.fsum(count / noise**2 for (noise, rate), count in steps.items() if rate == 1)
    if precision:
        parts[precision**-0.5, 1.0] = 1
    finest = min(_interval(*key) for key in sampled)
    interval = max(finest, *(_range(*key) / (4 * _MOST_POINTS) for key in parts)) if len(parts) > 1 else finest
    total: PrivacyLossDistribution | None = None
    for (noise, rate), count in parts.items():
        part = _composed(noise, rate, interval, count)
        total = part if total is None else total.compose(part)
    assert total is not None
    with np.errstate(over="ignore"):
        return min(
            exact, float(total.get_epsilon_for_delta(delta - lost))
        )  # sampling never costs; beyond e^700 only exact is finite


def _gaussian_epsilon(precision: float, delta: float) -> float:
    """Exactly, by Balle and Wang 2018, for unsampled steps whose 1 / noise^2 add up to ``precision``."""
    import dp_accounting

    with np.errstate(divide="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(precision**-0.5, delta)) if precision else 0.0


def _interval(noise: float, rate: float) -> float:
    """Width of the grid of one step's privacy loss.

    Pessimistic rounding to a width h adds at most h^2/4 to the variance of a step's loss, so a sixteenth of its deviation costs
    0.1 % of the variance. Rare large losses (a small rate) would make such a grid long: it has at most 8,000 points.
    """
    deviation = min(rate * math.sqrt(math.expm1(min(noise**-2, 50))), 1 / noise)
    return max(deviation / _PER_DEVIATION, _range(noise, rate) / _MOST_POINTS)


def _range(noise: float, rate: float) -> float:
    """From the smallest to the largest privacy loss of one step, up to the tails that are dropped."""
    largest = math.sqrt(-2 * _LOG_TAIL) / noise + 0.5 / noise**2
    if rate == 1:
        return 2 * largest
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + largest)) - math.log1p(rate * math.expm1(-largest))


@lru_cache(maxsize=64)
def _one_step(noise: float, rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=interval, log_mass_truncation_bound=_LOG_TAIL
    )


@lru_cache(maxsize=32)
def _composed(noise: float, rate: float, interval: float, count: int) -> PrivacyLossDistribution:
    one = _one_step(noise, rate, interval)
    return one.self_compose(count) if count > 1 else one


def _renyi_epsilon(events: Composition, delta: float) -> float:
    """By integer Renyi orders: the Skellam bound of Agarwal et al. 2021, theorem 3.5, and the Gaussian's.

    Renyi divergence becomes (epsilon, delta) by proposition 12 of Canonne, Kamath and Steinke (arXiv:2004.00010), as in
    dp_accounting.rdp.compute_epsilon. A sampler that is t away in total variation costs (1 + e^epsilon) t of delta.
    """
    import dp_accounting
    from dp_accounting import rdp

    skellam = [(event, count) for event, count in events if isinstance(event, SkellamRelease)]
    steps, delta = _worst_steps(
        frozenset((event, count) for event, count in events if not isinstance(event, SkellamRelease)), delta
    )  # fmt: skip
    orders = _ORDERS[_ORDERS <= _HIGHEST_SAMPLED_ORDER] if any(rate < 1 for _, rate in steps) else _ORDERS
    accountant = rdp.RdpAccountant(orders=orders)
    for (noise, rate), count in steps.items():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    divergence = accountant.rdp + sum(count * skellam_divergence(event, orders) for event, count in sorted(skellam, key=str))
    distance = math.fsum(count * event.total_variation for event, count in skellam)
    found = 0.0
    for _ in range(1000):
        left = delta - (1 + math.exp(min(found, 700))) * distance
        if left <= 0:
            break
        last, found = found, max(0.0, float(rdp.compute_epsilon(orders, divergence, left)[0]))
        if distance == 0 or found <= last * (1 + 1e-12):
            return found
    raise Refused(f"delta {delta:g} is used up by the noise sampler's total variation, {distance:g} over all releases")


def skellam_divergence(event: SkellamRelease, orders: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Upper bound of the Renyi divergence of one release at integer ``orders`` [k] >= 2 (Agarwal et al. 2021, theorem 3.5)."""
    square = event.l2**2
    correction = np.minimum(
        ((2 * orders - 1) * square + 6 * event.l1) / (4 * event.mu**2), np.full(len(orders), 1.5 * event.l1 / event.mu)
    )
    return np.asarray(orders * square / (2 * event.mu) + correction, np.float64)
