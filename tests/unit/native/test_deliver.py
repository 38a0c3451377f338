"""The trainer for app developers: what is built, that it needs nothing, and that a microcontroller gives this processor's bits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from small_zoo import PLANS, SHAPES, SQUARED, federation, network, start_of, updates, why_no_compiler
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.native.blocks import LANES, plan
from fedcore.native.build import COMMON, BuildFailed, build, compile_library, host_target
from fedcore.native.deliver import DEVICES, deliver, load_alignment
from fedcore.native.emit import engine_source, source
from fedcore.native.explain import explain
from fedcore.native.layers import lower
from fedcore.native.memory import plan_memory
from fedcore.native.trainer import NativeTrainer, Program, Worker, _range
from fedcore.quantization.layers import quantizers
from fedcore.training.plan import batch_order

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")
LOSSES = ["usual", "squared"]


@pytest.mark.parametrize("target", DEVICES)
def test_a_delivery_is_whole_and_needs_no_libc(target, tmp_path):
    found = deliver(network("mlp", True, torch.float32), SHAPES["mlp"], target, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"trainer.c", "trainer.h", DEVICES[target].file} | ({"trainer.json"} if target != "cortex-m4" else set())
    data = (tmp_path / DEVICES[target].file).read_bytes()
    assert data[:4] == b"\x7fELF"
    model = network("mlp", True, torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found.parameter_bytes == 4 * count == 4 * found.parameters
    assert 1000 < found.code_bytes < len(data)
    assert found.peak_bytes > found.workspace_bytes + 2 * found.parameter_bytes
    header = (tmp_path / "trainer.h").read_text()
    assert f"#define TRAINER_PARAMETERS {count} " in header
    if target == "cortex-m4":
        assert (load_alignment(data), found.examples_together) == (0, 1)
        return
    assert load_alignment(data) >= 16384
    dynamic = subprocess.run(
        ["readelf", "-d", "--dyn-syms", "-W", tmp_path / found.file], capture_output=True, text=True, check=True
    )
    assert "(NEEDED)" not in dynamic.stdout
    undefined = [line for line in dynamic.stdout.splitlines() if " UND " in line and not line.rstrip().endswith("UND")]
    assert undefined == []


@pytest.mark.parametrize("local", [PLANS["everything"], SQUARED], ids=LOSSES)
def test_the_header_describes_the_library(tmp_path, local):
    """A C program that knows nothing but trainer.h trains as the engine does."""
    name, client = "mlp", federation(SHAPES["mlp"], torch.float32)[0]
    model = network(name, False, torch.float32)
    here, _ = updates(NativeTrainer(network(name, False, torch.float32)), [client], local)
    client = federation(SHAPES[name], torch.float32)[0]
    deliver(model, SHAPES[name], "x86_64", tmp_path, loss=local.loss)
    assert ("The loss: squared error" in (tmp_path / "trainer.h").read_text()) is (local is SQUARED)
    assert json.loads((tmp_path / "trainer.json").read_text()).get("loss") == ("squared" if local is SQUARED else None)
    order = np.concatenate(batch_order(len(client.y), local, client.rng))
    program = f"""
#include "trainer.h"
#include <stdio.h>
{c_array("float", "x", client.x, LANES)}
{c_array("int64_t", "y", client.y)}
{c_array("int64_t", "order", order)}
{c_array("float", "parameters", start_of(model), LANES)}
static _Alignas(64) float blob[TRAINER_BLOB], work[TRAINER_WORK], update[TRAINER_PARAMETERS + TRAINER_PADDING];
static _Alignas(64) uint8_t bytes[TRAINER_BYTES];
int main(void) {{
    import_start(blob, parameters);
    TrainerRange none[1] = {{{{0}}}};
    TrainerJob job = {{ .x = x, .y = y, .order = order, .examples = {len(client.y)}, .epochs = {local.epochs},
        .batch = {local.batch_size}, .start = blob, .ranges = none, .work = work, .bytes = bytes, .update = update,
        .rate = {local.lr!r}, .momentum = {local.momentum!r}, .decay = {local.weight_decay!r}, .proximal = {local.proximal_mu!r} }};
    if (train(&job)) return 1;
    fwrite(update, sizeof(float), TRAINER_PARAMETERS, stdout);
    return 0;
}}
"""
    target = DEVICES["x86_64"].processor
    compile_library(
        program, (*target.flags, "-O1", f"-I{tmp_path}", f"{tmp_path}/trainer.c", "-static", "-Wno-psabi", "-std=gnu11", "-O3",
                  "-ffp-contract=on", "-fno-sanitize=all"), tmp_path / "main"
    )  # fmt: skip
    done = subprocess.run([tmp_path / "main"], capture_output=True, check=True, timeout=60)
    assert torch.equal(torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()), here[0])


def c_array(kind: str, name: str, values, room: int = 0) -> str:
    flat = np.asarray(values).reshape(-1)
    texts = [float(v).hex() if kind == "float" else str(int(v)) for v in flat] + ["0"] * room
    return f"static _Alignas(64) {kind} {name}[] = {{{', '.join(texts)}}};"


# Vector table, stack, semihosting: what a microcontroller needs to run and to say something to its emulator.
BOARD = r"""
static void semihost(int call, const void *argument) {
    register int r0 __asm__("r0") = call;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}
