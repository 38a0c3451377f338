"""Accuracy against epsilon on Fashion-MNIST, for the three units of privacy and without any.

1,000 clients with 60 images each (iid), 200 of them a round, 40 rounds, an MLP of 25,450 parameters in float32, FedAvg. Noise is
solved for each epsilon; what a point stands at is the epsilon that the run's ledger holds in the end, at delta 1e-5. Every
finished point is a line of ``--points``, so that an interrupted run continues; a point whose settings have changed is run again,
one whose code has changed is not.

    python -m simulations.benchmarks.privacy_curves --seeds 0 1 --out simulations/images/privacy.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedcore.config import RunConfig, parse_config
from fedcore.coordinator.run import SimulatedRun

DELTA, EPSILONS = 1e-5, (0.5, 1.0, 2.0, 4.0, 8.0)
CLIENTS, COHORT, ROUNDS = 1000, 200, 40
FEDERATION: dict[str, dict[str, Any]] = {
    "data": {"dataset": "fashion-mnist", "partition": "iid", "clients": CLIENTS},
    "model": {"name": "mlp", "params": {"hidden": [32]}},
    "quantization": {"enabled": False},
    "cohort": {"size": COHORT},
    "evaluation": {"every": 0},
    "engine": {"device": "cpu", "workers": 1},
}
SEVERAL_STEPS = {"epochs": 1, "batch_size": 10, "lr": 0.1}
ONE_STEP = {"epochs": 1, "batch_size": 60, "lr": 1.0, "max_update_norm": 1e6}  # noise makes one update far longer than a model
UNITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": (SEVERAL_STEPS, {}),
    "example": (ONE_STEP, {"unit": "example", "clipping_norm": 1.0}),
    "client, central": (SEVERAL_STEPS, {"unit": "client", "clipping_norm": 0.5, "sampling": "poisson"}),
    "client, distributed": (
        SEVERAL_STEPS,
        {
            "unit": "client", "clipping_norm": 0.5, "mechanism": "skellam",
            # Everybody in turn, so that nobody is charged for more rounds than need be.
            "min_separation": CLIENTS // COHORT, "max_participations": ROUNDS * COHORT // CLIENTS,
        },
    ),
}  # fmt: skip
"""What the clients train with and [privacy], by the name of a curve."""


def scenario(unit: str, target: float, seed: int) -> RunConfig:
    """The scenario of a point: ``target`` is the epsilon that the noise is solved for."""
    training, privacy = UNITS[unit]
    tables = {"run": {"name": "privacy-curves", "rounds": ROUNDS, "seed": seed}, "training": training, **FEDERATION}
    if privacy:
        tables["privacy"] = {"delta": DELTA, "target_epsilon": target, **privacy}
    return parse_config(tables, "privacy_curves", Path())


def measure(unit: str, target: float, seed: int) -> dict[str, Any]:
    """Run a point. ``epsilon`` is that of the ledger, null without privacy."""
    config = scenario(unit, target, seed)
    with tempfile.TemporaryDirectory() as folder, SimulatedRun(config, Path(folder), resume=False) as run:
        history = list(run.rounds())
        protection = run.assembly.protection
    last, noise = history[-1], None
    if protection.client:
        noise = protection.client.noise_multiplier
    elif protection.example:
        noise = protection.example.plan.noise_multiplier
    spent = last["privacy"][config.privacy[0].unit] if config.privacy else {"epsilon": None}
    return {
        "unit": unit, "target_epsilon": target, "seed": seed, "settings": digest(config), "noise_multiplier": noise,
        "epsilon": spent["epsilon"], "delta": DELTA, "accuracy": last["accuracy"],
        "seconds": sum(entry["timing"]["seconds"] for entry in history),
    }  # fmt: skip


def digest(config: RunConfig) -> str:
    """A short name for everything that the scenario says."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()[:16]


def points(file: Path, seeds: Iterable[int], epsilons: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Every point, from ``file`` where it is finished, else run and appended."""
    known = {}
    if file.exists():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        known = {(line["unit"], line["target_epsilon"], line["seed"], line["settings"]): line for line in lines}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for unit in UNITS:
            for target in epsilons if UNITS[unit][1] else (0.0,):
                point = known.get((unit, target, seed, digest(scenario(unit, target, seed))))
                if point is None:
                    point = measure(unit, target, seed)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(point) + "\n")
                yield point


def curves(found: Sequence[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Points by unit and target epsilon, one for each seed."""
    by_unit: dict[str, dict[float, list[dict[str, Any]]]] = {unit: {} for unit in UNITS}
    for point in found:
        by_unit[point["unit"]].setdefault(point["target_epsilon"], []).append(point)
    return by_unit


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each target epsilon and unit the accuracy (mean, lowest to highest seed) and the mean epsilon spent."""
    by_unit = curves(found)
    (plain,) = by_unit["none"].values()
    named = [unit for unit in UNITS if UNITS[unit][1]]
    lines = [
        "| epsilon solved for | " + " | ".join(f"{unit} | spent" for unit in named) + " |",
        "|---" * (1 + 2 * len(named)) + "|",
    ]
    for target in by_unit[named[0]]:
        cells = []
        for unit in named:
            some = by_unit[unit][target]
            cells += [_accuracy(some), f"{statistics.mean(point['epsilon'] for point in some):.2f}"]
        lines.append(f"| {target:g} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"| without privacy | {_accuracy(plain)} |" + " |" * (2 * len(named) - 1)])


def _accuracy(some: Sequence[dict[str, Any]]) -> str:
    values = [100 * point["accuracy"] for point in some]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def draw(found: Sequence[dict[str, Any]], out: Path) -> None:
    """The curves as a picture: means over seeds, bands from the lowest to the highest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    by_unit = curves(found)
    (plain,) = by_unit.pop("none").values()
    axes.axhline(100 * statistics.mean(point["accuracy"] for point in plain), color="0.4", ls="--", label="without privacy")
    for (unit, targets), marker in zip(by_unit.items(), "osD", strict=True):
        columns = list(targets.values())
        x = [statistics.mean(point["epsilon"] for point in some) for some in columns]
        accuracies = [[100 * point["accuracy"] for point in some] for some in columns]
        (line,) = axes.plot(x, [statistics.mean(some) for some in accuracies], marker=marker, label=f"unit {unit}")
        axes.fill_between(
            x, [min(some) for some in accuracies], [max(some) for some in accuracies], color=line.get_color(), alpha=0.15
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"epsilon spent (ledger, delta = {DELTA:g})")
    axes.set_ylabel(f"test accuracy after {ROUNDS} rounds, %")
    axes.set_title(f"Fashion-MNIST, {CLIENTS:,} clients, {COHORT} a round", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Parse, run what is missing, draw, print."""
    parser = argparse.ArgumentParser(description="Accuracy against epsilon on Fashion-MNIST for the three units of privacy.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS), help="epsilons that the noise is solved for")
    parser.add_argument("--points", type=Path, default=Path("runs/privacy_curves.jsonl"), help="finished points, one a line")
    parser.add_argument("--out", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print one JSON object a point")
    given = parser.parse_args()
    found = []
    for point in points(given.points, given.seeds, given.epsilons):
        found.append(point)
        if given.json:
            print(json.dumps(point), flush=True)
    if not given.json:
        print(table(found))
    if given.out:
        draw(found, given.out)


if __name__ == "__main__":
    main()
