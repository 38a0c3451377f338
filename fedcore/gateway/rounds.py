"""A round as the coordinator publishes it to the gateways: a `state.gateway.Round` with this document in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from google.protobuf.message import DecodeError

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.fleet import Selection
from fedcore.gateway.sums import UploadTerms
from fedcore.secagg.messages import CheckIn
from fedcore.state.gateway import GatewayStore

__all__ = ["ENDED", "ENDS", "PRESENT", "REPORT", "Place", "RoundDocument", "is_for", "named_blobs"]

PRESENT, REPORT, ENDED = "present", "report", "ended"
"""Kinds of notes in a round: who checked in for it (`fleet.Told`), what devices reported, and for whom it is over though
they uploaded nothing: a kind of its own, so that these few are found without reading what everybody reported."""
ENDS = frozenset({pb.REFUSED_PLAN, pb.FAILED, pb.GAVE_UP})
"""Outcomes after which a device is not offered the round again. One that is not eligible now may go on with it later."""


@dataclass(frozen=True)
class Place:
    """What a device of the cohort is given: a plan, by its place in the document, and the blob with its invitation, or none."""

    plan: int
    invitation: bytes = b""


@dataclass(frozen=True)
class RoundDocument:
    """``until`` is when the present state ends (Unix seconds). While devices check in there is the selection, in secure rounds with
    the visit (task, epoch, expiry); afterwards also signed plans (serialized), the cohort, and what an upload must be."""

    selection: Selection
    until: float
    visit: tuple[str, int, int] | None = None
    plans: tuple[bytes, ...] = ()
    cohort: Mapping[int, Place] = field(default_factory=dict)
    uploads: UploadTerms | None = None
    reason: str = ""

    def blobs(self, device: int) -> set[bytes]:
        """Digests of what a device may fetch."""
        place = self.cohort.get(device)
        if place is None:
            return set()
        plan = pb.Plan.FromString(pb.SignedPlan.FromString(self.plans[place.plan]).plan)
        return {blob.digest for blob in plan.blobs}

    def named(self) -> set[bytes]:
        """Digests of everything that the plans and invitations name.

        Raises:
            Refused: a plan cannot be read.
        """
        try:
            plans = [pb.Plan.FromString(pb.SignedPlan.FromString(plan).plan) for plan in self.plans]
        except DecodeError:
            raise Refused("a round's plan cannot be read") from None
        invitations = {place.invitation for place in self.cohort.values() if place.invitation}
        return {blob.digest for plan in plans for blob in plan.blobs} | invitations

    def encode(self) -> str:
        """As JSON."""
        return json.dumps({
            "selection": self.selection.to_table(), "until": self.until, "visit": self.visit, "reason": self.reason,
            "plans": [base64.b64encode(plan).decode() for plan in self.plans],
            "cohort": {str(device): [place.plan, place.invitation.hex()] for device, place in self.cohort.items()},
            "uploads": asdict(self.uploads) if self.uploads else None,
        })  # fmt: skip

    @classmethod
    def decode(cls, text: str) -> Self:
        """Inverse of `encode`.

        Raises:
            Refused: it is no such document.
        """
        try:
            found = json.loads(text)
            visit = found["visit"]
            return cls(
                Selection.from_table(found["selection"]), float(found["until"]), tuple(visit) if visit else None,
                tuple(base64.b64decode(plan) for plan in found["plans"]),
                {int(device): Place(plan, bytes.fromhex(blob)) for device, (plan, blob) in found["cohort"].items()},
                UploadTerms(**found["uploads"]) if found["uploads"] else None, found["reason"],
            )  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f"a round's document cannot be read ({type(error).__name__})") from None


def named_blobs(store: GatewayStore) -> tuple[set[bytes], float]:
    """Digests of all blobs that a round in the store names or counts, and the longest window of these rounds in seconds.

    Raises:
        Refused: a round cannot be read, so that nobody knows what it names.
    """
    named, window = set[bytes](), 0.0
    for key in store.rounds():
        one = store.round(key)
        if one is not None:
            document = RoundDocument.decode(one.document)
            named |= document.named() | {upload.digest for upload in store.contributions(key)}
            window = max(window, document.selection.window)
    return named, window


def is_for(round_key: bytes, visit: tuple[str, int, int]) -> bool:
    """Whether a check-in of secure aggregation is for this visit; whether it is the device's, committee and coordinator see."""
    try:
        found = CheckIn.decode(round_key)
    except Refused:
        return False
    return (found.task, found.epoch, found.expiry) == visit
