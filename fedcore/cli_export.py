"""``fedcore export`` and ``fedcore inspect``: a run's model for the runtimes of the edge, and what an artefact holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedcore.coordinator.directory import write
from fedcore.errors import Refused
from fedcore.terminal import clear_errors, new_console

if TYPE_CHECKING:
    from fedcore.export.gate import Row
    from fedcore.export.release import Plan

__all__ = ["export", "inspect_file"]

_INSPECTION_SECONDS, _INSPECTION_MEMORY = 120.0, 4 << 30
_WORDS = 1000  # characters of a value that are shown

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


def export(
    directory: Annotated[Path | None, typer.Argument(help="A finished run.", metavar="DIR")] = None,
    targets: Annotated[
        str,
        typer.Option(help="Runtimes: onnx, litert, executorch, executorch-portable, coreml, ncnn, mnn, micro.", metavar="NAME,.."),
    ] = "",
    tiers: Annotated[str, typer.Option(help="Tiers: flagship, entry, wearable, or those of the scenario.", metavar="NAME,..")] = "",
    micro_python: Annotated[
        Path | None, typer.Option(help="A Python that has tflite-micro.", envvar="FEDCORE_MICRO_PYTHON", metavar="FILE")
    ] = None,
    setup_micro: Annotated[
        Path | None, typer.Option(help="Make a virtual environment with tflite-micro here.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's model for every runtime, run it there and judge it. Exit code 1 when an artefact misses its gate.

    Artefacts go to DIR/export/TIER/TARGET, the table to DIR/export/export.json. Latency and memory are this machine's.
    """
    with clear_errors():
        if setup_micro:
            from fedcore.export.micro import set_up

            micro_python = set_up(setup_micro)
            if directory is None:
                print(micro_python)
                return
        if directory is None:
            raise Refused("fedcore export needs the directory of a finished run")
        if micro_python and not micro_python.is_file():
            raise Refused(f"--micro-python {micro_python}: no such file")
        failed = _export(directory, _names(targets), _names(tiers), micro_python, as_json=as_json)
        if failed:
            raise typer.Exit(1)


def _export(directory: Path, targets: list[str], tiers: list[str], micro_python: Path | None, *, as_json: bool) -> bool:
    import torch

    from fedcore.config import load_config
    from fedcore.export.release import choose, clear, release, to_json
    from fedcore.export.source import load_run, require_finished

    torch.set_num_threads(1)
    require_finished(directory)
    own = load_config(directory / "config.toml").tiers
    plan = choose(own, tiers, targets, micro_python)
    place, console = directory / "export" / "export.json", new_console()
    with _held(directory) as run_id, _progress(console, quiet=as_json) as told:
        source = load_run(directory, run_id)
        model = hashlib.sha256((directory / "model" / "model.fcm").read_bytes()).hexdigest()
        earlier = clear(place.parent, model)
        rows = release(source, plan, place.parent, told)
        write(place, to_json(rows, earlier, plan, source, model))
    if as_json:
        print(to_json(rows, (), plan, source, model), end="")
    else:
        console.print(_table(rows))
        for row in rows:
            if row.reason:
                console.print(_shown(f"{row.tier} {row.target}: {row.reason}"), highlight=False, soft_wrap=True)
        words = f"fp32 master {source.accuracy:.4f}; measured on this host, {_threads(plan)}; {place}"
        console.print(words, highlight=False, soft_wrap=True)
    asked = {(tier, name) for tier in plan.tiers for name in targets or (own[tier].targets if tier in own else ())}
    return any(row.gate == "fail" or (row.status == "missing" and (row.tier, row.target) in asked) for row in rows)


def inspect_file(
    file: Annotated[Path, typer.Argument(help="A model: .onnx .tflite .pte .mlpackage .param .mnn .cc .fcm", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Say what a model file holds: inputs, outputs, quantization, operators, size. It is read in a process of its own."""
    with clear_errors():
        from fedcore.export.child import Limits, run_job
        from fedcore.export.targets import target_of

        kind = target_of(file)
        if not file.exists():
            raise Refused(f"{file} does not exist")
        if not (file.is_file() or file.is_dir()):
            raise Refused(f"{file} is neither a file nor a package")
        job = {"task": "describe", "kind": kind, "path": str(file.resolve())}
        held = run_job(job, Limits(_INSPECTION_SECONDS, _INSPECTION_MEMORY))
        if as_json:
            print(json.dumps(held))
            return
        _print_contents(new_console(), held)


def _print_contents(console: Console, held: dict[str, Any]) -> None:
    from fedcore.display import human_bytes

    table = Table(box=None, show_header=False, padding=(0, 1))

    def add(name: object, value: object) -> None:
        table.add_row(_shown(name), _shown(value))

    add("format", held["kind"])
    add("size", human_bytes(held["size"]))
    for side in ("inputs", "outputs"):
        for tensor in held[side]:
            grid = f", {tensor['scale']:.6g} * (value - {tensor['zero_point']})" if tensor["scale"] else ""
            add(side[:-1], f"{tensor['name']} {tensor['kind']} {tensor['shape']}{grid}")
    add("quantization", held["quantization"])
    operators = ", ".join(f"{count} {name}" for name, count in held["operators"].items())
    add("operators", f"{operators} ({held['integer']} integer, {held['floating']} float)")
    for key, value in held["metadata"].items():
        add(key, value)
    console.print(table, highlight=False)


def _shown(value: object) -> str:
    """Words of a file of unknown origin: without control characters, which a terminal obeys, and not without end."""
    text = "".join(character if character.isprintable() else "?" for character in str(value)[:_WORDS])
    return text + (" ..." if len(str(value)) > _WORDS else "")


def _table(rows: list[Row]) -> Table:
    from fedcore.display import human_bytes

    columns = ("target", "tier", "status", "bytes", "agreement", "accuracy", "loss", "ms", "p95 ms", "peak", "int ops", "float ops")
    table = Table(*columns, "gate", box=None, header_style="bold", padding=(0, 1))
    for row in rows:
        numbers = ((row.agreement, "{:.4f}"), (row.accuracy, "{:.4f}"), (row.accuracy_loss, "{:.2f}"), (row.latency_ms, "{:.3f}"),
                   (row.p95_ms, "{:.3f}"))  # fmt: skip
        shown = ["" if value is None else pattern.format(value) for value, pattern in numbers]
        sizes = ["" if value is None else human_bytes(value) for value in (row.bytes, row.peak_bytes)]
        counts = ["" if value is None else str(value) for value in (row.integer_ops, row.float_ops)]
        table.add_row(row.target, row.tier, row.status, sizes[0], *shown, sizes[1], *counts, row.gate)
    return table


@contextlib.contextmanager
def _progress(console: Console, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that follows the work in a terminal, lines elsewhere, nothing for scripts."""
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda words: console.print(words, highlight=False)


def _threads(plan: Plan) -> str:
    counts = {tier.threads for tier in plan.tiers.values()}
    return ", ".join(f"{count} thread{'s' if count > 1 else ''}" for count in sorted(counts))


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[str]:
    """The run's id, while nobody else resumes or exports the run."""
    from fedcore.state.sqlite import RunStore

    store = RunStore(directory)
    try:
        yield store.run_id
    finally:
        store.close()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
