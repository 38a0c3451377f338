"""Charts as HTML and inline SVG: shapes live in a stretched square of 1000 x 1000 units, labels are HTML beside it.

So a chart fills any window width while its text and line widths keep their size. Colours are slots of the page's palette
(``--c0`` to ``--c7``), which follows the reader's light or dark setting. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from markupsafe import Markup

__all__ = [
    "ABSENT", "POINTS", "Axis", "Band", "Mark", "Series", "Text", "axis", "data_size", "duration", "heat_map", "histogram",
    "line_chart", "percent", "round_axis", "short", "stack_chart", "thin",
]  # fmt: skip

SIDE = 1000.0
Text = Callable[[float], str]
"""Writes a number with its unit."""
ABSENT = "\N{EN DASH}"
"""Stands for a number or key that is not there."""
POINTS = 240
"""More points than this are averaged in equal groups: more could not be told apart, and pages stay small."""
_DOTTED = 40
_SHADES = 8


@dataclass(frozen=True)
class Axis:
    """``text`` writes a value of this axis with its unit; ``log`` places values by their logarithm."""

    low: float
    high: float
    ticks: tuple[float, ...]
    title: str
    text: Text
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies between the ends, 0..1."""
        low, high, value = (math.log(end) if self.log else end for end in (self.low, self.high, value))
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """A line through ``points``, or ``dots`` alone; ``note`` (its final value) stands beside the label in the legend."""

    label: str
    color: int
    points: Sequence[tuple[float, float]]
    note: str = ""
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A filled range of (x, low, high); no label keeps it out of the legend."""

    label: str
    color: int
    points: Sequence[tuple[float, float, float]]
    opacity: float


@dataclass(frozen=True)
class Mark:
    """A vertical line, labelled at its foot, or at its ``top`` where curves fall."""

    x: float
    label: str
    top: bool = False


def axis(
    values: Iterable[float], title: str, text: Text, *,
    zero: bool = False, top: float = math.inf, whole: bool = False, log: bool = False,
) -> Axis:  # fmt: skip
    """An axis around ``values`` with ends on round numbers: from ``zero``, not above ``top``, with ``whole`` ticks."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known + [0.0] * zero), max(known)
    if log:
        return _log_axis(low, high, title, text)
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-12:  # one value: room around it, not below zero for its sake
        room = 0.1 * max(abs(high), 1.0 if abs(high) < 1e-12 else 0.0)
        low, high = (max(0.0, low - room) if low >= 0 else low - room), max(high, min(top, high + room))
    step = max(1.0, _step((high - low) / 6, (1, 2, 5, 10))) if whole else _step((high - low) / 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1) if index * step <= top + 1e-9)
    return Axis(ticks[0], max(ticks[-1], high), ticks, title, text)


def round_axis(first: int, last: int) -> Axis:
    """Rounds, with half a round of room at both ends so that bars and lines of one round stand at the same place."""
    inner = axis([first, last], "round", short, whole=True).ticks
    step = inner[1] - inner[0]
    ticks = (first, *(tick for tick in inner if first + step / 2 <= tick <= last))
    return Axis(first - 0.5, last + 0.5, ticks, "round", short)


def line_chart(
    x: Axis, y: Axis, series: Sequence[Series], bands: Sequence[Band] = (), marks: Sequence[Mark] = (), *, tips: bool = True
) -> Markup:
    """Lines, dots and ranges; with ``tips`` hovering shows the values at the nearest x."""
    shapes = [
        _tag("path", d=_band_path(x, y, band), class_="band", style=f"--c:var(--c{band.color});--o:{band.opacity}")
        for band in bands
    ]
    for one in series:
        drawn = [(x.at(px) * SIDE, (1 - y.at(py)) * SIDE) for px, py in one.points]
        color = f"--c:var(--c{one.color})"
        if not one.dots:
            path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in drawn)
            shapes.append(_tag("path", d=path if drawn else "", class_="line dashed" if one.dashed else "line", style=color))
        if one.dots or len(drawn) <= _DOTTED:
            dots = "".join(f"M{px:.1f} {py:.1f}h.01" for px, py in drawn)
            shapes.append(_tag("path", d=dots, class_="scatter" if one.dots else "dots", style=color))
    shapes += _tips(x, y, series) if tips else []
    keys = [_key("dash" if one.dashed else "line", one.color, one.label, one.note) for one in series if not one.dots]
    keys += [_key("area", band.color, band.label, "", band.opacity) for band in bands if band.label]
    return _frame(x, y, shapes, keys, marks)


