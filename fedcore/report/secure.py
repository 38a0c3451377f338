"""What secure aggregation did in a run, what it cost, and what it assumes, for the run's report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedcore.report import Run, number
from fedcore.report.cards import Card
from fedcore.report.charts import Series, axis, data_size, line_chart, round_axis, short, thin

__all__ = ["secure_cards", "secure_statements"]


def secure_cards(run: Run) -> list[Card]:
    """Clients from check-in to sum, and what encryption cost them and the server; shards of one round are put together."""
    sums = {record["round"]: record["secure"] for record in run.rounds if record.get("secure")}
    if not sums:
        return []
    x = round_axis(run.rounds[0]["round"], run.done)

    def series(label: str, color: int, key: str, of: Callable[[list[float]], float], text: Callable[[float], str]) -> Series:
        points = []
        for at, tables in sums.items():
            values = [value for table in tables if (value := number(table, key)) is not None]
            points += [(float(at), of(values))] if values else []
        return Series(label, color, [(a, b) for a, b in thin(points)], text(points[-1][1]) if points else "")

    def card(title: str, label: str, lines: list[Series], text: Callable[[float], str], note: str) -> Card:
        y = axis([value for line in lines for _, value in line.points], label, text, zero=True)
        return Card(title, line_chart(x, y, lines), note)

    last = sums[max(sums)][0]
    upload = number(last, "upload_bytes")
    masked = f"Each masks with {last.get('neighbours')} others, {last.get('bits')} bits a value"
    masked += f"; an upload has {data_size(upload)}." if upload else "."
    return [
        card(
            "In secure sums", "clients",
            [series("checked in", 1, "checked_in", sum, short), series("survivors", 2, "survivors", sum, short)], short, masked,
        ),
        card(
            "Time for encryption", "ms",
            [series("a client", 2, "client_ms", max, short), series("the server", 3, "server_ms", sum, short)], short,
            "A client: keys, masks, shares and boxes. The server: verifying, adding, rebuilding seeds, unmasking.",
        ),
    ]  # fmt: skip


def secure_statements(run: Run) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """What protects contributions and what that assumes, as (heading, text), and what must not be concluded."""
    words: dict[str, Any] | None = (run.result or {}).get("secure_aggregation")
    if not words:
        return []
    rows = [("How", str(words["how"])), ("Committee", str(words["committee"])), ("Assumes", " ".join(map(str, words["assumed"])))]
    return [("Secure aggregation", rows, [str(text) for text in words["not_concluded"]])]
