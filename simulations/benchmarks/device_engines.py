"""A device's round of training with a native library and with ONNX Runtime: the time and the memory of the child that trains.

The work: the digits CNN on ``--examples`` images, three epochs in batches of 16 with momentum, on one thread, in the confined child
of a device, whose start is left out. ``round_ms`` is from the library's or the graph's loading, with its checks, to the last step;
``step_ms`` a step in a process that is warm; ``peak_mb`` what was resident in the child at most. Engines take turns; figures are
medians, and ``faster`` is that of the ratios of neighbours.

    python -m simulations.benchmarks.device_engines --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedcore.config import DataConfig
from fedcore.data.datasets import load_dataset
from fedcore.models import ZOO, layout_of
from fedcore.native.deliver import deliver
from fedcore.portable.step import PortableStep, portable_step
from fedcore.quantization.layers import activation_ranges, calibrate, make_quantization_aware
from fedcore.quantization.wire import encode_model
from fedcore.training.client import RoundTask
from fedcore.training.plan import DpSgdPlan, LocalPlan

DEVICE = Path(__file__).parents[2] / "clients" / "linux"
BATCH, EPOCHS, TURNS, STEPS = 16, 3, 9, 60
ENGINES = ("library", "onnxruntime")
Row = dict[str, Any]


class Round:
    """A round's files in a directory: examples, model, step, library."""

    def __init__(self, folder: Path, model: nn.Module, examples: int, *, private: bool) -> None:
        images = load_dataset(DataConfig(), Path(), 0).train
        self.folder, self.model, self.private = folder, model, private
        self.x, self.y = images.x[:examples], images.y[:examples].astype(np.int64)
        self.step: PortableStep[Any] = portable_step(model, self.x.shape[1:], batch=BATCH, unit="example" if private else "")
        self.description = Path(deliver(model, self.x.shape[1:], "x86_64", folder / "native").description)
        self.start = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
        self.plan = LocalPlan(EPOCHS, BATCH, 0.05, momentum=0.9, dp=DpSgdPlan(1.0, 1.0) if private else None)
        (folder / "examples").mkdir()
        np.savez(folder / "examples" / "digits.npz", x=self.x, y=self.y)
        (folder / "step").write_bytes(self.step.data)
        layout = layout_of(model, trainable=True)
        (folder / "model").write_bytes(encode_model(layout.wire_tensors(self.start)))

    def child(self, engine: str) -> Row:
        """Time and memory of one child."""
        from fedcore_device.child import write_job
        from fedcore_device.training import train_in_child

        place = self.folder / engine
        place.mkdir(exist_ok=True)
        (place / "progress.bin").unlink(missing_ok=True)
        grids = activation_ranges(self.model)
        ranges = {
            "activation-names": list(grids), "activation-scales": [one.scale for one in grids.values()],
            "activation-zero-points": [one.zero_point for one in grids.values()],
        }  # fmt: skip
        library = {"native": str(self.description), "native_sha256": json.loads(self.description.read_text())["sha256"]}
        write_job(place, {
            "examples": str(self.folder / "examples"), "model": str(self.folder / "model"), "step": str(self.folder / "step"),
            "step_sha256": self.step.sha256, "frozen": "", "settings": RoundTask(1, self.plan, 1e9).to_table() | ranges,
            "encoding": "float32", "values": len(self.start), "memory": 1 << 31, "seconds": 600, "evaluates": False,
            "randomness": {"entropy": "07", "noise_key": bytes(16).hex()}, **(library if engine == "library" else {}),
        })  # fmt: skip
        told = train_in_child(place, memory=1 << 31, seconds=600, why_stop=lambda: "").told
        return {"round_ms": 1e3 * told["seconds"], "peak_mb": told["peak_memory_bytes"] / 1e6}

    def warm(self, engine: str) -> float:
        """Milliseconds of a step, without loading."""
        from fedcore_device.compiled import load
        from fedcore_device.noise import Randomness
        from fedcore_device.plan import ExamplePrivacy, TrainingPlan
        from fedcore_device.step import read_step
        from fedcore_device.trainer import Progress, Task, _Loop, state_of

        own = TrainingPlan(1, BATCH, 0.05, 0.9, privacy=ExamplePrivacy(1.0, 1.0) if self.private else None)
        ranges, random = activation_ranges(self.model), Randomness(np.random.default_rng(0), bytes(16))
        task = Task(read_step(self.step.data), self.start, own, ranges=ranges)
        checksum = json.loads(self.description.read_text())["sha256"]
        given = load(self.description, checksum, task.step.form, frozen=None, ranges=ranges) if engine == "library" else None
        progress = Progress(self.start.copy(), np.zeros_like(self.start), 0, 0.0, 0, state_of(random.order), random.noise_key)
        loop = _Loop(task, progress, np.ascontiguousarray(self.x), self.y, 1, given)
        spent = []
        for number in range(STEPS):
            rows = np.arange(BATCH) + number % (len(self.y) - BATCH)
            began = time.perf_counter()
            loop.take(rows)
            spent.append(1e3 * (time.perf_counter() - began))
        return statistics.median(spent[5:])

    def row(self) -> Row:
        """All figures."""
        turns = [{engine: {**self.child(engine), "step_ms": self.warm(engine)} for engine in ENGINES} for _ in range(TURNS)]
        row: Row = {}
        for key in ("round_ms", "step_ms", "peak_mb"):
            row |= {f"{engine}_{key}": statistics.median(turn[engine][key] for turn in turns) for engine in ENGINES}
        for key in ("round_ms", "step_ms"):
            ratios = [turn["onnxruntime"][key] / turn["library"][key] for turn in turns]
            row[f"faster_{key[:-3]}"] = statistics.median(ratios)
        return row


def main() -> None:
    """Print a row with and without rounding and example-level privacy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    given = parser.parse_args()
    sys.path.insert(0, str(DEVICE))
    torch.set_num_threads(1)
    for quantized in (False, True):
        for private in (False, True):
            torch.manual_seed(0)
            model = ZOO["cnn"]((1, 8, 8), 10)
            if quantized:
                calibrate(make_quantization_aware(model), [torch.randn(64, 1, 8, 8)])
            with tempfile.TemporaryDirectory() as folder:
                found = Round(Path(folder), model, given.examples, private=private).row()
            row = {"fake_quant": quantized, "private": private} | {key: round(value, 2) for key, value in found.items()}
            print(json.dumps(row) if given.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
