"""DP-SGD on a Poisson batch: gradients clipped one example at a time, added to noise that the caller drew.

Convolutions give every example's gradient itself; for fully connected layers its norm is the product of two (Goodfellow 2015,
arXiv:1510.01799), and the clipped sum is the usual product with every example's output gradient scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.native.blocks import LANES, Blocks, Linear
from fedcore.native.memory import Memory
from fedcore.native.tiles import function

__all__ = ["linear_kernels", "private_entries", "private_part"]


def linear_kernels(i: int, block: Linear) -> Iterator[str]:
    """``norms{i}(x, d, sums, rows)`` adds squared norms; ``scaled{i}(x, d, factors, gb, rows)`` scales d and adds the bias's sum.

    A negative factor marks an example whose gradient is not finite: both of its rows become zero.
    """
    weight = "sum16(xx)" if block.weight.trainable else "0"
    bias = int(block.bias is not None and block.bias.trainable)
    body = [
        f"for (long s = 0; s < rows; s++, x += {block.source.size}, d += {block.target.size}) {{",
        "V16 xx = (V16){0}, dd = xx;",
    ]
    body.append(f"for (long v = 0; v < {block.inputs}; v += {LANES}) xx = xx + load16(x + v) * load16(x + v);")
    body.append(f"for (long v = 0; v < {block.target.depth}; v += {LANES}) dd = dd + load16(d + v) * load16(d + v);")
    body += [f"sums[s] += ((double)({weight}) + {bias}) * (double)sum16(dd);", "}"]
    yield function(f"norms{i}(const real *restrict x, const real *restrict d, double *restrict sums, long rows)", body)
    body = [f"for (long s = 0; s < rows; s++, x += {block.source.size}, d += {block.target.size}) {{"]
    body += ["if (factors[s] < 0) {", f"clear(x, {block.inputs}); clear(d, {block.target.depth});", "continue;", "}"]
    body.append(f"for (long v = 0; v < {block.target.depth}; v += {LANES}) {{")
    body.append("V16 scaled = load16(d + v) * (real)factors[s];")
    body.append("store16(d + v, scaled);" + (" store16(gb + v, load16(gb + v) + scaled);" if block.bias else ""))
    body += ["}", "}"]
    head = "real *restrict x, real *restrict d, const double *restrict factors, real *restrict gb, long rows"
    yield function(f"scaled{i}({head})", body)


def private_part(
    memory: Memory, forward: Sequence[str], linear: Sequence[str], plane: Sequence[str], scaled: Sequence[str],
    small: Sequence[tuple[int, int]],
) -> str:  # fmt: skip
    """``private_part(job, order, rows, now)``: the clipped gradients of some rows, added to the sum ``total``.

    The statements given are those of the forward pass with the loss, of the backward pass of linear layers with their norms, of
    an example's backward pass elsewhere (its gradient begins at zero in g), and of the clipped sums of linear layers. ``small``:
    ranges of the blob that g holds.
    """
    places = memory.places
    norms = [
        f"for (long i = {at}; i < {at + size}; i += {LANES}) squares = squares + load16(g + i) * load16(g + i);"
        for at, size in small
    ]
    sums = [
        f"for (long i = {at}; i < {at + size}; i += {LANES}) store16(total + i, load16(total + i) + load16(g + i) * (real)factor);"
        for at, size in small
    ]
    lines = [
        "real *const work = job->work, *const w = work, *const velocity = work;",
        "uint8_t *const bytes = job->bytes;", "const real *const start = job->start;",
        f"real *const g = work + {places['example']}, *const total = work + {places['g']};",
        f"double *const sums = (double *)(work + {places['sums']}), *const factors = sums + {memory.rows};",
        "const real share = 1; real unchecked = 0, *const check = &unchecked; const Rule *const rule = 0;",
        "(void)w; (void)velocity; (void)total;",
        "for (long s = 0; s < rows; s++) sums[s] = 0;",
        *forward, *linear,
        "for (long s = 0; s < rows; s++) {",
        *(f"clear(g + {at}, {size});" for at, size in small),
        *plane,
        "V16 squares = (V16){0};", *norms,
        "const double norm = __builtin_sqrt(sums[s] + (double)sum16(squares));",
        "if (!(norm <= 1e300)) { factors[s] = -1; continue; }",
        "const double factor = (norm > job->bound ? job->bound / norm : 1) / (double)job->batch;",
        "factors[s] = factor;", *sums,
        "}",
        *scaled,
    ]  # fmt: skip
    return "\n".join(["KERNEL void private_part(Job *job, const int64_t *order, long rows, const real *now) {", *lines, "}", ""])


def private_entries(blocks: Blocks, memory: Memory) -> str:
    """``private_begin``, ``private_step`` for every Poisson batch (order, examples: its rows; batch: the divisor; noise: where the
    gradient's sum begins) and ``private_end``."""
    places, rows = memory.places, memory.rows
    return f"""
__attribute__((visibility("default"))) void private_begin(Job *job) {{
    if (job->momentum != 0 || job->decay != 0 || job->proximal != 0) clear(job->work + {places["velocity"]}, {blocks.blob});
    job->loss = 0;
    job->step = 0;
}}

__attribute__((visibility("default"))) int private_step(Job *job) {{
    real *const work = job->work, *const w = work + {places["w"]}, *const g = work + {places["g"]};
    const real *const now = job->step ? w : job->start;
    Rule rule = {{(real)job->rate, (real)job->momentum, (real)job->decay, (real)job->proximal, 0}};
    rule.plain = job->momentum == 0 && job->decay == 0 && job->proximal == 0;
    for (long i = 0; i < job->examples; i++)
        if (job->y[job->order[i]] < 0 || job->y[job->order[i]] >= {blocks.network.classes}) return 1;
    begin_batch(work, now, job->start);
    import_start(g, job->noise);
    for (long at = 0; at < job->examples; at += {rows})
        private_part(job, job->order + at, job->examples - at < {rows} ? job->examples - at : {rows}, now);
    all_steps(w, now, job->start, work + {places["velocity"]}, g, &rule);
    job->step++;
    return 0;
}}

__attribute__((visibility("default"))) void private_end(Job *job) {{
    export_update(job->step ? job->work + {places["w"]} : job->start, job->start, job->update);
}}
"""
