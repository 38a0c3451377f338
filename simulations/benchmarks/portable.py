"""A device's training step in ONNX Runtime, beside torch and beside the bare calls of the session in it.

The work: a step of 16 on a CNN over 1x28x28 images, on one thread. ``torch_ms`` is what one writes for it in torch: loss.backward
for a plain step, and torch.func's vmap(grad_and_value) with clipping for a private one (noise, momentum and the rest left out);
``session_ms`` is the portable step's graph for the same numbers. ``loop_ratio`` is the time of a device's whole training loop
over the time of the calls of the session in it, which the loop cannot save; ``checkpointed_ratio`` the same with its progress
written every 20 steps. ``max_abs_diff`` compares the two sums of gradients in float32. Peak memory is that of a fresh process
that trains on its own.

    python -m simulations.benchmarks.portable --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from fedcore.models import ZOO
from fedcore.portable.step import PortableStep, portable_step
from fedcore.quantization.layers import activation_ranges, calibrate, make_quantization_aware

DEVICE = Path(__file__).parents[2] / "clients" / "linux"
IMAGE, CLASSES, BATCH, CLIP = (1, 28, 28), 10, 16, 1.0
SIZES = {"cnn-65k": 74, "cnn-109k": 128}  # units of the hidden layer
EXAMPLES, TURNS = 320, 40

FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from fedcore_device.noise import Randomness
from fedcore_device.plan import ExamplePrivacy, TrainingPlan
from fedcore_device.step import read_step
from fedcore_device.trainer import Task, train
from fedcore.quantization.wire import ActivationRange
step = read_step(open(sys.argv[2], "rb").read())
ranges = {name: ActivationRange(0.02, -20) for name in step.form.quantizers}
rng = np.random.default_rng(0)
x, y = rng.standard_normal((320, 1, 28, 28), np.float32), rng.integers(0, 10, 320)
start = rng.standard_normal(step.form.parameters, np.float32) / 20
plan = TrainingPlan(2, 16, 0.01, momentum=0.9, privacy=ExamplePrivacy(1.0, 1.0) if step.form.clips else None)
train(Task(step, start, plan, ranges=ranges), x, y, Randomness.from_system())
assert not {"torch", "flwr", "onnx"} & set(sys.modules)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


class TimedSession:
    """Hands calls on to a session and adds up their time; ``opening``: seconds that it took to load it."""

    def __init__(self, session: Any, opening: float = 0.0) -> None:
        self.session, self.opening, self.seconds = session, opening, 0.0

    def run(self, *arguments: Any) -> Any:
        """As the session's."""
        began = time.perf_counter()
        answer = self.session.run(*arguments)
        self.seconds += time.perf_counter() - began
        return answer


def network(hidden: int, quantized: bool) -> nn.Module:
    """A CNN with random weights, and with frozen activation ranges if it is quantized."""
    torch.manual_seed(0)
    model = ZOO["cnn"](IMAGE, CLASSES, hidden=hidden)
    if quantized:
        calibrate(make_quantization_aware(model), [torch.randn(64, *IMAGE)])
    return model


def torch_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, private: bool) -> Callable[[], torch.Tensor]:
    """What sums the gradients of a batch in torch, clipped or not."""
    if not private:

        def plain() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y, reduction="sum").backward()
            return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

        return plain
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, values, (one[None],)), label[None])

    each = vmap(grad_and_value(loss), in_dims=(None, 0, 0))

    def clipped() -> torch.Tensor:
        found, _ = each(parameters, x, y)
        rows = torch.cat([part.flatten(1) for part in found.values()], 1)
        factors = (CLIP / rows.norm(dim=1)).clamp(max=1)
        return factors @ rows

    return clipped


