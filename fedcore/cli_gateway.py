"""``fedcore serve`` and ``fedcore device``: a federation of real devices."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedcore.errors import Refused
from fedcore.terminal import clear_errors, new_console, printable

__all__ = ["device", "serve"]

device = typer.Typer(no_args_is_help=True, add_completion=False, help="Devices of a fleet: enrol, list, revoke; sign their steps.")
_INTERRUPTED = 130  # as shells have it

FolderOption = Annotated[
    Path, typer.Option("--fleet", help="Folder of the fleet's keys and store; made by the first serve.", metavar="DIR")
]
FOLDER = Path("fleet")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def serve(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file.", metavar="SCENARIO.toml")],
    fleet: FolderOption = FOLDER,
    store: Annotated[str, typer.Option(help="redis://... shared with other gateways; a file in --fleet if not given.")] = "",
    listen: Annotated[
        str, typer.Option(help="Where devices connect; port 0 takes a free one.", metavar="HOST:PORT")
    ] = "127.0.0.1:7443",
    out: Annotated[Path | None, typer.Option(help="Directory of the run; runs/NAME-NNN if not given.", metavar="DIR")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out after its last committed round.")] = False,
    host: Annotated[list[str] | None, typer.Option("--host", help="Further name in a new gateway's certificate.")] = None,
    devices: Annotated[int, typer.Option(help="Uploads that end a round; 0 = the cohort.", min=0)] = 0,
    over_selection: Annotated[float, typer.Option(help="Devices that are asked, as a multiple of the cohort.")] = 1.3,
    window: Annotated[float, typer.Option(help="Seconds to wait for devices to check in for a round.")] = 300.0,
    minimum: Annotated[int, typer.Option(help="Uploads that suffice at the deadline; 0 = three quarters of the cohort.")] = 0,
    metrics: Annotated[
        str, typer.Option(help="Where Prometheus may ask, at /metrics; nowhere if not given.", metavar="HOST:PORT")
    ] = "",
    registry: Annotated[
        str, typer.Option(help="Repository of releases that devices read here; that of [release] if not given.")
    ] = "",
    registry_keys: Annotated[
        list[Path] | None, typer.Option(help="Its online keys, to take back what is aborted and to renew.", metavar="DIR")
    ] = None,
    release_every: Annotated[float, typer.Option(help="Seconds in which devices ask for their release.", min=0.5)] = 1800.0,
    stay: Annotated[bool, typer.Option("--stay", help="After the last round go on serving releases, until Ctrl-C.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")] = None,
    as_json: Json = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a federation of real devices: a gateway, the enrolment signer and the coordinator, on this machine.

    Everything may be killed at any moment: continue with --resume. Devices are enrolled with `fedcore device token`.
    """
    console = new_console()
    with clear_errors(debug):
        from fedcore.config import load_config
        from fedcore.coordinator.directory import next_directory
        from fedcore.coordinator.fleet import FleetFolder, ServedGateway
        from fedcore.coordinator.release_service import attended, pin_root, place_and_keys
        from fedcore.coordinator.serve import Choice, DeviceRun, check_scenario, pin_committee, shown
        from fedcore.display import follow
        from fedcore.state.stores import open_gateway_store

        config = load_config(scenario, overrides or [])
        check_scenario(config)
        if resume and out is None:
            raise Refused("--resume needs --out DIR, the run to continue")
        folder = FleetFolder.open(fleet, config.run.name, host or [])
        releases, keys = place_and_keys(config, registry, registry_keys or [])
        with folder.served():  # what devices of a fleet that another serves are told at their enrolment stays
            pin_committee(config, folder)
            if releases:
                pin_root(folder.fleet, releases)
        directory = out or next_directory(Path("runs"), config.run.name)
        where = store or folder.store
        open_gateway_store(where).close()  # one that would lose what it acknowledges is refused before anything begins
        choice = Choice(over_selection, window, minimum, devices)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            served = ServedGateway(
                folder, where, listen, metrics=metrics, run=directory, repository=releases, release_every=release_every
            )  # fmt: skip
            with served as gateway, attended(folder.directory, releases, keys, _teller(as_json=as_json), min(30.0, release_every)):
                print(shown(gateway.address, directory, as_json=as_json), flush=True)
                with DeviceRun(config, directory, folder, where, choice, resume=resume) as run:
                    follow(run, console, as_json=as_json)
                    result = run.finish()
                _show_result(result, directory, as_json=as_json)
                if stay:
                    _rest()
        except KeyboardInterrupt:
            begun = (directory / "config.toml").exists()
            command = shlex.join(["fedcore", "serve", str(scenario), "--fleet", str(fleet), "--out", str(directory), "--resume"])
            print(f"\ninterrupted; {f'continue with: {command}' if begun else 'nothing was begun'}", file=sys.stderr, flush=True)
            raise typer.Exit(_INTERRUPTED) from None


def _show_result(result: dict[str, Any], directory: Path, *, as_json: bool) -> None:
    from fedcore.display import human_bytes

    if as_json:
        print(json.dumps({"event": "result", "directory": str(directory), **result}), flush=True)
        return
    console = new_console()
    if "ended" in result:
        console.print(f"ended early: {result['ended']}", highlight=False, soft_wrap=True)
    size = ", ".join(f"{kind} {human_bytes(count)}" for kind, count in result["model_bytes"].items())
    console.print(f"accuracy {result['accuracy']:.4f}; model {size}; {directory / 'report.html'}", highlight=False)
    if "release" in result:
        console.print(result["release"], highlight=False, soft_wrap=True)


