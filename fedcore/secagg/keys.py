"""Key files of the parties that are no device: identity and signing keys, TLS certificates, and messages kept as readable JSON.

Private keys are PKCS #8 in PEM, mode 0600, in a directory of mode 0700 that appears complete or not at all; one that others may
read is refused. Public keys are SubjectPublicKeyInfo in PEM. TLS certificates are self-signed: they are pinned by fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from fedcore.errors import Refused
from fedcore.secagg.crypto import ED25519, P256, Ed25519Key
from fedcore.secagg.encoding import Message

__all__ = [
    "IDENTITY", "SIGNING", "TLS_NAME", "expiry_of", "fingerprint_of", "new_directory", "new_signing_key", "new_tls_certificate",
    "read_certificate", "read_message", "read_private_key", "read_public_key", "read_signing_key", "write_message",
]  # fmt: skip

IDENTITY, SIGNING = "identity", "signing"  # a committee member's key; the key of an enrolment authority or of trust bundles
TLS_NAME = "committee.fedcore.internal"  # in every certificate: what counts is the pinned certificate, not where it answers
_MOST_BYTES = 1 << 20
_M = TypeVar("_M", bound=Message)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory of mode 0700 to fill, which appears at ``path`` when the block ends.

    Raises:
        Refused: there is something already, which is left as it is, or the directory cannot be made.
    """
    path = path.absolute()
    fresh = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield fresh
        fresh.rename(path)  # takes the place of an empty directory, and of nothing else
    except OSError as error:
        if path.exists():
            raise Refused(f"{path} exists already; keys are never overwritten") from error
        raise Refused(f"{path} cannot be made ({error.strerror})") from error
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)


def new_signing_key(directory: Path, name: str) -> Ed25519Key:
    """Make an Ed25519 key: NAME.key (private) and NAME.pub in ``directory``."""
    key = Ed25519PrivateKey.generate()
    _write(directory / f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write(directory / f"{name}.pub", key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return Ed25519Key(key.private_bytes_raw())


def new_tls_certificate(directory: Path, name: str, days: int) -> bytes:
    """Make a TLS key and a self-signed certificate good for ``days``, tls.key and tls.pem in ``directory``; the latter's PEM.

    P-256, which every TLS library takes.
    """
    if not (1 <= len(name) <= 64 and name.isprintable() and 1 <= days <= 36500):
        raise Refused(f"a certificate has a printable name of 1 to 64 characters and 1 to 36500 days, got {name!r} and {days}")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    _write(directory / "tls.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write(directory / "tls.pem", certificate, 0o644)
    return certificate


def read_signing_key(path: Path) -> Ed25519Key:
    """The Ed25519 key in a file.

    Raises:
        Refused: there is none, or others may read it.
    """
    data = read_private_key(path)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(f"{path}: this is no Ed25519 private key in PEM without a password")
    return Ed25519Key(key.private_bytes_raw())


def read_private_key(path: Path) -> bytes:
    """The content of a file that must be its owner's alone.

    Raises:
        Refused: it cannot be read, or its mode lets others read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise Refused(f"{path}: others may read this key (mode {mode:o}); make it 600, or make another key")
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise Refused(f"{path}: the key cannot be read ({error.strerror})") from error


def read_public_key(path: Path) -> tuple[int, bytes]:
    """The signature algorithm and the key as certificates carry it, 32 bytes (Ed25519) or 33 (P-256, compressed).

    Raises:
        Refused: the file holds no such key.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, Ed25519PublicKey):
        return ED25519, key.public_bytes_raw()
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return P256, key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    raise Refused(f"{path}: this is no public key (PEM) of Ed25519 or P-256")


def read_certificate(path: Path) -> bytes:
    """The PEM of a TLS certificate.

    Raises:
        Refused: the file holds none.
    """
    data = _read(path)
    try:
        return x509.load_pem_x509_certificate(data).public_bytes(Encoding.PEM)
    except ValueError:
        raise Refused(f"{path}: this is no certificate in PEM") from None


def fingerprint_of(certificate: bytes) -> str:
    """SHA-256 over a certificate (PEM) in DER, 64 hexadecimal digits: what is pinned."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def expiry_of(certificate: bytes) -> datetime.datetime:
    """When a certificate (PEM) ends, UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def write_message(path: Path, message: Message) -> None:
    """Write a signed, public message as JSON: its fields to read, and ``bytes``, the canonical bytes, to use.

    Raises:
        Refused: the file exists or cannot be written.
    """
    try:
        _write(path, (json.dumps(_document(message), indent=2, ensure_ascii=False) + "\n").encode(), 0o644)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror})") from error


def read_message(path: Path, kind: type[_M]) -> _M:
    """Inverse of `write_message`.

    Raises:
        Refused: the file holds no such message, or its fields are not what its bytes say.
    """
    data = _read(path)
    try:
        found = json.loads(data)
        message = kind.decode(bytes.fromhex(found["bytes"]))
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Refused(f"{path}: this is no JSON of a {kind.__name__}") from None
    if found != _document(message):
        raise Refused(f"{path}: the fields are not those that its bytes hold")
    return message


def _document(message: Any) -> dict[str, Any]:
    fields = {one.name: _readable(getattr(message, one.name)) for one in dataclasses.fields(message)}
    return {"type": type(message).__name__, **fields, "bytes": message.encode().hex()}


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [_readable(one) for one in value] if isinstance(value, tuple) else value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    with open(handle, "wb") as file:  # noqa: PTH123 - from a descriptor, so that the mode is set from the start
        file.write(data)
        file.flush()
        os.fsync(handle)
