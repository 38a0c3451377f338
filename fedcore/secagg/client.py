"""The client's side of a round: check in, accept one plan, upload once.

The machine holds secrets in memory only. The key of a check-in is gone once a plan is accepted, everything else is gone when
`Client.upload` returns: an upload can be sent again, byte for byte, or given up, but never built again. (Python lets go of
memory, it does not overwrite it: the vector is overwritten here, seeds and keys are left to the allocator.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.errors import Refused
from fedcore.privacy.randomness import RandomBytes
from fedcore.secagg.crypto import Signer, agree, pair_seed, seal_box
from fedcore.secagg.dealing import deal
from fedcore.secagg.masks import Words, add_masks, pack, reduce, subtract_masks, word_type
from fedcore.secagg.messages import (
    CHECK_IN,
    STATEMENT,
    Certificate,
    CheckIn,
    Header,
    Invitation,
    Statement,
    TrustBundle,
    UploadHead,
)
from fedcore.secagg.plan import CheckedPlan, Policy, check_plan
from fedcore.secagg.trust import blaming

__all__ = ["Client", "Upload", "split_upload"]


@dataclass(frozen=True)
class Upload:
    """One upload, and what it counts as. Both become durable before the first byte of ``data`` leaves the device.

    ``data`` is a 4-byte length, the `UploadHead` of that length, and the packed masked vector.
    """

    task: str
    round: int
    plan_hash: bytes
    data: bytes = field(repr=False)


@dataclass
class _Accepted:
    plan: CheckedPlan
    index: int
    seeds: dict[int, bytes] = field(repr=False)  # by neighbour


class Client:
    """A client with its identity. ``random`` is `os.urandom` on devices."""

    def __init__(
        self, identity: Signer, certificate: Certificate, trust: TrustBundle, policy: Policy, random: RandomBytes
    ) -> None:  # fmt: skip
        self._identity, self._certificate = identity, certificate
        self._trust, self._policy, self._random = trust, policy, random
        self._open: tuple[X25519PrivateKey, CheckIn] | None = None
        self._accepted: _Accepted | None = None

    def check_in(self, task: str, epoch: int, expiry: int) -> bytes:
        """A `CheckIn` with a fresh key for at most one plan; whatever an earlier one left behind is gone."""
        self._accepted = None
        key = X25519PrivateKey.from_private_bytes(self._random(32))
        unsigned = CheckIn(self._certificate, task, epoch, expiry, key.public_key().public_bytes_raw(), bytes(64))
        signature = self._identity.sign(CHECK_IN, unsigned.content())
        self._open = key, CheckIn(self._certificate, task, epoch, expiry, unsigned.key, signature)
        return self._open[1].encode()

    def accept(self, invitation: bytes, model_hash: bytes, now: int) -> CheckedPlan:
        """Check the plan for the model that was received; from then on this check-in takes no other.

        Raises:
            Misbehaviour: the coordinator's plan is not one that the committee approved, or not acceptable to this client.
            Refused: no check-in is open.
        """
        if self._open is None:
            raise Refused("no check-in is open: a key serves one plan")
        key, check_in = self._open
        with blaming("coordinator"):
            message = Invitation.decode(invitation)
            plan = check_plan(message.plan, self._trust, self._policy, now)
            if plan.header.model_hash != model_hash:
                raise Refused("the plan is for another model than the one received")
            own = plan.check_link(message.own)
            if own.check_in != check_in:
                raise Refused(f"client {own.index} of the plan is not this client's open check-in")
            seeds = self._agree(key, plan, own.index, message)
        self._open, self._accepted = None, _Accepted(plan, own.index, seeds)
        return plan

    def upload(self, vector: npt.NDArray[np.integer[Any]]) -> Upload:
        """Mask ``vector`` [length] of integers in [0, 2^b) and deal the seeds. The vector is overwritten with zeros.

        Raises:
            Refused: no plan is accepted, or the vector is not one of the plan; it is unchanged then.
        """
        if self._accepted is None:
            raise Refused("no plan is accepted: an upload is made once, and resent as it is")
        accepted = self._accepted
        header = accepted.plan.header
        words = _words(vector, header)
        vector.fill(0)
        self._accepted = None
        own_seed = self._random(32)
        _mask(words, own_seed, accepted)
        reduce(words, header.bits)
        packed = pack(words, header.bits)
        head = self._head(packed, [own_seed, *(accepted.seeds[j] for j in sorted(accepted.seeds))], accepted).encode()
        data = b"".join([len(head).to_bytes(4, "big"), head, packed])
        return Upload(header.task, header.round, accepted.plan.hash, data)

    def _agree(self, key: X25519PrivateKey, plan: CheckedPlan, own: int, message: Invitation) -> dict[int, bytes]:
        """The seed with every neighbour, whom the plan's seed names and the tree shows."""
        entries = [plan.check_link(link) for link in message.neighbours]
        if tuple(entry.index for entry in entries) != plan.graph.neighbours(own):
            raise Refused("the plan's neighbours are not those that its seed gives")
        seeds = {}
        for entry in entries:
            try:
                seeds[entry.index] = pair_seed(agree(key, entry.check_in.key), plan.hash, own, entry.index)
            except Refused as error:
                raise Refused(f"client {entry.index}: {error}") from None
        return seeds

    def _head(self, packed: bytes, seeds: list[bytes], accepted: _Accepted) -> UploadHead:
        plan, index = accepted.plan, accepted.index
        header = plan.header
        dealt = deal(plan.hash, index, header.threshold, header.points, seeds, self._random)
        boxes = tuple(
            seal_box(offer.box_key, plan.hash, index, offer.member, content)
            for offer, content in zip(header.offers, dealt.contents, strict=True)
        )
        hashes = tuple(hashlib.sha256(box).digest() for box in boxes)
        parts = (plan.hash, index, hashlib.sha256(packed).digest(), hashes, dealt.roots, dealt.commitments)
        signature = self._identity.sign(STATEMENT, Statement(*parts, bytes(64)).content())
        return UploadHead(Statement(*parts, signature), boxes)


def split_upload(data: bytes | memoryview) -> tuple[bytes, memoryview]:
    """The head and the packed vector of an upload, without copying the vector.

    Raises:
        Refused: the upload ends within its head.
    """
    view = memoryview(data)
    end = 4 + int.from_bytes(view[:4], "big")
    if len(view) < max(end, 4):
        raise Refused(f"the upload of {len(view)} bytes ends within its head")
    return bytes(view[4:end]), view[end:]


def _words(vector: npt.NDArray[np.integer[Any]], header: Header) -> Words:
    """A copy in words."""
    if vector.shape != (header.length,) or vector.dtype.kind not in "iu" or not vector.flags.writeable:
        raise Refused(f"the plan is for {header.length} integers that may be overwritten, got {vector.shape} of {vector.dtype}")
    wide = vector.dtype != np.uint16 or header.bits != 16
    if wide and (int(vector.min()) < 0 or int(vector.max()) >> header.bits):
        raise Refused(f"the plan is for integers of {header.bits} bits; some are outside")
    return vector.astype(word_type(header.bits))


def _mask(words: Words, own_seed: bytes, accepted: _Accepted) -> None:
    """y_i = x_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij)."""
    add_masks(words, [own_seed, *(seed for j, seed in accepted.seeds.items() if j > accepted.index)])
    subtract_masks(words, [seed for j, seed in accepted.seeds.items() if j < accepted.index])
