"""Backward kernels of convolutions that give the gradient of a layer's inputs, for one example.

``gm`` is the compact masked gradient [outputs, channels]; dx is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.native.blocks import LANES, Conv, Depthwise, lanes_of
from fedcore.native.forward import Correlation
from fedcore.native.tiles import Target, balanced, chunks, counted, function
from fedcore.native.weight_gradients import Vector, filter_size, filter_vectors, member_offsets, window_steps

__all__ = ["conv_input_gradient", "depthwise_input_gradient", "spread_size"]


def _pointwise(block: Conv) -> bool:
    """Whether the block is a matrix product over pixels."""
    return block.layer.kernel == (1, 1) == block.layer.stride and block.members == 1 and block.layer.padding == (0, 0)


def conv_input_gradient(name: str, block: Conv, target: Target) -> str:
    """``name(w, gm, mark, dx)``: dx is overwritten; weights by row, mark at pixel (0, 0)."""
    return _by_pixel(name, block, target) if _pointwise(block) else _scattered(name, block, target)


_INPUT = "const real *restrict w, const real *restrict gm, const uint8_t *restrict mark, real *restrict dx"


def _scattered(name: str, block: Conv, target: Target) -> str:
    """Output by output: the channels of each member of its window, their filters added up in registers, then to the inputs."""
    depth = block.target.depth
    words = [(first, min(64, depth - first)) for first in range(0, depth, 64)]
    down, right = window_steps(block)
    body = [f"clear(dx, {block.source.size});"]
    body.append(f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++) {{")
    body.append(f"const real *g = gm + (h * {block.target.width} + i) * {depth};")
    body.append(f"const uint8_t *k = mark + h * {block.target.row} + i * {depth};")
    for m, offset in enumerate(member_offsets(block)):
        body += [f"const uint64_t b{m}_{n} = {_mask(block, m, *word)};" for n, word in enumerate(words)]
        body.append(f"{{ real *const to = dx + h * {down} + i * {right} + {offset};")
        for chunk in chunks(filter_vectors(block), min(target.accumulators, 24)):
            body += ["{", *_gathered(block, m, words, chunk), "}"]
        body.append("}")
    return function(f"{name}({_INPUT})", [*body, "}"])


def _mask(block: Conv, member: int, first: int, size: int) -> str:
    """The channels whose gradient goes to a member of the window, as bits."""
    lanes = lanes_of(block.target.channels)
    parts = []
    for at in range(0, size, lanes):
        test = f"members{lanes}(k + {first + at}, {member})" if block.members > 1 else f"nonzero{lanes}(g + {first + at})"
        parts.append(f"{test} << {at}" if at else test)
    return " | ".join(parts)


def _gathered(block: Conv, member: int, words: list[tuple[int, int]], vectors: Sequence[Vector]) -> Iterator[str]:
    """The filters of one member's channels, some of their vectors."""
    lanes = lanes_of(block.span)
    yield from (f"V{lanes} a{n} = (V{lanes}){{0}};" for n in range(len(vectors)))
    for number, (first, _) in enumerate(words):
        yield f"for (uint64_t b = b{member}_{number}; b; b &= b - 1) {{"
        yield f"    const long o = __builtin_ctzll(b) + {first}; const real s = g[o]; const real *f = w + o * {filter_size(block)};"
        yield from (f"    a{n} = a{n} + load{lanes}(f + {there}) * s;" for n, (there, _, _) in enumerate(vectors))
        yield "}"
    yield from (f"store{lanes}(to + {here}, load{lanes}(to + {here}) + a{n});" for n, (_, here, _) in enumerate(vectors))


