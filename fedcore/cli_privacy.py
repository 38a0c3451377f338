"""``fedcore privacy``: what a plan would cost, how much noise a target takes, what a ledger has spent, and secret keys."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedcore.errors import Refused
from fedcore.terminal import clear_errors

if TYPE_CHECKING:
    from fedcore.privacy.events import Event
    from fedcore.privacy.ledger import Spending

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Differential privacy: cost of a plan, noise for a target, ledgers, keys."
)
_WIDTH = 80
_LARGE_MU = 1e12  # above it the Skellam bound differs from its limit by less than the digits shown

Unit = Annotated[str, typer.Option(help="What is protected: client or example.", metavar="UNIT")]
Mechanism = Annotated[str, typer.Option(help="Noise of unit client: gaussian (coordinator) or skellam (clients).", metavar="NAME")]
Population = Annotated[int | None, typer.Option(help="Registered clients.")]
Cohort = Annotated[int | None, typer.Option(help="Clients expected per round; cohort / population is the bias of each one's coin.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds of the run.")]
Batches = Annotated[int | None, typer.Option(help="Unit example: fewest batches per epoch over all clients.")]
Epochs = Annotated[int, typer.Option(help="Unit example: local epochs per round.")]
Delta = Annotated[float, typer.Option(help="Delta of the guarantee; well below 1 / number of units.")]
Participations = Annotated[str | None, typer.Option(help="Rounds one client takes part in, e.g. 1,2,4.", metavar="N,N,..")]
Mu = Annotated[float | None, typer.Option(help="Skellam: total variance in units of the granularity; large if not given.")]
Dimension = Annotated[int | None, typer.Option(help="Skellam: number of values after padding; bounds the L1 sensitivity.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class Plan:
    """What the user wants to do, apart from the noise."""

    unit: str
    mechanism: str
    population: int | None
    cohort: int | None
    rounds: int | None
    batches: int | None
    epochs: int
    delta: float
    participations: str | None
    mu: float | None
    dimension: int | None

    def __post_init__(self) -> None:
        from fedcore.privacy.accountant import check_delta

        for name, value, allowed in (
            ("unit", self.unit, ("client", "example")),
            ("mechanism", self.mechanism, ("gaussian", "skellam")),
        ):
            if value not in allowed:
                raise Refused(f"--{name} must be {' or '.join(allowed)}, got {value}")
        check_delta(self.delta)
        if (self.unit, self.mechanism) == ("example", "skellam"):
            raise Refused("--mechanism skellam is of unit client; unit example is protected by the noise of its own steps")
        self.counts  # noqa: B018 - refuses them before the long work
        if self.kind == "example":
            self._need("batches", "epochs", "rounds")
        if self.kind == "gaussian":
            self._need("population", "cohort", "rounds")
            if self.rate > 1:
                raise Refused(f"--cohort {self.cohort} is more than --population {self.population}")

    @property
    def kind(self) -> str:
        """example, gaussian or skellam: which numbers there are."""
        return "example" if self.unit == "example" else self.mechanism

    @property
    def rate(self) -> float:
        """Bias of each registered client's coin."""
        return (self.cohort or 0) / (self.population or 1)

    @property
    def counts(self) -> list[int]:
        """Participations to show."""
        if self.participations is None:
            return [count for count in (1, 2, 4) if self.rounds is None or count <= self.rounds]
        try:
            counts = sorted({int(part) for part in self.participations.split(",")})
        except ValueError:
            raise Refused(f"--participations must be whole numbers such as 1,2,4, got {self.participations[:40]}") from None
        most = 1_000_000 if self.rounds is None else self.rounds
        if not 1 <= counts[0] <= counts[-1] <= most:
            raise Refused(
                f"--participations must lie between 1 and {'--rounds ' if self.rounds else ''}{most}, got {self.participations}"
            )
        return counts

    def event(self, noise: float, *, amplified: bool = False) -> Event:
        """One round's event, for a client that takes part."""
        from fedcore.privacy.events import DpSgd, GaussianRelease, SkellamRelease, check_number

        if self.kind == "example":
            return DpSgd(noise, self.batches or 0, self.epochs)
        if self.kind == "gaussian":
            return GaussianRelease(noise, self.rate if amplified else None)
        check_number("noise multiplier", noise, 0.01, 1e5)
        mu = check_number("--mu", _LARGE_MU if self.mu is None else self.mu, 1e-3, 1e18)
        l2 = math.sqrt(mu) / noise
        dimension = check_number("--dimension", self.dimension or 2**53, 1, 2**53, whole=True)
        return SkellamRelease(noise, l2, min(math.sqrt(dimension) * l2, l2**2), mu)

    def _need(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None or not 1 <= value <= 10**12:
                got = "it is missing" if value is None else f"got {value}"
                raise Refused(f"--{name} must be given for unit {self.unit}, a whole number from 1; {got}")


@app.command()
def epsilon(
    noise: Annotated[float, typer.Option(help="Noise multiplier: standard deviation over the clipping norm.")],
    delta: Delta, unit: Unit = "client", mechanism: Mechanism = "gaussian", population: Population = None, cohort: Cohort = None,
    rounds: Rounds = None, batches: Batches = None, epochs: Epochs = 1, participations: Participations = None, mu: Mu = None,
    dimension: Dimension = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What a plan costs: epsilon of the published models, cross-checked, and towards someone who knows who took part."""
    with clear_errors():
        plan = Plan(unit, mechanism, population, cohort, rounds, batches, epochs, delta, participations, mu, dimension)
        found = _cost(plan, noise)
        if as_json:
            print(json.dumps(found))
        else:
            _print_cost(plan, found)


@app.command(name="noise")
def find_noise(
    target_epsilon: Annotated[float, typer.Option(help="Epsilon that must not be exceeded.")],
    delta: Delta, unit: Unit = "client", mechanism: Mechanism = "gaussian", population: Population = None, cohort: Cohort = None,
    rounds: Rounds = None, batches: Batches = None, epochs: Epochs = 1, participations: Participations = None, mu: Mu = None,
    dimension: Dimension = None,
    view: Annotated[str, typer.Option(help="released, or coordinator: the largest of --participations counts.")] = "released",
    as_json: Json = False,
) -> None:  # fmt: skip
    """The smallest noise multiplier (4 digits, rounded up) whose epsilon stays within a target, and what it reaches."""
    with clear_errors():
        from fedcore.privacy.accountant import epsilon as cost
        from fedcore.privacy.accountant import solve_noise

        if view not in {"released", "coordinator"}:
            raise Refused(f"--view must be released or coordinator, got {view}")
        plan = Plan(unit, mechanism, population, cohort, rounds, batches, epochs, delta, participations, mu, dimension)
        amplified = plan.kind == "gaussian" and view == "released"
        if not amplified and plan.kind != "example" and participations is None:
            raise Refused("--participations must be given where no amplification counts: the most rounds one client takes part in")
        times = (rounds or 1) if amplified or plan.kind == "example" else plan.counts[-1]
        event = partial(plan.event, amplified=amplified)
        found = solve_noise(event, times, target_epsilon, delta)
        reached = cost({event(found): times}, delta)
        answer = {"noise_multiplier": found, "epsilon": reached, "target_epsilon": target_epsilon, "view": view}
        report = _cost(plan, found)
        if as_json:
            print(json.dumps({**answer, **report}))
        else:
            _print(Text(f"noise multiplier {found:g}", "bold"), f"epsilon {reached:.4g} of at most {target_epsilon:g}\n")
            _print_cost(plan, report)


@app.command()
def ledger(
    where: Annotated[str, typer.Argument(help="A run directory, a ledger file or a Redis URL.", metavar="DIR")],
    delta: Annotated[float | None, typer.Option(help="Another delta than the one recorded with the charges.")] = None,
    as_json: Json = False,
) -> None:
    """What a ledger has spent, for each unit: published models and coordinator's view side by side, and what they assume."""
    with clear_errors():
        from fedcore.privacy.ledger import UNITS, Ledger
        from fedcore.state.stores import open_ledger

        store = open_ledger(_ledger_of(where), write=False)
        try:
            held = Ledger(store)
            spendings = [spending for unit in UNITS if (spending := held.spending(unit, delta))]
        finally:
            store.close()
        if as_json:
            units = {one.unit: {name: value for name, value in asdict(one).items() if name != "unit"} for one in spendings}
            print(json.dumps({"population": held.population, "units": units}))
            return
        _print(f"Privacy ledger of population {held.population}" if spendings else "The ledger is empty: nothing was charged.")
        for one in spendings:
            _print_spending(one)


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="The file to make; an existing one is never touched.", metavar="FILE")],
) -> None:
    """Make a secret key for simulated runs whose model is published: their noise and coins then derive from it, not from the seed.

    Keep it apart from what you publish, and as long as a run may be resumed.
    """
    with clear_errors():
        from fedcore.coordinator.key import make_key

        make_key(file)
        print(f"made {file}, mode 600; name it in the scenario as privacy.key, relative to the scenario's folder")


