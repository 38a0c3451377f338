"""All that is no product: inputs, pools, activations, the loss, rounding of weights, the step of small parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fedcore.native.blocks import (
    LANES,
    Addition,
    Conv,
    Depthwise,
    Input,
    Linear,
    Plane,
    Pointwise,
    Pooling,
    lanes_of,
    padded,
)
from fedcore.native.tiles import finish, function

__all__ = [
    "gather", "loss", "pointwise_forward", "pointwise_input_gradient", "pool_forward", "pool_input_gradient", "round_weights",
    "small_steps", "squared_loss",
]  # fmt: skip

_FORWARD = "const real *restrict x, real *restrict out, uint8_t *restrict mark, const Range *range"
_BACKWARD = "const real *restrict gm, const uint8_t *restrict mark, real *restrict dx"


def gather(name: str, entry: Input) -> str:
    """``name(from, to, range)``: an example in torch's order to its plane; returns zero, nan if a value is not finite."""
    plane = entry.target
    count = plane.channels * plane.height * plane.width
    whole = count // LANES * LANES
    body = ["V16 sum = (V16){0};", f"for (long i = 0; i < {whole}; i += {LANES}) {{", "V16 z = load16(from + i);"]
    body.append("sum = sum + z * (real)0;")
    if (plane.channels == plane.depth == 1 and plane.dense) or (plane.height, plane.width) == (1, 1):
        rounded = "I16 dead; z = quantize16(z, range, &dead);" if entry.quantizer is not None else ""
        body += [rounded, "store16(to + i, z);", "}"]
        body += _scalars(entry, f"for (long i = {whole}; i < {count}; i++)", "from[i]", "to[i]")
    else:
        body.append("}")
        at = f"{plane.origin} + h * {plane.row} + i * {plane.depth} + c"
        sizes = zip("hci", (plane.height, plane.channels, plane.width), strict=True)
        loops = " ".join(f"for (long {k} = 0; {k} < {size}; {k}++)" for k, size in sizes)
        body += _scalars(entry, loops, f"from[(c * {plane.height} + h) * {plane.width} + i]", f"to[{at}]")
    body += ["real check = sum16(sum);", f"for (long i = {whole}; i < {count}; i++) check += from[i] * 0;"]
    body.append("return check;")
    text = function(f"{name}(const real *restrict from, real *restrict to, const Range *range)", body)
    return text.replace("KERNEL void", "KERNEL real", 1)


def _scalars(entry: Input, loops: str, value: str, to: str) -> Iterator[str]:
    yield f"{loops} {{ real s = {value};"
    if entry.quantizer is None:
        yield f"{to} = s; }}"
        return
    yield '{ _Pragma("clang fp contract(off)") real t = s * range->inverse; real u = t + MAGIC; t = u - MAGIC;'
    yield "t = t < range->low ? range->low : t; t = t > range->high ? range->high : t;"
    yield f"{to} = range->on != 0 ? t * range->scale : s; }}}}"


def pointwise_forward(name: str, block: Pointwise | Addition) -> str:
    """``name(x, out, mark, range)``: x, out and mark at pixel (0, 0); for an addition ``name(x, y, out, mark, range)``."""
    lanes, target = lanes_of(block.target.channels), block.target
    body = [f"for (long h = 0; h < {target.height}; h++) for (long i = 0; i < {target.width}; i++)"]
    body.append(f"for (long v = 0; v < {target.depth}; v += {lanes}) {{")
    body.append(f"const long at = h * {target.row} + i * {target.depth} + v;")
    body += _valid("z", "x", block.source, target)
    if isinstance(block, Addition):
        body += [*_valid("t", "y", block.other, target), "z = z + t;"]
    body += finish(block, lanes, "z", f"(I{lanes}){{0}}", "out + at", "mark + at")
    arguments = _FORWARD.replace("x,", "x, const real *restrict y,", 1) if isinstance(block, Addition) else _FORWARD
    return function(f"{name}({arguments})", [*body, "}"])


def _valid(to: str, x: str, source: Plane, target: Plane) -> Iterator[str]:
    """A vector of the source, with zeros in the lanes where only the target's plane has channels."""
    lanes = lanes_of(target.channels)
    yield f"V{lanes} {to} = load{lanes}({x} + h * {source.row} + i * {source.depth} + v);"
    if source.depth < target.depth:
        yield f"if (v + {lanes} > {source.channels})"
        yield f"for (long c = 0; c < {lanes}; c++) {to}[c] = v + c < {source.channels} ? {to}[c] : 0;"


def pointwise_input_gradient(name: str, block: Pointwise | Addition, source: Plane) -> str:
    """``name(gm, mark, dx)``: dx at pixel (0, 0) of the plane ``source``."""
    lanes, target = lanes_of(block.target.channels), block.target
    body = [f"for (long h = 0; h < {target.height}; h++) for (long i = 0; i < {target.width}; i++)"]
    body.append(f"for (long v = 0; v < {min(source.depth, target.depth)}; v += {lanes})")
    body.append(f"    store{lanes}(dx + h * {source.row} + i * {source.depth} + v,")
    body.append(f"        load{lanes}(gm + (h * {target.width} + i) * {target.depth} + v));")
    return function(f"{name}({_BACKWARD})", body)


