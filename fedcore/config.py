"""The scenario: nested frozen dataclasses read from TOML, validated once, unknown keys refused.

A section is a dataclass, a key is a field; a field's metadata says what is allowed and what it means, and is the
single source for validation, for ``fedcore config`` and for error messages.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from fedcore.errors import Refused

__all__ = [
    "MEANS", "TIERS", "AsynchronousConfig", "CheckpointConfig", "CohortConfig", "DataConfig", "EngineConfig", "EvaluationConfig",
    "FleetConfig", "ModelConfig", "PrivacyConfig", "QuantizationConfig", "ReleaseConfig", "RunConfig", "RunSection", "SecAggConfig",
    "StrategyConfig", "TierConfig", "TrainingConfig", "WireConfig", "describe", "load_config", "parse_config", "share_of",
]  # fmt: skip

DATASETS = ("digits", "fashion-mnist", "smartwatch")
MODELS = ("mlp", "cnn", "lenet", "dscnn", "imu_cnn")
MEANS = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
"""Strategies of Flower that need only the mean of what clients send."""
STRATEGY_NAMES = (*MEANS, "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg")
DRAWN_HERE = frozenset(("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"))


_OF_CLIENTS = (
    "sampling", "adaptive_quantile", "adaptive_rate", "adaptive_noise", "loss_cap", "weight_cap", "max_participations",
    "min_separation",
)  # fmt: skip
_OF_SHARES = ("minimum_survivors", "corrupt_fraction")
_MEANINGLESS = {
    ("example", "gaussian"): (*_OF_CLIENTS, *_OF_SHARES),
    ("example", "skellam"): ("mechanism",),
    ("client", "gaussian"): _OF_SHARES,
}
"""Keys of [privacy] that a unit's mechanism does not have."""


def _key(
    default: Any, text: str, *, low: float | None = None, above: float | None = None, high: float | None = None,
    choices: Sequence[str] = (), named: Sequence[str] = (), reference: str = "",
) -> Any:  # fmt: skip
    """A field with its rule: ``low <= value <= high``, ``value > above``, one of ``choices``; or one of ``named`` or a
    ``module:attribute`` where ``reference`` says what it should be."""
    rule = {"help": text, "low": low, "above": above, "high": high, "choices": choices, "named": named, "reference": reference}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=rule)
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class RunSection:
    """[run]"""

    name: str = _key("", "name of the run; the scenario's file name when empty")
    seed: int = _key(0, "seeds everything: partition, initial model, cohorts, data order", low=0, high=2**31 - 1)
    rounds: int = _key(20, "rounds to run", low=1)


@dataclass(frozen=True)
class DataConfig:
    """[data]"""

    dataset: str = _key(
        "digits", "data set; flower:NAME asks Flower Datasets (needs a network)",
        named=(*DATASETS, "flower:NAME"), reference="function",
    )  # fmt: skip
    path: str = _key("", "directory of the data set's files, where it has any (IDX files for fashion-mnist)")
    params: dict[str, Any] = _key({}, "keyword arguments of a data set of your own")
    partition: str = _key(
        "dirichlet", "how examples are dealt to clients", choices=("iid", "dirichlet", "labels", "natural", "quantity")
    )
    clients: int = _key(0, "number of clients; 0 = one per natural owner", low=0)
    alpha: float = _key(0.5, "concentration of the Dirichlet distribution (dirichlet, quantity)", above=0)
    labels_per_client: int = _key(2, "distinct labels a client holds (labels)", low=1)
    min_examples: int = _key(2, "no client holds fewer examples than this; a partition that cannot keep it is refused", low=1)
    test_fraction: float = _key(0.2, "share kept for the coordinator's test where the set has no test part", above=0, high=0.9)
    calibration: int = _key(128, "examples kept by the coordinator to calibrate activation ranges; no client holds them", low=1)
    holdout: float = _key(0.0, "share of each client's examples kept on the client for federated evaluation", low=0, high=0.9)


@dataclass(frozen=True)
class ModelConfig:
    """[model]"""

    name: str = _key("cnn", "model of the zoo, or your own torch.nn.Module", named=MODELS, reference="Class")
    params: dict[str, Any] = _key({}, "keyword arguments of the model")
    init: str = _key("", "safetensors file with initial parameters (relative to the scenario)")
    trainable: tuple[str, ...] = _key(("*",), "patterns of parameter names that train and travel; the rest is frozen", low=1)