void reset(void);
extern uint32_t top_of_stack[];
__attribute__((section(".vectors"), used)) static const void *const vectors[] = {top_of_stack, (void *)reset};
void *memclear(void *to, long n) { for (char *p = to; n--; p++) *p = 0; return to; }
__attribute__((used)) void reset(void) {
    *(volatile uint32_t *)0xE000ED88 |= 0xF << 20; /* the floating-point unit */
    __asm__ volatile("dsb\n isb");
    run();
    semihost(0x18, (void *)0x20026);
    for (;;) {}
}
"""
LINKER = """
ENTRY(reset)
MEMORY { FLASH (rx) : ORIGIN = 0x00000000, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > FLASH
  /DISCARD/ : { *(.ARM.ex*) }
  .data : { *(.data*) } > RAM
  .bss (NOLOAD) : { *(.bss*) *(COMMON) } > RAM
  top_of_stack = ORIGIN(RAM) + LENGTH(RAM);
}
"""


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm (Debian) is not installed")
@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "fake-quant"])
@pytest.mark.parametrize("local", [PLANS["everything"], pytest.param(SQUARED, marks=pytest.mark.slow)], ids=LOSSES)
def test_a_microcontroller_gives_the_bits_of_this_processor(name, quantized, local, tmp_path):
    client = federation(SHAPES[name], torch.float32)[0]
    model = network(name, quantized, torch.float32)
    blocks = plan(lower(model, SHAPES[name]), model)
    memory = plan_memory(blocks, DEVICES["cortex-m4"].rows)
    host = host_target()
    library = build(engine_source(blocks, memory, host, local.loss), host)
    program = Program(blocks, memory, library, private=True, loss=local.loss)
    expected = Worker(program, model).train(start_of(model), client, local).update
    client = federation(SHAPES[name], torch.float32)[0]
    order = np.concatenate(batch_order(len(client.y), local, client.rng))
    ranges = np.array([_range(one.frozen) for _, one in quantizers(model)] or [(0.0,) * 7], np.float32)
    text = (
        source(blocks, memory, DEVICES["cortex-m4"].processor, local.loss)
        + f"""
{c_array("float", "the_x", client.x, LANES)}
{c_array("int64_t", "the_y", client.y)}
{c_array("int64_t", "the_order", order)}
{c_array("float", "the_parameters", start_of(model), LANES)}
{c_array("float", "the_ranges", ranges)}
static _Alignas(64) float blob[{blocks.blob + LANES}], workspace[{memory.numbers}], update[{blocks.trainable + LANES}];
static _Alignas(64) uint8_t marked[{memory.bytes}];
static void run(void);
{BOARD}
static void run(void) {{
    import_start(blob, the_parameters);
    Job job = {{ .x = the_x, .y = the_y, .order = the_order, .examples = {len(client.y)}, .epochs = {local.epochs},
        .batch = {local.batch_size}, .start = blob, .ranges = (const Range *)the_ranges, .work = workspace, .bytes = marked,
        .update = update, .rate = {local.lr!r}, .momentum = {local.momentum!r}, .decay = {local.weight_decay!r},
        .proximal = {local.proximal_mu!r} }};
    if (train(&job)) return;
    for (long i = 0; i < {blocks.trainable}; i++) {{
        union {{ float f; uint32_t u; }} bits = {{ update[i] }};
        char line[10];
        for (int k = 0; k < 8; k++) line[k] = "0123456789abcdef"[bits.u >> (28 - 4 * k) & 15];
        line[8] = '\\n', line[9] = 0;
        semihost(4, line);
    }}
}}
"""
    )
    (tmp_path / "board.ld").write_text(LINKER)
    device = DEVICES["cortex-m4"]
    linked = [flag for flag in device.flags if flag != "-c"]
    flags = (*device.processor.flags, *COMMON, *linked, "-nostartfiles", f"-Wl,-T,{tmp_path}/board.ld")
    compile_library(
        text.replace("static _Alignas(64) float the_", "static const _Alignas(64) float the_"), flags, tmp_path / "board"
    )
    command = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting-config", "enable=on,target=native", "-kernel"]
    done = subprocess.run(
        [*command, tmp_path / "board"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )
    lines = [line for line in (done.stderr + done.stdout).split() if len(line) == 8]
    assert len(lines) == blocks.trainable, done.stderr[:300]
    found = np.array([int(line, 16) for line in lines], np.uint32).view(np.float32)
    assert torch.equal(torch.from_numpy(found.copy()), expected)


def test_where_the_time_goes_adds_up():
    found = explain(network("cnn", True, torch.float32), SHAPES["cnn"])
    assert [share.layers.split()[1] for share in found.shares] == ["Conv2d", "Conv2d", "Linear", "Linear"]
    assert all(share.seconds > 0 and share.flops > 0 for share in found.shares)
    assert found.rest > 0
    assert found.seconds == pytest.approx(found.rest + sum(share.seconds for share in found.shares))
    assert found.peak > 0.1
    taps = 9 * 16 * math.prod(SHAPES["cnn"][1:])
    assert found.shares[0].flops == 2 * 2 * taps  # one channel, forward and weights


def test_the_commands(tmp_path):
    runner = CliRunner()
    done = runner.invoke(
        app, ["native", "build", "mlp", "--input-shape", "1,8,8", "--target", "cortex-m4", "--out", str(tmp_path / "m"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "cortex-m4"
    for loss in ([], ["--loss", "squared"]):
        done = runner.invoke(app, ["native", "explain", "mlp", "--input-shape", "1,8,8", "--float", "--json", *loss])
        assert done.exit_code == 0, done.output
        assert [share["layers"] for share in json.loads(done.stdout)["shares"]] == ["1 Linear + ReLU", "3 Linear"]
    usual = {"mlp": 784 * 64 + 64 + 640 + 10, "imu_cnn": 65_258}
    for name, parameters in usual.items():
        done = runner.invoke(app, ["native", "build", name, "--target", "x86_64", "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert f"{parameters} parameters" in done.output
        assert f"for examples of {'6x64' if name == 'imu_cnn' else '1x28x28'}" in done.output
    for arguments, words in (
        (["build", "mlp", "--input-shape", "1,8,8", "--target", "z80", "--out", "x"], "allowed: x86_64"),
        (["build", "mine:net", "--target", "x86_64", "--out", "x"], "--input-shape"),
        (["explain", "nothing", "--input-shape", "1,8,8"], "nothing"),
        (["explain", "mlp", "--input-shape", "1,8,8", "--loss", "hinge"], "--loss 'hinge': must be one of cross_entropy, squared"),
    ):
        done = runner.invoke(app, ["native", *arguments])
        assert done.exit_code == 2, done.output
        assert words in done.output
        assert len(done.output.strip().splitlines()) == 1


def test_a_scenario_says_the_loss_and_an_option_another(scenario, tmp_path):
    file, model = tmp_path / "small.toml", ["native", "build", str(tmp_path / "small.toml"), "--target", "x86_64", "--float"]
    assert scenario().training.loss == "cross_entropy"
    file.write_text(file.read_text() + '[training]\nloss = "squared"\n')
    for options, wanted in (([], "squared"), (["--loss", "cross_entropy"], None)):
        done = CliRunner().invoke(app, [*model, "--out", str(tmp_path / "built"), *options])
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "built" / "trainer.json").read_text()).get("loss") == wanted


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildFailed, match="cannot be written"):
        deliver(network("mlp", False, torch.float32), SHAPES["mlp"], "x86_64", tmp_path / "file")
