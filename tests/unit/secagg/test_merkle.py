import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_reference import merkle_path, merkle_root

from fedcore.errors import Refused
from fedcore.secagg.merkle import MerkleTree, check_path, leaf_hash, root_of

leaf_lists = st.lists(st.binary(max_size=5), min_size=1, max_size=40)


def test_the_root_of_certificate_transparency():
    """RFC 6962's reference tests (Google's merkletree: 8 leaves)."""
    leaves = [bytes.fromhex(text) for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )]  # fmt: skip
    root = root_of([leaf_hash(leaf) for leaf in leaves])
    assert root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@given(leaf_lists)
def test_roots_and_paths_are_those_of_rfc_6962(contents):
    leaves = [leaf_hash(content) for content in contents]
    tree = MerkleTree(leaves)
    assert tree.root == root_of(leaves) == merkle_root(contents)
    for index, leaf in enumerate(leaves):
        assert list(tree.path(index)) == merkle_path(contents, index)
        check_path(leaf, index, len(leaves), tree.path(index), tree.root)


@given(leaf_lists, st.data())
def test_a_path_proves_one_leaf_at_one_place(contents, data):
    contents = list(dict.fromkeys(contents))
    leaves = [leaf_hash(content) for content in contents]
    tree, size = MerkleTree(leaves), len(leaves)
    index = data.draw(st.integers(0, size - 1))
    path = tree.path(index)
    wrong = [
        (leaf_hash(b"forged"), index, size, path, tree.root),
        (leaves[index], size, size, path, tree.root),
        (leaves[index], -1, size, path, tree.root),
        (leaves[index], index, size, (*path, bytes(32)), tree.root),
        (leaves[index], index, size, path, bytes(32)),
        *((leaves[index], other, size, path, tree.root) for other in range(size) if other != index),
    ]
    if path:
        level = data.draw(st.integers(0, len(path) - 1))
        flipped = bytes([path[level][0] ^ 1]) + path[level][1:]
        wrong += [
            (leaves[index], index, size, path[:-1], tree.root),
            (leaves[index], index, size, (*path[:level], flipped, *path[level + 1 :]), tree.root),
        ]
    for case in wrong:
        with pytest.raises(Refused):
            check_path(*case)


def test_a_node_is_no_leaf():
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert root_of([left, right]) == hashlib.sha256(b"\x01" + left + right).digest() != leaf_hash(left + right)
