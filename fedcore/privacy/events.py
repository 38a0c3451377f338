"""Privacy events: facts about one round, from which `accountant` derives what they cost. Anything else is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedcore.errors import Refused

__all__ = [
    "LEAST_SAMPLED_NOISE", "MOST_STEPS", "NOISE_RANGE", "DpSgd", "Event", "GaussianRelease", "SkellamRelease", "check_number",
    "event_from_table", "event_to_table", "is_amplified", "without_amplification",
]  # fmt: skip

NOISE_RANGE = (0.01, 1e5)
MOST_STEPS = 10_000_000
LEAST_SAMPLED_NOISE = 0.15  # with less, one draw of an example costs an epsilon above 50, and sampling hides next to nothing


@dataclass(frozen=True)
class GaussianRelease:
    """A sum over a cohort, each client clipped to norm S, released with Gaussian noise of deviation ``noise_multiplier`` * S.

    ``sampling_rate`` is the bias of the one secret coin that every registered client tossed for this round (Poisson sampling).
    None, or 0, or 1, say that no amplification may be claimed, as for cohorts of a fixed size.
    """

    noise_multiplier: float
    sampling_rate: float | None = None

    def __post_init__(self) -> None:
        _set_number(self, "noise_multiplier", *NOISE_RANGE)
        if self.sampling_rate is not None:
            _set_number(self, "sampling_rate", 0 if self.sampling_rate == 0 else 1e-9, 1)
            if self.sampling_rate in {0, 1}:
                object.__setattr__(self, "sampling_rate", None)


@dataclass(frozen=True)
class SkellamRelease:
    """An integer sum released with Skellam noise of total variance ``mu``; a client moves it by at most ``l2`` and ``l1``.

    In units of the granularity g: l2 = c~/g, l1 = min(sqrt(d) l2, l2^2), mu = sigma^2/g^2. ``noise_multiplier`` is sigma/c~,
    and a larger one than mu and l2 bear out is refused. ``total_variation`` is the distance of the sampled noise, over the whole
    vector, from the exact distribution. No amplification is ever claimed for it.
    """

    noise_multiplier: float
    l2: float
    l1: float
    mu: float
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        _set_number(self, "noise_multiplier", *NOISE_RANGE)
        _set_number(self, "l2", 1e-9, 1e15)
        _set_number(self, "l1", min(self.l2, self.l2**2) * (1 - 1e-9), 1e30)
        _set_number(self, "mu", 1e-9, 1e30)
        _set_number(self, "total_variation", 0, 1)
        borne_out = math.sqrt(self.mu) / self.l2
        if self.noise_multiplier > borne_out * (1 + 1e-6):
            raise Refused(
                f"noise multiplier {self.noise_multiplier:g} is more than sqrt(mu)/l2 = {borne_out:.6g}, which the noise bears out"
            )


@dataclass(frozen=True)
class DpSgd:
    """One client's local training by DP-SGD in one round: epochs * m steps, each on a Poisson sample of rate 1/m.

    ``batches`` is the public minimum of m over clients. What is charged is the costliest m from there on: epsilon falls with m,
    except that a few steps with little noise cost the most at an m above 1 (sigma 0.6, one epoch: 8.0 at 1, 10.5 at 3).
    """

    noise_multiplier: float
    batches: int
    epochs: int

    def __post_init__(self) -> None:
        _set_number(self, "noise_multiplier", *NOISE_RANGE)
        check_number("batches", self.batches, 1, MOST_STEPS, whole=True)
        check_number("epochs", self.epochs, 1, MOST_STEPS, whole=True)


Event = GaussianRelease | SkellamRelease | DpSgd
_KINDS: dict[str, type[Event]] = {"gaussian_release": GaussianRelease, "skellam_release": SkellamRelease, "dp_sgd": DpSgd}


def event_to_table(event: Event) -> dict[str, Any]:
    """The event as a JSON table with its ``kind``."""
    kind = next(name for name, cls in _KINDS.items() if type(event) is cls)
    return {"kind": kind, **dataclasses.asdict(event)}


def event_from_table(table: Any) -> Event:
    """Inverse of `event_to_table`.

    Raises:
        Refused: a kind, a field or a value that this version does not know; what cannot be accounted is never passed over.
    """
    kind = _KINDS.get(str(table.get("kind"))) if isinstance(table, Mapping) else None
    if kind is None:
        raise Refused(f"unknown privacy event {str(table)[:80]!r}; known kinds: {', '.join(_KINDS)}")
    fields = {name: value for name, value in table.items() if name != "kind"}
    if fields.keys() != {field.name for field in dataclasses.fields(kind)}:
        raise Refused(f"privacy event {table['kind']} with fields {', '.join(sorted(fields)) or 'none'}: not those of its kind")
    return kind(**fields)


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """``value``, or Refused when it is not a finite number (an integer where ``whole``) in [low, high]."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        upper = "below 1" if high == math.nextafter(1, 0) else f"{high:g}"
        raise Refused(f"{name} must be {'an integer' if whole else 'a number'} from {low:g} to {upper}, got {str(value)[:40]}")
    return value


def _set_number(event: Any, name: str, low: float, high: float) -> None:
    """Check a field, and make it a float so that equal events read the same in JSON."""
    object.__setattr__(event, name, float(check_number(name.replace("_", " "), getattr(event, name), low, high)))


def without_amplification(event: Event) -> Event:
    """The event as someone sees it who knows which clients took part in the round."""
    return GaussianRelease(event.noise_multiplier) if isinstance(event, GaussianRelease) else event


def is_amplified(event: Event) -> bool:
    """Whether the event concerns every registered client, by a secret coin, and costs each the less for it."""
    return isinstance(event, GaussianRelease) and event.sampling_rate is not None
