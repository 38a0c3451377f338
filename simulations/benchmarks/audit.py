"""The reported epsilon beside an empirical lower bound: how well can a canary be told from its absence?

`canaries` gives a number a trial, from what the unit's adversary sees, with the canary and without it. Some trials choose a
threshold, others count the errors of deciding by it; Clopper-Pearson intervals make them bounds of stated confidence:

- Curve: by f-DP, a mechanism allows pairs of error rates down to its trade-off curve (Dong et al. 2019, arXiv:1905.02383). The
  bound is the epsilon of the same mechanism with as much more noise as the errors still allow; without sampling that is a Gaussian
  of some separation (Nasr et al. 2023, arXiv:2302.07956). It has the power to come close to the report. Skellam noise of
  variance v is taken for Gaussian, from which it differs by an excess kurtosis of 1 / v, with v in the thousands here.
- Direct: ``ln((1 - miss - delta) / false alarm)`` and the same with the errors swapped (Jagielski et al. 2020, arXiv:2006.07709).
  It assumes nothing, and needs more than e^epsilon trials.

A bound above the report refutes the report. Rows that are broken on purpose must be refuted: an audit that cannot fail shows
nothing. The exit status is 1 if a row is not as it should be.

    python -m simulations.benchmarks.audit --trials 3000
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaincinv, log_ndtr, ndtri

from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import Event, GaussianRelease
from simulations.benchmarks.canaries import DELTA, Case, Doubles, cases

__all__ = ["Errors", "Finding", "audit", "curve_bound", "direct_bound", "errors", "gaussian_epsilon"]

_SPAN = 8.0


@dataclass(frozen=True)
class Errors:
    """Upper confidence bounds of both error rates of a test for the canary; together they hold at the confidence asked for."""

    false_alarm: float
    miss: float


@dataclass(frozen=True)
class Finding:
    """A row of the table: epsilon as it is reported, and its lower bounds."""

    unit: str
    mechanism: str
    broken: str
    reported: float
    curve: float
    direct: float

    @property
    def lower_bound(self) -> float:
        """The better bound."""
        return max(self.curve, self.direct)

    @property
    def refuted(self) -> bool:
        """Whether the canary was told from its absence better than the report allows."""
        return self.lower_bound > self.reported


def audit(case: Case, trials: int, confidence: float = 0.99) -> Finding:
    """Tell the canary from its absence in ``trials`` trials of each kind, and half as many before to choose the threshold."""
    chosen, counted = range(trials // 2), range(trials // 2, trials // 2 + trials)
    threshold = _best_threshold(case.scores(True, chosen), case.scores(False, chosen), confidence)
    found = errors(case.scores(True, counted), case.scores(False, counted), threshold, confidence)
    curve, direct = curve_bound(found, case.step, case.steps, DELTA), direct_bound(found, DELTA)
    return Finding(case.unit, case.mechanism, case.broken, case.epsilon, curve, direct)


def errors(present: Doubles, absent: Doubles, threshold: float, confidence: float) -> Errors:
    """Clopper-Pearson bounds of the errors of calling the canary present where a score is above ``threshold``."""
    sure = (1 + confidence) / 2  # both bounds hold together by the union bound
    wrong = ((np.count_nonzero(absent > threshold), len(absent)), (np.count_nonzero(present <= threshold), len(present)))
    return Errors(*(float(betaincinv(count + 1, n - count, sure)) if count < n else 1.0 for count, n in wrong))


def direct_bound(found: Errors, delta: float) -> float:
    """Epsilon at ``delta`` that any mechanism with these errors, or smaller ones, exceeds."""
    pairs = ((found.false_alarm, found.miss), (found.miss, found.false_alarm))
    return max([0.0, *(math.log((1 - other - delta) / one) for one, other in pairs if 1 - other > delta)])


def curve_bound(found: Errors, step: GaussianRelease, steps: int, delta: float) -> float:
    """Epsilon at ``delta`` of ``steps`` steps like ``step`` with the most noise that allows these errors, up to `_SPAN` times more
    or less than its own; 0 where no noise in that range forbids them.

    Without sampling the curve is a Gaussian's and the noise follows; with it, the privacy loss distribution gives points of it.
    """
    if step.sampling_rate is None:
        return gaussian_epsilon(_separation(found), delta)
    deltas = np.geomspace(1e-6, 0.9, 30).tolist()
    needed = [direct_bound(found, one) for one in deltas]

    def events(factor: float) -> dict[Event, int]:
        return {dataclasses.replace(step, noise_multiplier=step.noise_multiplier * _SPAN**factor): steps}

    def allowed(factor: float) -> bool:
        return all(epsilon(events(factor), one) >= least for one, least in zip(deltas, needed, strict=True) if least)

    low, high = -1.0, 1.0
    if allowed(high):
        return 0.0
    if not allowed(low):
        return epsilon(events(low), delta)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return epsilon(events(high), delta)  # forbidden: so that rounding in the search makes the bound smaller


def gaussian_epsilon(separation: float, delta: float) -> float:
    """Epsilon of telling N(0, 1) from N(``separation``, 1): the root of ``Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m) = delta``
    (Balle and Wang 2018, arXiv:1805.06530); 0 where none is needed."""

    def excess(eps: float) -> float:
        first, second = log_ndtr(separation / 2 - eps / separation), eps + log_ndtr(-separation / 2 - eps / separation)
        return float(np.exp(first) - np.exp(second)) - delta

    if separation <= 0 or excess(0) <= 0:
        return 0.0
    return float(brentq(excess, 0, separation * (separation + 40), xtol=1e-9))


def _separation(found: Errors) -> float:
    """Of the two Gaussians of variance 1 that are told apart with these errors."""
    return float(-ndtri(found.false_alarm) - ndtri(found.miss))


def _best_threshold(present: Doubles, absent: Doubles, confidence: float) -> float:
    candidates = np.quantile(np.concatenate([present, absent]), np.linspace(0, 1, 201))
    return float(max(candidates, key=lambda threshold: _separation(errors(present, absent, threshold, confidence))))


def main() -> None:
    """Parse, audit, print."""
    parser = argparse.ArgumentParser(description="Reported epsilon beside an empirical lower bound from canaries.")
    parser.add_argument("--trials", type=int, default=3000, help="counted trials with the canary, and as many without it")
    parser.add_argument("--confidence", type=float, default=0.99, help="confidence of each lower bound")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.json:
        print(f"delta = {DELTA:g}, {given.trials} + {given.trials} trials, confidence {given.confidence:g}\n")
        print("| unit | mechanism | broken on purpose | reported epsilon | lower bound | direct bound | verdict |")
        print("|---|---|---|---|---|---|---|")
    unexpected = 0
    for case in cases():
        found = audit(case, given.trials, given.confidence)
        unexpected += found.refuted != bool(case.broken)
        print(json.dumps(_row(found)) if given.json else _line(found), flush=True)
    sys.exit(1 if unexpected else 0)


def _row(found: Finding) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"lower_bound": found.lower_bound, "refuted": found.refuted}


def _line(found: Finding) -> str:
    verdict = ("refuted" if found.refuted else "holds") + ("" if found.refuted == bool(found.broken) else ", unexpected")
    numbers = f"{found.reported:.3f} | {found.lower_bound:.3f} | {found.direct:.3f}"
    return f"| {found.unit} | {found.mechanism} | {found.broken} | {numbers} | {verdict} |"


if __name__ == "__main__":
    main()
