"""Shares of the mask seeds: how a client deals them into boxes, and what holds a box, its signed root and a release together.

Slot 0 is the client's own mask, slot 1 + r the mask with its r-th neighbour. A box's content is the member's shares, slot by slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import digest
from fedcore.secagg.merkle import root_of
from fedcore.secagg.shamir import SHARE_LENGTH, is_share, split

__all__ = ["Deal", "commitment_to", "deal", "share_leaf", "share_leaves", "shares_in"]


@dataclass(frozen=True)
class Deal:
    """What a client makes of its seeds: box contents (secret) and roots, one a member, and commitments, one a slot."""

    contents: tuple[bytes, ...] = field(repr=False)
    roots: tuple[bytes, ...]
    commitments: tuple[bytes, ...]


def deal(
    plan_hash: bytes, client: int, threshold: int, members: Sequence[int], seeds: Sequence[bytes], random: RandomBytes
) -> Deal:  # fmt: skip
    """Share every slot's seed among ``members``, any ``threshold`` of whom can tell it."""
    columns = split(seeds, threshold, members, random)
    roots = [root_of(share_leaves(plan_hash, client, member, shares)) for member, shares in zip(members, columns, strict=True)]
    return Deal(tuple(b"".join(shares) for shares in columns), tuple(roots), tuple(commitment_to(seed) for seed in seeds))


def commitment_to(seed: bytes) -> bytes:
    """H(domain | seed)."""
    return digest("seed", seed)


def share_leaf(plan_hash: bytes, client: int, member: int, slot: int, share: bytes) -> bytes:
    """The leaf hash over plan hash | client | member | slot | share."""
    place = client.to_bytes(4, "big") + bytes([member]) + slot.to_bytes(4, "big")
    return hashlib.sha256(b"\0" + plan_hash + place + share).digest()


def share_leaves(plan_hash: bytes, client: int, member: int, shares: Sequence[bytes]) -> list[bytes]:
    """The leaf hashes of one member's shares, all slots of one client."""
    prefix = hashlib.sha256(b"\0" + plan_hash + client.to_bytes(4, "big") + bytes([member]))
    leaves = []
    for slot, share in enumerate(shares):
        hasher = prefix.copy()
        hasher.update(slot.to_bytes(4, "big") + share)
        leaves.append(hasher.digest())
    return leaves


def shares_in(content: bytes, slots: int) -> list[bytes]:
    """The shares in a box's content.

    Raises:
        Refused: another number of slots, or what is no element of the field.
    """
    if len(content) != slots * SHARE_LENGTH:
        raise Refused(f"the box has {len(content)} bytes for {slots} slots")
    shares = [content[at : at + SHARE_LENGTH] for at in range(0, len(content), SHARE_LENGTH)]
    if not all(map(is_share, shares)):
        raise Refused("the box has a share beyond the field")
    return shares
