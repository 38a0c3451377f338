"""TLS certificates of a fleet: an authority of its own, which devices pin, and the gateways' certificates under it.

They begin two years ago and last ten: a device whose clock is wrong must hear the time before it can set it, and TLS comes first.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from fedcore.errors import Refused
from fedcore.secagg.keys import read_certificate, read_private_key

__all__ = ["GATEWAY_NAME", "is_loopback", "new_authority", "new_gateway_certificate", "read_tls"]

GATEWAY_NAME = "gateway.fedcore.internal"
"""In every certificate of a fleet's own authority: what counts is who signed it, not where it answers."""
_BACKDATED, _YEARS, _YEAR = 2, 10, datetime.timedelta(days=365.25)


def new_authority(directory: Path, name: str) -> bytes:
    """Make a fleet's TLS authority, authority.key and authority.pem in ``directory``; its certificate in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    certificate = _builder(subject, subject, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _write(directory, "authority", key, certificate.sign(key, hashes.SHA256()))


def new_gateway_certificate(authority: Path, directory: Path, hosts: Sequence[str] = ()) -> bytes:
    """Make a gateway's TLS key under the authority in another directory: tls.key and tls.pem; the certificate in PEM.

    ``hosts``: names and addresses that it is good for beside `GATEWAY_NAME`.

    Raises:
        Refused: there is no authority, or its key may be read by others.
    """
    signer = load_pem_private_key(read_private_key(authority / "authority.key"), None)
    issuer = x509.load_pem_x509_certificate(read_certificate(authority / "authority.pem"))
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise Refused(f"{authority / 'authority.key'}: a key on P-256 is needed")
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_name(host) for host in (GATEWAY_NAME, *hosts)])
    certificate = (
        _builder(_subject("gateway"), issuer.subject, key)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    return _write(directory, "tls", key, certificate)


def read_tls(directory: Path) -> tuple[bytes, bytes]:
    """A gateway's TLS key and certificate, both in PEM.

    Raises:
        Refused: one is missing, or others may read the key.
    """
    return read_private_key(directory / "tls.key"), read_certificate(directory / "tls.pem")


def is_loopback(host: str) -> bool:
    """Whether what is sent there cannot leave this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    begin = datetime.datetime.now(datetime.UTC) - _BACKDATED * _YEAR
    serial = x509.random_serial_number()
    return x509.CertificateBuilder(issuer, subject, key.public_key(), serial, begin, begin + _YEARS * _YEAR)


def _subject(name: str) -> x509.Name:
    if not (1 <= len(name) <= 64 and name.isprintable()):
        raise Refused(f"a certificate has a printable name of 1 to 64 characters, got {name!r}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(directory: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bytes:
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = directory / f"{name}.key"
    file.touch(0o600, exist_ok=False)
    file.write_bytes(secret)
    pem = certificate.public_bytes(Encoding.PEM)
    (directory / f"{name}.pem").write_bytes(pem)
    return pem
