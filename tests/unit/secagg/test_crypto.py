import hashlib
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_reference import hkdf_expand, hkdf_extract, hpke_seal

from fedcore.errors import Refused
from fedcore.secagg.crypto import (
    BOX_OVERHEAD,
    ED25519,
    KEY_LENGTHS,
    P256,
    EcdsaKey,
    Ed25519Key,
    agree,
    digest,
    domain,
    open_box,
    pair_seed,
    seal_box,
    verify,
)

PLAN = b"p" * 32
SMALL_ORDER = [  # RFC 7748, section 6.1; the points of order 1, 2, 4 and 8 and their non-canonical forms
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def keys():
    return [Ed25519Key(b"s" * 32), EcdsaKey(ec.derive_private_key(77, ec.SECP256R1()))]


def test_x25519_is_that_of_rfc_7748():
    """Section 5.2."""
    scalar = X25519PrivateKey.from_private_bytes(bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"))
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert agree(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_points_of_small_order_are_refused(point):
    for secret in (b"\x40" * 32, os.urandom(32)):
        with pytest.raises(Refused, match="small order"):
            agree(X25519PrivateKey.from_private_bytes(secret), bytes.fromhex(point))


def test_the_reference_hkdf_is_that_of_rfc_5869():
    """Appendix A.1 and A.3."""
    prk = hkdf_extract(bytes(range(13)), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    okm = hkdf_expand(prk, bytes(range(0xF0, 0xFA)), 42).hex()
    assert okm == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    okm = hkdf_expand(hkdf_extract(b"", b"\x0b" * 22), b"", 42).hex()
    assert okm == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_pair_seed_is_hkdf_and_both_sides_have_it(shared, i, j):
    info = b"fedcore secagg 1 pair seed\0" + PLAN + min(i, j).to_bytes(4, "big") + max(i, j).to_bytes(4, "big")
    seed = pair_seed(shared, PLAN, i, j)
    assert seed == hkdf_expand(hkdf_extract(b"", shared), info, 32) == pair_seed(shared, PLAN, j, i)


def test_seeds_differ_by_plan_and_by_pair():
    seeds = {pair_seed(b"s" * 32, plan, i, j) for plan in (PLAN, b"q" * 32) for i, j in [(0, 1), (0, 2), (1, 2), (256, 1)]}
    assert len(seeds) == 8
    assert {len(seed) for seed in seeds} == {32}


def test_the_reference_hpke_is_that_of_rfc_9180():
    """Appendix A.1.1.1, sequence number 0."""
    box = hpke_seal(
        bytes.fromhex("3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"),
        bytes.fromhex("4f6465206f6e2061204772656369616e2055726e"),
        b"Count-0",
        b"Beauty is truth, truth beauty",
        bytes.fromhex("52c4a758a802cd8b936eceea314432798d5baf2d7e9235dc084ab1b9cfa2f736"),
        aead=1,
    )
    assert box.hex() == (
        "37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431"
        "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
    )


def test_a_box_of_the_reference_opens():
    secret = X25519PrivateKey.from_private_bytes(b"\x21" * 32)
    info = b"fedcore secagg 1 box\0" + PLAN + (70_000).to_bytes(4, "big") + b"\x03"
    box = hpke_seal(secret.public_key().public_bytes_raw(), info, b"", b"shares", b"\x42" * 32)
    assert open_box(secret, PLAN, 70_000, 3, box) == b"shares"


def test_a_box_is_bound_to_all_it_was_sealed_for():
    secret, other = (X25519PrivateKey.from_private_bytes(bytes([v]) * 32) for v in (1, 2))
    box = seal_box(secret.public_key().public_bytes_raw(), PLAN, 5, 2, b"shares")
    assert len(box) == len(b"shares") + BOX_OVERHEAD
    assert open_box(secret, PLAN, 5, 2, box) == b"shares"
    for key, plan, client, member in [(other, PLAN, 5, 2), (secret, b"q" * 32, 5, 2), (secret, PLAN, 6, 2), (secret, PLAN, 5, 1)]:
        with pytest.raises(Refused, match="does not open"):
            open_box(key, plan, client, member, box)


def test_every_flipped_bit_of_a_box_is_noticed():
    secret = X25519PrivateKey.from_private_bytes(b"\x01" * 32)
    box = seal_box(secret.public_key().public_bytes_raw(), PLAN, 5, 2, b"shares")
    for bit in range(8 * len(box)):
        damaged = bytearray(box)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Refused):
            open_box(secret, PLAN, 5, 2, bytes(damaged))
    for wrong in (b"", box[:47], box + b"\0"):
        with pytest.raises(Refused):
            open_box(secret, PLAN, 5, 2, wrong)


def test_ed25519_is_that_of_rfc_8032():
    """Section 7.1, test 1, and that a domain is signed before the content."""
    key = Ed25519Key(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key._key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974")
    assert key.sign("offer", b"content") == key._key.sign(b"fedcore secagg 1 offer\0content")


@pytest.mark.parametrize("key", keys())
def test_signatures_are_for_one_key_purpose_and_content(key):
    signature = key.sign("upload", b"content")
    assert len(signature) == 64
    assert len(key.public) == KEY_LENGTHS[key.algorithm]
    verify(key.algorithm, key.public, signature, "upload", b"content")
    others = [other for other in keys() if other.algorithm != key.algorithm] + [Ed25519Key(b"t" * 32)]
    wrong = [
        (key.algorithm, key.public, signature, "release", b"content"),
        (key.algorithm, key.public, signature, "upload", b"other"),
        (key.algorithm, key.public, signature[:63], "upload", b"content"),
        (key.algorithm, b"", signature, "upload", b"content"),
        (3, key.public, signature, "upload", b"content"),
        *((other.algorithm, other.public, signature, "upload", b"content") for other in others),
        *((other.algorithm, key.public, signature, "upload", b"content") for other in others if other.algorithm != key.algorithm),
    ]
    for case in wrong:
        with pytest.raises(Refused, match="not valid"):
            verify(*case)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(keys()), st.integers(0, 511))
def test_every_flipped_bit_of_a_signature_is_noticed(key, bit):
    signature = bytearray(key.sign("upload", b"content"))
    signature[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(Refused, match="not valid"):
        verify(key.algorithm, key.public, bytes(signature), "upload", b"content")


def test_an_identity_on_another_curve_is_refused():
    with pytest.raises(Refused, match="P-256"):
        EcdsaKey(ec.generate_private_key(ec.SECP384R1()))


def test_a_digest_is_the_documented_one():
    assert digest("seed", b"ab", b"c") == hashlib.sha256(b"fedcore secagg 1 seed\0abc").digest()
    names = ["seed", "seeds", "upload", "plan", "plan hash"]
    assert not any(a != b and domain(a).startswith(domain(b)) for a in names for b in names)
    assert {ED25519, P256} == set(KEY_LENGTHS)
