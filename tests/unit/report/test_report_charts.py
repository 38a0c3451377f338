"""Scales, number formats and the reduction of long series."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.report.charts import (
    Axis,
    axis,
    data_size,
    duration,
    heat_map,
    histogram,
    percent,
    round_axis,
    short,
    stack_chart,
    thin,
)

FINITE = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(FINITE, min_size=1), st.booleans(), st.booleans())
def test_an_axis_covers_its_values_with_a_few_round_ticks(values: list[float], zero: bool, whole: bool) -> None:
    scale = axis(values, "x", short, zero=zero, whole=whole)

    assert scale.low <= min(values) + 1e-6 * (scale.high - scale.low) and max(values) <= scale.high * (1 + 1e-9) + 1e-9
    assert 2 <= len(scale.ticks) <= 10
    assert all(-1e-6 <= scale.at(tick) <= 1 + 1e-6 for tick in scale.ticks)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_an_axis_of_shares_never_passes_one(values: list[float]) -> None:
    scale = axis(values, "accuracy", percent, top=1.0)

    assert scale.high <= 1.0 + 1e-9 or max(values) == 0
    assert scale.low < scale.high


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.1), (1.0, 0.9, 1.0), (0.5, 0.45, 0.55)])
def test_one_share_gets_room_within_zero_and_one(value: float, low: float, high: float) -> None:
    scale = axis([value, value], "accuracy", percent, top=1.0)

    assert scale.low == pytest.approx(low)
    assert scale.high == pytest.approx(high)


@given(st.lists(st.integers(1, 10**7), min_size=1))
def test_a_logarithmic_axis_covers_its_values(values: list[int]) -> None:
    scale = axis(values, "examples", short, log=True)

    assert -1e-9 <= scale.at(min(values)) <= scale.at(max(values)) <= 1 + 1e-9
    assert 1 <= len(scale.ticks) <= 9


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (1, 40), (7, 1000), (0, 3), (1, 99999)])
def test_rounds_keep_half_a_round_of_room(first: int, last: int) -> None:
    scale = round_axis(first, last)

    assert (scale.low, scale.high) == (first - 0.5, last + 0.5)
    assert scale.ticks[0] == first and all(first <= tick <= last and tick == int(tick) for tick in scale.ticks)


@given(st.integers(1, 3000), st.integers(1, 300))
def test_long_series_are_averaged_in_equal_groups(length: int, limit: int) -> None:
    rows = [(float(index), 2.0) for index in range(length)]

    thinned = thin(rows, limit)

    assert len(thinned) <= limit and all(value == 2.0 for _, value in thinned)
    assert [place for place, _ in thinned] == sorted(place for place, _ in thinned)
    assert thinned == rows or length > limit


def test_a_group_is_the_mean_of_its_rounds() -> None:
    assert thin([(1.0, 10.0), (2.0, 20.0), (3.0, 60.0)], 2) == [(1.5, 15.0), (3.0, 60.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (short(0), "0"), (short(1234.6), "1,235"), (short(0.00123456), "0.00123"), (short(-2.5), "-2.5"), (short(1e-30), "0"),
        (percent(0.9667), "96.67%"), (percent(1), "100%"), (percent(0.30000000000000004), "30%"),
        (data_size(0), "0 B"), (data_size(999), "999 B"), (data_size(999_600), "1 MB"), (data_size(22_000_000), "22 MB"),
        (data_size(5e15), "5,000 TB"), (duration(0), "0 s"), (duration(0.0452), "45.2 ms"), (duration(48.23), "48.2 s"),
        (duration(125), "2 min 05 s"), (duration(7384), "2 h 03 min"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_bars_never_overlap_nor_leave_the_plot() -> None:
    x, y = Axis(0.5, 11.5, (1.0,), "round", short), Axis(0.0, 10.0, (0.0,), "traffic", short)
    grouped = thin([(float(index), 1.0) for index in range(1, 12)], 3)

    chart = stack_chart(x, y, grouped, ["up"], [0], width=4.0)

    assert 'x="0.0" y="0" width="363.6"' in chart and 'x="363.6" y="0" width="363.6"' in chart
    assert 'x="727.3" y="0" width="272.7"' in chart


def test_bars_of_whole_numbers_stand_around_them() -> None:
    chart = histogram([30, 30, 31], "examples", short, 0, share=False)

    assert "<title>examples 30\nclients: 2</title>" in chart
    assert "<title>examples 31\nclients: 1</title>" in chart


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_a_histogram_counts_every_client_once(values: list[int]) -> None:
    chart = histogram(values, "examples", short, 0, share=False)

    assert sum(int(count.replace(",", "")) for count in re.findall(r"clients: ([\d,]+)<", chart)) == len(values)


def test_a_heat_map_draws_a_cell_for_each_share() -> None:
    chart = heat_map([[1.0, 0.0], [0.5, 0.5]], ["cat", "<dog>"], ["client 0", "client 1"], "clients")

    assert sum(path.count("z") for path in chart.split('d="')[1:]) >= 3
    assert "&lt;dog&gt;" in chart and "<dog>" not in chart and "<title>client 1</title>" in chart
