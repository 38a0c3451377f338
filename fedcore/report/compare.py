"""Several runs side by side: their numbers, their curves, and the settings in which they differ."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import fedcore
from fedcore.errors import Refused
from fedcore.report import Run, number, read_run
from fedcore.report.cards import Card
from fedcore.report.charts import ABSENT, Axis, Band, Series, axis, data_size, line_chart, percent, round_axis, thin
from fedcore.report.page import render

__all__ = ["Comparison", "Difference", "Row", "SeedSummary", "Spread", "compare_runs", "write_comparison"]

_COLORS = 8
_TIPS = 12  # more lines than this make a tooltip that nobody reads


@dataclass(frozen=True)
class Row:
    """One run. ``label`` is its name, made unique within the comparison; ``curve`` holds (round, bytes up and down so far,
    accuracy of the fp32 master) of each round that was evaluated."""

    label: str
    name: str
    directory: Path
    finished: bool
    strategy: str
    seed: int
    rounds: int
    accuracy: float | None
    int8_accuracy: float | None
    bytes_up: float | None
    bytes_down: float | None
    clients_per_second: float | None
    seconds: float | None
    curve: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Difference:
    """A configuration key whose value is not the same in all runs; ``values`` follow the rows."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a number over ``runs`` runs."""

    mean: float
    std: float
    runs: int


@dataclass(frozen=True)
class SeedSummary:
    """Finished runs that differ in nothing but the seed; ``members`` are indices of rows."""

    label: str
    members: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracy: Spread | None
    int8_accuracy: Spread | None
    clients_per_second: Spread | None
    seconds: Spread | None


@dataclass(frozen=True)
class Comparison:
    """``groups`` partitions the rows by equal settings apart from the seed (indices of rows, in order of first appearance)."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    groups: tuple[tuple[int, ...], ...]
    seeds: tuple[SeedSummary, ...]


def compare_runs(directories: Sequence[Path]) -> Comparison:
    """Read run directories and put them side by side, in the order given.

    Raises:
        Refused: fewer than two runs, or one that `read_run` refuses.
    """
    if len(directories) < 2:
        raise Refused("a comparison needs at least two run directories")
    runs = [read_run(directory) for directory in directories]
    rows = tuple(_row(run, label) for run, label in zip(runs, _labels(runs), strict=True))
    settings = [dict(_flat(run.config.settings())) for run in runs]
    keys = dict.fromkeys(key for table in settings for key in table if key != "run.name")
    values = {key: tuple(table.get(key, ABSENT) for table in settings) for key in keys}
    differences = tuple(Difference(key, found) for key, found in values.items() if len(set(found)) > 1)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(rows)):
        apart = tuple(difference.values[index] for difference in differences if difference.key != "run.seed")
        groups.setdefault(apart, []).append(index)
    members = tuple(tuple(group) for group in groups.values())
    summaries = (_seed_summary(rows, differences, group) for group in members)
    return Comparison(rows, differences, members, tuple(summary for summary in summaries if summary))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the comparison as one HTML file that loads nothing.

    Raises:
        Refused: the file cannot be written.
        TryAgain: the disk is full.
    """
    values = {"charts": _charts(comparison), "version": fedcore.__version__, "spread": _spread_text}
    render("compare.html.j2", path, comparison=comparison, **values)


def _row(run: Run, label: str) -> Row:
    spent, curve = 0.0, []
    for record in run.rounds:
        spent += (number(record, "bytes_up") or 0.0) + (number(record, "bytes_down") or 0.0)
        accuracy = number(record, "accuracy")
        curve += [(int(record["round"]), spent, accuracy)] if accuracy is not None else []
    return Row(
        label=label, name=run.config.run.name, directory=run.directory, finished=run.finished, strategy=run.config.strategy.name,
        seed=run.config.run.seed, rounds=run.done, accuracy=run.accuracy, int8_accuracy=run.int8_accuracy,
        bytes_up=run.bytes_up, bytes_down=run.bytes_down, clients_per_second=run.clients_per_second,
        seconds=run.seconds, curve=tuple(curve),
    )  # fmt: skip


