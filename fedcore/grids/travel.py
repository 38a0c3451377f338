"""Simulated clients on their way to another process, perhaps on another machine: their model, and the data that they train on."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from fedcore.data import Dataset, Examples, FederatedData
from fedcore.errors import Refused
from fedcore.privacy.randomness import RootKey
from fedcore.training.client import Clients
from fedcore.training.engine import Engine

__all__ = ["Luggage", "MappedFile", "NotHere", "pack"]

Ints = npt.NDArray[np.int64]
_PIECE, _PIECES = 4096, 64  # bytes that are compared at as many places of a file


class NotHere(Exception):
    """A file that was named instead of copied is not on this machine, or has other content."""


@dataclass(frozen=True)
class MappedFile:
    """An array [shape] in C order that lies ``offset`` bytes into a file; ``sample`` is the digest of pieces of the file."""

    path: Path
    size: int
    sample: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> MappedFile | None:
        """Where ``array`` lies in a file on disk; None where it does not, or not in one piece."""
        base: Any = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not (isinstance(base, np.memmap) and base.filename and array.flags.c_contiguous):
            return None
        path = Path(base.filename).resolve()
        # Views keep the offset of the mapping they come from, so that what counts is how far they are from its beginning.
        offset = base.offset + _address(array) - _address(base)
        return cls(path, path.stat().st_size, _sample(path), array.dtype, offset, array.shape)

    def open(self) -> npt.NDArray[Any]:
        """The array, mapped.

        Raises:
            NotHere: no such file, or another one.
        """
        try:
            if self.path.stat().st_size == self.size and _sample(self.path) == self.sample:
                return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        except OSError as error:
            raise NotHere(f"{self.path}: {error.strerror}") from error
        raise NotHere(f"{self.path} has other content")


@dataclass(frozen=True)
class Luggage:
    """What `Clients` are made of, as a process without their memory needs it; arrays are whole, so that they can be shared.

    ``clients`` and ``holdout`` are the indices of all clients one after another, ``ends`` and ``holdout_ends`` where each ends.
    """

    model: nn.Module
    engine: Engine
    raw: npt.NDArray[Any] | MappedFile
    y: Ints
    values: npt.NDArray[np.float32] | None
    labels: tuple[str, ...]
    clients: Ints
    ends: Ints
    holdout: Ints
    holdout_ends: Ints
    seed: int
    encoding: str
    root: RootKey
    dropout: float

    def unpack(self) -> Clients:
        """The clients, without what only the coordinator looks at: test and calibration examples.

        Raises:
            NotHere: their data is in a file that this machine does not have.
        """
        raw = self.raw.open() if isinstance(self.raw, MappedFile) else self.raw
        train = Examples(raw, self.y, self.values)
        nothing = np.zeros(0, np.int64)
        dataset = Dataset("", self.labels, train, Examples(raw[:0], nothing, self.values), None, 0.0, 1.0)
        held, apart = np.split(self.clients, self.ends[:-1]), np.split(self.holdout, self.holdout_ends[:-1])
        data = FederatedData(dataset, tuple(held), tuple(apart), nothing)
        model = copy.deepcopy(self.model)  # what arrives may lie in memory that is shared and cannot be written to
        return Clients(
            model, data, self.engine, seed=self.seed, encoding=self.encoding, root=self.root, dropout=self.dropout
        )  # fmt: skip


def pack(clients: Clients, *, files: bool) -> Luggage:
    """Make ``clients`` ready to travel; with ``files``, data in a mapped file is named instead of copied.

    Raises:
        Refused: they are real, or draw from a secret key, which stays where it is.
    """
    if clients.real or clients.root.secret:
        raise Refused("clients that draw noise from a secret do not travel to other processes")
    train, data = clients.data.dataset.train, clients.data
    raw = (MappedFile.of(train.raw) if files else None) or np.asarray(train.raw)
    held, apart = ((np.concatenate([*parts, np.zeros(0, np.int64)]), _ends(parts)) for parts in (data.clients, data.holdout))
    return Luggage(
        copy.deepcopy(clients.model), clients.engine, raw, train.y, train.values, data.dataset.labels, *held, *apart,
        clients.seed, clients.encoding, clients.root, clients.dropout,
    )  # fmt: skip


def _ends(parts: tuple[Ints, ...]) -> Ints:
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _sample(path: Path) -> str:
    """SHA-256 of pieces spread evenly over a file, its first and last bytes among them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for place in np.linspace(0, max(0, size - _PIECE), _PIECES, dtype=np.int64).tolist():
            file.seek(place)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()
