"""Backward kernels of convolutions, for one example.

A maximum sends each channel's gradient to one position of its window, so both gradients are sparse: the weights' is taken channel
by channel, with a kernel's rows in registers over all outputs; the inputs' output by output, with the channels of one position
together. First layers of few inputs have their outputs in the lanes instead.

``gm`` is the compact masked gradient [outputs, channels]; ``at`` the place in the source plane of each output's window position.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.native.blocks import LANES, Block, Conv, Depthwise, lanes_of
from fedcore.native.forward import Correlation
from fedcore.native.tiles import Target, balanced, function, keep, live

__all__ = [
    "by_position", "conv_input_gradient", "conv_weight_gradient", "depthwise_input_gradient", "depthwise_weight_gradient",
    "masked_gradient", "pointwise_convolution", "spread_size",
]  # fmt: skip


def pointwise_convolution(block: Conv) -> bool:
    """Whether the block is a matrix product over pixels."""
    return block.layer.kernel == (1, 1) == block.layer.stride and block.members == 1 and block.layer.padding == (0, 0)


def by_position(block: Block) -> bool:
    """Whether the weight gradient wants the place of every window's maximum."""
    return isinstance(block, Conv) and not block.by_tap and block.members > 1


def masked_gradient(name: str, block: Block, bias: bool) -> str:
    """``name(d, out, mark, gm, at, gb)``: gm, at, and the bias's gradient added to gb; d, out and mark at pixel (0, 0)."""
    target, lanes = block.target, lanes_of(block.target.channels)
    body = [f"for (long v = 0; v < {target.depth}; v += {lanes}) {{"]
    if bias:
        body.append(f"V{lanes} sum = load{lanes}(gb + v);")
    body.append(f"for (long h = 0; h < {target.height}; h++) for (long i = 0; i < {target.width}; i++) {{")
    body.append(f"const long p = (h * {target.width} + i) * {target.depth} + v, q = h * {target.row} + i * {target.depth} + v;")
    body.append(f"V{lanes} g = {live(block, lanes, f'load{lanes}(d + q)', 'out + q', 'mark + q')};")
    body.append(f"store{lanes}(gm + p, g);")
    if bias:
        body.append("sum = sum + g;")
    if by_position(block):
        assert isinstance(block, Conv)
        body += _positions(block, lanes)
    body.append("}")
    if bias:
        body.append(f"store{lanes}(gb + v, sum);")
    head = "const real *restrict d, const real *out, const uint8_t *mark, real *restrict gm, word *restrict at, real *restrict gb"
    return function(f"{name}({head})", [*body, "}"])


def _window_steps(block: Conv) -> tuple[int, int]:
    """Values in the source plane between windows of neighbouring outputs."""
    (sh, sw), (wh, ww) = block.layer.stride, block.window
    return wh * sh * block.source.row, ww * sw * block.source.depth


def _member_offsets(block: Conv) -> list[int]:
    (sh, sw), (wh, ww) = block.layer.stride, block.window
    return [y * sh * block.source.row + x * sw * block.source.depth for y in range(wh) for x in range(ww)]


def _positions(block: Conv, lanes: int) -> Iterator[str]:
    down, right = _window_steps(block)
    yield f"I{lanes} k = bytes{lanes}(mark + q), where = (I{lanes}){{0}} + (word)(h * {down} + i * {right});"
    for m, offset in enumerate(_member_offsets(block)):
        if m:
            yield f"where = where + ((k == {m}) & {offset});"
    yield f"store_words{lanes}(at + p, where);"


def conv_weight_gradient(name: str, block: Conv, target: Target) -> str:
    """``name(x, gm, at, mark, g)``: added to g, in the weight's layout."""
    if block.by_tap:
        return _by_tap(name, block, target)
    return _by_row(name, block, target) if block.members > 1 else _by_tile(name, block, target)


_WEIGHT = "const real *restrict x, const real *restrict gm, const word *restrict at, const uint8_t *restrict mark, real *restrict g"


def _vectors(block: Conv) -> list[tuple[int, int, int]]:
    """The vectors of one filter: offset in the weights, in the source plane, and how many lanes hold weights."""
    lanes = lanes_of(block.span)
    return [
        (r * block.run + v, r * block.source.row + v, min(lanes, block.span - v))
        for r in range(block.layer.kernel[0]) for v in range(0, block.run, lanes)
    ]  # fmt: skip