def _rest() -> None:
    """Until Ctrl-C or SIGTERM, which end what has nothing left to lose."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


@device.command()
def token(
    fleet: FolderOption = FOLDER,
    count: Annotated[int, typer.Option(help="How many, one for each device.", min=1, max=100_000)] = 1,
    hours: Annotated[float, typer.Option(help="How long they can be used.", min=0.01)] = 24.0,
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="A label of the devices, for release start --group; may be repeated.")
    ] = None,
) -> None:
    """Make enrolment tokens, one a line; each enrols one device, once."""
    with clear_errors():
        if not math.isfinite(hours):
            raise Refused(f"--hours takes a number of hours, got {hours:g}")
        signer = _folder(fleet).signer()
        try:
            for _ in range(count):
                print(signer.issue(3600 * hours, labels or []).encode())
        finally:
            signer.close()


@device.command(name="list")
def list_devices(fleet: FolderOption = FOLDER, as_json: Json = False) -> None:
    """List the devices that the gateways know: standing, last seen, what they said of themselves, rounds they took part in."""
    with clear_errors():
        from fedcore.gateway.identity import spell
        from fedcore.state.stores import open_gateway_store

        store = open_gateway_store(_folder(fleet).store)
        try:
            found = sorted(store.devices(), key=lambda one: one.enrolled)
        finally:
            store.close()
        rows: list[dict[str, Any]] = [
            {
                "device": spell(one.id), "standing": one.standing.value, "reason": one.reason, "last_seen": one.last_seen,
                "certificate_until": one.not_after, "told": json.loads(one.told) if one.told else {},
                "labels": list(one.labels),
                "rounds": sum(times for times, _ in one.participations.values()),
            }
            for one in found
        ]  # fmt: skip
        if as_json:
            for row in rows:
                print(json.dumps(row))
            return
        titles = ("device", "standing", "last seen (UTC)", "runtime", "tier", "agent", "model", "rounds", "labels")
        table = Table(*titles, box=None, padding=(0, 2))
        for row in rows:
            told = row["told"]
            seen = f"{datetime.fromtimestamp(row['last_seen'], UTC):%Y-%m-%d %H:%M:%S}" if row["last_seen"] else "never"
            words = f"{row['standing']}: {row['reason']}" if row["reason"] else row["standing"]
            said = [printable(told.get(name, "")) for name in ("runtime", "tier", "agent_version")]
            table.add_row(row["device"], words, seen, *said, str(told.get("model_version", 0) or ""), str(row["rounds"]),
                          printable(", ".join(row["labels"])))  # fmt: skip
        new_console().print(table if rows else "no device has been here yet")


@device.command()
def label(
    identity: Annotated[str, typer.Argument(help="The device, 16 hexadecimal digits.", metavar="DEVICE")],
    labels: Annotated[list[str] | None, typer.Argument(help="All that it is to have; none for none.", metavar="LABEL")] = None,
    fleet: FolderOption = FOLDER,
) -> None:
    """Give a device these labels instead of those that it has: what a device says of itself puts it into no group of a release."""
    with clear_errors():
        from fedcore.gateway.identity import read_device
        from fedcore.state.stores import open_gateway_store

        number = read_device(identity)
        folder = _folder(fleet)
        signer, store = folder.signer(), open_gateway_store(folder.store)
        try:
            held = signer.label(number, labels or [])
            store.label(number, held)
        finally:
            signer.close()
            store.close()
        print(f"{identity}: {', '.join(held) or 'no label'}")


@device.command()
def revoke(
    identity: Annotated[str, typer.Argument(help="The device, 16 hexadecimal digits.", metavar="DEVICE")],
    fleet: FolderOption = FOLDER,
    reason: Annotated[str, typer.Option(help="Kept with the device.")] = "by an operator",
) -> None:
    """Revoke a device: it is refused from its next call on, and its certificate is never renewed."""
    with clear_errors():
        from fedcore.gateway.identity import read_device
        from fedcore.state.gateway import Standing
        from fedcore.state.stores import open_gateway_store

        number = read_device(identity)
        folder = _folder(fleet)
        signer, store = folder.signer(), open_gateway_store(folder.store)
        try:
            signer.revoke(number)
            if store.device(number) is not None:
                store.judge(number, Standing.REVOKED, reason)
        finally:
            signer.close()
            store.close()
        print(f"{identity} is revoked")


@device.command(name="sign-step")
def sign(
    step: Annotated[
        Path, typer.Argument(help="The training step or evaluation graph, an ONNX file from FLEET/steps.", metavar="STEP.onnx")
    ],
    key: Annotated[Path, typer.Option(help="The publisher's private key.", metavar="FILE")],
) -> None:
    """Sign a training step or an evaluation graph as the publisher; the signature lies beside it, as .sig.

    What devices would not accept is not signed. That the graph computes what its author says is for you to vouch for.
    """
    with clear_errors():
        from fedcore.portable.judge import judge_file
        from fedcore.portable.signature import sign_step
        from fedcore.secagg.keys import read_signing_key

        data = judge_file(step).data
        step.with_suffix(".sig").write_bytes(sign_step(read_signing_key(key), data))
        print(f"{step.with_suffix('.sig')}, {time.strftime('%Y-%m-%d')}")


def _teller(*, as_json: bool) -> Callable[[str], None]:
    """How decisions about releases are shown beside the rounds."""
    if as_json:
        return lambda text: print(json.dumps({"event": "release", "text": text}), flush=True)
    return lambda text: print(f"release: {text}", flush=True)


def _folder(directory: Path) -> Any:
    from fedcore.coordinator.fleet import FleetFolder

    return FleetFolder.existing(directory)