def _ledger_of(where: str) -> str | Path:
    """The ledger at ``where``, or that of the run whose directory it is."""
    from fedcore.config import load_config
    from fedcore.state.stores import LEDGER_FILE

    directory = Path(where)
    if not (directory / "config.toml").is_file() or (directory / LEDGER_FILE).exists():
        return where
    config = load_config(directory / "config.toml")
    places = [one.ledger for one in config.privacy if one.ledger]
    if not places:
        return where
    return places[0] if "://" in places[0] else config.folder / places[0]


def _cost(plan: Plan, noise: float) -> dict[str, Any]:
    """The numbers of one plan, as the JSON object."""
    from fedcore.privacy.accountant import counted_by_draws, epsilon, gaussian_approximation, prv_epsilon, rdp_epsilon
    from fedcore.privacy.statement import statement

    found: dict[str, Any] = {"unit": plan.unit, "mechanism": plan.mechanism, "noise": noise, "delta": plan.delta}
    own = plan.event(noise)
    if plan.kind == "skellam":
        found["skellam"] = {str(count): epsilon({own: count}, plan.delta) for count in plan.counts}
        found["approximation"] = {str(count): gaussian_approximation({own: count}, plan.delta) for count in plan.counts}
        return found
    if plan.kind == "gaussian":
        found["sampling_rate"] = plan.rate
    events = {plan.event(noise, amplified=True): plan.rounds or 0}
    for name, function in (("pld", epsilon), ("prv", prv_epsilon), ("rdp", rdp_epsilon)):
        found[name] = function(events, plan.delta)
    if counted_by_draws(events, plan.delta):
        found["bound"] = statement(events).bound
    counts = plan.counts if plan.kind == "gaussian" else sorted({*plan.counts, plan.rounds or 0})
    return {**found, "rounds": plan.rounds, "coordinator": {str(count): epsilon({own: count}, plan.delta) for count in counts}}


