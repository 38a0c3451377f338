"""A round of training in a file, so that a device that stops or loses power goes on where it was.

Format (little-endian): ``FCT1`` | header length, uint32 | header, JSON | parameters, float32 | velocity, float32, if any |
SHA-256 of all before. The header names the work by a fingerprint of all that determines it, and holds the state of the
generators: the file is as secret as the examples it lies beside, and readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore_device.state import write_durably

__all__ = ["Progress", "load_progress", "restored_generator", "save_progress", "state_of"]

Floats = npt.NDArray[np.float32]
_MAGIC, _LENGTH, _DIGEST = b"FCT1", struct.Struct("<I"), 32
_GENERATORS = ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937")


@dataclass
class Progress:
    """Where a round stands after ``step`` steps: parameters [d], momentum's velocity [d] or None without momentum, sums of
    losses and examples so far, and how the generators were when the round began."""

    parameters: Floats
    velocity: Floats | None
    step: int
    loss: float
    trained: int
    order: Mapping[str, Any] = field(repr=False)
    noise_key: bytes = field(repr=False)


def save_progress(path: Path, fingerprint: str, progress: Progress) -> None:
    """Replace the file, durably: after a crash at any moment it is whole, the old one or the new one.

    Raises:
        TryAgain: it cannot be written.
    """
    header = json.dumps({
        "fingerprint": fingerprint, "step": progress.step, "loss": progress.loss.hex(), "trained": progress.trained,
        "values": len(progress.parameters), "velocity": progress.velocity is not None, "order": dict(progress.order),
        "noise_key": progress.noise_key.hex(),
    }).encode()  # fmt: skip
    arrays = [progress.parameters] + ([] if progress.velocity is None else [progress.velocity])
    content = b"".join([_MAGIC, _LENGTH.pack(len(header)), header, *(array.astype("<f4").tobytes() for array in arrays)])
    write_durably(path, content + hashlib.sha256(content).digest())


def load_progress(path: Path, fingerprint: str) -> Progress | None:
    """The progress of the work that ``fingerprint`` names; None where there is none, it is of other work, or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest or not body.startswith(_MAGIC):
        return None
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(body[len(_MAGIC) : start])
    header = json.loads(body[start : start + length])
    if header["fingerprint"] != fingerprint:
        return None
    values = np.frombuffer(body[start + length :], "<f4").astype(np.float32)
    parameters, velocity = values[: header["values"]].copy(), values[header["values"] :].copy()
    return Progress(
        parameters, velocity if header["velocity"] else None, header["step"], float.fromhex(header["loss"]), header["trained"],
        header["order"], bytes.fromhex(header["noise_key"]),
    )  # fmt: skip


def state_of(rng: np.random.Generator) -> dict[str, Any]:
    """The generator's state as JSON has it; the inverse of `restored_generator`."""
    found = _plain(rng.bit_generator.state)
    if found["bit_generator"] not in _GENERATORS:
        raise ValueError(f"a checkpoint cannot hold the state of a {found['bit_generator']}")
    return dict(found)


def restored_generator(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on from a state."""
    if state["bit_generator"] not in _GENERATORS:
        raise ValueError(f"a checkpoint cannot hold the state of a {state['bit_generator']}")
    bits = getattr(np.random, state["bit_generator"])(0)
    bits.state = _typed(dict(state), bits.state)
    return np.random.Generator(bits)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _typed(value: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _typed(value[key], like[key]) for key in like}
    return np.array(value, like.dtype) if isinstance(like, np.ndarray) else value
