"""The roles of a repository (The Update Framework 1.0.x), how long what they sign is good, and the names of files.

Lives: a machine signs snapshot and timestamp anew without people, so they are short; a timestamp's life bounds how long a device
can be kept from news. A warning begins 30 days before an end, or at half of a life that is shorter than 60 days.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from securesystemslib.exceptions import VerificationError
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp

from fedcore.errors import Refused

__all__ = [
    "ISSUED", "LIVES", "RELEASES", "ROOT", "SNAPSHOT", "TARGETS", "TIMESTAMP", "TIMESTAMP_NAME", "is_signed", "issued_at",
    "metadata_name", "moment", "parse_metadata", "parse_name", "target_name", "warns_at",
]  # fmt: skip

ROOT, TARGETS, RELEASES, SNAPSHOT, TIMESTAMP = "root", "targets", "releases", "snapshot", "timestamp"
LIVES = {
    ROOT: timedelta(days=365), TARGETS: timedelta(days=365), RELEASES: timedelta(days=90), SNAPSHOT: timedelta(days=7),
    TIMESTAMP: timedelta(days=1),
}  # fmt: skip
ISSUED = "x-fedcore-issued"  # in a timestamp, under its signature: when it was signed
TIMESTAMP_NAME = "metadata/timestamp.json"
_WARNING = timedelta(days=30)
_NAME = re.compile(r"metadata/([1-9][0-9]{0,9})\.(root|targets|releases|snapshot)\.json", re.ASCII)
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


def metadata_name(role: str, version: int) -> str:
    """The file of a version of a role other than timestamp."""
    return f"metadata/{version}.{role}.json"


def parse_name(name: str) -> tuple[str, int] | None:
    """Inverse of `metadata_name`: role and version; None for any other file."""
    found = _NAME.fullmatch(name)
    return (found[2], int(found[1])) if found else None


def target_name(path: str, digest: str) -> str:
    """The file of a target: its path below targets/, its own name after its SHA-256 (consistent snapshots)."""
    folder, slash, last = path.rpartition("/")
    return f"targets/{folder}{slash}{digest}.{last}"


def parse_metadata(data: bytes, kind: type[_S], where: str) -> Metadata[_S]:
    """Metadata of one kind; its signatures are not looked at.

    Raises:
        Refused: the bytes are none.
    """
    try:
        found = Metadata[_S].from_bytes(data)
    except (RepositoryError, VerificationError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{where}: this is no metadata of The Update Framework ({type(error).__name__})") from None
    if not isinstance(found.signed, kind):
        raise Refused(f"{where}: metadata of a {found.signed.type} where one of a {kind.type} belongs")
    return found


def warns_at(role: str, expires: datetime) -> datetime:
    """When its end comes near enough to speak of it."""
    return expires - min(_WARNING, LIVES[role] / 2)


def issued_at(timestamp: Signed) -> datetime | None:
    """When a timestamp says it was signed; None for one of another publisher's tool."""
    try:
        return datetime.strptime(timestamp.unrecognized_fields[ISSUED], _MOMENT).replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return None


def moment(time: datetime) -> str:
    """As metadata writes it."""
    return time.strftime(_MOMENT)


def is_signed(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> bool:
    """Whether enough of the keys that ``delegator`` names for ``role`` signed the metadata."""
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError):
        return False
    return True
