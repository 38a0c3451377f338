"""The round's model, from the one of an earlier round where the device still holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.lineage import deltas_of
from fedcore_device.state import State, write_durably

__all__ = ["fetch_model", "named_blobs"]


def named_blobs(plan: pb.Plan) -> set[str]:
    """Digests, in hexadecimal, of all that a plan can use: its blobs, and the models that its deltas are from."""
    return {blob.digest.hex() for blob in plan.blobs} | set(deltas_of(plan))


def fetch_model(state: State, plan: pb.Plan, model: pb.Blob, fetch: Callable[[pb.Blob], bytes]) -> bytes:
    """The bytes of the blob ``model``. Whatever is wrong with a delta, the whole file is there too. Raises as ``fetch``."""
    path = state.blob(model.digest)
    for base, delta in sorted(deltas_of(plan).items(), key=lambda one: one[1].size):
        held = state.blobs / base
        if path.exists() or delta.size >= model.size or base not in {one.name for one in state.blobs.iterdir()}:
            continue
        from fedcore.registry.delta import apply_delta  # imports numpy

        with contextlib.suppress(Refused):
            write_durably(path, apply_delta(held.read_bytes(), fetch(delta), model.digest, model.size))
    return fetch(model)
