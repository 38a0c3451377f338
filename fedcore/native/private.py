"""DP-SGD on a Poisson batch: gradients clipped one example at a time, added to noise that the caller drew.

Convolutions give every example's gradient itself; for fully connected layers its norm is the product of two (Goodfellow 2015,
arXiv:1510.01799), and the clipped sum is the usual product with every example's output gradient scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.native.blocks import LANES, Blocks, Linear
from fedcore.native.memory import Memory
from fedcore.native.tiles import function

__all__ = ["GIVEN", "linear_kernels", "private_entries", "private_part"]


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
    memory: Memory, forward: Sequence[str], linear: Sequence[str], plane: Sequence[str], sums: Sequence[str],
    small: Sequence[tuple[int, int]], overwritten: Sequence[tuple[int, int]],
) -> str:  # fmt: skip
    """``private_part(job, order, rows, now, noise, rule, first, last)``: the clipped gradients of some rows of a batch.

    The statements given are those of the forward pass with the loss, of the backward pass of linear layers with their norms, of
    an example's backward pass elsewhere (its gradient begins at zero in g), and of the clipped sums of linear layers and the
    noise, of which the ``first`` part of a batch takes all; the ``last`` makes the step of linear layers' weights. ``small``:
    ranges of the blob to which an example's gradient is added in g, and ``overwritten`` those that it overwrites; ``total`` is
    the sum over examples.
    """
    places = memory.places
    clear = [f"clear(g + {at}, {size});" for at, size in small]
    norms = [f"squared_norm(g + {at}, {size}, squares);" for at, size in [*small, *overwritten]]
    adding = [f"moved(total + {at}, g + {at}, (real)factor, {size});" for at, size in small]
    adding += [f"plus(total + {at}, g + {at}, (real)factor, {size});" for at, size in overwritten]
    lines = [
        "real *const work = job->work;", "uint8_t *const bytes = job->bytes;", "const real *const start = job->start;",
        f"real *const w = work + {places['w']}, *const velocity = work + {places['velocity']};",
        f"real *const g = work + {places['example']}, *const total = work + {places['g']};",
        f"double *const sums = (double *)(work + {places['sums']}), *const factors = sums + {memory.rows};",
        "const real share = 1;",
        "(void)w; (void)velocity; (void)total;",
        "for (long s = 0; s < rows; s++) sums[s] = 0;",
        *forward, *linear, *clear,
        "for (long s = 0; s < rows; s++) {",
        *plane,
        "V16 squares[4] = {(V16){0}, (V16){0}, (V16){0}, (V16){0}};", *norms,
        "const double norm = __builtin_sqrt(sums[s] + (double)sum16((squares[0] + squares[1]) + (squares[2] + squares[3])));",
        "if (!(norm <= 1e300)) {", "factors[s] = -1;", *clear, "continue;", "}",
        "const double factor = (norm > job->bound ? job->bound / norm : 1) / (double)job->batch;",
        "factors[s] = factor;", *adding,
        "}",
        *sums,
    ]  # fmt: skip
    arguments = "Job *job, const int64_t *order, long rows, const real *now, Noise *noise, const Rule *rule, int first, int last"
    return "\n".join([SMALL, f"KERNEL void private_part({arguments}) {{", *lines, "}", ""])


# Four sums side by side: a step waits for none of the others.
SMALL = """
INLINE void squared_norm(const real *g, long n, V16 *squares) {
    V16 a = squares[0], b = squares[1], c = squares[2], d = squares[3];
    long i = 0;
    for (; i + 64 <= n; i += 64) {
        a = a + load16(g + i) * load16(g + i);
        b = b + load16(g + i + 16) * load16(g + i + 16);
        c = c + load16(g + i + 32) * load16(g + i + 32);
        d = d + load16(g + i + 48) * load16(g + i + 48);
    }
    for (; i < n; i += 16) a = a + load16(g + i) * load16(g + i);
    squares[0] = a, squares[1] = b, squares[2] = c, squares[3] = d;
}

INLINE void plus(real *restrict total, const real *restrict g, real factor, long n) {
    for (long i = 0; i < n; i += 16) store16(total + i, load16(total + i) + load16(g + i) * factor);
}

/* Adds a multiple of g to the total and leaves zeros. */
INLINE void moved(real *restrict total, real *restrict g, real factor, long n) {
    for (long i = 0; i < n; i += 16) {
        store16(total + i, load16(total + i) + load16(g + i) * factor);
        store16(g + i, (V16){0});
    }
}
"""

GIVEN = """
KERNEL const real *drawn(Noise *noise, long count) {
    const real *const found = noise->given;
    noise->given += count;
    return found;
}
"""


def private_entries(blocks: Blocks, memory: Memory) -> str:
    """``private_begin``, ``private_step`` for every Poisson batch (order, examples: its rows; batch: the divisor; noise: that of
    the step) and ``private_end``."""
    places, rows = memory.places, memory.rows
    return f"""
#ifndef PLAIN
__attribute__((visibility("default"))) void private_begin(Job *job) {{
    job->loss = 0;
    job->step = 0;
}}

KERNEL int private_batch(Job *job, int end) {{
    real *const work = job->work, *const w = work + {places["w"]};
    const real *const now = job->step ? w : job->start;
    Rule rule = {{(real)job->rate, (real)job->momentum, (real)job->decay, (real)job->proximal, 0, !job->step, end}};
    rule.plain = job->momentum == 0 && job->decay == 0 && job->proximal == 0;
    Noise noise = {{job->noise, job->seed, job->deviation, job->fresh, 0, 0}};
    for (long i = 0; i < job->examples; i++)
        if (job->y[job->order[i]] < 0 || job->y[job->order[i]] >= {blocks.network.classes}) return 1;
    if (rule.begin) begin_batch(work, now, job->start);
    else next_batch(work, now, job->start);
    long at = 0;
    do {{
        const long left = job->examples - at, some = left < {rows} ? left : {rows};
        private_part(job, job->order + at, some, now, &noise, &rule, at == 0, some == left);
        at += {rows};
    }} while (at < job->examples);
    small_steps(w, now, job->start, work + {places["velocity"]}, work + {places["g"]}, &rule);
    job->step++;
    return 0;
}}

__attribute__((visibility("default"))) int private_step(Job *job) {{ return private_batch(job, 0); }}

/* The blob that the steps so far leave. */
KERNEL const real *private_blob(const Job *job) {{ return job->step ? job->work + {places["w"]} : job->start; }}

__attribute__((visibility("default"))) void private_end(Job *job) {{ export_update(private_blob(job), job->start, job->update); }}
#endif
"""