def _window(block: Pooling) -> list[str]:
    """Loops over outputs, with the part of the window that lies in the image: rows y0..y1, columns x0..x1."""
    (kh, kw), (sh, sw), (ph, pw) = block.layer.kernel, block.layer.stride, block.layer.padding
    lines = [f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++) {{"]
    for axis, kernel, step, pad, size in (("h", kh, sh, ph, block.source.height), ("i", kw, sw, pw, block.source.width)):
        low, high = ("y0", "y1") if axis == "h" else ("x0", "x1")
        lines.append(f"const long {low}s = {axis} * {step} - {pad}, {low} = {low}s < 0 ? 0 : {low}s;")
        lines.append(f"const long {high}e = {low}s + {kernel}, {high} = {high}e > {size} ? {size} : {high}e;")
    if block.layer.average:
        lines.append(f"const real share = 1 / (real)({_counted(block)});")
    return lines


def _counted(block: Pooling) -> str:
    """By how many values a mean divides; torch counts padding, but not what lies beyond it."""
    return str(math.prod(block.layer.kernel)) if block.layer.count_padding else "(y1 - y0) * (x1 - x0)"


def pool_forward(name: str, block: Pooling) -> str:
    """``name(x, out, mark, range)``: x, out and mark at pixel (0, 0)."""
    lanes, source, target = lanes_of(block.target.channels), block.source, block.target
    body = [*_window(block), f"for (long v = 0; v < {target.depth}; v += {lanes}) {{"]
    body.append(f"const long at = h * {target.row} + i * {target.depth} + v;")
    here = f"load{lanes}(x + y * {source.row} + z * {source.depth} + v)"
    place = f"(I{lanes}){{0}}"
    if block.layer.average:
        body += [
            f"V{lanes} a = (V{lanes}){{0}};",
            "for (long y = y0; y < y1; y++) for (long z = x0; z < x1; z++)",
            f"a = a + {here};",
        ]
        body.append("a = a * share;")
    else:
        place = "place"
        body += [f"V{lanes} a = splat{lanes}(0); I{lanes} place = (I{lanes}){{0}}; int begun = 0;"]
        body += ["for (long y = y0; y < y1; y++) for (long z = x0; z < x1; z++) {"]
        body.append(f"V{lanes} t = {here}; I{lanes} more = (t > a) | (word)(begun - 1);")
        body.append(f"place = (more & (word)((y - y0s) * {block.layer.kernel[1]} + z - x0s)) | (~more & place);")
        body += [f"a = pick{lanes}(more, t, a); begun = 1;", "}"]
    body += finish(block, lanes, "a", place, "out + at", "mark + at")
    return function(f"{name}({_FORWARD})", [*body, "}", "}"])


def pool_input_gradient(name: str, block: Pooling) -> str:
    """``name(gm, mark, dx)``: mark at pixel (0, 0) of the target, dx at that of the source, zero before."""
    lanes, source, target = lanes_of(block.target.channels), block.source, block.target
    body = [*_window(block), f"for (long v = 0; v < {target.depth}; v += {lanes}) {{"]
    body.append(f"V{lanes} g = load{lanes}(gm + (h * {target.width} + i) * {target.depth} + v);")
    if block.layer.average:
        body.append("g = g * share;")
    else:
        body.append(f"I{lanes} place = bytes{lanes}(mark + h * {target.row} + i * {target.depth} + v);")
    body.append("for (long y = y0; y < y1; y++) for (long z = x0; z < x1; z++) {")
    body.append(f"real *to = dx + y * {source.row} + z * {source.depth} + v;")
    part = "g"
    if not block.layer.average:
        part = f"pick{lanes}(place == (word)((y - y0s) * {block.layer.kernel[1]} + z - x0s), g, (V{lanes}){{0}})"
    body += [f"store{lanes}(to, load{lanes}(to) + {part});", "}"]
    return function(f"{name}({_BACKWARD})", [*body, "}", "}"])


def loss(name: str, classes: int) -> str:
    """``name(z, y, d, share, sum)``: softmax cross-entropy of one row of logits; d = share * (softmax - one-hot)."""
    depth = padded(classes)
    body = ["real most = z[0];", f"for (long c = 1; c < {classes}; c++) most = z[c] > most || z[c] != z[c] ? z[c] : most;"]
    body += [f"real e[{depth}];", "V16 all = (V16){0};", f"for (long v = 0; v < {depth}; v += {LANES}) {{"]
    body.append("V16 t = exponential(load16(z + v) - most);")
    body.append("t = pick16(load16(z + v) != load16(z + v), load16(z + v), t);")
    body += [f"for (long c = 0; c < {LANES}; c++) t[c] = v + c < {classes} ? t[c] : 0;", "store16(e + v, t); all = all + t;", "}"]
    body += ["const real total = sum16(all), scale = share / total;"]
    body += [f"for (long v = 0; v < {depth}; v += {LANES}) store16(d + v, load16(e + v) * scale);"]
    body += ["d[y] = d[y] - share;", "*sum += total == total ? logarithm((double)total) + (double)(most - z[y]) : (double)total;"]
    return function(f"{name}(const real *restrict z, long y, real *restrict d, real share, double *sum)", body)


def squared_loss(name: str, classes: int) -> str:
    """As `loss`: the squared error of a row of outputs to a one-hot target, mean over classes; d = share * 2 * error / classes."""
    depth = padded(classes)
    body = ["V16 all = (V16){0};", f"const real scale = share * 2 / {classes};", f"for (long v = 0; v < {depth}; v += {LANES}) {{"]
    body.append("V16 t = load16(z + v);")
    body.append(f"for (long c = 0; c < {LANES}; c++) t[c] = v + c < {classes} ? t[c] - (real)(v + c == y) : 0;")
    body += ["store16(d + v, t * scale); all = all + t * t;", "}", f"*sum += (double)sum16(all) / {classes};"]
    return function(f"{name}(const real *restrict z, long y, real *restrict d, real share, double *sum)", body)


def round_weights(name: str, block: Conv | Depthwise | Linear) -> str:
    """``name(w, q)``, for fully connected layers ``name(w, q, rows)``: weights to their int8 grids, a scale per output channel."""
    if isinstance(block, Linear):
        return _round_rows(name, "rows", block.inputs, LANES).replace("restrict q)", "restrict q, long rows)", 1)
    if isinstance(block, Conv) and not block.by_tap:
        lanes = lanes_of(block.span)
        return _round_rows(name, block.target.channels, block.layer.kernel[0] * block.run, lanes)
    lanes, depth = lanes_of(block.target.channels), block.target.depth
    taps = block.taps if isinstance(block, Conv) else math.prod(block.layer.kernel)
    body = [f"for (long v = 0; v < {depth}; v += {lanes}) {{", f"V{lanes} peak = splat{lanes}(TINY * 127);"]
    body.append(
        f"for (long k = 0; k < {taps * depth}; k += {depth}) peak = larger{lanes}(peak, magnitude{lanes}(load{lanes}(w + k + v)));"
    )
    body.append(f"const V{lanes} scale = peak / 127, inverse = 1 / scale;")
    body.append(f"for (long k = 0; k < {taps * depth}; k += {depth}) {{ V{lanes} t = load{lanes}(w + k + v) * inverse;")
    body += [f"t = round{lanes}(t); store{lanes}(q + k + v, t * scale); }}", "}"]
    return function(f"{name}(const real *restrict w, real *restrict q)", body)


def _round_rows(name: str, rows: int | str, size: int, lanes: int) -> str:
    """Four maxima side by side: a row is as long as the comparisons that wait for each other."""
    chains = min(4, size // lanes)
    whole = size // (chains * lanes) * chains * lanes
    body = [f"for (long o = 0; o < {rows}; o++, w += {size}, q += {size}) {{"]
    body += [f"V{lanes} m{n} = (V{lanes}){{0}};" for n in range(chains)]
    body.append(f"for (long i = 0; i < {whole}; i += {chains * lanes}) {{")
    body += [f"m{n} = larger{lanes}(m{n}, magnitude{lanes}(load{lanes}(w + i + {n * lanes})));" for n in range(chains)]
    body.append("}")
    body += [f"m0 = larger{lanes}(m0, magnitude{lanes}(load{lanes}(w + {at})));" for at in range(whole, size, lanes)]
    body += [f"m0 = larger{lanes}(m0, m{n});" for n in range(1, chains)]
    half = lanes // 2
    while half:
        across = ", ".join(str((lane + half) % lanes) for lane in range(lanes))
        body.append(f"m0 = larger{lanes}(m0, __builtin_shufflevector(m0, m0, {across}));")
        half //= 2
    body.append("const real peak = m0[0] > TINY * 127 ? m0[0] : TINY * 127, scale = peak / 127, inverse = 1 / scale;")
    body.append(f"for (long i = 0; i < {size}; i += {lanes}) {{ V{lanes} t = load{lanes}(w + i) * inverse;")
    body += [f"t = round{lanes}(t); store{lanes}(q + i, t * scale); }}", "}"]
    return function(f"{name}(const real *restrict w, real *restrict q)", body)


def small_steps(name: str, ranges: Sequence[tuple[int, int]]) -> str:
    """``name(w, now, start, velocity, g, rule)``: the optimizer's step of ranges (offset, size) of the blob."""
    blobs = ", ".join(f"{blob} + {{0}}" for blob in ("w", "now", "start", "velocity", "g"))
    body = [f"steps({blobs.format(offset)}, {size}, rule);" for offset, size in ranges]
    head = "real *w, const real *now, const real *start, real *restrict velocity, const real *restrict g, const Rule *rule"
    return function(f"{name}({head})", body, cold=True)