@dataclass(frozen=True)
class QuantizationConfig:
    """[quantization]"""

    enabled: bool = _key(True, "train quantization-aware and send int8 weights; false = fp32 everywhere")
    calibrate_round: int = _key(
        1, "round before which activation ranges are measured on the coordinator's data and frozen; "
        "a model that starts from random weights wants a few rounds first", low=1,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """[training]"""

    epochs: int = _key(1, "local epochs a round", low=1)
    batch_size: int = _key(16, "local batch size; the last batch of an epoch may be smaller", low=1)
    lr: float = _key(0.05, "learning rate of local SGD", above=0)
    lr_decay: float = _key(1.0, "factor on the learning rate from one round to the next", above=0, high=1)
    momentum: float = _key(0.0, "momentum of local SGD (its buffer starts at zero each round)", low=0, high=0.9999)
    weight_decay: float = _key(0.0, "L2 penalty of local SGD", low=0)
    max_update_norm: float = _key(
        0.0,
        "an update with a larger L2 norm is dropped as exploded; 0 = 10 x max(1, norm of the master), no limit with [privacy]",
        low=0,
    )


@dataclass(frozen=True)
class StrategyConfig:
    """[strategy]"""

    name: str = _key("fedavg", "aggregation strategy: a short name (fedcore doctor lists them) or your own class",
                     named=STRATEGY_NAMES, reference="Class")  # fmt: skip
    params: dict[str, Any] = _key({}, "keyword arguments of the strategy")


@dataclass(frozen=True)
class CohortConfig:
    """[cohort]"""

    size: int = _key(0, "clients that train in a round; 0 = all", low=0)
    evaluate_size: int = _key(0, "clients that evaluate in a federated evaluation; 0 = all", low=0)
    dropout: float = _key(0.0, "share of simulated clients that vanish in a round, at a random step of it", low=0, high=0.9)
    timeout: float = _key(3600.0, "seconds to wait for the replies of a round before it fails", above=0, high=1e6)
    attempts: int = _key(3, "times that a round with real clients is tried before the run ends", low=1, high=100)


@dataclass(frozen=True)
class AsynchronousConfig:
    """[asynchronous]: buffered asynchronous rounds (FedBuff); cohort.size has no meaning with them"""

    buffer: int = _key(0, "updates to a server step, which counts as a round; 0 = synchronous rounds", low=0)
    concurrency: int = _key(0, "clients that train at once; 0 = ten buffers, or all clients where that is fewer", low=0)
    staleness_exponent: float = _key(
        0.5, "an update that began a steps ago weighs 1 / (1 + a)^exponent; 0 = all ages alike", low=0, high=10
    )
    max_staleness: int = _key(20, "an update that began more steps ago is discarded (devices: refused as late)", low=0, high=10_000)

    def at_once(self, population: int) -> int:
        """Clients that train at once, of ``population``."""
        return self.concurrency or min(10 * self.buffer, population)


@dataclass(frozen=True)
class FleetConfig:
    """[fleet]: how fast simulated clients are, on a virtual clock"""

    median_seconds: float = _key(0.0, "virtual seconds of a typical client's work; 0 = no virtual clock", low=0, high=1e9)
    spread: float = _key(0.5, "standard deviation of the logarithm of clients' times", low=0, high=5)
    jitter: float = _key(0.1, "the same of one client's times from one task to the next", low=0, high=5)
    slow_share: float = _key(0.0, "share of the clients that are slower", low=0, high=1)
    slow_factor: float = _key(10.0, "how many times as long those take", low=1, high=1e6)
    over_selection: float = _key(
        1.0, "clients asked in a synchronous round, as a multiple of cohort.size; it ends when that many are done", low=1, high=10
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """[evaluation]"""

    every: int = _key(1, "rounds between central evaluations on the test part; 0 = only after the last round", low=0)
    federated_every: int = _key(0, "rounds between federated evaluations on the clients; 0 = never", low=0)


@dataclass(frozen=True)
class WireConfig:
    """[wire]"""

    update: str = _key("float32", "encoding of the update a client sends; int8 rounds stochastically", choices=("float32", "int8"))


@dataclass(frozen=True)
class PrivacyConfig:
    """[privacy], or one [[privacy]] for each unit"""

    unit: str = _key("", "what is protected: one training example of a client, or a client with all it holds",
                     choices=("example", "client"))  # fmt: skip
    mechanism: str = _key(
        "gaussian", "gaussian: noise on the device in each step (example), or on the sum by a trusted coordinator (client); "
        "skellam: every client adds its share before the sum (client)", choices=("gaussian", "skellam"),
    )  # fmt: skip
    clipping_norm: float = _key(1.0, "L2 norm to which an example's gradient or a client's update is clipped", low=1e-6, high=1e6)
    noise_multiplier: float = _key(
        0.0, "standard deviation of the noise in clipping norms; 0 = solved for target_epsilon", low=0, high=1e4
    )
    target_epsilon: float = _key(
        0.0, "epsilon of the whole run, for which the noise is solved; 0 = noise_multiplier is given", low=0
    )
    delta: float = _key(0.0, "delta of the guarantee; well below one over the number of units protected", low=0, high=0.1)
    budget: float = _key(0.0, "epsilon that the run ends before overspending; 0 = target_epsilon, or no limit", low=0)
    sampling: str = _key(
        "fixed", "how a cohort is drawn (client): fixed size, or poisson: one secret coin per client, which amplifies",
        choices=("fixed", "poisson"),
    )  # fmt: skip
    adaptive_quantile: float = _key(
        0.0, "clipping norm follows this quantile of the clients' update norms (client); 0 = fixed", low=0, high=0.99
    )
    adaptive_rate: float = _key(0.2, "learning rate of the adaptive clipping norm, per round", above=0, high=2)
    adaptive_noise: float = _key(
        0.0, "standard deviation of the noise on the count of unclipped clients; 0 = cohort.size / 20, at least noise_multiplier",
        low=0, high=1e6,
    )  # fmt: skip
    loss_cap: float = _key(
        0.0, "training loss, clipped to this, is released inside the noised vector (client); 0 = withheld", low=0
    )
    weight_cap: int = _key(0, "a client of n examples weighs min(n, cap) / cap, before clipping (client); 0 = 1", low=0)
    minimum_survivors: int = _key(0, "replies for which the noise is sized (skellam); fewer fail the round; 0 = cohort.size", low=0)
    corrupt_fraction: float = _key(0.0, "share of a cohort that may add no noise (skellam)", low=0, high=0.9)
    max_participations: int = _key(0, "rounds of a population in which a client takes part at most (client); 0 = no cap", low=0)
    min_separation: int = _key(1, "rounds from one participation of a client to its next (client)", low=1)
    ledger: str = _key("", "ledger shared by runs over one population: a file, or redis://HOST:PORT/DB?population=NAME "
                       "(its password in the environment, FEDCORE_LEDGER_PASSWORD); empty = the run's own")  # fmt: skip
    key: str = _key(
        "", "file of a secret key (fedcore privacy key FILE), relative to the scenario; a simulation whose model is published "
        "derives noise and coins from it; both units share it; empty = from run.seed, which stands in the run's files",
    )  # fmt: skip


@dataclass(frozen=True)
class SecAggConfig:
    """[secagg]"""

    enabled: bool = _key(False, "secure aggregation: the coordinator sees nothing but the sum of a cohort's contributions")
    simulate: str = _key(
        "protocol", "protocol: simulated clients mask what they send; arithmetic: the same integers are added unmasked, for large "
        "cohorts, with the same bits", choices=("protocol", "arithmetic"),
    )  # fmt: skip
    operators: tuple[str, ...] = _key(
        (), "HOST:PORT of the committee's members, in the order of the trust bundle; empty = a committee in this process, which "
        "separates no trust"
    )  # fmt: skip
    operator_fingerprints: tuple[str, ...] = _key((), "SHA-256 of the operators' TLS certificates, in the same order")
    credentials: str = _key("", "directory of the coordinator's own TLS key, for operators that demand one")
    trust: str = _key("", "file of the trust bundle (operators)")
    trust_key: str = _key("", "file of the public key that signs trust bundles (operators)")
    enrolment: str = _key("", "directory of the enrolment key, with which simulated clients are enrolled (operators)")
    members: int = _key(3, "members of a committee in this process", low=1, high=255)
    threshold: int = _key(3, "members that must agree (committee in this process); 2 threshold > members + corrupt_members",
                          low=1, high=255)  # fmt: skip
    corrupt_members: int = _key(2, "members that may be corrupt (committee in this process), fewer than threshold", low=0, high=254)
    corrupt_fraction: float = _key(
        0.0, "share of a sum's clients that may be corrupt; with skellam privacy.corrupt_fraction says it", low=0, high=0.9
    )
    minimum_survivors: int = _key(
        0, "uploads without which a sum is not made; 0 = half of its clients; with skellam privacy.minimum_survivors says it", low=0
    )
    neighbours: int = _key(0, "clients with whom each one masks; 0 = the fewest that are safe, all up to 128 clients", low=0)
    expected_dropout: float = _key(0.1, "share of clients for whose absence neighbours are chosen", low=0, high=0.9)
    clip: float = _key(1.0, "an update's coordinates are clipped to [-clip, clip] (without unit client)", low=1e-9, high=1e9)
    weight_cap: int = _key(
        0,
        "a client weighs min(its examples, cap) (without unit client); 0 = the largest client of the partition",
        low=0,
        high=2**20,
    )
    bits: int = _key(0, "width of a coordinate of the sum: 16, 20, 24, 32; 0 = automatic (without unit client)", low=0, high=32)
    shards: int = _key(
        1, "parts of a cohort that are summed each for itself, for strategies that compare replies", low=1, high=1024
    )


@dataclass(frozen=True)
class EngineConfig:
    """[engine]"""

    name: str = _key("auto", "local training engine; auto decides by device and model, and is recorded",
                     choices=("auto", "native", "loop", "vmap"))  # fmt: skip
    device: str = _key("auto", "where local training runs", choices=("auto", "cpu", "cuda"))
    workers: int = _key(0, "worker processes; 0 = one per core. Results do not depend on it", low=0, high=1024)


@dataclass(frozen=True)
class CheckpointConfig:
    """[checkpoint]"""

    every: int = _key(1, "rounds between commits; a crash loses at most the rounds since the last one", low=1)
    keep: int = _key(2, "committed models kept on disk", low=1, high=1_000_000)


@dataclass(frozen=True)
class ReleaseConfig:
    """[release]"""

    registry: str = _key(
        "", "repository that the coordinator publishes to by itself, a directory or URL (fedcore registry init "
        "--publish-by-itself); empty = it publishes nothing",
    )  # fmt: skip
    keys: str = _key("", "directory of the repository's online keys, that of its releases among them")
    model: str = _key("", "name of the model there; empty = run.name")
    every: int = _key(0, "rounds between releases; 0 = only after the last round", low=0)
    tiers: tuple[str, ...] = _key((), "tiers that are released; empty = all of [tiers], or the flagship")
    canary: str = _key("5%", "share of the fleet that gets a release first")
    stages: tuple[str, ...] = _key(("20%", "50%"), "shares of the fleet after the canary; what is left follows at the end")
    control: str = _key("40%", "share of the fleet that keeps the release before until the last stage is over")
    window: float = _key(86_400.0, "seconds after which what a device reported becomes its vote", above=0)
    corrupt: str = _key("5%", "share of devices that may lie without starting or hiding an abort")
    budgets: dict[str, Any] = _key({}, "amounts that a release may not take on more than a quarter of its canary, as {p95_ms = 50}")
    self_test: int = _key(64, "test examples that go into a release, for devices to try it with: they become public", low=0)
    deltas: int = _key(1, "earlier releases from which a delta leads to a new one", low=0, high=16)
    rollback: bool = _key(True, "take a release back by itself once its rollout is aborted")

    def shares(self) -> tuple[float, ...]:
        """The canary and the stages after it."""
        return tuple(share_of(one) for one in (self.canary, *self.stages))


@dataclass(frozen=True)
class TierConfig:
    """[tiers.NAME]: a class of devices, how the model is compressed for it, and what it may cost there"""

    targets: tuple[str, ...] = _key((), "runtimes to export for (fedcore export --help lists them); empty = all")
    prune: float = _key(0.0, "share of each layer's channels to remove before the rest is distilled", low=0, high=0.9)
    epochs: int = _key(60, "epochs of distillation on the coordinator's calibration examples, after pruning or for 4 bits", low=0)
    weight_bits: int = _key(8, "bits of a weight: 8, or 4 (stored in four by litert, in convolutions by micro)", low=4, high=8)
    accuracy_loss: float = _key(0.5, "points of accuracy that may be lost against the fp32 master", low=0, high=100)
    bytes: int = _key(0, "size of the artefact; 0 = any", low=0)
    memory_bytes: int = _key(2_000_000_000, "memory of the process that runs it; 0 = any", low=0)
    arena_bytes: int = _key(0, "memory for tensors on a microcontroller; 0 = any", low=0)
    latency_ms: float = _key(100.0, "median milliseconds of one example; 0 = any", low=0)
    p95_ms: float = _key(0.0, "95th percentile of the milliseconds of one example; 0 = any", low=0)
    threads: int = _key(1, "threads that one example may use", low=1, high=256)


TIERS = {
    "flagship": TierConfig(),
    "entry": TierConfig(prune=0.5, accuracy_loss=2.0, bytes=5_000_000, memory_bytes=500_000_000),
    "wearable": TierConfig(
        targets=("litert", "micro"), prune=0.5, accuracy_loss=2.0, bytes=5_000_000, arena_bytes=100_000, memory_bytes=500_000_000
    ),
}
"""Defaults of the tiers known by name; another name begins as flagship does."""


@dataclass(frozen=True)
class RunConfig:
    """A whole scenario. ``folder`` is where relative paths and the user's own modules are looked up first."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    cohort: CohortConfig = CohortConfig()
    asynchronous: AsynchronousConfig = AsynchronousConfig()
    fleet: FleetConfig = FleetConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wire: WireConfig = WireConfig()
    privacy: tuple[PrivacyConfig, ...] = ()
    secagg: SecAggConfig = SecAggConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    release: ReleaseConfig = ReleaseConfig()
    tiers: Mapping[str, TierConfig] = field(default_factory=dict)
    folder: Path = Path()

    def unit_privacy(self, unit: str) -> PrivacyConfig | None:
        """What [privacy] says for a unit, or None."""
        return next((one for one in self.privacy if one.unit == unit), None)

    def tables(self) -> dict[str, Any]:
        """The scenario as plain TOML tables, every key spelled out; [[privacy]] and [tiers] only where there are any."""
        values = {section.name: getattr(self, section.name) for section in _sections()}
        tables = {name: dataclasses.asdict(value) for name, value in values.items() if name not in ("privacy", "tiers")}
        listed = {"privacy": [dataclasses.asdict(one) for one in self.privacy]} if self.privacy else {}
        tiers = {"tiers": {name: dataclasses.asdict(tier) for name, tier in self.tiers.items()}} if self.tiers else {}
        return tables | listed | tiers

    def key_file(self) -> Path | None:
        """The file of ``privacy.key``, or None where noise and coins of a simulation derive from the seed."""
        return next((self.folder / one.key for one in self.privacy if one.key), None)

    def settings(self) -> dict[str, dict[str, Any]]:
        """The scenario's keys by section, the privacy of a unit as section ``privacy.UNIT``; without the tiers and releases, on
        which no round depends."""
        tables = self.tables()
        tables.pop("tiers", None)
        tables.pop("release")
        units = {f"privacy.{table['unit']}": table for table in tables.pop("privacy", ())}
        return tables | units

    def to_toml(self) -> str:
        """The resolved scenario as TOML text; reading it back gives an equal configuration."""
        return f"folder = {_toml_value(str(self.folder))}\n\n{tomli_w.dumps(self.tables())}"

    def replace(self, section: str, **values: Any) -> RunConfig:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


def share_of(text: str) -> float:
    """A share as people write it: 5%, or 0.05.

    Raises:
        Refused: it is none between 0 and 1.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 <= value <= 1:
        raise Refused(f"{text!r} is no share: write 5% or 0.05")
    return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a scenario; ``overrides`` are ``section.key=value`` with a TOML value.

    Raises:
        Refused: unreadable file, wrong TOML, or a value that the rules do not allow; one line with file, key and rule.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Refused(f"{path}: cannot be read: {reason}") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # wrong TOML, or numbers and nesting that no reader takes
        raise Refused(f"{path}: not valid TOML: {error}") from error
    folder = tables.pop("folder", None)
    if folder is not None and not isinstance(folder, str):
        raise Refused(f"{path}: folder must be a string, got {_show(folder)}")
    source = str(path)
    for override in overrides:
        _apply_override(tables, override)
        source = f"{path} with --set"
    config = parse_config(tables, source, Path(folder) if folder is not None else path.resolve().parent)
    return config if config.run.name else config.replace("run", name=path.stem)


def parse_config(tables: Mapping[str, Any], source: str, folder: Path) -> RunConfig:
    """Validate plain tables (see `load_config`); ``source`` names them in errors."""
    sections = {section.name: section for section in _sections()}
    values: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in sections:
            raise Refused(f"{source}: unknown section [{name}]{_hint(name, sections)}; allowed: {', '.join(sections)}")
        if name == "tiers":
            values[name] = _parse_tiers(table, source)
            continue
        listed = name == "privacy" and isinstance(table, list)
        for one in table if listed else [table]:
            if not isinstance(one, Mapping):
                raise Refused(f"{source}: [{name}] must be a table of keys, got {_show(one)}")
        parsed = [_parse_section(_kind(sections[name]), name, one, source) for one in (table if listed else [table])]
        values[name] = tuple(parsed) if name == "privacy" else parsed[0]
    config = RunConfig(folder=folder, **values)
    for problem in _impossible(config):
        raise Refused(f"{source}: {problem}")
    return config


def describe() -> Iterator[tuple[str, str, str, str, str]]:
    """Every key as (section, key, type and rule, default, meaning), in file order."""
    for section in _sections():
        kind: Any = _kind(section)
        kinds = typing.get_type_hints(kind)
        for key in fields(kind):
            default = key.default if key.default is not dataclasses.MISSING else {}
            name = f"NAME.{key.name}" if section.name == "tiers" else key.name
            yield section.name, name, _allowed(kinds[key.name], key.metadata), _toml_value(default), key.metadata["help"]


def _sections() -> list[dataclasses.Field[Any]]:
    return [section for section in fields(RunConfig) if section.name != "folder"]


def _kind(section: dataclasses.Field[Any]) -> type:
    return {"privacy": PrivacyConfig, "tiers": TierConfig}.get(section.name, type(section.default))


def _parse_tiers(table: Any, source: str) -> dict[str, TierConfig]:
    """[tiers.NAME] by name: what is given, over the defaults of that name."""
    tiers = {}
    for name, given in table.items() if isinstance(table, Mapping) else [("", None)]:
        if not isinstance(given, Mapping) or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
            raise Refused(
                f"{source}: [tiers] must hold tables [tiers.NAME], the name of letters, digits, - and _; got {_show(name)}"
            )
        parsed = _parse_section(TierConfig, f"tiers.{name}", given, source)
        tiers[name] = dataclasses.replace(TIERS.get(name, TierConfig()), **{key: getattr(parsed, key) for key in given})
        if tiers[name].weight_bits not in (4, 8):
            raise Refused(f"{source}: tiers.{name}.weight_bits must be 4 or 8, got {tiers[name].weight_bits}")
    return tiers


def _parse_section(kind: type, name: str, table: Mapping[str, Any], source: str) -> Any:
    keys = {key.name: key for key in fields(kind)}
    kinds = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in keys:
            raise Refused(f"{source}: unknown key {name}.{key}{_hint(key, keys)}; [{name}] allows: {', '.join(keys)}")
        rule = keys[key].metadata
        parsed = _coerce(value, kinds[key])
        if parsed is None or not _permitted(parsed, rule):
            raise Refused(
                f"{source}: {name}.{key} must be {_allowed(kinds[key], rule)}, got {_show(value)}"
                f"{_hint(str(value), (*rule['choices'], *rule['named']))}"
            )
        values[key] = parsed
    return kind(**values)


def _coerce(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or None where it is of another type (an integer is accepted for a float)."""
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if typing.get_origin(kind) is dict:
        return value if isinstance(value, dict) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else None
    if isinstance(value, bool) and kind is not bool:
        return None
    return value if isinstance(value, kind) else None


def _permitted(value: Any, rule: Mapping[str, Any]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if rule["choices"] and value not in rule["choices"]:
        return False
    if rule["named"] and value not in rule["named"]:
        module, colon, attribute = value.partition(":")
        return bool(colon and module and attribute)
    if isinstance(value, tuple):
        return len(value) >= (rule["low"] or 0)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    low, above, high = rule["low"], rule["above"], rule["high"]
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def _allowed(kind: Any, rule: Mapping[str, Any]) -> str:
    if rule["choices"]:
        return "one of " + ", ".join(rule["choices"])
    if rule["named"]:
        return "one of " + ", ".join(rule["named"]) + f" or module:{rule['reference']}"
    origin = typing.get_origin(kind)
    name = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        tuple: "a list of strings" + (" of length" if rule["low"] else ""),
        dict: "a table",
    }[origin or kind]
    limits = [f">= {rule['low']}"] if rule["low"] is not None else []
    limits += [f"> {rule['above']}"] if rule["above"] is not None else []
    limits += [f"<= {rule['high']}"] if rule["high"] is not None else []
    return " ".join([name, " and ".join(limits)]).strip()


def _impossible(config: RunConfig) -> Iterator[str]:
    """Combinations that no single key's rule can see."""
    if not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}|", config.run.name):
        allowed = "at most 100 characters without slashes and with no leading dot, since it names a directory"
        yield f"run.name must be {allowed}; got {_show(config.run.name)}"
    if config.data.clients == 0 and config.data.partition != "natural":
        yield f'data.clients must be >= 1 with data.partition = "{config.data.partition}" (0 is for "natural")'
    if config.data.clients and config.cohort.size > config.data.clients:
        yield f"cohort.size = {config.cohort.size} is more than data.clients = {config.data.clients}"
    if config.data.clients and config.cohort.evaluate_size > config.data.clients:
        yield f"cohort.evaluate_size = {config.cohort.evaluate_size} is more than data.clients = {config.data.clients}"
    if config.evaluation.federated_every and config.data.holdout == 0:
        yield "evaluation.federated_every needs data.holdout > 0: clients evaluate on examples they do not train on"
    if config.quantization.enabled and config.quantization.calibrate_round > config.run.rounds:
        yield (
            f"quantization.calibrate_round = {config.quantization.calibrate_round} is after the last round "
            f"(run.rounds = {config.run.rounds}): activations would never be quantized"
        )
    if config.engine.name == "loop" and config.engine.device == "cuda" and config.engine.workers > 1:
        yield 'engine.name = "loop" on cuda runs in one process: set engine.workers = 1, or use "vmap"'
    yield from _impossible_privacy(config)
    yield from _impossible_secagg(config.secagg)
    yield from _impossible_release(config.release)
    yield from _impossible_asynchronous(config)
    for key in sorted(DRAWN_HERE & set(config.strategy.params)):
        yield f"strategy.params.{key} cannot be set: fedcore draws the cohort; use cohort.size or cohort.evaluate_size"


def _impossible_asynchronous(config: RunConfig) -> Iterator[str]:
    """What buffered asynchronous rounds, and the times of a virtual fleet, cannot go with."""
    one, fleet, population = config.asynchronous, config.fleet, config.data.clients
    if not one.buffer:
        if one != AsynchronousConfig():
            yield "[asynchronous] has no meaning without asynchronous.buffer >= 1"
        if fleet.over_selection > 1 and not (fleet.median_seconds and config.cohort.size):
            yield "fleet.over_selection > 1 needs fleet.median_seconds > 0 and a cohort.size: it does not wait for the slowest"
        if fleet.over_selection > 1 and (config.privacy or config.secagg.enabled):
            yield "fleet.over_selection > 1 cannot be simulated with [privacy] or [secagg], whose rounds are made for who was drawn"
        return
    for key in ("buffer", "concurrency"):
        if population and getattr(one, key) > population:
            yield f"asynchronous.{key} = {getattr(one, key)} is more than data.clients = {population}"
    if config.secagg.enabled:
        yield "[asynchronous] cannot go with [secagg]: masks cancel in the sum of a cohort, and updates that come singly have none"
    if config.unit_privacy("client"):
        yield (
            "[asynchronous] cannot go with [privacy] of unit client: its noise and amplification are defined for the sum of a "
            'round\'s cohort; unit = "example" can, or leave [asynchronous] out'
        )
    if config.strategy.name in STRATEGY_NAMES and config.strategy.name not in MEANS:
        yield (
            f"[asynchronous] gives the strategy one weighted mean, which {config.strategy.name} cannot use; it takes "
            f"{', '.join(MEANS)}, or a class with accepts_mean = True"
        )
    if config.cohort.size or fleet.over_selection > 1:
        yield "cohort.size and fleet.over_selection are of synchronous rounds: [asynchronous] has buffer and concurrency"
    if config.checkpoint.every > 1:
        yield "checkpoint.every must be 1 with [asynchronous]: a version of the model is committed before anybody is given it"


def _impossible_privacy(config: RunConfig) -> Iterator[str]:
    """What the keys of [privacy] say against each other; `coordinator.privacy` refuses what would void the guarantee."""
    for one in config.privacy:
        if not one.unit:
            yield 'privacy.unit must be given: "example" or "client"'
        if bool(one.noise_multiplier) == bool(one.target_epsilon):
            yield f"[privacy] of unit {one.unit}: give either noise_multiplier or target_epsilon"
        if not one.delta:
            yield f"[privacy] of unit {one.unit}: delta must be given, well below one over the number of {one.unit}s"
        if "://" in one.ledger and "@" in one.ledger:
            yield "privacy.ledger: a scenario is no place for a password; put it into the environment as FEDCORE_LEDGER_PASSWORD"
        if not one.adaptive_quantile and (one.adaptive_noise or one.adaptive_rate != PrivacyConfig().adaptive_rate):
            yield "privacy.adaptive_rate and adaptive_noise have no meaning without adaptive_quantile"
        if config.checkpoint.every > 1:
            yield "checkpoint.every must be 1 with [privacy]: a round that is charged is committed"
        usual = PrivacyConfig()
        for key in _MEANINGLESS.get((one.unit, one.mechanism), ()):
            if getattr(one, key) != getattr(usual, key):
                yield f'privacy.{key} has no meaning with unit = "{one.unit}", mechanism = "{one.mechanism}"'
    if len({one.unit for one in config.privacy}) < len(config.privacy):
        yield "[[privacy]]: each unit may be given once"
    if len(keys := {(config.folder / one.key).resolve() for one in config.privacy if one.key}) > 1:
        yield f"[[privacy]]: both units share one key, privacy.key names {' and '.join(sorted(map(str, keys)))}"


def _impossible_release(release: ReleaseConfig) -> Iterator[str]:
    """What the keys of [release] say against each other."""
    changed = {key.name for key in fields(release) if getattr(release, key.name) != getattr(ReleaseConfig(), key.name)}
    if changed and not release.registry:
        yield f"release.{min(changed)} has no meaning without release.registry"
    if release.registry and not release.keys:
        yield "release.keys must be given with release.registry: what is published is signed"
    for key in ("canary", "stages", "control", "corrupt"):
        value = getattr(release, key)
        for text in value if isinstance(value, tuple) else (value,):
            try:
                share_of(text)
            except Refused as error:
                yield f"release.{key}: {error}"
                return
    shares = release.shares()
    if not (shares[0] > 0 and all(a < b for a, b in itertools.pairwise(shares))):
        yield "release.canary and release.stages must rise, from above 0"
    if not (share_of(release.control) > 0 and shares[-1] + share_of(release.control) <= 1):
        yield "release.control must be above 0, and leave the last of release.stages its share"
    for name, amount in release.budgets.items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount <= 0:
            yield f"release.budgets.{name} must be a number above 0, got {_show(amount)}"


def _impossible_secagg(secagg: SecAggConfig) -> Iterator[str]:
    """What the keys of [secagg] say against each other; `coordinator.secure` refuses what a run cannot keep."""
    usual, local = SecAggConfig(), {"members", "threshold", "corrupt_members"}
    pinned, files = {"trust", "trust_key", "operator_fingerprints"}, {"credentials", "enrolment"}
    changed = {key.name for key in fields(secagg) if getattr(secagg, key.name) != getattr(usual, key.name)} - {"enabled"}
    if changed and not secagg.enabled:
        yield f"secagg.{min(changed)} has no meaning without secagg.enabled = true"
    if secagg.bits not in (0, 16, 20, 24, 32):
        yield f"secagg.bits must be 16, 20, 24, 32, or 0 for automatic, got {secagg.bits}"
    if not secagg.operators:
        yield from (f"secagg.{key} has no meaning without secagg.operators" for key in sorted((pinned | files) & changed))
        m, t, c = secagg.members, secagg.threshold, secagg.corrupt_members
        if not (c < t <= m and 2 * t > m + c):
            yield (
                f"[secagg]: members = {m}, threshold = {t}, corrupt_members = {c} is not safe: it takes "
                "corrupt_members < threshold <= members and 2 threshold > members + corrupt_members"
            )
        return
    if secagg.simulate == "arithmetic":
        yield 'secagg.simulate = "arithmetic" asks no committee: leave secagg.operators out'
    for key in sorted(local & changed):
        yield f"secagg.{key} is for a committee in this process; that of operators stands in the trust bundle, leave it out"
    yield from (f"secagg.{key} must be given with secagg.operators" for key in sorted(pinned - changed))
    if len(secagg.operator_fingerprints) != len(secagg.operators):
        yield "secagg.operator_fingerprints: one for each of secagg.operators"


def _apply_override(tables: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise Refused(f"--set {override}: must look like section.key=value, e.g. --set training.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    table = tables
    for part in parts[:-1]:
        if parts[0] == "privacy" and table.get("unit") == part:
            continue
        found = table.setdefault(part, {})
        table = _unit_table(found, parts[1], override) if isinstance(found, list) else found
        if not isinstance(table, dict):
            raise Refused(f"--set {override}: {part} is a value, not a table")
    table[parts[-1]] = value


def _unit_table(tables: list[Any], unit: str, override: str) -> Any:
    """The table of [[privacy]] that an override means: that of the unit it names, or the only one."""
    units = {one.get("unit"): one for one in tables if isinstance(one, dict)}
    if unit not in units and len(tables) != 1:
        named = ", ".join(str(name) for name in units) or "none yet"
        raise Refused(f"--set {override}: write privacy.UNIT.key with a unit of the scenario: {named}")
    return units.get(unit, tables[0])


def _hint(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _show(value: Any) -> str:
    text = _toml_value(value) if isinstance(value, (str, int, float, bool, list, dict)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
