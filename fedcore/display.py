"""Progress of a run: a live picture in a terminal, plain lines elsewhere, JSON lines for scripts."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedcore.config import LOSSES
from fedcore.coordinator.run import FederatedRun, SimulatedRun

__all__ = ["follow", "human_bytes", "human_seconds"]

_RECENT = 8  # rounds shown in the live table


def human_bytes(count: float) -> str:
    """``count`` bytes in the largest unit that keeps it at least 1, decimal: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def follow(run: FederatedRun, console: Console, *, as_json: bool) -> None:
    """Run the rounds that are left and show them as they come."""
    if as_json:
        for metrics in _heeding(run.rounds()):
            print(json.dumps({"event": "round", **metrics}), flush=True)
    elif console.is_terminal and isinstance(run, SimulatedRun):
        _follow_live(run, console)
    else:
        console.print(_headline(run), highlight=False, soft_wrap=True)
        watch = _Watch(run)
        for metrics in _heeding(run.rounds()):
            console.print(_line(metrics, watch), highlight=False, soft_wrap=True)
            if "hint" in metrics:
                console.print(f"hint: {metrics['hint']}", highlight=False, soft_wrap=True)


def _heeding(rounds: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rounds, which Ctrl-C ends for certain: Python swallows a KeyboardInterrupt that hits while an object is finalized."""
    usual, heard = signal.getsignal(signal.SIGINT), threading.Event()
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield from rounds
        return

    def hear(number: int, frame: FrameType | None) -> None:
        heard.set()
        usual(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        for metrics in rounds:
            if heard.is_set():
                raise KeyboardInterrupt
            yield metrics
    finally:
        signal.signal(signal.SIGINT, usual)


class _Watch:
    """Estimates the time left from the rounds finished since the start."""

    def __init__(self, run: FederatedRun) -> None:
        self.total, self.done = run.config.run.rounds, run.first_round - 1
        self._first, self._started = self.done, time.monotonic()

    def left(self, finished: int) -> str:
        """Time left after ``finished`` rounds."""
        pace = (time.monotonic() - self._started) / max(1, finished - self._first)
        return human_seconds(pace * (self.total - finished))


def _headline(run: FederatedRun) -> str:
    config, engine = run.config, run.assembly.engine
    loss = "" if config.training.loss == LOSSES[0] else f", {config.training.loss} loss"
    start = f", continuing after round {run.first_round - 1}" if run.first_round > 1 else ""
    return (
        f"{config.run.name}: {config.data.dataset}, {len(run.assembly.data.clients)} clients, {_who_trains(run)}, "
        f"{config.model.name}{loss}, {config.strategy.name}; engine {engine.name} ({engine.reason}; {run.grid.place}){start}"
    )


def _line(metrics: dict[str, Any], watch: _Watch) -> str:
    parts = [f"round {metrics['round']}/{watch.total}", f"cohort {metrics['cohort']}", _accuracy(metrics)]
    parts += [f"dropped {len(metrics['dropped'])}"] if metrics["dropped"] else []
    parts += _times(metrics)
    parts += [f"tried {1 + len(metrics['failed_attempts'])} times"] if metrics.get("failed_attempts") else []
    parts += [
        f"{metrics['timing']['clients_per_second']:.0f} clients/s",
        f"up {human_bytes(metrics['bytes_up'])}",
        f"down {human_bytes(metrics['bytes_down'])}",
        *_privacy(metrics),
        f"left {watch.left(metrics['round'])}",
    ]
    return "  ".join(part for part in parts if part)


def _accuracy(metrics: dict[str, Any]) -> str:
    if metrics.get("accuracy") is None:
        return ""
    quantized = f" (quantized {metrics['fake_quant_accuracy']:.3f})" if "fake_quant_accuracy" in metrics else ""
    return f"accuracy {metrics['accuracy']:.3f}{quantized}"


def _times(metrics: dict[str, Any]) -> list[str]:
    """Where a run has them: the time on a virtual clock, how old updates were in server steps, and work that was thrown away."""
    parts = [f"virtual {human_seconds(metrics['virtual_seconds'])}"] if "virtual_seconds" in metrics else []
    if "staleness_mean" in metrics:
        parts.append(f"stale {metrics['staleness_mean']:.1f} (max {metrics['staleness_max']})")
    return parts + ([f"discarded {metrics['discarded']}"] if metrics.get("discarded") else [])


def _privacy(metrics: dict[str, Any]) -> list[str]:
    """What each unit has spent, of what it may spend."""
    spent = metrics.get("privacy", {})
    return [
        f"epsilon{f' ({unit})' if len(spent) > 1 else ''} {one['epsilon']:.3g}"
        + (f" of {one['budget']:.3g}" if one["budget"] else "")
        for unit, one in spent.items()
    ]


def _follow_live(run: SimulatedRun, console: Console) -> None:
    headline, watch, recent = Text(_headline(run), style="bold"), _Watch(run), list[dict[str, Any]]()
    bars, secret = _bars(run, watch), _draws_in_secret(run)

    def picture() -> RenderableType:
        if not secret:
            done, drawn = run.grid.clients_done, len(run.grid.nodes)
            bars.update(bars.task_ids[1], completed=done, total=drawn, count=f"{done}/{drawn}")
        hint = recent[-1].get("hint") if recent else None
        return Group(headline, _table(recent, watch), *([Text(f"hint: {hint}", style="yellow")] if hint else []), bars)

    with Live(get_renderable=picture, console=console, refresh_per_second=5):
        for metrics in _heeding(run.rounds()):
            recent = [*recent, metrics][-_RECENT:]
            left, count = f"{watch.left(metrics['round'])} left", f"{metrics['round']}/{watch.total}"
            bars.update(bars.task_ids[0], completed=metrics["round"], count=count, left=left)


def _draws_in_secret(run: FederatedRun) -> bool:
    """Whether a round's cohort comes from coins, which its size, and how fast it works, would tell something about."""
    unit = run.assembly.protection.client
    return unit is not None and 0 < unit.rate < 1


def _bars(run: SimulatedRun, watch: _Watch) -> Progress:
    columns = (TextColumn("{task.description:>8}"), BarColumn(bar_width=40), TextColumn("{task.fields[count]}"))
    bars = Progress(*columns, TextColumn("{task.fields[left]}"))
    bars.add_task("rounds", total=watch.total, completed=watch.done, count=f"{watch.done}/{watch.total}", left="")
    planned = f"{_planned(run)} planned" if _draws_in_secret(run) else ""
    bars.add_task("clients", total=None, count=planned, left="in this round")
    return bars


def _who_trains(run: FederatedRun) -> str:
    one = run.config.asynchronous
    if not one.buffer:
        return f"cohort {_planned(run)}"
    return f"{one.at_once(len(run.assembly.data.clients))} at once, a step every {one.buffer} updates"


def _planned(run: FederatedRun) -> int:
    return run.config.cohort.size or len(run.assembly.data.clients)


def _table(recent: list[dict[str, Any]], watch: _Watch) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    private, timed = any("privacy" in metrics for metrics in recent), any("virtual_seconds" in metrics for metrics in recent)
    stale = any("staleness_mean" in metrics for metrics in recent)
    names = ("round", "cohort", "dropped", "train loss", "accuracy", "quantized", "clients/s", "up", "down")
    for name in (*names, *(["virtual"] if timed else []), *(["stale"] if stale else []), *(["privacy"] if private else [])):
        table.add_column(name, justify="right")
    for metrics in recent:
        numbers = [_number(metrics, key) for key in ("train_loss", "accuracy", "fake_quant_accuracy")]
        rate = f"{metrics['timing']['clients_per_second']:.0f}"
        traffic = [human_bytes(metrics[key]) for key in ("bytes_up", "bytes_down")]
        counts = [f"{metrics['round']}/{watch.total}", str(metrics["cohort"]), str(len(metrics["dropped"]))]
        fleet = [human_seconds(metrics.get("virtual_seconds", 0.0))] if timed else []
        fleet += [f"{metrics['staleness_mean']:.1f} ({metrics['staleness_max']})"] if stale else []
        table.add_row(*counts, *numbers, rate, *traffic, *fleet, *([", ".join(_privacy(metrics))] if private else []))
    return table


def _number(metrics: dict[str, Any], key: str) -> str:
    return f"{metrics[key]:.3f}" if metrics.get(key) is not None else ""