def measure_step(model: nn.Module, step: PortableStep, private: bool) -> dict[str, float]:
    """Milliseconds of torch and of the session, measured in turn, and the difference of what they give."""
    from fedcore_device.step import Accumulate, read_step

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((BATCH, *IMAGE), np.float32), rng.integers(0, CLASSES, BATCH)
    reference = torch_step(model, torch.from_numpy(x), torch.from_numpy(y), private)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    found = Accumulate(read_step(step.data, step.sha256), ranges=activation_ranges(model))
    graph: Any = found._engine
    graph._session = timed = TimedSession(graph._session)
    spent: list[float] = []
    sessions: list[float] = []
    difference = 0.0
    for turn in range(TURNS + 5):
        began = time.perf_counter()
        expected = reference()
        middle, before = time.perf_counter(), timed.seconds
        gradient, _ = found(start, x, y, np.arange(BATCH), CLIP if private else math.inf)
        if turn >= 5:  # the first ones warm up
            spent.append(middle - began)
            sessions.append(timed.seconds - before)
        difference = max(difference, float(np.abs(gradient - expected.numpy()).max()))
    return {
        "torch_ms": 1e3 * statistics.median(spent), "session_ms": 1e3 * statistics.median(sessions),
        "vs_torch": statistics.median(a / b for a, b in zip(spent, sessions, strict=True)), "max_abs_diff": difference,
    }  # fmt: skip


def measure_loop(model: nn.Module, step: PortableStep, private: bool) -> dict[str, float]:
    """The whole loop of a device over the calls of the session in it, with and without a checkpoint; medians of rounds."""
    from fedcore_device import step as device_step
    from fedcore_device.noise import Randomness
    from fedcore_device.plan import ExamplePrivacy, TrainingPlan
    from fedcore_device.step import read_step
    from fedcore_device.trainer import Resume, Task, train

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((EXAMPLES, *IMAGE), np.float32), rng.integers(0, CLASSES, EXAMPLES)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    plan = TrainingPlan(1, BATCH, 0.01, 0.9, 1e-4, 0.01, ExamplePrivacy(CLIP, 1.0) if private else None)
    task = Task(read_step(step.data, step.sha256), start, plan, ranges=activation_ranges(model))
    sessions: list[TimedSession] = []
    opened = device_step.open_session

    def timed(*arguments: Any) -> TimedSession:
        began = time.perf_counter()
        session = opened(*arguments)
        sessions.append(TimedSession(session, time.perf_counter() - began))
        return sessions[-1]

    device_step.open_session = timed
    ratios: dict[str, list[float]] = {"loop_ratio": [], "checkpointed_ratio": []}
    steps: list[float] = []
    try:
        for turn in range(12):
            for name, times in ratios.items():
                with tempfile.TemporaryDirectory() as folder:
                    resume = Resume(Path(folder) / "progress") if name == "checkpointed_ratio" else None
                    began = time.perf_counter()
                    trained = train(task, x, y, Randomness.from_system(), resume=resume)
                    spent = time.perf_counter() - began - sessions[-1].opening
                if turn:
                    times.append(spent / sessions[-1].seconds)
                    steps += [1e3 * spent / trained.steps] if resume is None else []
    finally:
        device_step.open_session = opened
    return {"step_ms": statistics.median(steps)} | {name: statistics.median(times) for name, times in ratios.items()}


def peak_megabytes(step: PortableStep) -> float:
    """Peak resident memory of a fresh process that trains with the step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        path.write_bytes(step.data)
        command = [sys.executable, "-c", FRESH, str(DEVICE), str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(found.stdout) / 1024


def main() -> None:
    """Print a row for each network, with and without rounding and clipping."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    as_json = parser.parse_args().json
    sys.path.insert(0, str(DEVICE))
    torch.set_num_threads(1)
    for name, hidden in SIZES.items():
        for quantized in (False, True):
            for private in (False, True):
                model = network(hidden, quantized)
                step = portable_step(model, IMAGE, batch=BATCH, unit="example" if private else "")
                row: dict[str, Any] = {
                    "model": name, "parameters": step.form.parameters, "fake_quant": quantized, "private": private,
                    "bytes": len(step.data), **measure_step(model, step, private), **measure_loop(model, step, private),
                    "peak_mb": peak_megabytes(step),
                }  # fmt: skip
                shown = {key: _rounded(key, value) for key, value in row.items()}
                print(json.dumps(shown) if as_json else "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def _rounded(key: str, value: Any) -> Any:
    return round(value, 9 if "diff" in key else 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