def _by_pixel(name: str, block: Conv, target: Target) -> str:
    """A matrix product: pixels by vectors of input channels in registers."""
    source, lanes = block.source, lanes_of(block.source.channels)
    height, width = (1, source.height * source.width) if source.dense else (source.height, source.width)
    vectors = source.depth // lanes
    wide = max(balanced(vectors, 4 if target.accumulators > 8 else 2))
    tall = max(balanced(width, max(1, target.accumulators // wide)))
    kernels, body, across = [], [f"for (long h = 0; h < {height}; h++) {{"], 0
    for columns, again in counted(balanced(vectors, wide)):
        for _ in range(again):
            at = 0
            for tile, repeat in counted(balanced(width, tall)):
                head = f"{name}_{tile}x{columns}"
                kernels.append(_pixel_kernel(head, block, lanes, tile, columns))
                where = f"(h * {width} + {at} + i * {tile}) * {block.target.depth}"
                to = f"{source.origin + across} + h * {source.row} + ({at} + i * {tile}) * {source.depth}"
                body.append(f"    for (long i = 0; i < {repeat}; i++) {head}(w + {across}, gm + {where}, mark, dx + {to});")
                at += tile * repeat
            across += columns * lanes
    return "\n".join([*dict.fromkeys(kernels), function(f"{name}({_INPUT})", [*body, "}"])])


def _pixel_kernel(head: str, block: Conv, lanes: int, tall: int, wide: int) -> str:
    each = [(t, c) for t in range(tall) for c in range(wide)]
    body = [f"V{lanes} a{t}_{c} = (V{lanes}){{0}};" for t, c in each]
    body.append(f"for (long o = 0; o < {block.target.channels}; o++, gm++, w += {filter_size(block)}) {{")
    body += [f"    V{lanes} w{c} = load{lanes}(w + {c * lanes});" for c in range(wide)]
    for t in range(tall):
        body.append(f"    real s{t} = gm[{t * block.target.depth}];")
        body += [f"    a{t}_{c} = a{t}_{c} + w{c} * s{t};" for c in range(wide)]
    body.append("}")
    body += [f"store{lanes}(dx + {t * block.source.depth + c * lanes}, a{t}_{c});" for t, c in each]
    return function(f"{head}({_INPUT})", body)


def _spread(block: Depthwise) -> tuple[int, int]:
    """Height and width of the gradient with the zeros that a stride leaves between outputs, and those around them."""
    sizes = zip(
        (block.source.height, block.source.width), (block.target.height, block.target.width),
        block.layer.kernel, block.layer.stride, block.layer.padding, strict=True,
    )  # fmt: skip
    high, wide = (max(source + pad + k - 1, (out - 1) * step + 1 + 2 * (k - 1)) for source, out, k, step, pad in sizes)
    return high, wide


def spread_size(block: Depthwise) -> int:
    """Values of the spread gradient, zero at first."""
    high, wide = _spread(block)
    return high * wide * block.target.depth + LANES


def depthwise_input_gradient(name: str, block: Depthwise, target: Target) -> str:
    """``name(w, gm, spread, dx)``: the forward kernel on the spread gradient with its taps reversed."""
    lanes, depth, (kh, kw) = lanes_of(block.target.channels), block.target.depth, block.layer.kernel
    (sh, sw), (ph, pw), source = block.layer.stride, block.layer.padding, block.source
    row = _spread(block)[1] * depth
    body = [f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++)"]
    body.append(f"for (long v = 0; v < {depth}; v += {lanes})")
    body.append(f"    store{lanes}(spread + (h * {sh} + {kh - 1}) * {row} + (i * {sw} + {kw - 1}) * {depth} + v,")
    body.append(f"        load{lanes}(gm + (h * {block.target.width} + i) * {depth} + v));")
    body.append(f"const real *x = spread + {ph * row + pw * depth};")
    body.append(f"for (long v = 0; v < {depth}; v += {lanes}) {{")
    correlation = Correlation(lanes, block.layer.kernel, depth, (source.height, source.width), (row, depth, row, depth), target)
    correlation.flipped = True

    def stored(t: int, i: str) -> Iterator[str]:
        yield f"store{lanes}(dx + {source.origin} + h * {source.row} + {i} * {source.depth} + v, a{t});"

    body += correlation.lines(f"(V{lanes}){{0}}", stored)
    head = "const real *restrict w, const real *restrict gm, real *restrict spread, real *restrict dx"
    return function(f"{name}({head})", [*body, "}"])
