import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.privacy.rotation import hadamard, rotate, signs, unrotate


def butterflies(x):
    """The slow twin for lengths whose matrix would not fit: additions and subtractions of pairs, p times."""
    y, width = x.copy(), 1
    while width < len(y):
        pairs = y.reshape(-1, 2, width)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        width *= 2
    return y / np.sqrt(len(y))


@pytest.mark.parametrize("bits", range(12))
def test_it_is_the_product_with_the_matrix(bits):
    x = np.random.default_rng(bits).standard_normal((3, 2**bits))
    np.testing.assert_allclose(hadamard(x), x @ scipy.linalg.hadamard(2**bits, float) / 2 ** (bits / 2), atol=1e-13)


@pytest.mark.parametrize("bits", [13, 15, 17, 18, 20])
def test_long_vectors_agree_with_butterflies(bits):
    x = np.random.default_rng(bits).standard_normal(2**bits)
    np.testing.assert_allclose(hadamard(x), butterflies(x), atol=1e-12)


def test_leading_axes_are_a_batch():
    x = np.random.default_rng(0).standard_normal((2, 3, 128))
    rows = np.stack([hadamard(row) for row in x.reshape(6, 128)]).reshape(x.shape)
    np.testing.assert_allclose(hadamard(x), rows, atol=1e-14)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 12])
def test_it_is_its_own_inverse_and_leaves_its_input_alone(bits):
    x = np.random.default_rng(bits).standard_normal(2**bits)
    before = x.copy()
    y = hadamard(x)
    y[0] += 0.0 if bits else 1.0  # a transform of one value must not be a view of it
    assert (x == before).all()
    if bits:
        np.testing.assert_allclose(hadamard(y), x, atol=1e-13)


@pytest.mark.parametrize("size", [0, 3, 12, 1000])
def test_other_lengths_are_refused(size):
    with pytest.raises(Refused, match="power of two"):
        hadamard(np.zeros(size))


@given(st.binary(max_size=40), st.integers(0, 100))
def test_signs_are_the_bits_of_the_documented_stream(seed, size):
    stream = keystream(derive_key("rotation", seed))(13)
    expected = [-1.0 if stream[i // 8] >> (i % 8) & 1 else 1.0 for i in range(size)]
    assert signs(seed, size).tolist() == expected


def test_signs_are_balanced_and_depend_on_the_seed():
    one, other = signs(b"one", 2**16), signs(b"other", 2**16)
    assert abs(one.mean()) < 5 / 2**8
    assert abs((one * other).mean()) < 5 / 2**8


@pytest.mark.parametrize("size", [1, 2, 64, 2**15])
def test_rotating_back_gives_the_vector_and_norms_are_kept(size):
    x = np.random.default_rng(size).standard_normal(size)
    rotated = rotate(x, b"seed")
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(x), rel=1e-12)
    np.testing.assert_allclose(unrotate(rotated, b"seed"), x, atol=1e-12)


def test_one_large_coordinate_is_spread_over_all():
    x = np.zeros(2**12)
    x[17] = 64.0
    np.testing.assert_allclose(np.abs(rotate(x, b"seed")), np.ones(2**12), atol=1e-12)


def test_a_fixed_direction_becomes_gaussian_under_random_signs():
    values = np.concatenate([rotate(np.ones(2**10), bytes([seed])) for seed in range(16)])
    assert values.var() == pytest.approx(1.0, abs=1e-9)
    assert np.mean(values**4) == pytest.approx(3.0, abs=0.2)
