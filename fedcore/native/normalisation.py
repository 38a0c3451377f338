"""Kernels of group normalisation, one example at a time, with a vector of channels in the lanes.

With x' = (x - mean) / sigma and y = w x' + b, the gradient of x is (w g - m1 - x' m2) / sigma, where m1 and m2 are the means of
w g and of w g x' over the group (Wu and He 2018, arXiv:1803.08494).
"""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.native.blocks import Normal, lanes_of, padded
from fedcore.native.tiles import finish, function

__all__ = ["normal_forward", "normal_gradient", "normal_input_gradient", "statistics_size"]


def statistics_size(block: Normal) -> int:
    """Numbers that an example's forward pass leaves for its backward pass: mean and 1 / sigma of every channel."""
    return 2 * padded(block.target.depth)


def _depth(block: Normal) -> int:
    return padded(block.target.depth)


def _over_pixels(block: Normal) -> str:
    return f"for (long h = 0; h < {block.target.height}; h++) for (long i = 0; i < {block.target.width}; i++)"


def _lanes(block: Normal) -> int:
    return lanes_of(block.target.channels)


def _vectors(block: Normal) -> str:
    return f"for (long v = 0; v < {block.target.depth}; v += {_lanes(block)}) {{"


def _grouped(block: Normal, sums: str, into: str, value: str) -> Iterator[str]:
    """``sums`` of channels become, for each channel of a group, ``value`` of their total ``s``, in ``into``."""
    size = block.target.channels // block.layer.groups
    yield f"for (long c = 0; c < {block.target.channels}; c += {size}) {{"
    yield f"real s = 0; for (long k = c; k < c + {size}; k++) s = s + {sums};"
    yield f"const real of_group = {value}; for (long k = c; k < c + {size}; k++) {into}[k] = of_group;"
    yield "}"


def _share(block: Normal) -> str:
    """One over the number of a group's values."""
    count = block.target.channels // block.layer.groups * block.target.height * block.target.width
    return f"((real)1 / (real){count})"


def _x(block: Normal) -> str:
    """A vector of the source at pixel (h, i), zeros where it has no channel."""
    lanes, source, target = _lanes(block), block.source, block.target
    here = f"load{lanes}(x + h * {source.row} + i * {source.depth} + v)"
    if source.depth >= target.depth:
        return here
    return f"pick{lanes}(load{lanes}(scale + v) != 0, {here}, (V{lanes}){{0}})"


def normal_forward(name: str, block: Normal) -> str:
    """``name(x, w, bias, out, mark, statistics, range)``: x, out and mark at pixel (0, 0)."""
    lanes, target, depth = _lanes(block), block.target, _depth(block)
    vector, zero = f"V{lanes}", f"(V{lanes}){{0}}"
    body = [f"real *restrict mean = statistics, *restrict scale = statistics + {depth};", f"real sums[{depth}];"]
    body.append(f"for (long c = 0; c < {target.channels}; c++) scale[c] = 1;")
    body += [_vectors(block), f"{vector} a = {zero};", _over_pixels(block), f"    a = a + {_x(block)};"]
    body += [f"store{lanes}(sums + v, a);", "}", *_grouped(block, "sums[k]", "mean", f"s * {_share(block)}")]
    body += [_vectors(block), f"{vector} a = {zero};", _over_pixels(block), "{"]
    body += [f"{vector} t = {_x(block)} - load{lanes}(mean + v); a = a + t * t;", "}", f"store{lanes}(sums + v, a);", "}"]
    body += _grouped(block, "sums[k]", "scale", f"1 / ROOT(s * {_share(block)} + (real){block.layer.epsilon!r})")
    body += [_vectors(block), _over_pixels(block), "{"]
    body.append(f"const long at = h * {target.row} + i * {target.depth} + v;")
    body.append(f"{vector} z = {_x(block)} - load{lanes}(mean + v); z = z * load{lanes}(scale + v);")
    weight = f"z * load{lanes}(w + v)" if block.weight else "z"
    body.append(f"z = {weight}" + (f" + load{lanes}(bias + v);" if block.bias else ";"))
    body += finish(block, lanes, "z", f"(I{lanes}){{0}}", "out + at", "mark + at")
    arguments = "const real *restrict x, const real *restrict w, const real *restrict bias, real *restrict out"
    head = f"{name}({arguments}, uint8_t *restrict mark, real *restrict statistics, const Range *range)"
    return function(head, [*body, "}", "}"])


def _normalised(block: Normal) -> str:
    lanes = _lanes(block)
    return f"V{lanes} z = {_x(block)} - load{lanes}(mean + v); z = z * load{lanes}(scale + v);"


def _gradient(block: Normal) -> str:
    return f"load{_lanes(block)}(gm + (h * {block.target.width} + i) * {block.target.depth} + v)"


def normal_gradient(name: str, block: Normal) -> str:
    """``name(x, gm, statistics, sums, gw)``: by channel, the sums of g and of g x' over pixels; the latter is added to gw."""
    lanes, depth = _lanes(block), _depth(block)
    body = [f"const real *restrict mean = statistics, *restrict scale = statistics + {depth};", _vectors(block)]
    body += [f"V{lanes} a = (V{lanes}){{0}}, b = a;", _over_pixels(block), "{"]
    body += [_normalised(block), f"V{lanes} g = {_gradient(block)}; a = a + g; b = b + g * z;", "}"]
    body += [f"store{lanes}(sums + v, a); store{lanes}(sums + {depth} + v, b);"]
    if block.weight:
        body.append(f"store{lanes}(gw + v, load{lanes}(gw + v) + b);")
    arguments = "const real *restrict x, const real *restrict gm, const real *restrict statistics, real *restrict sums"
    return function(f"{name}({arguments}, real *restrict gw)", [*body, "}"])


def normal_input_gradient(name: str, block: Normal) -> str:
    """``name(x, w, gm, statistics, sums, dx)``: x and dx at pixel (0, 0), ``sums`` as `normal_gradient` leaves them."""
    lanes, depth, source = _lanes(block), _depth(block), block.source
    body = [f"const real *restrict mean = statistics, *restrict scale = statistics + {depth};"]
    body.append(f"real first[{depth}], second[{depth}];")
    body.append(f"for (long c = 0; c < {depth}; c++) first[c] = second[c] = 0;")
    weight = "w[k] * " if block.weight else ""
    body += _grouped(block, f"{weight}sums[k]", "first", f"s * {_share(block)}")
    body += _grouped(block, f"{weight}sums[{depth} + k]", "second", f"s * {_share(block)}")
    body += [_vectors(block), _over_pixels(block), "{", _normalised(block)]
    scaled = f"load{lanes}(w + v) * {_gradient(block)}" if block.weight else _gradient(block)
    body.append(f"V{lanes} t = {scaled} - load{lanes}(first + v); t = t - z * load{lanes}(second + v);")
    body.append(f"t = t * load{lanes}(scale + v);")
    body += [f"store{lanes}(dx + h * {source.row} + i * {source.depth} + v, t);", "}", "}"]
    arguments = "const real *restrict x, const real *restrict w, const real *restrict gm, const real *restrict statistics"
    return function(f"{name}({arguments}, const real *restrict sums, real *restrict dx)", body)
