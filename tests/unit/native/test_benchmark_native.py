"""The benchmark of native rounds compares equal work."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from small_zoo import why_no_compiler

from fedcore.config import parse_config
from fedcore.coordinator.assembly import build_clients
from fedcore.errors import Refused
from fedcore.training.client import RoundTask
from fedcore.training.plan import poisson_batches

sys.path.insert(0, str(Path(__file__).parents[3]))
from simulations.benchmarks import native
from simulations.benchmarks.throughput import assembly

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")


def config(engine="native"):
    tables = {
        "run": {"name": "native", "rounds": 1}, "model": {"name": "mlp"}, "quantization": {"enabled": False},
        "engine": {"name": engine}, "data": {"clients": 5},
    }  # fmt: skip
    return parse_config(tables, "test", Path())


def test_everything_is_measured():
    found = native.measure(config(), 5, 1, [2])
    assert {"private_vs_plain", "vs_one_2", "peak_share"} <= set(found)
    assert all(math.isfinite(value) and value > 0 for value in found.values() if isinstance(value, float))


def test_times_are_per_example_that_the_private_clients_drew():
    """The examples that the division counts are those that the clients train on."""
    clients = build_clients(assembly(config(), 5))
    task = RoundTask(3, native.PRIVATE, native.LIMIT)
    drawn = native._drawn(clients, task)
    batches = [poisson_batches(50, native.PRIVATE, clients._examples(client, task).rng) for client in range(5)]
    assert drawn == sum(map(len, np.concatenate([np.array(of, object) for of in batches])))
    assert drawn != 250


def test_other_engines_are_refused():
    with pytest.raises(Refused, match="the engine is loop"):
        native.measure(config("loop"), 5, 1, [])
