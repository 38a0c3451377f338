"""The sections of a scenario: a dataclass each, a field for each key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fedcore.config.rules import key
from fedcore.errors import Refused

__all__ = [
    "DATASETS", "DRAWN_HERE", "LOSSES", "MEANS", "MODELS", "STRATEGY_NAMES", "TIERS", "AsynchronousConfig", "CheckpointConfig",
    "CohortConfig", "DataConfig", "EngineConfig", "EvaluationConfig", "FleetConfig", "ModelConfig", "PrivacyConfig",
    "QuantizationConfig", "ReleaseConfig", "RunSection", "SecAggConfig", "StrategyConfig", "TierConfig", "TrainingConfig",
    "WireConfig", "share_of",
]  # fmt: skip

DATASETS = ("digits", "fashion-mnist", "smartwatch")
MODELS = ("mlp", "cnn", "lenet", "dscnn", "imu_cnn")
LOSSES = ("cross_entropy", "squared")
"""Losses of local training, which `training.loss` defines."""
MEANS = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
"""Strategies of Flower that need only the mean of what clients send."""
STRATEGY_NAMES = (*MEANS, "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg")
DRAWN_HERE = frozenset(("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"))


@dataclass(frozen=True)
class RunSection:
    """[run]"""

    name: str = key("", "name of the run; the scenario's file name when empty")
    seed: int = key(0, "seeds everything: partition, initial model, cohorts, data order", low=0, high=2**31 - 1)
    rounds: int = key(20, "rounds to run", low=1)


@dataclass(frozen=True)
class DataConfig:
    """[data]"""

    dataset: str = key(
        "digits", "data set; flower:NAME asks Flower Datasets (needs a network)",
        named=(*DATASETS, "flower:NAME"), reference="function",
    )  # fmt: skip
    path: str = key("", "directory of the data set's files, where it has any (IDX files for fashion-mnist)")
    params: dict[str, Any] = key({}, "keyword arguments of a data set of your own")
    partition: str = key(
        "dirichlet", "how examples are dealt to clients", choices=("iid", "dirichlet", "labels", "natural", "quantity")
    )
    clients: int = key(0, "number of clients; 0 = one per natural owner", low=0)
    alpha: float = key(0.5, "concentration of the Dirichlet distribution (dirichlet, quantity)", above=0)
    labels_per_client: int = key(2, "distinct labels a client holds (labels)", low=1)
    min_examples: int = key(2, "no client holds fewer examples than this; a partition that cannot keep it is refused", low=1)
    test_fraction: float = key(0.2, "share kept for the coordinator's test where the set has no test part", above=0, high=0.9)
    calibration: int = key(128, "examples kept by the coordinator to calibrate activation ranges; no client holds them", low=1)
    holdout: float = key(0.0, "share of each client's examples kept on the client for federated evaluation", low=0, high=0.9)


@dataclass(frozen=True)
class ModelConfig:
    """[model]"""

    name: str = key("cnn", "model of the zoo, or your own torch.nn.Module", named=MODELS, reference="Class")
    params: dict[str, Any] = key({}, "keyword arguments of the model")
    init: str = key("", "safetensors file with initial parameters (relative to the scenario)")
    trainable: tuple[str, ...] = key(("*",), "patterns of parameter names that train and travel; the rest is frozen", low=1)


@dataclass(frozen=True)
class QuantizationConfig:
    """[quantization]"""

    enabled: bool = key(True, "train quantization-aware and send int8 weights; false = fp32 everywhere")
    calibrate_round: int = key(
        1, "round before which activation ranges are measured on the coordinator's data and frozen; "
        "a model that starts from random weights wants a few rounds first", low=1,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """[training]"""

    epochs: int = key(1, "local epochs a round", low=1)
    batch_size: int = key(16, "local batch size; the last batch of an epoch may be smaller", low=1)
    lr: float = key(0.05, "learning rate of local SGD", above=0)
    lr_decay: float = key(1.0, "factor on the learning rate from one round to the next", above=0, high=1)
    momentum: float = key(0.0, "momentum of local SGD (its buffer starts at zero each round)", low=0, high=0.9999)
    weight_decay: float = key(0.0, "L2 penalty of local SGD", low=0)
    loss: str = key(
        "cross_entropy", "what training minimizes and evaluations report; squared: the squared error to one-hot targets, mean over "
        "classes (wants a larger lr)", choices=LOSSES,
    )  # fmt: skip
    max_update_norm: float = key(
        0.0,
        "an update with a larger L2 norm is dropped as exploded; 0 = 10 x max(1, norm of the master), no limit with [privacy]",
        low=0,
    )


@dataclass(frozen=True)
class StrategyConfig:
    """[strategy]"""

    name: str = key("fedavg", "aggregation strategy: a short name (fedcore doctor lists them) or your own class",
                     named=STRATEGY_NAMES, reference="Class")  # fmt: skip
    params: dict[str, Any] = key({}, "keyword arguments of the strategy")


@dataclass(frozen=True)
class CohortConfig:
    """[cohort]"""

    size: int = key(0, "clients that train in a round; 0 = all", low=0)
    evaluate_size: int = key(0, "clients that evaluate in a federated evaluation; 0 = all", low=0)
    dropout: float = key(0.0, "share of simulated clients that vanish in a round, at a random step of it", low=0, high=0.9)
    timeout: float = key(3600.0, "seconds to wait for the replies of a round before it fails", above=0, high=1e6)
    attempts: int = key(3, "times that a round with real clients is tried before the run ends", low=1, high=100)


@dataclass(frozen=True)
class AsynchronousConfig:
    """[asynchronous]: buffered asynchronous rounds (FedBuff); cohort.size has no meaning with them"""

    buffer: int = key(0, "updates to a server step, which counts as a round; 0 = synchronous rounds", low=0)
    concurrency: int = key(0, "clients that train at once; 0 = ten buffers, or all clients where that is fewer", low=0)
    staleness_exponent: float = key(
        0.5, "an update that began a steps ago weighs 1 / (1 + a)^exponent; 0 = all ages alike", low=0, high=10
    )
    max_staleness: int = key(20, "an update that began more steps ago is discarded (devices: refused as late)", low=0, high=10_000)

    def at_once(self, population: int) -> int:
        """Clients that train at once, of ``population``."""
        return self.concurrency or min(10 * self.buffer, population)


@dataclass(frozen=True)
class FleetConfig:
    """[fleet]: how fast simulated clients are, on a virtual clock"""

    median_seconds: float = key(0.0, "virtual seconds of a typical client's work; 0 = no virtual clock", low=0, high=1e9)
    spread: float = key(0.5, "standard deviation of the logarithm of clients' times", low=0, high=5)
    jitter: float = key(0.1, "the same of one client's times from one task to the next", low=0, high=5)
    slow_share: float = key(0.0, "share of the clients that are slower", low=0, high=1)
    slow_factor: float = key(10.0, "how many times as long those take", low=1, high=1e6)
    over_selection: float = key(
        1.0, "clients asked in a synchronous round, as a multiple of cohort.size; it ends when that many are done", low=1, high=10
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """[evaluation]"""

    every: int = key(1, "rounds between central evaluations on the test part; 0 = only after the last round", low=0)
    federated_every: int = key(0, "rounds between federated evaluations on the clients; 0 = never", low=0)


@dataclass(frozen=True)
class WireConfig:
    """[wire]"""

    update: str = key("float32", "encoding of the update a client sends; int8 rounds stochastically", choices=("float32", "int8"))


@dataclass(frozen=True)
class PrivacyConfig:
    """[privacy], or one [[privacy]] for each unit"""

    unit: str = key("", "what is protected: one training example of a client, or a client with all it holds",
                     choices=("example", "client"))  # fmt: skip
    mechanism: str = key(
        "gaussian", "gaussian: noise on the device in each step (example), or on the sum by a trusted coordinator (client); "
        "skellam: every client adds its share before the sum (client)", choices=("gaussian", "skellam"),
    )  # fmt: skip
    clipping_norm: float = key(1.0, "L2 norm to which an example's gradient or a client's update is clipped", low=1e-6, high=1e6)
    noise_multiplier: float = key(
        0.0, "standard deviation of the noise in clipping norms; 0 = solved for target_epsilon", low=0, high=1e4
    )
    target_epsilon: float = key(
        0.0, "epsilon of the whole run, for which the noise is solved; 0 = noise_multiplier is given", low=0
    )
    delta: float = key(0.0, "delta of the guarantee; well below one over the number of units protected", low=0, high=0.1)
    budget: float = key(0.0, "epsilon that the run ends before overspending; 0 = target_epsilon, or no limit", low=0)
    sampling: str = key(
        "fixed", "how a cohort is drawn (client): fixed size, or poisson: one secret coin per client, which amplifies",
        choices=("fixed", "poisson"),
    )  # fmt: skip
    adaptive_quantile: float = key(
        0.0, "clipping norm follows this quantile of the clients' update norms (client); 0 = fixed", low=0, high=0.99
    )
    adaptive_rate: float = key(0.2, "learning rate of the adaptive clipping norm, per round", above=0, high=2)
    adaptive_noise: float = key(
        0.0, "standard deviation of the noise on the count of unclipped clients; 0 = cohort.size / 20, at least noise_multiplier",
        low=0, high=1e6,
    )  # fmt: skip
    loss_cap: float = key(0.0, "training loss, clipped to this, is released inside the noised vector (client); 0 = withheld", low=0)
    weight_cap: int = key(0, "a client of n examples weighs min(n, cap) / cap, before clipping (client); 0 = 1", low=0)
    minimum_survivors: int = key(0, "replies for which the noise is sized (skellam); fewer fail the round; 0 = cohort.size", low=0)
    corrupt_fraction: float = key(0.0, "share of a cohort that may add no noise (skellam)", low=0, high=0.9)
    max_participations: int = key(0, "rounds of a population in which a client takes part at most (client); 0 = no cap", low=0)
    min_separation: int = key(1, "rounds from one participation of a client to its next (client)", low=1)
    ledger: str = key("", "ledger shared by runs over one population: a file, or redis://HOST:PORT/DB?population=NAME "
                       "(its password in the environment, FEDCORE_LEDGER_PASSWORD); empty = the run's own")  # fmt: skip
    key: str = key(
        "", "file of a secret key (fedcore privacy key FILE), relative to the scenario; a simulation whose model is published "
        "derives noise and coins from it; both units share it; empty = from run.seed, which stands in the run's files",
    )  # fmt: skip


@dataclass(frozen=True)
class SecAggConfig:
    """[secagg]"""

    enabled: bool = key(False, "secure aggregation: the coordinator sees nothing but the sum of a cohort's contributions")
    simulate: str = key(
        "protocol", "protocol: simulated clients mask what they send; arithmetic: the same integers are added unmasked, for large "
        "cohorts, with the same bits", choices=("protocol", "arithmetic"),
    )  # fmt: skip
    operators: tuple[str, ...] = key(
        (), "HOST:PORT of the committee's members, in the order of the trust bundle; empty = a committee in this process, which "
        "separates no trust"
    )  # fmt: skip
    operator_fingerprints: tuple[str, ...] = key((), "SHA-256 of the operators' TLS certificates, in the same order")
    credentials: str = key("", "directory of the coordinator's own TLS key, for operators that demand one")
    trust: str = key("", "file of the trust bundle (operators)")
    trust_key: str = key("", "file of the public key that signs trust bundles (operators)")
    enrolment: str = key("", "directory of the enrolment key, with which simulated clients are enrolled (operators)")
    members: int = key(3, "members of a committee in this process", low=1, high=255)
    threshold: int = key(3, "members that must agree (committee in this process); 2 threshold > members + corrupt_members",
                          low=1, high=255)  # fmt: skip
    corrupt_members: int = key(2, "members that may be corrupt (committee in this process), fewer than threshold", low=0, high=254)
    corrupt_fraction: float = key(
        0.0, "share of a sum's clients that may be corrupt; with skellam privacy.corrupt_fraction says it", low=0, high=0.9
    )
    minimum_survivors: int = key(
        0, "uploads without which a sum is not made; 0 = half of its clients; with skellam privacy.minimum_survivors says it", low=0
    )
    neighbours: int = key(0, "clients with whom each one masks; 0 = the fewest that are safe, all up to 128 clients", low=0)
    expected_dropout: float = key(0.1, "share of clients for whose absence neighbours are chosen", low=0, high=0.9)
    clip: float = key(1.0, "an update's coordinates are clipped to [-clip, clip] (without unit client)", low=1e-9, high=1e9)
    weight_cap: int = key(
        0,
        "a client weighs min(its examples, cap) (without unit client); 0 = the largest client of the partition",
        low=0,
        high=2**20,
    )
    bits: int = key(0, "width of a coordinate of the sum: 16, 20, 24, 32; 0 = automatic (without unit client)", low=0, high=32)
    shards: int = key(1, "parts of a cohort that are summed each for itself, for strategies that compare replies", low=1, high=1024)


@dataclass(frozen=True)
class EngineConfig:
    """[engine]"""

    name: str = key("auto", "local training engine; auto decides by device and model, and is recorded",
                     choices=("auto", "native", "loop", "vmap"))  # fmt: skip
    device: str = key("auto", "where local training runs", choices=("auto", "cpu", "cuda"))
    workers: int | Literal["ray"] = key(
        0, "worker processes; 0 = one per core; ray = one for each CPU of the Ray cluster that this machine belongs to "
        "(RAY_ADDRESS, or ray start). Results do not depend on it", low=0, high=1024, word="ray",
    )  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    """[checkpoint]"""

    every: int = key(1, "rounds between commits; a crash loses at most the rounds since the last one", low=1)
    keep: int = key(2, "committed models kept on disk", low=1, high=1_000_000)


@dataclass(frozen=True)
class ReleaseConfig:
    """[release]"""

    registry: str = key(
        "", "repository that the coordinator publishes to by itself, a directory or URL (fedcore registry init "
        "--publish-by-itself); empty = it publishes nothing",
    )  # fmt: skip
    keys: str = key("", "directory of the repository's online keys, that of its releases among them")
    model: str = key("", "name of the model there; empty = run.name")
    every: int = key(0, "rounds between releases; 0 = only after the last round", low=0)
    tiers: tuple[str, ...] = key((), "tiers that are released; empty = all of [tiers], or the flagship")
    canary: str = key("5%", "share of the fleet that gets a release first")
    stages: tuple[str, ...] = key(("20%", "50%"), "shares of the fleet after the canary; what is left follows at the end")
    control: str = key("40%", "share of the fleet that keeps the release before until the last stage is over")
    window: float = key(86_400.0, "seconds after which what a device reported becomes its vote", above=0)
    corrupt: str = key("5%", "share of devices that may lie without starting or hiding an abort")
    budgets: dict[str, Any] = key({}, "amounts that a release may not take on more than a quarter of its canary, as {p95_ms = 50}")
    self_test: int = key(64, "test examples that go into a release, for devices to try it with: they become public", low=0)
    deltas: int = key(1, "earlier releases from which a delta leads to a new one", low=0, high=16)
    rollback: bool = key(True, "take a release back by itself once its rollout is aborted")
    rollouts: int = key(20, "rollouts that the gateways' store keeps, the newest ones; audit records stay", low=1, high=1000)

    def shares(self) -> tuple[float, ...]:
        """The canary and the stages after it."""
        return tuple(share_of(one) for one in (self.canary, *self.stages))


@dataclass(frozen=True)
class TierConfig:
    """[tiers.NAME]: a class of devices, how the model is compressed for it, and what it may cost there"""

    targets: tuple[str, ...] = key((), "runtimes to export for (fedcore export --help lists them); empty = all")
    prune: float = key(0.0, "share of each layer's channels to remove before the rest is distilled", low=0, high=0.9)
    epochs: int = key(60, "epochs of distillation on the coordinator's calibration examples, after pruning or for 4 bits", low=0)
    weight_bits: int = key(8, "bits of a weight: 8, or 4 (stored in four by litert, in convolutions by micro)", low=4, high=8)
    accuracy_loss: float = key(0.5, "points of accuracy that may be lost against the fp32 master", low=0, high=100)
    bytes: int = key(0, "size of the artefact; 0 = any", low=0)
    memory_bytes: int = key(2_000_000_000, "memory of the process that runs it; 0 = any", low=0)
    arena_bytes: int = key(0, "memory for tensors on a microcontroller; 0 = any", low=0)
    latency_ms: float = key(100.0, "median milliseconds of one example; 0 = any", low=0)
    p95_ms: float = key(0.0, "95th percentile of the milliseconds of one example; 0 = any", low=0)
    threads: int = key(1, "threads that one example may use", low=1, high=256)


TIERS = {
    "flagship": TierConfig(),
    "entry": TierConfig(prune=0.5, accuracy_loss=2.0, bytes=5_000_000, memory_bytes=500_000_000),
    "wearable": TierConfig(
        targets=("litert", "micro"), prune=0.5, accuracy_loss=2.0, bytes=5_000_000, arena_bytes=100_000, memory_bytes=500_000_000
    ),
}
"""Defaults of the tiers known by name; another name begins as flagship does."""


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
