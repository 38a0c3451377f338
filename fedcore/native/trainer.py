"""The native engine: a client's whole local training in one call of generated, compiled code."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.errors import Refused
from fedcore.native.blocks import LANES, Blocks, plan
from fedcore.native.build import BuildFailed, build, host_target
from fedcore.native.emit import engine_source
from fedcore.native.layers import lower
from fedcore.native.memory import Memory, plan_memory
from fedcore.native.tiles import Target
from fedcore.quantization.layers import quantizers
from fedcore.quantization.wire import ActivationRange
from fedcore.training.dpsgd import GaussianNoise, SimulatedNoise, noise_of
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import (
    ClientData,
    DpSgdPlan,
    LocalPlan,
    LocalResult,
    LocalTrainer,
    batch_order,
    client_rng,
    poisson_batches,
)

__all__ = ["Job", "NativeTrainer", "Program", "Worker", "prepare"]

_ALIGNMENT = 4096
_DRAWN_AHEAD = 2 * SimulatedNoise.BLOCK + LANES  # room for noise behind that of all parameters


class Job(ctypes.Structure):
    """``Job`` of prelude.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "order")),
        *((name, ctypes.c_int64) for name in ("examples", "epochs", "batch")),
        *((name, ctypes.c_void_p) for name in ("start", "ranges", "work", "bytes", "update")),
        *((name, ctypes.c_double) for name in ("rate", "momentum", "decay", "proximal", "loss")),
        ("noise", ctypes.c_void_p),
        ("bound", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("seed", ctypes.c_void_p),
        ("deviation", ctypes.c_double),
        ("fresh", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Program:
    """A network's compiled trainer."""

    blocks: Blocks
    memory: Memory
    library: Path
    private: bool
    loss: str = "cross_entropy"

    @classmethod
    def of(
        cls, model: nn.Module, input_shape: tuple[int, ...], target: Target | None = None, *, private: bool = True,
        loss: str = "cross_entropy",
    ) -> Program:  # fmt: skip
        """Generate and compile for a loss, or take from the cache; in double precision where the model's parameters are, and with
        DP-SGD if ``private``, which is a fifth of the library.

        Raises:
            Unsupported: a layer that the generator does not know.
            BuildFailed: no compiler that works.
        """
        blocks = plan(lower(model, input_shape), model)
        return _program(blocks, target or host_target(), _dtype(model) is torch.float64, private, loss)


@functools.lru_cache(maxsize=64)
def _program(blocks: Blocks, target: Target, double: bool, private: bool, loss: str) -> Program:
    """Remembered, so that workers forked after `prepare` find theirs at once."""
    memory = plan_memory(blocks)
    library = build(engine_source(blocks, memory, target, loss), target, double=double, private=private)
    return Program(blocks, memory, library, private, loss)


class NativeTrainer:
    """Trains clients one at a time; results equal the loop's but for the order of additions.

    The program is compiled when the first client shows the shape of its examples; that is instant where `prepare` was called.
    With ``compared``, one that was not compared with the loop is, by `prepare`.
    """

    chunk = 1

    def __init__(self, model: nn.Module, target: Target | None = None, *, compared: bool = False) -> None:
        self.model, self.target, self.compared = model.train(), target, compared
        self._workers: dict[tuple[tuple[int, ...], bool, str], Worker] = {}

    def train(self, start: Tensor, clients: Sequence[ClientData], plan: LocalPlan) -> Iterator[LocalResult]:
        """See `plan.LocalTrainer`."""
        for client in clients:
            yield self.worker_for(tuple(client.x.shape[1:]), plan).train(start, client, plan)

    def worker_for(self, shape: tuple[int, ...], plan: LocalPlan) -> Worker:
        """The program for examples of ``shape`` and what ``plan`` asks for."""
        return self.worker(shape, private=plan.dp is not None, loss=plan.loss)

    def worker(self, shape: tuple[int, ...], *, private: bool = True, loss: str = "cross_entropy") -> Worker:
        """The program for examples of ``shape``."""
        if (shape, private, loss) not in self._workers:
            if self.compared:
                prepare(self.model, shape, private=private, loss=loss)
            program = Program.of(self.model, shape, self.target, private=private, loss=loss)
            self._workers[shape, private, loss] = Worker(program, self.model)
        return self._workers[shape, private, loss]

    def blob(self, shape: tuple[int, ...]) -> int:
        """How many numbers the parameters are as the program for examples of ``shape`` lays them out."""
        return plan(lower(self.model, shape), self.model).blob


class Worker:
    """A loaded program with its workspace, which it begins and leaves with zeros where the program expects them."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.blocks, self.model, self.loss = program.blocks, model, program.loss
        self.dtype = torch.float64 if _dtype(model) is torch.float64 else torch.float32
        self.numbers = np.float64 if self.dtype is torch.float64 else np.float32
        self._size = self.blocks.trainable
        known = dict(quantizers(model))
        self._quantizers = [known[name] for name in self.blocks.quantizers]
        self._frozen: list[ActivationRange | None] | None = None
        self._table = torch.zeros(0)
        try:
            self.library = library = ctypes.CDLL(str(program.library))
        except OSError as error:
            raise BuildFailed(f"the compiled trainer cannot be loaded: {error}") from error
        self._train, self._import = library.train, library.import_start
        self._train.argtypes, self._train.restype = [ctypes.POINTER(Job)], ctypes.c_int
        self._import.argtypes, self._import.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        if program.private:
            library.private_begin.restype = library.private_end.restype = library.gaussian.restype = None
            library.gaussian.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p]
        self._drawn = torch.zeros(self._size + _DRAWN_AHEAD, dtype=self.dtype)
        self._work = _aligned(program.memory.numbers, self.dtype)
        self._bytes = _aligned(program.memory.bytes, torch.uint8)
        self._blob = _aligned(self.blocks.blob + LANES, self.dtype)
        self._start: tuple[Tensor, int] | None = None
        self._job = Job(work=self._work.data_ptr(), bytes=self._bytes.data_ptr(), start=self._blob.data_ptr())

    def job(self, start: Tensor, plan: LocalPlan) -> Job:
        """A job of this worker without examples, and without a place for its update.

        Raises:
            Refused: the plan has another loss than the program.
        """
        self._begin_from(start)
        self._set_rates(plan)
        self._job.ranges = self._ranges().data_ptr()
        return self._job

    def train(self, start: Tensor, data: ClientData, plan: LocalPlan) -> LocalResult:
        """One client's round.

        Raises:
            Refused: labels that are no classes, or the plan has another loss than the program.
        """
        self._begin_from(start)
        if plan.dp is not None:
            return self._private(data, plan, plan.dp)
        orders = batch_order(len(data.y), plan, data.rng)
        order = torch.from_numpy(orders[0] if plan.epochs == 1 else np.concatenate(orders))
        x, y = data.x.to(self.dtype).contiguous(), data.y.to(torch.int64).contiguous()
        update, ranges = torch.empty(self._size + LANES, dtype=self.dtype)[: self._size], self._ranges()
        job = self._job
        job.x, job.y, job.order, job.update = x.data_ptr(), y.data_ptr(), order.data_ptr(), update.data_ptr()
        job.examples, job.epochs, job.ranges = len(y), plan.epochs, ranges.data_ptr()
        self._set_rates(plan)
        if self._train(job):
            raise Refused(self.no_class(data.client))
        trained = len(order)
        return LocalResult(data.client, update, len(y), job.loss / trained if trained else math.nan)

    def _private(self, data: ClientData, plan: LocalPlan, dp: DpSgdPlan) -> LocalResult:
        """A round of DP-SGD, step by step: a cipher's noise is drawn here, as the loop draws it."""
        noise, job = noise_of(data), self._job
        x, y = data.x.to(self.dtype).contiguous(), data.y.to(torch.int64).contiguous()
        update, ranges = torch.empty(self._size + LANES, dtype=self.dtype)[: self._size], self._ranges()
        job.x, job.y, job.update, job.ranges = x.data_ptr(), y.data_ptr(), update.data_ptr(), ranges.data_ptr()
        self._set_rates(plan)
        self.set_privacy(plan, dp)
        if isinstance(noise, SimulatedNoise):
            job.seed, job.noise = noise.state.ctypes.data, None
        self.library.private_begin(ctypes.byref(job))
        trained = 0
        for rows in poisson_batches(len(y), plan, data.rng):
            order = torch.from_numpy(rows.astype(np.int64, copy=False))
            if isinstance(noise, GaussianNoise):
                self._fill(self._drawn[: self._size], noise, job.deviation)
                job.noise = self._drawn.data_ptr()
            job.order, job.examples = order.data_ptr(), len(rows)
            if self.library.private_step(ctypes.byref(job)):
                raise Refused(self.no_class(data.client))
            trained += len(rows)
        self.library.private_end(ctypes.byref(job))
        return LocalResult(data.client, update, len(y), job.loss / trained if trained else math.nan)

    def set_privacy(self, plan: LocalPlan, dp: DpSgdPlan) -> None:
        """Tell the job the clipping norm and the deviation of a step's noise; without ``noise`` it is drawn from ``seed``."""
        self._job.bound, self._job.deviation = dp.clipping_norm, dp.noise_multiplier * dp.clipping_norm / plan.batch_size
        self._job.noise, self._job.fresh = None, self._drawn.data_ptr()

    def _fill(self, out: Tensor, noise: GaussianNoise, deviation: float) -> None:
        """As ``noise.fill``, but for the last bits; double precision is left to it."""
        if self.dtype is not torch.float32:
            noise.fill(out, deviation)
            return
        for first in range(0, len(out), noise.PIECE):
            count = min(noise.PIECE, len(out) - first)
            bits = noise.bits(count)
            self.library.gaussian(bits.ctypes.data, count, deviation, out.data_ptr() + 4 * first)

    def _set_rates(self, plan: LocalPlan) -> None:
        if plan.loss != self.loss:
            raise Refused(f"the plan asks for the loss {plan.loss}; this trainer is compiled for {self.loss}")
        job = self._job
        job.batch, job.rate, job.momentum = plan.batch_size, plan.lr, plan.momentum
        job.decay, job.proximal = plan.weight_decay, plan.proximal_mu

    def no_class(self, client: int) -> str:
        """What is wrong with a client that has other labels."""
        return f"client {client}: a label is not one of the {self.blocks.network.classes} classes"

    def _begin_from(self, start: Tensor) -> None:
        """Bring the start into the blob's order, unless it is the one that is there."""
        if self._start is not None and self._start[0] is start and self._start[1] == start._version:
            return
        values = start.detach().to(self.dtype).contiguous()
        frozen = dict(self.model.named_parameters())
        for parameter in self.blocks.parameters:
            if not parameter.trainable:
                self._blob[torch.from_numpy(parameter.positions())] = frozen[parameter.name].detach().reshape(-1)
        self._import(self._blob.data_ptr(), values.data_ptr())
        self._start = (start, start._version)

    def _ranges(self) -> Tensor:
        """The frozen activation ranges as the program takes them, one row of `Range` for each quantizer."""
        if not self._quantizers:
            return self._blob
        frozen = [quantizer.frozen for quantizer in self._quantizers]
        if frozen != self._frozen:
            self._frozen, self._table = frozen, torch.tensor([_range(one) for one in frozen], dtype=self.dtype)
        return self._table


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def _range(frozen: ActivationRange | None) -> tuple[float, ...]:
    """A row of ``Range``; zeros where the activation passes."""
    if frozen is None:
        return (0.0,) * 7
    scale, low, high = frozen.scale, -128 - frozen.zero_point, 127 - frozen.zero_point
    inverse = float(np.float32(1) / np.float32(scale))  # as `FakeQuantize` multiplies
    return (1.0, inverse, scale, low, high, (low - 0.5) * scale, (high + 0.5) * scale)


def _aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that begin at a page."""
    raw = torch.zeros(count * dtype.itemsize + _ALIGNMENT, dtype=torch.uint8)
    begin = -raw.data_ptr() % _ALIGNMENT
    return raw[begin : begin + count * dtype.itemsize].view(dtype)


def prepare(
    model: nn.Module, input_shape: tuple[int, ...], *, private: bool = False, loss: str = "cross_entropy"
) -> str:  # fmt: skip
    """Compile the trainer of ``model`` for a loss and, once per build, compare it with the loop; returns the processor's kind.

    Raises:
        Unsupported: a layer that the generator does not know.
        BuildFailed: no compiler that works, or a library that does not load or whose results differ from the loop's.
    """
    target = host_target()
    program = Program.of(model, input_shape, target, private=private, loss=loss)
    marker = program.library.with_suffix(".verified")
    if not marker.exists():
        difference = _difference(model, input_shape, program)
        if not difference <= (0.05 if program.blocks.rounded else 1e-3):
            raise BuildFailed(f"the compiled trainer differs from the loop by {difference:.2g} of an update's norm; it is not used")
        with contextlib.suppress(OSError):  # then it is compared again the next time
            marker.touch()
    return target.name


def _difference(model: nn.Module, input_shape: tuple[int, ...], program: Program) -> float:
    """Relative L2 distance between the updates of both engines on random examples, the largest of some plans'."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((7, *input_shape), np.float32)).to(_dtype(model))
    y = torch.from_numpy(rng.integers(0, program.blocks.network.classes, 7))
    found = []
    if program.private:
        private = LocalPlan(1, 4, 0.05, dp=DpSgdPlan(clipping_norm=0.5, noise_multiplier=0.1), loss=program.loss)
        plans = ((private, False), (private, True))
    else:
        plain = LocalPlan(1, 4, 0.05, loss=program.loss)
        plans = ((plain, False), (replace(plain, momentum=0.5, weight_decay=0.01, proximal_mu=0.1), False))
    for local, simulated in plans:
        updates = []
        for trainer in (LoopTrainer, NativeTrainer):
            own = copy.deepcopy(model)
            start = torch.cat([p.detach().reshape(-1) for p in own.parameters() if p.requires_grad])
            engine: LocalTrainer = trainer(own)
            data = ClientData(0, x, y, client_rng(0, 0, 0, 0), client_rng(0, 0, 0, 1), simulated)
            updates += [result.update for result in engine.train(start, [data], local)]
        distance = torch.linalg.vector_norm(updates[1] - updates[0]) / torch.linalg.vector_norm(updates[0]).clamp(min=1e-12)
        found.append(float(distance))
    return max(found) if all(map(math.isfinite, found)) else math.inf
