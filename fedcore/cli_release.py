"""``fedcore release``: releases of a model, and their way to the devices of a fleet."""

from __future__ import annotations

import getpass
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from fedcore.errors import Refused
from fedcore.terminal import clear_errors, new_console

if TYPE_CHECKING:
    from fedcore.coordinator.releases import Registry
    from fedcore.coordinator.rollouts import Deployment, Order

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Bring a model to devices in stages, and take it back.")
_LOOK = 2.0  # seconds between two pictures

Fleet = Annotated[Path, typer.Option("--fleet", help="Folder of the fleet, as fedcore serve keeps it.", metavar="DIR")]
FLEET = Path("fleet")
Place = Annotated[str, typer.Option("--registry", help="Repository: a directory or URL; what the fleet serves if not given.")]
Keys = Annotated[list[Path], typer.Option("--keys", help="A directory of private keys; may be repeated.", metavar="DIR")]
Model = Annotated[str, typer.Option("--model", help="The model's name; not needed where there is one.", metavar="NAME")]
Why = Annotated[str, typer.Option("--why", help="The reason, for the audit records.")]
By = Annotated[str, typer.Option("--by", help="Who orders it, for the audit records; this user if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    directory: Annotated[Path, typer.Argument(help="A run that was exported, or the folder of the export.", metavar="DIR")],
    keys: Keys,
    place: Place = "",
    fleet: Fleet = FLEET,
    model: Annotated[str, typer.Option(help="The model's name in the repository; the run's if not given.", metavar="NAME")] = "",
    tiers: Annotated[str, typer.Option(help="Only these tiers; all that passed their gates if not given.", metavar="NAME,..")] = "",
    self_test: Annotated[int, typer.Option(help="Test examples for devices to try it with: they become public.", min=0)] = 64,
    batch: Annotated[Path | None, typer.Option(help="Another self-test batch: x and y in an .npz.", metavar="FILE")] = None,
    deltas: Annotated[int, typer.Option(help="Earlier releases from which a delta leads to this one.", min=0)] = 1,
    keep: Annotated[int, typer.Option(help="Releases that stay on offer beside those that rollouts need; 0 = all.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Publish what passed its gates in DIR as the next release. No device gets it before `fedcore release start`."""
    with clear_errors():
        from fedcore.coordinator.releases import create_release, export_folder, model_of, self_test_batch

        export = export_folder(directory)
        name = model or model_of(export)
        if not name:
            raise Refused(f"{export} is in no run's folder: --model names the model")
        registry = _registry(place, fleet, keys)
        console = new_console()
        with console.status("self-test batch, deltas, signatures"):
            data = _read(batch) if batch else self_test_batch(export.parent, self_test)
            wanted = [one.strip() for one in tiers.split(",") if one.strip()]
            needed = _needed(fleet) if keep else None
            made = create_release(export, name, data, registry, tiers=wanted, bases=deltas, keep=keep or None, needed=needed)
        if as_json:
            print(json.dumps(vars(made)))
            return
        from fedcore.display import human_bytes

        sizes = ", ".join(f"{what} {human_bytes(size)}" for what, size in made.artefacts.items())
        shorter = f"; deltas {', '.join(map(human_bytes, made.deltas))}" if made.deltas else ""
        console.print(f"release {made.version} of {name}: {sizes}{shorter}", highlight=False, soft_wrap=True)


@app.command()
def start(
    why: Why = "a new release",
    by: By = "",
    fleet: Fleet = FLEET,
    place: Place = "",
    model: Model = "",
    version: Annotated[int, typer.Option(help="The release; the newest one if not given.", min=0)] = 0,
    canary: Annotated[str, typer.Option(help="Share of the fleet that gets it first.", metavar="SHARE")] = "5%",
    group: Annotated[str, typer.Option(help="Only devices that you labelled so first, half as control.", metavar="LABEL")] = "",
    stages: Annotated[str, typer.Option(help="Shares after the canary.", metavar="SHARE,..")] = "20%,50%",
    control: Annotated[str, typer.Option(help="Share that keeps what it has until the last stage is over.")] = "40%",
    window: Annotated[float, typer.Option(help="Seconds after which a device's reports become its vote.", min=1.0)] = 86_400.0,
    against: Annotated[int, typer.Option(help="A/B: the control gets this release; the rest keeps what it has.", min=0)] = 0,
    budget: Annotated[list[str] | None, typer.Option(help="p95_ms=50: too much for a device; may be repeated.")] = None,
    hardware: Annotated[list[str] | None, typer.Option(help="A hardware model that is judged apart; may be repeated.")] = None,
    corrupt: Annotated[str, typer.Option(help="Share of devices that may lie.")] = "5%",
    kept: Annotated[int, typer.Option("--keep-rollouts", help="Rollouts that stay; audit records all do.", min=1)] = 20,
    size: Annotated[int, typer.Option("--fleet-size", help="Devices; 0 = as many as asked for the model lately.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Roll a release out: canary and control first, then the stages, each once evidence rules harm out. The first release of a
    model goes to all devices at once.

    `fedcore serve` decides by evidence while it runs, `fedcore release watch` without it.
    """
    with clear_errors():
        from fedcore.config import share_of
        from fedcore.coordinator.releases import Registry
        from fedcore.coordinator.rollouts import Shape
        from fedcore.registry.files import open_files

        deployment = _deployment(fleet, place)
        if not deployment.repository:
            raise Refused("which repository? --registry names it")
        catalogue = Registry(open_files(deployment.repository), {}).catalogue()
        rising = [share_of(one) for one in [canary, *filter(None, stages.split(","))]]
        steps = (rising[0], *(one for one in rising[1:] if one > rising[0]))
        shape = Shape(
            steps, share_of(control), window, group, tuple(hardware or ()), share_of(corrupt), size, _budgets(budget or []),
            kept,
        )  # fmt: skip
        with deployment.control() as held:
            name = model or _only({name for name, _ in catalogue.releases()})
            number = version or catalogue.latest(name)
            state = held.start(name, number, catalogue, shape, _order(by, why), against or None)
        if as_json:
            print(json.dumps({"rollout": state.plan.name, "phase": state.phase, "fleet": state.plan.fleet}))
        elif state.phase == "full":
            print(f"{state.plan.name}: the first release of {name} goes to all devices")
        else:
            print(f"{state.plan.name}: {state.plan.stages[0]:.1%} of {state.plan.fleet} devices first; {state.plan.baseline} stays "
                  f"with the others")  # fmt: skip
            if all(one.name != "disagreement" for one in state.plan.signals):
                print("agreement is not compared: not both releases have a self-test batch")


@app.command()
def promote(model: Model = "", why: Why = "by hand", by: By = "", fleet: Fleet = FLEET, as_json: Json = False) -> None:
    """Go on to the next stage, after the last one to all devices, whatever the evidence says; it is recorded with the order."""
    _ordered("promote", model, why, by, fleet, as_json=as_json)


@app.command()
def pause(model: Model = "", why: Why = "by hand", by: By = "", fleet: Fleet = FLEET, as_json: Json = False) -> None:
    """Give the release to nobody else for now; who has it keeps it."""
    _ordered("pause", model, why, by, fleet, as_json=as_json)


@app.command()
def resume(model: Model = "", why: Why = "by hand", by: By = "", fleet: Fleet = FLEET, as_json: Json = False) -> None:
    """Go on after a pause."""
    _ordered("resume", model, why, by, fleet, as_json=as_json)


@app.command()
def abort(model: Model = "", why: Why = "", by: By = "", fleet: Fleet = FLEET, as_json: Json = False) -> None:
    """Stop a rollout for good: nobody else gets the release. `fedcore release rollback` takes it back from who has it."""
    _ordered("abort", model, why, by, fleet, as_json=as_json)


@app.command()
def rollback(
    keys: Keys,
    model: Model = "",
    why: Why = "",
    by: By = "",
    fleet: Fleet = FLEET,
    place: Place = "",
    to: Annotated[int, typer.Option(help="The release to go back to; the one before if not given.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Take a release back: its rollout ends, and all devices get the old content as a new, higher release."""
    with clear_errors():
        from fedcore.coordinator.releases import roll_back

        registry = _registry(place, fleet, keys)
        with _deployment(fleet).control() as control:
            name = model or _only(control.models())
            number = roll_back(control, registry, name, _order(by, why), to or None)
        print(json.dumps({"model": name, "version": number}) if as_json else f"release {number} of {name} has the old content")


@app.command()
def status(
    model: Model = "",
    fleet: Fleet = FLEET,
    once: Annotated[bool, typer.Option("--once", help="One picture, not a live one.")] = False,
    as_json: Json = False,
) -> None:
    """Show where a rollout is: stages, votes, evidence, what devices run. Live in a terminal, until Ctrl-C."""
    with clear_errors():
        from fedcore.coordinator.release_status import standing

        with _deployment(fleet).control() as control:
            name = model or _only(control.models())
            if as_json:
                print(json.dumps(standing(control, name)))
                return
            console = new_console()
            if once or not console.is_terminal:
                console.print(_picture(standing(control, name)), highlight=False)
                return
            try:
                with Live(_picture(standing(control, name)), console=console, auto_refresh=False) as live:
                    while True:
                        time.sleep(_LOOK)
                        live.update(_picture(standing(control, name)), refresh=True)
            except KeyboardInterrupt:
                return


@app.command()
def compare(
    a: Annotated[int, typer.Argument(help="A release.", metavar="A")],
    b: Annotated[int, typer.Argument(help="Another one.", metavar="B")],
    model: Model = "",
    fleet: Fleet = FLEET,
    as_json: Json = False,
) -> None:
    """Compare two releases by what devices reported, with intervals that hold however often one looks (together at 95 %)."""
    with clear_errors():
        from fedcore.coordinator.releases import compared
        from fedcore.registry.journal import plain

        with _deployment(fleet).control() as control:
            name = model or _only(control.models())
            rows, together = compared(control, name, a, b)
        if as_json:
            print(json.dumps({"model": name, "side_by_side": together, "rows": [plain(vars(row)) for row in rows]}))
            return
        table = Table("signal", "n", f"A: {a}", f"B: {b}", "B against A", "", box=None, header_style="bold", padding=(0, 2))
        for row in rows:
            numbers = [_estimate(row.a), _estimate(row.b), "{:.3g} to {:.3g}".format(*row.difference)]
            table.add_row(row.signal, "{} / {}".format(*row.counts), *numbers, row.verdict)
        console = new_console()
        console.print(table, highlight=False)
        if not together:
            console.print("not side by side: other devices at other times, so differences may be theirs", highlight=False)


@app.command()
def watch(
    fleet: Fleet = FLEET,
    place: Place = "",
    keys: Annotated[list[Path] | None, typer.Option(help="Online keys, to take back what is aborted.", metavar="DIR")] = None,
    pause: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 30.0,
) -> None:
    """Decide by evidence, until Ctrl-C, for fleets whose coordinator does not run all the time."""
    with clear_errors():
        from fedcore.coordinator.release_status import Steward

        deployment = _deployment(fleet, place)
        registry = _registry(place, fleet, keys) if keys else None
        try:
            with Steward(deployment, registry, pause, lambda line: print(line, flush=True)):
                while True:
                    time.sleep(3600)
        except KeyboardInterrupt:
            return


def _ordered(what: str, model: str, why: str, by: str, fleet: Path, *, as_json: bool) -> None:
    with clear_errors():
        with _deployment(fleet).control() as control:
            name = model or _only(control.models())
            state = control.order(name, what, _order(by, why))
        if as_json:
            print(json.dumps({"rollout": state.plan.name, "phase": state.phase, "stage": state.stage}))
        else:
            stages = state.plan.stages
            place = f", stage {state.stage + 1} of {len(stages)} ({stages[state.stage]:.0%})" if state.phase == "running" else ""
            print(f"{state.plan.name} is {state.phase}{place}")


def _order(by: str, why: str) -> Order:
    from fedcore.coordinator.rollouts import Order

    if not why.strip():
        raise Refused("--why: an order goes into the audit records with its reason")
    return Order(by or getpass.getuser(), why)


def _deployment(fleet: Path, place: str = "") -> Deployment:
    from fedcore.coordinator.rollouts import Deployment

    return Deployment.of(fleet, place)


def _needed(fleet: Path) -> dict[str, set[int]] | None:
    """The releases that a fleet's rollouts need; None where there is no fleet."""
    if not (fleet / "fleet").is_dir():
        return None
    with _deployment(fleet).control() as control:
        return control.needed()


def _registry(place: str, fleet: Path, keys: list[Path]) -> Registry:
    from fedcore.coordinator.releases import Registry

    return Registry.open(place or _deployment(fleet).repository, keys)


def _only(names: Any) -> str:
    found = sorted(names)
    if len(found) != 1:
        raise Refused(f"which model? --model names one of: {', '.join(found) or 'none yet'}")
    return str(found[0])


def _budgets(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise Refused(f"--budget {text}: must look like p95_ms=50") from None
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error


def _estimate(value: tuple[float, float, float] | None) -> str:
    return "nothing reported" if value is None else "{:.4g} ({:.4g} to {:.4g})".format(*value)


def _picture(held: dict[str, Any]) -> Group:
    share = f", stage {held['stage'] + 1} of {len(held['stages'])} ({held['stages'][held['stage']]:.0%})"
    words = f"{held['rollout']}: {held['phase']}{share if held['phase'] in {'running', 'paused'} else ''}"
    if held["fallback"]:
        words += f"; devices go back to release {held['fallback']}, which has the old content"
    arms = Table("arm", "devices", "reported", "votes", box=None, header_style="bold", padding=(0, 2))
    for arm, one in held["arms"].items():
        arms.add_row(arm, str(one["devices"]), str(one["reported"]), str(one["votes"]))
    tests = Table("signal", "votes", "harm", "no harm", "", box=None, header_style="bold", padding=(0, 2))
    for one in held["tests"]:
        fine = "" if one["fine"] is None else f"{one['fine']:.1f} of {one['fine_needed']:.1f}"
        verdict = "harmful" if one["harmful"] else "harmless" if one["harmless"] else ""
        name = one["signal"] if one["group"] == "all" else f"{one['signal']} ({one['group']})"
        harm = "beyond doubt" if one["harm"] is None else f"{one['harm']:.1f} of {one['harm_needed']:.1f}"
        tests.add_row(name, f"{one['canary']} / {one['control']}", harm, fine, verdict)
    versions = ", ".join(f"{count} on {version if version != '0' else 'none'}" for version, count in held["versions"].items())
    lines = [words, f"of {held['fleet']} devices: {versions or 'none was here lately'}"]
    lines += [f"refused: {why} ({count})" for why, count in held["refused"].items()]
    return Group(*lines, arms, *([tests] if held["tests"] else []))
