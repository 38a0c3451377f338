"""The parts of a report page that its sections share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedcore.report import Run, number
from fedcore.report.charts import Series, Text, thin

__all__ = ["FP32", "Card", "Tile", "line_of"]

FP32 = 1
"""Palette slot of the fp32 master, drawn dashed."""


@dataclass(frozen=True)
class Tile:
    """One number of the headline strip."""

    label: str
    value: str
    note: str = ""
    main: bool = False


@dataclass(frozen=True)
class Card:
    """One chart; ``span`` is its width in sixths of the page."""

    title: str
    chart: Markup
    note: str = ""
    span: int = 3


def line_of(run: Run, keys: tuple[str, ...], label: str, color: int, text: Text) -> Series:
    """A number of each round that has it, nested by ``keys``."""
    points = []
    for record in run.rounds:
        table: Any = record
        for key in keys[:-1]:
            table = table.get(key, {})
        value = number(table, keys[-1])
        points += [(float(record["round"]), value)] if value is not None else []
    return Series(label, color, [(x, y) for x, y in thin(points)], text(points[-1][1]) if points else "", dashed=color == FP32)
