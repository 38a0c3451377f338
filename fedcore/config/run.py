"""A whole scenario, and every key of it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from fedcore.config.rules import allowed, toml_value
from fedcore.config.sections import (
    AsynchronousConfig,
    CheckpointConfig,
    CohortConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FleetConfig,
    ModelConfig,
    PrivacyConfig,
    QuantizationConfig,
    ReleaseConfig,
    RunSection,
    SecAggConfig,
    StrategyConfig,
    TierConfig,
    TrainingConfig,
    WireConfig,
)

__all__ = ["RunConfig", "describe", "sections"]


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
        values = {section: getattr(self, section) for section in sections()}
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
        return f"folder = {toml_value(str(self.folder))}\n\n{tomli_w.dumps(self.tables())}"

    def replace(self, section: str, **values: Any) -> RunConfig:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


def describe() -> Iterator[tuple[str, str, str, str, str]]:
    """Every key as (section, key, type and rule, default, meaning), in file order."""
    for section, kind in sections().items():
        kinds = typing.get_type_hints(kind)
        for key in fields(kind):
            default = key.default if key.default is not dataclasses.MISSING else {}
            name = f"NAME.{key.name}" if section == "tiers" else key.name
            yield section, name, allowed(kinds[key.name], key.metadata), toml_value(default), key.metadata["help"]


def sections() -> dict[str, type]:
    """The class of each section by name, in file order; [[privacy]] and [tiers.NAME] hold several of theirs."""
    several = {"privacy": PrivacyConfig, "tiers": TierConfig}
    return {one.name: several.get(one.name, type(one.default)) for one in fields(RunConfig) if one.name != "folder"}
