"""The beginning of a repository: keys in two directories, and the first metadata.

A beginning that was cut off, by a full disk or a kill, stands in nobody's way: the same call begins anew. Key directories carry a
mark until the repository that they sign is complete; keys with the mark signed nothing that a reader could have taken, since the
timestamp is written last, and are made anew.
"""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import SSlibKey

from fedcore.registry.files import Files
from fedcore.registry.keys import UNFINISHED, RoleKeys, load_signers, make_keys
from fedcore.registry.repository import create, load, refuse_taken
from fedcore.registry.roles import RELEASES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TIMESTAMP_NAME

__all__ = ["begin"]

_ROLES = (ROOT, TARGETS, RELEASES, SNAPSHOT, TIMESTAMP)


def begin(
    files: Files, offline: Path, online: Path, roots: int, threshold: int, now: datetime, *, publishes: bool
) -> dict[str, RoleKeys]:  # fmt: skip
    """Make keys and an empty repository; the arguments are those of `make_keys`. Or finish what was cut off after its last file.

    Raises:
        Refused: there is a repository, or another file, or keys that are in use. TryAgain: the place cannot be written now.
    """
    marked = [folder for folder in (offline, online) if _is_unfinished(folder)]
    keys = _finished(files, offline, online) if len(marked) == 2 and TIMESTAMP_NAME in files.names() else None
    if keys is None:
        refuse_taken(files.names())  # before keys are made or removed
        for folder in marked:
            shutil.rmtree(folder)
        keys = make_keys(offline, online, roots, threshold, publishes=publishes)
        create(files, keys, load_signers([offline, online]), now)
    for folder in (offline, online):
        (folder / UNFINISHED).unlink(missing_ok=True)
    return keys


def _is_unfinished(folder: Path) -> bool:
    """Whether a directory has the mark, and nothing but it and keys."""
    if not (folder / UNFINISHED).is_file():
        return False
    return all(path.name == UNFINISHED or path.suffix in {".key", ".pub"} for path in folder.iterdir())


def _finished(files: Files, offline: Path, online: Path) -> dict[str, RoleKeys] | None:
    """The keys of a complete repository, if they are those in the directories."""
    state, signers = load(files), load_signers([offline, online])
    releases = state.targets.delegations
    found = {}
    for role in _ROLES:
        wanted = (state.targets if role == RELEASES else state.root).get_delegated_role(role)
        known = releases.keys if role == RELEASES and releases else state.root.keys
        held = tuple(key for keyid in wanted.keyids if isinstance(key := known[keyid], SSlibKey))
        if not {key.keyid for key in held} <= set(signers):
            return None
        found[role] = RoleKeys(held, wanted.threshold)
    return found
