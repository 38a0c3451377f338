"""The report of one run: a single HTML file that loads nothing and runs no script."""

from __future__ import annotations

import errno
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fedcore
from fedcore.config import LOSSES, PrivacyConfig, RunConfig, describe
from fedcore.errors import Refused, TryAgain
from fedcore.report import Run, number, read_run
from fedcore.report.cards import FP32, Card, Tile, line_of
from fedcore.report.charts import (
    ABSENT,
    POINTS,
    Axis,
    Band,
    Mark,
    Series,
    Text,
    axis,
    data_size,
    duration,
    heat_map,
    histogram,
    line_chart,
    percent,
    round_axis,
    short,
    stack_chart,
    thin,
)
from fedcore.report.fleet import fleet_cards, fleet_tiles
from fedcore.report.privacy import privacy_cards, privacy_tiles, statements
from fedcore.report.secure import secure_cards, secure_statements

__all__ = ["render", "write_report"]

_DROPPED_ROWS = 200
_HEAT_COLUMNS, _HEAT_ROWS = 120, 100
_DOTS = 1500
_FP32, _INT8, _CLIENTS, _TRAINING = FP32, 0, 2, 3
"""Palette slots: a kind of number keeps its colour through the whole page."""


def write_report(directory: Path) -> Path:
    """Write ``report.html`` into a run directory, finished or not, and return its path.

    Raises:
        Refused: not a run directory, a damaged one, or one that cannot be written.
        TryAgain: the disk is full.
    """
    run = read_run(directory)
    parts = {
        "Learning": _learning(run), "Privacy": [*privacy_cards(run), *secure_cards(run)],
        "Fleet": fleet_cards(run), "Clients": _clients(run), "Data": _data(run), "Cost": _cost(run),
    }  # fmt: skip
    path = directory / "report.html"
    render(
        "report.html.j2", path,
        run=run, subtitle=_subtitle(run), tiles=_tiles(run), statements=[*statements(run), *secure_statements(run)],
        withheld=_withheld(run),
        sections=[(heading, cards) for heading, cards in parts.items() if cards],
        grouped=math.ceil(len(run.rounds) / POINTS), dropped=_dropped(run), settings=_settings(run.config), version=_version(run),
    )  # fmt: skip
    return path


