"""``fedcore chaos``: what a federation of devices does when everything around it fails."""

from __future__ import annotations

import json
import math
import secrets
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedcore.errors import Refused
from fedcore.terminal import clear_errors, new_console

__all__ = ["chaos"]

chaos = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fail on purpose: a rehearsal, a harmful proxy, and a check of what must hold."
)
_YEAR = 365 * 86_400.0
_BROKEN = 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Seed = Annotated[int | None, typer.Option(help="Repeat the faults of an earlier call; drawn and shown if not given.", min=0)]


@chaos.command()
def run(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file.", metavar="SCENARIO.toml")],
    out: Annotated[Path, typer.Option(help="Folder of the rehearsal; must be new.", metavar="DIR")],
    devices: Annotated[int, typer.Option(help="Device processes.", min=1, max=200)] = 4,
    replicas: Annotated[int, typer.Option(help="Gateways beside the coordinator's own.", min=0, max=20)] = 0,
    redis: Annotated[bool, typer.Option("--redis", help="Start a Redis for the gateways' store, instead of SQLite.")] = False,
    faults: Annotated[str, typer.Option(help="Of kill, disk, network and clock, with commas.")] = "kill,disk,network,clock",
    seconds: Annotated[float, typer.Option(help="How long there are faults; then the run may end in peace.", min=0)] = 120.0,
    every: Annotated[float, typer.Option(help="Seconds between two blows, in the mean.", min=0.1)] = 4.0,
    seed: Seed = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")] = None,
    as_json: Json = False,
) -> None:
    """Start a federation of its own on this machine, beat it, and judge it; nothing of yours is touched.

    Devices train nothing here: their updates are known, so that sums can be checked to the bit. Exit code 3: something is broken.
    """
    with clear_errors():
        from fedcore.chaos.deployment import Deployment, Layout
        from fedcore.chaos.rehearsal import KINDS, Plan, least, rehearse

        for name, value in (("seconds", seconds), ("every", every)):
            if not math.isfinite(value):
                raise Refused(f"--{name}: takes a number of seconds, got {value:g}")
        kinds = [one for one in faults.split(",") if one]
        if unknown := [one for one in kinds if one not in {*KINDS, "clock"}]:
            raise Refused(f"--faults: unknown {unknown[0]!r}; allowed: {', '.join((*KINDS, 'clock'))}")
        if out.exists() and any(out.iterdir()):
            raise Refused(f"--out {out}: is not empty; a rehearsal needs a folder of its own")
        _check_scenario(scenario, overrides or [])
        drawn = secrets.randbelow(1 << 31) if seed is None else seed
        serve = ("--devices", str(devices), "--minimum", str(least(devices)), "--over-selection", "1", "--window", "60")
        ahead = _YEAR if "clock" in kinds else 0.0
        layout = Layout(scenario, overrides or [], devices, replicas, redis, ahead, serve)
        plan = Plan(drawn, [one for one in kinds if one in KINDS], every, seconds)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _say({"event": "seed", "seed": drawn}, f"seed {drawn}", as_json=as_json)
        judged = rehearse(Deployment(out, layout), plan, lambda text: _say({"event": "fault", "text": text}, text, as_json=as_json))
    what = ", ".join(f"{times} x {name}" for name, times in sorted(judged.happened.items()))
    _say({"event": "faults", **judged.happened}, f"faults: {what or 'none'}", as_json=as_json)
    _show(judged.findings, as_json=as_json)
    if not judged.holds:
        _say({"event": "repeat", "seed": drawn}, f"repeat it with --seed {drawn}; everything is in {out}", as_json=as_json)
        raise typer.Exit(_BROKEN)


