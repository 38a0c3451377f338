"""Backward kernels of convolutions that give the gradient of a layer's weights, for one example.

A maximum sends each channel's gradient to one position of its window, so that gradients are sparse: the weights' is taken channel
by channel, with a kernel's rows in registers over all outputs. First layers of few inputs have their outputs in the lanes instead.

``gm`` is the compact masked gradient [outputs, channels]; ``at`` the place in the source plane of each output's window position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.native.blocks import LANES, Block, Conv, Depthwise, lanes_of
from fedcore.native.tiles import Target, balanced, chunks, counted, function, keep, live

__all__ = [
    "Vector", "by_position", "conv_weight_gradient", "depthwise_weight_gradient", "filter_size", "filter_vectors",
    "masked_gradient", "member_offsets", "overwrites", "weights_size",
    "window_steps",
]  # fmt: skip


Vector = tuple[int, int, int]  # of a filter: offset in the weights, in the source plane, and how many lanes hold weights


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


def window_steps(block: Conv) -> tuple[int, int]:
    """Values in the source plane between windows of neighbouring outputs."""
    (sh, sw), (wh, ww) = block.layer.stride, block.window
    return wh * sh * block.source.row, ww * sw * block.source.depth


def member_offsets(block: Conv) -> list[int]:
    """Values in the source plane from a window's first position to each."""
    (sh, sw), (wh, ww) = block.layer.stride, block.window
    return [y * sh * block.source.row + x * sw * block.source.depth for y in range(wh) for x in range(ww)]


def _positions(block: Conv, lanes: int) -> Iterator[str]:
    down, right = window_steps(block)
    yield f"I{lanes} k = bytes{lanes}(mark + q), where = (I{lanes}){{0}} + (word)(h * {down} + i * {right});"
    for m, offset in enumerate(member_offsets(block)):
        if m:
            yield f"where = where + ((k == {m}) & {offset});"
    yield f"store_words{lanes}(at + p, where);"


def conv_weight_gradient(name: str, block: Conv, target: Target) -> str:
    """``name(x, gm, at, mark, g, fresh)``: added to g, in the weight's layout; a ``fresh`` g is overwritten, where the block
    `overwrites`.
    """
    if block.by_tap:
        return _by_tap(name, block, target)
    return _by_row(name, block, target) if block.members > 1 else _by_tile(name, block, target)


def overwrites(block: Block) -> bool:
    """Whether the weight gradient can be told to overwrite what is there, in whole vectors of 16."""
    return isinstance(block, Conv) and by_position(block) and weights_size(block) % LANES == 0


def weights_size(block: Conv) -> int:
    """Values of all filters that lie by row, with their padding."""
    return block.target.channels * filter_size(block)


_WEIGHT = (
    "const real *restrict x, const real *restrict gm, const word *restrict at, const uint8_t *restrict mark, real *restrict g, "
    "int fresh"
)


def filter_vectors(block: Conv) -> list[Vector]:
    """The vectors of one filter."""
    lanes = lanes_of(block.span)
    return [
        (r * block.run + v, r * block.source.row + v, min(lanes, block.span - v))
        for r in range(block.layer.kernel[0]) for v in range(0, block.run, lanes)
    ]  # fmt: skip


def filter_size(block: Conv) -> int:
    """Values of one filter with its padding."""
    return block.layer.kernel[0] * block.run


