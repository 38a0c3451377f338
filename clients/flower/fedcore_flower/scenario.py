"""The scenario of a Flower run."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context

from fedcore.config import RunConfig, load_config

__all__ = ["load_scenario"]

_APP = Path(__file__).parents[1]  # Flower carries this folder to every node


def load_scenario(context: Context) -> RunConfig:
    """The scenario that the run configuration names; a relative path is looked up in the app's folder."""
    return load_config(_APP / str(context.run_config["scenario"]))
