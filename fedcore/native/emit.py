"""The whole trainer as one C source: a client's local training in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedcore.native import dense, forward, input_gradients, normalisation, order, plain, private, weight_gradients
from fedcore.native.blocks import Addition, Block, Blocks, Conv, Depthwise, Linear, Normal, Parameter, Pointwise, Pooling
from fedcore.native.memory import Memory
from fedcore.native.tiles import Target, marks

__all__ = ["engine_source", "source"]


_LOSSES = {"cross_entropy": plain.loss, "squared": plain.squared_loss}


def source(blocks: Blocks, memory: Memory, target: Target, loss: str = "cross_entropy") -> str:
    """C99 with the vector extensions of GCC and Clang; with -DDOUBLE it computes in double precision."""
    return "\n".join([*_trainer(blocks, memory, target, loss), private.GIVEN])


def engine_source(blocks: Blocks, memory: Memory, target: Target, loss: str = "cross_entropy") -> str:
    """The trainer with what only simulations call: whole cohorts, drawn noise."""
    summed = order.summed(blocks.parameters, blocks.blob)
    return "\n".join([*_trainer(blocks, memory, target, loss), summed, *map(_file, ("noise.c", "cohort.c"))])


def _trainer(blocks: Blocks, memory: Memory, target: Target, loss: str) -> Iterator[str]:
    writer = _Writer(blocks, memory, target, loss)
    yield _file("prelude.c")
    yield from writer.kernels()
    yield from (writer.part(), writer.begin_batch(), writer.train())
    yield from writer.private()


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


class _Writer:
    """Kernels of every block, and the functions that call them in order."""

    def __init__(self, blocks: Blocks, memory: Memory, target: Target, loss: str) -> None:
        self.blocks, self.memory, self.target, self.loss = blocks, memory, target, loss
        self.linear_weights = {b.weight.name for b in blocks.blocks if isinstance(b, Linear)}

    def kernels(self) -> Iterator[str]:
        """Definitions of all kernels."""
        yield plain.gather("gather", self.blocks.input)
        yield order.squares()
        for i, block in enumerate(self.blocks.blocks):
            yield from self._kernels(i, block)
        yield _LOSSES[self.loss]("loss", self.blocks.network.classes)
        yield plain.small_steps("small_steps", self._small())
        for parameter in self._noised():
            if parameter.name not in self.linear_weights:
                yield order.added(f"added{parameter.offset}", parameter)
        yield order.travel(self.blocks.parameters)

    def _kernels(self, i: int, block: Block) -> Iterator[str]:
        if isinstance(block, (Conv, Depthwise, Linear)) and block.layer.rounded:
            yield plain.round_weights(f"grid{i}", block)
        if isinstance(block, Conv) and not block.by_tap:
            yield order.transposed(f"transposed{i}", block)
        yield self._forward_kernel(f"forward{i}", block)
        if isinstance(block, Linear):
            yield dense.dense_finish(f"finish{i}", block)
            yield dense.dense_masked(f"masked{i}", block)
            yield from private.linear_kernels(i, block)
        elif i >= self.blocks.first:
            biased = isinstance(block, (Conv, Depthwise, Normal)) and block.bias is not None
            yield weight_gradients.masked_gradient(f"masked{i}", block, biased)
        if self._learns(i, block):
            yield self._weight_kernel(i, block)
            if isinstance(block, Linear):
                yield dense.dense_noised(f"noised{i}", f"update{i}", block, self.target, _grid(i, block))
        if i > self.blocks.first:
            yield self._input_kernel(f"input{i}", block)
        if isinstance(block, Addition) and block.skip >= self.blocks.first:
            yield plain.pointwise_input_gradient(f"skip{i}", block, block.other)

    def _forward_kernel(self, name: str, block: Block) -> str:
        match block:
            case Linear():
                return dense.dense_forward(name, block, self.target, self.memory.rows)
            case Conv():
                return forward.conv_forward(name, block, self.target)
            case Depthwise():
                return forward.depthwise_forward(name, block, self.target)
            case Pooling():
                return plain.pool_forward(name, block)
            case Pointwise() | Addition():
                return plain.pointwise_forward(name, block)
            case Normal():
                return normalisation.normal_forward(name, block)

    def _weight_kernel(self, i: int, block: Block) -> str:
        match block:
            case Linear():
                return dense.dense_update(f"update{i}", block, self.target, _grid(i, block))
            case Conv():
                return weight_gradients.conv_weight_gradient(f"weight{i}", block, self.target)
            case Depthwise():
                return weight_gradients.depthwise_weight_gradient(f"weight{i}", block, self.target)
            case Normal():
                return normalisation.normal_gradient(f"weight{i}", block)
            case _:
                return ""

    def _input_kernel(self, name: str, block: Block) -> str:
        match block:
            case Linear():
                return dense.dense_input_gradient(name, block, self.target, self.memory.rows)
            case Conv():
                return input_gradients.conv_input_gradient(name, block, self.target)
            case Depthwise():
                return input_gradients.depthwise_input_gradient(name, block, self.target)
            case Pooling():
                return plain.pool_input_gradient(name, block)
            case Pointwise() | Addition():
                return plain.pointwise_input_gradient(name, block, block.source)
            case Normal():
                return normalisation.normal_input_gradient(name, block)

    def _noised(self) -> list[Parameter]:
        """The trainable parameters, in torch's order."""
        return [p for p in self.blocks.parameters if p.trainable]

    def _small(self) -> list[tuple[int, int]]:
        """Ranges of the blob with all trainable parameters but the weights of fully connected layers."""
        return order.merged([p for p in self._noised() if p.name not in self.linear_weights])

    def _split(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """`_small`, apart: what an example's gradients are added to, and what they overwrite."""
        own = [b for i, b in enumerate(self.blocks.blocks) if isinstance(b, Conv) and self._learns(i, b)]
        whole = {b.weight.name: weight_gradients.weights_size(b) for b in own if weight_gradients.overwrites(b)}
        added = [p for p in self._noised() if p.name not in self.linear_weights]
        rest = [replace(p, offset=p.offset + whole.get(p.name, 0), size=p.size - whole.get(p.name, 0)) for p in added]
        return order.merged(rest), [(p.offset, whole[p.name]) for p in added if p.name in whole]

    def _learns(self, i: int, block: Block) -> bool:
        if i < self.blocks.first:
            return False
        return isinstance(block, Normal) or (isinstance(block, (Conv, Depthwise, Linear)) and block.weight.trainable)

    def _at(self, region: str, plane_size: int = 0, extra: int = 0) -> str:
        text = f"work + {self.memory.places[region] + extra}"
        return f"{text} + s * {plane_size}" if plane_size else text

    def _out(self, i: int, extra: int = 0, *, row: bool = True) -> str:
        """Block i's output, i = -1 for the input: of example s, or of the first."""
        plane = self.blocks.input.target if i < 0 else self.blocks.blocks[i].target
        return self._at("input" if i < 0 else f"out{i}", plane.size if row else 0, extra)

    def _mark(self, i: int, *, row: bool = True) -> str:
        block = self.blocks.blocks[i]
        if not marks(block):
            return "bytes"
        at = f"bytes + {self.memory.marked[f'mark{i}'] + block.target.origin}"
        return f"{at} + s * {block.target.size}" if row else at

    def _gradient(self, i: int, extra: int = 0, *, row: bool = True) -> str:
        block = self.blocks.blocks[i]
        return self._at(f"d{i}", block.target.size if row and i in self.memory.boundary else 0, extra)

    def _weights(self, i: int, block: Conv | Depthwise | Linear) -> str:
        """The weights that the layer computes with."""
        return self._at(f"q{i}") if block.layer.rounded else _place(block.weight)

    def _statistics(self, i: int, block: Normal) -> str:
        return self._at(f"statistics{i}", normalisation.statistics_size(block))

    def _bias(self, block: Conv | Depthwise | Linear | Normal) -> str:
        return _place(block.bias) if block.bias else "now"

    def _bias_gradient(self, block: Block) -> str:
        bias = block.bias if isinstance(block, (Conv, Depthwise, Linear, Normal)) else None
        return f"g + {bias.offset}" if bias else "g"

    def _range(self, block: Block) -> str:
        return f"job->ranges + {block.quantizer or 0}"

    def begin_batch(self) -> str:
        """What depends on the weights alone: rounding, layouts; and the sums of gradients begin at zero. After a step, the weights
        of fully connected layers are rounded already (``next_batch``)."""
        dense_weights, body = [], []
        for i, block in enumerate(self.blocks.blocks):
            if isinstance(block, Linear) and block.layer.rounded:
                dense_weights.append(f"grid{i}({_place(block.weight)}, {self._at(f'q{i}')}, {block.layer.shape[0]});")
            elif isinstance(block, (Conv, Depthwise)) and block.layer.rounded:
                body.append(f"grid{i}({_place(block.weight)}, {self._at(f'q{i}')});")
            if isinstance(block, Conv) and not block.by_tap:
                body.append(f"transposed{i}({self._weights(i, block)}, {self._at(f't{i}')});")
        small = [p for p in self.blocks.parameters if p.name not in self.linear_weights]
        body += [f"clear({self._at('g', 0, offset)}, {size});" for offset, size in order.merged(small)]
        arguments = "(real *work, const real *now, const real *start)"
        following = [f"KERNEL void next_batch{arguments} {{", *body, "}"]
        return "\n".join([
            *following, f"KERNEL void begin_batch{arguments} {{", *dense_weights, "next_batch(work, now, start);", "}", "",
        ])  # fmt: skip

    def private(self) -> Iterator[str]:
        """DP-SGD: see private.py."""
        linear: list[str] = []
        scaled: list[str] = []
        plane: list[str] = []
        for i in range(len(self.blocks.blocks) - 1, self.blocks.first - 1, -1):
            block = self.blocks.blocks[i]
            if isinstance(block, Linear):
                linear += self._linear_norms(i, block)
                scaled.append(self._linear_scaled(i, block))
            elif i > self.blocks.flat:
                linear += ["for (long s = 0; s < rows; s++) {", *self._plane_backward(i, block), "}"]
                plane += self._own_gradients(i, block) if isinstance(block, Normal) else []
            else:
                plane += self._plane_backward(i, block, "1")
        forward = [*self._forward("sums[s]"), *self._losses()]
        yield private.private_part(self.memory, forward, linear, plane, [*scaled, *self._noisy_sums()], *self._split())
        yield private.private_entries(self.blocks, self.memory)

    def _linear_norms(self, i: int, block: Linear) -> Iterator[str]:
        d, out = self._gradient(i, row=False), self._out(i, row=False)
        yield f"masked{i}({d}, {out}, {self._mark(i, row=False)}, {self._bias_gradient(block)}, rows);"
        yield f"norms{i}({self._out(i - 1, row=False)}, {d}, sums, rows);"
        yield from self._linear_input(i, block)

    def _linear_input(self, i: int, block: Linear) -> Iterator[str]:
        if i > self.blocks.first:
            into = self._gradient(i - 1, row=False)
            yield f"input{i}({self._gradient(i, row=False)}, {self._weights(i, block)}, {into}, rows);"
            yield from (f"accumulate({into}, {self._at(f'skip{n}')}, rows * {b.other.size});" for n, b in self._sums(i - 1))

    def _sums(self, i: int) -> list[tuple[int, Addition]]:
        """The additions to which block i's output skips, where its gradient is wanted."""
        blocks = enumerate(self.blocks.blocks)
        return [(n, b) for n, b in blocks if isinstance(b, Addition) and b.skip == i >= self.blocks.first]

    def _linear_scaled(self, i: int, block: Linear) -> str:
        bias = f"total + {block.bias.offset}" if block.bias else "total"
        return f"scaled{i}({self._out(i - 1, row=False)}, {self._gradient(i, row=False)}, factors, {bias}, rows);"

    def _noisy_sums(self) -> Iterator[str]:
        """The sums of linear layers' weights, and the noise of all parameters in torch's order."""
        blocks = {b.weight.name: (i, b) for i, b in enumerate(self.blocks.blocks) if isinstance(b, Linear)}
        for parameter in self._noised():
            if parameter.name in blocks:
                i, block = blocks[parameter.name]
                x, d = self._out(i - 1, row=False), self._gradient(i, row=False)
                yield f"noised{i}({d}, {x}, {self._updating(i, block, 'total')}, rule, rows, first, last, noise);"
            else:
                count = math.prod(parameter.dims)
                yield f"if (first) added{parameter.offset}(drawn(noise, {count}), total);"

    def _updating(self, i: int, block: Linear, sums: str) -> str:
        """Arguments of a linear layer's step: its place in the blobs, room for a gradient that waits, and the rounded weights."""
        blobs = ", ".join(f"{blob} + {block.weight.offset}" for blob in ("w", "now", "start", "velocity", sums))
        return f"{blobs}, {self._at('example')}, {self._at(f'q{i}') if block.layer.rounded else 'w'}"

    def _losses(self) -> Iterator[str]:
        last = len(self.blocks.blocks) - 1
        yield "for (long s = 0; s < rows; s++)"
        yield f"loss({self._out(last)}, job->y[order[s]], {self._gradient(last)}, share, &job->loss);"

    def part(self) -> str:
        """Forward, loss and backward of some rows of a batch, and the step of fully connected layers."""
        lines = [*self._forward(), *self._losses(), *self._backward()]
        arguments = "Job *job, const int64_t *order, long rows, real share, const Rule *rule, int first, int last, real *check"
        arguments += ", const real *now"
        head = f"KERNEL void part({arguments})"
        names = [
            "real *const work = job->work;", "uint8_t *const bytes = job->bytes;", "const real *const start = job->start;",
            f"real *const w = {self._at('w')}, *const g = {self._at('g')}, *const velocity = {self._at('velocity')};",
        ]  # fmt: skip
        return "\n".join([f"{head} {{", *names, *lines, "}", ""])

    def _forward(self, check: str = "*check") -> Iterator[str]:
        """The forward pass; ``check`` becomes nan where a number of an example is not finite, which a pool would hide."""
        entry, channels = self.blocks.input, self.blocks.network.source
        yield "for (long s = 0; s < rows; s++) {"
        examples = f"job->x + order[s] * {channels[0] * channels[1] * channels[2]}"
        yield f"{check} += gather({examples}, {self._out(-1)}, job->ranges + {entry.quantizer or 0});"
        inside = True
        for i, block in enumerate(self.blocks.blocks):
            if isinstance(block, Linear):
                if inside:
                    yield "}"
                inside = False
                yield f"forward{i}({self._out(i - 1, row=False)}, {self._weights(i, block)}, {self._out(i, row=False)}, rows);"
                bias, mark = self._bias(block), self._mark(i, row=False)
                yield f"finish{i}({self._out(i, row=False)}, {bias}, {mark}, {self._range(block)}, rows);"
                continue
            if not inside:
                yield "for (long s = 0; s < rows; s++) {"
            inside = True
            yield self._plane_forward(i, block)
        if inside:
            yield "}"

    def _plane_forward(self, i: int, block: Block) -> str:
        out, mark, target = self._out(i, block.target.origin), self._mark(i), self._range(block)
        if isinstance(block, (Conv, Depthwise)):
            rows = isinstance(block, Conv) and not block.by_tap
            weights = self._at(f"t{i}") if rows else self._weights(i, block)
            return f"forward{i}({self._out(i - 1)}, {weights}, {self._bias(block)}, {out}, {mark}, {target});"
        if isinstance(block, Normal):
            source, weights = self._out(i - 1, block.source.origin), self._scale(block)
            return f"forward{i}({source}, {weights}, {self._bias(block)}, {out}, {mark}, {self._statistics(i, block)}, {target});"
        if isinstance(block, Addition):
            both = f"{self._out(i - 1, block.source.origin)}, {self._out(block.skip, block.other.origin)}"
            return f"forward{i}({both}, {out}, {mark}, {target});"
        return f"forward{i}({self._out(i - 1, block.source.origin)}, {out}, {mark}, {target});"

    def _backward(self) -> Iterator[str]:
        inside = False
        for i in range(len(self.blocks.blocks) - 1, self.blocks.first - 1, -1):
            block = self.blocks.blocks[i]
            if isinstance(block, Linear) and inside:
                yield "}"
            if not isinstance(block, Linear) and not inside:
                yield "for (long s = 0; s < rows; s++) {"
            inside = not isinstance(block, Linear)
            yield from self._linear_backward(i, block) if isinstance(block, Linear) else self._plane_backward(i, block)
        if inside:
            yield "}"

    def _linear_backward(self, i: int, block: Linear) -> Iterator[str]:
        d, out = self._gradient(i, row=False), self._out(i, row=False)
        yield f"masked{i}({d}, {out}, {self._mark(i, row=False)}, {self._bias_gradient(block)}, rows);"
        yield from self._linear_input(i, block)
        if self._learns(i, block):
            yield f"update{i}({d}, {self._out(i - 1, row=False)}, {self._updating(i, block, 'g')}, rule, rows, first, last);"

    def _plane_backward(self, i: int, block: Block, fresh: str = "0") -> Iterator[str]:
        yield from self._own_gradients(i, block, fresh)
        gm, mark = self._at("gm"), self._mark(i)
        if isinstance(block, Addition) and block.skip >= self.blocks.first:
            yield f"skip{i}({gm}, {mark}, {self._skip(i, block, block.other.origin)});"
        if i == self.blocks.first:
            return
        into = self._gradient(i - 1)
        match block:
            case Conv():
                yield f"input{i}({self._weights(i, block)}, {gm}, {mark}, {into});"
            case Depthwise():
                yield f"input{i}({self._weights(i, block)}, {gm}, {self._at(f'spread{i}')}, {into});"
            case Normal():
                source, at = self._out(i - 1, block.source.origin), self._gradient(i - 1, block.source.origin)
                values = f"{self._statistics(i, block)}, {self._at('moments')}"
                yield f"input{i}({source}, {self._scale(block)}, {gm}, {values}, {at});"
            case _:
                yield f"clear({into}, {block.source.size});"
                yield f"input{i}({gm}, {mark}, {self._gradient(i - 1, block.source.origin)});"
        yield from (f"accumulate({into}, {self._skip(n, b)}, {b.other.size});" for n, b in self._sums(i - 1))

    def _own_gradients(self, i: int, block: Block, fresh: str = "0") -> Iterator[str]:
        """The masked gradient of example s, and those of the block's parameters; ``fresh`` where they overwrite."""
        origin, gm, mark = block.target.origin, self._at("gm"), self._mark(i)
        at = f"(word *)({self._at('at')})" if "at" in self.memory.places else "(word *)work"
        yield f"masked{i}({self._gradient(i, origin)}, {self._out(i, origin)}, {mark}, {gm}, {at}, {self._bias_gradient(block)});"
        if isinstance(block, Normal):
            into = f"g + {block.weight.offset}" if block.weight else "g"
            values = f"{self._statistics(i, block)}, {self._at('moments')}, {into}"
            yield f"weight{i}({self._out(i - 1, block.source.origin)}, {gm}, {values});"
        elif self._learns(i, block) and isinstance(block, (Conv, Depthwise)):
            into = f"g + {block.weight.offset}"
            if isinstance(block, Conv):
                over = fresh if weight_gradients.overwrites(block) else "0"
                yield f"weight{i}({self._out(i - 1)}, {gm}, {at}, {mark}, {into}, {over});"
            else:
                yield f"weight{i}({self._out(i - 1)}, {gm}, {into});"

    def _scale(self, block: Normal) -> str:
        return _place(block.weight) if block.weight else "now"

    def _skip(self, i: int, block: Addition, extra: int = 0) -> str:
        """Where the gradient of an addition waits for the block to which it skips."""
        return self._at(f"skip{i}", block.other.size if i > self.blocks.flat else 0, extra)

    def train(self) -> str:
        """``trained_blob``, all epochs of one client, gives the blob that they leave, null for a label that is no class, and in
        ``check`` nan if a value was not finite. The entry point ``train`` writes the update, or returns 1."""
        count = self.blocks.trainable
        return f"""
KERNEL const real *trained_blob(Job *job, real *check) {{
    real *const work = job->work, *const w = {self._at("w")}, *const velocity = {self._at("velocity")};
    Rule rule = {{(real)job->rate, (real)job->momentum, (real)job->decay, (real)job->proximal, 0, 1, 0}};
    rule.plain = job->momentum == 0 && job->decay == 0 && job->proximal == 0;
    for (long i = 0; i < job->examples; i++)
        if (job->y[job->order[i]] < 0 || job->y[job->order[i]] >= {self.blocks.network.classes}) return 0;
    job->loss = 0;
    *check = 0;
    const real *now = job->start;
    for (long epoch = 0; epoch < job->epochs; epoch++)
        for (long begin = 0; begin < job->examples; begin += job->batch) {{
            const long left = job->examples - begin, count = left < job->batch ? left : job->batch;
            const long parts = (count + {self.memory.rows - 1}) / {self.memory.rows};
            const int64_t *order = job->order + epoch * job->examples + begin;
            if (rule.begin) begin_batch(work, now, job->start);
            else next_batch(work, now, job->start);
            rule.end = epoch + 1 == job->epochs && begin + count == job->examples;
            for (long p = 0; p < parts; p++) {{
                const long rows = count / parts + (p < count % parts);
                part(job, order, rows, 1 / (real)count, &rule, p == 0, p == parts - 1, check, now);
                order += rows;
            }}
            small_steps(w, now, job->start, velocity, {self._at("g")}, &rule);
            now = w;
            rule.begin = 0;
        }}
    return now;
}}

__attribute__((visibility("default"))) int train(Job *job) {{
    real check;
    const real *const now = trained_blob(job, &check);
    if (!now) return 1;
    export_update(now, job->start, job->update);
    if (check != 0) {{
        for (long i = 0; i < {count}; i++) job->update[i] = check;
        job->loss = (double)check;
    }}
    return 0;
}}
"""


def _grid(i: int, block: Linear) -> str:
    return f"grid{i}" if block.layer.rounded else ""


def _place(parameter: Parameter) -> str:
    """Where a parameter is read: frozen ones stay where the start is."""
    return f"{'now' if parameter.trainable else 'start'} + {parameter.offset}"
