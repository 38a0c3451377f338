"""Parameters in two orders: torch's, and that of the blob, which a layer's kernels want."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from fedcore.native.blocks import LANES, Conv, Linear, Parameter
from fedcore.native.tiles import function

__all__ = ["added", "arranged_row", "merged", "squares", "summed", "transposed", "travel"]


def merged(parameters: Sequence[Parameter]) -> list[tuple[int, int]]:
    """Ranges of the blob that parameters fill, neighbours together."""
    ranges: list[tuple[int, int]] = []
    for parameter in sorted(parameters, key=lambda p: p.offset):
        if ranges and sum(ranges[-1]) == parameter.offset:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + parameter.size)
        else:
            ranges.append((parameter.offset, parameter.size))
    return ranges


def travel(parameters: Sequence[Parameter]) -> str:
    """``import_start(blob, values)`` and ``export_update(w, start, update)``: between torch's order of the trainable parameters and
    the blob; the update is local minus start."""
    into: list[str] = []
    out: list[str] = []
    at, count = 0, sum(math.prod(parameter.dims) for parameter in parameters if parameter.trainable)
    for parameter in parameters:
        if parameter.trainable:
            dims, strides = _joined(parameter.dims, parameter.strides)
            loops, place, there = _nested(dims, strides, parameter.offset, at)
            square, end = _by_squares(dims, strides), at + math.prod(dims)
            if square and end < count:  # the last one's squares would reach over the end of the values
                into += _transposing(dims, strides, parameter.offset, at, out=False)
            else:
                into.append(f"{loops} blob[{place}] = values[{there}];")
            if square:
                out += _transposing(dims, strides, parameter.offset, at, out=True)
            else:
                out.append(f"{loops} update[{there}] = w[{place}] - start[{place}];")
            at = end
    begin = function("import_start(real *restrict blob, const real *restrict values)", into, cold=True)
    public = begin.replace("KERNEL", '__attribute__((visibility("default")))', 1)
    head = "export_update(const real *restrict w, const real *restrict start, real *restrict update)"
    return public + function(head, out)


def summed(parameters: Sequence[Parameter], blob: int) -> str:
    """What sums of updates need, which lie as the blob of ``blob`` numbers does: its ranges ``trained`` that training changes, and
    ``export_sum(sum, total)``, which brings a sum into torch's order of the trainable parameters."""
    own = [parameter for parameter in parameters if parameter.trainable]
    ranges, out, at = merged(own), [], 0
    for parameter in own:
        loops, place, there = _nested(*_joined(parameter.dims, parameter.strides), parameter.offset, at)
        out.append(f"{loops} total[{there}] = sum[{place}];")
        at += math.prod(parameter.dims)
    table = ", ".join(f"{{{begin}, {begin + size}}}" for begin, size in ranges)
    lines = [f"#define BLOB {blob}", f"#define TRAINED {len(ranges)}", "static const struct {", "    long begin, end;"]
    export = function("export_sum(const double *restrict sum, double *restrict total)", out, cold=True)
    return "\n".join([*lines, f"}} trained[TRAINED] = {{{table}}};", "", export])


def arranged_row(name: str, block: Linear) -> str:
    """``name(values, blob)``: a row of a weight in torch's order to the blob's, with zeros in its padding."""
    dims, strides = _joined(block.weight.dims[1:], block.weight.strides[1:])
    body = [f"clear(blob, {block.inputs});"] if math.prod(dims) < block.inputs else []
    if _by_squares(dims, strides):
        body += _transposing(dims, strides, 0, 0, out=False)
    else:
        loops, place, there = _nested(dims, strides, 0, 0)
        body.append(f"{loops} blob[{place}] = values[{there}];")
    return function(f"{name}(const real *restrict values, real *restrict blob)", body)


def added(name: str, parameter: Parameter) -> str:
    """``name(values, blob)``: values in torch's order added to a parameter's place in the blob."""
    dims, strides = _joined(parameter.dims, parameter.strides)
    flat = next((k for k in range(1, len(dims)) if math.prod(dims[k:]) <= 2 * LANES), len(dims))  # short loops are written out
    loops, place, there = _nested(dims[:flat], strides[:flat], parameter.offset, 0)
    there = f"({there}) * {math.prod(dims[flat:])}"
    body = [f"{loops} {{ real *const to = blob + {place}; const real *const from = values + {there};"]
    for number, index in enumerate(itertools.product(*map(range, dims[flat:]))):
        at = sum(i * stride for i, stride in zip(index, strides[flat:], strict=True))
        body.append(f"to[{at}] = to[{at}] + from[{number}];")
    return function(f"{name}(const real *restrict values, real *restrict blob)", [*body, "}"])


def _nested(dims: Sequence[int], strides: Sequence[int], offset: int, at: int) -> tuple[str, str, str]:
    """Loops over a tensor's values, the place of each in the blob and in torch's order."""
    inner = [math.prod(dims[k + 1 :]) for k in range(len(dims))]
    loops = " ".join(f"for (long i{k} = 0; i{k} < {count}; i{k}++)" for k, count in enumerate(dims))
    place = " + ".join([str(offset), *(f"i{k} * {stride}" for k, stride in enumerate(strides))])
    return loops, place, " + ".join([str(at), *(f"i{k} * {size}" for k, size in enumerate(inner))])


def _by_squares(dims: Sequence[int], strides: Sequence[int]) -> bool:
    return len(dims) > 1 and strides[-2] == 1 and dims[-2] % LANES == 0 and dims[-1] >= LANES // 2