def render(template: str, path: Path, **values: Any) -> None:
    """Write a page of this folder's templates in one step: readers see the old file or the whole new one."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(percent=percent, data_size=data_size, duration=duration, short=short)
    text = environment.get_template(template).render(values)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(text.encode("utf-8", "replace"))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise (TryAgain if error.errno == errno.ENOSPC else Refused)(f"{path}: cannot be written: {error.strerror}") from error


def _version(run: Run) -> str:
    return str((run.result or {}).get("version", fedcore.__version__))


def _subtitle(run: Run) -> str:
    data, cohort = run.config.data, run.config.cohort
    clients = len(run.partition["label_counts"]) if run.partition else data.clients
    shape = {
        "dirichlet": f" ({short(data.alpha)})",
        "quantity": f" ({short(data.alpha)})",
        "labels": f" ({data.labels_per_client})",
    }
    parts = [f"{run.config.strategy.name} on {data.dataset}", f"model {run.config.model.name}"]
    parts += [] if run.config.training.loss == LOSSES[0] else [f"{run.config.training.loss} loss"]
    parts += [f"{clients:,} clients, {data.partition}{shape.get(data.partition, '')}"] if clients else [data.partition]
    one = run.config.asynchronous
    trained = f"cohort of {cohort.size:,}" if cohort.size else "all clients each round"
    trained = f"asynchronous, a step every {one.buffer:,} updates" if one.buffer else trained
    return " · ".join([*parts, trained, f"seed {run.config.run.seed}"])


def _tiles(run: Run) -> list[Tile]:
    result, planned = run.result or {}, run.config.run.rounds
    fp32, int8, test = run.accuracy, run.int8_accuracy, number(run.partition, "test")
    tiles = [Tile("fp32 accuracy", _or_dash(fp32, percent), "the coordinator's master", main=not run.config.quantization.enabled)]
    if run.config.quantization.enabled:
        kind, note = ("int8", "the shipped model") if run.finished else ("quantized", "simulated in float")
        tiles = [Tile(f"{kind} accuracy", _or_dash(int8, percent), note + _precision(int8, test), main=True), *tiles]
        if fp32 is not None and int8 is not None:
            points, images = _signed(f"{100 * (int8 - fp32):+.2f}") + " points", _signed(f"{round((int8 - fp32) * (test or 0)):+,}")
            note = f"of {test:,.0f} test examples ({points})" if test else ""
            tiles.append(Tile(f"{kind} minus fp32", images if test else points, note))
    dropped = f"{sum(len(record.get('dropped', [])) for record in run.rounds):,} clients dropped"
    notes = ([f"ended early: {planned:,} were planned"] if result.get("ended") else []) + ([] if _withheld(run) else [dropped])
    tiles.append(Tile("rounds", f"{run.done:,}" if run.finished else f"{run.done:,} of {planned:,}", "; ".join(notes)))
    for label, total in (("traffic up", run.bytes_up), ("traffic down", run.bytes_down)):
        each = f"{data_size(total / len(run.rounds))} a round" if total is not None and run.rounds else ""
        tiles.append(Tile(label, _or_dash(total, data_size), each))
    tiles.append(Tile("clients a second", _or_dash(run.clients_per_second, short)))
    seconds = run.seconds
    tiles.append(
        Tile("time", _or_dash(seconds, duration), f"{duration(seconds / run.done)} a round" if seconds and run.done else "")
    )
    if "engine" in result:
        told = "; ".join(str(result[key]) for key in ("engine_reason", "place") if key in result)
        tiles.append(Tile("engine", str(result["engine"]), told))
    return tiles + fleet_tiles(run) + _model_tile(result) + privacy_tiles(run)


def _model_tile(result: dict[str, Any]) -> list[Tile]:
    sizes = result.get("model_bytes")
    if not isinstance(sizes, dict) or not sizes:
        return []
    main = "int8" if "int8" in sizes else next(iter(sizes))
    others = [f"{name} {data_size(size)}" for name, size in sizes.items() if name != main]
    parameters = number(result, "parameters")
    others += [f"{parameters:,.0f} parameters"] if parameters else []
    return [Tile(f"{main} model", data_size(sizes[main]), ", ".join(others))]


def _precision(accuracy: float | None, test: float | None) -> str:
    """The standard error of an accuracy measured on ``test`` examples: what a difference must exceed to mean anything."""
    if accuracy is None or not test:
        return ""
    return f"; standard error {short(100 * math.sqrt(accuracy * (1 - accuracy) / test))} points"


def _signed(text: str) -> str:
    """A number with a real minus sign, and no sign for zero."""
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("+-0.") else text.strip("+-")


def _or_dash(value: float | None, text: Text) -> str:
    return ABSENT if value is None else text(value)


def _learning(run: Run) -> list[Card]:
    if not run.rounds:
        return []
    bands, median = _federated(run)
    accuracy = _curves(run, "accuracy", percent) + median
    x = round_axis(run.rounds[0]["round"], run.done)
    values = [y for one in accuracy for _, y in one.points] + [y for band in bands for _, *pair in band.points for y in pair]
    frozen = [Mark(record["round"], "activation ranges frozen") for record in run.rounds if record.get("quantized")][:1]
    falling = [replace(mark, top=True) for mark in frozen]
    y = axis(values, "accuracy", percent, top=1.0)
    note = "Test accuracy on the coordinator's test part." + (" Bands: how accuracy spreads over clients." if bands else "")
    cards = [Card("Accuracy", line_chart(x, y, accuracy, bands, frozen), note, 6)] if values else []
    loss = [line_of(run, ("train_loss",), "training, mean of clients", _TRAINING, short), *_curves(run, "loss", short)]
    loss += [line_of(run, ("federated", "loss"), "federated", _CLIENTS, short)]
    norm = [line_of(run, ("update_norm",), "aggregated update", _TRAINING, short)]
    told = {"cross_entropy": "", "squared": "The squared error to one-hot targets, mean over classes."}[run.config.training.loss]
    for title, lines, note in (("Loss", loss, told), ("Update norm", norm, "")):
        drawn = [one for one in lines if one.points]
        if drawn:
            y = axis([py for one in drawn for _, py in one.points], title.lower(), short, zero=True)
            cards.append(Card(title, line_chart(x, y, drawn, (), falling if title == "Loss" else ()), note))
    return cards


def _curves(run: Run, key: str, text: Text) -> list[Series]:
    lines = [
        line_of(run, (f"fake_quant_{key}",), "quantized, as clients receive it", _INT8, text),
        line_of(run, (key,), "fp32 master", _FP32, text),
    ]
    return [one for one in lines if one.points]


def _federated(run: Run) -> tuple[list[Band], list[Series]]:
    wide, narrow, median = [], [], []
    for record in run.rounds:
        spread = record.get("federated", {}).get("percentiles", {})
        p5, p25, p50, p75, p95 = (number(spread, name) for name in ("5", "25", "50", "75", "95"))
        if p5 is not None and p25 is not None and p50 is not None and p75 is not None and p95 is not None:
            place = float(record["round"])
            wide.append((place, p5, p95))
            narrow.append((place, p25, p75))
            median.append((place, p50))
    if not median:
        return [], []
    bands = [("clients, 5th to 95th percentile", wide, 0.12), ("25th to 75th", narrow, 0.2)]
    return (
        [Band(label, _CLIENTS, [(x, low, high) for x, low, high in thin(points)], opacity) for label, points, opacity in bands],
        [Series("median client", _CLIENTS, [(x, y) for x, y in thin(median)], percent(median[-1][1]))],
    )


def _clients(run: Run) -> list[Card]:
    """How unequal the last federated evaluation was."""
    clients = run.clients or {"accuracy": [], "examples": []}
    pairs = enumerate(zip(clients["accuracy"], clients["examples"], strict=True))
    known = [(count, value, client) for client, (value, count) in pairs if _is_number(value) and _is_number(count) and count > 0]
    if not known:
        return []
    when = f" after round {clients['round']}" if "round" in clients else ""
    lowest = sorted(known, key=lambda item: (item[1], item[2]))[:5]
    worst = ", ".join(f"client {client} ({percent(value)} of {count:,})" for count, value, client in lowest)
    shown = _sample(sorted(known), _DOTS)
    counts = [count for count, _, _ in known]
    x = axis(counts, "examples evaluated", short, whole=True, log=max(counts) > 20 * min(counts))
    y = axis([value for _, value, _ in known], "accuracy", percent, top=1.0)
    dots = Series("client", _CLIENTS, [(count, value) for count, value, _ in shown], dots=True)
    sampled = f" {len(shown):,} of {len(known):,} clients are drawn, evenly by size." if len(shown) < len(known) else ""
    return [
        Card(
            "Clients by accuracy",
            histogram([v for _, v, _ in known], "accuracy", percent, _CLIENTS, share=True),
            f"{len(known):,} clients{when}.",
        ),
        Card("Accuracy by client size", line_chart(x, y, [dots], tips=False), f"Lowest: {worst}.{sampled}"),
    ]


def _is_number(value: Any) -> bool:
    return number({"": value}, "") is not None


def _sample(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` items, evenly spaced, first and last included."""
    if len(items) <= limit:
        return items
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def _data(run: Run) -> list[Card]:
    if not run.partition or not run.partition["labels"] or not run.partition["label_counts"]:
        return []
    counts, labels = run.partition["label_counts"], [str(label) for label in run.partition["labels"]]
    totals = [sum(row) for row in counts]
    order = sorted(range(len(counts)), key=lambda client: _dominance(counts[client]))
    shown = _sample(order, _HEAT_COLUMNS)
    size = math.ceil(len(labels) / _HEAT_ROWS)
    names = [labels[start] for start in range(0, len(labels), size)]
    columns = [[sum(counts[c][start : start + size]) / max(1, totals[c]) for start in range(0, len(labels), size)] for c in shown]
    tips = [f"client {client}: {totals[client]:,} examples\n{_labels_of(counts[client], labels)}" for client in shown]
    drawn = (
        f"{len(shown):,} of {len(counts):,} clients, evenly sampled" if len(shown) < len(counts) else f"All {len(counts):,} clients"
    )
    note = f"{drawn}; a column is a client, a row {'a label' if size == 1 else f'{size} neighbouring labels'}."
    middle = sorted(totals)[len(totals) // 2]
    sizes = f"{sum(totals):,} examples; {min(totals):,} to {max(totals):,} a client, median {middle:,}."
    held = [f"{value:,.0f} for {key}" for key in ("test", "calibration") if (value := number(run.partition, key))]
    kept = f" The coordinator keeps {' and '.join(held)}." if held else ""
    heat = heat_map(columns, names, tips, "clients, by most frequent label", _INT8)
    return [
        Card("Labels on the clients", heat, note, 4),
        Card("Examples on the clients", histogram(totals, "examples", short, _CLIENTS, share=False), sizes + kept, 2),
    ]


def _dominance(row: Sequence[int]) -> tuple[int, float]:
    """Sort key that puts clients with the same most frequent label together, the most one-sided first."""
    most = max(row)
    return row.index(most), -most / max(1, sum(row))


def _labels_of(row: Sequence[int], labels: Sequence[str]) -> str:
    held = sorted(((count, label) for count, label in zip(row, labels, strict=True) if count), reverse=True)
    return ", ".join(f"{label}: {count:,}" for count, label in held[:12]) + (", ..." if len(held) > 12 else "")


def _cost(run: Run) -> list[Card]:
    traffic = _stack(run, ("bytes_up", "bytes_down"))
    cards = []
    if traffic:
        up, down = (_running_sum(traffic, part) for part in (1, 2))
        lines = [Series("up", _INT8, up, data_size(up[-1][1])), Series("down", _FP32, down, data_size(down[-1][1]))]
        x = round_axis(run.rounds[0]["round"], run.done)
        y = axis([count for line in (up, down) for _, count in line], "total traffic", data_size, zero=True)
        cards = [
            Card("Traffic per round", _bars(run, traffic, ["up", "down"], [_INT8, _FP32], "traffic", data_size), "", 2),
            Card("Traffic so far", line_chart(x, y, lines), "", 2),
        ]
    times = _stack(run, ("train", "evaluate"), "timing")
    if times:
        chart = _bars(run, times, ["train", "evaluate"], [_TRAINING, _CLIENTS], "time", duration)
        cards.append(Card("Time per round", chart, "", 2))
    return cards


def _stack(run: Run, keys: Sequence[str], table: str = "") -> list[tuple[float, ...]]:
    """(round, number, number, ...) of every round; empty where no round has any of the numbers."""
    records = [(float(record["round"]), record.get(table, {}) if table else record) for record in run.rounds]
    known = any(number(record, key) is not None for _, record in records for key in keys)
    return [(place, *(number(record, key) or 0.0 for key in keys)) for place, record in records] if known else []


def _running_sum(rows: Sequence[tuple[float, ...]], part: int) -> list[tuple[float, float]]:
    totals = list(accumulate(row[part] for row in rows))
    return [(x, y) for x, y in thin([(row[0], total) for row, total in zip(rows, totals, strict=True)])]


def _bars(run: Run, rows: Sequence[tuple[float, ...]], labels: list[str], colors: list[int], title: str, text: Text) -> Markup:
    x: Axis = round_axis(run.rounds[0]["round"], run.done)
    grouped = thin(rows)
    y = axis([sum(parts) for _, *parts in grouped], title, text, zero=True)
    return stack_chart(x, y, grouped, labels, colors, width=(x.high - x.low) / len(grouped))


def _withheld(run: Run) -> bool:
    """Whether the page must not tell who took part."""
    return run.config.unit_privacy("client") is not None or run.config.secagg.enabled


def _dropped(run: Run) -> dict[str, Any]:
    rows = [
        (record["round"], item.get("client"), str(item.get("reason", "")))
        for record in run.rounds
        for item in record.get("dropped", [])
    ]
    reasons = Counter(reason for _, _, reason in rows).most_common(20)
    return {"rows": rows[:_DROPPED_ROWS], "total": len(rows), "reasons": reasons, "clients": len({client for _, client, _ in rows})}


def _settings(config: RunConfig) -> dict[str, list[tuple[str, str, str, bool]]]:
    """Rows of (key, value, meaning, changed from its default) by section."""
    meanings = {(section, key): meaning for section, key, _, _, meaning in describe()}
    usual = RunConfig().settings() | dict.fromkeys(("privacy.example", "privacy.client"), asdict(PrivacyConfig()))
    return {
        section: [
            (key, _value(value), meanings[section.split(".")[0], key], value != usual[section][key]) for key, value in table.items()
        ]
        for section, table in config.settings().items()
    }


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) or ABSENT
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) or ABSENT