def _print_cost(plan: Plan, found: dict[str, Any]) -> None:
    from fedcore.privacy.statement import statement

    names = {
        "example": "DP-SGD on the device",
        "gaussian": "Gaussian noise by the coordinator",
        "skellam": "Skellam noise by the clients",
    }
    _print(Text(f"unit {plan.unit}: {names[plan.kind]}", "bold"), f"noise multiplier {found['noise']:g}, delta {plan.delta:g}", "")
    words = statement([plan.event(found["noise"], amplified=True)])
    if plan.kind == "skellam":
        certified, like = found["skellam"], found["approximation"]
        head: tuple[str, ...] = ("rounds a client takes part in", "epsilon (certified)", "Gaussian, approximation")
        _print(_table(head, [[count, _shown(certified[count]), _shown(like[count])] for count in certified]), "")
    else:
        each = f"sampling rate {plan.rate:g}" if plan.kind == "gaussian" else f"{plan.epochs} x {plan.batches} batches each"
        checked = (
            ("by draws: an upper bound" if "bound" in found else "PLD: the number to use", "pld"),
            ("PRV: cross-check, up to 0.01 above", "prv"),
            ("RDP: cross-check, looser", "rdp"),
        )
        head = (f"published models, {plan.rounds} rounds, {each}", "epsilon")
        _print(_table(head, [[name, _shown(found[key])] for name, key in checked]), "")
        _paragraph("computed", *[found[key] for key in ("bound",) if key in found])
        _paragraph("assumes", words.released)
        head = ("coordinator's view, rounds a client takes part in", "epsilon")
        _print("", _table(head, [[count, _shown(value)] for count, value in found["coordinator"].items()]), "")
    _paragraph("assumes", words.coordinator)
    _paragraph("protects", words.adjacency)
    _paragraph("but", *words.not_concluded)


def _print_spending(one: Spending) -> None:
    _print("", Text(f"unit {one.unit}", "bold"), f"epsilon of the worst-off {one.unit}, at delta {one.delta:g}", "")
    table = Table("published models", "coordinator's view", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_row(_shown(one.released), _shown(one.coordinator))
    table.add_row(one.statement.released, one.statement.coordinator)
    _print(table, "")
    runs = f"{one.runs} run{'s' if one.runs > 1 else ''}"
    facts = f"releases: {one.releases}, rounds: {one.rounds}, in {runs}; clients that took part: {one.clients}"
    _paragraph("facts", f"{facts}, none more often than {one.participations} times")
    _paragraph("protects", one.statement.adjacency)
    _paragraph("computed", one.statement.bound)
    _paragraph("but", *one.statement.not_concluded)


def _shown(value: float | None) -> str:
    return "not computed, too large" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(head[0], box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _paragraph(name: str, *texts: str) -> None:
    for text in texts:
        filled = textwrap.fill(text, _WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10)
        _print(Text.assemble((filled[:10], "bold"), filled[10:]))


def _print(*parts: Any) -> None:
    console = Console(markup=False, highlight=False)
    console.width = min(_WIDTH, console.width) if console.is_terminal else _WIDTH
    console.print(Group(*parts))
