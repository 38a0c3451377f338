"""Keys that sign a repository: Ed25519 in files of mode 0600, found by the key ids that its metadata names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from fedcore.errors import Refused
from fedcore.registry.roles import RELEASES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from fedcore.secagg.crypto import ED25519
from fedcore.secagg.keys import new_directory, new_signing_key, read_private_key, read_public_key

__all__ = ["UNFINISHED", "RoleKeys", "Signers", "load_signers", "make_keys", "new_key", "read_key"]

Signers = Mapping[str, CryptoSigner]  # by key id
UNFINISHED = "unfinished"
"""A file beside keys whose repository is not complete yet."""


@dataclass(frozen=True)
class RoleKeys:
    """The public keys of a role, and how many of them must sign."""

    keys: tuple[SSlibKey, ...]
    threshold: int = 1


def make_keys(offline: Path, online: Path, roots: int, threshold: int, *, publishes: bool) -> dict[str, RoleKeys]:
    """Make every key of a new repository, in two directories that appear complete or not at all, marked as `UNFINISHED`.

    Args:
        offline: for ``roots`` root keys, of which ``threshold`` must sign, the targets key, and the key of `releases`.
        online: for the keys of snapshot and timestamp; also that of `releases` where a machine ``publishes`` by itself.

    Raises:
        Refused: a directory exists, or the threshold cannot be met.
    """
    if not 1 <= threshold <= roots <= 16:
        raise Refused(f"a root has 1 to 16 keys and a threshold of at most as many, got {roots} and {threshold}")
    found = {}
    with new_directory(online) as fresh:
        (fresh / UNFINISHED).touch()
        for role in (SNAPSHOT, TIMESTAMP, *((RELEASES,) if publishes else ())):
            found[role] = RoleKeys((_made(fresh, role),))
        with new_directory(offline) as apart:
            (apart / UNFINISHED).touch()
            found[ROOT] = RoleKeys(tuple(_made(apart, f"root-{number}") for number in range(1, roots + 1)), threshold)
            for role in (TARGETS, *(() if publishes else (RELEASES,))):
                found[role] = RoleKeys((_made(apart, role),))
    return found


def new_key(directory: Path, role: str) -> SSlibKey:
    """Make ROLE.key and ROLE.pub in a new ``directory``; where it was made already, the key that is there."""
    public = directory / f"{role}.pub"
    if not public.exists():
        with new_directory(directory) as fresh:
            _made(fresh, role)
    return read_key(public)


def read_key(path: Path) -> SSlibKey:
    """The public key in a file.

    Raises:
        Refused: it holds no Ed25519 key.
    """
    algorithm, raw = read_public_key(path)
    if algorithm != ED25519:
        raise Refused(f"{path}: the keys of a repository are Ed25519")
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(raw))


def load_signers(directories: Iterable[Path]) -> dict[str, CryptoSigner]:
    """Every private key in files NAME.key of these directories.

    Raises:
        Refused: a directory holds none, others may read a key, or a file is no Ed25519 key.
    """
    found = {}
    for directory in directories:
        paths = sorted(directory.glob("*.key"))
        if not paths:
            raise Refused(f"{directory} holds no key (NAME.key)")
        for path in paths:
            try:
                key = load_pem_private_key(read_private_key(path), None)
            except (ValueError, TypeError):
                key = None
            if not isinstance(key, Ed25519PrivateKey):
                raise Refused(f"{path}: this is no Ed25519 private key in PEM without a password")
            signer = CryptoSigner(key)
            found[signer.public_key.keyid] = signer
    return found


def _made(directory: Path, name: str) -> SSlibKey:
    public = new_signing_key(directory, name).public
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(public))
