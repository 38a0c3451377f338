"""The scenario: nested frozen dataclasses read from TOML, validated once, unknown keys refused.

A section is a dataclass, a key is a field; a field's metadata says what is allowed and what it means, and is the
single source for validation, for ``fedcore config`` and for error messages.
"""

from fedcore.config.reading import load_config, parse_config
from fedcore.config.run import RunConfig, describe
from fedcore.config.sections import (
    LOSSES,
    MEANS,
    TIERS,
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
    share_of,
)

__all__ = [
    "LOSSES", "MEANS", "TIERS", "AsynchronousConfig", "CheckpointConfig", "CohortConfig", "DataConfig", "EngineConfig",
    "EvaluationConfig", "FleetConfig", "ModelConfig", "PrivacyConfig", "QuantizationConfig", "ReleaseConfig", "RunConfig",
    "RunSection", "SecAggConfig", "StrategyConfig", "TierConfig", "TrainingConfig", "WireConfig", "describe", "load_config",
    "parse_config", "share_of",
]  # fmt: skip
