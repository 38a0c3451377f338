"""Kernels of fully connected layers, on a batch's rows: weights [outputs, inputs], inputs in the lanes.

Forward each output is a vector of partial sums, added up by a tree that transposes; the other two products need no such sum. The
optimizer's step is part of the weight gradient: a weight is read and written once for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fedcore.native.blocks import LANES, Linear
from fedcore.native.order import arranged_row
from fedcore.native.tiles import Target, balanced, counted, finish, function, live

__all__ = ["dense_finish", "dense_forward", "dense_input_gradient", "dense_masked", "dense_noised", "dense_update"]

_ROWS = (10, 4, 1)  # rows of a tile


def _by_rows(name: str, arguments: str, call: str, advance: str, rows: int) -> str:
    """Split a batch's rows among the kernels ``name_P``: the split with the least cost for every number of rows."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for n in range(1, rows + 1):
        best.append(min((best[n - p][0] + max(p, 4) + 1.0, p) for p in _ROWS if p <= n))
    table = ", ".join(str(p) for _, p in best)
    body = [f"static const uint8_t part[] = {{{table}}};", "while (rows > 0) {", "const long p = part[rows];", "switch (p) {"]
    body += [f"case {p}: {name}_{p}({call}); break;" for p in _ROWS if p <= rows]
    body += ["}", advance, "rows -= p;", "}"]
    return function(f"{name}({arguments}, long rows)", body)


def dense_forward(name: str, block: Linear, target: Target, rows: int) -> str:
    """``name(x, w, y, rows)``: y [rows, outputs] without bias."""
    kernels = [_forward_rows(f"{name}_{p}", block, target, p) for p in _ROWS if p <= rows]
    arguments = "const real *restrict x, const real *restrict w, real *restrict y"
    advance = f"x += p * {block.source.size}; y += p * {block.target.size};"
    return "\n".join([*kernels, _by_rows(name, arguments, "x, w, y", advance, rows)])


