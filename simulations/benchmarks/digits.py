"""The main job on several seeds, beside the same model trained centrally on the same examples.

Central training is the same code with one client that holds everything: as many rounds of two epochs, at a learning rate at which
pooled training is stable. Prints a table (or JSON): accuracy of the fp32 master, of the int8 model in ONNX Runtime, test images
between the two, points below central training.

    python -m simulations.benchmarks.digits --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun

SCENARIO = Path(__file__).parents[1] / "scenarios" / "digits.toml"
CENTRAL = ("data.clients=1", "data.partition=iid", "training.epochs=2", "training.lr=0.01", "evaluation.federated_every=0")


def run(seed: int, *settings: str) -> dict[str, Any]:
    """The result of one run."""
    config = load_config(SCENARIO, [f"run.seed={seed}", "evaluation.every=0", *settings])
    with tempfile.TemporaryDirectory() as folder, SimulatedRun(config, Path(folder), resume=False) as simulated:
        list(simulated.rounds())
        return simulated.finish()


def compare(seed: int) -> dict[str, Any]:
    """One row of the table."""
    federated, central = run(seed), run(seed, *CENTRAL)
    return {
        "seed": seed,
        "accuracy": federated["accuracy"],
        "int8_accuracy": federated["int8_accuracy"],
        "images_below_fp32": round((federated["accuracy"] - federated["int8_accuracy"]) * federated["test_examples"]),
        "central_int8_accuracy": central["int8_accuracy"],
        "points_below_central": 100 * (central["int8_accuracy"] - federated["int8_accuracy"]),
        "seconds": federated["seconds"],
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="The main job on several seeds, beside central training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object a seed")
    given = parser.parse_args()
    if not given.json:
        print("| seed | fp32 master | int8 | images below fp32 | central int8 | points below central | seconds |")
        print("|---|---|---|---|---|---|---|")
    for seed in given.seeds:
        row = compare(seed)
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            shown = [
                f"{value:.4f}" if "accuracy" in key else f"{value:.1f}" if isinstance(value, float) else str(value)
                for key, value in row.items()
            ]
            print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
