"""Forward kernels of convolutions: a tile of output positions by vectors of output channels, in registers.

All positions of a pooling window are in one tile, so that the maximum, its place (a byte), ReLU and rounding happen before anything
is stored. A kernel row is one run of neighbouring values in the source plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedcore.native.blocks import Conv, Depthwise, lanes_of
from fedcore.native.tiles import Target, balanced, counted, finish, function, pixels

__all__ = ["conv_forward", "depthwise_forward"]


def conv_forward(name: str, block: Conv, target: Target) -> str:
    """``name(x, w, bias, out, mark, range)``: one example; x at the plane's begin, weights by tap, out and mark at pixel (0, 0)."""
    lanes = lanes_of(block.target.channels)
    height, width, vectors = block.target.height, block.target.width, block.target.depth // lanes
    if _flattens(block):
        height, width = 1, height * width
    columns, group = _tile(block, width, vectors, target.accumulators)
    groups, tiles = balanced(vectors, group), _overlapping(width, columns)
    sizes = sorted({size for _, size, _ in tiles})
    kernels = [_tile_kernel(f"{name}_{t}x{c}", block, lanes, t, c) for t in sizes for c in sorted(set(groups))]
    row = block.window[0] * block.layer.stride[0] * block.source.row
    step = block.window[1] * block.layer.stride[1] * block.source.depth
    body = [f"for (long h = 0; h < {height}; h++, x += {row}, out += {block.target.row}, mark += {block.target.row}) {{"]
    at_vector = 0
    for c in groups:
        for at, t, repeat in tiles:
            shift = at_vector * lanes
            call = (
                f"{name}_{t}x{c}(x + {at * step} + i * {t * step}, w + {shift}, bias + {shift}, "
                f"out + {at * block.target.depth + shift} + i * {t * block.target.depth}, "
                f"mark + {at * block.target.depth + shift} + i * {t * block.target.depth}, range);"
            )
            body.append(f"    for (long i = 0; i < {repeat}; i++) {call}")
        at_vector += c
    head = f"{name}({_ARGUMENTS})"
    return "\n".join([*kernels, function(head, [*body, "}"])])


_ARGUMENTS = (
    "const real *restrict x, const real *restrict w, const real *restrict bias, real *restrict out, uint8_t *restrict mark, "
    "const Range *range"
)


def _flattens(block: Conv) -> bool:
    simple = block.layer.kernel == (1, 1) and block.layer.stride == (1, 1) and block.members == 1
    return simple and block.source.dense and block.target.dense


def _overlapping(width: int, most: int) -> list[tuple[int, int, int]]:
    """Tiles of at most ``most`` positions as (first, size, how many). One size, and one kernel, where the last one may as well
    begin a little earlier and give some positions again."""
    sizes = balanced(width, most)
    size, count = sizes[0], len(sizes)
    if size != sizes[-1] and size * count <= 1.1 * width:
        return [(0, size, count - 1), (width - size, size, 1)]
    found, at = [], 0
    for one, repeat in counted(sizes):
        found.append((at, one, repeat))
        at += one * repeat
    return found


