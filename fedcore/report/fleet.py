"""What a page shows of a fleet's speeds: how old updates were, and what a virtual clock says."""

from __future__ import annotations

from fedcore.report import Run, number
from fedcore.report.cards import FP32, Card, Tile, line_of
from fedcore.report.charts import Series, axis, duration, line_chart, percent, round_axis, short, thin

__all__ = ["fleet_cards", "fleet_tiles"]

_MEAN, _MOST, _QUANTIZED = 2, 3, 0
"""Palette slots."""


def fleet_tiles(run: Run) -> list[Tile]:
    """Virtual time and discarded work, of a run that has them."""
    last = run.rounds[-1] if run.rounds else {}
    seconds, tiles = number(last, "virtual_seconds"), list[Tile]()
    if seconds is not None:
        tiles.append(Tile("virtual time", duration(seconds), f"{duration(seconds / run.done)} a round" if run.done else ""))
    thrown = [value for record in run.rounds if (value := number(record, "discarded")) is not None]
    if thrown:
        late = bool(run.config.asynchronous.buffer)
        tiles.append(Tile("discarded", f"{sum(thrown):,.0f}", "updates too stale" if late else "clients not waited for"))
    return tiles


def fleet_cards(run: Run) -> list[Card]:
    """Staleness by round, and accuracy by virtual time."""
    return [*_staleness(run), *_virtual_time(run)]


def _staleness(run: Run) -> list[Card]:
    lines = [
        line_of(run, ("staleness_max",), "oldest", _MOST, short),
        line_of(run, ("staleness_mean",), "mean", _MEAN, short),
    ]
    drawn = [one for one in lines if one.points]
    if not drawn:
        return []
    y = axis([value for one in drawn for _, value in one.points], "age in server steps", short, zero=True)
    one = run.config.asynchronous
    note = (
        f"Age of the updates in a step: server steps since the client was given its model. One of age a weighs "
        f"1 / (1 + a)^{short(one.staleness_exponent)}; over {one.max_staleness} it is discarded."
    )
    return [Card("Staleness", line_chart(round_axis(run.rounds[0]["round"], run.done), y, drawn), note)]


def _virtual_time(run: Run) -> list[Card]:
    timed = [(seconds, record) for record in run.rounds if (seconds := number(record, "virtual_seconds")) is not None]
    if not timed:
        return []
    lines = []
    for key, label, color in (
        ("fake_quant_accuracy", "quantized, as clients receive it", _QUANTIZED),
        ("accuracy", "fp32 master", FP32),
    ):
        points = [(seconds, value) for seconds, record in timed if (value := number(record, key)) is not None]
        if points:
            lines.append(Series(label, color, [(x, y) for x, y in thin(points)], percent(points[-1][1]), dashed=color == FP32))
    if not lines:
        return []
    x = axis([0.0, *(seconds for seconds, _ in timed)], "virtual time", duration, zero=True)
    y = axis([value for one in lines for _, value in one.points], "accuracy", percent, top=1.0)
    return [Card("Virtual time", line_chart(x, y, lines), "Test accuracy by the clock of the simulated fleet ([fleet]).")]
