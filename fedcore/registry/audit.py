"""An auditor's look at a repository, with nothing but its files: every signature, hash, version and end, and what nothing names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fedcore.errors import Refused
from fedcore.registry.catalogue import DELTA, Entry, entries_of
from fedcore.registry.delta import apply_delta
from fedcore.registry.files import Files
from fedcore.registry.roles import (
    RELEASES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    TIMESTAMP_NAME,
    is_signed,
    metadata_name,
    parse_metadata,
    parse_name,
    target_name,
    warns_at,
)

__all__ = ["Finding", "audit"]

_KINDS = {ROOT: Root, TARGETS: Targets, RELEASES: Targets, SNAPSHOT: Snapshot}


@dataclass(frozen=True)
class Finding:
    """One line for a person. A `warning` is no fault yet: an end that comes near, a key rotation that was not finished."""

    kind: Literal["problem", "warning"]
    text: str


def audit(files: Files, now: datetime) -> list[Finding]:
    """Everything that is wrong with a repository, or soon will be; an empty list for a sound one."""
    return list(_Audit(files, now).findings())


class _Audit:
    """One look; ``_named`` collects the files that the current state names."""

    def __init__(self, files: Files, now: datetime) -> None:
        self._files, self._now = files, now
        self._names = set(files.names())
        self._named: set[str] = set()
        self._roots: list[Root] = []
        self._all_targets: list[Targets] = []

    def findings(self) -> Iterator[Finding]:
        yield from self._root_chain()
        if not self._roots:
            return
        root = self._roots[-1]
        yield from self._ends(ROOT, root)
        yield from self._unfinished(root)
        found: list[Finding] = []
        timestamp = self._current(TIMESTAMP, TIMESTAMP_NAME, root, None, found)
        snapshot = self._below(SNAPSHOT, timestamp.snapshot_meta, root, found) if isinstance(timestamp, Timestamp) else None
        meta = snapshot.meta if isinstance(snapshot, Snapshot) else {}
        targets = self._below(TARGETS, meta.get("targets.json"), root, found)
        releases = None
        if isinstance(targets, Targets):
            releases = self._below(RELEASES, meta.get("releases.json"), targets, found)
        yield from found
        offered: dict[str, TargetFile] = {}
        if isinstance(targets, Targets) and isinstance(releases, Targets):
            yield from self._outside(targets, releases)
            offered = {**releases.targets, **targets.targets}
            yield from self._targets(offered)
        yield from self._history(meta, timestamp)
        for name in sorted(self._names - self._named):
            yield Finding("problem", f"{name}: nothing names this file")

    def _root_chain(self) -> Iterator[Finding]:
        """Every root from the first on, each signed by its own keys and by those of the one before."""
        versions = sorted(parsed[1] for name in self._names if (parsed := parse_name(name)) and parsed[0] == ROOT)
        if not versions:
            yield Finding("problem", "metadata/1.root.json: missing; there is no repository")
            return
        for version in range(1, versions[-1] + 1):
            name = metadata_name(ROOT, version)
            self._named.add(name)
            try:
                metadata = self._parsed(name, Root)
            except Refused as error:
                yield Finding("problem", str(error))
                continue
            root = metadata.signed
            if root.version != version:
                yield Finding("problem", f"{name}: holds version {root.version}")
            if not is_signed(root, ROOT, metadata):
                yield Finding("problem", f"{name}: not signed by enough of its own root keys")
            if self._roots and self._roots[-1].version == version - 1 and not is_signed(self._roots[-1], ROOT, metadata):
                yield Finding("problem", f"{name}: not signed by enough of the root keys before it")
            if not root.consistent_snapshot:
                yield Finding("problem", f"{name}: without consistent snapshots")
            self._roots.append(root)

    def _unfinished(self, root: Root) -> Iterator[Finding]:
        for role in (TARGETS, SNAPSHOT, TIMESTAMP):
            held = root.roles[role]
            before = next((one.roles[role] for one in reversed(self._roots[:-1])), held)
            if len(held.keyids) > len(before.keyids):
                yield Finding("warning", f"the rotation of a key of {role} was not finished: both keys are trusted")

    def _below(self, role: str, meta: MetaFile | None, delegator: Root | Targets, found: list[Finding]) -> Any:
        if meta is None:
            found.append(Finding("problem", f"{role}: no snapshot names its metadata"))
            return None
        return self._current(role, metadata_name(role, meta.version), delegator, meta, found)

    def _current(self, role: str, name: str, delegator: Root | Targets, meta: MetaFile | None, found: list[Finding]) -> Any:
        """The metadata of a role that is current; what is wrong with it goes to ``found``."""
        self._named.add(name)
        try:
            metadata: Metadata[Any] = self._parsed(name, Timestamp if role == TIMESTAMP else _KINDS[role])
        except Refused as error:
            found.append(Finding("problem", str(error)))
            return None
        if not is_signed(delegator, role, metadata):
            found.append(Finding("problem", f"{name}: not signed by enough keys of {role}"))
        if meta is not None:
            if metadata.signed.version != meta.version:
                found.append(Finding("problem", f"{name}: holds version {metadata.signed.version}"))
            try:
                meta.verify_length_and_hashes(self._files.read(name) or b"")
            except LengthOrHashMismatchError:
                found.append(Finding("problem", f"{name}: not the bytes whose hash is signed"))
        found += self._ends(role, metadata.signed)
        return metadata.signed

    def _ends(self, role: str, signed: Any) -> Iterator[Finding]:
        if signed.expires <= self._now:
            yield Finding("problem", f"{role}: expired on {signed.expires:%Y-%m-%d %H:%M} UTC; devices take no updates")
        elif warns_at(role, signed.expires) <= self._now:
            yield Finding("warning", f"{role}: expires on {signed.expires:%Y-%m-%d %H:%M} UTC")

    def _outside(self, targets: Targets, releases: Targets) -> Iterator[Finding]:
        roles = targets.delegations.roles if targets.delegations and targets.delegations.roles else {}
        for path in releases.targets:
            if RELEASES not in roles or not roles[RELEASES].is_delegated_path(path):
                yield Finding("problem", f"target {path!r}: outside of what {RELEASES} may sign; devices pass it over")

    def _targets(self, offered: dict[str, TargetFile]) -> Iterator[Finding]:
        sound: dict[bytes, str] = {}
        for path, target in offered.items():
            name = target_name(path, target.hashes.get("sha256", ""))
            self._named.add(name)
            data = self._files.read(name)
            if data is None:
                yield Finding("problem", f"{name}: missing")
            elif len(data) != target.length or hashlib.sha256(data).hexdigest() != target.hashes.get("sha256"):
                yield Finding("problem", f"{name}: not the bytes whose hash is signed")
            else:
                sound[hashlib.sha256(data).digest()] = name
        try:
            entries = entries_of(offered.values())
        except Refused as error:
            yield Finding("problem", str(error))
            return
        sizes = {entry.digest: entry.size for entry in entries}
        for entry in entries:
            if entry.kind == DELTA and entry.digest in sound:
                yield from self._delta(entry, sound, sizes)

    def _delta(self, entry: Entry, sound: dict[bytes, str], sizes: dict[bytes, int]) -> Iterator[Finding]:
        """A delta gives what it promises, where its base is still offered."""
        base, result = bytes.fromhex(entry.custom["base"]), bytes.fromhex(entry.custom["result"])
        if result not in sizes:
            yield Finding("problem", f"target {entry.path!r}: a delta to a file that is not offered")
        if base not in sound or result not in sizes:
            return
        before, change = self._files.read(sound[base]) or b"", self._files.read(sound[entry.digest]) or b""
        try:
            apply_delta(before, change, result, sizes[result])
        except Refused as error:
            yield Finding("problem", f"target {entry.path!r}: {error}")

    def _history(self, meta: dict[str, MetaFile], timestamp: Any) -> Iterator[Finding]:
        """Metadata that newer ones replaced: signed once by keys that some root or targets named."""
        current = {role: meta[f"{role}.json"].version for role in (TARGETS, RELEASES) if f"{role}.json" in meta}
        if isinstance(timestamp, Timestamp):
            current[SNAPSHOT] = timestamp.snapshot_meta.version
        older = sorted(
            (list(_KINDS).index(parsed[0]), parsed[1], name)
            for name in self._names - self._named
            if (parsed := parse_name(name)) and parsed[0] != ROOT and parsed[1] < current.get(parsed[0], 0)
        )
        delegators: list[Any] = []
        for place, _, name in older:
            role = list(_KINDS)[place]
            self._named.add(name)
            try:
                metadata: Metadata[Any] = self._parsed(name, _KINDS[role])
            except Refused as error:
                yield Finding("problem", str(error))
                continue
            delegators = [*self._all_targets, *self._known_targets(current)] if role == RELEASES else list(self._roots)
            if not any(_delegates(one, role, metadata) for one in delegators):
                yield Finding("problem", f"{name}: an older version, signed by no keys of {role} that a root ever named")
                continue
            if role == TARGETS:
                self._all_targets.append(metadata.signed)
            if role in {TARGETS, RELEASES}:
                yield from self._withdrawn(metadata.signed)

    def _withdrawn(self, targets: Targets) -> Iterator[Finding]:
        """Targets that are offered no more may stay; what is there under their names is what was signed."""
        for path, target in targets.targets.items():
            name = target_name(path, target.hashes.get("sha256", ""))
            if name in self._names - self._named:
                self._named.add(name)
                if hashlib.sha256(self._files.read(name) or b"").hexdigest() != target.hashes.get("sha256"):
                    yield Finding("problem", f"{name}: not the bytes whose hash was signed")

    def _known_targets(self, current: dict[str, int]) -> list[Targets]:
        if TARGETS not in current:
            return []
        try:
            return [self._parsed(metadata_name(TARGETS, current[TARGETS]), Targets).signed]
        except Refused:
            return []

    def _parsed(self, name: str, kind: Any) -> Any:
        data = self._files.read(name)
        if data is None:
            raise Refused(f"{name}: missing")
        return parse_metadata(data, kind, name)


def _delegates(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> bool:
    """As `is_signed`, also where the delegator does not know the role."""
    try:
        return is_signed(delegator, role, metadata)
    except (KeyError, ValueError):
        return False