@chaos.command()
def proxy(
    listen: Annotated[str, typer.Option(help="Where devices connect; port 0 takes a free one.", metavar="HOST:PORT")],
    to: Annotated[list[str], typer.Option(help="A gateway; may be repeated, connections are dealt in turn.", metavar="HOST:PORT")],
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="Chance that a piece is harmed: drop, duplicate, delay, reorder, truncate or corrupt; seconds=S bounds delays.",
            metavar="NAME=NUMBER",
        ),
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            help="Harm whole messages instead, in the name of this test fleet's gateway, whose TLS key it takes.", metavar="DIR"
        ),
    ] = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Put a harmful network between your devices and your gateway, until Ctrl-C.

    Without --fleet it passes TLS on unread: what it harms ends a connection, as on a bad line.
    """
    with clear_errors():
        from fedcore.chaos.faults import Faults
        from fedcore.chaos.network import RunningProxy
        from fedcore.chaos.relay import MessageRelay
        from fedcore.gateway.deployment import Fleet

        found = Faults.parse(fault or ["drop=0.01", "delay=0.1", "truncate=0.01", "corrupt=0.01"])
        drawn = secrets.randbelow(1 << 31) if seed is None else seed
        if fleet is not None and len(to) > 1:
            raise Refused("--fleet: messages are passed on to one gateway; give one --to")
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        if fleet is None:
            with RunningProxy(listen, to, found, drawn) as one:
                _serve(one.proxy.address, drawn, stop, as_json=as_json)
            happened = one.proxy.happened
        else:
            with MessageRelay(listen, to[0], Fleet(fleet / "fleet"), found, drawn) as relay:
                _serve(relay.address, drawn, stop, as_json=as_json)
            happened = relay.happened
        what = ", ".join(f"{times} x {name}" for name, times in sorted(happened.items()))
        _say({"event": "faults", **happened}, f"faults: {what or 'none'}", as_json=as_json)


@chaos.command()
def check(
    directory: Annotated[Path, typer.Argument(help="The run; it must not be going on.", metavar="RUN")],
    fleet: Annotated[Path, typer.Option(help="Folder of the fleet.", metavar="DIR")],
    store: Annotated[str, typer.Option(help="redis://...; the store that was served last if not given.")] = "",
    acknowledged: Annotated[
        list[Path] | None, typer.Option(help="Log of a fedcore-device, or journal of a rehearsal's device.", metavar="FILE")
    ] = None,
    uploads: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with uploads under their SHA-256, as a rehearsal's devices keep.", metavar="DIR"),
    ] = None,
    log: Annotated[list[Path] | None, typer.Option(help="Log to search for defects.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """See whether a federation kept its promises, whatever happened to it: within an hour of the rounds in question, for then the
    gateways' store forgets them. Exit code 3: something is broken.
    """
    with clear_errors():
        from fedcore.chaos.check import check_run, store_of

        _check_there("--acknowledged", acknowledged, Path.is_file, "file")
        _check_there("--uploads", uploads, Path.is_dir, "folder")
        _check_there("--log", log, Path.is_file, "file")
        where = store or store_of(fleet)
        findings = check_run(directory, where, journals=acknowledged or [], uploads=uploads or [], logs=log or [])
    _show(findings, as_json=as_json)
    if any(one.holds is False for one in findings):
        raise typer.Exit(_BROKEN)


def _check_there(option: str, paths: list[Path] | None, test: Callable[[Path], bool], what: str) -> None:
    """What is not there must not pass for one in which nothing was found."""
    if missing := [path for path in paths or [] if not test(path)]:
        raise Refused(f"{option} {missing[0]}: there is no such {what}")


def _check_scenario(scenario: Path, overrides: list[str]) -> None:
    from fedcore.config import load_config

    config = load_config(scenario, overrides)
    if config.secagg.enabled:
        raise Refused("a rehearsal's devices send what can be checked, in the clear: --set secagg.enabled=false")


def _serve(address: str, seed: int, stop: threading.Event, *, as_json: bool) -> None:
    _say({"event": "listening", "address": address, "seed": seed}, f"harms what comes to {address}; seed {seed}", as_json=as_json)
    while not stop.wait(1.0):
        continue


def _say(table: dict[str, Any], text: str, *, as_json: bool) -> None:
    print(json.dumps(table) if as_json else text, flush=True)


def _show(findings: list[Any], *, as_json: bool) -> None:
    words = {True: "holds", False: "BROKEN", None: "not judged"}
    if as_json:
        for one in findings:
            print(json.dumps({"event": "finding", "name": one.name, "holds": one.holds, "text": one.text}))
        return
    table = Table("must hold", "", "seen", box=None, padding=(0, 2))
    for one in findings:
        table.add_row(one.name, words[one.holds], one.text)
    new_console().print(table)
