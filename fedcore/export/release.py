"""From a source to a release: per tier a compressed model, per runtime an artefact, a measurement and a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle  # hands the integer model to a child of ours, through a directory of our own
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedcore.config import TIERS, TierConfig
from fedcore.errors import FedcoreError, Refused
from fedcore.export.artefact import Facts
from fedcore.export.child import Limits, run_job
from fedcore.export.compress import compress, narrow_weights
from fedcore.export.gate import Measured, Row, agreement, judge, quantile
from fedcore.export.source import Source
from fedcore.export.targets import TARGETS, Target, missing_package
from fedcore.quantization.integer import IntegerModel, with_float_head, with_logit_peak, with_ranges
from fedcore.quantization.lower import lower

__all__ = ["Plan", "TierModel", "choose", "release", "tier_model", "to_json"]

_REPEATS, _ROUNDS = 100, 2
Told = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to export: tiers by name, targets of each; ``micro_python`` runs TensorFlow Lite Micro, if there is one."""

    tiers: Mapping[str, TierConfig]
    targets: Mapping[str, tuple[str, ...]]
    micro_python: Path | None = None
    limits: Limits = Limits()


@dataclass(frozen=True, eq=False)
class TierModel:
    """A tier's model as integers, the labels [n] that its fake-quantized form gives the test examples, its accuracy there, and the
    layers whose results were not rounded in training."""

    integers: IntegerModel
    expected: npt.NDArray[np.int64]
    accuracy: float
    float_results: tuple[str, ...] = ()


def choose(
    scenario: Mapping[str, TierConfig], tiers: Iterable[str], targets: Iterable[str], micro_python: Path | None = None
) -> Plan:  # fmt: skip
    """The plan for the tiers and targets asked for: without any, those of the scenario, else the flagship; all targets of a tier.

    Raises:
        Refused: a name that is unknown.
    """
    known = {**TIERS, **scenario}
    wanted, asked = list(tiers) or list(scenario) or ["flagship"], list(targets)
    for kind, names, allowed in (("tiers", wanted, known), ("targets", asked, TARGETS)):
        for name in names:
            if name not in allowed:
                raise Refused(f"--{kind}: unknown {name}; allowed: {', '.join(allowed)}")
    for tier in wanted:
        for name in known[tier].targets:
            if name not in TARGETS:
                raise Refused(f"tiers.{tier}.targets: unknown {name}; allowed: {', '.join(TARGETS)}")
    chosen = {tier: tuple(dict.fromkeys(asked or known[tier].targets or TARGETS)) for tier in wanted}
    return Plan({tier: known[tier] for tier in wanted}, chosen, micro_python)


def tier_model(source: Source, tier: TierConfig) -> TierModel:
    """The model of a tier.

    Raises:
        Refused: it cannot be pruned, or holds an operator that the integer model does not have.
    """
    model, test = source.model, source.dataset.test
    narrow = tier.weight_bits < 8
    if tier.prune or narrow:
        model = compress(
            model, source.representative, share=tier.prune, classes=len(source.dataset.labels), epochs=tier.epochs,
            seed=source.config.run.seed, weight_bits=tier.weight_bits, loss=source.config.training.loss,
        )  # fmt: skip
    integers = lower(model, source.input_shape, weight_bits=tier.weight_bits)
    with torch.no_grad(), narrow_weights(model, tier.weight_bits) if narrow else contextlib.nullcontext():
        expected = torch.cat([model(part).argmax(1) for part in torch.from_numpy(test.x).split(256)]).numpy()
    accuracy = float((expected == test.y).mean())
    ranged = with_ranges(integers, source.representative)
    return TierModel(with_logit_peak(ranged, source.representative), expected, accuracy, integers.float_results)


