"""Choices that the templates share: register tiles by a small cost model, epilogues, C text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedcore.native.blocks import Block, Conv, Plane, Pooling

__all__ = ["Target", "balanced", "chunks", "counted", "finish", "function", "keep", "live", "marks", "mask_literal", "pixels"]

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A processor: what the compiler is told, and how many vectors of 16 numbers its registers hold beside operands."""

    name: str
    flags: tuple[str, ...]
    accumulators: int


def balanced(total: int, most: int) -> list[int]:
    """``total`` as a sum of the fewest parts of at most ``most``, which differ by at most one, larger ones first."""
    count = -(-total // most)
    return [total // count + (part < total % count) for part in range(count)] if total else []


def counted(parts: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and how often each occurs, larger ones first."""
    return [(size, parts.count(size)) for size in sorted(set(parts), reverse=True)]


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """``items`` in the fewest consecutive pieces of at most ``most``, of nearly equal lengths."""
    sizes = balanced(len(items), max(1, most))
    return [items[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def function(head: str, body: Sequence[str], *, cold: bool = False) -> str:
    """A kernel of its own: not inlined, so that registers are allotted to it alone; ``cold``: made short rather than quick."""
    return "\n".join([f"{'COLD ' if cold else ''}KERNEL void {head} {{", *(f"    {line}" for line in body), "}", ""])


def marks(block: Block) -> bool:
    """Whether a byte per output says where its gradient goes; else the output's value says whether it lives."""
    return block.quantizer is not None or (isinstance(block, Conv) and block.members > 1) or is_maximum(block)


def is_maximum(block: Block) -> bool:
    """Whether the block is a pool of its own that takes the maximum."""
    return isinstance(block, Pooling) and not block.layer.average


def keep(valid: int, lanes: int) -> str:
    """Lanes that hold values of a vector whose first ``valid`` do, as a literal."""
    return mask_literal([i < valid for i in range(lanes)])


def mask_literal(chosen: Sequence[bool]) -> str:
    """A vector of integers, all bits set where ``chosen``."""
    return f"(I{len(chosen)}){{{', '.join('-1' if one else '0' for one in chosen)}}}"


def finish(block: Block, lanes: int, z: str, place: str, out: str, mark: str) -> Iterator[str]:
    """What happens to an output vector ``z`` before it is stored; ``place``: the maximum's position, a vector of integers."""
    yield f"I{lanes} dead = (I{lanes}){{0}};"
    if block.limit is not None:
        yield f"dead = {z} <= 0;"
        yield f"{z} = pick{lanes}(dead, (V{lanes}){{0}}, {z});"
        if block.limit != float("inf"):
            yield f"I{lanes} over = {z} >= (real){block.limit};"
            yield f"dead |= over; {z} = pick{lanes}(over, splat{lanes}((real){block.limit}), {z});"
    if block.quantizer is not None:
        yield f"{z} = quantize{lanes}({z}, range, &dead);"
    yield f"store{lanes}({out}, {z});"
    if marks(block):
        yield f"store_bytes{lanes}({mark}, ({place}) | dead);"


def live(block: Block, lanes: int, gradient: str, out: str, mark: str) -> str:
    """``gradient`` where the output lives, else zero."""
    if marks(block):
        return f"pick{lanes}(bytes{lanes}({mark}) == DEAD, (V{lanes}){{0}}, {gradient})"
    if block.limit is None:
        return gradient
    alive = f"load{lanes}({out}) > 0"
    if block.limit != float("inf"):
        alive = f"({alive}) & (load{lanes}({out}) < (real){block.limit})"
    return f"pick{lanes}({alive}, {gradient}, (V{lanes}){{0}})"


def pixels(plane: Plane, stride: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Values between windows that are neighbours vertically and horizontally in ``plane``."""
    return stride[0] * plane.row, stride[1] * plane.depth
