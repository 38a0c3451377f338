"""What a device reads a repository with: python-tuf's checks, our own downloads, our own floors on the disk.

The rules are those of `tuf.ngclient`'s trusted set. What its updater lacks is here: floors that survive a power cut (its torn
timestamp silently reads as absent, which forgets what was seen), a deadline for the whole, resumed downloads, time as an argument.

A reference time that is behind is moved up to the newest moment that a timestamp was signed at, as far as this device saw one. One
that is ahead makes everything look expired. Either way updates stop; the installed model is not this module's business, and stays.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from tuf.api import exceptions
from tuf.api.metadata import TargetFile, Targets
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType, UpdaterConfig

from fedcore import durable
from fedcore.errors import Refused, TryAgain
from fedcore.registry.catalogue import Catalogue, Entry, entries_of
from fedcore.registry.fetch import Deadline, Fetcher, fetch_bytes, fetch_file
from fedcore.registry.roles import (
    RELEASES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    TIMESTAMP_NAME,
    issued_at,
    metadata_name,
    target_name,
)

__all__ = ["Client", "trusted_set"]

_LIMITS = UpdaterConfig()  # python-tuf's: root 512 kB, timestamp 16 kB, snapshot 2 MB, 256 roots at once
_LARGEST_TARGETS = 32 << 20  # whatever length an online key signs
_TRUST = "trust.json"


@dataclass(frozen=True)
class _Trust:
    """What is remembered: the last root, the SHA-256 of the pinned one, the lowest versions and the earliest time to accept."""

    pin: str
    root: bytes
    floors: Mapping[str, int] = field(default_factory=dict)
    issued: datetime | None = None

    def encode(self) -> bytes:
        issued = self.issued.isoformat() if self.issued else None
        held = {"pin": self.pin, "root": base64.b64encode(self.root).decode(), "floors": dict(self.floors), "issued": issued}
        return json.dumps(held, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, where: Path) -> _Trust:
        try:
            held = json.loads(data)
            floors = {str(role): int(version) for role, version in held["floors"].items()}
            issued = datetime.fromisoformat(held["issued"]) if held["issued"] else None
            return cls(str(held["pin"]), base64.b64decode(held["root"], validate=True), floors, issued)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            raise Refused(
                f"{where}: damaged; it holds what protects from old releases, so the device must be enrolled anew"
            ) from None


class Client:
    """A device's view of one repository, remembered in ``directory``; one process at a time may use it.

    Args:
        directory: holds trust.json, cached metadata, and downloads that are not complete.
        pinned_root: any root of the repository, had when the device was enrolled.

    Raises:
        Refused: the directory belongs to another repository, or is damaged.
    """

    def __init__(
        self, directory: Path, fetcher: Fetcher, pinned_root: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._directory, self._fetcher, self._clock = directory, fetcher, clock
        (directory / "metadata").mkdir(parents=True, exist_ok=True)
        (directory / "partial").mkdir(exist_ok=True)
        pin, path = hashlib.sha256(pinned_root).hexdigest(), directory / _TRUST
        if path.exists():
            self._trust = _Trust.decode(path.read_bytes(), path)
            if self._trust.pin != pin:
                raise Refused(f"{directory} was enrolled with another root; clear it to enrol anew")
        else:
            self._trust = _Trust(pin, pinned_root)

    def refresh(self, now: datetime, seconds: float) -> Catalogue:
        """Verify the repository's newest state and return what it offers.

        Args:
            now: the device's time, with zone. seconds: for all of it.

        Raises:
            Refused: what was read is older than what was seen, expired, not signed by the right keys, or not what is signed.
            TryAgain: the repository cannot be reached or is too slow, or the disk is full.
        """
        deadline = Deadline(seconds, self._clock)
        with _clear_errors(now, self._trust.issued):
            self._follow_roots(now, deadline)
            trusted = self._load_timestamp(now, deadline)
            self._load_snapshot(trusted, deadline)
            for role, delegator in ((TARGETS, ROOT), (RELEASES, TARGETS)):
                self._load_targets(trusted, role, delegator, deadline)
            versions = {role: trusted[role].version for role in (TIMESTAMP, SNAPSHOT, TARGETS, RELEASES)}
            self._remember(replace(self._trust, floors=versions))
            return Catalogue(entries_of(_offered(trusted)))

    def download(self, entry: Entry, seconds: float) -> Path:
        """A target's file, verified; the caller moves or removes it. An interrupted download is continued by the next call.

        Raises:
            Refused: other bytes than the signed ones.
            TryAgain: not complete yet.
        """
        path = self._directory / "partial" / entry.digest.hex()
        name = target_name(entry.path, entry.digest.hex())
        fetch_file(self._fetcher, name, path, entry.size, entry.digest, Deadline(seconds, self._clock))
        return path

    def collect(self, catalogue: Catalogue) -> None:
        """Remove what is left of downloads of files that are offered no more."""
        offered = {entry.digest.hex() for entry in catalogue.entries}
        for path in (self._directory / "partial").iterdir():
            if path.name not in offered:
                path.unlink(missing_ok=True)

    def _follow_roots(self, now: datetime, deadline: Deadline) -> None:
        """From the root that is trusted to the newest, each signed by the one before."""
        trusted = trusted_set(self._trust.root, now)
        first, data = trusted.root, self._trust.root
        for _ in range(_LIMITS.max_root_rotations):
            name = metadata_name(ROOT, trusted.root.version + 1)
            fresh = fetch_bytes(self._fetcher, name, _LIMITS.root_max_length, deadline)
            if fresh is None:
                break
            trusted.update_root(fresh)
            data = fresh
        if trusted.root is first:
            return
        # Specification 5.3.11: with new keys, versions that the holder of a stolen key made unreachable are forgotten.
        rotated = any(set(first.roles[role].keyids) != set(trusted.root.roles[role].keyids) for role in (TIMESTAMP, SNAPSHOT))
        trust = replace(self._trust, root=data)
        self._remember(replace(trust, floors={}, issued=None) if rotated else trust)

    def _load_timestamp(self, now: datetime, deadline: Deadline) -> TrustedMetadataSet:
        data = fetch_bytes(self._fetcher, TIMESTAMP_NAME, _LIMITS.timestamp_max_length, deadline)
        if data is None:
            raise TryAgain("the repository has no timestamp")
        trusted = trusted_set(self._trust.root, max(now, self._trust.issued or now))
        timestamp = trusted.update_timestamp(data)
        issued = issued_at(timestamp)
        if issued and issued > trusted.reference_time:  # this device's clock is behind
            trusted = trusted_set(self._trust.root, issued)
            timestamp = trusted.update_timestamp(data)
        self._above(TIMESTAMP, timestamp.version)
        self._above(SNAPSHOT, timestamp.snapshot_meta.version)
        known = max(filter(None, (issued, self._trust.issued)), default=None)
        self._remember(replace(self._trust, floors={**self._trust.floors, TIMESTAMP: timestamp.version}, issued=known))
        return trusted

    def _load_snapshot(self, trusted: TrustedMetadataSet, deadline: Deadline) -> None:
        meta = trusted.timestamp.snapshot_meta
        limit = min(meta.length or _LIMITS.snapshot_max_length, _LIMITS.snapshot_max_length)
        snapshot = trusted.update_snapshot(self._metadata(SNAPSHOT, meta.version, limit, deadline))
        for role in (TARGETS, RELEASES):
            if f"{role}.json" not in snapshot.meta:
                raise Refused(f"the snapshot does not name {role}")
            self._above(role, snapshot.meta[f"{role}.json"].version)

    def _load_targets(self, trusted: TrustedMetadataSet, role: str, delegator: str, deadline: Deadline) -> None:
        meta = trusted.snapshot.meta[f"{role}.json"]
        path = self._directory / "metadata" / f"{role}.json"
        if self._trust.floors.get(role) == meta.version and path.exists():
            try:
                trusted.update_delegated_targets(path.read_bytes(), role, delegator)
            except (exceptions.LengthOrHashMismatchError, exceptions.UnsignedMetadataError, exceptions.BadVersionNumberError):
                path.unlink()  # damaged, or signed by keys that a newer root does not name
            else:
                return
        limit = min(meta.length or _LARGEST_TARGETS, _LARGEST_TARGETS)
        data = self._metadata(role, meta.version, limit, deadline)
        trusted.update_delegated_targets(data, role, delegator)
        _write(path, data)

    def _metadata(self, role: str, version: int, limit: int, deadline: Deadline) -> bytes:
        data = fetch_bytes(self._fetcher, metadata_name(role, version), limit, deadline)
        if data is None:
            raise TryAgain(f"the repository does not have version {version} of {role}, which it names")
        return data

    def _above(self, role: str, version: int) -> None:
        floor = self._trust.floors.get(role, 0)
        if version < floor:
            raise Refused(f"version {version} of {role} is older than {floor}, which this device has seen: refused as a rollback")

    def _remember(self, trust: _Trust) -> None:
        if trust != self._trust:
            _write(self._directory / _TRUST, trust.encode())
            self._trust = trust


def trusted_set(root: bytes, now: datetime) -> TrustedMetadataSet:
    """python-tuf's rules, at the time ``now``. The class is private to python-tuf, and so is that its time is an attribute."""
    trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
    trusted.reference_time = now
    return trusted