def _filter(block: Conv) -> int:
    return block.layer.kernel[0] * block.run


def _by_row(name: str, block: Conv, target: Target) -> str:
    lanes, outputs, depth = lanes_of(block.span), block.target.channels, block.target.depth
    count = block.target.height * block.target.width
    vectors = _vectors(block)
    group = max(1, min(outputs, target.accumulators // min(len(vectors), target.accumulators), -(-8 // len(vectors))))
    chunks = _chunks(vectors, target.accumulators // group)
    kernels, body = [], []
    for number, chunk in enumerate(chunks):
        at = 0
        for size, repeat in _counted(balanced(outputs, group)):
            head = f"{name}_{number}_{size}"
            if repeat:
                kernels.append(_row_kernel(head, lanes, chunk, size, count, depth, _filter(block)))
            shift = f"(o * {size} + {at})"
            body.append(f"for (long o = 0; o < {repeat}; o++)")
            body.append(f"    {head}(x, gm + {shift}, at + {shift}, mark, g + {shift} * {_filter(block)});")
            at += size * repeat
    return "\n".join([*kernels, function(f"{name}({_WEIGHT})", body)])


def _chunks(vectors: list[tuple[int, int, int]], most: int) -> list[list[tuple[int, int, int]]]:
    sizes, at, chunks = balanced(len(vectors), max(1, most)), 0, []
    for size in sizes:
        chunks.append(vectors[at : at + size])
        at += size
    return chunks


def _counted(parts: list[int]) -> list[tuple[int, int]]:
    return [(size, parts.count(size)) for size in sorted(set(parts), reverse=True)]


def _row_kernel(
    head: str, lanes: int, vectors: list[tuple[int, int, int]], group: int, count: int, depth: int, size: int
) -> str:  # fmt: skip
    each = [(i, n, *vector) for i in range(group) for n, vector in enumerate(vectors)]
    body = [f"V{lanes} a{i}_{n} = load{lanes}(g + {i * size + there});" for i, n, there, _, _ in each]
    body.append(f"for (long p = 0; p < {count * depth}; p += {depth}) {{")
    body += [f"    const real *x{i} = x + at[p + {i}]; const real s{i} = gm[p + {i}];" for i in range(group)]
    body += [f"    a{i}_{n} = a{i}_{n} + load{lanes}(x{i} + {here}) * s{i};" for i, n, _, here, _ in each]
    body.append("}")
    body += [_kept(lanes, f"a{i}_{n}", f"g + {i * size + there}", valid) for i, n, there, _, valid in each]
    return function(f"{head}({_WEIGHT})", body)


def _kept(lanes: int, value: str, to: str, valid: int) -> str:
    """Store a sum whose last lanes may hold what is no weight."""
    if valid < lanes:
        value = f"pick{lanes}({keep(valid, lanes)}, {value}, (V{lanes}){{0}})"
    return f"store{lanes}({to}, {value});"


def _by_tile(name: str, block: Conv, target: Target) -> str:
    """Without a maximum all channels of an output saw the same inputs: outputs by vectors in registers."""
    lanes, outputs, size_of = lanes_of(block.span), block.target.channels, _filter(block)
    per_row = block.run // lanes
    wide = max(balanced(per_row, 4 if target.accumulators > 8 else 2))
    tall = max(1, min(outputs, target.accumulators, 24) // wide)
    tall = max(balanced(outputs, tall))
    kernels, body, at = [], [f"for (long r = 0; r < {block.layer.kernel[0]}; r++, x += {block.source.row}, g += {block.run}) {{"], 0
    for size, repeat in _counted(balanced(outputs, tall)):
        across = 0
        for columns, again in _counted(balanced(per_row, wide)):
            head = f"{name}_{size}x{columns}"
            kernels.append(_tile_kernel(head, block, lanes, size, columns))
            for i in range(again):
                shift = (across + i * columns) * lanes
                last = shift + columns * lanes == block.run and block.span < block.run
                body.append(f"for (long o = 0; o < {repeat}; o++)")
                first = f"o * {size} + {at}"
                body.append(f"    {head}(x + {shift}, gm + {first}, at, mark, g + ({first}) * {size_of} + {shift});")
                if last:
                    valid = block.span - (block.run - lanes)
                    body.append(f"for (long o = {at}; o < {at + size * repeat}; o++) {{")
                    body.append(f"    real *e = g + o * {_filter(block)} + {block.run - lanes};")
                    body.append("    " + _kept(lanes, f"load{lanes}(e)", "e", valid) + " }")
            across += columns * again
        at += size * repeat
    return "\n".join([*dict.fromkeys(kernels), function(f"{name}({_WEIGHT})", [*body, "}"])])


def _tile_kernel(head: str, block: Conv, lanes: int, tall: int, wide: int) -> str:
    (sh, sw), source, target = block.layer.stride, block.source, block.target
    each = [(i, c) for i in range(tall) for c in range(wide)]
    body = [f"V{lanes} a{i}_{c} = load{lanes}(g + {i * _filter(block) + c * lanes});" for i, c in each]
    if source.dense and block.layer.stride == (1, 1) and block.layer.kernel == (1, 1):
        body.append(f"for (long h = 0; h < {target.height * target.width}; h++, x += {source.depth}, gm += {target.depth}) {{")
    else:
        body.append(f"for (long h = 0; h < {target.height}; h++, x += {sh * source.row - target.width * sw * source.depth})")
        body.append(f"for (long i = 0; i < {target.width}; i++, x += {sw * source.depth}, gm += {target.depth}) {{")
    body += [f"    V{lanes} x{c} = load{lanes}(x + {c * lanes});" for c in range(wide)]
    for i in range(tall):
        body.append(f"    real s{i} = gm[{i}];")
        body += [f"    a{i}_{c} = a{i}_{c} + x{c} * s{i};" for c in range(wide)]
    body.append("}")
    body += [f"store{lanes}(g + {i * _filter(block) + c * lanes}, a{i}_{c});" for i, c in each]
    return function(f"{head}({_WEIGHT})", body)


def _by_tap(name: str, block: Conv, target: Target) -> str:
    lanes, depth, source = lanes_of(block.target.channels), block.target.depth, block.source
    kh, kw = block.layer.kernel
    taps = [(y, x, c) for y in range(kh) for x in range(kw) for c in range(source.channels)]
    kernels, body, first = [], [], 0
    for number, size in enumerate(balanced(len(taps), min(target.accumulators, 26))):
        chunk = taps[first : first + size]
        kernels.append(_tap_kernel(f"{name}_{number}", block, lanes, first, chunk))
        body.append(f"for (long v = 0; v < {depth}; v += {lanes}) {name}_{number}(x, gm + v, at, mark + v, g + v);")
        first += size
    return "\n".join([*kernels, function(f"{name}({_WEIGHT})", body)])


def _tap_kernel(head: str, block: Conv, lanes: int, first: int, taps: list[tuple[int, int, int]]) -> str:
    source, target = block.source, block.target
    down, right = _window_steps(block)
    places = [y * source.row + x * source.depth + c for y, x, c in taps]
    body = [f"V{lanes} a{k} = load{lanes}(g + {(first + k) * target.depth});" for k in range(len(taps))]
    body.append(f"for (long h = 0; h < {target.height}; h++) for (long i = 0; i < {target.width}; i++) {{")
    body.append(f"const real *p = x + h * {down} + i * {right};")
    body.append(f"V{lanes} d = load{lanes}(gm + (h * {target.width} + i) * {target.depth});")
    if block.members > 1:
        body.append(f"I{lanes} k = bytes{lanes}(mark + h * {target.row} + i * {target.depth});")
    for m, offset in enumerate(_member_offsets(block)):
        chosen = f"pick{lanes}(k == {m}, d, (V{lanes}){{0}})" if block.members > 1 else "d"
        body.append(f"{{ V{lanes} s = {chosen};")
        body += [f"  a{k} = a{k} + s * p[{offset + place}];" for k, place in enumerate(places)]
        body.append("}")
    body.append("}")
    body += [f"store{lanes}(g + {(first + k) * target.depth}, a{k});" for k in range(len(taps))]
    return function(f"{head}({_WEIGHT})", body)


def conv_input_gradient(name: str, block: Conv, target: Target) -> str:
    """``name(w, gm, mark, dx)``: dx is overwritten; weights by row, mark at pixel (0, 0)."""
    return _by_pixel(name, block, target) if pointwise_convolution(block) else _scattered(name, block, target)


_INPUT = "const real *restrict w, const real *restrict gm, const uint8_t *restrict mark, real *restrict dx"


def _scattered(name: str, block: Conv, target: Target) -> str:
    lanes, depth = lanes_of(block.span), block.target.depth
    words = [(first, min(64, depth - first)) for first in range(0, depth, 64)]
    down, right = _window_steps(block)
    body = [f"clear(dx, {block.source.size});"]
    body.append(f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++) {{")
    body.append(f"const real *g = gm + (h * {block.target.width} + i) * {depth};")
    body.append(f"const uint8_t *k = mark + h * {block.target.row} + i * {depth};")
    for m, offset in enumerate(_member_offsets(block)):
        for number, (first, size) in enumerate(words):
            body.append(f"const uint64_t b{m}_{number} = {_mask(block, m, first, size)};")
        body.append(f"{{ real *to = dx + h * {down} + i * {right} + {offset};")
        for chunk in _chunks(_vectors(block), min(target.accumulators, 24)):
            body += ["{", *_gathered(lanes, chunk, words, m, _filter(block)), "}"]
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


def _gathered(
    lanes: int, vectors: list[tuple[int, int, int]], words: list[tuple[int, int]], member: int, size: int
) -> Iterator[str]:  # fmt: skip
    yield from (f"V{lanes} a{n} = (V{lanes}){{0}};" for n in range(len(vectors)))
    for number, (first, _) in enumerate(words):
        yield f"for (uint64_t b = b{member}_{number}; b; b &= b - 1) {{"
        yield f"    const long o = __builtin_ctzll(b) + {first}; const real s = g[o]; const real *f = w + o * {size};"
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
    for columns, again in _counted(balanced(vectors, wide)):
        for _ in range(again):
            at = 0
            for tile, repeat in _counted(balanced(width, tall)):
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
    body.append(f"for (long o = 0; o < {block.target.channels}; o++, gm++, w += {_filter(block)}) {{")
    body += [f"    V{lanes} w{c} = load{lanes}(w + {c * lanes});" for c in range(wide)]
    for t in range(tall):
        body.append(f"    real s{t} = gm[{t * block.target.depth}];")
        body += [f"    a{t}_{c} = a{t}_{c} + w{c} * s{t};" for c in range(wide)]
    body.append("}")
    body += [f"store{lanes}(dx + {t * block.source.depth + c * lanes}, a{t}_{c});" for t, c in each]
    return function(f"{head}({_INPUT})", body)


def depthwise_weight_gradient(name: str, block: Depthwise, target: Target) -> str:
    """``name(x, gm, g)``: added to g."""
    lanes, (kh, kw), (sh, sw) = lanes_of(block.target.channels), block.layer.kernel, block.layer.stride
    source, depth = block.source, block.target.depth
    taps = [(y, x) for y in range(kh) for x in range(kw)]
    body, first = [f"for (long v = 0; v < {depth}; v += {lanes}) {{"], 0
    for size in balanced(len(taps), target.accumulators):
        chunk = taps[first : first + size]
        body.append("{")
        body += [f"V{lanes} a{k} = load{lanes}(g + {(first + k) * depth} + v);" for k in range(size)]
        body.append(f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++) {{")
        body.append(f"const real *p = x + h * {sh * source.row} + i * {sw * source.depth} + v;")
        body.append(f"V{lanes} s = load{lanes}(gm + (h * {block.target.width} + i) * {depth} + v);")
        body += [f"a{k} = a{k} + s * load{lanes}(p + {y * source.row + x * source.depth});" for k, (y, x) in enumerate(chunk)]
        body.append("}")
        body += [f"store{lanes}(g + {(first + k) * depth} + v, a{k});" for k in range(size)]
        body.append("}")
        first += size
    return function(f"{name}(const real *restrict x, const real *restrict gm, real *restrict g)", [*body, "}"])


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


def depthwise_input_gradient(name: str, block: Depthwise) -> str:
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
    correlation = Correlation(lanes, block.layer.kernel, depth, (source.height, source.width), (row, depth, row, depth))
    correlation.flipped = True

    def stored(t: int, i: str) -> Iterator[str]:
        yield f"store{lanes}(dx + {source.origin} + h * {source.row} + {i} * {source.depth} + v, a{t});"

    body += correlation.lines(f"(V{lanes}){{0}}", stored)
    head = "const real *restrict w, const real *restrict gm, real *restrict spread, real *restrict dx"
    return function(f"{name}({head})", [*body, "}"])
