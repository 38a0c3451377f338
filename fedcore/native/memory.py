"""The static memory plan: where in a trainer's workspace everything is, and how many examples are worked on together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedcore.native.blocks import LANES, Addition, Blocks, Conv, Depthwise, Linear, Normal, padded
from fedcore.native.input_gradients import spread_size
from fedcore.native.normalisation import statistics_size
from fedcore.native.tiles import marks
from fedcore.native.weight_gradients import by_position

__all__ = ["Memory", "plan_memory"]

_ACTIVATIONS = 1 << 18  # numbers that the examples of a part may fill: 1 MiB, half of a usual second-level cache
_LEAST, _MOST = 10, 64  # examples in a part


@dataclass(frozen=True)
class Memory:
    """Offsets of regions in the workspace, in numbers (``places``) and in bytes (``marked``), and the sizes of both.

    ``rows``: examples worked on together; a larger batch comes in parts. ``boundary``: blocks whose gradient is kept for all of
    these, since the next step works on them together: from the one before the first fully connected layer on.
    """

    rows: int
    places: dict[str, int]
    marked: dict[str, int]
    numbers: int
    bytes: int
    boundary: frozenset[int]


def plan_memory(blocks: Blocks, rows: int = 0) -> Memory:
    """The plan of a network; the same for every processor, since the parts of a batch decide the order of additions. With ``rows``
    for as many examples together, where memory is short: sums then round otherwise."""
    each = blocks.input.target.size + sum(block.target.size for block in blocks.blocks)
    rows = rows or min(max(_ACTIVATIONS // each, _LEAST), _MOST)
    last = len(blocks.blocks) - 1
    boundary = frozenset(range(min(last, blocks.flat - 1), last + 1))
    places, numbers = _laid_out(_numbers(blocks, rows, boundary))
    marked, count = _laid_out((f"mark{i}", rows * block.target.size) for i, block in enumerate(blocks.blocks) if marks(block))
    return Memory(rows, places, marked, numbers, count + LANES, boundary)


def _laid_out(regions: Iterator[tuple[str, int]]) -> tuple[dict[str, int], int]:
    places, end = {}, 0
    for name, size in regions:
        places[name] = end
        end += padded(size)
    return places, end


def _numbers(blocks: Blocks, rows: int, boundary: frozenset[int]) -> Iterator[tuple[str, int]]:
    for name in ("w", "velocity", "g", "example"):
        yield name, blocks.blob + LANES
    yield "input", rows * blocks.input.target.size
    for i, block in enumerate(blocks.blocks):
        yield f"out{i}", rows * block.target.size
        if i >= blocks.first:
            yield f"d{i}", (rows if i in boundary else 1) * block.target.size
        if isinstance(block, (Conv, Depthwise, Linear)) and block.layer.rounded:
            yield f"q{i}", block.weight.size
        if isinstance(block, Conv) and not block.by_tap:
            yield f"t{i}", block.taps * block.target.depth
        if isinstance(block, Normal):
            yield f"statistics{i}", rows * statistics_size(block)
        if isinstance(block, Addition) and block.skip >= blocks.first:
            yield f"skip{i}", (rows if i > blocks.flat else 1) * block.other.size
        if isinstance(block, Depthwise) and i > blocks.first:
            yield f"spread{i}", spread_size(block)
    yield "sums", 4 * rows  # two double-precision numbers a row, in DP-SGD
    yield "moments", max((statistics_size(block) for block in blocks.blocks if isinstance(block, Normal)), default=0)
    compact = [block.target.height * block.target.width * block.target.depth for block in blocks.blocks]
    yield "gm", max(compact) + LANES
    if any(by_position(block) for block in blocks.blocks):
        yield "at", max(compact) + LANES