def _offered(trusted: TrustedMetadataSet) -> list[TargetFile]:
    """Targets of the top level, and those of `releases` where it may speak and the top level did not."""
    top, below = trusted.targets, trusted[RELEASES]
    assert isinstance(below, Targets)
    role = top.delegations.roles.get(RELEASES) if top.delegations and top.delegations.roles else None
    allowed = [one for path, one in below.targets.items() if role and role.is_delegated_path(path) and path not in top.targets]
    return [*top.targets.values(), *allowed]


def _write(path: Path, data: bytes) -> None:
    try:
        durable.write(path, data)
    except OSError as error:
        raise TryAgain(f"{path} cannot be written ({error.strerror}); the installed model stays") from error


@contextmanager
def _clear_errors(now: datetime, issued: datetime | None) -> Iterator[None]:
    """One line for each way in which metadata can be wrong."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        seen = f"; the newest news it has seen is of {issued:%Y-%m-%d}" if issued else ""
        raise Refused(
            f"{error} at {now:%Y-%m-%d %H:%M} by this device's clock{seen}: no updates, the installed model stays"
        ) from None
    except exceptions.BadVersionNumberError as error:
        raise Refused(f"the repository's versions do not fit together: {error}") from None
    except exceptions.UnsignedMetadataError as error:
        raise Refused(f"not signed by the keys that this device trusts: {error}") from None
    except exceptions.LengthOrHashMismatchError as error:
        raise Refused(f"metadata that is not what is signed: {error}") from None
    except (exceptions.RepositoryError, ValueError, KeyError) as error:
        raise Refused(f"unusable metadata ({type(error).__name__})") from None
