"""The round's model as a delta against one of a recent round: what a plan names beside the model, and how it is read there.

A delta is a blob of the plan whose name carries the SHA-256 of the model that it is from. A device that holds that one fetches the
delta, and knows by the digest of the blob "model" whether the result is right; every other device fetches the model.
"""

from __future__ import annotations

import hashlib
from collections import deque

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs

__all__ = ["Lineage", "deltas_of"]

_NAME = "model-from-"
_KEPT = 2  # models: devices come back after a round or two, or after many
_LARGEST = 8 << 20  # bytes of a model: packing a delta takes seconds for ten megabytes
_WORTH = 0.8  # of the model's length; a delta that is hardly shorter is one more thing to go wrong


class Lineage:
    """Puts the models of rounds where gateways find them, and remembers the last ones."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._recent: deque[bytes] = deque(maxlen=_KEPT)
        self._occasion: tuple[str, int] | None = None

    def offer(self, model: bytes, occasion: tuple[str, int]) -> tuple[pb.Blob, list[pb.Blob]]:
        """The blob "model", and deltas to it, the newest base first; none for a second model of one ``occasion`` (kind of work and
        round): where every device has a model of its own, no other holds what it is from."""
        whole = pb.Blob(name="model", digest=self._blobs.put(model), size=len(model))
        if occasion == self._occasion:
            return whole, []
        self._occasion = occasion
        deltas = [delta for base in reversed(self._recent) if base != model and (delta := self._delta(base, model)) is not None]
        if model in self._recent:
            self._recent.remove(model)
        self._recent.append(model)
        return whole, deltas

    def _delta(self, base: bytes, model: bytes) -> pb.Blob | None:
        if len(model) > _LARGEST:
            return None
        from fedcore.registry.delta import make_delta

        try:
            change = make_delta(base, model, ("model",))
        except Refused:  # of another shape
            return None
        if len(change) > _WORTH * len(model):
            return None
        name = f"{_NAME}{hashlib.sha256(base).hexdigest()}"
        return pb.Blob(name=name, digest=self._blobs.put(change), size=len(change))


def deltas_of(plan: pb.Plan) -> dict[str, pb.Blob]:
    """The deltas that a plan names, by the digest of the model that each is from, in hexadecimal."""
    return {blob.name.removeprefix(_NAME): blob for blob in plan.blobs if blob.name.startswith(_NAME)}
