"""The distributed mechanism: each client rounds its clipped vector to integers and adds its share of Skellam noise.

The sum modulo 2^b, all that a secure aggregation reveals, then carries noise of variance ``sigma^2`` or more (Agarwal, Kairouz
and Liu 2021, arXiv:2110.04995). With S the clipping norm, z the noise multiplier, d the padded dimension, g the granularity, n
the cohort, n_min the fewest survivors and C the corrupt clients among them, which never drop and add no noise:

- ``c~^2 = S^2 + g S + g^2 (d / 4 + sqrt(d) / 2)`` bounds the squared norm after rounding (Kairouz et al. 2021, arXiv:2102.06387,
  with beta = exp(-1/2)); ``sigma = z c~``; ``V = n / (n_min - C)``.
- g makes 4.5 standard deviations of a summed coordinate fit 2^b, were all n updates equal:
  ``g^2 4^b / 81 = n^2 S^2 / d + n g^2 / 4 + V sigma^2``. A sum beyond wraps: that costs accuracy, never privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused, RoundFailed
from fedcore.privacy.mechanisms import clip
from fedcore.privacy.randomness import RandomBytes
from fedcore.privacy.rotation import rotate, unrotate
from fedcore.privacy.sampler import TOTAL_VARIATION_PER_SAMPLE, sample_skellam, table_size

__all__ = ["LARGEST_DIMENSION", "WIDTHS", "SkellamPlan", "decode", "encode", "pack", "plan_skellam", "unpack"]

Doubles = npt.NDArray[np.float64]
WIDTHS = (16, 20, 24, 32)
LARGEST_DIMENSION = 2**28
_LARGEST_MSE = 1.02  # of V z^2 S^2: what central Gaussian noise sized for n_min - C of n clients would cost
_TRIES = 64
_TOLERANCE = 1e-9  # between one client's floating-point arithmetic and another's


@dataclass(frozen=True)
class SkellamPlan:
    """Public numbers of one round's mechanism. Made by `plan_skellam`; whoever receives one calls `check` before encoding.

    ``padded`` is the power of two at or above ``dimension``. In units of the granularity: ``squared_norm_bound`` on a client's
    integers before noise, ``noise_variance`` of one client's share, and ``mu``, the least variance of the released sum.
    """

    dimension: int
    padded: int
    clipping_norm: float
    noise_multiplier: float
    cohort: int
    minimum_survivors: int
    corrupt: int
    bits: int
    granularity: float
    squared_norm_bound: int
    noise_variance: float
    mu: float
    seed: bytes

    @property
    def l2(self) -> float:
        """L2 sensitivity of the sum in units of the granularity, zero-out adjacency: ``c~ / g``."""
        return math.sqrt(_rounded_squared_norm(self.clipping_norm, self.padded, self.granularity))

    @property
    def l1(self) -> float:
        """L1 sensitivity in the same units: an integer vector's L1 norm is at most its squared L2 norm."""
        return min(math.sqrt(self.padded) * self.l2, self.l2**2)

    @property
    def total_variation(self) -> float:
        """Distance t between the noise of one round and exact Skellam noise, over all coordinates of all clients.

        Where exact noise gives (epsilon, delta), this noise gives (epsilon, delta + (1 + exp(epsilon)) t).
        """
        return self.cohort * self.padded * TOTAL_VARIATION_PER_SAMPLE

    @property
    def relative_mse(self) -> float:
        """Predicted squared error of the full cohort's sum over ``V z^2 S^2``, that of central Gaussian noise.

        Rounding adds at most ``n g^2 / 4`` a coordinate. Left out, since it is the same at every width: a coordinate beyond its
        4.5 standard deviations wraps, which costs up to 5.5e-4 of its variance where all updates are equal.
        """
        variance = self.cohort / (self.minimum_survivors - self.corrupt) * self.mu + self.cohort / 4
        return variance * self.granularity**2 / self._central_variance

    @property
    def bytes(self) -> int:
        """Length of one packed contribution."""
        return -(-self.padded * self.bits // 8)

    @property
    def _central_variance(self) -> float:
        honest = self.minimum_survivors - self.corrupt
        return self.cohort / honest * (self.noise_multiplier * self.clipping_norm) ** 2

    def check(self) -> None:
        """Recompute what follows from the public numbers: a client trusts no granularity, norm bound or noise that it is sent.

        Raises:
            Refused: a number is not the one that follows (to 1e-9), or the numbers it follows from are impossible.
        """
        expected = plan_skellam(
            self.dimension, self.clipping_norm, self.noise_multiplier, self.cohort, self.minimum_survivors, self.corrupt, self.seed,
            self.bits,
        )  # fmt: skip
        for name in ("padded", "bits", "granularity", "squared_norm_bound", "noise_variance", "mu"):
            ours, theirs = getattr(expected, name), getattr(self, name)
            if not math.isclose(ours, theirs, rel_tol=_TOLERANCE):
                raise Refused(f"the plan's {name} is {theirs:.12g}, but its public numbers give {ours:.12g}")


def plan_skellam(
    dimension: int,
    clipping_norm: float,
    noise_multiplier: float,
    cohort: int,
    minimum_survivors: int,
    corrupt: int,
    seed: bytes,
    bits: int = 0,
) -> SkellamPlan:
    """The mechanism for vectors [dimension] of norm at most ``clipping_norm``; ``seed`` is public and sets the rotation.

    With ``bits`` 0 the width is the smallest of `WIDTHS` whose `SkellamPlan.relative_mse` is at most 1.02.

    Raises:
        Refused: numbers out of range; no width is accurate enough; the given width cannot hold the noise; a client's share of
            the noise is beyond what can be sampled.
    """
    _check_public_numbers(dimension, clipping_norm, noise_multiplier, cohort, minimum_survivors, corrupt, bits)

    def of_width(width: int) -> SkellamPlan | None:
        padded, honest = 1 << (dimension - 1).bit_length(), minimum_survivors - corrupt
        g = _granularity(padded, clipping_norm, noise_multiplier, cohort, honest, width)
        if g is None:
            return None
        squared = _rounded_squared_norm(clipping_norm, padded, g)
        mu = noise_multiplier**2 * squared
        share = math.nextafter(mu / honest, math.inf)  # so that rounding never makes the shares sum to less than mu
        return SkellamPlan(
            dimension, padded, clipping_norm, noise_multiplier, cohort, minimum_survivors, corrupt, width, g,
            math.floor(squared), share, mu, seed,
        )  # fmt: skip

    plans = [plan for width in ([bits] if bits else WIDTHS) if (plan := of_width(width))]
    if not plans:
        raise Refused(
            f"{bits or WIDTHS[-1]} bits cannot hold the noise of multiplier {noise_multiplier:g} over {dimension} values; "
            "use more bits, a smaller multiplier or a smaller model"
        )
    chosen = plans[0] if bits else next((plan for plan in plans if plan.relative_mse <= _LARGEST_MSE), None)
    if chosen is None:
        raise Refused(
            f"no width of {', '.join(map(str, WIDTHS))} bits keeps the squared error within {_LARGEST_MSE} of central noise; "
            f"{plans[-1].bits} bits give {plans[-1].relative_mse:.3g}: use a larger multiplier or a smaller cohort"
        )
    table_size(chosen.noise_variance)
    return chosen


def encode(plan: SkellamPlan, vector: Doubles, random: RandomBytes) -> npt.NDArray[np.uint32]:
    """One client's contribution [padded], integers modulo 2^b, with its share of the noise. ``vector`` [dimension] is clipped here.

    Raises:
        Refused: the vector has another length.
        ClientFailure: it holds values that are not finite.
    """
    if vector.shape != (plan.dimension,):
        raise Refused(f"the plan is for {plan.dimension} values, got an array of shape {vector.shape}")
    padded = np.zeros(plan.padded)
    padded[: plan.dimension] = clip(vector, plan.clipping_norm)
    scaled = rotate(padded, plan.seed)
    scaled /= plan.granularity
    integers = _round(scaled, plan.squared_norm_bound, random).astype(np.int64)
    integers += sample_skellam(plan.noise_variance, plan.padded, random)
    integers &= _mask(plan)
    return integers.astype(np.uint32)


def decode(plan: SkellamPlan, total: npt.NDArray[np.integer], survivors: int) -> Doubles:
    """The noised sum [dimension] of the survivors' clipped vectors, from the sum [padded] of contributions (modulo 2^b or not).

    Raises:
        RoundFailed: fewer survivors than the noise is sized for, or more than the cohort.
        Refused: the total is not an array of ``padded`` integers.
    """
    if not plan.minimum_survivors <= survivors <= plan.cohort:
        raise RoundFailed(
            f"a sum of {survivors} survivors is not decoded: the noise is sized for {plan.minimum_survivors} to {plan.cohort}"
        )
    if total.shape != (plan.padded,) or total.dtype.kind not in "iu":
        raise Refused(f"a sum of this plan has {plan.padded} integers, got shape {total.shape} of {total.dtype}")
    half = 1 << (plan.bits - 1)
    # int64 wraps modulo 2^64, which 2^b divides
    centred: Doubles = (((total.astype(np.int64) + half) & _mask(plan)) - half).astype(np.float64)
    centred *= plan.granularity
    return unrotate(centred, plan.seed)[: plan.dimension]


def pack(plan: SkellamPlan, integers: npt.NDArray[np.uint32]) -> bytes:
    """Integers [padded] as a little-endian bit string: value i takes the bits from ``i b``, the last byte is filled with zeros.

    Raises:
        Refused: another length, or a value outside [0, 2^b).
    """
    if integers.shape != (plan.padded,) or integers.dtype.kind not in "iu":
        raise Refused(f"a contribution to this plan has {plan.padded} integers, got shape {integers.shape} of {integers.dtype}")
    if int(integers.min()) < 0 or int(integers.max()) > _mask(plan):
        raise Refused(f"a contribution to this plan has integers of {plan.bits} bits, got {integers.min()} to {integers.max()}")
    if plan.bits == 20:
        pairs = np.zeros(-(-plan.padded // 2), "<u8")
        pairs |= integers[::2].astype(np.uint64)
        pairs[: plan.padded // 2] |= integers[1::2].astype(np.uint64) << np.uint64(20)
        return pairs.view(np.uint8).reshape(-1, 8)[:, :5].tobytes()[: plan.bytes]
    return integers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : plan.bits // 8].tobytes()


def unpack(plan: SkellamPlan, data: bytes) -> npt.NDArray[np.uint32]:
    """Inverse of `pack`.

    Raises:
        Refused: another length, or bits set behind the last value.
    """
    if len(data) != plan.bytes:
        raise Refused(f"a contribution to this plan has {plan.bytes} bytes, got {len(data)}")
    if plan.bits == 20:
        pairs = np.zeros((-(-plan.padded // 2), 8), np.uint8)
        pairs[:, :5] = np.frombuffer(data.ljust(5 * len(pairs), b"\0"), np.uint8).reshape(-1, 5)
        words = pairs.reshape(-1).view("<u8")
        values = np.stack([words & np.uint64(_mask(plan)), words >> np.uint64(20)], axis=1).reshape(-1)
        if values[plan.padded :].any():
            raise Refused("a contribution has bits set behind its last value")
        return values[: plan.padded].astype(np.uint32)
    columns = np.zeros((plan.padded, 4), np.uint8)
    columns[:, : plan.bits // 8] = np.frombuffer(data, np.uint8).reshape(plan.padded, -1)
    return columns.reshape(-1).view("<u4").astype(np.uint32)


def _check_public_numbers(
    dimension: int, clipping_norm: float, noise_multiplier: float, cohort: int, minimum_survivors: int, corrupt: int, bits: int
) -> None:
    if not 1 <= dimension <= LARGEST_DIMENSION:
        raise Refused(f"the dimension must be 1 to {LARGEST_DIMENSION}, got {dimension}")
    for name, value in (("clipping norm", clipping_norm), ("noise multiplier", noise_multiplier)):
        if not (math.isfinite(value) and value > 0):
            raise Refused(f"the {name} must be a positive number, got {value}")
    if not 0 <= corrupt < minimum_survivors <= cohort:
        raise Refused(
            f"corrupt clients ({corrupt}) must be fewer than the minimum of survivors ({minimum_survivors}), "
            f"and those at most the cohort ({cohort})"
        )
    if bits not in (0, *WIDTHS):
        raise Refused(f"the width must be {', '.join(map(str, WIDTHS))} bits, or 0 for automatic, got {bits}")


def _granularity(padded: int, clipping_norm: float, noise_multiplier: float, cohort: int, honest: int, bits: int) -> float | None:
    """The positive root of ``A g^2 - B g - E = 0``, or None where A <= 0: no granularity makes the noise fit."""
    noise = cohort / honest * noise_multiplier**2  # V z^2
    a = 4.0**bits / 81 - cohort / 4 - noise * (padded / 4 + math.sqrt(padded) / 2)
    b = noise * clipping_norm
    e = (cohort**2 / padded + noise) * clipping_norm**2
    return (b + math.sqrt(b * b + 4 * a * e)) / (2 * a) if a > 0 else None


def _rounded_squared_norm(clipping_norm: float, padded: int, granularity: float) -> float:
    """``c~^2 / g^2``."""
    scaled = clipping_norm / granularity
    return scaled * scaled + scaled + padded / 4 + math.sqrt(padded) / 2


def _round(scaled: Doubles, squared_norm_bound: int, random: RandomBytes) -> Doubles:
    """Integers whose expectation is ``scaled``, given that their squared norm keeps the bound."""
    for _ in range(_TRIES):
        integers = np.frombuffer(random(4 * scaled.size), "<u4") * 2.0**-32
        integers += scaled
        np.floor(integers, out=integers)
        if _squared_norm(integers) <= squared_norm_bound:
            return integers
    return np.trunc(scaled)  # shorter than the vector itself, which the bound exceeds


def _squared_norm(integers: Doubles) -> int:
    """Exact: a float64 sum of squares that stays below 2^53 was never rounded, since it only grows."""
    fast = float(np.einsum("i,i->", integers, integers))
    return int(fast) if fast < 2**53 else sum(value * value for value in map(int, integers.tolist()))


def _mask(plan: SkellamPlan) -> int:
    return (1 << plan.bits) - 1
