"""What the keys of a scenario say against each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields

from fedcore.config.rules import show
from fedcore.config.run import RunConfig
from fedcore.config.sections import (
    DRAWN_HERE,
    MEANS,
    STRATEGY_NAMES,
    AsynchronousConfig,
    PrivacyConfig,
    ReleaseConfig,
    SecAggConfig,
    share_of,
)
from fedcore.errors import Refused

__all__ = ["impossible"]

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


def impossible(config: RunConfig) -> Iterator[str]:
    """Combinations that no single key's rule can see."""
    if not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}|", config.run.name):
        allowed = "at most 100 characters without slashes and with no leading dot, since it names a directory"
        yield f"run.name must be {allowed}; got {show(config.run.name)}"
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
    if config.engine.workers == "ray":
        if config.engine.device == "cuda":
            yield 'engine.workers = "ray" trains on CPUs: set engine.device = "cpu"'
    elif config.engine.name == "loop" and config.engine.device == "cuda" and config.engine.workers > 1:
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
            yield f"release.budgets.{name} must be a number above 0, got {show(amount)}"


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
