"""A client whose part in a round comes in two messages, to processes that may share nothing but 32 secret bytes between them.

Flower starts a process for every message, and simulated clients are trained by whichever worker is free. A client's secrets of a
round are therefore drawn from a key of that round: whoever holds it continues where the check-in ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.privacy.randomness import derive_key, keystream
from fedcore.secagg.client import Client
from fedcore.secagg.crypto import Ed25519Key, Signer, digest
from fedcore.secagg.keys import IDENTITY, read_message, read_public_key, read_signing_key
from fedcore.secagg.messages import Certificate, Header, TrustBundle
from fedcore.secagg.plan import Policy
from fedcore.secagg.sums import ScoreSum, Summation, header_numbers
from fedcore.secagg.trust import blaming, check_trust, issue_certificate

__all__ = [
    "Accepted", "Demands", "Participant", "Participants", "SimulatedParticipants", "Visit", "claim_visit", "enrolled_participant",
    "hash_work",
]  # fmt: skip

Integers = npt.NDArray[np.unsignedinteger[Any]]
_TEN_YEARS = 10 * 365 * 86400
_KEPT = 7 * 86400  # seconds: longer than any policy lets a round take


@dataclass(frozen=True)
class Visit:
    """What a client checks in for: one attempt at a round of a task, over at ``expiry`` (Unix seconds)."""

    task: str
    epoch: int
    expiry: int


@dataclass(frozen=True)
class Demands:
    """The least that a client demands of a plan, by what is summed: updates are over other clients than scores."""

    updates: Policy
    scores: Policy

    def of(self, summation: Summation) -> Policy:
        """What is demanded of a plan for this sum."""
        return self.scores if isinstance(summation, ScoreSum) else self.updates


class Participants(Protocol):
    """The clients of a grid, by their number in it."""

    def check_in(self, client: int, visit: Visit) -> bytes:
        """The client's `CheckIn`."""
        ...

    def accept(self, client: int, visit: Visit, invitation: bytes, model_hash: bytes, summation: Summation) -> Accepted:
        """Check the plan that the client is invited to. Nothing is trained or said before: what fails after it stays here."""
        ...


class Accepted:
    """A client that has accepted a plan, for one upload."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(self, vector: Integers) -> bytes:
        """The masked ``vector`` [size], which is overwritten, as `Client.upload` gives it."""
        return self._client.upload(vector).data


class Participant:
    """One client. ``key`` [32 bytes] is drawn for one visit, and forgotten when `accept` is called."""

    def __init__(self, identity: Signer, certificate: Certificate, trust: TrustBundle, demands: Demands) -> None:
        self._identity, self._certificate, self._trust, self._demands = identity, certificate, trust, demands

    def check_in(self, key: bytes, visit: Visit) -> bytes:
        """The `CheckIn` for a visit."""
        return self._client(key, self._demands.updates).check_in(visit.task, visit.epoch, visit.expiry)

    def accept(self, key: bytes, visit: Visit, invitation: bytes, model_hash: bytes, summation: Summation) -> Accepted:
        """Check the plan of the invitation.

        Raises:
            Misbehaviour: the plan is not one that the committee approved, that this client's policy allows, or that its training
                configuration announced.
        """
        client = self._client(key, self._demands.of(summation))
        client.check_in(visit.task, visit.epoch, visit.expiry)
        header = client.accept(invitation, model_hash, int(time.time())).header
        with blaming("coordinator"):
            _check_announced(header, summation)
        return Accepted(client)

    def _client(self, key: bytes, policy: Policy) -> Client:
        return Client(self._identity, self._certificate, self._trust, policy, keystream(key))


def hash_work(model: bytes, task: Mapping[str, Any]) -> bytes:
    """What a plan binds: SHA-256 over the encoded model and the training configuration, so that all clients do the same work."""
    text = json.dumps(dict(task), sort_keys=True, default=lambda value: {"bytes": bytes(value).hex()})
    return hashlib.sha256(hashlib.sha256(model).digest() + text.encode()).digest()


def claim_visit(directory: Path, visit: Visit) -> None:
    """Note durably, before anything is masked, that this visit's key is used: whoever holds a copy of it masks nothing more.

    Notes of visits that are over are removed; their plans are refused by the clock.

    Raises:
        Refused: the visit has been used, or that cannot be noted.
    """
    name = digest("used visit", visit.epoch.to_bytes(8, "big"), visit.task.encode()).hex()
    try:
        if not directory.is_dir():
            directory.mkdir(mode=0o700)
        for path in directory.iterdir():
            if path.stat().st_mtime < time.time() - _KEPT:
                path.unlink(missing_ok=True)
        for path, how in ((directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY), (directory, os.O_RDONLY)):
            descriptor = os.open(path, how, 0o600)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, FileExistsError) and (directory / name).exists():
            raise Refused("this client has accepted a plan of this visit before; it masks once") from None
        raise Refused(f"{directory}: that a visit is used cannot be noted there ({error.strerror})") from error


def enrolled_participant(directory: Path, demands: Demands) -> Participant:
    """The client whose enrolment lies in a directory: ``identity.key``, ``certificate.json`` for it, and what it pins:
    ``trust.json``, the trust bundle, with ``trust.pub``, the key that signs bundles.

    Raises:
        Refused: a file is missing, readable by others, or does not fit the others.
    """
    identity = read_signing_key(directory / f"{IDENTITY}.key")
    certificate = read_message(directory / "certificate.json", Certificate)
    trust = read_message(directory / "trust.json", TrustBundle)
    check_trust(trust, read_public_key(directory / "trust.pub")[1])
    if certificate.public_key != identity.public:
        raise Refused(f"{directory / 'certificate.json'} is for another key than identity.key")
    return Participant(identity, certificate, trust, demands)


class SimulatedParticipants:
    """Enrolled clients in this process; ``secret`` gives their identities and the keys of their visits."""

    def __init__(self, secret: bytes, enrolment: Ed25519Key, trust: TrustBundle, demands: Demands) -> None:
        self._secret, self._enrolment, self._trust, self._demands = secret, enrolment, trust, demands
        self._until = int(time.time()) + _TEN_YEARS  # one date, so that every process has the same certificates
        self._enrolled: dict[int, Participant] = {}

    def check_in(self, client: int, visit: Visit) -> bytes:
        """See `Participants`."""
        return self._participant(client).check_in(self._key(client, visit), visit)

    def accept(self, client: int, visit: Visit, invitation: bytes, model_hash: bytes, summation: Summation) -> Accepted:
        """See `Participants`."""
        return self._participant(client).accept(self._key(client, visit), visit, invitation, model_hash, summation)

    def _key(self, client: int, visit: Visit) -> bytes:
        return derive_key("visit", self._secret, visit.task, visit.epoch, client)

    def _participant(self, client: int) -> Participant:
        if client not in self._enrolled:
            identity = Ed25519Key(derive_key("identity", self._secret, client))
            certificate = issue_certificate(
                self._enrolment, self._trust.population, identity.algorithm, identity.public, self._until
            )  # fmt: skip
            self._enrolled[client] = Participant(identity, certificate, self._trust, self._demands)
        return self._enrolled[client]


def _check_announced(header: Header, summation: Summation) -> None:
    """See that the plan sums what the training configuration said, with the noise that it said.

    Raises:
        Refused: a number differs.
    """
    for name, announced in header_numbers(summation).items():
        if getattr(header, name) != announced:
            raise Refused(f"the plan's {name} is {getattr(header, name)}, the training configuration said {announced}")