def _tile(block: Conv, width: int, vectors: int, budget: int) -> tuple[int, int]:
    """Positions and vectors of a tile with the least cost: additions, loads, latency, loop."""
    best = (float("inf"), 1, 1)
    for group in range(1, min(vectors, 8) + 1):
        for columns in range(1, max(1, budget // (group * block.members)) + 1):
            cost = 0.0
            for c in balanced(vectors, group):
                for t in balanced(width, columns):
                    sums = t * block.members * c
                    loads = c + t * block.members
                    cost += max(sums / 2, loads / 2, 4) + 0.6
            best = min(best, (cost, columns, group))
    return best[1], best[2]


def _tile_kernel(head: str, block: Conv, lanes: int, columns: int, vectors: int) -> str:
    (sh, sw), source, depth = block.layer.stride, block.source, block.target.depth
    ww, (kh, kw) = block.window[1], block.layer.kernel
    places = [
        (t, m, (m // ww) * sh * source.row + (t * ww + m % ww) * sw * source.depth)
        for t in range(columns) for m in range(block.members)
    ]  # fmt: skip
    bias = [f"load{lanes}(bias + {c * lanes})" if block.bias else f"(V{lanes}){{0}}" for c in range(vectors)]
    body = [f"V{lanes} a{t}_{m}_{c} = {bias[c]};" for t, m, _ in places for c in range(vectors)]
    if block.taps <= 12:
        body += _unrolled(block, lanes, places, vectors)
        for t in range(columns):
            for c in range(vectors):
                members = [f"a{t}_{m}_{c}" for m in range(block.members)]
                at = str(t * block.target.depth + c * lanes)
                body += ["{", *_maximum(block, lanes, members), *_stored(block, lanes, at), "}"]
        return function(f"{head}({_ARGUMENTS})", body)
    body.append(f"for (long r = 0; r < {kh}; r++, x += {source.row - kw * source.depth}) {{")
    if source.depth == source.channels:
        body.append(f"for (long k = 0; k < {kw * source.depth}; k++, x++, w += {depth}) {{")
    else:
        body.append(f"for (long s = 0; s < {kw}; s++, x += {source.depth - source.channels})")
        body.append(f"for (long k = 0; k < {source.channels}; k++, x++, w += {depth}) {{")
    body += [f"    V{lanes} w{c} = load{lanes}(w + {c * lanes});" for c in range(vectors)]
    for t, m, offset in places:
        body.append(f"    real x{t}_{m} = x[{offset}];")
        body += [f"    a{t}_{m}_{c} = a{t}_{m}_{c} + w{c} * x{t}_{m};" for c in range(vectors)]
    body += ["}", "}", *_emptied(block, lanes, columns, vectors)]
    return function(f"{head}({_ARGUMENTS})", body)


def _emptied(block: Conv, lanes: int, columns: int, vectors: int) -> Iterator[str]:
    """What follows the sums of a large tile, by way of memory: beside so many products one copy of it will do."""
    members, depth = block.members, block.target.depth
    yield f"real sums[{columns * vectors * members * lanes}];"
    each = [(t, c, m) for t in range(columns) for c in range(vectors) for m in range(members)]
    yield from (f"store{lanes}(sums + {number * lanes}, a{t}_{m}_{c});" for number, (t, c, m) in enumerate(each))
    yield "const real *a = sums;"
    yield f"for (long t = 0; t < {columns * depth}; t += {depth})"
    yield f"for (long c = 0; c < {vectors * lanes}; c += {lanes}, a += {members * lanes}) {{"
    yield from _maximum(block, lanes, [f"load{lanes}(a + {m * lanes})" for m in range(members)])
    yield from _stored(block, lanes, "t + c")
    yield "}"


def _unrolled(block: Conv, lanes: int, places: list[tuple[int, int, int]], vectors: int) -> Iterator[str]:
    """The sums of a tile without a loop, for few taps."""
    (kh, kw), source = block.layer.kernel, block.source
    taps = [(r, s, k) for r in range(kh) for s in range(kw) for k in range(source.channels)]
    for number, (r, s, k) in enumerate(taps):
        yield "{"
        yield from (f"V{lanes} w{c} = load{lanes}(w + {number * block.target.depth + c * lanes});" for c in range(vectors))
        for t, m, offset in places:
            at = offset + r * source.row + s * source.depth + k
            yield from (f"a{t}_{m}_{c} = a{t}_{m}_{c} + w{c} * x[{at}];" for c in range(vectors))
        yield "}"


def _maximum(block: Conv, lanes: int, members: list[str]) -> Iterator[str]:
    yield f"V{lanes} z = {members[0]};"
    if block.members > 1:
        yield f"I{lanes} place = (I{lanes}){{0}};"
    for m, member in enumerate(members[1:], 1):
        yield f"{{ V{lanes} other = {member}; I{lanes} more = other > z; z = pick{lanes}(more, other, z);"
        yield f"  place = (more & {m}) | (~more & place); }}"


def _stored(block: Conv, lanes: int, at: str) -> Iterator[str]:
    place = "place" if block.members > 1 else f"(I{lanes}){{0}}"
    return finish(block, lanes, "z", place, f"out + {at}", f"mark + {at}")


def depthwise_forward(name: str, block: Depthwise, target: Target) -> str:
    """``name(x, w, bias, out, mark, range)``, as `conv_forward`; weights [kh, kw, channels]."""
    lanes, plane = lanes_of(block.target.channels), block.target
    body = [f"for (long v = 0; v < {plane.depth}; v += {lanes}) {{"]
    bias = f"load{lanes}(bias + v)" if block.bias else f"(V{lanes}){{0}}"
    correlation = Correlation(
        lanes, block.layer.kernel, plane.depth, (plane.height, plane.width),
        (*pixels(block.source, block.layer.stride), *pixels(block.source)), target,
    )  # fmt: skip

    def stored(t: int, i: str) -> Iterator[str]:
        at = f"h * {plane.row} + {i} * {plane.depth} + v"
        yield f"V{lanes} z = a{t};"
        yield from finish(block, lanes, "z", f"(I{lanes}){{0}}", f"out + {at}", f"mark + {at}")

    body += correlation.lines(bias, stored)
    return function(f"{name}({_ARGUMENTS})", [*body, "}"])


class Correlation:
    """Filters of one vector of channels at offset v, over an image: ``x`` and ``w`` in scope, weights in registers.

    ``steps``: values between outputs (vertical, horizontal) and between taps (vertical, horizontal) in x.
    """

    def __init__(
        self, lanes: int, kernel: tuple[int, int], depth: int, size: tuple[int, int], steps: tuple[int, int, int, int],
        target: Target,
    ) -> None:  # fmt: skip
        self.lanes, self.kernel, self.depth, self.size, self.steps = lanes, kernel, depth, size, steps
        self.columns = min(8, max(1, target.accumulators - 4))  # weights take most registers of a small processor
        self.flipped = False

    def lines(self, begin: str, stored: Callable[[int, str], Iterator[str]]) -> Iterator[str]:
        """Statements for all outputs; ``stored(t, column)`` gives those for accumulator ``a{t}`` at a column."""
        (kh, kw), lanes = self.kernel, self.lanes
        order = [(r, s) for r in range(kh) for s in range(kw)]
        for r, s in order:
            tap = (kh - 1 - r) * kw + kw - 1 - s if self.flipped else r * kw + s
            yield f"V{lanes} w{r}_{s} = load{lanes}(w + {tap * self.depth} + v);"
        yield f"for (long h = 0; h < {self.size[0]}; h++) {{"
        at = 0
        for tile, repeat in counted(balanced(self.size[1], self.columns)):
            yield f"for (long i = {at}; i < {at + tile * repeat}; i += {tile}) {{"
            yield f"const real *p = x + h * {self.steps[0]} + i * {self.steps[1]} + v;"
            for t in range(tile):
                yield f"V{lanes} a{t} = {begin};"
            for r, s in order:
                for t in range(tile):
                    offset = r * self.steps[2] + s * self.steps[3] + t * self.steps[1]
                    yield f"a{t} = a{t} + w{r}_{s} * load{lanes}(p + {offset});"
            for t in range(tile):
                yield from ["{", *stored(t, f"(i + {t})"), "}"]
            yield "}"
            at += tile * repeat
        yield "}"
