"""Noise of the native engine, against `GaussianNoise` and `SimulatedNoise`."""

import ctypes

import numpy as np
import pytest
import torch
from scipy import stats
from small_zoo import SHAPES, network, why_no_compiler

from fedcore.native.trainer import NativeTrainer
from fedcore.training.dpsgd import GaussianNoise, SimulatedNoise

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
    worker.library.gaussian(bits.ctypes.data, 16, 1.0, found.ctypes.data)
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


def simulated(model, count, deviation, seed=3):
    """From C and from numpy, in a dtype that the model says."""
    function = NativeTrainer(model).worker(SHAPES["mlp"]).library.simulated_noise
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p]
    function.restype = None
    dtype = next(model.parameters()).dtype
    found, expected = torch.full((-(-count // 32) * 32 + 1,), 7.0, dtype=dtype), torch.empty(count, dtype=dtype)
    here, there = (SimulatedNoise(np.random.default_rng(seed)) for _ in range(2))
    for _ in range(2):  # the second continues the first
        function(here.state.ctypes.data, count, deviation, found.data_ptr())
        there.fill(expected, deviation)
    assert found[-1] == 7  # nothing behind is written
    assert (here.state == there.state).all()
    return found[:count].double().numpy(), expected.double().numpy()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 131_072, 131_073, 300_001])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_the_simulated_stream_is_that_of_the_loop(count, dtype, atol):
    found, expected = simulated(network("mlp", False, dtype), count, 1.0)
    np.testing.assert_allclose(found, expected, rtol=2e-6 if dtype is torch.float32 else 1e-13, atol=atol)


@pytest.mark.parametrize("deviation", [1e-30, 1e-3, 1e6, 1e30])
def test_simulated_noise_of_any_deviation(deviation):
    found, expected = simulated(network("mlp", False, torch.float32), 1001, deviation)
    np.testing.assert_allclose(found / deviation, expected / deviation, rtol=2e-6, atol=1e-5)


def test_moments_and_tails_of_simulated_noise():
    found, _ = simulated(network("mlp", False, torch.float32), 4_000_000, 1.0)
    count = len(found)
    assert abs(found.mean()) < 5 / np.sqrt(count)
    assert abs(found.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs(stats.skew(found)) < 5 * np.sqrt(6 / count)
    assert abs(stats.kurtosis(found)) < 5 * np.sqrt(24 / count)
    for limit in (2, 3, 4):
        expected = 2 * stats.norm.sf(limit) * count
        assert abs((np.abs(found) > limit).sum() - expected) < 5 * np.sqrt(expected)
    assert stats.kstest(found[:200_000], "norm").pvalue > 1e-4
    cells = np.histogram(stats.norm.cdf(found), 1000, (0, 1))[0]
    assert stats.chisquare(cells).pvalue > 1e-4
    for lag in (1, 8, 15, 16, 17, 32, 64):  # within a block, a pair, between the turns of a generator
        products = found[lag:] * found[:-lag]
        assert abs(products.mean()) < 5 / np.sqrt(len(products))
        squares = (found[lag:] ** 2 - 1) * (found[:-lag] ** 2 - 1)
        assert abs(squares.mean()) < 5 * 2 / np.sqrt(len(squares))


def test_pairs_of_simulated_noise_point_everywhere():
    found, _ = simulated(network("mlp", False, torch.float32), 3_200_000, 1.0)
    blocks = found.reshape(-1, 2, 16)
    angles = np.arctan2(blocks[:, 1], blocks[:, 0]).ravel()
    assert stats.chisquare(np.histogram(angles, 256, (-np.pi, np.pi))[0]).pvalue > 1e-4
    radii = (blocks**2).sum(1).ravel()
    assert stats.kstest(radii[:200_000], "chi2", (2,)).pvalue > 1e-4


def test_extreme_words_of_simulated_noise(monkeypatch):
    """The words that give the longest and the shortest radius, and the ends of the circle."""
    words = torch.tensor([0, -1, 1, -2, 2**31 - 1, -(2**31), 2**30, -(2**30)] * 2, dtype=torch.int32)
    angles = torch.tensor([0, 2**31 - 1, -(2**31), 2**30] * 4, dtype=torch.int32)
    noise = SimulatedNoise(np.random.default_rng(0))
    monkeypatch.setattr(noise, "_words", lambda blocks: torch.stack([words, angles])[:, None])
    for dtype in (torch.float32, torch.float64):
        found = torch.empty(32, dtype=dtype)
        noise.fill(found, 1.0)
        assert torch.isfinite(found).all()
        radius = torch.hypot(found[:16], found[16:])
        assert float(radius.max()) == pytest.approx(np.sqrt(2 * 31 * np.log(2)))
        assert float(radius.min()) < 1e-4
        assert bool((found[:16][words < 0] < 1e-6).all())
