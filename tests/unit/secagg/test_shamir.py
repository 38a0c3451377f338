import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_reference import shamir_at_zero

from fedcore.errors import Refused
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.secagg.shamir import PRIME, SHARE_LENGTH, combine, is_share, lagrange_at_zero, split

secrets = st.binary(min_size=32, max_size=32)


def randomness(*parts):
    return keystream(derive_key("shamir", *parts))


def test_the_field_is_a_prime_field():
    """Miller-Rabin for 40 bases; and 2^257 - 93 is the largest prime below 2^257."""

    def passes(n: int, base: int) -> bool:
        d, r = n - 1, 0
        while d % 2 == 0:
            d, r = d // 2, r + 1
        x = pow(base, d, n)
        return x in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(r - 1))

    assert all(passes(PRIME, base) for base in range(2, 42))
    assert not any(all(passes(n, base) for base in range(2, 42)) for n in range(PRIME + 2, 2**257, 2))
    assert PRIME == 2**257 - 93


@settings(max_examples=30, deadline=None)
@given(st.lists(secrets, min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3), st.integers())
def test_any_threshold_of_the_shares_gives_the_secret(values, threshold, spare, seed):
    points = list(range(1, 2 * (threshold + spare) + 1, 2))
    columns = split(values, threshold, points, randomness(seed))
    assert [len(column) for column in columns] == [len(values)] * len(points)
    assert all(is_share(share) for column in columns for share in column)
    for chosen in itertools.combinations(range(len(points)), threshold):
        coefficients = lagrange_at_zero([points[c] for c in chosen])
        for slot, value in enumerate(values):
            shares = [columns[c][slot] for c in chosen]
            slow = shamir_at_zero({points[c]: int.from_bytes(columns[c][slot], "big") for c in chosen}, PRIME)
            assert combine(coefficients, shares) == value == slow.to_bytes(32, "big")


def test_shares_are_values_of_the_documented_polynomial():
    """f(x) = secret + r_1 x^(t-1) + ... + r_(t-1) x, coefficients of 257 bits each from 33 random bytes."""
    stream = randomness("polynomial")
    a, b = (int.from_bytes(stream(33), "big") >> 7 for _ in range(2))
    secret = 12345
    columns = split([secret.to_bytes(32, "big")], 3, [1, 2, 7], randomness("polynomial"))
    assert [int.from_bytes(column[0], "big") for column in columns] == [(a * x**2 + b * x + secret) % PRIME for x in (1, 2, 7)]


def test_fewer_shares_fit_every_secret():
    """With t - 1 shares fixed, each secret has exactly one polynomial: nothing is excluded."""
    columns = split([b"s" * 32], 3, [1, 2, 3], randomness("hiding"))
    known = {a: int.from_bytes(columns[a - 1][0], "big") for a in (1, 2)}
    for other in (0, 1, 2**256 - 1):
        third = shamir_at_zero({point - 3: v for point, v in (known | {0: other}).items()}, PRIME)  # f(3), shifted to 0
        shares = [known[1].to_bytes(33, "big"), known[2].to_bytes(33, "big"), third.to_bytes(33, "big")]
        assert combine(lagrange_at_zero([1, 2, 3]), shares) == other.to_bytes(32, "big")


def test_coefficients_beyond_the_field_are_drawn_again():
    draws = iter([b"\xff" * 33, (PRIME << 7).to_bytes(33, "big"), (5 << 7).to_bytes(33, "big")])
    columns = split([bytes(32)], 2, [1, 2], lambda size: next(draws))
    assert [int.from_bytes(column[0], "big") for column in columns] == [5, 10]


def test_shares_of_no_secret_are_refused():
    with pytest.raises(Refused, match="32 bytes"):
        combine([1], [(2**256).to_bytes(33, "big")])
    assert is_share((PRIME - 1).to_bytes(33, "big"))
    assert not is_share(PRIME.to_bytes(33, "big"))
    assert not is_share(bytes(SHARE_LENGTH - 1))
