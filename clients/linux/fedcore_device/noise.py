"""Where a round's randomness comes from on a device, and Gaussian noise from it, in numpy.

The stream is that of `fedcore.training.dpsgd.GaussianNoise`: AES-128 in counter mode, then Box and Muller's transform.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedcore.privacy.randomness import RandomBytes

__all__ = ["GaussianNoise", "Randomness"]

_PAIRS = 1 << 16  # drawn at a time; part of the definition of the stream
_PAIR_BYTES, _BLOCK_BYTES = 12, 16


@dataclass(frozen=True)
class Randomness:
    """``order`` shuffles examples or tosses the coins of Poisson batches; ``noise_key`` (16 bytes) is that of the noise.

    Whoever can guess either one undoes the privacy of the round.
    """

    order: np.random.Generator = field(repr=False)
    noise_key: bytes = field(repr=False)

    @classmethod
    def from_system(cls, random: RandomBytes = os.urandom) -> Randomness:
        """Fresh for every round, from the operating system."""
        return cls(np.random.default_rng(int.from_bytes(random(32), "little")), random(16))

    @classmethod
    def seeded(cls, order: np.random.Generator, noise: np.random.Generator | None = None) -> Randomness:
        """Of generators that somebody knows, for comparisons: the draws of `fedcore.training.local` with the same ones."""
        return cls(order, bytes(16) if noise is None else noise.bytes(16))


class GaussianNoise:
    """Normal vectors of ``size`` values, one after another, from the one number ``first``."""

    def __init__(self, key: bytes, size: int, first: int = 0) -> None:
        self._pieces = [min(2 * _PAIRS, size - start) for start in range(0, size, 2 * _PAIRS)]
        used = first * sum(-(-piece // 2) * _PAIR_BYTES for piece in self._pieces)
        counter = (used // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
        self._stream = Cipher(algorithms.AES128(key), modes.CTR(counter)).encryptor()
        self._stream.update(bytes(used % _BLOCK_BYTES))
        pairs = max((-(-piece // 2) for piece in self._pieces), default=0)
        self._zeros = bytes(_PAIR_BYTES * pairs)
        self._bits = np.empty(_PAIR_BYTES * pairs + _BLOCK_BYTES - 1, np.uint8)  # the cipher asks for room for one block more
        # Kept from step to step: fresh arrays of this size cost more, in page faults, than all that is computed in them.
        self._radius, self._angle, self._second = (np.empty(pairs, np.float32) for _ in range(3))

    def add(self, out: npt.NDArray[np.float32], deviation: float) -> None:
        """Add the next vector, of standard deviation ``deviation``, to ``out`` [size]."""
        start = 0
        for piece in self._pieces:
            self._add_piece(out[start : start + piece], deviation)
            start += piece

    def _add_piece(self, out: npt.NDArray[np.float32], deviation: float) -> None:
        pairs = -(-len(out) // 2)
        self._stream.update_into(memoryview(self._zeros)[: _PAIR_BYTES * pairs], self._bits.data)
        radius, angle, second = self._radius[:pairs], self._angle[:pairs], self._second[:pairs]
        np.copyto(radius, self._bits[: 8 * pairs].view(np.int64), casting="same_kind")
        np.abs(radius, out=radius)
        np.maximum(radius, np.float32(1), out=radius)
        radius *= np.float32(2.0**-63)
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        radius *= np.float32(deviation)
        np.copyto(angle, self._bits[8 * pairs : _PAIR_BYTES * pairs].view(np.int32), casting="same_kind")
        angle *= np.float32(math.pi * 2.0**-31)
        np.sin(angle, out=second)
        np.cos(angle, out=angle)
        angle *= radius
        out[:pairs] += angle
        rest = len(out) - pairs
        second *= radius
        out[pairs:] += second[:rest]