def _transposing(dims: Sequence[int], strides: Sequence[int], offset: int, at: int, *, out: bool) -> Iterator[str]:
    """The way of a tensor whose last dimension is strided in the blob and whose last but one is not, by squares of 16 in registers:
    as an update, or of values into the blob.

    A square of an update that reaches over the end of a row is stored before the rows that follow, which mend what it spoiled.
    """
    (columns, count), step = dims[-2:], strides[-1]
    loops, place, there = _nested([*dims[:-2], columns // LANES], [*strides[:-2], LANES], offset, 0)
    there = f"({there}) * {count * LANES} + {at}"
    if out:
        yield f"{loops} {{ const real *a = w + {place}, *b = start + {place}; real *to = update + {there};"
    else:
        yield f"{loops} {{ const real *from = values + {there}; real *to = blob + {place};"
    whole, rest = count // LANES * LANES, count % LANES
    if 0 < rest <= 4:  # a square would be mostly empty
        for i in range(whole, count):
            value = f"a[{i * step} + c] - b[{i * step} + c]" if out else f"from[c * {count} + {i}]"
            yield f"for (long c = 0; c < {LANES}; c++) to[{f'c * {count} + {i}' if out else f'{i * step} + c'}] = {value};"
    elif rest:
        yield _square(count, step, str(whole), rest, out=out)
    yield from [f"for (long n = 0; n < {whole}; n += {LANES})", _square(count, step, "n", LANES, out=out), "}"]


def _square(count: int, step: int, first: str, rows: int, *, out: bool) -> str:
    """Rows of the blob from ``first`` on, and as many columns of torch's order."""
    at = f"({first}) * {step}"
    if out:
        return f"to_torch(a + {at}, b + {at}, {step}, to + {first}, {count}, {rows});"
    return f"from_torch(from + {first}, {count}, to + {at}, {step}, {rows});"


def squares() -> str:
    """``from_torch(from, from_step, to, to_step, rows)`` and, for differences, ``to_torch(a, b, step, to, to_step, rows)``: a
    square of 16 transposed, of which the blob has ``rows``."""
    begin = [f"V16 t{i} = load16(from + {i} * from_step);" for i in range(LANES)]
    end = [f"if (rows > {i}) store16(to + {i} * to_step, t{i});" for i in range(LANES)]
    head = "from_torch(const real *restrict from, long from_step, real *restrict to, long to_step, long rows)"
    into = function(head, [*begin, *_exchanged(), *end])
    begin = [
        f"V16 t{i} = (V16){{0}}; if (rows > {i}) t{i} = load16(a + {i} * step) - load16(b + {i} * step);" for i in range(LANES)
    ]  # fmt: skip
    end = [f"store16(to + {i} * to_step, t{i});" for i in range(LANES)]
    head = "to_torch(const real *restrict a, const real *restrict b, long step, real *restrict to, long to_step, long rows)"
    return into + function(head, [*begin, *_exchanged(), *end])


def _exchanged() -> Iterator[str]:
    """The square of vectors t0 to t15 transposed, in registers."""
    for half in (8, 4, 2, 1):
        low = [LANES + lane - half if lane & half else lane for lane in range(LANES)]
        high = [LANES + lane if lane & half else lane + half for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & half):
            pair = f"t{i}, t{i + half}"
            yield f"{{ V16 l = __builtin_shufflevector({pair}, {', '.join(map(str, low))});"
            yield f"t{i + half} = __builtin_shufflevector({pair}, {', '.join(map(str, high))}); t{i} = l; }}"


def _joined(dims: tuple[int, ...], strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The same places with fewer loops: dimensions that follow each other without a gap become one."""
    joined: list[tuple[int, int]] = []
    for count, stride in zip(dims, strides, strict=True):
        if count == 1:
            continue
        if joined and joined[-1][1] == count * stride:
            joined[-1] = (joined[-1][0] * count, stride)
        else:
            joined.append((count, stride))
    joined = joined or [(1, 0)]
    return [count for count, _ in joined], [stride for _, stride in joined]


def transposed(name: str, block: Conv) -> str:
    """``name(w, t)``: weights by row to weights by tap, for the forward kernel."""
    (kh, kw), inputs, outputs, source = block.layer.kernel, block.source.channels, block.target.channels, block.source
    depth, size = block.target.depth, kh * block.run
    body = [f"for (long r = 0; r < {kh}; r++) for (long s = 0; s < {kw}; s++) for (long c = 0; c < {inputs}; c++)"]
    body.append(f"for (long o = 0; o < {outputs}; o++)")
    body.append(f"    t[((r * {kw} + s) * {inputs} + c) * {depth} + o] = w[o * {size} + r * {block.run} + s * {source.depth} + c];")
    if inputs == source.depth and outputs % LANES == block.span % LANES == 0:
        squares = [f"for (long r = 0; r < {kh}; r++) for (long k = 0; k < {block.span}; k += {LANES})"]
        squares.append(f"for (long o = 0; o < {outputs}; o += {LANES}) {{")
        squares.append(
            f"const real *from = w + o * {size} + r * {block.run} + k; real *to = t + (r * {block.span} + k) * {depth} + o;"
        )
        squares += [f"V16 t{i} = load16(from + {i * size});" for i in range(LANES)]
        squares += [*_exchanged(), *(f"store16(to + {i * depth}, t{i});" for i in range(LANES)), "}"]
        # Where there are no vectors, squares in registers are much code.
        body = ["#ifdef __thumb__", *body, "#else", *squares, "#endif"]
    return function(f"{name}(const real *restrict w, real *restrict t)", body, cold=True)
