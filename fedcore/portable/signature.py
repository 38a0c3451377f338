"""The publisher's word for a training step: a detached signature over its SHA-256.

A graph that returned raw examples would have the same form as an honest one, so devices run only what the publisher signed, with a
key that their trust bundle names and that the coordinator does not need to hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedcore.errors import Refused
from fedcore.secagg.crypto import ED25519, Signer, verify

__all__ = ["SIGNATURE", "check_step_signature", "sign_step"]

SIGNATURE = 64
"""Bytes of a signature."""
_STEP = "training step"  # domain tag


def sign_step(key: Signer, step: bytes) -> bytes:
    """64 bytes of the publisher's key over the step's SHA-256."""
    return key.sign(_STEP, hashlib.sha256(step).digest())


def check_step_signature(step: bytes, signature: bytes, publisher_keys: Sequence[bytes]) -> None:
    """See that one of the publishers signed a step.

    Raises:
        Refused: none of them did, or none is known.
    """
    digest = hashlib.sha256(step).digest()
    for key in publisher_keys:
        try:
            verify(ED25519, key, signature, _STEP, digest)
        except Refused:
            continue
        return
    raise Refused(f"training step {digest.hex()[:16]}: no publisher of the trust bundle has signed it")
