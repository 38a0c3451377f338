"""Synchronous rounds with over-selection against buffered asynchronous ones (FedBuff), on the virtual clock of a simulated fleet.

Fashion-MNIST over 200 clients (Dirichlet 0.3). Every method has at most 52 clients at work at once and ends when it has begun the
same number of local trainings, with the same local settings. On the fleet with a slow tail the clients' times are log-normal around
a minute and a tenth of them takes ten times as long; on the even one nobody is slow.

    python -m simulations.benchmarks.asynchronous --seeds 0 1 2 --out simulations/images/asynchronous.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedcore.config import RunConfig, parse_config
from fedcore.coordinator.run import SimulatedRun

CLIENTS, AT_ONCE, WAITED_FOR, TRAININGS = 200, 52, 40, 4160
TARGETS = (0.75, 0.80)
LAST = 3  # evaluations that the final accuracy is the mean of
FEDERATION: dict[str, dict[str, Any]] = {
    "data": {"dataset": "fashion-mnist", "partition": "dirichlet", "alpha": 0.3, "clients": CLIENTS, "min_examples": 20},
    "model": {"name": "mlp", "params": {"hidden": [32]}},
    "quantization": {"enabled": False},
    "training": {"epochs": 1, "batch_size": 20, "lr": 0.05},
    "engine": {"device": "cpu", "workers": 1},
}
FLEETS: dict[str, dict[str, float]] = {
    "slow tail": {"median_seconds": 60.0, "spread": 0.5, "jitter": 0.1, "slow_share": 0.1, "slow_factor": 10.0},
    "even": {"median_seconds": 60.0, "spread": 0.1, "jitter": 0.1},
}
METHODS: dict[str, dict[str, Any]] = {
    "synchronous, all 52": {"size": AT_ONCE},
    "synchronous, first 40 of 52": {"size": WAITED_FOR, "over_selection": AT_ONCE / WAITED_FOR},
    "FedBuff, buffer 10": {"buffer": 10},
    "FedBuff, buffer 40": {"buffer": 40},
}
"""A synchronous cohort's size and over-selection, or a buffer."""


def scenario(fleet: str, method: str, seed: int, trainings: int = TRAININGS) -> RunConfig:
    """The scenario of a curve; it is evaluated about 60 times."""
    given = METHODS[method]
    buffer = given.get("buffer", 0)
    # What still goes on in the end was begun too: those trainings count for a method as much as any other.
    rounds = max(1, (trainings - AT_ONCE) // buffer if buffer else trainings // AT_ONCE)
    tables = {"run": {"name": "asynchronous", "rounds": rounds, "seed": seed}, **FEDERATION, "fleet": dict(FLEETS[fleet])}
    tables["evaluation"] = {"every": max(1, rounds // 60)}
    if buffer:
        tables["asynchronous"] = {"buffer": buffer, "concurrency": AT_ONCE}
    else:
        tables["cohort"] = {"size": given["size"]}
        tables["fleet"]["over_selection"] = given.get("over_selection", 1.0)
    return parse_config(tables, "asynchronous", Path())


def measure(fleet: str, method: str, seed: int, trainings: int = TRAININGS) -> dict[str, Any]:
    """Run a curve: accuracy by virtual hours, hours to the targets (null where not reached), and what became of the work."""
    config = scenario(fleet, method, seed, trainings)
    with tempfile.TemporaryDirectory() as folder, SimulatedRun(config, Path(folder), resume=False) as run:
        history = list(run.rounds())
        pending = run.coordinator.progress.pending
    curve = [(entry["virtual_seconds"] / 3600, entry["accuracy"]) for entry in history if "accuracy" in entry]
    reached = {f"{target:g}": next((hours for hours, value in curve if value >= target), None) for target in TARGETS}
    ages = [entry["staleness_mean"] for entry in history if "staleness_mean" in entry]
    return {
        "fleet": fleet, "method": method, "seed": seed, "hours": curve[-1][0], "hours_to": reached,
        "accuracy": statistics.mean(value for _, value in curve[-LAST:]),
        "used": sum(entry["replies"] for entry in history),
        "wasted": sum(entry.get("discarded", 0) for entry in history) + (len(pending.facts["going"]) if pending else 0),
        "steps": len(history), "staleness": statistics.mean(ages) if ages else 0.0, "curve": curve,
    }  # fmt: skip


def curves(seeds: Sequence[int], trainings: int = TRAININGS) -> Iterator[dict[str, Any]]:
    """Every curve of every seed."""
    for fleet in FLEETS:
        for method in METHODS:
            for seed in seeds:
                yield measure(fleet, method, seed, trainings)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with lowest and highest in brackets where it matters."""
    heads = [f"hours to {100 * target:g} %" for target in TARGETS]
    lines = [
        f"| fleet | method | {' | '.join(heads)} | hours in all | final accuracy, % | steps | used | wasted | mean age |",
        "|---" * (8 + len(TARGETS)) + "|",
    ]
    for fleet, method in dict.fromkeys((one["fleet"], one["method"]) for one in found):
        some = [one for one in found if (one["fleet"], one["method"]) == (fleet, method)]
        cells = [_range([one["hours_to"][f"{target:g}"] for one in some], "{:.2f}") for target in TARGETS]
        cells += [_range([one["hours"] for one in some], "{:.1f}"), _range([100 * one["accuracy"] for one in some], "{:.1f}")]
        cells += [f"{statistics.mean(one[key] for one in some):,.0f}" for key in ("steps", "used", "wasted")]
        lines.append(f"| {fleet} | {method} | {' | '.join(cells)} | {statistics.mean(one['staleness'] for one in some):.1f} |")
    return "\n".join(lines)


def _range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    text = f"{form.format(statistics.mean(known))} ({form.format(min(known))} to {form.format(max(known))})"
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} seeds"


def draw(found: Sequence[dict[str, Any]], out: Path) -> None:
    """Accuracy over virtual hours for each fleet: means over seeds by evaluation, bands from the lowest to the highest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(FLEETS), figsize=(11, 4.6), dpi=120, layout="constrained", sharey=True)
    for axes, fleet in zip(panels, FLEETS, strict=True):
        longest = 0.0
        for method in METHODS:
            some = [one["curve"] for one in found if (one["fleet"], one["method"]) == (fleet, method)]
            points = list(zip(*some, strict=True))
            hours = [statistics.mean(one for one, _ in point) for point in points]
            values = [[100 * value for _, value in point] for point in points]
            (line,) = axes.plot(hours, [statistics.mean(some) for some in values], label=method, lw=1.4)
            axes.fill_between(hours, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15, lw=0)
            longest = max(longest, hours[-1] if method != "synchronous, all 52" else 0.0)
        axes.set_xlim(0, 1.05 * longest)
        axes.set_xlabel("virtual hours")
        axes.set_title(f"fleet: {fleet}", loc="left")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(40, None)
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Parse, run, draw, print."""
    parser = argparse.ArgumentParser(description="Synchronous rounds against buffered asynchronous ones on a virtual clock.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainings", type=int, default=TRAININGS, help="local trainings that each method begins")
    parser.add_argument("--out", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print one JSON object a curve")
    given = parser.parse_args()
    found = []
    for one in curves(given.seeds, given.trainings):
        found.append(one)
        if given.json:
            print(json.dumps(one), flush=True)
    if not given.json:
        print(table(found))
    if given.out:
        draw(found, given.out)


if __name__ == "__main__":
    main()