def release(source: Source, plan: Plan, folder: Path, told: Told = lambda _: None) -> list[Row]:
    """Export everything of the plan into ``folder/TIER/TARGET`` and judge it; ``told`` hears of each step.

    A converter that is missing, fails, crashes or hangs costs its own row. What an earlier export left in these folders is removed
    first: an artefact of another model must not stand beside a row that says its target failed.
    """
    rows: list[Row] = []
    for tier, config in plan.tiers.items():
        for target in plan.targets[tier]:
            if (folder / tier / target).exists():
                shutil.rmtree(folder / tier / target)
        told(f"{tier}: compressing" if config.prune or config.weight_bits < 8 else f"{tier}: integer model")
        try:
            model = tier_model(source, config)
        except Refused as error:
            rows += [Row(target, tier, "failed", gate="fail", reason=str(error)) for target in plan.targets[tier]]
            continue
        with tempfile.TemporaryDirectory(prefix="fedcore-") as place:
            batch = _Tier(source, tier, config, model, plan, folder / tier, Path(place))
            rows += batch.run(told)
    return rows


def clear(folder: Path, model: str) -> list[dict[str, Any]]:
    """The rows of an earlier export of the same model (its SHA-256) in ``folder``; artefacts of another, or of none that a table
    tells of, are removed."""
    table = folder / "export.json"
    try:
        earlier = json.loads(table.read_text())
        rows: list[dict[str, Any]] = earlier["rows"] if earlier["model"] == model else []
    except (OSError, ValueError, KeyError, TypeError):
        rows = []
    kept = {folder / row["tier"] / row["target"] for row in rows}
    for path in folder.glob("*/*"):
        if path not in kept and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    table.unlink(missing_ok=True)  # an export that is killed leaves no table that speaks of other artefacts
    return rows


def to_json(rows: Iterable[Row], earlier: Iterable[dict[str, Any]], plan: Plan, source: Source, model: str) -> str:
    """The contents of export.json, with the rows of an ``earlier`` export that are not made anew; latency and memory are this
    host's, not a phone's."""
    new = [dataclasses.asdict(row) for row in rows]
    done = {(row["tier"], row["target"]) for row in new}
    every = [row for row in earlier if (row["tier"], row["target"]) not in done] + new
    held = {
        "label": "host", "model": model, "threads": {name: tier.threads for name, tier in plan.tiers.items()},
        "fp32_accuracy": source.accuracy, "test_examples": len(source.dataset.test), "rows": every,
    }  # fmt: skip
    return json.dumps(held, indent=2) + "\n"