def _forward_rows(head: str, block: Linear, target: Target, rows: int) -> str:
    outputs = block.layer.shape[0]
    most = max(1, min(outputs, 8, (20 if target.accumulators > 8 else target.accumulators) // rows))
    body, at = [], 0
    if rows > target.accumulators:
        return _forward_split(head, block, target, rows)
    for wide, repeat in counted(balanced(outputs, most)):
        each = [(b, c) for b in range(rows) for c in range(wide)]
        body.append(f"for (long o = {at}; o < {at + wide * repeat}; o += {wide}) {{")
        body += [f"V16 a{b}_{c} = (V16){{0}};" for b, c in each]
        body.append(f"const real *v = w + o * {block.inputs}; real *z = y + o;")
        body.append(f"for (long i = 0; i < {block.inputs}; i += {LANES}) {{")
        body += [f"    V16 w{c} = load16(v + i + {c * block.inputs});" for c in range(wide)]
        for b in range(rows):
            body.append(f"    V16 x{b} = load16(x + i + {b * block.source.size});")
            body += [f"    a{b}_{c} = a{b}_{c} + w{c} * x{b};" for c in range(wide)]
        body.append("}")
        sums = [(f"a{b}_{c}", f"z[{b * block.target.size + c}]") for b, c in each]
        for first in range(0, len(sums), LANES):
            body += ["{", *_tree(sums[first : first + LANES]), "}"]
        body.append("}")
        at += wide * repeat
    return function(f"{head}(const real *restrict x, const real *restrict w, real *restrict y)", body)


def _forward_split(head: str, block: Linear, target: Target, rows: int) -> str:
    """Few registers: the rows one part after the other."""
    parts, kernels, body, at = balanced(rows, max(1, target.accumulators // 2)), [], [], 0
    for size in parts:
        kernels.append(_forward_rows(f"{head}_{size}", block, target, size))
        body.append(f"{head}_{size}(x + {at * block.source.size}, w, y + {at * block.target.size});")
        at += size
    arguments = "const real *restrict x, const real *restrict w, real *restrict y"
    return "\n".join([*dict.fromkeys(kernels), function(f"{head}({arguments})", body)])


def _tree(sums: list[tuple[str, str]]) -> Iterator[str]:
    """Lane sums of up to 16 vectors, stored: each in the order of ``sum16``, two vectors becoming one at every level."""
    level = [(name, [to]) for name, to in sums]
    width, number = LANES, 0
    while width > 1:
        half, merged = width // 2, []
        for first in range(0, len(level), 2):
            a, b = level[first], level[first + 1] if first + 1 < len(level) else None
            count = LANES // width
            low = [s * width + i for s in range(count) for i in range(half)]
            high = [lane + half for lane in low]
            other = [lane + LANES for lane in low] if b else [-1] * len(low)
            above = [lane + half for lane in other] if b else other
            right = b[0] if b else a[0]
            yield f"V16 t{number} = {_shuffle(a[0], right, low + other)} + {_shuffle(a[0], right, high + above)};"
            slots = a[1] + [""] * (count - len(a[1])) + (b[1] if b else [])
            merged.append((f"t{number}", slots))
            number += 1
        level, width = merged, half
    for name, slots in level:
        yield from (f"{to} = {name}[{lane}];" for lane, to in enumerate(slots) if to)


def _shuffle(a: str, b: str, lanes: list[int]) -> str:
    return f"__builtin_shufflevector({a}, {b}, {', '.join(map(str, lanes))})"


def dense_finish(name: str, block: Linear) -> str:
    """``name(y, bias, mark, range, rows)``: bias, activation and rounding, in place."""
    body = [f"for (long b = 0; b < rows; b++, y += {block.target.size}, mark += {block.target.size})"]
    body.append(f"for (long v = 0; v < {block.target.depth}; v += {LANES}) {{")
    body.append("V16 z = load16(y + v)" + (" + load16(bias + v);" if block.bias else ";"))
    body += finish(block, LANES, "z", "(I16){0}", "y + v", "mark + v")
    head = f"{name}(real *restrict y, const real *restrict bias, uint8_t *restrict mark, const Range *range, long rows)"
    return function(head, [*body, "}"])


def dense_masked(name: str, block: Linear) -> str:
    """``name(d, out, mark, gb, rows)``: masks d in place and adds the bias's gradient to gb."""
    size = block.target.size
    body = [f"for (long v = 0; v < {block.target.depth}; v += {LANES}) {{"]
    if block.bias:
        body.append("V16 sum = load16(gb + v);")
    body.append("for (long b = 0; b < rows; b++) {")
    at = f"b * {size} + v"
    body.append(f"V16 g = {live(block, LANES, f'load16(d + {at})', f'out + {at}', f'mark + {at}')};")
    body.append(f"store16(d + {at}, g);")
    if block.bias:
        body.append("sum = sum + g;")
    body.append("}")
    if block.bias:
        body.append("store16(gb + v, sum);")
    head = "real *restrict d, const real *restrict out, const uint8_t *restrict mark, real *restrict gb, long rows"
    return function(f"{name}({head})", [*body, "}"])


def dense_input_gradient(name: str, block: Linear, target: Target, rows: int) -> str:
    """``name(d, w, dx, rows)``: dx [rows, inputs]."""
    arguments = "const real *restrict d, const real *restrict w, real *restrict dx"
    kernels = [_backward_rows(f"{name}_{p}", block, target, p) for p in _ROWS if p <= rows]
    advance = f"d += p * {block.target.size}; dx += p * {block.source.size};"
    return "\n".join([*kernels, _by_rows(name, arguments, "d, w, dx", advance, rows)])


def _backward_rows(head: str, block: Linear, target: Target, rows: int) -> str:
    body, first = [], 0
    for part in balanced(rows, target.accumulators):
        wide = max(1, min(4, target.accumulators // part))
        vectors, at = block.inputs // LANES, 0
        sizes = balanced(vectors, wide)
        for size in sorted(set(sizes), reverse=True):
            each = [(b, c) for b in range(part) for c in range(size)]
            end = at + sizes.count(size) * size * LANES
            body.append(f"for (long i = {at}; i < {end}; i += {size * LANES}) {{")
            body += [f"V16 a{b}_{c} = (V16){{0}};" for b, c in each]
            body.append(f"const real *v = w + i, *g = d + {first * block.target.size};")
            body.append(f"for (long o = 0; o < {block.layer.shape[0]}; o++, v += {block.inputs}, g++) {{")
            body += [f"    V16 w{c} = load16(v + {c * LANES});" for c in range(size)]
            for b in range(part):
                body.append(f"    real s{b} = g[{b * block.target.size}];")
                body += [f"    a{b}_{c} = a{b}_{c} + w{c} * s{b};" for c in range(size)]
            body.append("}")
            body += [f"store16(dx + i + {(first + b) * block.source.size + c * LANES}, a{b}_{c});" for b, c in each]
            body.append("}")
            at = end
        first += part
    return function(f"{head}(const real *restrict d, const real *restrict w, real *restrict dx)", body)


def dense_update(name: str, block: Linear, target: Target, rounded: str = "") -> str:
    """``name(d, x, w, now, start, velocity, g, spare, q, rule, rows, first, last)``: a batch's weight gradient, the step to w.

    A batch that comes in several parts is summed in g: ``first`` begins it, ``last`` makes the step. Only the plain step is made
    from registers: others wait in ``spare``, so that what they read beside is read in one run. The kernel ``rounded``, if there
    is one, brings new weights to q while they are near.
    """
    heights, widths = _tiles(block, target)
    kernels = [_update_tile(f"{name}_{tall}x{wide}", block, tall, wide) for tall, _ in heights for wide, _ in widths]
    body = _rows_of(name, block, target, rounded, lambda _: ["const real *const from = first ? 0 : g + of;"])
    return "\n".join([*kernels, function(f"{name}({_UPDATE})", list(body))])


def dense_noised(name: str, tiles: str, block: Linear, target: Target, rounded: str = "") -> str:
    """``name(..., noise)``: as `dense_update`, whose tiles it calls, for sums that begin with noise, drawn as it is needed."""
    inputs, arranged = math.prod(block.weight.dims[1:]), f"arranged_{name}"

    def begun(rows: int) -> list[str]:
        if inputs == block.inputs and block.source.channels in {1, inputs}:
            return [f"const real *const from = first ? drawn(noise, {rows * inputs}) : g + of;"]
        body = f"for (long r = 0; r < {rows}; r++) {arranged}(drawn(noise, {inputs}), g + of + r * {block.inputs});"
        return ["const real *const from = g + of;", f"if (first) {body}"]

    body = list(_rows_of(tiles, block, target, rounded, begun))
    return "\n".join([arranged_row(arranged, block), function(f"{name}({_UPDATE}, Noise *noise)", body)])


def _tiles(block: Linear, target: Target) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Heights of tiles in outputs, and widths in vectors of inputs, with how often each occurs."""
    vectors, outputs = block.inputs // LANES, block.layer.shape[0]
    wide = max(balanced(vectors, 3 if target.accumulators > 8 else 2))
    tall = max(balanced(outputs, max(1, min(8, target.accumulators // wide))))
    return counted(balanced(outputs, tall)), counted(balanced(vectors, wide))


def _rows_of(
    tiles: str, block: Linear, target: Target, rounded: str, begun: Callable[[int], list[str]]
) -> Iterator[str]:  # fmt: skip
    """All tiles, some rows after others; ``begun(rows)`` says where their sums begin: ``from``, null for zeros."""
    (heights, widths), down = _tiles(block, target), 0
    for size, repeat in heights:
        across = 0
        yield f"for (long o = {down}; o < {down + size * repeat}; o += {size}) {{"
        yield f"const long of = o * {block.inputs};"
        yield from begun(size)
        for width, columns in widths:
            end = across + columns * width * LANES
            yield f"for (long i = {across}; i < {end}; i += {width * LANES}) {{"
            yield "real *const to = !last ? g + of + i : rule->plain ? 0 : spare + i;"
            yield f"{tiles}_{size}x{width}(d + o, x + i, w + of + i, now + of + i, from ? from + i : 0, to, rule, rows);"
            yield "}"
            across = end
        count = size * block.inputs
        yield f"if (last && !rule->plain) steps(w + of, now + of, start + of, velocity + of, spare, {count}, rule);"
        if rounded:
            yield f"if (last && !rule->end) {rounded}(w + of, q + of, {size});"
        yield "}"
        down += size * repeat


_UPDATE = (
    "const real *restrict d, const real *restrict x, real *w, const real *now, const real *start, real *velocity, "
    "real *g, real *spare, real *q, const Rule *rule, long rows, int first, int last"
)
_TILE = (
    "const real *restrict d, const real *restrict x, real *w, const real *now, const real *from, real *to, const Rule *rule, "
    "long rows"
)


def _update_tile(head: str, block: Linear, tall: int, wide: int) -> str:
    each = [(o, c, o * block.inputs + c * LANES) for o in range(tall) for c in range(wide)]
    body = [f"V16 a{o}_{c} = (V16){{0}};" for o, c, _ in each]
    body.append("if (from) {")
    body += [f"a{o}_{c} = load16(from + {at});" for o, c, at in each]
    body.append("}")
    body.append(f"for (long b = 0; b < rows; b++, d += {block.target.size}, x += {block.source.size}) {{")
    body += [f"    V16 x{c} = load16(x + {c * LANES});" for c in range(wide)]
    for o in range(tall):
        body.append(f"    real s{o} = d[{o}];")
        body += [f"    a{o}_{c} = a{o}_{c} + x{c} * s{o};" for c in range(wide)]
    body.append("}")
    body.append("if (to) {")
    body += [f"store16(to + {at}, a{o}_{c});" for o, c, at in each]
    body.append("} else {")
    body += [f"plain16(w + {at}, now + {at}, a{o}_{c}, rule);" for o, c, at in each]
    body.append("}")
    return function(f"{head}({_TILE})", body)
