"""Every example and scenario that the project ships runs as its text says."""

import json
import runpy
from pathlib import Path

import pytest
from fedcore_commands import fedcore, settings

from fedcore.config import load_config

SIMULATIONS = Path(__file__).parents[2] / "simulations"
EXAMPLES = SIMULATIONS / "examples"


def simulate(scenario: Path, out: Path, *values: str) -> dict:
    done = fedcore("simulate", scenario, "--out", out, *settings(*values))
    assert done.returncode == 0, done.stderr
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    "scenario", [*(SIMULATIONS / "scenarios").glob("*.toml"), *EXAMPLES.glob("*.toml")], ids=lambda path: path.stem
)
def test_every_scenario_is_valid(scenario):
    assert load_config(scenario).run.name == scenario.stem


def test_a_researchers_own_strategy(tmp_path):
    result = simulate(EXAMPLES / "median_norm.toml", tmp_path / "run")
    assert result["strategy_replies"] == "one reply per client"
    assert result["int8_accuracy"] > 0.85


def test_a_model_and_a_data_set_of_ones_own(tmp_path):
    result = simulate(EXAMPLES / "own_model_and_data.toml", tmp_path / "run", "run.rounds=12")
    assert result["int8_accuracy"] > 0.85


def test_fine_tuning_federates_the_head_only(tmp_path):
    for name in ("fine_tune.py", "fine_tune.toml"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    module = runpy.run_path(str(tmp_path / "fine_tune.py"))
    assert module["pretrain"](tmp_path / "body.safetensors") < 0.5
    result = simulate(tmp_path / "fine_tune.toml", tmp_path / "run")
    assert result["trainable_parameters"] == 128 * 10 + 10
    assert result["parameters"] == 22_602
    assert result["int8_accuracy"] > 0.9
    first, *_, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["bytes_down"] > 5 * last["bytes_down"]
