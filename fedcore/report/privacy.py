"""What a run's privacy cost and what that means, for its report."""

from __future__ import annotations

from typing import Any

from fedcore.report import Run, number
from fedcore.report.cards import Card, Tile, line_of
from fedcore.report.charts import ABSENT, Mark, axis, line_chart, round_axis, short

__all__ = ["privacy_cards", "privacy_tiles", "statements"]

_COLORS = {"example": 3, "client": 2}


def privacy_tiles(run: Run) -> list[Tile]:
    """The epsilon of each unit so far, beside its budget."""
    tiles = []
    for unit, spent in (run.rounds[-1].get("privacy", {}) if run.rounds else {}).items():
        budget, delta, coordinator = (number(spent, key) for key in ("budget", "delta", "epsilon_coordinator"))
        epsilon = number(spent, "epsilon")
        notes = [f"of {short(budget)} allowed, {short(max(0.0, budget - epsilon))} left"] if budget and epsilon is not None else []
        notes += [f"{short(coordinator)} towards the coordinator"] if coordinator is not None else []
        notes += [f"delta {delta:g}"] if delta else []
        tiles.append(Tile(f"epsilon, one {unit}", ABSENT if epsilon is None else short(epsilon), "; ".join(notes)))
    return tiles


def privacy_cards(run: Run) -> list[Card]:
    """Epsilon over the rounds, and the clipping norm where it adapts."""
    units = [one.unit for one in run.config.privacy]
    cards = []
    for unit in units:
        views = (("epsilon", "towards those who see what is published"), ("epsilon_coordinator", "towards the coordinator"))
        lines = [
            line_of(run, ("privacy", unit, key), label, _COLORS[unit] if key == "epsilon" else 1, short) for key, label in views
        ]
        drawn = [one for one in lines if one.points]
        if not drawn:
            continue
        x = round_axis(run.rounds[0]["round"], run.done)
        budget = next(
            (number(record["privacy"][unit], "budget") for record in run.rounds if unit in record.get("privacy", {})), None
        )
        values = [y for one in drawn for _, y in one.points]
        y = axis(values, "epsilon", short, zero=True)
        note = f"Budget {short(budget)}. " if budget else ""
        ended = [Mark(run.done, "ended by the budget", top=True)] if (run.result or {}).get("ended") else []
        cards.append(Card(f"Spent, one {unit}", line_chart(x, y, drawn, (), ended), note + "Delta is " + _delta(run, unit) + "."))
    norm = line_of(run, ("privacy", "client", "clipping_norm"), "clipping norm", 2, short)
    if norm.points and len({y for _, y in norm.points}) > 1:
        x = round_axis(run.rounds[0]["round"], run.done)
        y = axis([value for _, value in norm.points], "clipping norm", short, zero=True)
        cards.append(Card("Clipping norm", line_chart(x, y, [norm]), "It follows a quantile of the clients' update norms."))
    return cards


def statements(run: Run) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """By unit: what each number assumes, as (heading, text), and what must not be concluded."""
    found = []
    for unit, table in (run.result or {}).get("privacy", {}).items():
        words: dict[str, Any] = table.get("statement", {})
        heads = (
            ("adjacency", "Cannot be told apart"), ("released", f"Epsilon {short(table['epsilon'])} assumes"),
            ("coordinator", f"Epsilon {short(table['epsilon_coordinator'])} assumes"), ("bound", "Computed by"),
            ("charged", "Who is charged"),
        )  # fmt: skip
        rows = [(head, str(words[key])) for key, head in heads if key in words]
        found.append((f"One {unit}", rows, [str(text) for text in words.get("not_concluded", [])]))
    return found


def _delta(run: Run, unit: str) -> str:
    return next(f"{one.delta:g}" for one in run.config.privacy if one.unit == unit)
