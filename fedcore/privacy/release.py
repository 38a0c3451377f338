"""One round's release under the unit `client`: how a client makes its contribution, and what may be learnt of their sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import ClientFailure, Refused
from fedcore.privacy.mechanisms import JointVector, Means, bit_scale, clip, gaussian_noise, weight
from fedcore.privacy.randomness import RandomBytes
from fedcore.privacy.skellam import SkellamPlan, decode, encode, plan_skellam

__all__ = ["Contribution", "Release", "plan_release"]

Doubles = npt.NDArray[np.float64]
Contribution = npt.NDArray[np.float32] | npt.NDArray[np.uint32]
_LOSS_SHARE = 1 / 8  # of the clipping norm: the loss then adds 0.8 % to the norm bound, and so to the noise on the update
_PREFIX = "release-"


@dataclass(frozen=True)
class Release:
    """The public numbers of a round. ``cohort`` clients are planned, and are the denominator whoever replies; an update is
    weighted with its examples up to ``weight_cap`` (0: all weigh 1). With ``shares`` every client adds its share of the noise;
    without, whoever holds the sum adds it.
    """

    joint: JointVector
    noise_multiplier: float
    cohort: int
    weight_cap: int
    shares: SkellamPlan | None = None

    @property
    def size(self) -> int:
        """Numbers in a contribution and in the sum."""
        return self.shares.padded if self.shares else self.joint.size

    @property
    def bytes(self) -> int:
        """Length of a contribution as it travels."""
        return self.shares.bytes if self.shares else 4 * self.size

    @property
    def bits(self) -> int:
        """Width of the integers that clients send modulo 2^b; 0 where they send real numbers."""
        return self.shares.bits if self.shares else 0

    @property
    def counted(self) -> bool:
        """Whether the guarantee takes the number of survivors to be public."""
        return self.shares is not None

    def contribution(self, update: npt.NDArray[np.floating], examples: int, loss: float, random: RandomBytes) -> Contribution:
        """What a client sends [size]: weighted, clipped, and integers with its share of the noise where there are ``shares``.

        Raises:
            ClientFailure: update or loss is not finite.
        """
        vector = self.joint.encode(update.astype(np.float64) * weight(examples, self.weight_cap), loss)
        return encode(self.shares, vector, random) if self.shares else vector.astype(np.float32)

    def nothing(self, random: RandomBytes) -> Contribution:
        """What a client sends [size] that has nothing to say: zeros, which count as half a clipping bit and half the loss cap."""
        zeros = np.zeros(self.joint.size)
        return encode(self.shares, zeros, random) if self.shares else zeros.astype(np.float32)

    def accept(self, sent: npt.NDArray[Any]) -> Doubles:
        """The summand [size] for what a client sent, which may be anything. Up to 2^21 summands of shares add up exactly.

        Raises:
            ClientFailure: not a contribution to this release.
        """
        kind = "u" if self.shares else "f"
        if sent.shape != (self.size,) or sent.dtype.kind != kind:
            raise ClientFailure(f"a contribution has {self.size} numbers of kind {kind}, got {sent.dtype} of shape {sent.shape}")
        if self.shares:
            return (sent & np.uint64(2**self.shares.bits - 1)).astype(np.float64)
        return clip(sent, self.joint.norm_bound)  # not only a hostile client exceeds it: so does rounding to float32

    def publish(self, total: Doubles, survivors: int, random: RandomBytes) -> Means:
        """What anybody may know of the sum [size] of ``survivors`` contributions; noised with ``random`` if not yet noised.

        Raises:
            RoundFailed: fewer survivors than the shares of noise are sized for.
        """
        if self.shares:
            return self.joint.decode(decode(self.shares, total.astype(np.int64), survivors), self.cohort, survivors)
        noise = gaussian_noise(self.joint.norm_bound, self.noise_multiplier, self.size, random)
        return self.joint.decode(total + noise, self.cohort)

    def to_table(self) -> dict[str, Any]:
        """The numbers as scalars by name, for a message; what follows from them is recomputed by whoever reads it."""
        joint, shares = self.joint, self.shares
        table: dict[str, Any] = {
            "dimension": joint.dimension, "clipping-norm": joint.clipping_norm, "bit-scale": joint.bit_scale,
            "loss-scale": joint.loss_scale, "loss-cap": joint.loss_cap, "noise-multiplier": self.noise_multiplier,
            "cohort": self.cohort, "weight-cap": self.weight_cap,
        }  # fmt: skip
        if shares:
            table |= {
                "minimum-survivors": shares.minimum_survivors, "corrupt": shares.corrupt, "seed": shares.seed, "bits": shares.bits,
            }  # fmt: skip
        return {_PREFIX + name: value for name, value in table.items()}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Release | None:
        """Inverse of `to_table`; None where the table holds no release.

        Raises:
            Refused: a number is missing or impossible.
        """
        numbers = {name.removeprefix(_PREFIX): value for name, value in table.items() if name.startswith(_PREFIX)}
        if not numbers:
            return None
        try:
            joint = JointVector(
                numbers["dimension"], numbers["clipping-norm"], numbers["bit-scale"], numbers["loss-scale"], numbers["loss-cap"]
            )
            noise, cohort = numbers["noise-multiplier"], numbers["cohort"]
            shares = None
            if "bits" in numbers:
                survivors, corrupt = numbers["minimum-survivors"], numbers["corrupt"]
                shares = _shares(joint, noise, cohort, survivors, corrupt, numbers["seed"], numbers["bits"])
            return cls(joint, noise, cohort, numbers["weight-cap"], shares)
        except (KeyError, TypeError) as error:
            raise Refused(f"training configuration: the numbers of the release do not fit: {error}") from error


def plan_release(
    dimension: int,
    clipping_norm: float,
    noise_multiplier: float,
    cohort: int,
    *,
    weight_cap: int = 0,
    bit_noise: float = 0.0,
    loss_cap: float = 0.0,
    shares: tuple[int, int, bytes] | None = None,
) -> Release:
    """The release of updates [dimension] clipped to ``clipping_norm``.

    ``bit_noise``: standard deviation of the noise on the count of unclipped clients, which adaptive clipping reads; 0 without
    it. ``loss_cap``: the training loss is released too, clipped to this; 0 withholds it. ``shares``: fewest survivors, corrupt
    clients among them and the public seed of the rotation, where the clients make the noise.

    Raises:
        Refused: numbers for which there is no mechanism.
    """
    loss_scale = _LOSS_SHARE * clipping_norm if loss_cap else 0.0
    beta = bit_scale(noise_multiplier, clipping_norm, bit_noise, loss_scale) if bit_noise else 0.0
    joint = JointVector(dimension, clipping_norm, beta, loss_scale, loss_cap or 1.0)
    made = _shares(joint, noise_multiplier, cohort, *shares) if shares else None
    return Release(joint, noise_multiplier, cohort, weight_cap, made)


def _shares(
    joint: JointVector, noise_multiplier: float, cohort: int, survivors: int, corrupt: int, seed: bytes, bits: int = 0
) -> SkellamPlan:
    # The joint vector keeps its norm bound to rounding of float64; the mechanism clips again, to a bound not below it.
    bound = math.nextafter(joint.norm_bound, math.inf)
    return plan_skellam(joint.size, bound, noise_multiplier, cohort, survivors, corrupt, seed, bits)
