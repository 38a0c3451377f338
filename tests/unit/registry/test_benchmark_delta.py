"""Deltas between the rounds of the main job are as small as promised."""

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

from simulations.benchmarks.delta import measure


@pytest.mark.slow
def test_a_round_s_delta_is_a_fifth_of_the_model_and_never_larger_than_other_tools_make_it():
    rows = measure("digits", seed=0, rounds=0)
    assert len(rows) == 39
    assert statistics.median(row["full_bytes"] / row["delta_bytes"] for row in rows) >= 5
    assert all(row["delta_bytes"] <= min(row["zstd_patch_bytes"], row["bsdiff_bytes"]) for row in rows)