class _Tier:
    """One tier's artefacts: written one after another, then measured in turn, each time in a fresh process."""

    def __init__(
        self, source: Source, name: str, config: TierConfig, model: TierModel, plan: Plan, folder: Path, place: Path
    ) -> None:  # fmt: skip
        self._source, self._name, self._config, self._model = source, name, config, model
        self._plan, self._folder, self._place = plan, folder, place
        np.save(place / "x.npy", source.dataset.test.x)
        for kind, integers in (("integer", model.integers), ("head", with_float_head(model.integers))):
            (place / f"{kind}.pickle").write_bytes(pickle.dumps(integers))

    def run(self, told: Told) -> list[Row]:
        """A row for each target, in their order."""
        targets = [TARGETS[name] for name in self._plan.targets[self._name]]
        rows: dict[str, Row] = {}
        paths: dict[str, Path] = {}
        for target in targets:
            told(f"{self._name}: writing {target.name}")
            found = self._written(target)
            if isinstance(found, Row):
                rows[target.name] = found
            else:
                paths[target.name] = found
        times: dict[str, list[float]] = {name: [] for name in paths}
        peaks: dict[str, int] = {}
        contents: dict[str, dict[str, Any]] = {}
        for number in range(_ROUNDS):  # there and back, so that a machine that warms up or slows down favours nobody
            for target in targets if number % 2 == 0 else reversed(targets):
                if target.name in paths and target.name not in rows and target.runs:
                    told(f"{self._name}: measuring {target.name} ({number + 1} of {_ROUNDS})")
                    try:
                        answer = self._measured(target, paths[target.name], logits=number == 0)
                    except FedcoreError as error:
                        rows[target.name] = self._failed(target, error)
                        continue
                    contents.setdefault(target.name, answer.get("contents", {}))
                    times[target.name] += answer["milliseconds"]
                    peaks[target.name] = max(peaks.get(target.name, 0), answer["peak"])
        for target in targets:
            if target.name not in rows:
                told(f"{self._name}: judging {target.name}")
                rows[target.name] = self._judged(
                    target, paths[target.name], contents.get(target.name), times[target.name], peaks.get(target.name)
                )
        return [rows[target.name] for target in targets]

    def _failed(self, target: Target, error: FedcoreError) -> Row:
        return Row(target.name, self._name, "failed", gate="fail", reason=str(error))

    def _written(self, target: Target) -> Row | Path:
        missing = missing_package(target)
        if missing:
            return Row(target.name, self._name, "missing", reason=f"{missing} is not installed: pip install 'fedcore[export]'")
        if target.name == "micro" and self._plan.micro_python is None:
            reason = "needs an environment of its own: fedcore export --setup-micro DIR, then --micro-python DIR/bin/python"
            return Row(target.name, self._name, "missing", reason=reason)
        folder = self._folder / target.name
        folder.mkdir(parents=True)
        facts = dataclasses.replace(self._source.facts, tier=self._name)
        model = self._place / ("head.pickle" if target.float_head else "integer.pickle")
        job = {"task": "convert", "target": target.name, "model": str(model), "folder": str(folder), "facts": _plain(facts)}
        try:
            return Path(run_job(job, self._plan.limits)["path"])
        except FedcoreError as error:
            shutil.rmtree(folder)  # half of an artefact is none
            return self._failed(target, error)

    def _measured(self, target: Target, path: Path, *, logits: bool) -> dict[str, Any]:
        job = {
            "task": "measure", "target": target.name, "path": str(path), "x": str(self._place / "x.npy"),
            "threads": self._config.threads, "repeats": _REPEATS, "python": str(self._plan.micro_python or ""),
            "logits": str(self._place / f"{target.name}.npy") if logits else "",
        }  # fmt: skip
        return run_job(job, self._plan.limits)

    def _judged(
        self, target: Target, path: Path, held: dict[str, Any] | None, times: list[float], peak: int | None
    ) -> Row:  # fmt: skip
        shown = path.with_name(target.artefact)
        try:
            held = held or run_job({"task": "describe", "kind": target.name, "path": str(shown)}, self._plan.limits)
        except FedcoreError as error:
            return self._failed(target, error)
        shares: dict[str, float] = {}
        if target.runs:
            logits = np.load(self._place / f"{target.name}.npy", allow_pickle=False)
            wanted = (len(self._source.dataset.test), len(self._source.dataset.labels))
            if logits.shape != wanted or not np.isfinite(logits).all():
                return self._failed(target, Refused(f"it gives no finite logits of shape {list(wanted)}"))
            accuracy = float((logits.argmax(axis=1) == self._source.dataset.test.y).mean())
            shares = {
                "agreement": agreement(logits, self._model.expected), "accuracy": accuracy,
                "accuracy_loss": 100 * (self._source.accuracy - accuracy),
            }  # fmt: skip
        measured = Measured(
            held["size"], held["integer"], held["floating"], latency_ms=quantile(times, 0.5), p95_ms=quantile(times, 0.95),
            peak_bytes=peak, **shares,
        )  # fmt: skip
        promised = self._model.integers.integer_layers - target.float_head
        problems = list(judge(measured, self._config, target, promised, self._model.float_results))
        values = dataclasses.asdict(measured)
        reason = "; ".join(problems) or (
            "" if target.runs else "its runtime does not exist on this system; its shapes and weights are the integer model's"
        )
        return Row(
            target.name,
            self._name,
            "exported" if target.runs else "not run",
            gate="fail" if problems else "pass",
            reason=reason,
            **values,
        )


def _plain(facts: Facts) -> dict[str, Any]:
    return {**dataclasses.asdict(facts), "more": dict(facts.more)}
