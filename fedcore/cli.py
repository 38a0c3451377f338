"""The ``fedcore`` command: each command parses, calls one function and prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcore import __version__, cli_chaos, cli_export, cli_gateway, cli_native, cli_privacy, cli_registry, cli_release, cli_secagg
from fedcore.errors import Refused
from fedcore.terminal import Commands, clear_errors, new_console

if TYPE_CHECKING:
    from fedcore.report.compare import Comparison

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedcore", cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated learning coordinator: simulate, fine-tune quantization-aware, aggregate, re-quantize.",
)  # fmt: skip
app.add_typer(cli_privacy.app, name="privacy")
app.add_typer(cli_registry.app, name="registry")
app.add_typer(cli_release.app, name="release")
app.add_typer(cli_gateway.device, name="device")
app.add_typer(cli_chaos.chaos, name="chaos")
app.add_typer(cli_native.native, name="native")
for _name, _app in (("committee", cli_secagg.committee), ("enrol-ca", cli_secagg.enrol_ca), ("trust", cli_secagg.trust)):
    app.add_typer(_app, name=_name)
app.command()(cli_export.export)
app.command()(cli_gateway.serve)
app.command(name="inspect")(cli_export.inspect_file)
_INTERRUPTED = 130  # as shells have it

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines for scripts instead of a picture.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, for instance in your own strategy.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"fedcore {__version__}")
        raise typer.Exit


@app.command()
def simulate(
    scenario: Annotated[
        Path, typer.Argument(help="The scenario, a TOML file; `fedcore config` lists its keys.", metavar="SCENARIO.toml")
    ],
    out: Annotated[Path | None, typer.Option(help="Directory of the run; runs/NAME-NNN if not given.", metavar="DIR")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out after its last committed round.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a federation on this machine and leave a run directory with models, metrics and a report.

    Ctrl-C, a crash or a kill lose at most the round in flight: continue with --resume, and the result is the same to the bit.
    """
    console = new_console()
    with clear_errors(debug):
        from fedcore.config import load_config
        from fedcore.coordinator.directory import next_directory
        from fedcore.coordinator.run import SimulatedRun
        from fedcore.display import follow

        config = load_config(scenario, overrides or [])
        if resume and out is None:
            raise Refused("--resume needs --out DIR, the run to continue")
        directory = out or next_directory(Path("runs"), config.run.name)
        try:
            with SimulatedRun(config, directory, resume=resume) as run:
                follow(run, console, as_json=as_json)
                result = run.finish()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            command = ["fedcore", "simulate", str(scenario), "--out", str(directory), "--resume"]
            command += [part for override in overrides or [] for part in ("--set", override)]
            hint = f"continue with: {shlex.join(command)}" if (directory / "config.toml").exists() else "nothing was begun"
            print(f"\ninterrupted; {hint}", file=sys.stderr, flush=True)
            os._exit(_INTERRUPTED)
    if as_json:
        print(json.dumps({"event": "result", "directory": str(directory), **result}))
    else:
        _print_result(console, directory, result)


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="Directory that holds run directories.", metavar="[ROOT]")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below ROOT: state, rounds, accuracy, size."""
    with clear_errors():
        from fedcore.display import human_bytes
        from fedcore.report import list_runs

        found = list_runs(root)
        if as_json:
            for one in found:
                print(json.dumps({
                    "directory": str(one.directory), "name": one.name, "state": one.state, "rounds": one.done,
                    "planned": one.planned, "accuracy": one.accuracy, "int8_accuracy": one.int8_accuracy,
                    "bytes": one.size_bytes, "problem": one.problem,
                    "modified": one.modified.isoformat(),
                }))  # fmt: skip
            return
        table = Table(
            "run", "state", "rounds", "accuracy", "int8", "size", "modified (UTC)", box=None, header_style="bold", padding=(0, 2)
        )
        for one in found:
            state = f"{one.state}: {one.problem}" if one.problem else one.state
            accuracies = [f"{value:.3f}" if value is not None else "" for value in (one.accuracy, one.int8_accuracy)]
            size = human_bytes(one.size_bytes)
            table.add_row(
                str(one.directory), state, f"{one.done}/{one.planned}", *accuracies, size, f"{one.modified:%Y-%m-%d %H:%M}"
            )
        new_console().print(table if found else f"no runs below {root}")


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory, finished or not.", metavar="DIR")]) -> None:
    """Write DIR/report.html, one self-contained page with curves, data split, traffic and configuration."""
    with clear_errors():
        from fedcore.report.page import write_report

        print(write_report(directory))


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(help="Two or more run directories.", metavar="DIR DIR...")],
    out: Annotated[Path, typer.Option(help="The page to write.", metavar="FILE")] = Path("comparison.html"),
    as_json: Json = False,
) -> None:
    """Compare runs: a table here, one HTML page with overlaid curves and the settings in which they differ."""
    with clear_errors():
        from fedcore.report.compare import compare_runs, write_comparison

        comparison = compare_runs(directories)
        write_comparison(comparison, out)
        _print_comparison(comparison, out, as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, what it would give and how to get it. Exit code 1 if simulations cannot run."""
    with clear_errors():
        from fedcore.doctor import examine

        findings = examine()
        if as_json:
            print(json.dumps([vars(finding) for finding in findings]))
        else:
            for finding in findings:
                mark = "ok     " if finding.ok else "MISSING" if finding.required else "-      "
                print(f"{mark} {finding.what:17} {finding.found}  ({finding.purpose})")
                if not finding.ok:
                    print(f"{'':8}to get it: {finding.remedy}")
        if any(finding.required and not finding.ok for finding in findings):
            raise typer.Exit(1)


