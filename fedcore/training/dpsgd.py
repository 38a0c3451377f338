"""DP-SGD: the steps of one client whose unit of privacy is one example (Abadi et al. 2016, arXiv:1607.00133).

A step draws a Poisson batch, sums the examples' clipped gradients, adds Gaussian noise and divides by the plan's batch size, a
public constant. Everything after that (weight decay, the proximal term, momentum, the learning rate) is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from fedcore.errors import Refused
from fedcore.quantization.layers import activation_ranges
from fedcore.quantization.wire import ActivationRange
from fedcore.training.per_example import GradientChoice, check_per_example
from fedcore.training.plan import ClientData, LocalPlan
from fedcore.training.rules import PerExample

__all__ = ["GaussianNoise", "PrivateSteps", "SimulatedNoise", "add_clipped", "clipping_factors", "noise_of"]


class GaussianNoise:
    """Normal vectors from AES-128 in counter mode, keyed by 128 bits of the generator given.

    Box and Muller's transform, with 64 bits for a radius and 32 for an angle; beyond 9.3 standard deviations (probability
    1e-20) nothing is drawn. Noise that becomes known does not give away the rest, as it would with a simulation's generator,
    and the cipher is faster. The values are floating-point numbers, which are not evenly spaced (Mironov 2012): what follows
    from their lowest bits is not covered by the accounting, here as in every DP-SGD in floating point.
    """

    PIECE = 1 << 17  # numbers drawn at a time; part of the definition of the stream
    _ZEROS = bytes(6 * PIECE)

    def __init__(self, rng: np.random.Generator) -> None:
        self._stream = Cipher(algorithms.AES128(rng.bytes(16)), modes.CTR(bytes(16))).encryptor()

    def fill(self, out: Tensor, deviation: float) -> None:
        """Overwrite ``out`` [d], on the CPU, with the next d values of standard deviation ``deviation``."""
        for first in range(0, len(out), self.PIECE):
            piece = out[first : first + self.PIECE]
            pairs = -(-len(piece) // 2)
            bits = torch.from_numpy(self.bits(len(piece)))
            wide = bits[: 8 * pairs].view(torch.int64).to(out.dtype)
            radius = wide.abs_().clamp_(min=1).mul_(2.0**-63).log_().mul_(-2).sqrt_().mul_(deviation)
            narrow = bits[8 * pairs : 12 * pairs].view(torch.int32).to(out.dtype)
            angle = narrow.mul_(math.pi * 2.0**-31)
            torch.cos(angle, out=piece[:pairs]).mul_(radius)
            rest = len(piece) - pairs
            torch.mul(angle.sin_()[:rest], radius[:rest], out=piece[pairs:])

    def bits(self, count: int) -> npt.NDArray[np.uint8]:
        """What the next ``count`` numbers, at most `PIECE`, are made of: for each pair 64 bits for radii, then 32 for angles."""
        size = 12 * -(-count // 2)
        found = np.empty(size + 15, np.uint8)  # the cipher asks for room for one block more
        self._stream.update_into(memoryview(self._ZEROS)[:size], found.data)
        return found


class SimulatedNoise:
    """Normal vectors of a simulation whose seed is known anyway: several times as fast as a cipher's, and no secret.

    Eight generators SFC64 (Doty-Humphrey) begin with 24 words of the generator given and take turns. Of their words, halves of
    32 bits, 16 give radii and the next 16 angles of 32 numbers (Box and Muller): 16 cosines, whose signs the radii's words
    give, then 16 sines of angles within a right one. Beyond 6.5 standard deviations (probability 1e-10) nothing is drawn.
    What `fill` leaves of the last 32 numbers is dropped.
    """

    BLOCK = 32
    _PIECE = 1 << 12  # blocks drawn at a time

    def __init__(self, rng: np.random.Generator) -> None:
        #: of the generators: [a, b, c, counter] of each of the eight
        self.state = np.ones((4, 8), np.uint64)
        self.state[:3] = rng.bit_generator.random_raw(24).reshape(3, 8)
        self._lanes: list[Any] = [np.random.SFC64(0) for _ in range(8)]  # numpy's types do not tell a generator's state

    def fill(self, out: Tensor, deviation: float) -> None:
        """Overwrite ``out`` [d], on the CPU, with the next d values of standard deviation ``deviation``."""
        for piece in out.split(self._PIECE * self.BLOCK):
            radii, angles = self._words(-(-len(piece) // self.BLOCK))
            uniform = (radii & (2**31 - 1) | 1).to(out.dtype).mul_(2.0**-31)
            radius = uniform.log_().mul_(-2).sqrt_().mul_(deviation)
            angle = angles.to(out.dtype).mul_(math.pi * 2.0**-32)
            cosines = torch.cos(angle).mul_(torch.where(radii < 0, -radius, radius))
            piece.copy_(torch.stack([cosines, angle.sin_().mul_(radius)], 1).view(-1)[: len(piece)])

    def _words(self, blocks: int) -> Tensor:
        """What the next blocks are made of [radii and angles, blocks, 16], from -2^31 to 2^31 - 1."""
        drawn = np.empty((8, 2 * blocks), np.uint64)
        for lane, generator in enumerate(self._lanes):
            generator.state = generator.state | {"state": {"state": self.state[:, lane].copy()}}
            drawn[lane] = generator.random_raw(2 * blocks)
            self.state[:, lane] = generator.state["state"]["state"]
        halves = torch.from_numpy(drawn.view(np.int32)).view(8, blocks, 2, 2)
        return halves.permute(2, 1, 0, 3).reshape(2, blocks, 16)


def noise_of(data: ClientData) -> GaussianNoise | SimulatedNoise:
    """The noise of a client's round: a cipher's, unless the client says that it is simulated.

    Raises:
        Refused: the client brings no generator for it.
    """
    if data.noise_rng is None:
        raise Refused(f"DP-SGD: client {data.client} has no generator for its noise")
    return SimulatedNoise(data.noise_rng) if data.simulated else GaussianNoise(data.noise_rng)


def clipping_factors(norms: Tensor, bound: float) -> Tensor:
    """What scales gradients of the L2 norms given to at most ``bound``: min(1, bound / norm)."""
    return (bound / norms).clamp_(max=1)


def add_clipped(gradients: Callable[[Tensor, Tensor], PerExample], x: Tensor, y: Tensor, bound: float, scale: float) -> Tensor:
    """Add ``scale`` times the gradients of x [n, ...], y [n], clipped to L2 norm ``bound``, to the parameters' ``grad``.

    Returns the sum of the losses.

    An example whose gradient is not finite adds nothing: it must not reach further than any other.
    """
    found = gradients(x, y)
    norms = found.norms()
    if math.isfinite(float(norms.max())):
        found.add(clipping_factors(norms, bound).mul_(scale))
    else:  # zero times nan is nan: the sum is taken again, without them
        kept = torch.isfinite(norms)
        if bool(kept.any()):
            add_clipped(gradients, x[kept], y[kept], bound, scale)
    return found.loss


class PrivateSteps:
    """Private gradients of a model whose trainable parameters' ``grad`` are views of the vector ``gradient`` [d].

    ``microbatch``: examples in one forward pass; a larger batch is accumulated before its one noisy step.
    """

    def __init__(self, model: nn.Module, gradient: Tensor, microbatch: int) -> None:
        self.model, self.gradient, self.microbatch = model, gradient, microbatch
        self.choice: GradientChoice | None = None
        self._checked: tuple[dict[str, ActivationRange], str] | None = None

    def steps(self, data: ClientData, plan: LocalPlan, batches: Sequence[npt.NDArray[np.int64]]) -> Iterator[tuple[Tensor, int]]:
        """Leave each step's gradient in ``gradient``; yields the sum of the drawn examples' losses and their number.

        Raises:
            Refused: no noise generator, or per-example gradients that cannot be taken or are wrong.
        """
        if plan.dp is None:
            raise Refused("DP-SGD: the plan has no clipping norm and no noise multiplier")
        noise, bound = noise_of(data), plan.dp.clipping_norm
        with self._check(data.x, plan.loss).open(self.model, plan.loss) as gradients:
            for batch in batches:
                self._begin_with(noise, plan.dp.noise_multiplier * bound / plan.batch_size)
                loss = torch.zeros((), dtype=torch.float64)
                for rows in torch.from_numpy(batch).to(data.y.device).split(self.microbatch) if len(batch) else ():
                    x, y = data.x.index_select(0, rows), data.y.index_select(0, rows)
                    loss += add_clipped(gradients, x, y, bound, 1 / plan.batch_size).cpu()
                yield loss, len(batch)

    def _begin_with(self, noise: GaussianNoise | SimulatedNoise, deviation: float) -> None:
        if self.gradient.is_cpu:
            noise.fill(self.gradient, deviation)
        else:
            drawn = torch.empty(self.gradient.shape, dtype=self.gradient.dtype)
            noise.fill(drawn, deviation)
            self.gradient.copy_(drawn)

    def _check(self, x: Tensor, loss: str) -> GradientChoice:
        """The way to take gradients, chosen anew when activation ranges or the loss have changed; on random inputs shaped like
        ``x``, so that the choice does not depend on whose examples come first."""
        found = activation_ranges(self.model), loss
        if self.choice is None or found != self._checked:
            with torch.random.fork_rng(devices=[]), torch.no_grad():  # dropout must not notice
                probe = _probe(x)
                classes = self.model(probe).shape[1]
            self.choice = check_per_example(self.model, probe, torch.arange(len(probe), device=x.device) % classes, loss)
            self._checked = found
        return self.choice


def _probe(x: Tensor) -> Tensor:
    """Four inputs shaped and typed like those of ``x`` [n, ...]; between 0 and 1, since a model may take their logarithm."""
    probe = torch.zeros(4, *x.shape[1:], dtype=x.dtype)
    return (probe.uniform_(generator=torch.Generator().manual_seed(0)) if x.is_floating_point() else probe).to(x.device)
