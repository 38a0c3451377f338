"""Merkle trees with the leaf and node prefixes of RFC 6962, section 2.1: one root commits to many leaves, a path shows one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedcore.errors import Refused

__all__ = ["MerkleTree", "check_path", "leaf_hash", "root_of"]


def leaf_hash(content: bytes) -> bytes:
    """SHA-256 over a zero byte and the leaf's content."""
    return hashlib.sha256(b"\0" + content).digest()


class MerkleTree:
    """The tree over leaf hashes [n], n >= 1.

    Built level by level; a last node without a sibling moves up unchanged. That is RFC 6962's split at the largest power of
    two below n.
    """

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._levels = [list(leaves)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_above(self._levels[-1]))
        self.root = self._levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """The sibling on each level that has one, from the leaf upwards: what `check_path` takes."""
        found = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                found.append(level[index ^ 1])
            index >>= 1
        return tuple(found)


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes [n], n >= 1."""
    level = list(leaves)
    while len(level) > 1:
        level = _above(level)
    return level[0]


def check_path(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Check that the leaf hash ``leaf`` stands at ``index`` of a tree of ``size`` leaves.

    Raises:
        Refused: it does not, or the path has another length.
    """
    if not 0 <= index < size:
        raise Refused(f"index {index} is not in a tree of {size} leaves")
    siblings, node = iter(path), leaf
    try:
        while size > 1:
            if index ^ 1 < size:
                sibling = next(siblings)
                node = _node(sibling, node) if index & 1 else _node(node, sibling)
            index, size = index >> 1, (size + 1) >> 1
    except StopIteration:
        node = b""
    if node != root or next(siblings, None) is not None:
        raise Refused("the Merkle path does not lead to the root")


def _above(level: list[bytes]) -> list[bytes]:
    pairs = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + level[len(level) - len(level) % 2 :]


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
