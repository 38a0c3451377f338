"""Where a model's training time goes: layers, what the generator makes of them, seconds and share of this machine's peak."""

from __future__ import annotations

import ctypes
import math
import re
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedcore.native.blocks import Blocks, Conv, Depthwise, Linear, Pointwise, plan
from fedcore.native.build import build, host_target
from fedcore.native.emit import engine_source
from fedcore.native.layers import leaves, lower
from fedcore.native.memory import plan_memory
from fedcore.native.trainer import Program, Worker
from fedcore.training.plan import ClientData, LocalPlan

__all__ = ["Explanation", "Share", "explain", "operations", "peak_gflops"]

_CALL = re.compile(r"^((?:forward|finish|masked|weight|input|update|grid|transposed)(\d+))\(.*\);$")
_COUNTERS = """
INLINE uint64_t counter(void) {{
#ifdef __aarch64__
    uint64_t now;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    return now;
#else
    return __builtin_readcyclecounter();
#endif
}}
__attribute__((visibility("default"))) uint64_t spent[{count}];
__attribute__((visibility("default"))) uint64_t now(void) {{ return counter(); }}
#define TIMED(i, call) {{ const uint64_t begun = counter(); call; spent[i] += counter() - begun; }}
"""
_REPEATS, _RUNS = 25, 4  # the quickest counts, since other work may take the processor away


@dataclass(frozen=True)
class Share:
    """One block: the torch layers in it, its output's channels, operations of an example's step, seconds an example, and
    operations a second as a share of the measured peak (nan without any)."""

    layers: str
    channels: int
    flops: int
    seconds: float
    peak_share: float


@dataclass(frozen=True)
class Explanation:
    """All blocks; ``rest`` are seconds an example outside them (copies, loss, steps), ``peak`` is in gigaflops a second."""

    processor: str
    shares: tuple[Share, ...]
    rest: float
    peak: float

    @property
    def seconds(self) -> float:
        """Seconds an example."""
        return self.rest + sum(share.seconds for share in self.shares)


def explain(
    model: nn.Module, input_shape: tuple[int, ...], batch: int = 10, examples: int = 50, loss: str = "cross_entropy"
) -> Explanation:  # fmt: skip
    """Train one client a few times on this processor, in batches, and say where the time goes.

    Raises:
        Unsupported: a layer that the generator does not know; the text names it.
        BuildFailed: no compiler that works.
    """
    target = host_target()
    blocks = plan(lower(model, input_shape), model)
    memory = plan_memory(blocks)
    library = build(_timed(engine_source(blocks, memory, target, loss), len(blocks.blocks)), target, private=False)
    worker = Worker(Program(blocks, memory, library, private=False, loss=loss), model)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((examples, *input_shape), np.float32))
    data = ClientData(0, x, torch.from_numpy(rng.integers(0, blocks.network.classes, examples)), rng)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    loaded = ctypes.CDLL(str(library))
    loaded.now.restype = ctypes.c_uint64
    spent = (ctypes.c_uint64 * len(blocks.blocks)).in_dll(loaded, "spent")
    worker.train(start, data, LocalPlan(1, batch, 0.01, loss=loss))
    found = []
    for _ in range(_REPEATS):
        ctypes.memset(spent, 0, ctypes.sizeof(spent))
        ticks, began = loaded.now(), time.perf_counter()
        for _ in range(_RUNS):
            worker.train(start, data, LocalPlan(1, batch, 0.01, loss=loss))
        seconds = time.perf_counter() - began
        found.append((seconds, np.array(spent, np.float64) * seconds / (loaded.now() - ticks)))
    seconds, by_block = min(found, key=lambda one: one[0])
    peak, count = peak_gflops(), _RUNS * examples
    shares = []
    for i, (block, names, taken) in enumerate(zip(blocks.blocks, _names(blocks, model), by_block.tolist(), strict=True)):
        flops, each = _flops(blocks, i), taken / count
        shares.append(Share(names, block.target.channels, flops, each, flops / each / 1e9 / peak if flops and each else math.nan))
    return Explanation(target.name, tuple(shares), (seconds - float(by_block.sum())) / count, peak)


def peak_gflops() -> float:
    """The best single-precision matrix product of one thread, 10^9 operations a second."""
    a = torch.randn(512, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return float(2 * 512**3 / min(seconds) / 1e9)


def _timed(text: str, count: int) -> str:
    """The source with every call of a block's kernel counted in cycles."""
    lines = [
        f"TIMED({found[2]}, {line.removesuffix(';')});" if (found := _CALL.match(line)) else line for line in text.splitlines()
    ]  # fmt: skip
    place = next(i for i, line in enumerate(lines) if line.startswith("VECTORS("))
    return "\n".join([*lines[:place], _COUNTERS.format(count=count), *lines[place:], ""])


def operations(blocks: Blocks) -> int:
    """Multiplications and additions of one example's step in all layers, as a plain implementation makes them."""
    return sum(_flops(blocks, i) for i in range(len(blocks.blocks)))


def _flops(blocks: Blocks, i: int) -> int:
    """Multiplications and additions of one example's step: forward, and backward to weights and inputs where there is one."""
    block = blocks.blocks[i]
    match block:
        case Conv():
            products = block.taps * math.prod(block.layer.shape)
        case Depthwise():
            products = math.prod(block.layer.kernel) * math.prod(block.layer.shape)
        case Linear():
            products = block.inputs * block.target.channels
        case _:
            return 0
    passes = 1 + (i >= blocks.first and block.weight.trainable) + (i > blocks.first)
    return 2 * products * passes


def _names(blocks: Blocks, model: nn.Module) -> list[str]:
    """The torch layers in each block, as "0-2 Conv2d ReLU MaxPool2d"."""
    found = [(name, type(module).__name__) for name, module in leaves(model, "")]
    places = [name for name, _ in found]
    starts = [places.index(block.layer.name) for block in blocks.blocks if not isinstance(block, Pointwise)]
    if len(starts) < len(blocks.blocks):  # an activation of its own has no name to find it by
        return [type(block).__name__ for block in blocks.blocks]
    texts = []
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        kinds = [kind.removeprefix("Quant") for _, kind in found[start:end] if kind not in {"Flatten", "FakeQuantize", "Identity"}]
        texts.append(f"{found[start][0]} {' + '.join(kinds)}")
    return texts
