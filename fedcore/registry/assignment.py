"""What one device is to install: signed for it alone, good for at most an hour, and looked at again when a model is activated.

It only chooses among what the repository's roles signed; it can hold a device back or send it forward, never make it take a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from fedcore.errors import Refused
from fedcore.secagg.crypto import ED25519, Signer, verify
from fedcore.secagg.encoding import TEXT, U64, Message, coded, fixed

__all__ = ["LONGEST", "Assignment", "check_assignment", "sign_assignment", "still_good"]

LONGEST = 3600  # seconds from being signed to its end
_PURPOSE = "release assignment"


@dataclass(frozen=True, slots=True)
class Assignment(Message):
    """``device`` is the SHA-256 of its identity key; ``target`` is `fedcore.registry.catalogue.Catalogue.digest` of the release.

    ``sequence`` rises with each assignment of a device. ``issued`` and ``expiry`` are Unix seconds.
    """

    TAG: ClassVar[int] = 96
    device: bytes = coded(fixed(32))
    sequence: int = coded(U64)
    rollout: str = coded(TEXT)
    model: str = coded(TEXT)
    version: int = coded(U64)
    target: bytes = coded(fixed(32))
    issued: int = coded(U64)
    expiry: int = coded(U64)
    signature: bytes = coded(fixed(64))


def sign_assignment(assignment: Assignment, key: Signer) -> bytes:
    """The bytes to send; the assignment's own signature is replaced.

    Raises:
        Refused: it would be good for longer than an hour, or not at all.
    """
    if not 0 < assignment.expiry - assignment.issued <= LONGEST:
        raise Refused(f"an assignment is good for 1 to {LONGEST} s, got {assignment.expiry - assignment.issued}")
    return replace(assignment, signature=key.sign(_PURPOSE, assignment.content())).encode()


def check_assignment(data: bytes, keys: Collection[bytes], device: bytes, last: int, now: float) -> Assignment:
    """The assignment in ``data``, for this device and not seen before.

    Args:
        keys: the Ed25519 keys of which one assigns, pinned at enrolment (`FleetTrust.time_keys`).
        last: the highest sequence that was accepted. now: Unix seconds.

    Raises:
        Refused: not that, signed by somebody else, an old one, or one that is over or claims to be good for too long.
    """
    found = Assignment.decode(data)
    _check_signature(found, keys)
    if found.device != device:
        raise Refused("this assignment is for another device")
    if found.sequence <= last:
        raise Refused(f"assignment {found.sequence} is not newer than {last}, which this device has had")
    if not 0 < found.expiry - found.issued <= LONGEST:
        raise Refused(f"an assignment that is good for {found.expiry - found.issued} s; at most {LONGEST} are allowed")
    still_good(found, found.target, now)
    return found


def _check_signature(found: Assignment, keys: Collection[bytes]) -> None:
    for key in keys:
        with contextlib.suppress(Refused):
            verify(ED25519, key, found.signature, _PURPOSE, found.content())
            return
    raise Refused("this assignment is signed by none of the keys that this device trusts")


def still_good(assignment: Assignment, target: bytes, now: float) -> None:
    """What is checked again at the moment of activation: the time, and that ``target`` is what was assigned.

    Raises:
        Refused: it is over, not begun, or for another release.
    """
    if now >= assignment.expiry:
        raise Refused("the assignment is over; ask again")
    if now < assignment.issued - LONGEST:
        raise Refused("the assignment is from the future: is this device's clock right?")
    if target != assignment.target:
        raise Refused(f"the release is not the one that was assigned ({assignment.model} {assignment.version})")