def _by_row(name: str, block: Conv, target: Target) -> str:
    lanes, outputs, depth = lanes_of(block.span), block.target.channels, block.target.depth
    count = block.target.height * block.target.width
    vectors = filter_vectors(block)
    group = max(1, min(outputs, target.accumulators // min(len(vectors), target.accumulators), -(-8 // len(vectors))))
    kernels, body = [], []
    for number, chunk in enumerate(chunks(vectors, target.accumulators // group)):
        at = 0
        for size, repeat in counted(balanced(outputs, group)):
            head = f"{name}_{number}_{size}"
            if repeat:
                kernels.append(_row_kernel(head, lanes, chunk, size, count, depth, filter_size(block)))
            shift = f"(o * {size} + {at})"
            body.append(f"for (long o = 0; o < {repeat}; o++)")
            body.append(f"    {head}(x, gm + {shift}, at + {shift}, mark, g + {shift} * {filter_size(block)}, fresh);")
            at += size * repeat
    return "\n".join([*kernels, function(f"{name}({_WEIGHT})", body)])


def _row_kernel(
    head: str, lanes: int, vectors: Sequence[Vector], group: int, count: int, depth: int, size: int
) -> str:  # fmt: skip
    each = [(i, n, *vector) for i in range(group) for n, vector in enumerate(vectors)]
    body = [f"V{lanes} a{i}_{n} = (V{lanes}){{0}};" for i, n, _, _, _ in each]
    body += ["if (!fresh) {", *(f"a{i}_{n} = load{lanes}(g + {i * size + there});" for i, n, there, _, _ in each), "}"]
    body.append(f"for (long p = 0; p < {count * depth}; p += {depth}) {{")
    body += [f"    const real *x{i} = x + at[p + {i}]; const real s{i} = gm[p + {i}];" for i in range(group)]
    body += [f"    a{i}_{n} = a{i}_{n} + load{lanes}(x{i} + {here}) * s{i};" for i, n, _, here, _ in each]
    body.append("}")
    body += [f"a{i}_{n} = {_valid(lanes, f'a{i}_{n}', valid)};" for i, n, _, _, valid in each if valid < lanes]
    body += [f"store{lanes}(g + {i * size + there}, a{i}_{n});" for i, n, there, _, _ in each]
    return function(f"{head}({_WEIGHT})", body)


def _valid(lanes: int, value: str, valid: int) -> str:
    return f"pick{lanes}({keep(valid, lanes)}, {value}, (V{lanes}){{0}})"


def _kept(lanes: int, value: str, to: str, valid: int) -> str:
    """Store a sum whose last lanes may hold what is no weight."""
    if valid < lanes:
        value = _valid(lanes, value, valid)
    return f"store{lanes}({to}, {value});"


def _by_tile(name: str, block: Conv, target: Target) -> str:
    """Without a maximum all channels of an output saw the same inputs: outputs by vectors in registers."""
    lanes, outputs, size_of = lanes_of(block.span), block.target.channels, filter_size(block)
    per_row = block.run // lanes
    wide = max(balanced(per_row, 4 if target.accumulators > 8 else 2))
    tall = max(1, min(outputs, target.accumulators, 24) // wide)
    tall = max(balanced(outputs, tall))
    kernels, body, at = [], [f"for (long r = 0; r < {block.layer.kernel[0]}; r++, x += {block.source.row}, g += {block.run}) {{"], 0
    for size, repeat in counted(balanced(outputs, tall)):
        across = 0
        for columns, again in counted(balanced(per_row, wide)):
            head = f"{name}_{size}x{columns}"
            kernels.append(_tile_kernel(head, block, lanes, size, columns))
            for i in range(again):
                shift = (across + i * columns) * lanes
                last = shift + columns * lanes == block.run and block.span < block.run
                body.append(f"for (long o = 0; o < {repeat}; o++)")
                first = f"o * {size} + {at}"
                body.append(f"    {head}(x + {shift}, gm + {first}, at, mark, g + ({first}) * {size_of} + {shift}, fresh);")
                if last:
                    valid = block.span - (block.run - lanes)
                    body.append(f"for (long o = {at}; o < {at + size * repeat}; o++) {{")
                    body.append(f"    real *e = g + o * {filter_size(block)} + {block.run - lanes};")
                    body.append("    " + _kept(lanes, f"load{lanes}(e)", "e", valid) + " }")
            across += columns * again
        at += size * repeat
    return "\n".join([*dict.fromkeys(kernels), function(f"{name}({_WEIGHT})", [*body, "}"])])


def _tile_kernel(head: str, block: Conv, lanes: int, tall: int, wide: int) -> str:
    (sh, sw), source, target = block.layer.stride, block.source, block.target
    each = [(i, c) for i in range(tall) for c in range(wide)]
    body = [f"V{lanes} a{i}_{c} = load{lanes}(g + {i * filter_size(block) + c * lanes});" for i, c in each]
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
    body += [f"store{lanes}(g + {i * filter_size(block) + c * lanes}, a{i}_{c});" for i, c in each]
    return function(f"{head}({_WEIGHT})", body)


def _by_tap(name: str, block: Conv, target: Target) -> str:
    lanes, depth, source = lanes_of(block.target.channels), block.target.depth, block.source
    kh, kw = block.layer.kernel
    taps = [(y, x, c) for y in range(kh) for x in range(kw) for c in range(source.channels)]
    kernels, body, first = [], [], 0
    for number, size in enumerate(balanced(len(taps), min(target.accumulators, 26))):
        chunk = taps[first : first + size]
        kernels.append(_tap_kernel(f"{name}_{number}", block, lanes, first, chunk))
        body.append(f"for (long v = 0; v < {depth}; v += {lanes}) {name}_{number}(x, gm + v, at, mark + v, g + v, fresh);")
        first += size
    return "\n".join([*kernels, function(f"{name}({_WEIGHT})", body)])


def _tap_kernel(head: str, block: Conv, lanes: int, first: int, taps: list[tuple[int, int, int]]) -> str:
    source, target = block.source, block.target
    down, right = window_steps(block)
    places = [y * source.row + x * source.depth + c for y, x, c in taps]
    body = [f"V{lanes} a{k} = load{lanes}(g + {(first + k) * target.depth});" for k in range(len(taps))]
    body.append(f"for (long h = 0; h < {target.height}; h++) for (long i = 0; i < {target.width}; i++) {{")
    body.append(f"const real *p = x + h * {down} + i * {right};")
    body.append(f"V{lanes} d = load{lanes}(gm + (h * {target.width} + i) * {target.depth});")
    if block.members > 1:
        body.append(f"I{lanes} k = bytes{lanes}(mark + h * {target.row} + i * {target.depth});")
    for m, offset in enumerate(member_offsets(block)):
        chosen = f"pick{lanes}(k == {m}, d, (V{lanes}){{0}})" if block.members > 1 else "d"
        body.append(f"{{ V{lanes} s = {chosen};")
        body += [f"  a{k} = a{k} + s * p[{offset + place}];" for k, place in enumerate(places)]
        body.append("}")
    body.append("}")
    body += [f"store{lanes}(g + {(first + k) * target.depth}, a{k});" for k in range(len(taps))]
    return function(f"{head}({_WEIGHT})", body)


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
