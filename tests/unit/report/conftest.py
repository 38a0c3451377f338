"""Run directories with plausible numbers: what a coordinator would leave behind."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore.config import RunConfig

LABELS = 10
TEST = 360


def build_run(
    directory: Path, *, rounds: int = 12, planned: int | None = None, clients: int = 50, cohort: int = 20, seed: int = 0,
    name: str = "digits-dirichlet", strategy: str = "fedavg", federated_every: int = 3, freeze: int = 3, per_client: bool = True,
) -> Path:  # fmt: skip
    """Write a run; it is finished unless ``planned`` rounds are more than ``rounds``."""
    rng = random.Random(seed)
    directory.mkdir(parents=True)
    planned = planned or rounds
    config = RunConfig(folder=directory).replace("run", name=name, seed=seed, rounds=planned).replace("strategy", name=strategy)
    config = config.replace("data", clients=clients, holdout=0.2).replace("cohort", size=min(cohort, clients))
    config = config.replace("quantization", calibrate_round=min(freeze, planned))
    (directory / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    counts = [_labels_of_a_client(rng) for _ in range(clients)]
    records = [_round(rng, index, clients, cohort, federated_every, freeze) for index in range(1, rounds + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write(directory / "partition.json", _partition(counts, seed))
    if per_client:
        examples = [math.ceil(sum(row) * 0.2) for row in counts]
        accuracy = [None if rng.random() < 0.05 else _correct(rng, count) / count for count in examples]
        write(directory / "clients.json", {"round": rounds, "accuracy": accuracy, "examples": examples})
    if planned == rounds:
        write(directory / "result.json", _result(records, seed))
    return directory


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``build_run`` in a fresh directory; ``folder`` names it."""

    def make(folder: str = "run", **options: Any) -> Path:
        return build_run(tmp_path / folder, **options)

    return make


def _labels_of_a_client(rng: random.Random) -> list[int]:
    shares = [rng.gammavariate(0.5, 1) for _ in range(LABELS)]
    size = 8 + int(rng.gammavariate(1.5, 18))
    return [round(size * share / sum(shares)) for share in shares[:-1]] + [max(2, round(size * shares[-1] / sum(shares)))]


def _correct(rng: random.Random, count: int) -> int:
    return sum(rng.random() < 0.9 for _ in range(count))


def _partition(counts: list[list[int]], seed: int) -> dict[str, Any]:
    return {
        "labels": [str(label) for label in range(LABELS)], "label_counts": counts, "digest": "9f2c" * 16, "seed": seed,
        "calibration": 128, "test": TEST, "holdout": [math.ceil(sum(row) * 0.2) for row in counts],
    }  # fmt: skip


def _round(rng: random.Random, index: int, clients: int, cohort: int, federated_every: int, freeze: int) -> dict[str, Any]:
    accuracy = round(TEST * (0.97 - 0.8 * math.exp(-index / 4) - rng.random() * 0.02)) / TEST
    loss = 0.1 + 2.1 * math.exp(-index / 4) + rng.random() * 0.03
    dropped = [{"client": rng.randrange(clients), "reason": "update is not finite"} for _ in range(rng.random() < 0.15)]
    seconds = 0.9 + rng.random() * 0.4
    record: dict[str, Any] = {
        "round": index, "cohort": cohort, "replies": cohort - len(dropped), "dropped": dropped, "examples": cohort * 27,
        "train_loss": loss * 0.8, "update_norm": 0.4 + 2 * math.exp(-index / 6) + rng.random() * 0.1, "accuracy": accuracy,
        "loss": loss, "bytes_up": cohort * 80_000, "bytes_down": cohort * 21_000, "quantized": index >= freeze,
        "timing": {"seconds": seconds, "train": seconds * 0.75, "evaluate": seconds * 0.18, "commit": seconds * 0.05,
                   "clients_per_second": cohort / seconds},
    }  # fmt: skip
    if index >= freeze:
        record |= {"fake_quant_accuracy": accuracy - rng.randrange(4) / TEST, "fake_quant_loss": loss + 0.02}
    if federated_every and index % federated_every == 0:
        spread = {"5": -0.3, "25": -0.1, "50": 0.0, "75": 0.05, "95": 0.1}
        percentiles = {key: min(1.0, max(0.0, accuracy + shift)) for key, shift in spread.items()}
        record["federated"] = {"clients": cohort, "accuracy": accuracy - 0.02, "loss": loss + 0.05, "percentiles": percentiles}
    return record


def _result(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    last, seconds = records[-1], sum(record["timing"]["seconds"] for record in records)
    return {
        "rounds": len(records), "accuracy": last["accuracy"], "loss": last["loss"], "int8_accuracy": last["accuracy"] - 1 / TEST,
        "bytes_up": sum(record["bytes_up"] for record in records), "bytes_down": sum(record["bytes_down"] for record in records),
        "clients_per_second": sum(record["replies"] for record in records) / seconds, "seconds": seconds, "engine": "loop",
        "engine_reason": "cpu: one torch thread per process", "strategy_replies": "one mean reply",
        "dropped": sum(len(record["dropped"]) for record in records), "parameters": 20000,
        "model_bytes": {"fp32": 80000, "int8": 21000, "onnx": 25000}, "version": "0.1.0", "seed": seed,
    }  # fmt: skip
