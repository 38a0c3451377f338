"""Noise of the native engine, against `GaussianNoise`."""

import numpy as np
import pytest
import torch
from native_clients import SHAPES, network, why_no_compiler
from scipy import stats

from fedcore.native.trainer import NativeTrainer
from fedcore.training.dpsgd import GaussianNoise

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")


@pytest.fixture(scope="module")
def worker():
    return NativeTrainer(network("mlp", False, torch.float32)).worker(SHAPES["mlp"])


def both(worker, count, deviation, seed=3):
    found, expected = torch.full((count + 2,), 7.0), torch.empty(count)
    worker._fill(found[1:-1], GaussianNoise(np.random.default_rng(seed)), deviation)
    GaussianNoise(np.random.default_rng(seed)).fill(expected, deviation)
    assert found[0] == found[-1] == 7  # nothing beside it is written
    return found[1:-1].double().numpy(), expected.double().numpy()


@pytest.mark.parametrize("count", [1, 2, 3, 15, 31, 32, 33, 34, 63, 1000, GaussianNoise.PIECE, GaussianNoise.PIECE + 1, 300_001])
def test_the_stream_is_that_of_the_loop(worker, count):
    found, expected = both(worker, count, 0.7)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("deviation", [1e-30, 1e-3, 1e6, 1e30])
def test_any_deviation(worker, deviation):
    found, expected = both(worker, 1001, deviation)
    np.testing.assert_allclose(found / deviation, expected / deviation, rtol=2e-6, atol=4e-6)


def test_extreme_bits(worker):
    wide = np.array([0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 5], np.int64)
    narrow = np.array([0, -(2**31), 2**31 - 1, 2**29, 2**29 - 1, -(2**29), 2**30, -(2**30)], np.int32)
    bits = np.frombuffer(wide.tobytes() + narrow.tobytes() + bytes(15), np.uint8)
    found = np.empty(16, np.float32)
    worker._gaussian(bits.ctypes.data, 16, 1.0, found.ctypes.data)
    radius = np.sqrt(-2 * np.log(np.maximum(np.abs(wide.astype(np.float64)), 1) * 2.0**-63))
    angle = narrow.astype(np.float64) * np.pi * 2.0**-31
    np.testing.assert_allclose(found, np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]), rtol=1e-6, atol=4e-6)


def test_moments_and_tails(worker):
    found, _ = both(worker, 2_000_000, 1.0)
    assert abs(found.mean()) < 5 / np.sqrt(len(found))
    assert abs(found.var() - 1) < 5 * np.sqrt(2 / len(found))
    assert abs(stats.kurtosis(found)) < 5 * np.sqrt(24 / len(found))
    for limit in (2, 3, 4):
        expected = 2 * stats.norm.sf(limit) * len(found)
        assert abs((np.abs(found) > limit).sum() - expected) < 5 * np.sqrt(expected)
    assert stats.kstest(found[:200_000], "norm").pvalue > 1e-4