@app.command(name="config")
def show_config(
    section: Annotated[str, typer.Argument(help="Only this section.", metavar="[SECTION]")] = "",
) -> None:
    """List every key that a scenario may set: what is allowed, the default, and what it means."""
    with clear_errors():
        from fedcore.config import describe

        rows = [row for row in describe() if section in ("", row[0])]
        if not rows:
            raise Refused(f"no section [{section}]; sections are: {', '.join(dict.fromkeys(row[0] for row in describe()))}")
        table = Table("key", "allowed", "default", "meaning", box=None, header_style="bold", padding=(0, 1))
        for name, key, allowed, default, meaning in rows:
            table.add_row(f"{name}.{key}", allowed, default, meaning)
        new_console().print(table)


def main() -> None:
    """Entry point."""
    app()


def _print_result(console: Console, directory: Path, result: dict[str, Any]) -> None:
    from fedcore.display import human_bytes, human_seconds

    table = Table(box=None, show_header=False, padding=(0, 1))
    int8 = result["int8_accuracy"]
    rows = {
        "rounds": f"{result['rounds']} in {human_seconds(result['seconds'])} ({result['clients_per_second']:.0f} clients/s)",
        "accuracy": f"{result['accuracy']:.4f} (fp32 master, {result['test_examples']} test examples)",
        "int8 accuracy": f"{int8:.4f} (ONNX Runtime: {_kernels(result)})"
        if int8 is not None
        else result.get("onnx", "not quantized"),
        "traffic": f"{human_bytes(result['bytes_up'])} up, {human_bytes(result['bytes_down'])} down",
        "model": ", ".join(f"{kind} {human_bytes(size)}" for kind, size in result["model_bytes"].items()),
        "dropped": f"{result['dropped']} client updates" if result["dropped"] else "",
        **{f"epsilon, one {unit}": _spent(spent) for unit, spent in result.get("privacy", {}).items()},
        "ended early": result.get("ended", ""),
        "release": result.get("release", ""),
        "report": str(directory / "report.html"),
    }
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="bold"), value)
    console.print(table, highlight=False)


def _spent(spent: dict[str, Any]) -> str:
    """A unit's epsilon in both views."""
    budget = f" of {spent['budget']:.4g} allowed" if spent["budget"] else ""
    views = f"{spent['epsilon']:.4g}{budget}; {spent['epsilon_coordinator']:.4g} towards the coordinator"
    return f"{views}; delta {spent['delta']:g}, noise multiplier {spent['noise_multiplier']:g}"


def _kernels(result: dict[str, Any]) -> str:
    """How many of the layers with weights ran as integer kernels, from the graph that the runtime executed."""
    counts = result["operators"]
    integer = sum(counts.get(kind, 0) for kind in ("QLinearConv", "QGemm", "QLinearMatMul"))
    floating = sum(counts.get(kind, 0) for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    return f"{integer} integer kernels" + (f", {floating} in float" if floating else "")


def _print_comparison(comparison: Comparison, page: Path, *, as_json: bool) -> None:
    from fedcore.display import human_bytes, human_seconds

    if as_json:
        print(json.dumps(asdict(comparison), default=str))
        return
    console = new_console()
    table = Table(
        "run", "strategy", "seed", "rounds", "accuracy", "int8", "up", "down", "clients/s", "time", box=None, padding=(0, 2)
    )
    for row in comparison.rows:
        table.add_row(
            row.label, row.strategy, str(row.seed), f"{row.rounds}{'' if row.finished else ' so far'}",
            _shown(row.accuracy, "{:.4f}"), _shown(row.int8_accuracy, "{:.4f}"),
            *("" if count is None else human_bytes(count) for count in (row.bytes_up, row.bytes_down)),
            _shown(row.clients_per_second, "{:.0f}"), "" if row.seconds is None else human_seconds(row.seconds),
        )  # fmt: skip
    console.print(table)
    for summary in comparison.seeds:
        spreads = (("accuracy", summary.accuracy), ("int8", summary.int8_accuracy))
        means = [f"{name} {spread.mean:.4f} ± {spread.std:.4f}" for name, spread in spreads if spread]
        console.print(f"{summary.label}, {len(summary.members)} seeds: {', '.join(means)}", highlight=False)
    for difference in comparison.differences:
        console.print(f"{difference.key}: {' | '.join(difference.values)}", highlight=False)
    console.print(f"page: {page}", highlight=False)


def _shown(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
