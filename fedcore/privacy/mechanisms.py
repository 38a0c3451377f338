"""What the central and the distributed mechanism share: clipping, weights, and the one vector that a client contributes.

With the unit `client` nothing leaves a client in the clear. Its training loss and whether its update was clipped (which adaptive
clipping needs) are coordinates of the vector that is noised, and are counted in that vector's norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.privacy.randomness import RandomBytes, keystream

__all__ = ["JointVector", "Means", "adapt", "bit_scale", "clip", "clip_factor", "gaussian_noise", "weight"]

Doubles = npt.NDArray[np.float64]


class Means(NamedTuple):
    """What a sum says; what its layout has no coordinate for is None.

    Noise can take ``unclipped`` out of [0, 1] and ``loss`` out of [0, loss cap]. ``examples`` is the sum of the weights,
    ``failed`` the number of clients whose training gave nothing.
    """

    update: Doubles
    unclipped: float | None
    loss: float | None
    examples: int | None = None
    failed: int | None = None


@dataclass(frozen=True)
class JointVector:
    """Layout of a contribution: the clipped update [dimension], then a coordinate for each scale that is not zero.

    - ``bit_scale`` beta: ``beta (bit - 1/2)`` with bit 1 where the update was not clipped (Andrew et al. 2021,
      arXiv:1905.03871); `bit_scale` finds beta.
    - ``loss_scale`` e: the training loss, clipped to [0, ``loss_cap``] and mapped to [-e, e].

    A client that has nothing to say contributes zeros, which count as half a bit and half the loss cap.
    """

    dimension: int
    clipping_norm: float
    bit_scale: float = 0.0
    loss_scale: float = 0.0
    loss_cap: float = 10.0

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise Refused(f"a contribution needs at least 1 value, got {self.dimension}")
        for name in ("clipping_norm", "loss_cap"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise Refused(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("bit_scale", "loss_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise Refused(f"{name} must be a number >= 0, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        """Coordinates of a contribution."""
        return self.dimension + (self.bit_scale > 0) + (self.loss_scale > 0)

    @property
    def norm_bound(self) -> float:
        """L2 norm that no contribution exceeds: ``sqrt(S^2 + (beta / 2)^2 + e^2)``."""
        return math.hypot(self.clipping_norm, self.bit_scale / 2, self.loss_scale)

    def encode(self, update: Doubles, loss: float) -> Doubles:
        """The contribution [size] of ``update`` [dimension], already weighted, and the mean training loss.

        Raises:
            Refused: the update has another length.
            ClientFailure: the update or the loss is not finite.
        """
        if update.shape != (self.dimension,):
            raise Refused(f"an update of this layout has {self.dimension} values, got an array of shape {update.shape}")
        factor = clip_factor(update, self.clipping_norm)
        joint = np.empty(self.size)
        np.multiply(update, factor, out=joint[: self.dimension])
        if self.bit_scale:
            joint[self.dimension] = self.bit_scale * ((factor == 1.0) - 0.5)
        if self.loss_scale:
            if not math.isfinite(loss):
                raise ClientFailure(f"the training loss is not finite ({loss})")
            joint[-1] = self.loss_scale * (2 * min(max(loss, 0.0), self.loss_cap) / self.loss_cap - 1)
        return joint

    def decode(self, total: Doubles, denominator: float, clients: float | None = None) -> Means:
        """Means from the noised sum [size] over a public ``denominator``, fixed before the round.

        With weights the bit and the loss are means over ``clients``, the public number of contributions; default: the denominator.

        Raises:
            Refused: the sum has another length.
            RoundFailed: a denominator is not positive.
        """
        if total.shape != (self.size,):
            raise Refused(f"a sum of this layout has {self.size} values, got an array of shape {total.shape}")
        clients = denominator if clients is None else clients
        if not (denominator > 0 and clients > 0):
            raise RoundFailed(f"a mean over {denominator} (bit and loss: {clients}) clients does not exist")
        unclipped, loss = None, None
        if self.bit_scale:
            unclipped = float(total[self.dimension]) / (self.bit_scale * clients) + 0.5
        if self.loss_scale:
            loss = (float(total[-1]) / (self.loss_scale * clients) + 1) / 2 * self.loss_cap
        return Means(total[: self.dimension] / denominator, unclipped, loss)


def clip_factor(vector: Doubles, norm: float) -> float:
    """What `clip` multiplies ``vector`` with: ``min(1, norm / |vector|)``, 1 for a vector of zeros.

    Raises:
        ClientFailure: a value is not finite.
        Refused: the clipping norm is not a positive number.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise Refused(f"the clipping norm must be a positive number, got {norm}")
    values = np.asarray(vector, np.float64).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.einsum("i,i->", values, values))  # a BLAS would start threads, which workers must not
    if math.isfinite(squared):
        length = math.sqrt(squared)
        return norm / length if length > norm else 1.0
    if not np.isfinite(values).all():
        raise ClientFailure("the update holds values that are not finite")
    peak = float(np.abs(values).max())  # finite, but its square is not
    return norm / peak / float(np.linalg.norm(values / peak))