def stack_chart(
    x: Axis, y: Axis, rows: Sequence[tuple[float, ...]], labels: Sequence[str], colors: Sequence[int], *, width: float = 1.0
) -> Markup:
    """Stacked bars: ``rows`` are (x, part, part, ...) by ascending x, ``width`` is a bar's width in units of x."""
    paths = [""] * len(labels)
    hits = []
    end = 0.0
    for place, *parts in rows:
        start, end = max(end, x.at(place - width / 2) * SIDE), min(x.at(place + width / 2), 1.0) * SIDE
        gap = (end - start) * 0.06 if len(rows) <= _DOTTED * 2 else 0.0
        tops = [(1 - y.at(total)) * SIDE for total in accumulate(parts, initial=0.0)]
        for index, (bottom, top) in enumerate(pairwise(tops)):
            paths[index] += _box(start + gap, top, end - gap, bottom) if top < bottom else ""
        lines = [f"{label}: {y.text(part)}" for label, part in zip(labels, parts, strict=True)]
        hits.append(_hit(start, end, [f"{x.title} {x.text(place)}", *lines]))
    shapes = [_tag("path", d=path, class_="bar", style=f"--c:var(--c{color})") for path, color in zip(paths, colors, strict=True)]
    keys = [_key("bar", color, label) for label, color in zip(labels, colors, strict=True)]
    return _frame(x, y, [*shapes, *hits], keys if len(keys) > 1 else [])


def histogram(values: Sequence[float], title: str, text: Text, color: int, *, share: bool) -> Markup:
    """How many clients have a value; values are shares (at most 1) or whole numbers, whose bars stand around them."""
    x = axis(values, title, text, top=1.0 if share else math.inf, whole=not share)
    low, high = (x.low, x.high) if share else (x.low - 0.5, x.high + 0.5)
    width = (high - low) / 20 if share else float(math.ceil((high - low) / 20))
    bins = math.ceil((high - low) / width - 1e-9)
    filled = Counter(min(bins - 1, int((value - low) / width + 1e-9)) for value in values)
    rows = [(low + (index + 0.5) * width, float(filled[index])) for index in range(bins)]
    y = axis([count for _, count in rows], "clients", short, zero=True, whole=True)
    return stack_chart(Axis(low, low + bins * width, x.ticks, title, text), y, rows, ["clients"], [color], width=width)


def heat_map(columns: Sequence[Sequence[float]], rows: Sequence[str], tips: Sequence[str], title: str, color: int = 0) -> Markup:
    """Cells of shares (0..1): a column per item of ``columns``, a row per name of ``rows`` from the top down."""
    paths = [""] * (_SHADES + 1)
    wide, high = SIDE / len(columns), SIDE / len(rows)
    gap = 0.06 if len(columns) <= 60 else 0.0
    for column, shares in enumerate(columns):
        for row, share in enumerate(shares):
            if share > 0:
                ends = (column + gap) * wide, (row + 0.04) * high, (column + 1 - gap) * wide, (row + 0.96) * high
                paths[math.ceil(share * _SHADES)] += _box(*ends)
    style = f"--c:var(--c{color});fill-opacity:"
    shapes = [
        _tag("path", d=path, class_="bar", style=f"{style}{0.06 + 0.94 * shade / _SHADES:.2f}")
        for shade, path in enumerate(paths)
        if path
    ]
    shapes += [_hit(column * wide, (column + 1) * wide, [tip]) for column, tip in enumerate(tips)]
    every = math.ceil(len(rows) / 20)
    centers = tuple(len(rows) - row - 0.5 for row in range(0, len(rows), every))
    y = Axis(0, len(rows), centers, "", lambda center: rows[round(len(rows) - center - 0.5)])
    return _frame(
        Axis(0, 1, (), title, str), y, shapes, [_key("ramp", color, "share of a client's examples, 0 to 100%")], grid=False
    )


def thin(rows: Sequence[tuple[float, ...]], limit: int = POINTS) -> list[tuple[float, ...]]:
    """At most ``limit`` rows: the means of equal groups of neighbours; the rows themselves where they are few enough."""
    size = math.ceil(len(rows) / limit) or 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def short(value: float) -> str:
    """Three significant digits, no exponent, no trailing zeros."""
    if not value:
        return "0"
    text = f"{value:,.{min(12, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """A share as a percentage to a hundredth of a point, the finest step of 10 000 test examples."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def data_size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{short(count)} {unit}"
        count /= 1000
    return f"{short(count)} TB"


def duration(seconds: float) -> str:
    """A time span in the unit a person would use."""
    if seconds and abs(seconds) < 0.9995:
        return f"{short(seconds * 1000)} ms"
    if abs(seconds) < 119.5:
        return f"{short(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def _tag(name: str, *children: Markup | str, **attributes: Any) -> Markup:
    """An element with escaped text and attribute values; ``class_`` writes class, ``aria_label`` writes aria-label."""
    pairs = ((Markup(key.rstrip("_").replace("_", "-")), value) for key, value in attributes.items())  # noqa: S704 - our own names
    written = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(children))  # noqa: S704 - our own tag, escaped children


