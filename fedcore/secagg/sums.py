"""What clients add up where the sum is all that anybody sees and no noise is asked for: integers modulo 2^b, exact.

Everything that a client says is a coordinate: its weight, its loss, whether its training failed. `privacy.release.Release` is the
same with noise; the three are made, sent, accepted and published through the same methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.privacy.mechanisms import Means
from fedcore.privacy.randomness import RandomBytes
from fedcore.privacy.release import Release
from fedcore.secagg.masks import WIDTHS, packed_length
from fedcore.secagg.messages import MetricBlock

__all__ = ["LARGEST_LOSS", "ScoreSum", "Scores", "Summation", "UpdateSum", "header_numbers", "plan_update_sum", "sum_from_table"]

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.uint32]
LARGEST_LOSS = 16.0
"""A mean loss, in nats or of squared errors, is clipped to this before it is added up."""
_LEAST, _FEWEST = 16, 8  # bits of an update's coordinate: what an automatic width leaves, and what any must
_BINS = 20  # of the histogram of clients' accuracies


class _Table:
    """Public numbers that travel as scalars under a prefix, and are equal where all of them are."""

    _prefix = ""

    def to_table(self) -> dict[str, Any]:
        """The numbers as scalars by name, for a message."""
        return {f"{self._prefix}{key.name.replace('_', '-')}": getattr(self, key.name) for key in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self | None:
        """Inverse of `to_table`; None where the table holds no such numbers.

        Raises:
            Refused: a number is missing or impossible.
        """
        names = [key.name for key in fields(cls)]  # type: ignore[arg-type]
        found = {name: table[key] for name in names if (key := f"{cls._prefix}{name.replace('_', '-')}") in table}
        if not found:
            return None
        if len(found) < len(names):
            raise Refused(f"training configuration: {cls._prefix}{'/'.join(sorted(set(names) - set(found)))} is missing")
        return cls(**found)


@dataclass(frozen=True)
class UpdateSum(_Table):
    """The example-weighted sum of updates [dimension]; made by `plan_update_sum`.

    A coordinate is clipped to [-``clip``, ``clip``] and rounded stochastically to ``coordinate_bits``; the client's integers are
    those times its weight, min(examples, ``weight_cap``), then the weight itself, weight times loss, and 1 where training failed.
    At most ``cohort`` clients add up, at least ``minimum_survivors``.
    """

    _prefix = "sum-"
    BLOCKS = ("examples", "train_loss", "failed")

    dimension: int
    cohort: int
    minimum_survivors: int
    clip: float
    weight_cap: int
    bits: int

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise Refused(f"an update's coordinates are clipped to a positive number, got {self.clip}")
        if self.coordinate_bits < _FEWEST:
            raise Refused(
                f"{self.bits} bits leave {self.coordinate_bits} for a coordinate in the sum of {self.cohort} updates of weights up "
                f"to {self.weight_cap}; it takes {_FEWEST}: use more bits"
            )

    @property
    def coordinate_bits(self) -> int:
        """Bits of a rounded coordinate: what the sum over the cohort and the weights leave of the width."""
        return self.bits - _bit_length(self.cohort) - _bit_length(self.weight_cap)

    @property
    def granularity(self) -> float:
        """The step to which coordinates are rounded."""
        return self.clip / self._largest

    @property
    def size(self) -> int:
        """Numbers in a contribution and in the sum."""
        return self.dimension + len(self.BLOCKS)

    @property
    def bytes(self) -> int:
        """Length of a contribution as it travels."""
        return packed_length(self.size, self.bits)

    @property
    def counted(self) -> bool:
        """The number of survivors is public."""
        return True

    @property
    def _largest(self) -> int:
        return (1 << (self.coordinate_bits - 1)) - 1

    def contribution(self, update: npt.NDArray[np.floating], examples: int, loss: float, random: RandomBytes) -> Integers:
        """What a client sends [size], integers modulo 2^b, before masks.

        Raises:
            ClientFailure: update or loss is not finite.
        """
        if update.shape != (self.dimension,):
            raise Refused(f"an update of this sum has {self.dimension} values, got an array of shape {update.shape}")
        if not (np.isfinite(update).all() and math.isfinite(loss)):
            raise ClientFailure("the update or the training loss is not finite")
        weight = min(examples, self.weight_cap)
        scaled = np.clip(update.astype(np.float64), -self.clip, self.clip) / self.granularity
        scaled += np.frombuffer(random(4 * self.dimension), "<u4") * 2.0**-32  # rounds to the next one with the right chance
        loss_steps = round(min(max(loss, 0.0), LARGEST_LOSS) / LARGEST_LOSS * self._largest)
        integers = np.zeros(self.size, np.int64)
        integers[: self.dimension] = np.clip(np.floor(scaled), -self._largest, self._largest).astype(np.int64) * weight
        integers[self.dimension :] = weight, weight * loss_steps, 0
        return (integers & _mask(self.bits)).astype(np.uint32)

    def why_unfit(self, mean: Doubles, survivors: int) -> str:
        """Why ``clip`` does not suit a mean update [dimension], for a person; empty where it does.

        Far below the update's values it leaves their signs; far above, the rounding of ``survivors`` clients outweighs them.
        """
        size, share = float(np.sqrt(np.mean(np.square(mean)))), math.sqrt(survivors)
        if size > self.clip / (2 * share):
            return f"secagg.clip = {self.clip:g} cuts off most of what clients send; raise it"
        if size < self.granularity / share:
            return f"secagg.clip = {self.clip:g} rounds clients' values to {self.granularity:.1g}, as much as the update; lower it"
        return ""

    def nothing(self, random: RandomBytes) -> Integers:  # noqa: ARG002 - as of sums with noise
        """What a client sends [size] whose training failed: weight zero, so that who drops does not depend on data."""
        integers = np.zeros(self.size, np.uint32)
        integers[-1] = 1
        return integers

    def accept(self, sent: npt.NDArray[Any]) -> Doubles:
        """The summand [size] for what a client sent; up to 2^21 of them add up exactly.

        Raises:
            ClientFailure: not a contribution to this sum.
        """
        return _accept(sent, self.size, self.bits)

    def publish(self, total: Doubles, survivors: int, random: RandomBytes) -> Means:  # noqa: ARG002 - as of sums with noise
        """The weighted means from the sum [size] of ``survivors`` contributions (modulo 2^b or not).

        Raises:
            RoundFailed: fewer survivors than declared, or no client had anything to say.
        """
        _check_survivors(self, survivors)
        sums = _centred(total, self.bits)
        weight, loss, failed = sums[self.dimension :].tolist()
        if weight <= 0:
            raise RoundFailed(f"the training of all {survivors} clients failed, or what they sent adds up to nothing")
        _check_possible(weight <= survivors * self.weight_cap and 0 <= failed <= survivors and 0 <= loss <= weight * self._largest)
        mean = sums[: self.dimension] * (self.granularity / weight)
        return Means(mean, None, loss / weight / self._largest * LARGEST_LOSS, int(weight), int(failed))


@dataclass(frozen=True)
class Scores:
    """What the sum of evaluations says: accuracy and loss over ``examples``, and ``histogram`` [20] of the clients' accuracies."""

    examples: int
    accuracy: float
    loss: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class ScoreSum(_Table):
    """The sum of clients' scores on their own examples: examples, correct predictions, loss, and a histogram of accuracies.

    A client counts ``weight_cap`` examples at most, in proportion.
    """

    _prefix = "scores-"
    BLOCKS = ("examples", "correct", "loss", *(f"accuracy_{i:02d}" for i in range(_BINS)))

    cohort: int
    minimum_survivors: int
    weight_cap: int
    bits: int = 32

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.cohort * self.weight_cap >= 1 << (self.bits - 1):
            raise Refused(f"{self.bits} bits cannot hold the scores of {self.cohort} clients of {self.weight_cap} examples")

    @property
    def granularity(self) -> float:
        """The step to which a client's summed loss is rounded."""
        # One step a client is left free, so that rounding never carries the largest sum around.
        return self.cohort * self.weight_cap * LARGEST_LOSS / ((1 << (self.bits - 1)) - self.cohort)

    @property
    def clip(self) -> float:
        """The largest mean loss."""
        return LARGEST_LOSS

    @property
    def size(self) -> int:
        """Numbers in a contribution and in the sum."""
        return len(self.BLOCKS)

    @property
    def bytes(self) -> int:
        """Length of a contribution as it travels."""
        return packed_length(self.size, self.bits)

    def contribution(self, examples: int, correct: int, loss_sum: float) -> Integers:
        """What a client sends [size]; zeros where it has no examples or its loss is not finite."""
        integers = np.zeros(self.size, np.uint32)
        if not examples or not math.isfinite(loss_sum):
            return integers
        share = min(examples, self.weight_cap) / examples
        mean = min(max(loss_sum / examples, 0.0), LARGEST_LOSS)
        integers[0] = round(share * examples)
        integers[1] = round(share * correct)
        integers[2] = round(share * examples * mean / self.granularity)
        integers[3 + min(_BINS - 1, _BINS * correct // examples)] = 1
        return integers

    def accept(self, sent: npt.NDArray[Any]) -> Doubles:
        """The summand [size] for what a client sent.

        Raises:
            ClientFailure: not a contribution to this sum.
        """
        return _accept(sent, self.size, self.bits)

    def publish(self, total: Doubles, survivors: int) -> Scores:
        """The scores from the sum [size] of ``survivors`` contributions.

        Raises:
            RoundFailed: fewer survivors than declared, or nobody had examples.
        """
        _check_survivors(self, survivors)
        examples, correct, loss, *histogram = _centred(total, self.bits).astype(np.int64).tolist()
        if examples <= 0:
            raise RoundFailed(f"none of {survivors} clients had examples to evaluate on")
        counts = sum(histogram) <= survivors and min(histogram) >= 0 and max(histogram) > 0
        most = examples * LARGEST_LOSS / self.granularity + survivors  # each client's loss is rounded once
        _check_possible(counts and examples <= survivors * self.weight_cap and 0 <= correct <= examples and 0 <= loss <= most)
        return Scores(examples, correct / examples, loss * self.granularity / examples, tuple(histogram))


Summation = Release | UpdateSum | ScoreSum


def plan_update_sum(
    dimension: int, cohort: int, *, minimum_survivors: int, clip: float, weight_cap: int, bits: int = 0
) -> UpdateSum:  # fmt: skip
    """The sum of at most ``cohort`` updates; with ``bits`` 0 of the smallest width that leaves a coordinate 16 bits.

    Raises:
        Refused: numbers out of range, or no width is wide enough.
    """
    needed = _LEAST + _bit_length(cohort) + _bit_length(weight_cap)
    width = bits or next((width for width in WIDTHS if width >= needed), None)
    if width is None:
        raise Refused(
            f"the sum of {cohort} updates of weights up to {weight_cap} needs {needed} bits, more than {WIDTHS[-1]}: lower the "
            "largest weight (secagg.weight_cap), or split the cohort (secagg.shards)"
        )
    return UpdateSum(dimension, cohort, minimum_survivors, clip, weight_cap, width)


def sum_from_table(table: Mapping[str, Any]) -> Summation | None:
    """What a training configuration says of how contributions are summed; None where each travels in the clear.

    Raises:
        Refused: a number is missing or impossible.
    """
    return Release.from_table(table) or UpdateSum.from_table(table) or ScoreSum.from_table(table)


def header_numbers(summation: Summation) -> dict[str, Any]:
    """What a plan's header says of a sum, by the header's names.

    Raises:
        Refused: contributions are real numbers, which nothing masks.
    """
    if isinstance(summation, Release):
        joint, shares = summation.joint, summation.shares
        if shares is None:
            raise Refused("noise on the sum by the coordinator is no sum of integers; secure aggregation needs the clients' shares")
        blocks = [name for name, scale in (("unclipped", joint.bit_scale), ("train_loss", joint.loss_scale)) if scale]
        numbers = {
            "planned": shares.cohort, "minimum_survivors": shares.minimum_survivors, "dimension": shares.dimension,
            "clipping_norm": shares.clipping_norm, "noise_multiplier": shares.noise_multiplier,
            "granularity": shares.granularity, "squared_norm_bound": shares.squared_norm_bound,
        }  # fmt: skip
    else:
        blocks = list(summation.BLOCKS)
        numbers = {
            "planned": summation.cohort, "minimum_survivors": summation.minimum_survivors, "dimension": summation.size,
            "clipping_norm": summation.clip, "noise_multiplier": 0.0, "granularity": summation.granularity,
            "squared_norm_bound": 0,
        }  # fmt: skip
    return {**numbers, "bits": summation.bits, "layout": tuple(MetricBlock(name, 1) for name in blocks)}


def _check_numbers(numbers: UpdateSum | ScoreSum) -> None:
    for name in ("cohort", "minimum_survivors", "weight_cap", "bits"):
        value = getattr(numbers, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refused(f"a sum's {name.replace('_', ' ')} is an integer >= 1, got {value!r}")
    if numbers.bits not in WIDTHS:
        raise Refused(f"the width must be {', '.join(map(str, WIDTHS))} bits, got {numbers.bits}")
    if numbers.minimum_survivors > numbers.cohort:
        raise Refused(f"{numbers.minimum_survivors} survivors are more than the cohort of {numbers.cohort}")


def _check_survivors(numbers: UpdateSum | ScoreSum, survivors: int) -> None:
    if not numbers.minimum_survivors <= survivors <= numbers.cohort:
        raise RoundFailed(
            f"a sum of {survivors} survivors is not read: it takes {numbers.minimum_survivors} to {numbers.cohort} of them"
        )


def _check_possible(possible: bool) -> None:
    if not possible:
        raise RoundFailed("some client sent numbers that no client can have; in a sum nobody can be seen, and the sum is not used")


def _accept(sent: npt.NDArray[Any], size: int, bits: int) -> Doubles:
    if sent.shape != (size,) or sent.dtype.kind != "u":
        raise ClientFailure(f"a contribution has {size} unsigned integers, got {sent.dtype} of shape {sent.shape}")
    return (sent & np.uint64(_mask(bits))).astype(np.float64)


def _centred(total: Doubles, bits: int) -> Doubles:
    """The sum modulo 2^b, in [-2^(b-1), 2^(b-1))."""
    half = 1 << (bits - 1)
    return (((total.astype(np.int64) + half) & _mask(bits)) - half).astype(np.float64)


def _bit_length(most: int) -> int:
    """ceil(log2 n)"""
    return (most - 1).bit_length()


def _mask(bits: int) -> int:
    return (1 << bits) - 1