def _labels(runs: Sequence[Run]) -> list[str]:
    names = [run.config.run.name for run in runs]
    longer = [name if names.count(name) == 1 else f"{name} ({run.directory.name})" for name, run in zip(names, runs, strict=True)]
    return [name if longer.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(longer, 1)]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _seed_summary(rows: Sequence[Row], differences: Sequence[Difference], group: Sequence[int]) -> SeedSummary | None:
    """None for fewer than two finished runs of different seeds: an unfinished run's accuracy is not one of the same quantity, and
    a seed counts once."""
    members = tuple({rows[index].seed: index for index in reversed(group) if rows[index].finished}.values())[::-1]
    if len(members) < 2:
        return None
    chosen = [rows[index] for index in members]
    return SeedSummary(
        label=_group_label(rows, differences, members), members=members, seeds=tuple(row.seed for row in chosen),
        accuracy=_spread([row.accuracy for row in chosen]), int8_accuracy=_spread([row.int8_accuracy for row in chosen]),
        clients_per_second=_spread([row.clients_per_second for row in chosen]), seconds=_spread([row.seconds for row in chosen]),
    )  # fmt: skip


def _group_label(rows: Sequence[Row], differences: Sequence[Difference], members: Sequence[int]) -> str:
    """The settings in which a group of runs differs from the others; the strategy where there are no others."""
    first = members[0]
    apart = [(one.key, one.values[first]) for one in differences if one.key != "run.seed" and one.values[first] != ABSENT]
    apart.sort(key=lambda pair: pair[0] != "strategy.name")
    return ", ".join(value if key == "strategy.name" else f"{key} {value}" for key, value in apart) or rows[first].strategy


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(statistics.fmean(known), statistics.stdev(known), len(known)) if len(known) > 1 else None


def _spread_text(spread: Spread | None, share: bool = False) -> str:
    if spread is None:
        return ABSENT
    return f"{100 * spread.mean:.2f}% ± {100 * spread.std:.2f}" if share else f"{spread.mean:,.1f} ± {spread.std:,.1f}"


def _charts(comparison: Comparison) -> list[Card]:
    """Accuracy over rounds, over the later rounds enlarged, and over traffic; one line a group of seeds."""
    curve = [point for row in comparison.rows for point in row.curve]
    if not curve:
        return []
    first, last = min(index for index, _, _ in curve), max(index for index, _, _ in curve)
    middle = (first + last) // 2
    seeds = any(len(group) > 1 for group in comparison.groups)
    note = "A line is the mean of runs that differ only in seed, its band their lowest to highest, over the rounds they all have."
    traffic = axis([spent for _, spent, _ in curve], "traffic up and down", data_size, zero=True)
    return [
        Card("Accuracy over rounds", _overlay(comparison, round_axis(first, last), first), note if seeds else "", 6),
        Card("The later half", _overlay(comparison, round_axis(middle, last), middle), "", 3),
        Card("Accuracy over traffic", _overlay(comparison, traffic, first, by_traffic=True), "", 3),
    ]


def _overlay(comparison: Comparison, x: Axis, since: int, *, by_traffic: bool = False) -> Markup:
    lines, bands = [], []
    for index, group in enumerate(comparison.groups):
        points = thin(_mean_curve([comparison.rows[member] for member in group], since, by_traffic))
        label = comparison.rows[group[0]].label
        if len(group) > 1:
            label = f"{_group_label(comparison.rows, comparison.differences, group)} ({len(group)} seeds)"
            bands.append(Band("", index % _COLORS, [(place, low, high) for place, _, low, high in points], 0.16))
        curve = [(place, mean) for place, mean, _, _ in points]
        final = percent(curve[-1][1]) if curve else ABSENT
        lines.append(Series(label, index % _COLORS, curve, final, dashed=index // _COLORS % 2 == 1))
    ends = [value for line in lines for _, value in line.points] + [
        end for band in bands for _, *pair in band.points for end in pair
    ]
    return line_chart(x, axis(ends, "accuracy", percent, top=1.0), lines, bands, tips=not by_traffic and len(lines) <= _TIPS)


def _mean_curve(rows: Sequence[Row], since: int, by_traffic: bool) -> list[tuple[float, float, float, float]]:
    """(place, mean, lowest, highest) of every round from ``since`` on that all these runs have evaluated."""
    curves = [
        {index: (spent if by_traffic else float(index), accuracy) for index, spent, accuracy in row.curve if index >= since}
        for row in rows
    ]
    found = []
    for index in sorted(set.intersection(*(set(curve) for curve in curves))):
        places, values = zip(*(curve[index] for curve in curves), strict=True)
        found.append((statistics.fmean(places), statistics.fmean(values), min(values), max(values)))
    return found
