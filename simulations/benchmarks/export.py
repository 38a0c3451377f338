"""Short federations, exported for every runtime: the table of simulations/README.md.

python -m simulations.benchmarks.export [--only NAME,..] [--targets NAME,..] [--micro-python FILE] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = "onnx,litert,executorch,coreml,ncnn,mnn,micro"
_ALL = ["training.batch_size=16", "training.momentum=0.9", "training.lr=0.02", "engine.workers=1", "evaluation.every=0"]
_DIGITS = [*_ALL, "data.dataset=digits", "data.clients=10", "run.rounds=120", "quantization.calibrate_round=80",
           "training.epochs=3"]  # fmt: skip
_FASHION = [*_ALL, "data.dataset=fashion-mnist", "data.clients=20", "data.partition=iid", "data.calibration=512", "run.rounds=40",
            "quantization.calibrate_round=25", "cohort.size=10"]  # fmt: skip
_WATCH = [*_ALL, "data.dataset=smartwatch", "data.partition=natural", "data.clients=0", "run.rounds=80",
          "quantization.calibrate_round=50", "training.epochs=2"]  # fmt: skip
RUNS = {
    **{f"digits {model}": [*_DIGITS, f"model.name={model}"] for model in ("mlp", "cnn", "dscnn")},
    **{f"fashion-mnist {model}": [*_FASHION, f"model.name={model}"] for model in ("mlp", "cnn", "dscnn")},
    "smartwatch imu_cnn": [*_WATCH, "model.name=imu_cnn"],
}
_SIDES = {"digits dscnn": 8, "fashion-mnist dscnn": 28}


def main() -> None:
    """Train, export and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated runs, e.g. 'digits cnn'")
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--micro-python", default="")
    parser.add_argument("--work", type=Path, default=None, help="directory that keeps the runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        print("| model | target | bytes | agreement | accuracy | loss, points | ms | p95 ms | peak MB | int / float ops | gate |")
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in given.only.split(",") if given.only else RUNS:
            for row in exported(name, work / name.replace(" ", "-"), given.targets, given.micro_python):
                print(line(name, row), flush=True)


def exported(name: str, directory: Path, targets: str, micro_python: str) -> list[dict[str, Any]]:
    """The rows of one run; it is trained if the directory does not hold it yet."""
    if not (directory / "result.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        scenario = directory.with_suffix(".toml")
        scenario.write_text("")
        own = [*RUNS[name], *([f"model.init={_initial(_SIDES[name], directory)}"] if name in _SIDES else [])]
        settings = [part for setting in own for part in ("--set", setting)]
        fedcore("simulate", str(scenario), "--out", str(directory), "--json", *settings)
    arguments = ["--targets", targets, "--json", *(["--micro-python", micro_python] if micro_python else [])]
    rows: list[dict[str, Any]] = json.loads(fedcore("export", str(directory), *arguments, allowed=(0, 1)))["rows"]
    return rows


def _initial(side: int, directory: Path) -> Path:
    """Initial parameters for dscnn (He et al. 2015, arXiv:1502.01852): from torch's own its seven layers without normalisation do
    not begin to learn, and a model that answers one class always agrees with itself."""
    import safetensors.torch
    import torch
    from torch import nn

    from fedcore.models import ZOO

    torch.manual_seed(0)
    model = ZOO["dscnn"]((1, side, side), 10)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    path = directory.with_suffix(".safetensors")
    safetensors.torch.save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, path)
    return path


def fedcore(*arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Run the command; its standard output."""
    command = [sys.executable, "-c", "from fedcore.cli import main; main()", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in allowed:
        raise SystemExit(f"fedcore {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""

    def shown(key: str, pattern: str, factor: float = 1) -> str:
        return "" if row[key] is None else pattern.format(row[key] * factor)

    verdict = row["gate"] if row["status"] == "exported" and row["gate"] == "pass" else f"{row['gate']} ({row['reason']})"
    if row["status"] == "not run":
        verdict = "specification and weights; not run"
    cells = [
        name, row["target"], shown("bytes", "{:,}"), shown("agreement", "{:.4f}"), shown("accuracy", "{:.4f}"),
        shown("accuracy_loss", "{:.2f}"),
        shown("latency_ms", "{:.3f}"), shown("p95_ms", "{:.3f}"), shown("peak_bytes", "{:.3f}", 1e-6),
        f"{shown('integer_ops', '{}')} / {shown('float_ops', '{}')}", verdict,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