def _frame(
    x: Axis, y: Axis, shapes: Sequence[Markup], keys: Sequence[Markup], marks: Sequence[Mark] = (), *, grid: bool = True
) -> Markup:
    lines = "".join(f"M0 {(1 - y.at(tick)) * SIDE:.1f}h{SIDE:.0f}" for tick in y.ticks) if grid else ""
    dashes = "".join(f"M{x.at(mark.x) * SIDE:.1f} 0v{SIDE:.0f}" for mark in marks)
    content = [_tag("path", d=lines, class_="grid"), _tag("path", d=dashes, class_="mark"), *shapes]
    box = f"0 0 {SIDE:.0f} {SIDE:.0f}"
    label = f"{y.title or 'shares'} by {x.title}"
    drawing = _tag("svg", *content, viewBox=box, preserveAspectRatio="none", role="img", aria_label=label)
    left = [_tag("span", y.text(tick), style=f"top:{(1 - y.at(tick)) * 100:.2f}%", title=y.text(tick)) for tick in y.ticks]
    ghost = _tag("i", max((y.text(tick) for tick in y.ticks), key=len, default=""))
    below = [_tag("span", x.text(tick), style=f"left:{x.at(tick) * 100:.2f}%") for tick in x.ticks]
    notes = [
        _tag("span", mark.label, class_=_note_place(mark, x.at(mark.x)), style=f"--x:{x.at(mark.x) * 100:.2f}%") for mark in marks
    ]
    body = [
        _tag("div", y.title, class_="ytitle") if y.title else Markup(""),
        _tag("div", ghost, *left, class_="yticks"),
        _tag("div", drawing, *notes, class_="area"),
        _tag("div", *below, class_="xticks"),
        _tag("div", x.title, class_="xtitle"),
    ]
    legend = _tag("div", *keys, class_="legend") if keys else Markup("")
    return _tag("div", legend, _tag("div", *body, class_="plot"), class_="chart")


def _note_place(mark: Mark, share: float) -> str:
    return "note" + (" left" if share > 0.5 else "") + (" top" if mark.top else "")


def _key(kind: str, color: int, label: str, note: str = "", opacity: float = 1.0) -> Markup:
    value = _tag("b", note) if note else ""
    return _tag("span", _tag("i", class_=kind, style=f"--c:var(--c{color});--o:{opacity}"), label, value)


def _hit(left: float, right: float, lines: Sequence[str]) -> Markup:
    text = _tag("title", "\n".join(lines))
    return _tag("rect", text, class_="hit", x=f"{left:.1f}", y="0", width=f"{right - left:.1f}", height=f"{SIDE:.0f}")


def _tips(x: Axis, y: Axis, series: Sequence[Series]) -> list[Markup]:
    lines: dict[float, list[str]] = {}
    for one in series:
        for px, py in one.points:
            lines.setdefault(px, []).append(f"{one.label}: {y.text(py)}")
    places = sorted(lines)
    middles = [x.low, *((left + right) / 2 for left, right in pairwise(places)), x.high]
    zones = zip(places, pairwise(middles), strict=False)
    return [
        _hit(x.at(left) * SIDE, x.at(right) * SIDE, [f"{x.title} {x.text(place)}", *lines[place]]) for place, (left, right) in zones
    ]


def _band_path(x: Axis, y: Axis, band: Band) -> str:
    points = band.points
    if len(points) == 1:
        points = [(points[0][0] + side * (x.high - x.low) / 40, *points[0][1:]) for side in (-1, 1)]
    upper = [f"{x.at(px) * SIDE:.1f} {(1 - y.at(high)) * SIDE:.1f}" for px, _, high in points]
    lower = [f"{x.at(px) * SIDE:.1f} {(1 - y.at(low)) * SIDE:.1f}" for px, low, _ in reversed(points)]
    return f"M{'L'.join([*upper, *lower])}z" if points else ""


def _box(left: float, top: float, right: float, bottom: float) -> str:
    return f"M{left:.1f} {bottom:.1f}V{top:.1f}H{right:.1f}V{bottom:.1f}z"


def _step(raw: float, factors: tuple[float, ...] = (1, 2, 2.5, 5, 10)) -> float:
    """The smallest of ``factors`` times a power of ten that is not below ``raw``."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in factors if power * factor >= raw * (1 - 1e-9))


def _log_axis(low: float, high: float, title: str, text: Text) -> Axis:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    first, last = max(step for step in steps if step <= low), min(step for step in steps if step >= high)
    inside = tuple(step for step in steps if first <= step <= last)
    ticks = inside if len(inside) <= 7 else tuple(10.0**power for power in decades if first <= 10.0**power <= last)
    return Axis(first, last if last > first else first * 10, ticks, title, text, log=True)