def clip(vector: Doubles, norm: float) -> Doubles:
    """``vector`` scaled down to an L2 norm of at most ``norm`` (to rounding of float64); never enlarged.

    Raises:
        ClientFailure: a value is not finite.
        Refused: the clipping norm is not a positive number.
    """
    return np.asarray(vector, np.float64) * clip_factor(vector, norm)


def weight(examples: int, cap: int) -> float:
    """Weight of a client's update, applied before clipping: ``min(examples, cap) / cap``; cap 0 weighs every client 1.

    Raises:
        Refused: a negative number.
    """
    if examples < 0 or cap < 0:
        raise Refused(f"examples ({examples}) and their cap ({cap}) must not be negative")
    return min(examples, cap) / cap if cap else 1.0


def bit_scale(noise_multiplier: float, clipping_norm: float, bit_noise: float, loss_scale: float = 0.0) -> float:
    """The scale beta that gives the sum of clipping bits a noise of standard deviation ``bit_noise`` (sigma_b), in clients.

    With total noise ``sigma = z sqrt(S^2 + (beta / 2)^2 + e^2)`` and ``sigma_b = sigma / beta``:
    ``beta = z sqrt((S^2 + e^2) / (sigma_b^2 - z^2 / 4))``. The update and the loss then have the effective multiplier z_Delta of
    ``z^-2 = z_Delta^-2 + (2 sigma_b)^-2`` (Andrew et al. 2021, theorem 1), so that the whole costs exactly z.

    Raises:
        Refused: sigma_b <= z / 2, for which the bit alone would cost more than the whole may.
    """
    if not bit_noise > noise_multiplier / 2 > 0:
        raise Refused(
            f"noise of {bit_noise:g} clients on the clipping bits is too small: it must be more than {noise_multiplier / 2:g}, "
            "half the noise multiplier"
        )
    return noise_multiplier * math.sqrt((clipping_norm**2 + loss_scale**2) / (bit_noise**2 - noise_multiplier**2 / 4))


def adapt(clipping_norm: float, fraction: float, quantile: float, learning_rate: float) -> float:
    """The next round's clipping norm: ``S exp(-eta (fraction unclipped - quantile))`` (Andrew et al. 2021, section 2.1)."""
    return clipping_norm * math.exp(-learning_rate * (fraction - quantile))


def gaussian_noise(norm_bound: float, noise_multiplier: float, size: int, random: RandomBytes) -> Doubles:
    """Noise [size] of the central mechanism, standard deviation ``noise_multiplier * norm_bound`` a coordinate, for a sum.

    Box and Muller's transform of a keystream whose key are the next 32 bytes of ``random``; beyond 9.4 standard deviations
    (probability 1e-20) nothing is drawn. A cipher, since a release shows the noise as it is where no client moves a coordinate (a
    weight behind a unit that is off), and that must not give away the rest.
    """
    pairs = -(-size // 2)
    words = np.frombuffer(keystream(random(32))(16 * pairs), "<u8").reshape(2, pairs).astype(np.float64)
    radius = noise_multiplier * norm_bound * np.sqrt(-2 * np.log((words[0] + 0.5) * 2.0**-64))
    angle = words[1] * (2 * math.pi * 2.0**-64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
