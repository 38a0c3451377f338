"""A repository of The Update Framework, as plain files: metadata/ and targets/, with consistent snapshots.

What a change writes is decided in full, and signed, before the first byte is written; then it is written in an order in which every
prefix is a repository that clients can read: targets, their metadata, the snapshot, and last the timestamp, which names it. Where a
key of targets, snapshot or timestamp changes, a root that trusts both keys comes before, and one that trusts only the new key
after. Every root is kept for ever. A kill leaves at most files that nothing names, whose version numbers are passed over later.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, TypeVar

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fedcore.errors import Refused
from fedcore.registry.catalogue import ARTEFACT, RELEASE_PATTERN, Catalogue, Entry, Item, entries_of
from fedcore.registry.files import Files
from fedcore.registry.keys import RoleKeys, Signers
from fedcore.registry.roles import (
    ISSUED,
    LIVES,
    RELEASES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    TIMESTAMP_NAME,
    is_signed,
    issued_at,
    metadata_name,
    moment,
    parse_metadata,
    parse_name,
    target_name,
    warns_at,
)

__all__ = [
    "State",
    "Write",
    "create",
    "full_keyid",
    "initial",
    "load",
    "publication",
    "publish",
    "refuse_taken",
    "renew",
    "renewal",
    "rotate",
    "rotation",
]

Write = tuple[str, bytes]
Needed = Mapping[str, Collection[int]]
_NONE: Needed = MappingProxyType({})
_CLOCKS = timedelta(hours=1)  # by which machines that sign may differ
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class State:
    """What is signed at one moment. ``highest`` holds the highest version of a role for which there is a file."""

    root: Root
    targets: Targets
    releases: Targets
    snapshot: Snapshot
    timestamp: Timestamp
    highest: Mapping[str, int]

    def catalogue(self) -> Catalogue:
        """What is offered."""
        return Catalogue(entries_of([*self.targets.targets.values(), *self.releases.targets.values()]))


def create(files: Files, keys: Mapping[str, RoleKeys], signers: Signers, now: datetime) -> None:
    """Write a new repository.

    Raises:
        Refused: there is one already, or too few keys are at hand.
    """
    with files.held():
        refuse_taken(files.names())
        _write(files, initial(keys, signers, now))


def refuse_taken(names: Sequence[str]) -> None:
    """See that a repository can be made where these files are: none, or some of a creation that was cut off before its end.

    Raises:
        Refused: it cannot.
    """
    first = [metadata_name(role, 1) for role in (ROOT, TARGETS, RELEASES, SNAPSHOT)]
    writing = [f"metadata/.{name.rpartition('/')[2]}.new" for name in (*first, TIMESTAMP_NAME)]
    if other := sorted(set(names) - {*first, *writing}):
        raise Refused(f"a repository is made in an empty place; there are files already ({other[0]})")


def publish(
    files: Files, items: Sequence[Item], signers: Signers, now: datetime, keep: int | None = None, needed: Needed = _NONE
) -> None:  # fmt: skip
    """Add targets. Items below releases/ are signed by the role `releases`, all others by `targets`.

    With ``keep``, only so many of the newest releases of each model are offered from then on, which bounds the metadata that
    devices read; files of older ones stay where they are. What is ``needed``, versions by model, is offered whatever its age.

    Raises:
        Refused: a path is taken by other content, a release is not above the last one of its model, or a key is missing.
        TryAgain: the place cannot be written; readers see what was there before.
    """
    with files.held():
        _write(files, publication(load(files), items, signers, now, keep, needed))


def renew(files: Files, signers: Signers, now: datetime) -> list[str]:
    """Sign snapshot and timestamp anew, and every other role whose end is near and whose keys are at hand; the roles signed."""
    with files.held():
        names, writes = renewal(load(files), signers, now)
        _write(files, writes)
    return names


def rotate(files: Files, role: str, old: str | None, new: SSlibKey, signers: Signers, now: datetime) -> None:
    """Put the key ``new`` in the place of ``old`` (a key id; the role's only key if None). The old one need not be at hand.

    Raises:
        Refused: the role has no such key, or too few of the others' are at hand.
    """
    with files.held():
        _write(files, rotation(load(files), role, old, new, signers, now))


def load(files: Files) -> State:
    """The repository's state, its signatures checked; expired or not, for a repository that expired must be renewed.

    Raises:
        Refused: there is none, or a file of it is missing, damaged or not signed.
    """
    highest: dict[str, int] = {}
    for name in files.names():
        if parsed := parse_name(name):
            highest[parsed[0]] = max(highest.get(parsed[0], 0), parsed[1])
    if ROOT not in highest:
        raise Refused("there is no repository: no root in metadata/; fedcore registry init makes one")
    name = metadata_name(ROOT, highest[ROOT])
    trusted = _read(files, name, Root)
    if not is_signed(trusted.signed, ROOT, trusted):
        raise Refused(f"{name}: not signed by its own keys")
    root = trusted.signed
    timestamp = _checked(files, TIMESTAMP_NAME, Timestamp, root, TIMESTAMP, None)
    meta = timestamp.snapshot_meta
    snapshot = _checked(files, metadata_name(SNAPSHOT, meta.version), Snapshot, root, SNAPSHOT, meta)
    found = []
    delegator: Root | Targets = root
    for role in (TARGETS, RELEASES):
        meta = snapshot.meta.get(f"{role}.json", MetaFile())
        delegator = _checked(files, metadata_name(role, meta.version), Targets, delegator, role, meta)
        found.append(delegator)
    return State(root, found[0], found[1], snapshot, timestamp, highest)


def initial(keys: Mapping[str, RoleKeys], signers: Signers, now: datetime) -> list[Write]:
    """The files of a repository that offers nothing yet. The timestamp comes last; before it, there is none."""
    top = {role: keys[role] for role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)}
    known: dict[str, Key] = {key.keyid: key for held in top.values() for key in held.keys}
    roles = {role: Role([key.keyid for key in held.keys], held.threshold) for role, held in top.items()}
    root = Root(1, expires=now + LIVES[ROOT], keys=known, roles=roles, consistent_snapshot=True)
    online = keys[RELEASES]
    role = DelegatedRole(RELEASES, [key.keyid for key in online.keys], online.threshold, True, paths=[RELEASE_PATTERN])
    delegations = Delegations({key.keyid: key for key in online.keys}, {RELEASES: role})
    state = State(root, Targets(delegations=delegations), Targets(), Snapshot(), Timestamp(), {})
    state.snapshot.version = state.timestamp.version = state.targets.version = state.releases.version = 0
    return [(metadata_name(ROOT, 1), _signed(root, root, ROOT, signers)), *_resigned(state, {TARGETS, RELEASES}, signers, now)]


def publication(
    state: State, items: Sequence[Item], signers: Signers, now: datetime, keep: int | None = None, needed: Needed = _NONE
) -> list[Write]:  # fmt: skip
    """What `publish` writes, in order."""
    if keep is not None and keep < 1:
        raise Refused(f"at least one release of a model is kept, got {keep}")
    _check_items(state, items)
    targets, releases = copy.deepcopy(state.targets), copy.deepcopy(state.releases)
    writes: dict[str, bytes] = {}
    changed = set()
    for item in items:
        role = RELEASES if item.path.startswith("releases/") else TARGETS
        target = item.target()
        (releases if role == RELEASES else targets).targets[item.path] = target
        changed.add(role)
        writes[target_name(item.path, target.hashes["sha256"])] = item.data
    if keep is not None:
        releases.targets = _newest(releases.targets, keep, needed)
    return [*writes.items(), *_resigned(replace(state, targets=targets, releases=releases), changed, signers, now)]


def renewal(state: State, signers: Signers, now: datetime) -> tuple[list[str], list[Write]]:
    """What `renew` signs and writes.

    Raises:
        Refused: the last timestamp is from the future; devices that saw it would take none that is signed now.
    """
    issued = issued_at(state.timestamp)
    if issued is not None and issued > now + _CLOCKS:
        raise Refused(
            f"the last timestamp was signed on {issued:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}; if "
            "the clock was wrong then, devices wait until fedcore registry rotate-keys --role timestamp makes them forget it"
        )
    writes: list[Write] = []
    root = state.root
    if now >= warns_at(ROOT, root.expires) and _at_hand(root, ROOT, signers):
        root = _next(root, now, ROOT)
        writes.append((metadata_name(ROOT, root.version), _signed(root, root, ROOT, signers)))
    near = {
        role
        for role, delegator, signed in ((TARGETS, root, state.targets), (RELEASES, state.targets, state.releases))
        if now >= warns_at(role, signed.expires) and _at_hand(delegator, role, signers)
    }
    writes += _resigned(replace(state, root=root), near, signers, now)
    return [*([ROOT] if root is not state.root else []), *sorted(near), SNAPSHOT, TIMESTAMP], writes


def rotation(state: State, role: str, old: str | None, new: SSlibKey, signers: Signers, now: datetime) -> list[Write]:
    """What `rotate` writes, in order. One that was killed is finished by the same call."""
    delegator: Root | Targets = state.targets if role == RELEASES else state.root
    old = _replaced(delegator, role, old, new)
    others = {keyid: signer for keyid, signer in signers.items() if keyid != old}
    if role == RELEASES:  # targets and releases change together, when the timestamp does
        targets = copy.deepcopy(state.targets)
        targets.add_key(new, role)
        targets.revoke_key(old, role)
        return _resigned(replace(state, targets=targets), {TARGETS, RELEASES}, signers, now)
    if role == ROOT:
        root = _next(state.root, now, ROOT)
        root.add_key(new, ROOT)
        root.revoke_key(old, ROOT)
        return [(metadata_name(ROOT, root.version), _signed(root, root, ROOT, signers, state.root))]
    both = _next(state.root, now, ROOT)
    both.add_key(new, role)
    after = _next(both, now, ROOT)
    after.revoke_key(old, role)
    return [
        (metadata_name(ROOT, both.version), _signed(both, both, ROOT, signers, state.root)),
        *_resigned(replace(state, root=both), {role} & {TARGETS}, others, now),
        (metadata_name(ROOT, after.version), _signed(after, after, ROOT, signers, both)),
    ]


def full_keyid(state: State, role: str, start: str | None) -> str:
    """The id of the one key of a role that begins with ``start``, or that is its only one.

    Raises:
        Refused: there is no such role or key, or more than one.
    """
    delegator: Root | Targets = state.targets if role == RELEASES else state.root
    try:
        keyids = [keyid for keyid in delegator.get_delegated_role(role).keyids if keyid.startswith(start or "")]
    except ValueError:
        raise Refused(f"no role {role!r}; roles are {', '.join(LIVES)}") from None
    if len(keyids) != 1:
        raise Refused(f"which key of {role} is to be replaced? There is more than one or none: {', '.join(keyids) or 'none'}")
    return keyids[0]


def _newest(targets: Mapping[str, TargetFile], keep: int, needed: Needed) -> dict[str, TargetFile]:
    """Targets of the last releases of each model, and of those that are needed."""
    entries = {path: Entry.of(target) for path, target in targets.items()}
    versions: dict[str, set[int]] = {}
    for entry in entries.values():
        model, version = entry.release
        versions.setdefault(model, set()).add(version)
    kept = {model: {*sorted(held)[-keep:], *needed.get(model, ())} for model, held in versions.items()}
    return {path: targets[path] for path, entry in entries.items() if entry.release[1] in kept[entry.release[0]]}


def _replaced(delegator: Root | Targets, role: str, old: str | None, new: SSlibKey) -> str:
    try:
        keyids = [keyid for keyid in delegator.get_delegated_role(role).keyids if keyid != new.keyid]
    except ValueError:
        raise Refused(f"no role {role!r}; roles are {', '.join(LIVES)}") from None
    if old is None and len(keyids) == 1:
        return keyids[0]
    if old is None or old not in keyids:
        raise Refused(f"which key of {role} is to be replaced? It has {', '.join(keyids) or 'no other'}")
    return old


def _resigned(state: State, changed: set[str], signers: Signers, now: datetime) -> list[Write]:
    """The changed roles among `targets` and `releases`, the snapshot and the timestamp, each one version on."""
    writes: list[Write] = []
    meta: dict[str, MetaFile] = {}
    for role, delegator, signed in ((RELEASES, state.targets, state.releases), (TARGETS, state.root, state.targets)):
        if role not in changed:
            meta[f"{role}.json"] = state.snapshot.meta[f"{role}.json"]
            continue
        fresh = _next(signed, now, role, state.highest.get(role, 0))
        data = _signed(fresh, delegator, role, signers)
        meta[f"{role}.json"] = MetaFile.from_data(fresh.version, data, ["sha256"])
        writes.append((metadata_name(role, fresh.version), data))
    snapshot = _next(state.snapshot, now, SNAPSHOT, state.highest.get(SNAPSHOT, 0))
    snapshot.meta = meta
    data = _signed(snapshot, state.root, SNAPSHOT, signers)
    writes.append((metadata_name(SNAPSHOT, snapshot.version), data))
    timestamp = _next(state.timestamp, now, TIMESTAMP)
    timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
    timestamp.unrecognized_fields[ISSUED] = moment(now)
    return [*writes, (TIMESTAMP_NAME, _signed(timestamp, state.root, TIMESTAMP, signers))]


def _next(signed: _S, now: datetime, role: str, highest: int = 0) -> _S:
    fresh = copy.deepcopy(signed)
    fresh.version = max(signed.version, highest) + 1
    fresh.expires = now + LIVES[role]
    return fresh


def _signed(
    signed: Root | Targets | Snapshot | Timestamp,
    delegator: Root | Targets,
    role: str,
    signers: Signers,
    before: Root | None = None,
) -> bytes:
    """Signed by all keys of the role that are at hand, and of the role in the root before it; enough of both."""
    metadata: Metadata[Any] = Metadata(signed)
    sides = [delegator, *([before] if before else [])]
    for keyid in dict.fromkeys(keyid for side in sides for keyid in side.get_delegated_role(role).keyids):
        if keyid in signers:
            metadata.sign(signers[keyid], append=True)
    for side in sides:
        wanted = side.get_delegated_role(role)
        if not is_signed(side, role, metadata):
            there = sum(keyid in signers for keyid in wanted.keyids)
            raise Refused(
                f"the role {role} needs {wanted.threshold} of the keys {', '.join(keyid[:12] for keyid in wanted.keyids)}; "
                f"the directories that were given hold {there}"
            )
    return metadata.to_bytes()


def _at_hand(delegator: Root | Targets, role: str, signers: Signers) -> bool:
    wanted = delegator.get_delegated_role(role)
    return sum(keyid in signers for keyid in wanted.keyids) >= wanted.threshold


def _check_items(state: State, items: Sequence[Item]) -> None:
    held: dict[str, TargetFile] = {**state.targets.targets, **state.releases.targets}
    catalogue = state.catalogue()
    for item in items:
        digest = hashlib.sha256(item.data).hexdigest()
        if item.path in held and held[item.path].hashes["sha256"] != digest:
            raise Refused(f"{item.path} is published with other content; a path keeps its content for ever")
        if item.custom["kind"] == ARTEFACT and item.custom["version"] <= catalogue.latest(item.custom["model"]):
            latest = catalogue.latest(item.custom["model"])
            raise Refused(
                f"release {item.custom['version']} of {item.custom['model']} is not above {latest}, the last one; to go back, "
                f"publish the old content as release {latest + 1}"
            )


def _read(files: Files, name: str, kind: type[_S]) -> Metadata[_S]:
    data = files.read(name)
    if data is None:
        raise Refused(f"{name} is missing")
    return parse_metadata(data, kind, name)


def _checked(
    files: Files, name: str, kind: type[_S], delegator: Root | Targets, role: str, meta: MetaFile | None
) -> _S:  # fmt: skip
    metadata = _read(files, name, kind)
    if not is_signed(delegator, role, metadata):
        raise Refused(f"{name}: not signed by enough keys of {role}")
    if meta is not None and metadata.signed.version != meta.version:
        raise Refused(f"{name}: holds version {metadata.signed.version}, not {meta.version}")
    return metadata.signed


def _write(files: Files, writes: Sequence[Write]) -> None:
    for name, data in writes:
        files.write(name, data)
