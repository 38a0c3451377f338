"""The JSON vectors: recomputed by their generator, and read back by the machines and by the slow twins."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from secagg_reference import aes_ctr_words, hkdf_expand, hkdf_extract, merkle_root, packed_bits, shamir_at_zero
from secagg_world import World

from fedcore.secagg.crypto import open_box, verify
from fedcore.secagg.masks import add_packed, zeros
from fedcore.secagg.messages import CheckIn, Header, Invitation, Plan, Proposal, Release, ReleaseRequest
from fedcore.secagg.shamir import PRIME

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg"
FILES = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


def test_the_files_are_what_the_generator_gives():
    spec = importlib.util.spec_from_file_location("secagg_vectors", FOLDER / "generate.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built = module.build()
    assert set(built) == set(FILES)
    for name, vectors in built.items():
        assert module.rendered(vectors) == (FOLDER / f"{name}.json").read_text(), name


def test_primitives_by_the_slow_twins():
    for vector in FILES["primitives"]["pair_seeds"]:
        low, high = sorted((vector["i"], vector["j"]))
        info = (
            b"fedcore secagg 1 pair seed\0" + bytes.fromhex(vector["plan_hash"]) + low.to_bytes(4, "big") + high.to_bytes(4, "big")
        )
        assert hkdf_expand(hkdf_extract(b"", bytes.fromhex(vector["shared"])), info, 32).hex() == vector["seed"]
    for vector in FILES["primitives"]["merkle"]:
        assert merkle_root([bytes.fromhex(leaf) for leaf in vector["leaves"]]).hex() == vector["root"]
    for vector in FILES["primitives"]["signatures"]:
        key, signature, content = (bytes.fromhex(vector[name]) for name in ("public", "signature", "content"))
        verify(vector["algorithm"], key, signature, vector["purpose"], content)


def test_masks_and_shares_by_the_slow_twins():
    for vector in FILES["masks"]["masks"]:
        words = aes_ctr_words(bytes.fromhex(vector["seed"]), 9, 2 if vector["bits"] == 16 else 4)
        assert [word % (1 << vector["bits"]) for word in words] == vector["first"]
    for vector in FILES["masks"]["packed"]:
        assert packed_bits(vector["values"], vector["bits"]).hex() == vector["packed"]
    vector = FILES["shares"]
    for slot, secret in enumerate(vector["secrets"]):
        columns = {point: int(column[slot], 16) for point, column in zip(vector["points"], vector["shares_by_point"], strict=True)}
        for chosen in ([1, 2, 4], [2, 4, 5]):
            assert shamir_at_zero({a: columns[a] for a in chosen}, PRIME) == int(secret, 16)


@pytest.mark.parametrize("client", ["0", "1", "3"])
def test_the_round_unmasks_by_hand(client):
    """A client's upload, undone from its own recorded randomness and the neighbours' keys, with the slow twins only."""
    vectors = FILES["round"]
    i, plan_hash = int(client), bytes.fromhex(vectors["plan_hash"])
    draws = [bytes.fromhex(draw) for draw in vectors["random"][f"client {i}"]]
    private, own_seed = X25519PrivateKey.from_private_bytes(draws[0]), draws[1]
    upload = bytes.fromhex(vectors["uploads"][client])
    words = zeros(7, 16)
    add_packed(words, upload[4 + int.from_bytes(upload[:4], "big") :], 16)
    values = words.astype(np.int64) - aes_ctr_words(own_seed, 7, 2)
    for j in {0, 1, 2, 3} - {i}:
        other = CheckIn.decode(bytes.fromhex(vectors["signed"][f"check-in {j}"]["bytes"])).key
        info = b"fedcore secagg 1 pair seed\0" + plan_hash + min(i, j).to_bytes(4, "big") + max(i, j).to_bytes(4, "big")
        seed = hkdf_expand(hkdf_extract(b"", private.exchange(X25519PublicKey.from_public_bytes(other))), info, 32)
        values += (-1 if j > i else 1) * np.array(aes_ctr_words(seed, 7, 2))
    assert (values % 65536).tolist() == vectors["vectors"][client]


def test_boxes_open_and_messages_read_back():
    vectors = FILES["round"]
    plan_hash = bytes.fromhex(vectors["plan_hash"])
    for box in vectors["boxes"]:
        secret = X25519PrivateKey.from_private_bytes(bytes.fromhex(vectors["random"][f"member {box['member']}"][0]))
        content = open_box(secret, plan_hash, box["client"], box["member"], bytes.fromhex(box["box"]))
        assert content.hex() == box["content"]
    assert Header.decode(bytes.fromhex(vectors["header_bytes"])).encode().hex() == vectors["header_bytes"]
    for cls, text in [
        (Plan, vectors["plan"]), (Proposal, vectors["proposal"]), (Invitation, vectors["invitations"]["2"]),
        (ReleaseRequest, vectors["requests"]["release request 4"]), (Release, vectors["signed"]["release 4"]["bytes"]),
    ]:  # fmt: skip
        assert cls.decode(bytes.fromhex(text)).encode().hex() == text


def test_the_sum_of_the_round_is_the_sum_of_its_vectors():
    vectors = FILES["round"]
    assert vectors["total"] == [sum(column) % 65536 for column in zip(*vectors["vectors"].values(), strict=True)]
    assert vectors["total"] != vectors["masked_total"]
    assert World(clients=0).trust.encode().hex() == vectors["signed"]["trust"]["bytes"]
