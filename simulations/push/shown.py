"""What `simulations.push` shows at its end: tables, and a picture of versions over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["draw", "tables"]

_NONE, _BAD, _FINE = "lightgrey", "tab:red", ("tab:blue", "tab:green", "mediumseagreen", "lightgreen")


def tables(told: dict[str, Any]) -> list[Table]:
    """What came of the bad releases on device processes, and of the rollouts over simulated devices."""
    over = Table("release", "canary", "ran it", "aborted after", "by", "all back after", box=None, padding=(0, 2))
    for one in told["bad"]:
        cells = (f"{one['version']}, {one['name']}", str(len(one["canary"])), str(len(one["ran"])), f"{one['seconds']:.0f} s")
        over.add_row(*cells, ", ".join(one["aborted_by"]), f"{one['over'] - one['began']:.0f} s")
    simulated = Table("a release that", "ends", "after", "exposed", "by", box=None, padding=(0, 2))
    for name, one in told["rehearsals"].items():
        exposed = f"{one['exposed']} of {told['fleet']}"
        simulated.add_row(name, one["phase"], f"{one['hours']} h", exposed, ", ".join(one["by"]))
    return [over, simulated]


def draw(told: dict[str, Any], path: Path) -> None:
    """Versions on the devices over time, and the simulated rollouts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), layout="constrained")
    times = [at for at, _ in told["timeline"]]
    versions = sorted({version for _, held in told["timeline"] for version in held})
    counts = [[held.get(version, 0) for _, held in told["timeline"]] for version in versions]
    bad, fine = {one["version"] for one in told["bad"]}, iter(_FINE)
    colors = [_NONE if not version else _BAD if version in bad else next(fine, _FINE[-1]) for version in versions]
    above.stackplot(times, counts, labels=[f"release {version}" if version else "none" for version in versions], colors=colors)
    for one in told["bad"]:
        above.axvline(one["began"], color="black", lw=0.8, ls=":")
        above.text(one["began"], told["devices"] * 1.01, f"release {one['version']}: {one['name']}", fontsize=8)
    above.yaxis.get_major_locator().set_params(integer=True)
    above.set(xlabel="seconds", ylabel="devices", ylim=(0, told["devices"]), xlim=(min(times), max(times)))
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for name, one in told["rehearsals"].items():
        hours, shown = [hour for hour, _, _ in one["curve"]], [count for _, count, _ in one["curve"]]
        label = f"{name}: {one['phase']}{' by ' + ', '.join(one['by']) if one['by'] else ''}"
        (line,) = below.plot(hours, shown, label=label)
        below.plot(hours[-1:], shown[-1:], marker="o", color=line.get_color(), zorder=3)  # the lines are one until they end
    below.set(xlabel="hours", ylabel=f"of {told['fleet']} devices exposed", ylim=(0, None))
    below.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
